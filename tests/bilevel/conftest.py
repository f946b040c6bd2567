"""Run every test of bilevel in float64 with strict dtype promotion, and leave the settings of other tests alone."""

import jax
import pytest


@pytest.fixture(autouse=True)
def float64_and_strict_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield
