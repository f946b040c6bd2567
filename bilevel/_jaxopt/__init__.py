"""All code that uses jaxopt, a library that is no longer maintained.

Of this package, only ``library`` imports jaxopt. That import takes a second, so modules outside of this folder import
``library``, and ``adapters``, which imports it, only inside functions. To replace jaxopt, replace this folder.
"""
