"""Reading images, masks and segmentation datasets, and turning them into model input.

Images and masks come from files that strangers made, so every reader here either returns
an array or raises :class:`InputError` with one sentence that names the file and the remedy.

Conventions: an image is (H, W, C) in *pixel space* (0-255), C being the channels that the network
takes: 3 for RGB, 1 for grey; uint8, or float32 where an array holds finer values; a mask is (H, W)
uint8 holding class labels; model input is (1, C, H, W) float32, normalised.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask

from errors import InputError, one_line

if TYPE_CHECKING:  # at run time only where tensors are made: processes that draw do without
    import torch

ARRAY_SUFFIXES = ('.npy',)  # images of any number of channels
TIFF_SUFFIXES = ('.tif', '.tiff')
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', *TIFF_SUFFIXES, '.webp', '.gif', *ARRAY_SUFFIXES)
MASK_SUFFIXES = ('.png', '.bmp', '.tif', '.tiff', '.gif', '.jpg', '.jpeg', '.webp')
COCO_FILE = '_annotations.coco.json'
SPLITS = ('test', 'valid', 'val')
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ('stretch', 'letterbox')
NORMALIZE_MODES = ('auto', 'imagenet', 'none')
CHANNEL_ORDERS = ('rgb', 'bgr')
SIZE_MULTIPLE = 32  # the deepest encoder stage halves the image five times
LONGEST_OUTLINE = 4_000_000  # pixels, of one annotation: pycocotools needs 150 bytes for each
# An image's name becomes a folder's. These would collide with a batch's own files, or are devices
# on Windows.
RESERVED_NAMES = r'(summary|failures|index(_\d+)?)\.\w+|(con|prn|aux|nul|com\d|lpt\d)(\..*)?'
NAME_BYTES = 100  # file systems allow 255, and endings are added
BLUR_SIGMA = 0.05  # of the longer side: of `strong_blur`

warnings.filterwarnings('ignore', module=r'PIL\.')  # what matters is raised, in our own words


# --------------------------------------------------------------------------- reading pictures


def open_picture(path: str | Path, kind: str = 'image') -> Image.Image:
    """Open and fully decode a picture file, turned upright by its EXIF orientation.

    Raises InputError when the file is missing, empty, no picture, cut short or larger than Pillow's
    limit, Image.MAX_IMAGE_PIXELS (89 million pixels).
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f'{kind} file not found: {path} (check the path)')
        if path.stat().st_size == 0:
            raise InputError(f'{kind} file is empty (0 bytes): {path} (copy or export it again)')
        with Image.open(path) as opened:
            if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return opened
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f'{path} is not a picture, whatever its name says '
            f'(give a JPEG, PNG, TIFF, BMP or WebP {kind})'
        ) from None
    except Image.DecompressionBombError:
        raise InputError(
            f'{kind} {path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels (shrink it first)'
        ) from None
    except MemoryError:
        raise InputError(f'not enough memory to open {kind} {path} (shrink it first)') from None
    except Exception as error:  # Pillow's decoders raise all kinds on damaged files
        raise InputError(
            f'{kind} {path} is damaged and cannot be read: {one_line(error)} '
            '(copy or export it again)'
        ) from None


def read_image(path: str | Path, channels: int = 3) -> np.ndarray:
    """Read an image as (H, W, C), 0-255: uint8, or float32 from an array.

    3 channels: any picture as RGB; grey, palette, CMYK and alpha pictures are converted (alpha is
    dropped, as training pipelines do). 1: any picture as grey (ITU-R 601 luma of the colours). 4:
    pictures with alpha. Any number: `.npy` arrays and TIFF files, (H, W, C) or (C, H, W).

    16-bit values are scaled from their full range 0-65535; floats are taken as 0-1 if nothing
    exceeds 1, else as 0-255. Raises InputError as `open_picture` does, for values that are not
    finite or beyond those ranges, and for another number of channels.
    """
    path = Path(path)
    many = path.suffix.lower() in TIFF_SUFFIXES and channels not in (1, 3)
    if path.suffix.lower() in ARRAY_SUFFIXES or many:
        return _as_image(_read_array(path), channels, path)
    picture = open_picture(path)
    if channels == 4 and picture.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        return np.array(_converted(picture, path, 'RGBA'))
    if channels not in (1, 3):
        raise InputError(
            f'{path} holds a picture of {len(picture.getbands())} channels, but the network takes '
            f'{channels} (give a .npy array or a TIFF file with {channels} channels)'
        )
    if picture.mode == 'F' or picture.mode.startswith('I'):
        values = np.array(picture, dtype=np.float32)
        _check_finite(values, path)
        if picture.mode == 'F':
            scale = 255.0 if values.max(initial=0) <= 1 else 1.0
        else:
            scale = 255.0 / 65535.0 if values.max(initial=0) > 255 else 1.0
        values *= np.float32(scale)  # in place: such a picture may fill a good part of the memory
        np.clip(np.rint(values, out=values), 0, 255, out=values)
        return np.repeat(values.astype(np.uint8)[:, :, None], channels, axis=2)
    if channels == 1:
        return np.array(_converted(_converted(picture, path), path, 'L'))[:, :, None]
    return np.array(_converted(picture, path))


