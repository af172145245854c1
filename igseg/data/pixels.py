"""Reading the pixels of images, whatever file they lie in.

The files may be damaged or of any kind, so every reader here either returns an array or raises
:class:`InputError` with one sentence that names the file and the remedy.

An image is (H, W, C) in *pixel space*, 0-255: uint8 where the file holds bytes, else float32, so
that no measured value is rounded. `LoadedImage` also says which values of the file became 0 and
255.
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
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # of an image, unless the user allows more
BYTES_A_PIXEL = 30  # memory that reading a large image takes: measured are 11 to 18, and a copy
AUTO, DICOM = 'auto', 'dicom'  # values of `Reading.window` that are no numbers
AUTO_PERCENTILES = (0.5, 99.5)  # the percentiles that become 0 and 255 under `auto`
MOST_SAMPLED = 1 << 24  # values from which percentiles are computed; evenly spaced ones of more
LEAST_RANGE = 0.1  # share of its range that an image should use; below it, a note says so
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

warnings.filterwarnings('ignore', module=r'PIL\.')  # what matters is raised as an InputError

_pillow_limit = threading.Lock()  # held while Pillow's limit, which is global, is changed


def window_of(text: str | None) -> tuple[float, float] | None:
    """The two numbers of a window LOW:HIGH; None for `auto`, `dicom` and None. Raises
    InputError."""
    if text in (None, AUTO, DICOM):
        return None
    try:
        low, high = (float(part) for part in str(text).split(':'))
        makes_sense = math.isfinite(low) and math.isfinite(high) and low < high
    except ValueError:
        makes_sense = False
    if not makes_sense:
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

    window: str | None = None  # LOW:HIGH, AUTO or DICOM; None: the file decides
    frame: int | None = None  # a frame or page, from 0; None: the first, and a note says so
    slice: str | None = None  # of a volume: AXIS:INDEX, or AXIS for all; None: the middle slice
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
    """An image that was read from a file."""

    pixels: np.ndarray  # (H, W, C), 0-255: uint8 or float32
    value_range: tuple[float, float] = (0.0, 255.0)  # the values of the file that became 0 and 255
    orientation: int = 1  # the EXIF tag by which the image was turned upright
    geometry: Geometry | None = None  # where the slice lies in its volume
    notes: tuple[str, ...] = ()  # what was decided, in sentences


@dataclass(frozen=True)
class Stored:
    """The values of an image as its file stores them."""

    values: np.ndarray  # (H, W, C) numbers
    full_range: tuple[float, float] | None  # become 0 and 255 by default; None: the file is silent
    window: tuple[float, float] | None = None  # that the file asks for
    orientation: int = 1
    geometry: Geometry | None = None
    notes: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """The ending of a file's name, in lower case; `.nii.gz` counts as one ending."""
    name = path.name.lower()
    return '.nii.gz' if name.endswith('.nii.gz') else Path(name).suffix


def stem_of(path: Path) -> str:
    """A file's name without its ending (`suffix_of`)."""
    return path.name[: -len('.nii.gz')] if suffix_of(path) == '.nii.gz' else path.stem


# --------------------------------------------------------------------------- opening pictures


@dataclass(frozen=True)
class Opened:
    """A picture that Pillow has decoded, turned upright."""

    picture: Image.Image
    orientation: int  # the EXIF tag
    deep: bool  # whether the colours in the file have more bits than Pillow keeps
    lossy: bool  # whether the file format changes values
    notes: tuple[str, ...]


def open_picture(
    path: str | Path, kind: str = 'image', reading: Reading = DEFAULT_READING
) -> Image.Image:
    """Open and fully decode a picture file, turned upright by its EXIF orientation.

    Raises InputError where the file is missing, empty, no picture or cut short, where it lacks the
    frame, or where it has more pixels than `reading` allows (by default 89 million).
    """
    return opened_picture(Path(path), kind, reading).picture


def opened_picture(path: Path, kind: str, reading: Reading) -> Opened:
    """`open_picture`, with what else the file says."""
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
    except Exception as error:  # Pillow's decoders raise any kind of error on damaged files
        raise InputError(
            f'{kind} {path} is damaged and cannot be read: {one_line(error)} '
            '(copy or export it again)'
        ) from None


def check_file(path: Path, kind: str = 'image') -> None:
    """Raise InputError where the file is missing or empty."""
    try:
        exists, empty = path.is_file(), path.is_file() and path.stat().st_size == 0
    except (OSError, ValueError):  # the name is too long or holds a zero byte
        exists = empty = False
    if not exists:
        raise InputError(f'{kind} file not found: {path} (check the path)')
    if empty:
        raise InputError(f'{kind} file is empty (0 bytes): {path} (copy or export it again)')


