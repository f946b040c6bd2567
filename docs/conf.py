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
metadata = importlib.metadata.metadata("bilevel-imaml")
urls = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL", []))

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    # Extensions of this project, in docs/extensions.
    "commandline",
    "docstrings",
    "figures",
    "gallery",
    "mathml",
    "refusals",
]
exclude_patterns = ["extensions", "generated/*"]
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

# A copy button takes the code of a doctest or a console block: it leaves out prompts and outputs.
copybutton_prompt_text = r">>> |\.\.\. |\w*\$ +"
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
# Each page links to its source once pyproject.toml names the address of the repository.
if repository := urls.get("Repository"):
    html_theme_options = {"source_repository": repository, "source_branch": "main", "source_directory": "docs/"}
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
pygments_style = "tango"
pygments_dark_style = "native"