def check_image(path: str | Path) -> None:
    """Raise InputError for what is no image at all, before the network says how many channels."""
    path = Path(path)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        _read_array(path)
        return
    try:
        open_picture(path)
    except InputError:
        if path.suffix.lower() not in TIFF_SUFFIXES:
            raise
        _read_array(path)  # Pillow knows only some of these


def _read_array(path: Path) -> np.ndarray:
    """The array in a `.npy` or TIFF file: numbers, (H, W), (H, W, C) or (C, H, W)."""
    if not path.is_file():
        raise InputError(f'image file not found: {path} (check the path)')
    try:
        if path.suffix.lower() in ARRAY_SUFFIXES:
            lazy = np.load(path, mmap_mode='r', allow_pickle=False)
        else:
            with tifffile.TiffFile(path) as file:
                series = file.series[0]
                _check_area(series.shape, path)
                lazy = series.asarray()
        _check_area(lazy.shape, path)
        values = np.array(lazy)
    except InputError:
        raise
    except Exception as error:  # damaged files raise all kinds
        raise InputError(
            f'image {path} cannot be read: {one_line(error)} (save it as a plain .npy array)'
        ) from None
    if values.dtype.kind not in 'buif' or values.ndim not in (2, 3) or not values.size:
        raise InputError(
            f'{path} holds {values.dtype} of shape {values.shape}, which is no image '
            '(give numbers of shape (H, W, C) or (C, H, W))'
        )
    return values


def _check_area(shape: Sequence[int], path: Path) -> None:
    """Raise InputError for an array of far too many numbers, before it is read."""
    if math.prod(shape) > 16 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise InputError(f'image {path} has the shape {tuple(shape)} (shrink it first)')


