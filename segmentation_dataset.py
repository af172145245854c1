"""Reading images, masks and segmentation datasets, and turning them into model input.

Images and masks come from files that strangers made, so every reader here either returns
an array or raises :class:`InputError` with one sentence that names the file and the remedy.

Conventions: an image is (H, W, 3) uint8 RGB in *pixel space* (0-255); a mask is (H, W) uint8
holding class labels, 0 being background; model input is (1, 3, S, S) float32, normalised.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask

if TYPE_CHECKING:  # at run time only where tensors are made: processes that draw do without
    import torch

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif')
MASK_SUFFIXES = ('.png', '.bmp', '.tif', '.tiff', '.gif', '.jpg', '.jpeg', '.webp')
COCO_FILE = '_annotations.coco.json'
SPLITS = ('test', 'valid', 'val')
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ('stretch', 'letterbox')
NORMALIZE_MODES = ('auto', 'imagenet', 'none')
SIZE_MULTIPLE = 32  # the deepest encoder stage halves the image five times


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, which file, what to do."""


# --------------------------------------------------------------------------- reading pictures


def open_picture(path: str | Path, kind: str = 'image') -> Image.Image:
    """Open and fully decode a picture file, turned upright by its EXIF orientation.

    Raises InputError when the file is missing, empty, no picture, cut short or absurdly large.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'{kind} file not found: {path} (check the path)')
    if path.stat().st_size == 0:
        raise InputError(f'{kind} file is empty (0 bytes): {path} (copy or export it again)')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow warns where it merely suspects a bomb
            with Image.open(path) as opened:
                opened.load()
                return ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise InputError(
            f'{path} is not a picture, whatever its name says '
            f'(give a JPEG, PNG, TIFF, BMP or WebP {kind})'
        ) from None
    except Image.DecompressionBombError:
        raise InputError(
            f'{kind} {path} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels (shrink it first)'
        ) from None
    except MemoryError:
        raise InputError(f'not enough memory to open {kind} {path} (shrink it first)') from None
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        # Pillow's decoders raise all of these on damaged files
        raise InputError(
            f'{kind} {path} is damaged and cannot be read: {_one_line(error)} '
            '(copy or export it again)'
        ) from None


def read_image(path: str | Path) -> np.ndarray:
    """Read any picture as (H, W, 3) uint8 RGB.

    Grey, palette, CMYK and alpha pictures are converted (alpha is dropped, as training
    pipelines do); 16-bit grey is scaled from its full range 0-65535; float pictures are taken
    as 0-1 if nothing in them exceeds 1, else as 0-255.
    """
    picture = open_picture(path)
    if picture.mode == 'F' or picture.mode.startswith('I'):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        if picture.mode == 'F':
            scale = 255.0 if values.max(initial=0) <= 1 else 1.0
        else:
            scale = 255.0 / 65535.0 if values.max(initial=0) > 255 else 1.0
        grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(picture.convert('RGB'))


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask picture as (H, W) uint8 class labels.

    Palette pictures give their indices, others their grey level (colour: the brightest channel).
    Two-valued masks, 0/1 or 0/255 and JPEG's near misses, become 0/1; masks with more levels,
    none above 127, are class labels and stay as they are.
    """
    picture = open_picture(path, 'mask')
    if picture.mode in ('RGBA', 'LA', 'CMYK', 'YCbCr', 'HSV', 'LAB'):
        picture = picture.convert('RGB')
    levels = np.asarray(picture)
    if levels.ndim == 3:
        levels = levels.max(axis=2)
    levels = np.nan_to_num(levels.astype(np.float64))
    highest = levels.max(initial=0)
    if highest <= 127:
        return levels.clip(0).astype(np.uint8)
    return (levels > highest / 2).astype(np.uint8)


def _one_line(error: BaseException) -> str:
    """The error's text on one line, for a message of ours."""
    return ' '.join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Sample:
    """One image of a dataset. `read_truth` gives (H, W) uint8 labels; None: truth unknown."""

    name: str  # unique within the dataset and safe as a folder name
    image_path: Path
    read_truth: Callable[[], np.ndarray] | None = None
    truth_path: Path | None = None  # the file the truth comes from

    def image(self) -> np.ndarray:
        """The image, (H, W, 3) uint8."""
        return read_image(self.image_path)

    def truth(self) -> np.ndarray | None:
        """The ground-truth labels, (H, W) uint8, or None where they are unknown."""
        return None if self.read_truth is None else self.read_truth()


def single_sample(image_path: str | Path, mask_path: str | Path | None = None) -> Sample:
    """The sample of one image file. Its truth is the mask file, where given; else, where the
    image lies in a dataset that `list_samples` knows, what the dataset says."""
    image_path = Path(image_path)
    if mask_path is not None:
        mask_path = Path(mask_path)
        name = safe_names([image_path])[0]
        return Sample(name, image_path, lambda: read_mask(mask_path), mask_path)
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
    if (folder / COCO_FILE).is_file():
        return _coco_samples(folder)
    if (folder / 'images').is_dir():
        masks = next((folder / m for m in ('masks', 'labels') if (folder / m).is_dir()), None)
        return _paired_samples(folder / 'images', masks)
    return _paired_samples(folder, folder)


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
        samples.append(Sample(name, path, reader, mask))
    return samples


