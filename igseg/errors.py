"""Errors that are no fault of the program. Each message says what is wrong, where, and what to do.

The command line prints such a message as one sentence and ends with status 2; in a batch only the
image with the error is left out. Any other exception is a bug of this program or of the user's
network.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from typing import TypeVar

Result = TypeVar('Result')


class InputError(ValueError):
    """The user's input cannot be used; the message says what is wrong, where, and what to do."""


class EmptyTargetError(InputError):
    """The target region holds no pixel."""


class NoFrameError(InputError):
    """A file does not have the frame that the user wants."""


class OutputError(InputError):
    """A result cannot be written."""


class NonFiniteError(InputError):
    """Logits or gradients hold values that are not finite."""

    def __init__(self, what: str, alpha: float | None = None) -> None:
        """what: the name of the values. alpha: of the interpolation step, if they belong to one."""
        place = '' if alpha is None else f' at alpha = {alpha:.4g} between baseline and image'
        super().__init__(
            f'{what} are not finite{place} (is the checkpoint damaged? with reduced precision, '
            'try precision float32)'
        )


def one_line(error: BaseException, length: int = 200) -> str:
    """The text of an error on one line, to be part of a message."""
    return ' '.join(str(error).split())[:length] or type(error).__name__


def attempt(
    compute: Callable[[], Result], *expected: type[Exception]
) -> tuple[Result | None, str | None]:
    """The result of `compute`, and None; or None, and the text of an expected error.

    The error itself is not kept: its traceback would keep all tensors of the computation in memory
    while the caller tries something else.
    """
    try:
        return compute(), None
    except expected as error:
        return None, str(error)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise InputError for a value that is not among the choices."""
    if value not in choices:
        raise InputError(f'unknown {name} "{value}" (choose from {", ".join(choices)})')


def unexpected(error: Exception) -> str:
    """The message for an unexpected error: a line, and below it the traceback."""
    trace = ''.join(traceback.format_exception(error)).strip()
    return f'unexpected {type(error).__name__}: {one_line(error)} (please report it)\n{trace}'
