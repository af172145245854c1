"""Datasets of images and masks, and turning images into model input.

What lies in a folder is found by `dataset_layouts`; pixels are read by `image_reading`, masks by
`mask_reading`, annotations by `coco_annotations`. Names that users write stay importable from here.

Conventions: an image is (H, W, C) in *pixel space* (0-255), C being the channels that the network
takes: 3 for RGB, 1 for grey; uint8, or float32 where the file holds finer values; a mask is (H, W)
uint8 holding class labels, or int16 where pixels do not count (-1); model input is (1, C, H, W)
float32, normalised.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from coco_annotations import AnnotatedImage, YoloLabels, run_lengths
from dataset_layouts import COCO_FILE, SPLITS, DataSource, Found, find
from errors import InputError
from image_reading import (
    IMAGE_SUFFIXES,
    NIFTI_SUFFIXES,
    PLAIN,
    TURNS,
    LoadedImage,
    Reading,
    check_image,
    load_channels,
    open_picture,
    read_image,
    stem_of,
    suffix_of,
)
from mask_reading import (
    MASK_SUFFIXES,
    UNKNOWN,
    Labels,
    MaskFile,
    MaskSet,
    TruthReading,
    read_label_map,
    read_mask,
    read_mask_picture,
)
from medical_images import shape_of_nifti

if TYPE_CHECKING:  # at run time only where tensors are made: processes that draw do without
    import torch

__all__ = [  # what users import from here, wherever it stands
    'COCO_FILE',
    'IMAGE_SUFFIXES',
    'MASK_SUFFIXES',
    'SPLITS',
    'InputError',
    'Placement',
    'Preprocessing',
    'Reading',
    'Sample',
    'TruthReading',
    'choose_samples',
    'list_samples',
    'open_picture',
    'read_image',
    'read_label_map',
    'read_mask',
    'run_lengths',
    'safe_names',
    'single_sample',
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ('stretch', 'letterbox')
NORMALIZE_MODES = ('auto', 'imagenet', 'none', 'minmax', 'zscore')
OF_EACH_IMAGE = ('minmax', 'zscore')  # of these, those by the numbers of the image itself
CHANNEL_ORDERS = ('rgb', 'bgr')
SIZE_MULTIPLE = 32  # the deepest encoder stage halves the image five times
SAME_ASPECT = 0.02  # by which the aspect of a mask may differ from its image's
MOST_SLICES = 4096  # of a volume
# An image's name becomes a folder's. These would collide with a batch's own files, or are devices
# on Windows.
RESERVED_NAMES = r'(summary|failures|index(_\d+)?)\.\w+|(con|prn|aux|nul|com\d|lpt\d)(\..*)?'
NAME_BYTES = 100  # file systems allow 255, and endings are added
BLUR_SIGMA = 0.05  # of the longer side: of `strong_blur`


# --------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Sample:
    """One image of a dataset. `read_truth` gives (H, W) labels; None: truth unknown."""

    name: str  # unique within the dataset and safe as a folder name
    image_path: Path
    read_truth: Callable[[], np.ndarray | None] | None = None
    class_names: dict[int, str] = field(default_factory=dict)  # of labels, where they are known
    channel_paths: tuple[Path, ...] = ()  # where each channel lies in a file of its own
    slice: str | None = None  # of a volume, AXIS:INDEX
    notes: tuple[str, ...] = ()  # on the whole dataset, in sentences
    mask_flags: dict[str, str] = field(default_factory=dict)  # that said where its mask lies

    def image(self, channels: int = 3, reading: Reading = PLAIN) -> np.ndarray:
        """The image, (H, W, C), see `read_image`."""
        return self.load(channels, reading).pixels

    def load(self, channels: int = 3, reading: Reading = PLAIN) -> LoadedImage:
        """The image with what was decided. Raises InputError."""
        paths = self.channel_paths or (self.image_path,)
        return load_channels(paths, channels, self.part(reading))

    def part(self, reading: Reading) -> Reading:
        """How the files of this sample are read."""
        return reading if self.slice is None else replace(reading, slice=self.slice)

    def truth(self, reading: TruthReading = UNKNOWN) -> np.ndarray | None:
        """The ground-truth labels, (H, W), or None where they are unknown. Raises InputError."""
        return self.labels(reading).values

    def labels(self, reading: TruthReading = UNKNOWN) -> Labels:
        """The ground truth with what was decided. Raises InputError."""
        if self.read_truth is None:
            return Labels(None)
        if isinstance(self.read_truth, (MaskFile, AnnotatedImage, YoloLabels)):
            return self.read_truth.read(replace(reading, pixels=self.part(reading.pixels)))
        return Labels(self.read_truth())

    def names_of_classes(self, reading: TruthReading = UNKNOWN) -> dict[int, str]:
        """The dataset's names of labels, where it gives them."""
        if isinstance(self.read_truth, (AnnotatedImage, YoloLabels)):
            return self.read_truth.class_names(reading)
        return self.class_names

    def check(self, reading: Reading = PLAIN) -> None:
        """Raise InputError where the image or its mask cannot be read."""
        for path in self.channel_paths or (self.image_path,):
            check_image(path, reading)
        if isinstance(self.read_truth, MaskFile):
            read_mask_picture(self.read_truth.path, self.part(reading))