@contextlib.contextmanager
def _allowing(pixels: int) -> Iterator[None]:
    """Make Pillow open pictures of up to so many pixels."""
    if pixels <= MOST_PIXELS:
        yield
        return
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _go_to_frame(opened: Image.Image, path: Path, kind: str, reading: Reading) -> tuple[str, ...]:
    """Go to the frame that `reading` names. Returns notes on it."""
    frames = 1 if opened.format == 'MPO' else getattr(opened, 'n_frames', 1)
    notes = frame_notes(path, kind, frames, reading)
    if frames > 1:
        opened.seek(reading.frame or 0)
    return notes


def frame_notes(path: Path, kind: str, frames: int, reading: Reading) -> tuple[str, ...]:
    """Notes on a file that holds several frames. Raises InputError where it lacks the frame that
    `reading` names; but a mask of a single frame belongs to every frame of its image."""
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


def _medical(medical, channels: int, path: Path) -> Stored:
    """The values of a DICOM or NIfTI file."""
    values = _in_channels(medical.values, channels, path)
    return Stored(values, medical.full_range, medical.window, geometry=medical.geometry,
                  notes=medical.notes)  # fmt: skip


def _of_picture(picture: Image.Image, channels: int, path: Path) -> Stored:
    """The values of a picture that Pillow has decoded. Raises InputError."""
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
        luma = np.array(converted(converted(picture, path), path, 'L'))
        return Stored(luma[:, :, None], (0.0, 255.0))
    return Stored(np.array(converted(picture, path)), (0.0, 255.0))


def _of_array(values: np.ndarray, channels: int, path: Path) -> Stored:
    """The values of an array (H, W), (H, W, C) or (C, H, W)."""
    values = values[:, :, None] if values.ndim == 2 else values
    if values.shape[2] != channels and values.shape[0] == channels:
        values = np.moveaxis(values, 0, 2)
    return Stored(_in_channels(values, channels, path), _full_range(values))


def _in_channels(values: np.ndarray, channels: int, path: Path) -> np.ndarray:
    """Values (H, W) or (H, W, c) in a given number of channels: grey values are repeated, alpha is
    dropped, and colours become luma where one channel is wanted. Raises InputError."""
    values = values[:, :, None] if values.ndim == 2 else values
    count = values.shape[2]
    if count == channels:
        return np.ascontiguousarray(values)
    if channels == 3 and count in (1, 2):  # grey, or grey with alpha
        return np.repeat(values[:, :, :1], 3, axis=2)
    if channels == 3 and count == 4:
        return np.ascontiguousarray(values[:, :, :3])
    if channels == 1 and count in (3, 4):
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
    order = [2, 1, 0, 3][: values.shape[2]]  # OpenCV stores colours as blue, green, red
    return values[:, :, order] if values.shape[2] >= 3 else values


def _channels_last(values: np.ndarray) -> np.ndarray:
    planar = values.ndim == 3 and values.shape[0] in (3, 4) and values.shape[2] not in (3, 4)
    return np.moveaxis(values, 0, 2) if planar else values


def read_array(path: Path, reading: Reading = DEFAULT_READING) -> np.ndarray:
    """The array in a `.npy` or TIFF file: numbers, (H, W), (H, W, C) or (C, H, W)."""
    import tifffile  # slow to import

    check_file(path)
    try:
        if suffix_of(path) in ARRAY_SUFFIXES:
            array = np.load(path, mmap_mode='r', allow_pickle=False)
        else:
            with tifffile.TiffFile(path) as file:
                part = file.series[0] if reading.frame is None else file.pages[reading.frame]
                _check_area(part.shape, path, reading)
                array = part.asarray()
        _check_area(array.shape, path, reading)
        values = np.array(array)
    except InputError:
        raise
    except Exception as error:  # damaged files raise any kind of error
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
    """Raise InputError for an array with far too many numbers; it has not been read yet."""
    if math.prod(shape) > 16 * reading.limit:
        raise InputError(f'image {path} has the shape {tuple(shape)} (shrink it first)')


def converted(picture: Image.Image, path: str | Path, mode: str = 'RGB') -> Image.Image:
    """The picture in RGB or another of Pillow's modes. Raises InputError."""
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
    """The range that values use by default: 0-1, 0-255 or 0-65535; None where none of them fits."""
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
    """The values that become 0 and 255. Raises InputError where nothing says which these are."""
    window = window_of(reading.window)
    if window is not None:
        return window
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
    for ends in (stored.window, stored.full_range):
        if ends is not None and np.isfinite(ends).all() and ends[0] < ends[1]:
            return ends
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
    """Values (H, W, C) as pixels: `low` becomes 0, `high` becomes 255, values beyond are clipped.
    Bytes that do not change stay uint8; all other values become float32, without rounding."""
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return np.ascontiguousarray(values)
    wide = values.dtype.itemsize > 4 or max(abs(low), abs(high)) > 1e6
    pixels: np.ndarray = values.astype(np.float64 if wide else np.float32)
    pixels -= low
    pixels *= 255.0  # before the division: the product is exact for 16-bit values
    pixels /= high - low
    return np.clip(pixels, 0, 255, out=pixels).astype(np.float32, copy=False)


