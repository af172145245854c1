"""Samples of a dataset: an image and its ground truth.

`layouts` finds the files in a folder; `pixels` reads images, `masks` reads masks, `annotations`
reads annotations. A mask is (H, W) uint8 with class labels, or int16 where pixels do not count
(-1).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np

from igseg.data.annotations import AnnotatedImage, YoloLabels
from igseg.data.layouts import DataSource, Listing, Truth, find
from igseg.data.masks import MaskFile, MaskSet, read_mask_picture
from igseg.data.medical import NIFTI_SUFFIXES, shape_of_nifti, slice_ending
from igseg.data.pixels import (
    DEFAULT_READING,
    TURNS,
    LoadedImage,
    Reading,
    check_image,
    load_channels,
    stem_of,
    suffix_of,
)
from igseg.data.truth import UNKNOWN, Labels, TruthReading
from igseg.errors import InputError
from igseg.preprocessing import resized

SAME_ASPECT = 0.02  # relative difference that the aspect ratios of a mask and its image may have
MOST_SLICES = 4096  # of a volume


# Each image gets a folder with its name. These names are files of a batch, or devices on Windows.
RESERVED_NAMES = r'(summary|failures|index(_\d+)?)\.\w+|(con|prn|aux|nul|com\d|lpt\d)(\..*)?'
NAME_BYTES = 100  # file systems allow 255; endings are added to the name


# --------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Sample:
    """One image of a dataset. `read_truth` gives (H, W) labels; None: truth unknown."""

    name: str  # unique within the dataset and safe as a folder name
    image_path: Path
    read_truth: Truth | Callable[[], np.ndarray | None] | None = None
    class_names: dict[int, str] = field(default_factory=dict)  # of labels, if the dataset has them
    channel_paths: tuple[Path, ...] = ()  # the files of the channels, if each has a file
    slice: str | None = None  # of a volume, AXIS:INDEX
    notes: tuple[str, ...] = ()  # on the whole dataset, in sentences
    mask_flags: dict[str, str] = field(default_factory=dict)  # the flags that name its mask

    def image(self, channels: int = 3, reading: Reading = DEFAULT_READING) -> np.ndarray:
        """The image, (H, W, C), see `read_image`."""
        return self.load(channels, reading).pixels

    def load(self, channels: int = 3, reading: Reading = DEFAULT_READING) -> LoadedImage:
        """The image, with notes on what was decided. Raises InputError."""
        paths = self.channel_paths or (self.image_path,)
        return load_channels(paths, channels, self.part(reading))

    def part(self, reading: Reading) -> Reading:
        """`reading` for the files of this sample: with its slice."""
        return reading if self.slice is None else replace(reading, slice=self.slice)

    def truth(self, reading: TruthReading = UNKNOWN) -> np.ndarray | None:
        """The ground-truth labels, (H, W), or None where they are unknown. Raises InputError."""
        return self.labels(reading).values

    def labels(self, reading: TruthReading = UNKNOWN) -> Labels:
        """The ground truth, with notes on what was decided. Raises InputError."""
        if self.read_truth is None:
            return Labels(None)
        if isinstance(self.read_truth, (MaskFile, AnnotatedImage, YoloLabels)):
            return self.read_truth.read(replace(reading, pixels=self.part(reading.pixels)))
        return Labels(self.read_truth())

    def names_of_classes(self, reading: TruthReading = UNKNOWN) -> dict[int, str]:
        """The names of labels, if the dataset has them."""
        if isinstance(self.read_truth, (AnnotatedImage, YoloLabels)):
            return self.read_truth.class_names(reading)
        return self.class_names

    def check(self, reading: Reading = DEFAULT_READING) -> None:
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
    """The sample of one image file. Its truth is the mask file, where one is passed; else the truth
    in the dataset of the image, which `list_samples` recognises or `source` names.

    The values of a mask are read together with the values of the other masks of its dataset.
    """
    image_path = Path(image_path)
    sample = _in_dataset(image_path, source) if mask_path is None or _exists(mask_path) else None
    if mask_path is None:
        return sample or _without_truth(image_path, source)
    mask_path, flags = Path(mask_path), source.flags() if source is not None else {}
    truth = sample.read_truth if sample is not None else None
    masks = MaskSet([mask_path])
    if isinstance(truth, MaskFile) and truth.path.resolve() == mask_path.resolve():
        masks = truth.masks
    return Sample(safe_names([image_path])[0], image_path, MaskFile(mask_path, masks),
                  mask_flags={**flags, 'mask_path': str(mask_path)})  # fmt: skip


def _without_truth(image_path: Path, source: DataSource | None) -> Sample:
    """The sample of an image without a ground truth. Where flags say where masks lie, a note says
    that none was found."""
    sample = Sample(safe_names([image_path])[0], image_path)
    if source is None or not source.flags():
        return sample
    if source.names_folders or source.naming is None:
        place = source.images_dir or image_path.parent
        problem = f'{image_path} is not among the images in {place}'
    else:
        problem = f'no mask of {image_path} is named {source.naming.mask}'
    note = f'{problem}, so there is no truth (give --mask_path, or --images_dir and --masks_dir)'
    return replace(sample, notes=(note,))


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _in_dataset(image_path: Path, source: DataSource | None) -> Sample | None:
    """The sample of an image in the dataset that it lies in; None where it lies in none. Raises
    InputError where `source` names folders that do not exist."""
    if source is not None and source.names_folders:
        images_dir = source.images_dir or image_path.parent
        samples = _samples(find(replace(source, images_dir=images_dir)))
        sample = _sample_of(image_path, samples)
        return sample and replace(sample, mask_flags=source.flags())
    flags = {} if source is None else source.names()
    without_truth = None
    for place in _datasets_around(image_path):
        try:
            samples = _samples(find(place if source is None else source.names_at(place)))
        except InputError:
            continue
        sample = _sample_of(image_path, samples)
        if sample is not None and sample.read_truth is not None:
            return replace(sample, mask_flags=flags)
        if sample is not None and without_truth is None:
            # In a dataset without masks, a note on the missing mask would say nothing.
            any_truth = any(other.read_truth is not None for other in samples)
            without_truth = replace(sample, notes=sample.notes if any_truth else ())
    return without_truth


def _sample_of(image_path: Path, samples: Sequence[Sample]) -> Sample | None:
    """The sample that an image file belongs to, with `image_path` as the user wrote it; None where
    there is no such sample."""
    for sample in samples:
        paths = (sample.image_path, *sample.channel_paths)
        if image_path in paths or _same_file(image_path, paths):
            return sample if sample.channel_paths else replace(sample, image_path=image_path)
    return None


def _datasets_around(image_path: Path) -> list[DataSource]:
    """Where the dataset of an image may lie: in the folder of the image, or in one of the two
    folders above it. The lower folders may be named after the split or the kind of files."""
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
    """The samples of a dataset split, sorted by name. The layout of the dataset (`LAYOUTS`) is
    recognised from its files, or `source` names its folders. Raises InputError."""
    source = source or DataSource(Path(data_dir), split)
    return [replace(sample, mask_flags=source.flags()) for sample in _samples(find(source))]


def _samples(listing: Listing) -> list[Sample]:
    paths = [pair.images[0] for pair in listing.pairs]
    missing = () if listing.missing is None else (listing.missing,)  # for images without a mask
    return [
        Sample(
            name, pair.images[0], pair.truth, listing.class_names,
            pair.images if len(pair.images) > 1 else (),
            notes=listing.notes + (missing if pair.truth is None else ()),
        )
        for name, pair in zip(safe_names(paths), listing.pairs, strict=True)
    ]  # fmt: skip


def with_slices(samples: Sequence[Sample], reading: Reading = DEFAULT_READING) -> list[Sample]:
    """The samples, with a sample for every slice of a volume, along the axis that `reading.slice`
    names (by default the last). Where it names a single slice, or a volume cannot be read, the
    samples stay as they are."""
    if reading.slice is not None and ':' in reading.slice:
        return list(samples)
    axis = int(reading.slice or 2)
    sliced: list[Sample] = []
    for sample in samples:
        if suffix_of(sample.image_path) not in NIFTI_SUFFIXES:
            sliced.append(sample)
            continue
        try:
            count = (*shape_of_nifti(sample.image_path), 1)[axis]
        except InputError:
            count = 1
        if count == 1 or count > MOST_SLICES:
            sliced.append(sample)
            continue
        sliced += [
            replace(sample, name=sample.name + slice_ending(axis, index), slice=f'{axis}:{index}')
            for index in range(count)
        ]
    return sliced


# --------------------------------------------------------------------------- image and mask


def fitted_truth(
    image: LoadedImage, truth: np.ndarray
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The labels (H, W) of a mask as they lie over an image, and notes. A mask that was drawn on
    the image before its EXIF orientation was applied is turned too. None where the aspect ratios
    differ, since a distorted mask says nothing."""
    size, mask_size = image.pixels.shape[:2], truth.shape
    turned = image.orientation in (5, 6, 7, 8)
    sizes = f'the mask is {mask_size[1]}×{mask_size[0]}, the image {size[1]}×{size[0]}'
    if same_aspect(size, mask_size):
        if turned and same_aspect(size[::-1], mask_size):
            return truth, ('the image was turned by its EXIF orientation and is square: its mask '
                           'is taken as turned already',)  # fmt: skip
        if image.orientation in (2, 3, 4):
            return truth, ('the image was turned by its EXIF orientation: its mask, of the same '
                           'size either way, is taken as turned already',)  # fmt: skip
        return truth, ()
    if turned and same_aspect(size[::-1], mask_size):
        upright = np.ascontiguousarray(TURNS[image.orientation](truth))
        return upright, (f'{sizes}: it was turned as the EXIF orientation of the image says',)
    return None, (
        f'{sizes}, of another shape, so that it was left out: there are no scores (give a mask of '
        'the same aspect ratio)',
    )


