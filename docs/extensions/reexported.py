"""Lets autodoc find the docstring of a constant or type that a package hands on from one of its modules.

Classes and functions carry their docstrings along; a string below an assignment is found in its own file only.
"""

import importlib

from sphinx.pycode import ModuleAnalyzer

HOMES = {"bilevel": ("bilevel.certificates.lipschitz", "bilevel.solvers")}


def setup(app):
    app.connect("builder-inited", hand_on)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def hand_on(app):
    for package, homes in HOMES.items():
        names = importlib.import_module(package).__all__
        target = ModuleAnalyzer.for_module(package)
        target.analyze()
        for home in homes:
            source = ModuleAnalyzer.for_module(home)
            source.analyze()
            found = {key: lines for key, lines in source.attr_docs.items() if key[0] == "" and key[1] in names}
            target.attr_docs = target.attr_docs | found
