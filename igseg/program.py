"""How the user starts this program: by a file of the project's folder, or by an installed script.

Commands that are printed for the user, and the program's name in help and errors, come from here.
"""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec
from pathlib import Path

PROJECT = 'integrated-gradients-segmentation'  # the name for pip

MAIN, RUNNER = 'integrated-gradients', 'run-integrated-gradients'  # the installed scripts

# The packages in requirements.txt, by the names that are imported.
PACKAGES = {
    'torch': 'torch', 'torchvision': 'torchvision', 'safetensors': 'safetensors',
    'segmentation_models_pytorch': 'segmentation-models-pytorch', 'numpy': 'numpy',
    'scipy': 'scipy', 'pandas': 'pandas', 'pyarrow': 'pyarrow', 'skimage': 'scikit-image',
    'tifffile': 'tifffile', 'jinja2': 'jinja2', 'matplotlib': 'matplotlib', 'anyascii': 'anyascii',
    'cv2': 'opencv-python-headless', 'PIL': 'pillow', 'pycocotools': 'pycocotools',
    'tqdm': 'tqdm', 'loky': 'loky', 'filelock': 'filelock', 'yaml': 'pyyaml',
}  # fmt: skip

# The file that does the same as each script.
FILES = {MAIN: 'integrated_gradients.py', RUNNER: 'run_integrated_gradients.py'}


def is_checkout() -> bool:
    """Whether this code lies in the project's folder, and not in that of an installed package."""
    return (Path(__file__).resolve().parent.parent / 'pyproject.toml').is_file()


def uses_scripts() -> bool:
    """Whether the user starts installed scripts, not the files in the project's folder."""
    return Path(sys.argv[0]).stem in FILES or not is_checkout()


def name_of(script: str = MAIN) -> str:
    """The name by which the user starts a script."""
    return script if uses_scripts() else FILES[script]


def command_of(script: str = MAIN) -> list[str]:
    """The words by which the user starts a script."""
    return [script] if uses_scripts() else ['python', FILES[script]]


def print_any_name() -> None:
    """Make printing possible for file names that are no valid Unicode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def install_command(extra: str = '') -> str:
    """The command that installs the packages that the program needs, or those of an extra, for
    example `medical`."""
    if uses_scripts():
        return f"pip install '{PROJECT}[{extra}]'" if extra else f'pip install {PROJECT}'
    return (
        f'pip install -r requirements-{extra}.txt' if extra else 'pip install -r requirements.txt'
    )


def check_packages() -> None:
    """End the program with one sentence if a required package is not installed. The packages are
    not imported here: some are slow to import, and some are needed only at the end of a run."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        verb = 'is' if len(missing) == 1 else 'are'
        print(f'error: {", ".join(missing)} {verb} not installed (run: {install_command()})',
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
