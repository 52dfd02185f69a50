"""Settings of Sphinx: guides in Markdown (MyST), reference pages from the docstrings of the package."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import hf_clip  # noqa: E402

project = "hf_clip"
author = "The hf_clip developers"
copyright = "the hf_clip developers, MIT licence"
version = release = hf_clip.__version__

extensions = [
    "myst_parser",
    "option_tables",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
suppress_warnings: list[str] = []
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"hf_clip {version}"
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/hf-clip/hf_clip/",
    "source_branch": "main",
    "source_directory": "docs/",
}
html_static_path = ["_static"]
html_css_files = ["tables.css"]

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
smartquotes = False  # they would make one dash of the two before an option
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_selector = "div:not(.highlight-text) > div.highlight pre"  # what a program prints is not copied
copybutton_prompt_text = "$ "  # of a block that shows commands with their output, the commands alone are copied


def put_dashes(app: Sphinx, page: nodes.document, name: str) -> None:
    """Sphinx writes two hyphens between an argument and its meaning, of which only smart quotes make a dash."""
    for text in list(page.findall(nodes.Text)):
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> None:
    app.connect("doctree-resolved", put_dashes)
