"""Sphinx's settings.  What has to pass: ``sphinx-build -W --keep-going -b html docs <folder>``."""

import sqla_queries_pool

project = "sqla_queries_pool"
author = "the sqla_queries_pool authors"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_show_copyright = False  # LICENSE has it
version = release = sqla_queries_pool.__version__

# No intersphinx: building needs no network.  What is SQLAlchemy's is named, and has no link.
extensions = ["sphinx.ext.autodoc", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sqla_queries_pool {release}"

# A reference that leads nowhere is an error, unless it is to somebody else's documentation.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(sqlalchemy|weakref|collections|datetime)\..*"),
    ("py:.*", r"(KeyError|TypeError|ValueError|None|Exception)"),
]
autodoc_typehints = "none"  # the text of the parameters says more
autodoc_member_order = "bysource"
