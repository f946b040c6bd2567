"""Old names of arguments that are still accepted, with a warning.

A deprecated name is kept for one minor version. The warning names the replacement and the version that
removes the old name.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class")


def renamed_field(old: str, new: str, removal: str = "0.3") -> Callable[[type[Class]], type[Class]]:
    """Return a class decorator by which a dataclass still accepts the old name of a field.

    The old keyword of the constructor sets the new field, and the old attribute reads it. Both warn.

    Args:
        old: the former name.
        new: the field's present name.
        removal: the first version without the old name.

    Raises:
        TypeError: in the decorated constructor, if it gets both names.

    Example:
        >>> from dataclasses import dataclass
        >>> @renamed_field("maxiter", "max_steps")
        ... @dataclass(frozen=True)
        ... class Solver:
        ...     max_steps: int
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     solver = Solver(maxiter=3)
        >>> solver.max_steps, str(caught[0].message)
        (3, 'Solver(maxiter=…) is deprecated and will be removed in version 0.3: use max_steps')
    """

    def decorate(cls: type[Class]) -> type[Class]:
        construct: Callable[..., None] = cls.__init__

        @functools.wraps(construct)
        def __init__(self: Class, *arguments: Any, **options: Any) -> None:
            if old in options:
                if new in options:
                    raise TypeError(f"{cls.__name__} got both {new} and its deprecated name {old}: use {new} alone")
                _warn(f"{cls.__name__}({old}=…)", new, removal)
                options[new] = options.pop(old)
            construct(self, *arguments, **options)

        def read(self: Class) -> Any:
            _warn(f"{cls.__name__}.{old}", new, removal)
            return getattr(self, new)

        setattr(cls, "__init__", __init__)  # noqa: B010  # pyright rejects the assignment to a method
        setattr(cls, old, property(read, doc=f"Deprecated name of ``{new}``."))
        return cls

    return decorate


def _warn(what: str, new: str, removal: str) -> None:
    message = f"{what} is deprecated and will be removed in version {removal}: use {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
