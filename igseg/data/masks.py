"""Reading mask files: from the values in them to the numbers of classes.

What a value means is decided by the *set* of values in all masks of a split, together with the
number of classes of the network; never by a single file or its largest value. A set that can mean
two things is refused with one sentence; then the user says with a label map what is meant.

Labels are (H, W): uint8, or int16 where some pixels do not count (IGNORED) or numbers are large.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from igseg.data.medical import DICOM_SUFFIXES, NIFTI_SUFFIXES, read_dicom, read_nifti, read_volume
from igseg.data.pixels import (
    ARRAY_SUFFIXES,
    DEFAULT_READING,
    TIFF_SUFFIXES,
    Opened,
    Reading,
    check_file,
    check_values,
    converted,
    frame_notes,
    opened_picture,
    read_array,
    suffix_of,
)
from igseg.data.truth import (
    IGNORED,
    UNKNOWN,
    VOID,
    Colour,
    LabelMap,
    Labels,
    TruthReading,
    range_text,
)
from igseg.errors import InputError, NoFrameError

MOST_SCANNED = 1000  # masks of a split whose values are read
MOST_COLOURS = 64  # colours of a mask that are kept
MOST_BETWEEN = 0.5  # share of pixels that softened edges may take; with more it is no mask
FEW = 21  # so few class numbers cannot be mistaken for softened edges
SMALL = 127  # the highest number that may be a class where the network is unknown
LOSSY_TOLERANCE, EXACT_TOLERANCE = 32, 8  # how far areas may differ from black and white

COUNTED = (np.uint8, np.uint16)  # types for which np.bincount finds the distinct values
BLOCK = 1 << 20  # pixels that are worked on at a time

COVERS = ', so that the truth covers the whole image: is one of them the background?'


def values_text(values: Sequence) -> str:
    """Values in words, the first ten of them."""
    shown = [str(value) if not isinstance(value, tuple) else ','.join(map(str, value))
             for value in list(values)[:10]]  # fmt: skip
    more = '' if len(values) <= 10 else f' and {len(values) - 10} more'
    colours = bool(values) and isinstance(next(iter(values)), tuple)
    return (' / ' if colours else ', ').join(shown) + more


# --------------------------------------------------------------------------- one file


@dataclass(frozen=True)
class MaskPicture:
    """The values of a mask as its file stores them."""

    levels: np.ndarray  # (H, W) whole numbers, or (H, W, 3) uint8 colours
    lossy: bool = False  # whether the file's format changes values
    notes: tuple[str, ...] = ()


def _from_numbers(values: np.ndarray, path: Path) -> MaskPicture:
    """The mask in an array of numbers (H, W), or of colours (H, W, 3 or 4)."""
    if values.ndim == 3 and 1 in values.shape:
        values = values.reshape([side for side in values.shape if side != 1] or [1, 1])
    if values.ndim == 3 and values.shape[2] in (3, 4) and values.dtype == np.uint8:
        return _plain_grey(MaskPicture(np.ascontiguousarray(values[:, :, :3])))
    if values.ndim != 2:
        raise InputError(
            f'mask {path} has the shape {values.shape} (give one number for each pixel, (H, W))'
        )
    check_values(values, path)
    if values.dtype.kind != 'f':
        return MaskPicture(values.astype(np.uint8) if values.dtype.kind == 'b' else values)
    whole = np.rint(values)
    if np.abs(values - whole).max(initial=0) < 1e-3:
        return MaskPicture(whole.clip(-(2**30), 2**30).astype(np.int32))
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        return MaskPicture(np.rint(values * 255).astype(np.uint8), lossy=True)
    raise InputError(
        f'mask {path} holds fractions from {low:.4g} to {high:.4g} (give whole numbers, or '
        'shares from 0 to 1)'
    )


def _from_picture(opened: Opened, path: Path, colours: bool) -> MaskPicture:
    """The mask in a picture: indices of a palette, grey levels, or colours."""
    picture = opened.picture
    if colours and picture.mode in ('P', 'PA'):
        return MaskPicture(np.asarray(converted(picture, path)), notes=opened.notes)
    if picture.mode == 'PA':
        picture = picture.getchannel(0)
    if picture.mode in ('P', 'L', '1') or picture.mode.startswith('I') or picture.mode == 'F':
        levels = np.asarray(picture)
        inverted = picture.mode == 'P' and _white_first(picture, levels)
        mask_picture = _from_numbers(1 - levels if inverted else levels, path)
        notes = ('index 0 of its palette is white and 1 black: white is taken as 1',) * inverted
        return replace(
            mask_picture,
            lossy=opened.lossy or mask_picture.lossy,
            notes=(*opened.notes, *(f'{path.name}: {note}' for note in notes)),
        )
    if picture.mode in ('LA', 'La', 'RGBA', 'RGBa'):
        bands = np.asarray(converted(picture, path, 'RGBA'))
        if _drawn_in_alpha(bands):
            note = f'{path.name} is one colour throughout: its transparency is taken as the mask'
            return MaskPicture(bands[:, :, 3].copy(), opened.lossy, notes=(*opened.notes, note))
    mask = MaskPicture(np.asarray(converted(picture, path)), opened.lossy, notes=opened.notes)
    return _plain_grey(mask)


def _white_first(picture, levels: np.ndarray) -> bool:
    """Whether a palette has two colours: white, then black."""
    if levels.max(initial=0) > 1:
        return False
    palette = (picture.getpalette('RGB') or [])[:6]
    return palette == [255, 255, 255, 0, 0, 0]


def _drawn_in_alpha(bands: np.ndarray) -> bool:
    """Whether the pixels of a picture (H, W, 4) differ only in their transparency."""
    colours, alpha = bands[:, :, :3].reshape(-1, 3), bands[:, :, 3]
    return bool((colours == colours[:1]).all() and alpha.min() != alpha.max())


def _plain_grey(mask: MaskPicture) -> MaskPicture:
    """A mask (H, W, 3) as levels (H, W) where its three channels are equal; else unchanged."""
    colours = mask.levels
    tolerance = 3 if mask.lossy else 0
    spread = colours.max(axis=2) - colours.min(axis=2)
    if spread.max(initial=0) > tolerance:
        return mask
    return replace(mask, levels=colours[:, :, 0].copy())


def _of_picture(path: Path, reading: Reading, colours: bool) -> MaskPicture:
    return _from_picture(opened_picture(path, 'mask', reading), path, colours)


def _of_tiff(path: Path, reading: Reading, colours: bool) -> MaskPicture:
    try:
        return _of_picture(path, reading, colours)
    except NoFrameError:
        raise
    except InputError:
        if not path.is_file():
            raise
        return _of_array(path, reading, colours)  # Pillow reads only some kinds of TIFF files


def _of_array(path: Path, reading: Reading, colours: bool) -> MaskPicture:
    return _from_numbers(read_array(path, reading), path)


def _of_dicom(path: Path, reading: Reading, colours: bool) -> MaskPicture:
    check_file(path, 'mask')
    medical = read_dicom(path, reading.frame, reading.limit)
    frame_notes(path, 'mask', medical.frames, reading)
    return _from_numbers(medical.values, path)


def _of_nifti(path: Path, reading: Reading, colours: bool) -> MaskPicture:
    check_file(path, 'mask')
    return _from_numbers(read_nifti(path, reading.slice, 4 * reading.limit).values, path)


# Endings of the names of mask files, and the function that reads such files.
MASK_FORMATS: dict[tuple[str, ...], Callable[[Path, Reading, bool], MaskPicture]] = {
    ('.png', '.bmp', '.gif', '.jpg', '.jpeg', '.webp'): _of_picture,
    TIFF_SUFFIXES: _of_tiff,
    ARRAY_SUFFIXES: _of_array,
    DICOM_SUFFIXES: _of_dicom,
    NIFTI_SUFFIXES: _of_nifti,
}

MASK_SUFFIXES = tuple(suffix for suffixes in MASK_FORMATS for suffix in suffixes)


def read_mask_picture(
    path: str | Path, reading: Reading = DEFAULT_READING, colours: bool = False
) -> MaskPicture:
    """The values of a mask file. colours: take the colours of a palette picture, not its indices.
    Raises InputError as `read_image` does."""
    path = Path(path)
    suffix = suffix_of(path)
    readers = (read for suffixes, read in MASK_FORMATS.items() if suffix in suffixes)
    return next(readers, _of_picture)(path, reading, colours)


# --------------------------------------------------------------------------- the values of a split


@dataclass(frozen=True)
class Census:
    """Which values the masks of a split hold."""

    values: frozenset[int] = frozenset()  # grey levels or numbers
    inner: frozenset[int] = frozenset()  # the values that fill areas, not only edges
    colours: frozenset[Colour] = frozenset()  # in masks of several colours
    hues: frozenset[Colour] = frozenset()  # in masks of one colour on black
    shades: bool = False  # whether a mask is drawn in grey levels or numbers
    between: float = 0.0  # largest share, in a mask, of pixels between black and the brightest
    lossy: bool = False  # whether a file format changes values

    def __or__(self, other: Census) -> Census:
        return Census(
            self.values | other.values, self.inner | other.inner, self.colours | other.colours,
            self.hues | other.hues, self.shades or other.shades,
            max(self.between, other.between), self.lossy or other.lossy,
        )  # fmt: skip


def census_of(mask: MaskPicture) -> Census:
    """The values of one mask."""
    if mask.levels.ndim == 2:
        values = distinct(mask.levels)
        return Census(values, _inner(mask, values), shades=max(values) > 0,
                      between=_share_between(mask), lossy=mask.lossy)  # fmt: skip
    hue = hue_of(mask)
    if hue is not None:
        census = census_of(replace(mask, levels=_brightness(mask.levels)))
        return replace(census, hues=frozenset([hue]), shades=False)
    return Census(colours=frozenset(_colours_of(mask)), lossy=mask.lossy)


def _share_between(mask: MaskPicture) -> float:
    """The share of pixels that are neither nearly black nor nearly the brightest."""
    top = int(mask.levels.max())
    tolerance = _tolerance(mask.lossy, top)
    if top <= 2 * tolerance:
        return 0.0
    return float(((mask.levels > tolerance) & (mask.levels < top - tolerance)).mean())


def _tolerance(lossy: bool, top: int) -> int:
    """How far a shade may differ from black or white and still count as black or white."""
    return (LOSSY_TOLERANCE if lossy else EXACT_TOLERANCE) * max(1, top // 255)


def _inner(mask: MaskPicture, values: frozenset[int]) -> frozenset[int]:
    """The values that fill areas: values of pixels that equal all eight neighbours."""
    if len(values) <= 2:
        return values
    levels = mask.levels.clip(0, 32767).astype(np.int16)
    box = np.ones((3, 3), np.uint8)
    spread = cv2.dilate(levels, box) - cv2.erode(levels, box)
    flat = spread <= (3 if mask.lossy else 0)
    return distinct(mask.levels[flat])


def _brightness(colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W): the brightest channel."""
    return colours.max(axis=2)


