"""Nested settings by dotted path. The command line uses this module, so it does not import JAX."""

from typing import Any


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted path.

    >>> flat({"seed": 0, "inner": {"max_steps": 16}})
    {'seed': 0, 'inner.max_steps': 16}
    """
    found = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