def single_sample(
    image_path: str | Path,
    mask_path: str | Path | None = None,
    source: DataSource | None = None,
) -> Sample:
    """The sample of one image file. Its truth is the mask file, where given; else, where the
    image lies in a dataset that `list_samples` knows (or `source` names), what the dataset says.

    The values of a mask are read together with those of the other masks of its dataset.
    """
    image_path = Path(image_path)
    found = _in_dataset(image_path, source) if mask_path is None or _exists(mask_path) else None
    if mask_path is None:
        return found or _without_truth(image_path, source)
    mask_path, flags = Path(mask_path), source.flags() if source is not None else {}
    known = found.read_truth if found is not None else None
    same = isinstance(known, MaskFile) and known.path.resolve() == mask_path.resolve()
    masks = known.masks if same else MaskSet([mask_path])
    return Sample(safe_names([image_path])[0], image_path, MaskFile(mask_path, masks),
                  mask_flags={**flags, 'mask_path': str(mask_path)})  # fmt: skip


def _without_truth(image_path: Path, source: DataSource | None) -> Sample:
    """The sample of an image in no dataset; where it was said where masks are, that is told."""
    notes = ()
    if source is not None and source.flags():
        place = source.images_dir or image_path.parent
        what = f'{image_path} is not among the images in {place}' if source.names_folders else (
            f'no mask of {image_path} is named {source.naming.mask}')  # fmt: skip
        notes = (f'{what}, so there is no truth (give --mask_path, or --images_dir and '
                 '--masks_dir)',)  # fmt: skip
    return Sample(safe_names([image_path])[0], image_path, notes=notes)


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _in_dataset(image_path: Path, source: DataSource | None) -> Sample | None:
    """The sample of an image in the dataset that it lies in; None where there is none. Raises
    InputError where folders were named that are not there."""
    if source is not None and source.names_folders:
        own = source.images_dir or image_path.parent
        found = _sample_of(image_path, _samples(find(replace(source, images_dir=own))))
        return found and replace(found, mask_flags=source.flags())
    said = {} if source is None else source.names()
    without = None
    for place in _datasets_around(image_path):
        try:
            samples = _samples(find(replace(place, **said)))
        except InputError:
            continue
        sample = _sample_of(image_path, samples)
        if sample is not None and sample.read_truth is not None:
            return replace(sample, mask_flags=said)
        if sample is not None and without is None:  # nobody missed masks where there are none
            some = any(other.read_truth is not None for other in samples)
            without = replace(sample, notes=sample.notes if some else ())
    return without


def _sample_of(image_path: Path, samples: Sequence[Sample]) -> Sample | None:
    """The sample of an image file, under the path that the user gave."""
    for sample in samples:
        paths = (sample.image_path, *sample.channel_paths)
        if image_path in paths or _same_file(image_path, paths):
            return sample if sample.channel_paths else replace(sample, image_path=image_path)
    return None


def _datasets_around(image_path: Path) -> list[DataSource]:
    """Where an image's dataset may begin: its folder, that above (the split, or the type, or both
    together) and the one above that."""
    folder = image_path.absolute().parent
    if not folder.is_dir():
        return []
    above, top = folder.parent, folder.parent.parent
    places = [
        DataSource(folder, ''),
        DataSource(above, ''),
        DataSource(above, folder.name),
        DataSource(top, above.name),
        DataSource(top, folder.name),
    ]
    return places


def _same_file(path: Path, others: Sequence[Path]) -> bool:
    return any(other.name == path.name and other.resolve() == path.resolve() for other in others)


def list_samples(
    data_dir: str | Path, split: str | None = None, source: DataSource | None = None
) -> list[Sample]:
    """The samples of a dataset split, sorted by name, in whichever of `LAYOUTS` it lies, told apart
    by looking, or where `source` names its folders. Raises InputError."""
    source = source or DataSource(Path(data_dir), split)
    return [replace(sample, mask_flags=source.flags()) for sample in _samples(find(source))]


def _samples(found: Found) -> list[Sample]:
    paths = [pair.images[0] for pair in found.pairs]
    missing = () if found.missing is None else (found.missing,)  # said of those without a mask
    return [
        Sample(
            name, pair.images[0], pair.truth, found.class_names,
            pair.images if len(pair.images) > 1 else (),
            notes=found.notes + (missing if pair.truth is None else ()),
        )
        for name, pair in zip(safe_names(paths), found.pairs, strict=True)
    ]  # fmt: skip


