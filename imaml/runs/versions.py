"""What a run was made with: the versions that decide its last bits."""

import platform
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "bilevel-imaml"


def versions() -> dict[str, str]:
    """Of this package, Python, jax, jaxlib and numpy; nothing is imported to find out."""
    names = {"imaml": DISTRIBUTION, "jax": "jax", "jaxlib": "jaxlib", "numpy": "numpy"}
    return {"python": platform.python_version()} | {name: _version(package) for name, package in names.items()}


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # run from its source
