"""Reading the pixels of images, whatever file they lie in.

Images come from files that strangers made, so every reader here either returns an array or raises
:class:`InputError` with one sentence that names the file and the remedy.

An image is (H, W, C) in *pixel space*, 0-255: uint8 where the file holds bytes, else float32, so
that nothing of what a scanner measured is rounded away. Which values of the file became 0 and 255
is told with it.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from igseg.data.medical import (
    DICOM_SUFFIXES,
    NIFTI_SUFFIXES,
    Geometry,
    is_dicom,
    read_dicom,
    read_nifti,
    shape_of_nifti,
)
from igseg.errors import InputError, NoFrameError, one_line

ARRAY_SUFFIXES = ('.npy',)  # images of any number of channels
TIFF_SUFFIXES = ('.tif', '.tiff')
LOSSY_FORMATS = ('JPEG', 'MPO', 'WEBP', 'JPEG2000')
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # of an image, unless more are allowed
BYTES_A_PIXEL = 30  # of a large image on its way to the network: 11 to 18, measured, and a copy
AUTO, DICOM = 'auto', 'dicom'  # of a window
AUTO_PERCENTILES = (0.5, 99.5)  # of the values that `auto` makes 0 and 255
MOST_SAMPLED = 1 << 24  # values of which they are taken; evenly spaced where there are more
LEAST_RANGE = 0.1  # share of the range that an image should use
ORIENTATION = 0x0112  # the EXIF tag


# What EXIF orientations do to an array (H, W, ...).
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}

warnings.filterwarnings('ignore', module=r'PIL\.')  # what matters is raised, in our own words

_pillow_limit = threading.Lock()  # Pillow has one limit for the whole process


def window_of(text: str | None) -> tuple[float, float] | None:
    """LOW and HIGH of a window that was given in numbers, else None. Raises InputError."""
    if text in (None, AUTO, DICOM):
        return None
    try:
        low, high = (float(part) for part in str(text).split(':'))
        fine = math.isfinite(low) and math.isfinite(high) and low < high
    except ValueError:
        fine = False
    if not fine:
        raise InputError(
            f'window "{text}" is neither LOW:HIGH, two numbers, nor {AUTO} nor {DICOM} '
            '(for example --window=-160:240)'
        )
    return low, high


@dataclass(frozen=True)
class Reading:
    """Which part of a file is the image, and which of its values are black and white.

    Raises InputError where a value makes no sense.
    """

    window: str | None = None  # LOW:HIGH, AUTO or DICOM; None: by what the file holds
    frame: int | None = None  # of several frames or pages, from 0; None: the first, which is said
    slice: str | None = None  # of a volume, AXIS:INDEX, or AXIS: all along it; None: the middle one
    crop: tuple[int, int, int, int] | None = None  # X, Y, width, height, in pixels of the image
    max_pixels: int | None = None  # None: MOST_PIXELS
    any_scale: bool = False  # whether the normalisation undoes any scaling of the values

    def __post_init__(self) -> None:
        window_of(self.window)
        if self.slice is not None and not re.fullmatch(r'[012](:\d+)?', self.slice):
            raise InputError(f'slice "{self.slice}" is not of the form AXIS:INDEX, AXIS being 0-2')

    @property
    def limit(self) -> int:
        """How many pixels an image may have."""
        return self.max_pixels or MOST_PIXELS


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class LoadedImage:
    """An image as it was read."""

    pixels: np.ndarray  # (H, W, C), 0-255: uint8 or float32
    value_range: tuple[float, float] = (0.0, 255.0)  # of the file's values, what became 0 and 255
    orientation: int = 1  # the EXIF tag by which it was turned upright
    geometry: Geometry | None = None  # where a volume's slice lies
    notes: tuple[str, ...] = ()  # what was decided, in sentences


@dataclass(frozen=True)
class Stored:
    """The values of an image as they stand in its file."""

    values: np.ndarray  # (H, W, C) numbers
    full_range: tuple[float, float] | None  # 0 and 255 by default; None: the file does not say
    window: tuple[float, float] | None = None  # that the file itself asks for
    orientation: int = 1
    geometry: Geometry | None = None
    notes: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """The ending of a file's name, lower case; `.nii.gz` is one."""
    name = path.name.lower()
    return '.nii.gz' if name.endswith('.nii.gz') else Path(name).suffix