def with_slices(samples: Sequence[Sample], reading: Reading = PLAIN) -> list[Sample]:
    """The samples, with every slice of a volume as one of its own, along the axis of
    `reading.slice` (the last), unless it names one. A volume that cannot be read stays one."""
    if reading.slice is not None and ':' in reading.slice:
        return list(samples)
    axis = int(reading.slice or 2)
    found: list[Sample] = []
    for sample in samples:
        if suffix_of(sample.image_path) not in NIFTI_SUFFIXES:
            found.append(sample)
            continue
        try:
            count = (*shape_of_nifti(sample.image_path), 1)[axis]
        except InputError:
            count = 1
        if count == 1 or count > MOST_SLICES:
            found.append(sample)
            continue
        found += [
            replace(sample, name=f'{sample.name}_axis{axis}_{index:04d}', slice=f'{axis}:{index}')
            for index in range(count)
        ]
    return found


# --------------------------------------------------------------------------- image and mask


def fitted_truth(
    image: LoadedImage, truth: np.ndarray
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The labels (H, W) of a mask as they lie over an image, and what is to be said of it: turned
    where the mask was drawn on the pixels before the image's EXIF orientation; None where the two
    have different shapes, since a mask that is squeezed says nothing."""
    size, own = image.pixels.shape[:2], truth.shape
    turned = image.orientation in (5, 6, 7, 8)
    said = f'the mask is {own[1]}×{own[0]}, the image {size[1]}×{size[0]}'
    if same_aspect(size, own):
        if turned and same_aspect(size[::-1], own):
            return truth, ('the image was turned by its EXIF orientation and is square: its mask '
                           'is taken as turned already',)  # fmt: skip
        if image.orientation in (2, 3, 4):
            return truth, ('the image was turned by its EXIF orientation: its mask, of the same '
                           'size either way, is taken as turned already',)  # fmt: skip
        return truth, ()
    if turned and same_aspect(size[::-1], own):
        upright = np.ascontiguousarray(TURNS[image.orientation](truth))
        return upright, (f'{said}: it was turned as the EXIF orientation of the image says',)
    return None, (
        f'{said}, of another shape, so that it was left out: there are no scores (give a mask of '
        'the same aspect ratio)',
    )


def same_aspect(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two (height, width) have the same aspect ratio, but for rounding to whole pixels."""
    if tuple(one) == tuple(other):
        return True
    small, large = sorted((tuple(one), tuple(other)))
    scale = large[0] * small[1] / max(1, small[0] * large[1])
    slack = 1 / max(1, min(*small, *large))
    return abs(scale - 1) <= max(SAME_ASPECT if slack < SAME_ASPECT else slack, slack)


def over_image(truth: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The labels (H, W) of a mask at the size (height, width) of its image, nearest neighbour."""
    if truth.shape == tuple(size):
        return truth
    return resized(truth, (size[1], size[0]), cv2.INTER_NEAREST_EXACT)


# --------------------------------------------------------------------------- names


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
    plain = [_cleaned(stem_of(path)) for path in paths]
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
    origin: tuple[int, int] = (0, 0)  # (x, y) of the image in a larger one that it was cut from

    def to_model(self, x: int, y: int) -> tuple[int, int]:
        """Original pixel (x, y) to the model-input pixel (column, row) that holds its centre."""
        height, width = self.original_size
        x, y = x - self.origin[0], y - self.origin[1]
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
    of_each: str | None = None  # one of OF_EACH_IMAGE: mean and std are those of each image

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

    def of_image(self, image: np.ndarray) -> Preprocessing:
        """The same with the numbers of an image (H, W, C), where those of each image are wanted:
        all its channels together, at the input's size, without padding. Its baselines are
        normalised with them too."""
        if self.of_each is None:
            return self
        image = image[:, :, None] if image.ndim == 2 else image
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        place = self.place(image.shape[:2])
        fit = replace(self, resize='stretch', image_size=(place.height, place.width))
        pixels = fit.resize_image(image).astype(np.float64) / 255
        if self.of_each == 'minmax':
            mean, std = float(pixels.min()), float(pixels.max() - pixels.min())
        else:
            mean, std = float(pixels.mean()), float(pixels.std())
        std = std if std > 1e-9 else 1.0  # an image of one shade
        return replace(self, mean=(mean,) * self.channels, std=(std,) * self.channels)

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

    def resize_mask(self, mask: np.ndarray, nothing: int = 0) -> np.ndarray:
        """(H, W) labels at the input's size, nearest neighbour. nothing: that of padding."""
        mask = mask.astype(np.int16) if nothing < 0 and mask.dtype == np.uint8 else mask
        return self._fit(mask, self.place(mask.shape[:2]), cv2.INTER_NEAREST_EXACT, nothing)

    def _fit(
        self, array: np.ndarray, place: Placement, interpolation: int, padding: int = 0
    ) -> np.ndarray:
        whole = np.full((*sides(self.image_size), *array.shape[2:]), padding, array.dtype)
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
