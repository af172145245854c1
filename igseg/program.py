"""How the user starts this program: by a file of the project's folder, or by an installed script.

The commands that are printed for the user, and the name that help and errors say, come from here.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = 'integrated-gradients-segmentation'  # its name for pip

MAIN, RUNNER = 'integrated-gradients', 'run-integrated-gradients'  # the installed scripts

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


def install_command(extra: str) -> str:
    """The command that installs what is needed for an extra, for example `medical`."""
    if uses_scripts():
        return f"pip install '{PROJECT}[{extra}]'"
    return f'pip install -r requirements-{extra}.txt'