def _as_image(values: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """An array as an image (H, W, C), 0-255. Raises InputError."""
    values = values[:, :, None] if values.ndim == 2 else values
    if values.shape[2] != channels and values.shape[0] == channels:
        values = np.moveaxis(values, 0, 2)
    if values.shape[2] == 1 and channels == 3:
        values = np.repeat(values, 3, axis=2)
    if values.shape[2] != channels:
        raise InputError(
            f'{path} holds an array of shape {values.shape}, but the network takes {channels} '
            f'channel{"s" if channels > 1 else ""}'
        )
    _check_finite(values, path)
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in 'ui'
    scale = 255.0 if high <= 1 and not whole else 1.0
    scale = 255.0 / 65535.0 if whole and high > 255 else scale
    if low < 0 or high * scale > 255:
        raise InputError(
            f'{path} holds values from {low:.4g} to {high:.4g} (scale them to 0-1, 0-255 or, as '
            'whole numbers, 0-65535; --mean and --std undo it)'
        )
    return np.ascontiguousarray(values, dtype=np.float32) * np.float32(scale)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask picture as (H, W) uint8 class labels.

    Palette pictures give their indices, others their grey level (colour: the brightest channel).
    Two-valued masks, 0/1 or 0/255 and JPEG's near misses, become 0/1; masks with more levels,
    none above 127, are class labels and stay as they are. Raises InputError as `read_image` does.
    """
    picture = open_picture(path, 'mask')
    if picture.mode in ('RGBA', 'LA', 'CMYK', 'YCbCr', 'HSV', 'LAB'):
        picture = _converted(picture, path)
    levels = np.asarray(picture)
    if levels.ndim == 3:
        levels = levels.max(axis=2)
    _check_finite(levels, path)
    highest = levels.max(initial=0)
    if highest <= 127:
        return levels.clip(0).astype(np.uint8)
    return (levels > highest / 2).astype(np.uint8)


def _converted(picture: Image.Image, path: str | Path, mode: str = 'RGB') -> Image.Image:
    """The picture in RGB or another of Pillow's modes."""
    try:
        return picture if picture.mode == mode else picture.convert(mode)
    except (ValueError, OSError, MemoryError) as error:
        raise InputError(
            f'{path} cannot be converted to {mode}: {one_line(error)} (export it as PNG or JPEG)'
        ) from None


def _check_finite(values: np.ndarray, path: str | Path) -> None:
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise InputError(f'{path} has {count:,} pixels that are not finite (export it again)')


# --------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Sample:
    """One image of a dataset. `read_truth` gives (H, W) uint8 labels; None: truth unknown."""

    name: str  # unique within the dataset and safe as a folder name
    image_path: Path
    read_truth: Callable[[], np.ndarray] | None = None
    class_names: dict[int, str] = field(default_factory=dict)  # of labels, where they are known

    def image(self, channels: int = 3) -> np.ndarray:
        """The image, (H, W, C), see `read_image`."""
        return read_image(self.image_path, channels)

    def truth(self) -> np.ndarray | None:
        """The ground-truth labels, (H, W) uint8, or None where they are unknown."""
        return None if self.read_truth is None else self.read_truth()

    def check(self) -> None:
        """Raise InputError where image or truth cannot be read."""
        check_image(self.image_path)
        self.truth()


def single_sample(image_path: str | Path, mask_path: str | Path | None = None) -> Sample:
    """The sample of one image file. Its truth is the mask file, where given; else, where the
    image lies in a dataset that `list_samples` knows, what the dataset says."""
    image_path = Path(image_path)
    if mask_path is not None:
        mask_path = Path(mask_path)
        name = safe_names([image_path])[0]
        return Sample(name, image_path, lambda: read_mask(mask_path))
    folder = image_path.parent
    if folder.is_dir():
        beside = _samples_of(folder.parent if folder.name == 'images' else folder)
        for sample in beside:
            if sample.image_path.name == image_path.name:
                return sample
    return Sample(safe_names([image_path])[0], image_path)


def find_split(data_dir: str | Path, split: str | None = None) -> Path:
    """The folder of the images: DATA_DIR/SPLIT; without a split, the first of test, valid, val
    that is there, else DATA_DIR itself."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f'data folder not found: {data_dir} (give an existing --data_dir)')
    if split is None:
        return next((data_dir / s for s in SPLITS if (data_dir / s).is_dir()), data_dir)
    if not (data_dir / split).is_dir():
        there = ', '.join(sorted(p.name for p in data_dir.iterdir() if p.is_dir())) or 'none'
        raise InputError(f'no split "{split}" in {data_dir} (folders there: {there})')
    return data_dir / split


def list_samples(data_dir: str | Path, split: str | None = None) -> list[Sample]:
    """The samples of a dataset split, sorted by name. Layouts, told apart by looking:

    1. Roboflow COCO export: `_annotations.coco.json` beside the images;
    2. `images/` with `masks/` or `labels/`;
    3. `name.jpg` beside `name_mask.png`;
    4. images alone (no truth).
    """
    folder = find_split(data_dir, split)
    samples = _samples_of(folder)
    if not samples:
        raise InputError(f'no images in {folder} (looked for {", ".join(IMAGE_SUFFIXES)})')
    return samples


def _samples_of(folder: Path) -> list[Sample]:
    """The samples of one folder, in whichever layout it has; none where it holds no image."""
    try:
        if (folder / COCO_FILE).is_file():
            return _coco_samples(folder)
        if (folder / 'images').is_dir():
            masks = next((folder / m for m in ('masks', 'labels') if (folder / m).is_dir()), None)
            return _paired_samples(folder / 'images', masks)
        return _paired_samples(folder, folder)
    except OSError as error:
        raise InputError(
            f'cannot read {error.filename or folder}: {error.strerror or error} '
            '(check the permissions and the drive)'
        ) from None


def _paired_samples(images: Path, masks: Path | None) -> list[Sample]:
    """Images of one folder, each with the mask of its name, plain or ending in `_mask`."""
    mask_of = {}
    if masks is not None:
        for path in sorted(p for p in masks.iterdir() if p.suffix.lower() in MASK_SUFFIXES):
            if path.stem.endswith('_mask'):
                mask_of[path.stem.removesuffix('_mask')] = path
            elif masks != images:
                mask_of.setdefault(path.stem, path)
    paths = sorted(
        path
        for path in images.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not (masks == images and path in mask_of.values())
    )
    samples = []
    for name, path in zip(safe_names(paths), paths, strict=True):
        mask = mask_of.get(path.stem)
        reader = None if mask is None else (lambda mask=mask: read_mask(mask))
        samples.append(Sample(name, path, reader))
    return samples


def _coco_samples(folder: Path) -> list[Sample]:
    """Images of a COCO export. One that no annotation names is a negative sample: empty mask."""
    source = folder / COCO_FILE
    images: dict[Path, tuple[tuple[int, int], list[dict]]] = {}
    names: dict[int, str] = {}
    try:
        content = json.loads(source.read_text(encoding='utf-8'))
        annotations: dict[object, list[dict]] = {}
        for annotation in content.get('annotations', []):
            annotations.setdefault(annotation['image_id'], []).append(annotation)
        for entry in sorted(content['images'], key=lambda entry: str(entry['file_name'])):
            path = _path_inside(folder, str(entry['file_name']), source)
            size = (int(entry['height']), int(entry['width']))
            # A file that is listed twice is one image with the annotations of both entries.
            images.setdefault(path, (size, []))[1].extend(annotations.get(entry['id'], []))
        for category in content.get('categories', []):
            names[int(category['id'])] = str(category['name'])
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError, MemoryError) as error:  # fmt: skip
        raise InputError(
            f'{source} is not a readable COCO file: {one_line(error)} (export the dataset again)'
        ) from None
    return [
        Sample(name, path, lambda size=size, own=own: _merge_annotations(own, size, source), names)
        for name, (path, (size, own)) in zip(safe_names(list(images)), images.items(), strict=True)
    ]


def _path_inside(folder: Path, name: str, source: Path) -> Path:
    """The path of a file that a COCO file names, which may lie nowhere but in its own folder."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
        inside = False
    if not inside:
        shown = name if len(name) <= 100 else name[:100] + '…'
        raise InputError(f'{source} names an image outside its own folder: {shown}')
    return path


def _merge_annotations(
    annotations: Sequence[dict], size: tuple[int, int], source: Path
) -> np.ndarray:
    """All annotations of an image as one (H, W) uint8 map of category numbers."""
    if min(size) < 1 or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise InputError(
            f'{source} gives an image the size {size[1]}×{size[0]} (export the dataset again)'
        )
    labels = np.zeros(size, dtype=np.uint8)
    for annotation in annotations:
        try:
            inside = _annotated_pixels(annotation['segmentation'], size)
            labels[inside] = max(1, min(255, int(annotation.get('category_id', 1))))
        except Exception as error:  # pycocotools raises bare Exception on malformed shapes
            number = annotation.get('id') if isinstance(annotation, dict) else annotation
            raise InputError(
                f'annotation {str(number)[:50]} in {source} cannot be read: '
                f'{one_line(error)} (export the dataset with segmentation masks)'
            ) from None
    return labels


def _annotated_pixels(shape: list | dict, size: tuple[int, int]) -> np.ndarray:
    """The pixels of an annotation: polygons, or run lengths, plain or compressed; (H, W) bool.

    pycocotools writes beyond its memory, or reads what nobody wrote, where a polygon reaches far
    outside the image or run lengths do not cover it. So polygons are checked before it sees them,
    and run lengths are expanded here.
    """
    if not shape:
        raise ValueError('it has a box but no outline')
    if isinstance(shape, list):
        for polygon in shape:
            _check_polygon(polygon, size)
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(shape, *size))).astype(bool)
    counts = shape['counts']
    counts = np.asarray(counts if isinstance(counts, list) else run_lengths(counts), np.int64)
    area = size[0] * size[1]
    in_range = counts.min(initial=0) >= 0 and counts.max(initial=0) <= area  # their sum cannot wrap
    if list(shape['size']) != list(size) or not in_range or counts.sum() != area:
        raise ValueError(f'its run lengths do not cover an image of {size[1]}×{size[0]}')
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return inside.reshape(size, order='F')