def stem_of(path: Path) -> str:
    """A file's name without that ending."""
    return path.name[: -len('.nii.gz')] if suffix_of(path) == '.nii.gz' else path.stem


# --------------------------------------------------------------------------- opening pictures


@dataclass(frozen=True)
class Opened:
    """A picture that Pillow has decoded, turned upright."""

    picture: Image.Image
    orientation: int
    deep: bool  # whether its colours have more bits than Pillow keeps
    lossy: bool
    notes: tuple[str, ...]


def open_picture(
    path: str | Path, kind: str = 'image', reading: Reading = DEFAULT_READING
) -> Image.Image:
    """Open and fully decode a picture file, turned upright by its EXIF orientation.

    Raises InputError when the file is missing, empty, no picture, cut short, lacks the frame, or
    is larger than `reading` allows (89 million pixels).
    """
    return opened_picture(Path(path), kind, reading).picture


def opened_picture(path: Path, kind: str, reading: Reading) -> Opened:
    """`open_picture`, with what was found on the way."""
    check_file(path, kind)
    try:
        with _allowing(reading.limit), Image.open(path) as opened:
            notes = _go_to_frame(opened, path, kind, reading)
            if opened.width * opened.height > reading.limit:
                raise Image.DecompressionBombError
            lossy = opened.format in LOSSY_FORMATS
            deep = ';16' in str(opened.tile) and opened.mode in ('RGB', 'RGBA', 'LA')
            opened.load()
            orientation = opened.getexif().get(ORIENTATION, 1)
            orientation = orientation if orientation in TURNS else 1
            ImageOps.exif_transpose(opened, in_place=True)
            return Opened(opened, orientation, deep, lossy, notes)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f'{path} is not a picture, whatever its name says '
            f'(give a JPEG, PNG, TIFF, BMP or WebP {kind})'
        ) from None
    except Image.DecompressionBombError:
        raise InputError(
            f'{kind} {path} has more than {reading.limit:,} pixels '
            '(shrink it first, or allow more with --max_pixels)'
        ) from None
    except MemoryError:
        raise InputError(f'not enough memory to open {kind} {path} (shrink it first)') from None
    except Exception as error:  # Pillow's decoders raise all kinds on damaged files
        raise InputError(
            f'{kind} {path} is damaged and cannot be read: {one_line(error)} '
            '(copy or export it again)'
        ) from None


def check_file(path: Path, kind: str = 'image') -> None:
    """Raise InputError where there is no file, or an empty one."""
    try:
        there, empty = path.is_file(), path.is_file() and path.stat().st_size == 0
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        there = empty = False
    if not there:
        raise InputError(f'{kind} file not found: {path} (check the path)')
    if empty:
        raise InputError(f'{kind} file is empty (0 bytes): {path} (copy or export it again)')


@contextlib.contextmanager
def _allowing(pixels: int) -> Iterator[None]:
    """Have Pillow open pictures of more pixels than it does by default."""
    if pixels <= MOST_PIXELS:
        yield
        return
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _go_to_frame(opened: Image.Image, path: Path, kind: str, reading: Reading) -> tuple[str, ...]:
    """Turn to the frame that is wanted. Returns what is to be said of it."""
    frames = 1 if opened.format == 'MPO' else getattr(opened, 'n_frames', 1)
    notes = frame_notes(path, kind, frames, reading)
    if frames > 1:
        opened.seek(reading.frame or 0)
    return notes


