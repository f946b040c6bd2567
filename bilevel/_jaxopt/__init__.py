"""Everything that touches jaxopt, which is no longer maintained. No other module imports it.

``library`` imports jaxopt, which takes a second, so the other modules import ``library`` when they are used and not
before. To replace jaxopt, replace this folder.
"""
