"""Adapt autodoc to two habits of this project's docstrings.

- Autodoc reads the string below a constant's assignment only from the file with the assignment. A package that
  re-exports the constant needs a copy of that string.
- |x| is an absolute value, but reStructuredText reads it as a substitution.
"""

import importlib
import re

from sphinx.pycode import ModuleAnalyzer

DEFINING_MODULES = {
    "bilevel": ("bilevel.certificates.lipschitz", "bilevel.conditions.stationary", "bilevel.solvers.protocol")
}
"""For each package, the modules that define the documented constants which it re-exports."""


def setup(app):
    app.connect("builder-inited", copy_docstrings_of_constants)
    app.connect("autodoc-process-docstring", escape_absolute_values)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def copy_docstrings_of_constants(app):
    """Add the strings below the constants' assignments to what autodoc has read from the package."""
    for package, modules in DEFINING_MODULES.items():
        names = importlib.import_module(package).__all__
        target = ModuleAnalyzer.for_module(package)
        target.analyze()
        for module in modules:
            source = ModuleAnalyzer.for_module(module)
            source.analyze()
            found = {key: lines for key, lines in source.attr_docs.items() if key[0] == "" and key[1] in names}
            target.attr_docs = target.attr_docs | found


def escape_absolute_values(app, what, name, obj, options, lines):
    """Escape every | outside of literals and doctests. A doctest ends at an empty line."""
    in_doctest = False
    for number, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest:
            lines[number] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)
