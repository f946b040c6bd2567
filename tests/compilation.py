"""Compile a part of a test with all of XLA's optimisations, although its module disables most of them."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Compile with all optimisations in a module that uses the fixture ``quick_compilation``."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
