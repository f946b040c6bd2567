"""The versions of the packages that a run's last bits depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "bilevel-imaml"


def versions() -> dict[str, str]:
    """Return the versions of Python, this package, jax, jaxlib and numpy, without importing any of them."""
    names = {"imaml": DISTRIBUTION, "jax": "jax", "jaxlib": "jaxlib", "numpy": "numpy"}
    return {"python": platform.python_version()} | {name: _version(package) for name, package in names.items()}


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # imaml has no metadata if it runs from its source tree.
