"""Implicit MAML: few-shot learning in an amount of memory that does not grow with the number of inner steps.

This package implements the algorithm of Rajeswaran, Finn, Kakade and Levine (2019) with :mod:`bilevel`. For comparison,
it also has MAML, first-order MAML and Reptile.

Importing the package does not import JAX, so that the command line can show its help at once. The public names are
those of ``imaml.public``, which is imported when one of them is first used.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imaml.public import *  # noqa: F403

PACKAGES = ("datasets", "learning", "parallel", "runs", "settings", "storage")
"""The subpackages that are attributes of ``imaml`` without an import of their own, such as ``imaml.datasets``."""


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        importlib.import_module("imaml.public")  # imports the modules inside the subpackages as well
        return importlib.import_module(f"imaml.{name}")
    private = name.startswith("_") and name != "__all__"
    # ``from imaml import cli`` asks for the attribute first, and imports the module after an AttributeError.
    if not private and find_spec(f"imaml.{name}") is None:
        public = importlib.import_module("imaml.public")
        if name in ("__all__", *public.__all__):
            return getattr(public, name)
    raise AttributeError(f"module 'imaml' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
