"""Programs of the checks, which are kept from one call to the next.

``jax.jit`` traces and compiles again for each new function object. A check that wraps a function of its own in ``jit``
would therefore be compiled in each call. The functions of this package that make such a program are decorated by
:func:`kept`. Their arguments are the objects that the program depends on, such as the problem. All arrays are arguments
of the program.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

KEPT = 64
"""Number of programs that each decorated function keeps. The least recently used programs are dropped."""

Program = TypeVar("Program")


def kept(make: Callable[..., Program]) -> Callable[..., Program]:
    """Decorate a function that makes a program, so that it returns the same program for equal arguments.

    If an argument cannot be hashed, for example because one of its fields is an array, each call makes a new program.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> @kept
        ... def make(function):
        ...     return jax.jit(function)
        >>> make(jnp.sin) is make(jnp.sin), make(jnp.sin) is make(jnp.cos)
        (True, False)
    """
    recall = functools.lru_cache(maxsize=KEPT)(make)

    @functools.wraps(make)
    def program(*arguments: Any) -> Program:
        try:
            hash(arguments)
        except TypeError:
            return make(*arguments)
        return recall(*arguments)

    return program
