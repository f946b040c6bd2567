"""Every test of bilevel runs in float64 with strict promotion, and leaves other tests as they were."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `import problems`: the closed forms all tests share


@pytest.fixture(autouse=True)
def float64_and_strict_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