def frame_notes(path: Path, kind: str, frames: int, reading: Reading) -> tuple[str, ...]:
    """What is to be said where a file holds several frames. Raises InputError where there is no
    such frame; a mask of a single frame belongs to all of them."""
    frame = reading.frame or 0
    if frame >= frames and not (kind == 'mask' and frames == 1):
        raise NoFrameError(
            f'{kind} {path} has {frames} frame{"s" if frames > 1 else ""}, so there is no frame '
            f'{frame} (--frame counts from 0)'
        )
    if frames == 1 or reading.frame is not None:
        return ()
    return (
        f'{path.name} has {frames} frames or pages: the first is taken (another with --frame N, '
        'from 0)',
    )


# --------------------------------------------------------------------------- values in files


def _medical(found, channels: int, path: Path) -> Stored:
    """What a DICOM or NIfTI file holds."""
    values = _in_channels(found.values, channels, path)
    return Stored(values, found.full_range, found.window, geometry=found.geometry,
                  notes=found.notes)  # fmt: skip


def _of_picture(picture: Image.Image, channels: int, path: Path) -> Stored:
    """The values of a picture that Pillow has read."""
    if channels == 4 and picture.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La'):
        return Stored(np.array(converted(picture, path, 'RGBA')), (0.0, 255.0))
    if channels not in (1, 3):
        raise InputError(
            f'{path} holds a picture of {len(picture.getbands())} channels, but the network takes '
            f'{channels} (give a .npy array or a TIFF file with {channels} channels)'
        )
    if picture.mode == 'F' or picture.mode.startswith('I'):
        values = np.array(picture)[:, :, None]
        return Stored(np.repeat(values, channels, axis=2), _full_range(values))
    if channels == 1:
        grey = np.array(converted(converted(picture, path), path, 'L'))
        return Stored(grey[:, :, None], (0.0, 255.0))
    return Stored(np.array(converted(picture, path)), (0.0, 255.0))


def _of_array(values: np.ndarray, channels: int, path: Path) -> Stored:
    """The values of an array (H, W), (H, W, C) or (C, H, W)."""
    values = values[:, :, None] if values.ndim == 2 else values
    if values.shape[2] != channels and values.shape[0] == channels:
        values = np.moveaxis(values, 0, 2)
    return Stored(_in_channels(values, channels, path), _full_range(values))


