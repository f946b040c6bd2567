"""What all tests share: two CPU devices, a test in float64, and a handful of images."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 2)  # before JAX starts, which the first test's fixture sees to


@pytest.fixture(scope="session", autouse=True)
def started_jax() -> int:
    """Starts JAX with these devices, before a test can ask for others."""
    return jax.local_device_count()


@pytest.fixture(scope="session")
def double_precision() -> Callable[[], contextlib.AbstractContextManager]:
    """``with double_precision():`` computes in float64."""
    try:
        enable = jax.enable_x64
    except AttributeError:  # before jax 0.8.1
        from jax.experimental import enable_x64 as enable
    return lambda: enable(True)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles a module's programs in half the time, where there is little to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)  # the default


@pytest.fixture
def x64(double_precision) -> Iterator[None]:
    """Runs a test in float64."""
    with double_precision():
        yield


@pytest.fixture(scope="session")
def tiny_pixels() -> np.ndarray:
    """Twelve classes of six images, uint8 ``[12, 6, 28, 28, 1]``: a coarse pattern for each class, with noise."""
    random = np.random.default_rng(0)
    patterns = np.kron(random.random((12, 1, 7, 7)) < 0.4, np.ones((4, 4)))
    noisy = 180 * patterns + 60 * random.random((12, 6, 28, 28))
    return noisy.astype(np.uint8)[..., np.newaxis]
