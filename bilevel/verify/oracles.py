"""Deprecated name of :mod:`bilevel.verify.references`; it is removed in version 0.3."""

import warnings
from typing import Any

from bilevel.verify import references

_NEW_NAMES = {
    "finite_differences": "finite_differences",
    "unrolled": "unrolled",
    "dense": "dense",
    "Reference": "Reference",
    "OracleError": "ReferenceUnavailable",
}


def __getattr__(name: str) -> Any:
    if name not in _NEW_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _NEW_NAMES[name]
    warnings.warn(
        f"bilevel.verify.oracles.{name} is deprecated and will be removed in version 0.3: "
        f"use bilevel.verify.references.{new}",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(references, new)
