"""Sphinx settings. Build with scripts/docs; nothing is fetched while building or reading."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import mixers  # noqa: E402

import arch  # noqa: E402

# The pages' code runs on the CPU, with this interpreter, and leaves nothing outside docs/_build. %%bash is ours: both
# streams in one piece and in order, as a terminal would show them; a failure is an error of the build.
BASH = """
import subprocess
from IPython.core.magic import register_cell_magic

@register_cell_magic
def bash(line, cell):
    done = subprocess.run(["bash", "-e", "-c", cell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    done.check_returncode()
"""
PROFILE = HERE / "_build" / "ipython" / "profile_default"
(PROFILE / "startup").mkdir(parents=True, exist_ok=True)
(PROFILE / "startup" / "bash.py").write_text(BASH)
(PROFILE / "ipython_kernel_config.py").write_text('c.IPKernelApp.log_level = "ERROR"\n')
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "IPYTHONDIR": str(PROFILE.parent),
    "ARCHLOOM_CACHE": str(HERE / "_build" / "cache"),
    "ARCHLOOM_DATA": str(HERE / "_build" / "data"),
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
}

project, author, release = "Archloom", "the Archloom authors", arch.__version__
copyright = author
mixers.write(HERE / "mixers")  # a page each, made anew by every build
extensions = ["myst_nb", "registry", "mixers", "gallery", "matrix"]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
smartquotes = False  # command-line flags keep their dashes

html_theme = "furo"
html_title = f"Archloom {release}"
html_static_path = ["_static"]
html_css_files = ["archloom.css"]
html_copy_source = False
html_show_sphinx = False