def _check_polygon(polygon: Sequence[float], size: tuple[int, int]) -> None:
    """Raise ValueError for a polygon that would overwhelm the drawing of it."""
    points = np.asarray(polygon, dtype=float)
    if points.ndim != 1 or len(points) < 6:
        raise ValueError('a polygon needs at least three points')
    if not np.isfinite(points).all() or np.abs(points).max() > 2 * max(size) + 100:
        raise ValueError('a polygon reaches far outside the image')
    points = points[: len(points) // 2 * 2].reshape(-1, 2)
    if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > LONGEST_OUTLINE:
        raise ValueError(f'a polygon is more than {LONGEST_OUTLINE:,} pixels long')


def run_lengths(text: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed form: six bits a character, differences from the last
    but one (maskApi.c, rleFrString). Raises ValueError or IndexError where it is damaged."""
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


def choose_samples(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """That many samples evenly spaced through the list; all of them for None."""
    if count is None or count >= len(samples):
        return list(samples)
    rows = np.linspace(0, len(samples) - 1, count).round().astype(int)
    return [samples[row] for row in rows]


def safe_names(paths: Sequence[Path]) -> list[str]:
    """A unique folder name for every path: its stem, without odd characters, at most 100 bytes.

    Where two would be the same, or one is reserved, a few digits of the hash of the file's name
    are added to each; where that is the same too (in two folders), a number.
    """
    plain = [_cleaned(path.stem) for path in paths]
    count = Counter(map(_folded, plain))
    names: list[str] = []
    taken: set[str] = set()
    for name, path in zip(plain, paths, strict=True):
        if count[_folded(name)] > 1 or re.fullmatch(RESERVED_NAMES, name, re.IGNORECASE):
            name += '_' + sha256(path.name.encode(errors='surrogatepass')).hexdigest()[:8]
        number, own = 2, name
        while _folded(own) in taken:
            own, number = f'{name}_{number}', number + 1
        taken.add(_folded(own))
        names.append(own)
    return names


def _cleaned(stem: str) -> str:
    name = re.sub(r'[^\w.-]+', '_', stem).strip('.')
    return name.encode()[:NAME_BYTES].decode(errors='ignore').strip('.') or 'image'


def _folded(name: str) -> str:
    """What some file systems take for the same: without case, accents composed."""
    return unicodedata.normalize('NFC', name).casefold()


# --------------------------------------------------------------------------- preprocessing


ImageSize = int | tuple[int, int]  # the side of a square, or (height, width)


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_text(size: ImageSize) -> str:
    """A size as on the command line: 640, or HEIGHTxWIDTH."""
    height, width = sides(size)
    return str(height) if height == width else f'{height}x{width}'


@dataclass(frozen=True)
class Placement:
    """Where the original image lies in the model input."""

    original_size: tuple[int, int]  # (height, width) in original pixels
    top: int
    left: int
    height: int
    width: int

    def to_model(self, x: int, y: int) -> tuple[int, int]:
        """Original pixel (x, y) to the model-input pixel (column, row) that holds its centre."""
        height, width = self.original_size
        column = self.left + int((x + 0.5) * self.width / width)
        row = self.top + int((y + 0.5) * self.height / height)
        return column, row

    def crop(self, array: np.ndarray) -> np.ndarray:
        """The part of an (H, W, ...) array that shows the image, without letterbox padding."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]

    def content(self, shape: Sequence[int]) -> np.ndarray:
        """The pixels (H, W) bool of an input of that shape that are not letterbox padding."""
        content = np.zeros(shape, bool)
        self.crop(content)[:] = True
        return content


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes model input: resized, scaled to 0-1, its channels put into the network's
    order, normalised."""

    image_size: ImageSize = 640
    resize: str = 'stretch'  # one of RESIZE_MODES
    mean: tuple[float, ...] = IMAGENET_MEAN  # of each channel, in the network's order
    std: tuple[float, ...] = IMAGENET_STD
    channel_order: str = 'rgb'  # one of CHANNEL_ORDERS: what the network was given

    @property
    def channels(self) -> int:
        """C, of image and input."""
        return len(self.mean)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Of the input's channels, in the network's order."""
        if self.channels == 1:
            return ('grey',)
        if self.channels == 3:
            return ('red', 'green', 'blue')[:: self._step]
        return tuple(f'channel {number + 1}' for number in range(self.channels))

    @property
    def _step(self) -> int:
        """Of the slice that puts the channels of an image into the network's order, or back."""
        return -1 if self.channel_order == 'bgr' else 1

    def for_channels(self, channels: int) -> Preprocessing:
        """The same for images of C channels: ImageNet's mean and deviation are of three, so that
        others are taken as they are, from 0 to 1. Raises InputError."""
        if channels == self.channels:
            return self
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise InputError(
                f'mean and std are of {self.channels} channels, but the network takes {channels} '
                '(give --mean and --std with a number for each)'
            )
        return replace(self, mean=(0.0,) * channels, std=(1.0,) * channels)

    def place(self, size: tuple[int, int]) -> Placement:
        """The placement of an image of (height, width) in the input."""
        rows, columns = sides(self.image_size)
        if self.resize == 'stretch':
            return Placement(size, 0, 0, rows, columns)
        scale = min(rows / size[0], columns / size[1])
        height, width = (max(1, round(length * scale)) for length in size)
        return Placement(size, (rows - height) // 2, (columns - width) // 2, height, width)

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, C) at the input's size, of the same type; shrunk by area, enlarged
        linearly, padded black."""
        place = self.place(image.shape[:2])
        shrinks = place.height * place.width < image.shape[0] * image.shape[1]
        return self._fit(image, place, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) uint8 labels at the input's size, nearest neighbour."""
        return self._fit(mask, self.place(mask.shape[:2]), cv2.INTER_NEAREST_EXACT)

    def _fit(self, array: np.ndarray, place: Placement, interpolation: int) -> np.ndarray:
        whole = np.zeros((*sides(self.image_size), *array.shape[2:]), array.dtype)
        place.crop(whole)[:] = resized(array, (place.width, place.height), interpolation)
        return whole

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """(H, W, C) pixels, 0-255 -> (1, C, H, W) float32 model input."""
        import torch

        pixels = np.asarray(pixels, dtype=np.float32)
        if self._step < 0:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        scaled = torch.from_numpy(pixels / 255.0)  # (H, W, C)
        scaled = (scaled - torch.tensor(self.mean)) / torch.tensor(self.std)
        return scaled.permute(2, 0, 1).unsqueeze(0).contiguous()

    def to_pixels(self, tensor: torch.Tensor) -> np.ndarray:
        """(C, H, W) or (1, C, H, W) model input -> (H, W, C) float32 pixels, 0-255."""
        import torch

        image = tensor.detach().float().cpu().reshape(-1, *tensor.shape[-2:]).permute(1, 2, 0)
        pixels = ((image * torch.tensor(self.std) + torch.tensor(self.mean)) * 255.0).numpy()
        return np.ascontiguousarray(pixels[..., ::-1]) if self._step < 0 else pixels


def by_channels(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """What a function of OpenCV, which takes up to four channels and drops the axis of one, makes
    of an image (H, W, C)."""
    groups = [image[..., first : first + 4] for first in range(0, image.shape[2], 4)]
    done = [function(np.ascontiguousarray(group)) for group in groups]
    done = [one if one.ndim == 3 else one[:, :, None] for one in done]
    return done[0] if len(done) == 1 else np.concatenate(done, axis=2)


def resized(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """An image (H, W, C) or a map (H, W) at a size, (width, height)."""

    def resize(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values, size, interpolation=interpolation)

    return resize(array) if array.ndim == 2 else by_channels(resize, array)


def as_picture(image: np.ndarray) -> np.ndarray:
    """An image (H, W, C), 0-255, to look at: (H, W, 3) uint8. Grey stays grey; of more than three
    channels the first three are shown, of two the first."""
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return shown if shown.dtype == np.uint8 else np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def strong_blur(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, C) under a Gaussian blur of 5 % of its longer side."""
    sigma = BLUR_SIGMA * max(pixels.shape[:2])
    return by_channels(lambda part: cv2.GaussianBlur(part, (0, 0), sigma), pixels)
