"""Where the programs start. Before torch is imported, they answer all that needs no torch.

These are missing packages, `--help` and errors of usage. Answers to them take a moment, and the
import of torch takes seconds. So this module itself imports next to nothing.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType

from igseg.program import MAIN, RUNNER, check_packages, print_any_name


def answer_first(argv: Sequence[str] | None = None) -> None:
    """End the program if a package is missing, or if argv asks for help or holds an error of usage.
    Otherwise return; from then on Ctrl-C ends the program without a traceback, and until `run`
    Python does not look for garbage, which imports do not leave."""
    print_any_name()
    check_packages()
    signal.signal(signal.SIGINT, _interrupted)
    command_line = import_module('igseg.command_line')  # imports numpy, which is installed
    command_line.answer(argv)
    gc.disable()


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C while libraries are imported. Later `StopSignals` takes its place."""
    print('interrupted: nothing was started', file=sys.stderr, flush=True)
    os._exit(130)


def run(main: Callable[[], int]) -> int:
    """The exit status of a program whose libraries are imported. Python looks for garbage only
    among what the program makes, and at its end among nothing: this saves more than a second."""
    gc.freeze()
    gc.enable()
    try:
        return main()
    finally:
        gc.freeze()


# The installed scripts. They import the user's module late, and by its name: it stands above the
# package, whose modules may not import it.


def integrated_gradients() -> int:
    """The script `integrated-gradients`."""
    answer_first()
    return _run(MAIN)


def run_integrated_gradients() -> int:
    """The script `run-integrated-gradients`."""
    check_packages()
    return _run(RUNNER)


def _run(script: str) -> int:
    return run(import_module(script.replace('-', '_')).main)
