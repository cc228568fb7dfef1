"""Sphinx settings: MyST pages, docstrings in Google style, furo."""

import pa_core

project = "pa-core"
author = "The pa-core authors"
copyright = author  # noqa: A001 - the name that Sphinx reads
release = version = pa_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pa-core {release}"

default_role = "py:obj"  # `Trainer.train` in a docstring becomes a link where there is one
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
