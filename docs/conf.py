"""Sphinx settings of the site: Markdown pages, an API reference from docstrings, and pictures that the examples draw.

The build needs no network: it loads no inventories of other projects. The pages load no scripts from other hosts:
formulas are converted to MathML during the build.
"""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "bilevel and imaml"
author = "the authors of bilevel and imaml"
project_copyright = "2026, " + author
release = version = importlib.metadata.version("bilevel-imaml")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    # Extensions of this project, in docs/extensions.
    "docstrings",
    "gallery",
    "mathml",
    "refusals",
]
exclude_patterns = ["extensions", "generated/*.md"]
default_role = "code"
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!bilevel|imaml).*"),  # names of other projects
    (r"py:class", r"bilevel\.stochastic\.\w+\.(T|Class)"),  # type variables
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["ref.python"]  # several records have an attribute w, so a reference to `w` is ambiguous

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
pygments_style = "tango"
pygments_dark_style = "native"