def _in_channels(values: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """Values (H, W) or (H, W, c) in as many channels as are wanted: grey ones repeated, colours
    without their alpha, or as their luma. Raises InputError."""
    values = values[:, :, None] if values.ndim == 2 else values
    own = values.shape[2]
    if own == channels:
        return np.ascontiguousarray(values)
    if channels == 3 and own in (1, 2):  # grey, or grey with alpha
        return np.repeat(values[:, :, :1], 3, axis=2)
    if channels == 3 and own == 4:
        return np.ascontiguousarray(values[:, :, :3])
    if channels == 1 and own in (3, 4):
        luma = values[:, :, :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return luma[:, :, None]
    raise InputError(
        f'{path} holds an array of shape {values.shape}, but the network takes {channels} '
        f'channel{"s" if channels > 1 else ""}'
    )


def _deep_values(path: Path, reading: Reading) -> np.ndarray:
    """The values (H, W, C) of a picture whose colours have 16 bits. Raises InputError."""
    if suffix_of(path) in TIFF_SUFFIXES:
        return _channels_last(read_array(path, reading))
    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3:
        raise InputError(f'image {path} is damaged and cannot be read (copy or export it again)')
    order = [2, 1, 0, 3][: values.shape[2]]  # OpenCV's colours are the other way round
    return values[:, :, order] if values.shape[2] >= 3 else values


def _channels_last(values: np.ndarray) -> np.ndarray:
    planar = values.ndim == 3 and values.shape[0] in (3, 4) and values.shape[2] not in (3, 4)
    return np.moveaxis(values, 0, 2) if planar else values


def read_array(path: Path, reading: Reading = DEFAULT_READING) -> np.ndarray:
    """The array in a `.npy` or TIFF file: numbers, (H, W), (H, W, C) or (C, H, W)."""
    import tifffile  # takes a while

    check_file(path)
    try:
        if suffix_of(path) in ARRAY_SUFFIXES:
            lazy = np.load(path, mmap_mode='r', allow_pickle=False)
        else:
            with tifffile.TiffFile(path) as file:
                part = file.series[0] if reading.frame is None else file.pages[reading.frame]
                _check_area(part.shape, path, reading)
                lazy = part.asarray()
        _check_area(lazy.shape, path, reading)
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


def _check_area(shape: Sequence[int], path: Path, reading: Reading) -> None:
    """Raise InputError for an array of far too many numbers, before it is read."""
    if math.prod(shape) > 16 * reading.limit:
        raise InputError(f'image {path} has the shape {tuple(shape)} (shrink it first)')


def converted(picture: Image.Image, path: str | Path, mode: str = 'RGB') -> Image.Image:
    """The picture in RGB or another of Pillow's modes."""
    try:
        return picture if picture.mode == mode else picture.convert(mode)
    except (ValueError, OSError, MemoryError) as error:
        raise InputError(
            f'{path} cannot be converted to {mode}: {one_line(error)} (export it as PNG or JPEG)'
        ) from None


def check_values(values: np.ndarray, path: str | Path) -> None:
    """Raise InputError where an image or a mask (H, W, ...) holds values that are not finite."""
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        count = int((~np.isfinite(values).all(axis=tuple(range(2, values.ndim)))).sum())
        raise InputError(f'{path} has {count:,} pixels that are not finite (export it again)')


# --------------------------------------------------------------------------- values to pixels


def _full_range(values: np.ndarray) -> tuple[float, float] | None:
    """What values stand for by default: 0-65535, 0-255 or 0-1; None where they fit none."""
    if values.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if values.dtype.kind == 'b' or (values.dtype.kind == 'f' and high <= 1):
        full = 0.0, 1.0
    elif values.dtype.kind == 'f' or high <= 255:
        full = 0.0, 255.0
    else:
        full = 0.0, 65535.0
    return full if low >= 0 and high <= full[1] else None


def value_range(stored: Stored, path: Path, reading: Reading) -> tuple[float, float]:
    """The values that become 0 and 255. Raises InputError where that is not known."""
    given = window_of(reading.window)
    if given is not None:
        return given
    if reading.window == DICOM:
        if stored.window is None:
            raise InputError(f'{path} names no window of its own (say --window=LOW:HIGH or auto)')
        return stored.window
    low, high = float(stored.values.min(initial=0)), float(stored.values.max(initial=0))
    if stored.values.size:
        low, high = float(stored.values.min()), float(stored.values.max())
    if reading.window == AUTO:
        sample = stored.values.reshape(-1)[:: max(1, stored.values.size // MOST_SAMPLED)]
        low, high = (float(end) for end in np.percentile(sample, AUTO_PERCENTILES))
        return (low, high) if low < high else _extremes(stored.values)
    for known in (stored.window, stored.full_range):
        if known is not None and np.isfinite(known).all() and known[0] < known[1]:
            return known
    if reading.any_scale:
        return _extremes(stored.values)
    raise InputError(
        f'{path} holds values from {low:.4g} to {high:.4g}, neither 0-1, 0-255 nor, as whole '
        'numbers, 0-65535 (say what is black and white with --window=LOW:HIGH, or auto)'
    )


def _extremes(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low, low + 1)


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (H, W, C) as pixels: `low` becomes 0 and `high` 255, what lies beyond is cut off.
    Bytes that stay what they are stay bytes; everything else is float32, not rounded."""
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return np.ascontiguousarray(values)
    wide = values.dtype.itemsize > 4 or max(abs(low), abs(high)) > 1e6
    pixels: np.ndarray = values.astype(np.float64 if wide else np.float32)
    pixels -= low
    pixels *= 255.0  # first: of 16 bits, the product is exact
    pixels /= high - low
    return np.clip(pixels, 0, 255, out=pixels).astype(np.float32, copy=False)


def _range_notes(
    stored: Stored, low: float, high: float, path: Path, reading: Reading
) -> tuple[str, ...]:
    """What is to be said where an image uses little of its range, or is cut off by it."""
    if reading.any_scale and reading.window is None:
        return ()
    least, most = float(stored.values.min()), float(stored.values.max())
    used = (min(most, high) - max(least, low)) / (high - low)
    if used < LEAST_RANGE:
        return (
            f'{path.name} holds values from {least:.4g} to {most:.4g}, {max(used, 0):.1%} of the '
            f'range {low:.4g} to {high:.4g} by which they were scaled: nearly one shade (say what '
            'is black and white with --window=LOW:HIGH, or auto)',
        )
    return ()


# --------------------------------------------------------------------------- file formats


def _picture_values(path: Path, channels: int, reading: Reading) -> Stored:
    """What a picture that Pillow reads holds."""
    return _opened_values(opened_picture(path, 'image', reading), path, channels, reading)


def _opened_values(opened: Opened, path: Path, channels: int, reading: Reading) -> Stored:
    if opened.deep:
        values = TURNS[opened.orientation](_deep_values(path, reading))
        stored = Stored(_in_channels(values, channels, path), _full_range(values))
    else:
        stored = _of_picture(opened.picture, channels, path)
    return replace(stored, orientation=opened.orientation, notes=opened.notes)


def _check_picture(path: Path, reading: Reading) -> None:
    open_picture(path, 'image', reading)


def _array_values(path: Path, channels: int, reading: Reading) -> Stored:
    """What an array of numbers holds."""
    return _of_array(read_array(path, reading), channels, path)


def _check_array(path: Path, reading: Reading) -> None:
    read_array(path, reading)


def _tiff_values(path: Path, channels: int, reading: Reading) -> Stored:
    """What a TIFF file holds: a picture, or an array of any number of channels."""
    if channels not in (1, 3):
        return _array_values(path, channels, reading)
    try:
        opened = opened_picture(path, 'image', reading)
    except NoFrameError:
        raise
    except InputError:
        if not path.is_file():
            raise
        return _array_values(path, channels, reading)  # Pillow knows only some of these
    return _opened_values(opened, path, channels, reading)


def _check_tiff(path: Path, reading: Reading) -> None:
    try:
        _check_picture(path, reading)
    except NoFrameError:
        raise
    except InputError:
        if not path.is_file():
            raise
        read_array(path, reading)  # Pillow knows only some of these


def _dicom_values(path: Path, channels: int, reading: Reading) -> Stored:
    """What a frame of a DICOM file holds."""
    check_file(path)
    found = read_dicom(path, reading.frame, reading.limit)
    notes = frame_notes(path, 'image', found.frames, reading)
    stored = _medical(found, channels, path)
    return replace(stored, notes=(*notes, *stored.notes))


def _check_dicom(path: Path, reading: Reading) -> None:
    check_file(path)
    read_dicom(path, reading.frame, reading.limit)


def _nifti_values(path: Path, channels: int, reading: Reading) -> Stored:
    """What a slice of a NIfTI volume holds."""
    check_file(path)
    found = read_nifti(path, reading.slice, 4 * reading.limit, reading.frame)
    stored = _medical(found, channels, path)
    notes = frame_notes(path, 'image', found.frames, reading)
    return replace(stored, notes=(*notes, *stored.notes))


def _check_nifti(path: Path, reading: Reading) -> None:
    check_file(path)
    shape_of_nifti(path)


@dataclass(frozen=True)
class Format:
    """A row of the table of file formats of images. Both functions raise InputError."""

    suffixes: tuple[str, ...]  # of its files' names, lower case
    values: Callable[[Path, int, Reading], Stored]  # in as many channels as the network takes
    check: Callable[[Path, Reading], None]  # for what is no image at all, whatever its channels


PICTURES = Format(('.jpg', '.jpeg', '.png', '.bmp'), _picture_values, _check_picture)
DICOM_FILES = Format(DICOM_SUFFIXES, _dicom_values, _check_dicom)

FORMATS: tuple[Format, ...] = (
    PICTURES,
    Format(TIFF_SUFFIXES, _tiff_values, _check_tiff),
    Format(('.webp', '.gif'), _picture_values, _check_picture),
    Format(ARRAY_SUFFIXES, _array_values, _check_array),
    DICOM_FILES,
    Format(NIFTI_SUFFIXES, _nifti_values, _check_nifti),
)

IMAGE_SUFFIXES = tuple(suffix for row in FORMATS for suffix in row.suffixes)


def format_of(path: Path) -> Format:
    """The row of FORMATS of a file: by its name, without an ending by its first bytes. What no row
    knows may still be a picture."""
    suffix = suffix_of(path)
    unknown = DICOM_FILES if is_dicom(path) else PICTURES
    return next((row for row in FORMATS if suffix in row.suffixes), unknown)


# --------------------------------------------------------------------------- reading images


def read_image(
    path: str | Path, channels: int = 3, reading: Reading = DEFAULT_READING
) -> np.ndarray:
    """Read an image as (H, W, C), 0-255: uint8, or float32 where the file holds finer values.

    3 channels: any picture as RGB; grey, palette, CMYK and alpha pictures are converted (alpha is
    dropped, as training pipelines do). 1: any picture as grey (ITU-R 601 luma of the colours). 4:
    pictures with alpha. Any number: `.npy` arrays and TIFF files, (H, W, C) or (C, H, W).

    16-bit values are scaled from their full range 0-65535; floats are taken as 0-1 if nothing
    exceeds 1, else as 0-255; DICOM files by their own window. `reading.window` says otherwise.
    Raises InputError as `open_picture` does, for values that are not finite or beyond those ranges,
    and for another number of channels.
    """
    return load_image(path, channels, reading).pixels


def load_image(
    path: str | Path, channels: int = 3, reading: Reading = DEFAULT_READING
) -> LoadedImage:
    """`read_image`, with what was decided. The crop is left to the caller, who may have a mask."""
    path = Path(path)
    stored = format_of(path).values(path, channels, reading)
    check_values(stored.values, path)
    low, high = value_range(stored, path, reading)
    return LoadedImage(
        scaled(stored.values, low, high),
        (low, high),
        stored.orientation,
        stored.geometry,
        (*stored.notes, *_range_notes(stored, low, high, path, reading)),
    )


def load_channels(
    paths: Sequence[Path], channels: int, reading: Reading = DEFAULT_READING
) -> LoadedImage:
    """An image whose channels lie in files of their own, in order. Raises InputError."""
    if len(paths) == 1:
        return load_image(paths[0], channels, reading)
    if len(paths) != channels:
        raise InputError(
            f'{paths[0]} and {len(paths) - 1} more files are the channels of one image, but the '
            f'network takes {channels}'
        )
    parts = [load_image(path, 1, reading) for path in paths]
    sizes = {part.pixels.shape for part in parts}
    if len(sizes) > 1:
        raise InputError(f'{paths[0]} and the files of its other channels differ in size')
    pixels = np.concatenate([part.pixels for part in parts], axis=2)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    return replace(parts[0], pixels=pixels, notes=notes)


def check_image(path: str | Path, reading: Reading = DEFAULT_READING) -> None:
    """Raise InputError for what is no image at all, before the network says how many channels."""
    path = Path(path)
    format_of(path).check(path, reading)


def crop_image(pixels: np.ndarray, crop: tuple[int, int, int, int] | None, name: str) -> np.ndarray:
    """A part (X, Y, width, height) of an image or mask (H, W, ...). Raises InputError where it
    reaches beyond."""
    if crop is None:
        return pixels
    x, y, width, height = crop
    if x + width > pixels.shape[1] or y + height > pixels.shape[0]:
        raise InputError(
            f'crop {",".join(map(str, crop))} reaches beyond {name}, which is '
            f'{pixels.shape[1]}×{pixels.shape[0]} (X,Y,WIDTH,HEIGHT, in pixels of the image)'
        )
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])
