"""The setup of all tests: two CPU devices, import paths of shared modules, fixtures for precision and for images."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for `import problems`, `import archives`, …
sys.path.insert(0, str(TESTS.parent))  # for `import benchmarks`, which is not installed

jax.config.update("jax_num_cpu_devices", 2)  # works only before JAX starts


@pytest.fixture(scope="session", autouse=True)
def started_jax() -> int:
    """Start JAX now, so that no test can set another number of CPU devices. Return the number of devices."""
    return jax.local_device_count()


@pytest.fixture(scope="session")
def double_precision() -> Callable[[], contextlib.AbstractContextManager]:
    """Return a function whose result is a context manager that switches float64 on: ``with double_precision(): …``."""
    try:
        enable = jax.enable_x64
    except AttributeError:  # before jax 0.8.1
        from jax.experimental import enable_x64 as enable
    return lambda: enable(True)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compile a module's programs without most optimisations, which about halves the time of compilation.

    The programs become slower, but they run only briefly.
    """
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
    """Return twelve classes of six images, uint8 ``[12, 6, 28, 28, 1]``: each class is a coarse pattern with noise."""
    random = np.random.default_rng(0)
    patterns = np.kron(random.random((12, 1, 7, 7)) < 0.4, np.ones((4, 4)))
    noisy = 180 * patterns + 60 * random.random((12, 6, 28, 28))
    return noisy.astype(np.uint8)[..., np.newaxis]
