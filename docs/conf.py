"""Sphinx settings. Build with scripts/docs; nothing is fetched while building or reading."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import arch  # noqa: E402

# The pages' code runs on the CPU, with this interpreter, and leaves nothing outside docs/_build.
IPYTHON = HERE / "_build" / "ipython"
settings = IPYTHON / "profile_default" / "ipython_kernel_config.py"
settings.parent.mkdir(parents=True, exist_ok=True)
settings.write_text('c.IPKernelApp.log_level = "ERROR"\n')
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "IPYTHONDIR": str(IPYTHON),
    "ARCHLOOM_CACHE": str(HERE / "_build" / "cache"),
    "ARCHLOOM_DATA": str(HERE / "_build" / "data"),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
}

project, author, release = "Archloom", "the Archloom authors", arch.__version__
copyright = author
extensions = ["myst_nb", "registry"]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

html_theme = "furo"
html_title = f"Archloom {release}"
html_static_path = ["_static"]
html_css_files = ["archloom.css"]
html_copy_source = False
html_show_sphinx = False
