"""The description of a setting, of a method's option or of a threshold: its help and its check."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, SupportsIndex, TypeVar, cast

from igseg.errors import InputError, check_choice


@dataclass(frozen=True)
class Setting:
    """The description of a setting, from which its flag, its help and its check are made."""

    group: str  # of flags in --help
    meaning: str
    choices: Sequence[str] | None = None
    least: int | None = None  # the value is a whole number, and not below this
    most: int | None = None
    above: float | None = None  # the value is a number, and larger than this
    below: float | None = None
    metavar: str | None = None
    default_text: str = '%(default)s'  # in the help
    instead_of: str = ''  # another setting; the user may give only one of the two
    required: bool = False
    describes: bool = False  # it changes only how an explanation is described

    @property
    def help(self) -> str:
        """The line in --help."""
        if not self.meaning:
            return f'default: {self.default_text}'
        default = f' (default: {self.default_text})' if self.default_text else ''
        return self.meaning.replace('%', '%%') + default

    def checked(self, name: str, value: object) -> object:
        """The value, with numbers of Python's types. Raises InputError if it is not allowed."""
        if self.choices is not None:
            check_choice(name, value if isinstance(value, str) else repr(value), self.choices)
        if self.least is not None:
            value = self._whole(name, value, self.least)
        if self.above is not None:
            value = self._between(name, value, self.above)
        return value

    def _whole(self, name: str, value: object, least: int) -> int:
        """A whole number from `least` to `most`."""
        try:
            number = None if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
        except TypeError:
            number = None
        if number is None or number < least:
            raise InputError(f'{name} must be a whole number of at least {least}')
        if self.most is not None and number > self.most:
            raise InputError(f'{name} must be at most {self.most}, not {value}')
        return number

    def _between(self, name: str, value: object, above: float) -> float:
        """A number larger than `above` and smaller than `below`."""
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(cast(float, value)) if is_real else math.nan
        valid = math.isfinite(number) and number > above
        if self.below is not None and not (valid and number < self.below):
            raise InputError(f'{name} must lie between {above:g} and {self.below:g}, not {value!r}')
        if not valid:
            raise InputError(f'{name} must be above {above:g}, not {value!r}')
        return number


Value = TypeVar('Value')


def setting(default: Value, group: str, meaning: str, **limits: Any) -> Value:
    """A field of a data class of settings. limits: see `Setting`."""
    return field(default=default, metadata={'setting': Setting(group, meaning, **limits)})


def resolved(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function or class that a row of a table names as text, 'package.module:name'.

    Rows are plain data, so that help and checks of settings need not import these modules. A row
    may also hold the function itself, as in a notebook.
    """
    if callable(function):
        return function
    module, _, name = function.partition(':')
    resolved_function = getattr(import_module(module), name)
    assert callable(resolved_function), function
    return resolved_function
