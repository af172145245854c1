"""Annotations as polygons and run lengths, in COCO files and in YOLO's text files, and how the
categories of annotations become the classes of a network.
"""

from __future__ import annotations

import contextlib
import json
import ntpath
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from igseg.data.masks import values_text
from igseg.data.pixels import DEFAULT_READING, load_image, opened_picture
from igseg.data.truth import IGNORED, UNKNOWN, LabelMap, Labels, TruthReading, range_text
from igseg.errors import InputError, one_line

LONGEST_OUTLINE = 4_000_000  # pixels of one annotation: pycocotools needs 150 bytes for each pixel
MOST_TEXT = 1 << 30  # bytes of an annotation file
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
           RecursionError, MemoryError)  # fmt: skip
MOST_CLASSES = 10_000  # in YOLO's files, which count classes from 0
BACKGROUND_NAMES = ('background', '_background_', '__background__', 'bg', 'unlabeled', 'void')


# --------------------------------------------------------------------------- categories


@dataclass(frozen=True)
class Categories:
    """The categories of a dataset's annotations, by number."""

    names: dict[int, str] = field(default_factory=dict)  # of the categories that the file declares
    used: frozenset[int] = frozenset()  # the categories of annotations
    zero_is_parent: bool = False  # whether 0 only names the dataset, as in Roboflow's exports
    from_zero: bool = False  # whether the format counts classes from 0 (YOLO)

    @property
    def _counted(self) -> bool:
        """Whether the format counts classes from 0, and no names say how many there are."""
        return self.from_zero and not self.names

    @cached_property
    def ids(self) -> list[int]:
        """The numbers of the categories that stand for classes, in order."""
        numbers = set(self.names) | set(self.used)
        if self.from_zero:
            return list(range(max(numbers, default=-1) + 1))
        return sorted(numbers - {0} if self.zero_is_parent else numbers)

    @cached_property
    def background(self) -> int | None:
        """The number of the category whose name says that it is the background, if there is one."""
        named = {k: self.names.get(k, '').lower() for k in self.ids}
        return next((k for k, name in named.items() if name in BACKGROUND_NAMES), None)

    def labels(self, reading: TruthReading, source: Path) -> tuple[dict[int, int], tuple[str, ...]]:
        """The label of each category, and notes on these labels. source: the file, for messages.
        Raises InputError where the labels are not certain."""
        if reading.label_map is not None:
            return self._by_map(reading.label_map, reading, source), ()
        ids = [k for k in self.ids if k != self.background and k != reading.ignore_label]
        special = {k: IGNORED for k in self.ids if k == reading.ignore_label}
        if self.background is not None:
            special[self.background] = reading.background if reading.background is not None else 0
        objects = reading.objects
        if objects and 0 in ids and 0 not in self.used and len(ids) == len(objects) + 1:
            ids = ids[1:]  # one more category than objects, and no annotation uses category 0
        if reading.one_class:
            table = dict.fromkeys(ids, objects[0] if objects else 1)
        elif objects is None or reading.numbers is None:
            are_numbers = (
                0 not in ids and max(ids, default=0) < MOST_CLASSES and min(ids, default=1) > 0
            )
            table = {k: k for k in ids} if are_numbers else _in_order(ids)
        elif set(ids) <= set(objects) and (not self.from_zero or 0 in objects):
            table = {k: k for k in ids}
        elif len(ids) == len(objects) or (self._counted and len(ids) < len(objects)):
            table = dict(zip(ids, objects, strict=False))
        else:
            raise InputError(
                f'{source} has the categories {values_text(ids)}, but the network tells apart '
                f'{range_text(reading.numbers)}'
                f'{"" if reading.background is None else f", {reading.background} as background"}'
                ' (say which category is which class with --label_map FILE, a line ID = CLASS)'
            )
        moved = {k: v for k, v in table.items() if k != v}
        moves = ', '.join(f'{self.name(k)} is {v}' for k, v in list(moved.items())[:10])
        notes = (f'categories became classes in the order of their numbers: {moves}',) if (
            moved and not reading.one_class) else ()  # fmt: skip
        return table | special, notes

    def _by_map(self, label_map: LabelMap, reading: TruthReading, source: Path) -> dict[int, int]:
        """The label of each category, by a label map. Raises InputError."""
        reading.check_map()
        label_of = label_map.of_values
        unknown = [k for k in self.used if k not in label_of and k != reading.ignore_label]
        if unknown:
            raise InputError(
                f'the label map {label_map.path} does not name the categories '
                f'{values_text(sorted(unknown))} of {source} (add a line ID = CLASS for each)'
            )
        ignored = {reading.ignore_label: IGNORED} if reading.ignore_label is not None else {}
        return label_of | ignored

    def name(self, number: int) -> str:
        """The number and the name of a category, for a message."""
        name = self.names.get(number)
        return f'{number} ({name[:40]})' if name else str(number)

    def class_names(self, table: dict[int, int]) -> dict[int, str]:
        """The names of labels, as far as a single category stands for the label. table: the label
        of each category."""
        names: dict[int, str] = {}
        for number, label in table.items():
            if number in self.names and label != IGNORED:
                names[label] = self.names[number] if label not in names else ''
        return {label: name for label, name in names.items() if name}


