"""Adapters to jaxopt, a library that is no longer maintained, and exact versions of its projections and proximal maps.

Only ``library`` imports jaxopt, and ``adapters`` imports ``library``. The import of jaxopt takes a second, so all other
modules import these two only inside functions.
"""
