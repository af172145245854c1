"""What is known of a setting, or of an option of a method: its help and its check."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def checked(self, name: str, value: object) -> object:
        """The value, numbers as Python's own. Raises InputError for one that makes no sense."""
        if self.choices is not None:
            check_choice(name, value if isinstance(value, str) else repr(value), self.choices)
        if self.least is not None:
            try:
                value = None if isinstance(value, bool) else operator.index(value)
            except TypeError:
                value = None
            if value is None or value < self.least:
                raise InputError(f'{name} must be a whole number of at least {self.least}')
            if self.most is not None and value > self.most:
                raise InputError(f'{name} must be at most {self.most}, not {value}')
        if self.above is not None:
            fine = isinstance(value, numbers.Real) and not isinstance(value, bool)
            fine = fine and math.isfinite(value) and value > self.above
            if self.below is not None and not (fine and value < self.below):
                raise InputError(
                    f'{name} must lie between {self.above:g} and {self.below:g}, not {value!r}'
                )
            if not fine:
                raise InputError(f'{name} must be above {self.above:g}, not {value!r}')
            value = float(value)
        return value


def setting(default: object, group: str, meaning: str, **known: object):
    """A field of Settings with what is known of it; see `Setting`."""
    return field(default=default, metadata={'setting': Setting(group, meaning, **known)})