def _in_order(ids: Sequence[int]) -> dict[int, int]:
    return {k: place for place, k in enumerate(ids, 1)}


# --------------------------------------------------------------------------- one image's truth


@dataclass(frozen=True)
class AnnotatedImage:
    """The ground truth of one image, drawn by annotations."""

    annotations: tuple[dict, ...]
    size: tuple[int, int] | None  # (height, width); None: the size of the image
    categories: Categories
    source: Path
    image_path: Path

    def __call__(self) -> np.ndarray | None:
        """The labels (H, W), read for an unknown network; None where the truth is unknown. Raises
        InputError."""
        return self.read(UNKNOWN).values

    def class_names(self, reading: TruthReading) -> dict[int, str]:
        """The names of labels."""
        return self.categories.class_names(self.categories.labels(reading, self.source)[0])

    def read(self, reading: TruthReading) -> Labels:
        """The labels (H, W), and notes on what was left out. Raises InputError."""
        table, notes = self.categories.labels(reading, self.source)
        size = self._checked_size(reading.pixels.limit)
        boxes = [a for a in self.annotations if not a.get('segmentation')]
        if boxes:
            return Labels(None, (
                f'{len(boxes)} of {len(self.annotations)} annotations in {self.source.name} have '
                'no outline: the truth of this image is unknown',))  # fmt: skip
        # The label of pixels in which nothing is drawn; without a background class it is unknown.
        undrawn = IGNORED if reading.background is None else reading.background
        labels = np.full(size, undrawn, np.int16)
        left_out: list[str] = []
        drawn = 0
        for annotation in self.annotations:
            inside, problems = self._pixels(annotation, size)
            left_out += problems
            if inside is not None:
                labels[inside] = self._label(annotation, table)
                drawn += 1
        if self.annotations and not drawn:
            return Labels(None, (
                f'no annotation of this image in {self.source.name} has an area '
                f'({left_out[0]}): its truth is unknown',))  # fmt: skip
        if left_out:
            notes += (
                f'{len(left_out)} part{"s" if len(left_out) > 1 else ""} of annotations in '
                f'{self.source.name} left out: {left_out[0]}',
            )
        small = labels.min() >= 0 and labels.max() <= 255
        return Labels(labels.astype(np.uint8) if small else labels, notes)

    def _checked_size(self, most_pixels: int) -> tuple[int, int]:
        size = self.size or size_of_image(self.image_path)
        if min(size) < 1 or size[0] * size[1] > most_pixels:
            raise InputError(
                f'{self.source} gives an image the size {size[1]}×{size[0]} (export the dataset '
                'again)'
            )
        return size

    def _label(self, annotation: dict, table: dict[int, int]) -> int:
        try:
            return table[category_of(annotation)]
        except (KeyError, ValueError, TypeError, OverflowError):
            raise InputError(
                f'annotation {str(annotation.get("id"))[:50]} in {self.source} is of an unknown '
                'category (export the dataset again)'
            ) from None

    def _pixels(self, annotation: dict, size: tuple[int, int]) -> tuple[np.ndarray | None, list]:
        """The pixels (H, W) bool of an annotation, None where it has no area; and sentences on the
        parts that were left out. Raises InputError where the annotation cannot be read at all."""
        number = str(annotation.get('id'))[:50]
        try:
            inside, problems, damaged = annotated_pixels(annotation['segmentation'], size)
        except Exception as error:  # pycocotools raises bare Exception on malformed shapes
            inside, problems, damaged = None, [one_line(error)], True
        if inside is None and damaged:
            raise InputError(
                f'annotation {number} in {self.source} cannot be read: {problems[0]} '
                '(export the dataset with segmentation masks)'
            )
        return inside, [f'annotation {number}: {problem}' for problem in problems]