def same_aspect(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes (height, width) have the same aspect ratio, apart from rounding to whole
    pixels."""
    if tuple(size) == tuple(other):
        return True
    small, large = sorted((tuple(size), tuple(other)))
    scale = large[0] * small[1] / max(1, small[0] * large[1])
    slack = 1 / max(1, min(*small, *large))
    return abs(scale - 1) <= max(SAME_ASPECT if slack < SAME_ASPECT else slack, slack)


def over_image(truth: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The labels (H, W) of a mask, resized by nearest neighbour to the (height, width) of its
    image."""
    if truth.shape == tuple(size):
        return truth
    return resized(truth, (size[1], size[0]), cv2.INTER_NEAREST_EXACT)


# --------------------------------------------------------------------------- names


def choose_samples(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """A number of samples, evenly spaced in the list; all samples for None."""
    if count is None or count >= len(samples):
        return list(samples)
    rows = np.linspace(0, len(samples) - 1, count).round().astype(int)
    return [samples[row] for row in rows]


def safe_names(paths: Sequence[Path]) -> list[str]:
    """A unique folder name for every path: its stem, without unusual characters, at most 100 bytes.

    Where names would be equal, or a name is reserved, a few digits of the hash of the file's name
    are added. Where names are still equal (files of two folders), a number is added.
    """
    stems = [_cleaned(stem_of(path)) for path in paths]
    count = Counter(map(_folded, stems))
    names: list[str] = []
    taken: set[str] = set()
    for name, path in zip(stems, paths, strict=True):
        if count[_folded(name)] > 1 or re.fullmatch(RESERVED_NAMES, name, re.IGNORECASE):
            name += '_' + sha256(path.name.encode(errors='surrogatepass')).hexdigest()[:8]
        number, unique = 2, name
        while _folded(unique) in taken:
            unique, number = f'{name}_{number}', number + 1
        taken.add(_folded(unique))
        names.append(unique)
    return names


def _cleaned(stem: str) -> str:
    name = re.sub(r'[^\w.-]+', '_', stem).strip('.')
    return name.encode()[:NAME_BYTES].decode(errors='ignore').strip('.') or 'image'


def _folded(name: str) -> str:
    """A text that is equal for names which some file systems take for equal: in one case, with
    composed accents."""
    return unicodedata.normalize('NFC', name).casefold()
