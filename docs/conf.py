import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import zoo_pages  # noqa: E402

import normzoo  # noqa: E402

project = "normzoo"
author = "the normzoo authors"
version = release = normzoo.__version__
html_title = f"normzoo {version}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False

# No intersphinx and no math renderer: the build needs no network, nor do the pages.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# Parts of pages, which include them.
exclude_patterns = ["_build", "experiments/*.md", "performance/*.md"]
html_extra_path = ["performance/report.html"]
myst_heading_anchors = 3
# Single backticks in docstrings are code.
default_role = "code"
autodoc_member_order = "bysource"
# torch's docstrings refer to pages that are not here.
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
# Arguments described together stay together.
napoleon_use_param = False


def setup(app):
    app.connect("builder-inited", lambda app: zoo_pages.write_gallery(HERE / "gallery"))
