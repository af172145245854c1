"""How a ground truth is read (`TruthReading`: with which label map, for which network), and what
reading it gives (`Labels`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from igseg.data.pixels import DEFAULT_READING, Reading, check_file
from igseg.errors import InputError

IGNORED = -1  # the label of pixels that do not count
VOID = 255  # what most datasets write for such pixels

MOST_MAP_BYTES = 1 << 20

VOID_NAMES = ('ignore', 'ignored', 'void', 'unlabeled', 'unlabelled')

Colour = tuple[int, int, int]


# --------------------------------------------------------------------------- label maps


@dataclass(frozen=True)
class LabelMap:
    """The class of each value or colour in masks; in annotations, of each category number."""

    of_values: dict[int, int] = field(default_factory=dict)  # value -> class, or IGNORED
    of_colours: dict[Colour, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # of classes, by number
    path: str = ''
    sha256: str = ''  # of the file as it was read

    @property
    def highest(self) -> int:
        """The highest class that is named."""
        return max((*self.of_values.values(), *self.of_colours.values()), default=0)


def _value_or_colour(text: str) -> int | Colour | None:
    """The number, or the colour (R,G,B or #rrggbb), on the left side of a line; None where the text
    is neither."""
    if re.fullmatch(r'-?\d{1,9}', text):
        return int(text)
    if re.fullmatch(r'#[0-9a-fA-F]{6}', text):
        red, green, blue = (int(text[k : k + 2], 16) for k in (1, 3, 5))
    elif re.fullmatch(r'\d{1,3}[ ,]+\d{1,3}[ ,]+\d{1,3}', text):
        red, green, blue = (int(part) for part in re.split(r'[ ,]+', text))
    else:
        return None
    return (red, green, blue) if max(red, green, blue) <= 255 else None


def _line_of_map(line: str, number: int, path: Path) -> tuple[int | Colour, int, str]:
    """Value or colour, class, and name, as a line gives them. Raises InputError."""
    left, equals, right = line.partition('=')
    label, _, name = (part.strip() for part in right.partition(','))
    key = _value_or_colour(left.strip())
    is_ignored = label.lower() in VOID_NAMES
    is_class = is_ignored or re.fullmatch(r'\d{1,4}', label)
    if not equals or not is_class or key is None:
        shown = line if len(line) < 60 else line[:60] + '…'
        raise InputError(
            f'label map {path}, line {number}: "{shown}" is not of the form VALUE = CLASS, NAME '
            '(VALUE: a number, R,G,B or #rrggbb; CLASS: a number, or ignore)'
        )
    return key, IGNORED if is_ignored else int(label), name


def read_label_map(path: str | Path) -> LabelMap:
    """Read a label map. It has one line for each value or colour of the masks:

        0 = 0, background
        128 = 1, liver
        255,0,0 = 2, tumour
        #00ff00 = ignore

    Lines that start with `//`, `;` or `# ` are remarks. Raises InputError.
    """
    path = Path(path)
    check_file(path, 'label map')
    try:
        if path.stat().st_size > MOST_MAP_BYTES:
            raise InputError(f'label map {path} is larger than 1 MiB (a line for each value)')
        content = path.read_bytes()
        lines = content.decode('utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f'label map {path} cannot be read as text (save it as UTF-8)') from None
    values: dict[int, int] = {}
    colours: dict[Colour, int] = {}
    names: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith(('//', ';')) or re.match(r'#(?![0-9a-fA-F]{6}\s*=)', line):
            continue
        key, label, name = _line_of_map(line, number, path)
        earlier_label = (
            colours.setdefault(key, label)
            if isinstance(key, tuple)
            else values.setdefault(key, label)
        )
        if earlier_label != label:
            raise InputError(f'label map {path}, line {number}: {key} is named twice')
        if name and label != IGNORED and names.setdefault(label, name) != name:
            raise InputError(f'label map {path}, line {number}: class {label} has two names')
    if not values and not colours:
        raise InputError(f'label map {path} names no value (a line is VALUE = CLASS, NAME)')
    if len(set(names.values())) < len(names):
        raise InputError(f'label map {path} gives two classes the same name')
    return LabelMap(values, colours, names, str(path), hashlib.sha256(content).hexdigest())


def range_text(numbers: int) -> str:
    """The numbers that a network tells apart, in words."""
    return f'{numbers} numbers, 0 to {numbers - 1}'


@dataclass(frozen=True)
class TruthReading:
    """How a ground truth is read: what the network expects, and what the user wants."""

    numbers: int | None = None  # how many numbers masks may hold, from 0; None: unknown
    background: int | None = 0  # the number of the background; None: there is no background
    one_class: bool = False  # whether the network tells apart only foreground and background
    label_map: LabelMap | None = None
    ignore_label: int | None = None
    pixels: Reading = DEFAULT_READING  # which frame or slice

    @property
    def objects(self) -> list[int] | None:
        """The numbers of objects, in order; None where `numbers` is unknown."""
        if self.numbers is None:
            return None
        return [number for number in range(self.numbers) if number != self.background]

    def check_map(self) -> None:
        """Raise InputError for a label map that names a class the network lacks."""
        if self.label_map and self.numbers is not None and self.label_map.highest >= self.numbers:
            raise InputError(
                f'label map {self.label_map.path} names class {self.label_map.highest}, but the '
                f'network tells apart {range_text(self.numbers)}'
            )


UNKNOWN = TruthReading()


@dataclass(frozen=True)
class Labels:
    """The labels of a ground truth, and what was decided about them."""

    values: np.ndarray | None  # (H, W) uint8 or int16; None: the truth of this image is unknown
    notes: tuple[str, ...] = ()  # in sentences
