"""Adapt autodoc to this project's docstrings in two respects.

- A constant is documented by the string below its assignment. Autodoc reads this string only in the module with the
  assignment, so it is copied to the package that re-exports the constant.
- In docstrings, |x| is an absolute value. reStructuredText would read it as a substitution, so | is escaped.
"""

import importlib
import re

from sphinx.pycode import ModuleAnalyzer

DEFINING_MODULES = {
    "bilevel": ("bilevel.certificates.lipschitz", "bilevel.conditions.stationary", "bilevel.solvers.protocol")
}
"""The modules that define a package's re-exported constants, by the name of the package."""


def setup(app):
    app.connect("builder-inited", copy_docstrings_of_constants)
    app.connect("autodoc-process-docstring", escape_absolute_values)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def copy_docstrings_of_constants(app):
    """Add the docstrings of re-exported constants to those that autodoc has read from the package's own file."""
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
    """Escape every | in a docstring outside of literals and doctests. A doctest ends at an empty line."""
    in_doctest = False
    for number, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest:
            lines[number] = re.sub(r"(``.*?``)|\|", lambda found: found[1] or r"\|", line)
