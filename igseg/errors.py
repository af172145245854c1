"""What can go wrong through no fault of the program. Each message says what, where, and the remedy.

The command line prints such a message as one sentence and ends with status 2; in a batch it costs
one image. Everything else that is raised is a bug of ours or of the user's network.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from typing import TypeVar

Result = TypeVar('Result')


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, which file, what to do."""


class EmptyTargetError(InputError):
    """The target region holds no pixel."""


class NoFrameError(InputError):
    """A file has fewer frames than were asked for."""


class OutputError(InputError):
    """A result cannot be written."""


class NonFiniteError(InputError):
    """Logits or gradients hold values that are not finite."""

    def __init__(self, what: str, alpha: float | None = None) -> None:
        """what: they are. alpha: of the interpolation step, where it was one."""
        place = '' if alpha is None else f' at alpha = {alpha:.4g} between baseline and image'
        super().__init__(
            f'{what} are not finite{place} (is the checkpoint damaged? with reduced precision, '
            'try precision float32)'
        )


def one_line(error: BaseException, length: int = 200) -> str:
    """An error's text on one line, for a message of ours."""
    return ' '.join(str(error).split())[:length] or type(error).__name__


def attempt(
    work: Callable[[], Result], *expected: type[Exception]
) -> tuple[Result | None, str | None]:
    """What some work gives, and None; or None, and the text of an expected error.

    The error itself ends here: its traceback would keep every tensor of the work alive while the
    caller tries something else, and a variable that holds it would do so until Python's garbage
    collector comes by.
    """
    try:
        return work(), None
    except expected as error:
        return None, str(error)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise InputError for a value that is not among the choices."""
    if value not in choices:
        raise InputError(f'unknown {name} "{value}" (choose from {", ".join(choices)})')


def unexpected(error: Exception) -> str:
    """What is said of an error that nobody foresaw: a line, and below it the traceback."""
    trace = ''.join(traceback.format_exception(error)).strip()
    return f'unexpected {type(error).__name__}: {one_line(error)} (please report it)\n{trace}'
