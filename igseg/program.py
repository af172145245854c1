"""How the user starts this program: by a file of the project's folder, or by an installed script.

The commands that are printed for the user, and the name that help and errors say, come from here.
"""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec
from pathlib import Path

PROJECT = 'integrated-gradients-segmentation'  # its name for pip

MAIN, RUNNER = 'integrated-gradients', 'run-integrated-gradients'  # the installed scripts

# What requirements.txt asks for, by the names that are imported.
PACKAGES = {
    'torch': 'torch', 'torchvision': 'torchvision', 'safetensors': 'safetensors',
    'segmentation_models_pytorch': 'segmentation-models-pytorch', 'numpy': 'numpy',
    'scipy': 'scipy', 'pandas': 'pandas', 'pyarrow': 'pyarrow', 'skimage': 'scikit-image',
    'tifffile': 'tifffile', 'jinja2': 'jinja2', 'matplotlib': 'matplotlib',
    'cv2': 'opencv-python-headless', 'PIL': 'pillow', 'pycocotools': 'pycocotools',
    'tqdm': 'tqdm', 'loky': 'loky', 'filelock': 'filelock', 'yaml': 'pyyaml',
}  # fmt: skip

FILES = {MAIN: 'integrated_gradients.py', RUNNER: 'run_integrated_gradients.py'}  # that do the same


def is_checkout() -> bool:
    """Whether this code lies in the project's folder; a wheel's lies among the libraries."""
    return (Path(__file__).resolve().parent.parent / 'pyproject.toml').is_file()


def uses_scripts() -> bool:
    """Whether the user starts installed scripts, not the files in the project's folder."""
    return Path(sys.argv[0]).stem in FILES or not is_checkout()


def name_of(script: str = MAIN) -> str:
    """What the user calls a script."""
    return script if uses_scripts() else FILES[script]


def command_of(script: str = MAIN) -> list[str]:
    """The words by which the user starts a script."""
    return [script] if uses_scripts() else ['python', FILES[script]]


def print_any_name() -> None:
    """Have file names that are no valid Unicode printed, not stop the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def install_command(extra: str = '') -> str:
    """The command that installs what the program needs, or what it needs for an extra, for example
    `medical`."""
    if uses_scripts():
        return f"pip install '{PROJECT}[{extra}]'" if extra else f'pip install {PROJECT}'
    return (
        f'pip install -r requirements-{extra}.txt' if extra else 'pip install -r requirements.txt'
    )


def check_packages() -> None:
    """End the program, with one sentence, where a required package is not installed. None is
    imported: some take seconds, and some are needed only at the end of hours of work."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        verb = 'is' if len(missing) == 1 else 'are'
        print(f'error: {", ".join(missing)} {verb} not installed (run: {install_command()})',
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
