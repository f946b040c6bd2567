"""Fixtures of all tests: two CPU devices, float64, fast compilation, and a few small images."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # must be set before JAX starts, in started_jax


@pytest.fixture(scope="session", autouse=True)
def started_jax() -> int:
    """Start JAX with these two devices, before a test can change their number. Returns the number of devices."""
    return jax.local_device_count()


@pytest.fixture(scope="session")
def double_precision() -> Callable[[], contextlib.AbstractContextManager]:
    """Return a context manager: code inside ``with double_precision():`` computes in float64."""
    try:
        enable = jax.enable_x64
    except AttributeError:  # before jax 0.8.1
        from jax.experimental import enable_x64 as enable
    return lambda: enable(True)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Switch off XLA's optimisations for a module. Compilation takes half the time, and programs run slower."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)  # the default


@pytest.fixture
def x64(double_precision) -> Iterator[None]:
    """Run a test in float64."""
    with double_precision():
        yield


@pytest.fixture(scope="session")
def tiny_pixels() -> np.ndarray:
    """Return 12 classes of 6 images, uint8 ``[12, 6, 28, 28, 1]``: a coarse pattern for each class, plus noise."""
    random = np.random.default_rng(0)
    patterns = np.kron(random.random((12, 1, 7, 7)) < 0.4, np.ones((4, 4)))
    noisy = 180 * patterns + 60 * random.random((12, 6, 28, 28))
    return noisy.astype(np.uint8)[..., np.newaxis]