def size_of_image(path: Path) -> tuple[int, int]:
    """(height, width) of an image file. Raises InputError."""
    if path.suffix.lower() in ('.jpg', '.jpeg', '.png', '.bmp', '.webp'):
        opened = opened_picture(path, 'image', DEFAULT_READING)
        width, height = opened.picture.size
        return (height, width)
    return load_image(path, 3).pixels.shape[:2]


def category_of(annotation: dict[str, Any]) -> int:
    """The category number of an annotation, 1 where it has none. Raises what int() raises."""
    value = annotation.get('category_id', 1)
    if isinstance(value, bool) or value is None:
        raise ValueError(f'category_id is {value}')
    number = int(value)
    if not 0 <= number <= 1 << 31:
        raise ValueError(f'category_id is {str(value)[:20]}')
    return number


def annotated_pixels(
    shape: list | dict, size: tuple[int, int]
) -> tuple[np.ndarray | None, list[str], bool]:
    """The pixels (H, W) bool of an annotation, None where it has no area; sentences on the parts
    that were left out; and whether one of these parts was damaged, not only without an area.

    shape: polygons, or run lengths, plain or compressed. pycocotools accesses memory outside its
    arrays where a polygon reaches far outside the image, or where run lengths do not cover the
    image. So polygons are checked before pycocotools draws them, and run lengths are expanded here.
    """
    if isinstance(shape, list):
        is_single = all(isinstance(part, (int, float)) for part in shape)
        outlines, problems, damaged = [], [], False
        for polygon in [shape] if is_single else shape:
            try:
                _check_polygon(polygon, size)
                outlines.append([float(value) for value in polygon][: len(polygon) // 2 * 2])
            except _NoAreaError as error:
                problems.append(str(error))
            except (ValueError, TypeError, OverflowError) as error:
                problems.append(one_line(error))
                damaged = True
        if not outlines:
            return None, problems or ['it has no outline'], damaged
        parts = coco_mask.merge(coco_mask.frPyObjects(outlines, *size))
        return coco_mask.decode(parts).astype(bool), problems, damaged
    counts = shape['counts']
    counts = np.asarray(counts if isinstance(counts, list) else run_lengths(counts), np.int64)
    area = size[0] * size[1]
    # So that the sum cannot overflow.
    in_range = counts.min(initial=0) >= 0 and counts.max(initial=0) <= area
    if list(shape['size']) != list(size) or not in_range or counts.sum() != area:
        raise ValueError(f'its run lengths do not cover an image of {size[1]}×{size[0]}')
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return inside.reshape(size, order='F'), [], False


class _NoAreaError(ValueError):
    """A polygon has no area."""


def _check_polygon(polygon: Sequence[float], size: tuple[int, int]) -> None:
    """Raise ValueError for a polygon that cannot be drawn safely, and _NoAreaError for a polygon
    without an area."""
    points = np.asarray(polygon, dtype=float)
    if points.ndim != 1:
        raise ValueError('a polygon is no list of numbers')
    if not np.isfinite(points).all() or np.abs(points).max(initial=0) > 2 * max(size) + 100:
        raise ValueError('a polygon reaches far outside the image')
    if len(points) < 6:
        raise _NoAreaError('a polygon has fewer than three points')
    points = points[: len(points) // 2 * 2].reshape(-1, 2)
    if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > LONGEST_OUTLINE:
        raise ValueError(f'a polygon is more than {LONGEST_OUTLINE:,} pixels long')
    if np.linalg.matrix_rank(points - points[0]) < 2:
        raise _NoAreaError('a polygon has no area')


def run_lengths(text: str | bytes) -> list[int]:
    """The run lengths in a text in COCO's compressed form (maskApi.c, rleFrString): each character
    holds six bits, and each number is the difference from the number before the previous one.
    Raises ValueError or IndexError where the text is damaged."""
    codes = text.encode('ascii') if isinstance(text, str) else text
    counts: list[int] = []
    place = 0
    while place < len(codes):
        value, shift, more = 0, 0, True
        while more:
            code = codes[place] - 48
            if not 0 <= code < 64 or shift > 50:
                raise ValueError('its compressed run lengths are damaged')
            value |= (code & 0x1F) << shift
            more, place, shift = bool(code & 0x20), place + 1, shift + 5
        if code & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


# --------------------------------------------------------------------------- COCO files


@dataclass(frozen=True)
class CocoFile:
    """The content of a COCO file."""

    truths: dict[Path, AnnotatedImage]  # by image, in the order of the images' names
    notes: tuple[str, ...] = ()


def read_json(path: Path) -> Any:
    """The content of a JSON file, which may begin with a byte-order mark. Raises errors of
    DAMAGED."""
    if path.stat().st_size > MOST_TEXT:
        raise ValueError('it is larger than 1 GiB')
    return json.loads(path.read_text(encoding='utf-8-sig'))


def read_coco(source: Path, folders: Sequence[Path]) -> CocoFile:
    """The images of a COCO file and their annotations. folders: where images may lie; of several
    folders that have an image, the first counts. An image without annotations has an empty mask.
    Raises InputError."""
    try:
        content = read_json(source)
        entries = sorted(content['images'], key=lambda entry: str(entry['file_name']))
        annotations: dict[str, list[dict]] = {}
        for annotation in content.get('annotations') or []:
            annotations.setdefault(_id_text(annotation['image_id']), []).append(annotation)
        categories = _categories(content, annotations)
        images: dict[Path, tuple[tuple[int, int] | None, list[dict]]] = {}
        for entry in entries:
            path = image_inside(folders, str(entry['file_name']), source)
            # A file that is listed twice is one image with the annotations of both entries.
            listed = images.setdefault(path, (_size_of(entry), []))[1]
            listed += annotations.get(_id_text(entry['id']), [])
        ids = {_id_text(entry['id']) for entry in entries}
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(
            f'{source} is not a readable COCO file: {one_line(error)} (export the dataset again)'
        ) from None
    lost = sum(len(group) for number, group in annotations.items() if number not in ids)
    notes = (
        f'{lost} annotation{"s" if lost > 1 else ""} in {source} match no image by their image_id',
    ) if lost else ()  # fmt: skip
    truths = {
        path: AnnotatedImage(tuple(listed), size, categories, source, path)
        for path, (size, listed) in images.items()
    }
    return CocoFile(truths, notes)


def _size_of(entry: dict) -> tuple[int, int] | None:
    if entry.get('height') is None or entry.get('width') is None:
        return None
    return int(entry['height']), int(entry['width'])


def _categories(content: dict, annotations: dict[str, list[dict]]) -> Categories:
    """The categories that a COCO file declares and uses.

    Category 0 of Roboflow's exports is no class but the parent of the others. It is recognised in
    this way: no annotation uses it; and other categories name it as their supercategory, or it is
    the only category whose supercategory is "none".
    """
    declared: dict[int, dict] = {
        category_of({'category_id': c['id']}): c for c in content.get('categories') or []
    }
    names = {number: str(category['name'])[:200] for number, category in declared.items()}
    used = set()
    for annotation in (annotation for group in annotations.values() for annotation in group):
        with contextlib.suppress(ValueError, TypeError, OverflowError):  # reported with its image
            used.add(category_of(annotation))
    parents = {str(c.get('supercategory')) for number, c in declared.items() if number}
    without_parent = 0 in declared and str(declared[0].get('supercategory')) == 'none'
    zero_is_parent = 0 in declared and 0 not in used and (
        names[0] in parents or (without_parent and 'none' not in parents)
    )  # fmt: skip
    return Categories(names, frozenset(used), zero_is_parent)


def _id_text(number: object) -> str:
    """The number of an image as text; 1, 1.0 and "1" give the same text."""
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    return str(number).strip()


def image_inside(folders: Sequence[Path], name: str, source: Path) -> Path:
    """The file of an image that an annotation file names, in the first folder that has it. Raises
    InputError where the *name* leads out of the folder. A link inside the folder may point
    anywhere: the user made it."""
    shown = name if len(name) <= 100 else name[:100] + '…'
    variants = [name] if '\\' not in name else [name, name.replace('\\', '/')]
    for variant in variants:
        plain = posixpath.normpath(variant)
        outside = plain == '..' or plain.startswith(('../', '/')) or '\0' in plain
        if outside or ntpath.splitdrive(plain)[0] or plain in ('', '.'):
            raise InputError(f'{source} names an image outside its own folder: {shown}')
    names = [posixpath.normpath(variant) for variant in variants]
    bare = posixpath.basename(names[-1])
    for folder in folders:
        for candidate in (*names, bare):
            try:
                if (folder / candidate).is_file():
                    return folder / candidate
            except (OSError, ValueError):  # the name is too long or not valid
                continue
    return folders[0] / names[-1]


# --------------------------------------------------------------------------- YOLO's text files


def read_yolo(path: Path, size: tuple[int, int]) -> list[dict]:
    """The annotations in a text file of YOLO segmentation. Each line holds a class, from 0, and the
    points of an outline, x and y as shares of width and height. A line of five numbers is a box,
    which has no outline. size: (height, width). Raises InputError."""
    try:
        if path.stat().st_size > 1 << 26:
            raise ValueError('it is larger than 64 MiB')
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except DAMAGED as error:
        raise InputError(f'{path} cannot be read: {one_line(error)} (export it again)') from None
    annotations = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            category = int(words[0])
            points = np.array(words[1:], dtype=float)
            makes_sense = 0 <= category < MOST_CLASSES and np.isfinite(points).all()
        except ValueError:
            makes_sense = False
        if not makes_sense:
            raise InputError(
                f'{path}, line {number} is no class and outline (CLASS X Y X Y …, from 0 to 1)'
            )
        box = len(points) == 4
        if not box and len(points) >= 6 and np.abs(points).max() > 2:
            raise InputError(f'{path}, line {number}: coordinates are not shares from 0 to 1')
        scale = np.resize([size[1], size[0]], len(points))
        outline = [] if box else [(points * scale).tolist()]
        annotations.append({'id': number, 'category_id': category, 'segmentation': outline})
    return annotations


@dataclass(frozen=True)
class YoloLabels:
    """A ground truth in a text file of YOLO segmentation."""

    path: Path | None  # None: there is no file, so the image holds no object
    image_path: Path
    names: dict[int, str]  # of classes, by number
    used: frozenset[int]  # the classes in all files of the split

    def __call__(self) -> np.ndarray | None:
        """The labels (H, W), read for an unknown network. Raises InputError."""
        return self.read(UNKNOWN).values

    @property
    def categories(self) -> Categories:
        """The classes of the dataset."""
        return Categories(self.names, self.used, from_zero=True)

    def class_names(self, reading: TruthReading) -> dict[int, str]:
        """The names of labels."""
        source = self.path or self.image_path
        return self.categories.class_names(self.categories.labels(reading, source)[0])

    def read(self, reading: TruthReading) -> Labels:
        """The labels (H, W), and notes on what was left out. Raises InputError."""
        size = size_of_image(self.image_path)
        annotations = [] if self.path is None else read_yolo(self.path, size)
        source = self.path or self.image_path
        image = AnnotatedImage(tuple(annotations), size, self.categories, source, self.image_path)
        return image.read(reading)


def yolo_classes(paths: Sequence[Path]) -> frozenset[int]:
    """The classes that text files use. A file that cannot be read is left out here; it is reported
    when its image is explained."""
    classes = set()
    for path in paths:
        try:
            if path.stat().st_size > 1 << 26:
                continue
            for line in path.read_text(encoding='utf-8-sig').splitlines():
                word = line.split(maxsplit=1)[:1]
                is_number = word and word[0].isdecimal() and len(word[0]) < 10
                number = int(word[0]) if is_number else MOST_CLASSES
                classes |= {number} if number < MOST_CLASSES else set()
        except (OSError, UnicodeDecodeError):
            continue
    return frozenset(classes)


def read_names(path: Path) -> dict[int, str]:
    """The names of classes in YOLO's data.yaml, by number. Empty where it cannot be read; figures
    then show numbers. No code in it is run."""
    import yaml

    try:
        if path.stat().st_size > 1 << 20:
            return {}
        content = yaml.load(path.read_text(encoding='utf-8-sig'), Loader=_NoAliases)
        names = content.get('names') or {}
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        texts = {int(k): str(v)[:200] for k, v in pairs if isinstance(v, (str, int, float))}
        return {k: v for k, v in texts.items() if 0 <= k < MOST_CLASSES}
    except (*DAMAGED, yaml.YAMLError):
        return {}


def _no_aliases():
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads YAML without references: with them a small file can describe enormous content."""

        def compose_node(self, parent, index):
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError('references are not read')
            return super().compose_node(parent, index)

    return Loader


_NoAliases = _no_aliases()
