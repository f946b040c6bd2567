"""Two things that autodoc does not know of the docstrings of this project.

A string below an assignment is found in its own file only, not where a package hands the name on; classes and functions
carry theirs along. And |x| is an absolute value, where reStructuredText sees a substitution.
"""

import importlib
import re

from sphinx.pycode import ModuleAnalyzer

HOMES = {"bilevel": ("bilevel.certificates.lipschitz", "bilevel.solvers")}


def setup(app):
    app.connect("builder-inited", hand_on)
    app.connect("autodoc-process-docstring", keep_absolute_values)
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


def keep_absolute_values(app, what, name, obj, options, lines):
    """Escape | outside of literals and doctests, which go on until an empty line."""
    in_doctest = False
    for number, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest:
            lines[number] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)
