"""Sphinx configuration; ``python -m sphinx -W --keep-going docs docs/_build`` builds the site.

What pages include beside their own text (option lists, tables of results, figures, a page for each public symbol) is
made anew when a build begins, from the parsers, the docstrings and recorded data: nothing of it is stored.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MADE, SYMBOLS = HERE / "_generated", HERE / "api" / "symbols"
sys.path[:0] = [str(HERE.parent), str(HERE)]

from generate import make_all  # noqa: E402

import lorapre_dist  # noqa: E402

project = "lorapre_dist"
copyright = "the lorapre_dist authors"
release = version = lorapre_dist.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_generated"]
smartquotes = False  # options begin with two hyphens
html_theme = "furo"
html_title = f"lorapre_dist {release}"

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 4

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autosummary_generate = True
autosummary_imported_members = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True


def setup(app: Any) -> None:
    """Make what pages include before they are read."""
    shutil.rmtree(SYMBOLS, ignore_errors=True)  # of a symbol that is gone
    app.connect("builder-inited", lambda app: make_all(MADE))