def hue_of(mask: MaskPicture) -> Colour | None:
    """The colour of a mask (H, W, 3) that has one colour on black, with softened edges or without;
    None where it has several colours."""
    brightness = mask.levels.max(axis=2)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    hue = mask.levels[row, column].astype(np.int32)
    limit = (40 if mask.lossy else 3) * max(1, int(hue.max()))
    for rows in _blocks(mask.levels):
        colours = mask.levels[rows]
        distance = _distance_from_hue(colours, brightness[rows], hue)
        if mask.lossy:  # JPEG changes colours at edges, so only areas count
            box = np.ones((5, 5), np.uint8)
            spread = cv2.dilate(mask.levels[rows], box) - cv2.erode(mask.levels[rows], box)
            distance = distance[spread.max(axis=2) <= 24]
        if distance.max(initial=0) > limit:
            return None
    red, green, blue = hue.tolist()
    return red, green, blue


def _distance_from_hue(colours: np.ndarray, brightness: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """(h, w): the distance of colours (h, w, 3) from shades of a hue, multiplied by the largest
    channel of the hue."""
    distance = np.zeros(brightness.shape, np.int32)
    bright = brightness.astype(np.int32)
    for channel in range(3):
        values = colours[..., channel].astype(np.int32)
        np.maximum(distance, np.abs(values * hue.max() - bright * hue[channel]), out=distance)
    return distance


def _blocks(array: np.ndarray) -> Iterator[slice]:
    """Slices of the rows of an array (H, W, ...). Computing with a few rows at a time saves memory:
    intermediate results of the whole array would take many times its size."""
    step = max(1, BLOCK // max(1, array.shape[1])) if array.ndim > 1 else BLOCK
    for first in range(0, len(array), step):
        yield slice(first, first + step)


def distinct(levels: np.ndarray) -> frozenset[int]:
    """The different values of an array."""
    all_values: set[int] = set()
    for rows in _blocks(levels):
        block = levels[rows]
        countable = block.dtype in COUNTED  # counting is much faster than sorting
        values = np.flatnonzero(np.bincount(block.reshape(-1))) if countable else np.unique(block)
        all_values.update(values.tolist())
    return frozenset(all_values)


def _codes(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as numbers (...): one number for each colour."""
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _colour(code: int) -> Colour:
    return code >> 16, code >> 8 & 255, code & 255


def _colours_of(mask: MaskPicture) -> list[Colour]:
    """The colours of a mask, at most MOST_COLOURS of them."""
    codes: set[int] = set()
    for rows in _blocks(mask.levels):
        codes.update(np.unique(_codes(mask.levels[rows])).tolist())
        if len(codes) > MOST_COLOURS:
            break
    return sorted(map(_colour, codes))[:MOST_COLOURS]


# --------------------------------------------------------------------------- what values mean


def _compact(labels: np.ndarray) -> np.ndarray:
    small = labels.size == 0 or (labels.min() >= 0 and labels.max() <= 255)
    return labels.astype(np.uint8 if small else np.int16, copy=False)


def _looked_up(
    values: np.ndarray, table: dict[int, int], code: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The labels (H, W) of values (H, W) or (H, W, 3). code: turns values into numbers. table: the
    label of each number."""
    labels = np.zeros(values.shape[:2], np.int16)
    for rows in _blocks(values):
        codes, places = np.unique(code(values[rows]), return_inverse=True)
        code_labels = np.array([table[value] for value in codes.tolist()], dtype=np.int16)
        labels[rows] = code_labels[places].reshape(labels[rows].shape)
    return _compact(labels)


def _labels_of_colours(colours: np.ndarray, label_of: dict[Colour, int], path: Path) -> np.ndarray:
    """The labels (H, W) of colours (H, W, 3). Raises InputError for a colour without a label."""
    table = {r << 16 | g << 8 | b: label for (r, g, b), label in label_of.items()}
    unknown: set[int] = set()
    for rows in _blocks(colours):
        unknown |= set(np.unique(_codes(colours[rows])).tolist()) - table.keys()
    if unknown:
        raise InputError(
            f'mask {path} holds the colours {values_text(sorted(map(_colour, unknown)))}, which '
            'the label map does not name (add a line R,G,B = CLASS for each; masks in colours '
            'must not be JPEG)'
        )
    return _looked_up(colours, table, _codes)


def _several_colours_text(where: object) -> str:
    """The error for masks of several colours without a label map. where: the masks."""
    return (
        f'{where} holds several colours, and nothing says which class each is (say so with '
        '--label_map FILE, a line R,G,B = CLASS, NAME for each)'
    )


@dataclass(frozen=True)
class MaskCoding:
    """How the values of a split's masks become labels."""

    label_of: Callable[[int], int | None]  # value -> label; None: none of the read masks holds it
    of_colours: dict[Colour, int] | None = None
    threshold: float | None = None  # values above it are the object; for softened edges
    low_high: tuple[int, int] = (0, 1)  # the labels below and above the threshold
    ignored: int | None = None  # a value that is IGNORED, whatever the threshold
    notes: tuple[str, ...] = ()

    def labels(self, mask: MaskPicture, path: Path) -> np.ndarray:
        """The labels (H, W) of a mask. path: its file. Raises InputError for a value that none of
        the masks that were read holds."""
        if mask.levels.ndim == 3 and self.of_colours is not None:
            return _labels_of_colours(mask.levels, self.of_colours, path)
        levels = mask.levels if mask.levels.ndim == 2 else _brightness(mask.levels)
        if mask.levels.ndim == 3 and hue_of(mask) is None:
            raise InputError(_several_colours_text(path))
        if self.threshold is not None:
            low, high = (np.int16(label) for label in self.low_high)
            labels = np.where(levels > self.threshold, high, low)
            if self.ignored is not None:
                labels[levels == self.ignored] = IGNORED
            return _compact(labels)
        table = {value: self.label_of(value) for value in distinct(levels)}
        unknown = sorted(value for value, label in table.items() if label is None)
        if unknown:
            raise InputError(
                f'mask {path} holds {values_text(unknown)}, which the other masks or the label '
                'map do not explain (say what each value is with --label_map FILE)'
            )
        label_of = {value: label for value, label in table.items() if label is not None}
        if levels.dtype in COUNTED:
            by_value = np.zeros(1 + max(label_of, default=0), np.int16)
            by_value[list(label_of)] = list(label_of.values())
            return _compact(by_value[levels])
        return _looked_up(levels, label_of, lambda block: block)


def _full(hue: Colour) -> np.ndarray:
    """A colour at full brightness, 0-1."""
    return np.array(hue) / max(1, max(hue))


def _distinct(hues: frozenset[Colour], lossy: bool) -> list[Colour]:
    """The colours that differ in more than their shade."""
    different: list[Colour] = []
    for hue in sorted(hues):
        same = [np.abs(_full(hue) - _full(other)).max() <= (0.2 if lossy else 0.02)
                for other in different]  # fmt: skip
        different += [] if any(same) else [hue]
    return different


def _with_ignored(coding: MaskCoding, value: int) -> MaskCoding:
    """A coding in which one value does not count."""
    inner = coding.label_of
    return replace(coding, label_of=lambda v: IGNORED if v == value else inner(v), ignored=value)


def _by_map(label_map: LabelMap, ignore_label: int | None) -> MaskCoding:
    """The coding that follows a label map."""
    of_values = dict(label_map.of_values)
    for (r, g, b), label in label_map.of_colours.items():
        if r == g == b:
            of_values.setdefault(r, label)
    of_colours = {(v, v, v): label for v, label in label_map.of_values.items() if 0 <= v <= 255}
    of_colours |= label_map.of_colours
    if ignore_label is not None:
        of_values[ignore_label] = IGNORED
        of_colours[ignore_label, ignore_label, ignore_label] = IGNORED
    return MaskCoding(of_values.get, of_colours)


def _more_classes(small: set[int], census: Census, reading: TruthReading) -> bool:
    """Whether masks certainly hold class numbers, though more than the network has."""
    if max(small) > SMALL or census.lossy:
        return False
    # Two values alone are foreground and background, whatever they are.
    return reading.one_class and len(small) > 2 and small <= set(census.inner)


def _identity(count: int, void: int | None) -> Callable[[int], int | None]:
    """The function from a value to a label where the values are numbers below `count`. void: the
    value of pixels that do not count."""

    def label_of(value: int) -> int | None:
        if value == void:
            return IGNORED
        return value if 0 <= value < count else None

    return label_of


def _is_void(rest: set[int], count: int, census: Census, reading: TruthReading) -> bool:
    """Whether 255 certainly means "does not count". rest: the other values. count: how many class
    numbers are possible.

    The files must keep values exactly, a value other than 0 and 255 must occur, and the other
    values must be class numbers: few (softened edges would give more), or each filling areas."""
    highest = max(rest, default=0)
    if census.lossy or highest == 0:
        return False
    few = count <= FEW if reading.numbers is not None else highest < FEW
    return (few and highest < count) or rest <= set(census.inner)


def _numbers(values: set[int], census: Census, reading: TruthReading) -> MaskCoding | None:
    """The coding where values are the numbers of classes, perhaps with 255 for pixels that do not
    count; None where that is not certain."""
    count = reading.numbers if reading.numbers is not None else SMALL + 1
    small, notes = set(values), list[str]()
    if VOID in values and count <= VOID and reading.ignore_label is None:
        small = values - {VOID}
        if not _is_void(small, count, census, reading):
            return None
        notes.append(
            f'masks hold {VOID} beside {values_text(sorted(small))}: taken as "ignore", which '
            'counts in no score and no target (--label_map says otherwise)'
        )
    if not small:
        return MaskCoding(lambda value: None)
    if min(small) < 0:
        return None
    fits = max(small) < count
    if not fits and not _more_classes(small, census, reading):
        return None
    if not fits and reading.one_class:
        notes.append(
            f'the network knows one class, the masks hold {values_text(sorted(small))}: everything '
            f'above 0 is taken as that class{"" if 0 in small else COVERS} (--label_map says '
            'otherwise)'
        )
    softened = len(small) > 2 and not small <= set(census.inner)  # some values fill no area
    if reading.numbers is None and fits and softened:
        return None if max(small) > 64 else MaskCoding(_identity(count, VOID if notes else None))
    left_out = VOID if VOID in values and VOID not in small else None
    return MaskCoding(_identity(count if fits else SMALL + 1, left_out), notes=tuple(notes))


def _even_steps(values: set[int], reading: TruthReading) -> MaskCoding | None:
    """The coding where values are shades in even steps from 0, one for each class; None where the
    values are others, or could be class numbers."""
    ordered, count = sorted(values), reading.numbers
    if count is None or count < 3 or len(ordered) != count or ordered[0] != 0:
        return None
    step = ordered[-1] / (count - 1)
    even = all(abs(v - k * step) <= 1 for k, v in enumerate(ordered))
    if not even or ordered[1] < count:
        return None
    table = {value: label for label, value in enumerate(ordered)}
    table_text = ', '.join(f'{value}: {label}' for value, label in table.items())
    note = (
        f'masks hold as many shades in even steps as the network has classes, taken as {table_text}'
    )
    return MaskCoding(table.get, notes=(f'{note} (--label_map says otherwise)',))


def _levels(values: set[int], census: Census, reading: TruthReading) -> MaskCoding | None:
    """The coding where values are shades: two shades, two shades with softened edges between them,
    or as many shades in even steps as the network has classes; None where that is not certain."""
    if not values or min(values) < 0:
        return None
    objects, top = reading.objects, max(values)
    two = reading.numbers in (None, 2)
    high = 1 if objects is None or len(objects) != 1 else objects[0]
    low = 0 if objects is None or len(objects) != 1 else 1 - high
    if two and (values == {0, top} or values == {VOID}):
        unusual = top not in (1, VOID, 65535)
        notes = (f'masks hold 0 and {top}: {top} is taken as the object',) * unusual
        return MaskCoding({0: low, top: high}.get, low_high=(low, high), notes=notes)
    tolerance = _tolerance(census.lossy, top)
    poles = all(v <= tolerance or v >= top - tolerance for v in census.inner)
    edges = any(tolerance < v < top for v in values) and census.between <= MOST_BETWEEN
    if two and top > SMALL and poles and edges:
        return MaskCoding(lambda v: None, threshold=top / 2, low_high=(low, high))
    return None if census.lossy else _even_steps(values, reading)


def _undecided_text(values: set[int], reading: TruthReading, where: object) -> str:
    """The error for values whose meaning is not certain. where: the masks."""
    network = '' if reading.numbers is None else (
        f', while the network tells apart {range_text(reading.numbers)}'
    )  # fmt: skip
    hint = ', or --ignore_label 255' if VOID in values else ''
    return (
        f'{where}: masks hold {values_text(sorted(values))}{network}, so that it is not certain '
        f'which value is which class (say so with --label_map FILE, a line VALUE = CLASS, NAME '
        f'for each{hint})'
    )


def coding_of(census: Census, reading: TruthReading, where: object) -> MaskCoding:
    """What the values of a split's masks mean. where: the masks, for messages. Raises InputError
    where the meaning is not certain."""
    reading.check_map()
    if reading.label_map is not None:
        return _by_map(reading.label_map, reading.ignore_label)
    kinds = len(_distinct(census.hues, census.lossy)) + census.shades
    if census.colours or kinds > 1:
        raise InputError(_several_colours_text(where))
    values = set(census.values) - {reading.ignore_label}
    census = replace(census, inner=census.inner - {reading.ignore_label})
    coding = _numbers(values, census, reading) or _levels(values, census, reading)
    if coding is None:
        raise InputError(_undecided_text(values, reading, where))
    if reading.ignore_label is None:
        return coding
    return _with_ignored(coding, reading.ignore_label)


# --------------------------------------------------------------------------- masks of a split


def whole_mask(path: Path, reading: Reading) -> MaskPicture:
    """All values of a mask file: all slices of a volume, side by side; the first frame of any other
    file. Raises InputError."""
    if suffix_of(path) not in NIFTI_SUFFIXES:
        return read_mask_picture(path, replace(reading, frame=None))
    check_file(path, 'mask')
    volume = read_volume(path, 4 * reading.limit)
    return _from_numbers(volume.reshape(volume.shape[0], -1), path)


class MaskSet:
    """The mask files of a split, whose values are read together. Threads may share a set."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(dict.fromkeys(paths))
        self._lock = threading.Lock()
        self._codings: list[tuple[TruthReading, MaskCoding | InputError]] = []

    @cached_property
    def scanned(self) -> list[Path]:
        """The masks whose values are read: all, or MOST_SCANNED evenly spaced ones."""
        if len(self.paths) <= MOST_SCANNED:
            return self.paths
        rows = np.linspace(0, len(self.paths) - 1, MOST_SCANNED).round().astype(int)
        return [self.paths[row] for row in rows]

    def census(self, reading: Reading) -> Census:
        """The values of the scanned masks. A file that cannot be read is left out here; it is
        reported when its image is explained."""
        census = Census()
        for path in self.scanned:
            try:
                census |= census_of(whole_mask(path, reading))
            except InputError:
                continue
        return census

    def coding(self, reading: TruthReading) -> MaskCoding:
        """What the values of the masks mean. Raises InputError where this is not certain."""
        with self._lock:
            result = next((coding for other, coding in self._codings if other == reading), None)
            if result is None:
                try:
                    skip = reading.label_map is not None  # which says everything
                    census = Census() if skip else self.census(reading.pixels)
                    result = coding_of(census, reading, self._where)
                except InputError as error:
                    result = error
                self._codings.append((reading, result))
        if isinstance(result, InputError):
            raise InputError(str(result))
        return result

    @property
    def _where(self) -> str:
        if len(self.paths) == 1:
            return f'mask {self.paths[0]}'
        return f'the {len(self.paths)} masks in {self.paths[0].parent}'


@dataclass(frozen=True)
class MaskFile:
    """A ground truth in a mask file. masks: the set that the file belongs to."""

    path: Path
    masks: MaskSet

    def __call__(self) -> np.ndarray:
        """The labels (H, W), read for an unknown network. Raises InputError."""
        return self.labels(UNKNOWN)[0]

    def read(self, reading: TruthReading) -> Labels:
        """The labels (H, W), and notes on what was decided. Raises InputError."""
        return Labels(*self.labels(reading))

    def labels(self, reading: TruthReading) -> tuple[np.ndarray, tuple[str, ...]]:
        """`read` as a pair; the labels are never None here."""
        by_colour = reading.label_map is not None and not reading.label_map.of_values
        picture = read_mask_picture(self.path, reading.pixels, by_colour)
        coding = self.masks.coding(reading)
        labels = coding.labels(picture, self.path)
        return labels, (*picture.notes, *coding.notes)


def read_mask(path: str | Path, reading: TruthReading = UNKNOWN) -> np.ndarray:
    """Read one mask file as (H, W) labels: uint8, or int16 where pixels do not count (-1).

    The values are the indices of a palette picture, else grey levels (of one colour on black: the
    brightest channel). The set of values decides what they mean: small numbers are classes and stay
    as they are; 0/255 and 0/N are background and object, also with softened or JPEG edges between
    them; 255 beside small numbers does not count. Raises InputError as `read_image` does, and for
    values that could mean several things. In a dataset the values of all masks are read together.
    """
    path = Path(path)
    return MaskFile(path, MaskSet([path])).labels(reading)[0]