def _coco_samples(folder: Path) -> list[Sample]:
    """Images of a COCO export. One that no annotation names is a negative sample: empty mask."""
    source = folder / COCO_FILE
    try:
        content = json.loads(source.read_text(encoding='utf-8'))
        annotations: dict[object, list[dict]] = {}
        for annotation in content.get('annotations', []):
            annotations.setdefault(annotation['image_id'], []).append(annotation)
        entries = sorted(content['images'], key=lambda entry: str(entry['file_name']))
        paths = [folder / str(entry['file_name']) for entry in entries]
        sizes = [(int(entry['height']), int(entry['width'])) for entry in entries]
        shapes = [annotations.get(entry['id'], []) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f'{source} is not a readable COCO file: {_one_line(error)} (export the dataset again)'
        ) from None
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f'{source} names an image outside its own folder: {path}')
    return [
        Sample(name, path, lambda size=size, own=own: _merge_annotations(own, size, source), source)
        for name, path, size, own in zip(safe_names(paths), paths, sizes, shapes, strict=True)
    ]


def _merge_annotations(
    annotations: Sequence[dict], size: tuple[int, int], source: Path
) -> np.ndarray:
    """All annotations of an image as one (H, W) uint8 map of category numbers."""
    labels = np.zeros(size, dtype=np.uint8)
    for annotation in annotations:
        try:
            shape = annotation['segmentation']
            if not shape:
                raise ValueError('it has a box but no outline')
            runs = coco_mask.frPyObjects(shape, *size) if _needs_encoding(shape) else shape
            runs = coco_mask.merge(runs) if isinstance(runs, list) else runs
            inside = coco_mask.decode(runs).astype(bool)
            labels[inside] = max(1, min(255, int(annotation.get('category_id', 1))))
        except Exception as error:  # pycocotools raises bare Exception on malformed shapes
            raise InputError(
                f'annotation {annotation.get("id")} in {source} cannot be read: '
                f'{_one_line(error)} (export the dataset with segmentation masks)'
            ) from None
    return labels


def _needs_encoding(shape: list | dict) -> bool:
    """Polygons and uncompressed run lengths must be encoded first; compressed ones are ready."""
    return isinstance(shape, list) or isinstance(shape['counts'], list)


def safe_names(paths: Sequence[Path]) -> list[str]:
    """A unique folder name for every path: its stem, without odd characters, at most 100 long.

    Where two would be the same, a few digits of the path's hash are added to each.
    """
    plain = [re.sub(r'[^\w.-]+', '_', path.stem).strip('.')[:100] or 'image' for path in paths]
    count: dict[str, int] = {}
    for name in plain:  # compared without case: some file systems do not tell it apart
        count[name.lower()] = count.get(name.lower(), 0) + 1
    return [
        name if count[name.lower()] == 1 else f'{name}_{sha256(path.name.encode()).hexdigest()[:8]}'
        for name, path in zip(plain, paths, strict=True)
    ]


# --------------------------------------------------------------------------- preprocessing


@dataclass(frozen=True)
class Placement:
    """Where the original image lies in the square model input."""

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
        """The part of an (S, S, ...) array that shows the image, without letterbox padding."""
        return array[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes model input: resized to a square, scaled to 0-1, normalised."""

    image_size: int = 640
    resize: str = 'stretch'  # one of RESIZE_MODES
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def place(self, size: tuple[int, int]) -> Placement:
        """The placement of an image of (height, width) in the square."""
        side = self.image_size
        if self.resize == 'stretch':
            return Placement(size, 0, 0, side, side)
        scale = side / max(size)
        height, width = (max(1, round(length * scale)) for length in size)
        return Placement(size, (side - height) // 2, (side - width) // 2, height, width)

    def resize_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (S, S, 3) uint8; shrunk by area, enlarged linearly, padded black."""
        place = self.place(image.shape[:2])
        shrinks = place.height * place.width < image.shape[0] * image.shape[1]
        return self._fit(image, place, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) uint8 labels -> (S, S) uint8 labels, nearest neighbour."""
        return self._fit(mask, self.place(mask.shape[:2]), cv2.INTER_NEAREST_EXACT)

    def _fit(self, array: np.ndarray, place: Placement, interpolation: int) -> np.ndarray:
        square = np.zeros((self.image_size, self.image_size, *array.shape[2:]), array.dtype)
        place.crop(square)[:] = cv2.resize(
            array, (place.width, place.height), interpolation=interpolation
        )
        return square

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """(S, S, 3) pixels, 0-255 -> (1, 3, S, S) float32 model input."""
        import torch

        scaled = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 255.0)  # (S, S, 3)
        scaled = (scaled - torch.tensor(self.mean)) / torch.tensor(self.std)
        return scaled.permute(2, 0, 1).unsqueeze(0).contiguous()

    def to_pixels(self, tensor: torch.Tensor) -> np.ndarray:
        """(3, H, W) or (1, 3, H, W) model input -> (H, W, 3) float32 pixels, 0-255."""
        import torch

        image = tensor.detach().float().cpu().reshape(3, *tensor.shape[-2:]).permute(1, 2, 0)
        return ((image * torch.tensor(self.std) + torch.tensor(self.mean)) * 255.0).numpy()


def round_up_size(size: int) -> int:
    """The smallest multiple of 32 that is at least `size`: what encoder-decoders need."""
    return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE
