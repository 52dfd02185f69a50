"""Settings of Sphinx: guides in Markdown (MyST), reference pages from the docstrings of the package."""

import dataclasses
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_clip  # noqa: E402
from hf_clip.training.options import DEFAULT, GROUPS  # noqa: E402

project = "hf_clip"
author = "The hf_clip developers"
copyright = "the hf_clip developers, MIT licence"
version = release = hf_clip.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
suppress_warnings: list[str] = []
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"hf_clip {version}"
html_show_sphinx = False

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


class TrainingOptions(SphinxDirective):
    """`{training-options}`: a table for each group of the trainer's options, from the options themselves."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for group in GROUPS:
            lines += [
                f"## {group._argument_group_name.capitalize()}",
                "",
                "| option | default | meaning |",
                "|---|---|---|",
            ]
            for field in dataclasses.fields(group):
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                shown = "" if default in (None, "", []) else f"`{default}`"
                meaning = (
                    field.metadata["help"]
                    .removesuffix(DEFAULT)
                    .replace("%%", "%")
                    .replace("|", "\\|")
                    .replace("<", "\\<")
                )
                lines.append(f"| `--{field.name}` | {shown} | {meaning} |")
            lines.append("")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> None:
    app.add_directive("training-options", TrainingOptions)