def _range_notes(
    stored: Stored, low: float, high: float, path: Path, reading: Reading
) -> tuple[str, ...]:
    """A note where an image uses little of the range by which it was scaled."""
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
    """The values of a picture that Pillow reads."""
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
    """The values of a file that holds an array of numbers."""
    return _of_array(read_array(path, reading), channels, path)


def _check_array(path: Path, reading: Reading) -> None:
    read_array(path, reading)


def _tiff_values(path: Path, channels: int, reading: Reading) -> Stored:
    """The values of a TIFF file: a picture, or an array of any number of channels."""
    if channels not in (1, 3):
        return _array_values(path, channels, reading)
    try:
        opened = opened_picture(path, 'image', reading)
    except NoFrameError:
        raise
    except InputError:
        if not path.is_file():
            raise
        return _array_values(path, channels, reading)  # Pillow reads only some kinds of TIFF files
    return _opened_values(opened, path, channels, reading)


def _check_tiff(path: Path, reading: Reading) -> None:
    try:
        _check_picture(path, reading)
    except NoFrameError:
        raise
    except InputError:
        if not path.is_file():
            raise
        read_array(path, reading)  # Pillow reads only some kinds of TIFF files


def _dicom_values(path: Path, channels: int, reading: Reading) -> Stored:
    """The values of a frame of a DICOM file."""
    check_file(path)
    medical = read_dicom(path, reading.frame, reading.limit)
    notes = frame_notes(path, 'image', medical.frames, reading)
    stored = _medical(medical, channels, path)
    return replace(stored, notes=(*notes, *stored.notes))


def _check_dicom(path: Path, reading: Reading) -> None:
    check_file(path)
    read_dicom(path, reading.frame, reading.limit)


def _nifti_values(path: Path, channels: int, reading: Reading) -> Stored:
    """The values of a slice of a NIfTI volume."""
    check_file(path)
    medical = read_nifti(path, reading.slice, 4 * reading.limit, reading.frame)
    stored = _medical(medical, channels, path)
    notes = frame_notes(path, 'image', medical.frames, reading)
    return replace(stored, notes=(*notes, *stored.notes))


def _check_nifti(path: Path, reading: Reading) -> None:
    check_file(path)
    shape_of_nifti(path)


@dataclass(frozen=True)
class Format:
    """A row of the table of file formats of images. Both functions raise InputError."""

    suffixes: tuple[str, ...]  # of the files' names, in lower case
    values: Callable[[Path, int, Reading], Stored]  # the integer: how many channels are wanted
    check: Callable[[Path, Reading], None]  # raises for a file that holds no image of any kind


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
    """The row of FORMATS that reads a file: by the ending of its name, else by its first bytes. A
    file that no row names may still be a picture."""
    suffix = suffix_of(path)
    otherwise = DICOM_FILES if is_dicom(path) else PICTURES
    return next((row for row in FORMATS if suffix in row.suffixes), otherwise)


# --------------------------------------------------------------------------- reading images


def read_image(
    path: str | Path, channels: int = 3, reading: Reading = DEFAULT_READING
) -> np.ndarray:
    """Read an image as (H, W, C), 0-255: uint8, or float32 where the file holds finer values.

    3 channels: any picture as RGB; grey, palette, CMYK and alpha pictures are converted (alpha is
    dropped, as training pipelines do). 1: any picture as grey (ITU-R 601 luma of the colours). 4:
    pictures with alpha. Any number: `.npy` arrays and TIFF files, (H, W, C) or (C, H, W).

    By default 16-bit values are scaled from their full range 0-65535; floats count as 0-1 if none
    exceeds 1, else as 0-255; a DICOM file names its window. `reading.window` overrides all this.
    Raises InputError as `open_picture` does, for values that are not finite or lie beyond those
    ranges, and for another number of channels.
    """
    return load_image(path, channels, reading).pixels


def load_image(
    path: str | Path, channels: int = 3, reading: Reading = DEFAULT_READING
) -> LoadedImage:
    """`read_image`, with notes on what was decided. `reading.crop` is left to the caller, who may
    have to crop a mask too."""
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
    """An image with one file for each channel, in order; or an image in a single file. Raises
    InputError."""
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
    """Raise InputError for a file that holds no image, whatever number of channels is wanted."""
    path = Path(path)
    format_of(path).check(path, reading)


def crop_image(pixels: np.ndarray, crop: tuple[int, int, int, int] | None, name: str) -> np.ndarray:
    """The part (X, Y, width, height) of an image or mask (H, W, ...). name: of the image, for the
    InputError that is raised where the part reaches beyond it."""
    if crop is None:
        return pixels
    x, y, width, height = crop
    if x + width > pixels.shape[1] or y + height > pixels.shape[0]:
        raise InputError(
            f'crop {",".join(map(str, crop))} reaches beyond {name}, which is '
            f'{pixels.shape[1]}×{pixels.shape[0]} (X,Y,WIDTH,HEIGHT, in pixels of the image)'
        )
    return np.ascontiguousarray(pixels[y : y + height, x : x + width])
