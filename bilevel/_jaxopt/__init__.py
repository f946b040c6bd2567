"""All code that uses jaxopt, a library that is no longer maintained.

Only ``library`` imports jaxopt, and ``adapters`` imports ``library``. The import of jaxopt takes a second, so all other
modules import these two only inside functions. To replace jaxopt, replace this folder.
"""
