"""What is known of a setting, of an option of a method, of a threshold: its help and its check."""

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
    """All that is known of one setting: its flag, its help and its check are made from this."""

    group: str  # of flags
    meaning: str
    choices: Sequence[str] | None = None
    least: int | None = None  # a whole number of at least this
    most: int | None = None
    above: float | None = None
    below: float | None = None
    metavar: str | None = None
    default_text: str = '%(default)s'  # in the help
    instead_of: str = ''  # another setting; only one of the two may be given
    required: bool = False
    describes: bool = False  # it changes what is told of an explanation, not the explanation

    @property
    def help(self) -> str:
        """Its line in --help."""
        if not self.meaning:
            return f'default: {self.default_text}'
        default = f' (default: {self.default_text})' if self.default_text else ''
        return self.meaning.replace('%', '%%') + default

    def checked(self, name: str, value: object) -> object:
        """The value, numbers as Python's own. Raises InputError for one that makes no sense."""
        if self.choices is not None:
            check_choice(name, value if isinstance(value, str) else repr(value), self.choices)
        if self.least is not None:
            value = self._whole(name, value, self.least)
        if self.above is not None:
            value = self._between(name, value, self.above)
        return value

    def _whole(self, name: str, value: object, least: int) -> int:
        """A whole number, of at least `least` and at most `most`."""
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
        """A number beyond `above` and before `below`."""
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(cast(float, value)) if real else math.nan
        fine = math.isfinite(number) and number > above
        if self.below is not None and not (fine and number < self.below):
            raise InputError(f'{name} must lie between {above:g} and {self.below:g}, not {value!r}')
        if not fine:
            raise InputError(f'{name} must be above {above:g}, not {value!r}')
        return number


Value = TypeVar('Value')


def setting(default: Value, group: str, meaning: str, **known: Any) -> Value:
    """A field of a data class of settings with what is known of it; see `Setting`."""
    return field(default=default, metadata={'setting': Setting(group, meaning, **known)})


def resolved(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function or class that a row of a table names as text, 'package.module:name'.

    Rows are plain data so that help and checks of settings need not import what they name. A
    function itself, as in a notebook, is taken as it is.
    """
    if callable(function):
        return function
    module, _, name = function.partition(':')
    found = getattr(import_module(module), name)
    assert callable(found), function
    return found
