"""Where the programs start: what can be answered without torch is answered before it is imported.

A package that is not installed, `--help` and an error of usage take a moment; importing torch
takes seconds. So this module imports next to nothing itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

from igseg.program import MAIN, RUNNER, check_packages, print_any_name


def answer_first(argv: Sequence[str] | None = None) -> None:
    """End the program where a package is missing, where argv asks for help, and where it holds an
    error of usage; otherwise return, and let Ctrl-C end the program without a traceback."""
    print_any_name()
    check_packages()
    signal.signal(signal.SIGINT, _interrupted)
    command_line = import_module('igseg.command_line')  # with numpy, which may have been missing
    command_line.answer(argv)


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C while libraries are imported, before the work and its own way to stop begin."""
    print('interrupted: nothing was started', file=sys.stderr, flush=True)
    os._exit(130)


# The installed scripts. They import the user's module when it is needed: by its name, because it
# stands above the package, which does not know it.


def integrated_gradients() -> int:
    """The script `integrated-gradients`."""
    answer_first()
    return _run(MAIN)


def run_integrated_gradients() -> int:
    """The script `run-integrated-gradients`."""
    check_packages()
    return _run(RUNNER)


def _run(script: str) -> int:
    status: int = import_module(script.replace('-', '_')).main()
    return status
