"""DICOM and NIfTI files, which are read with pydicom and nibabel.

Both libraries are optional (`pip install -r requirements-medical.txt`); where one is missing, an
error says so in one sentence. Images are not reoriented: rows and columns are those of the file, so
that masks which are stored beside the image fit. Files are read as data; nothing in them is run.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from igseg.errors import InputError, one_line
from igseg.program import install_command

DICOM_SUFFIXES = ('.dcm', '.dicom', '.ima')
NIFTI_SUFFIXES = ('.nii', '.nii.gz')
MOST_DEFLATED = 1 << 20  # bytes of a DICOM file that is compressed as a whole
MOST_SAMPLED = 1 << 22  # values of a volume from which percentiles are computed
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # in JPEG and JPEG-LS


@dataclass(frozen=True)
class Geometry:
    """Where a slice lies in its volume."""

    path: Path | None  # the file of the volume; None: there is only an image
    axis: int
    index: int
    shape: tuple[int, int, int]  # of the volume


def slice_ending(axis: int, index: int) -> str:
    """The ending that makes the name of a slice from the name of its volume."""
    return f'_axis{axis}_{index:04d}'


@dataclass(frozen=True)
class MedicalImage:
    """One frame of a DICOM file, or one slice of a NIfTI volume."""

    values: np.ndarray  # (H, W) or (H, W, 3), in the modality's unit (for example Hounsfield)
    full_range: tuple[float, float] | None  # of the values that the stored bits can hold
    window: tuple[float, float] | None = None  # that the file asks for
    frames: int = 1
    geometry: Geometry | None = None
    notes: tuple[str, ...] = ()


def _library(name: str, path: Path) -> ModuleType:
    """pydicom or nibabel. Raises InputError where it is not installed."""
    import importlib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return importlib.import_module(name)
    except ImportError:
        command = install_command('medical')
        raise InputError(f'{path} needs {name}, which is not installed ({command})') from None


def check_nifti() -> None:
    """Raise InputError where NIfTI files cannot be written."""
    _library('nibabel', Path('--export nifti'))


# --------------------------------------------------------------------------- DICOM


def is_dicom(path: Path) -> bool:
    """Whether the first bytes of a file say that it is a DICOM file. Only a name without an ending,
    or with a number as its ending, is looked at: DICOM files often have such names."""
    if path.suffix and not path.suffix[1:].isdecimal():
        return False
    try:
        with path.open('rb') as stream:
            return stream.read(132)[128:] == b'DICM'
    except (OSError, ValueError):
        return False


def read_dicom(path: Path, frame: int | None, most_pixels: int) -> MedicalImage:
    """One frame of a DICOM file (None: the first).

    The modality lookup (rescale slope and intercept, or a table) is applied. The values of a
    MONOCHROME1 image are inverted, so that high values are bright. A VOI lookup is returned as
    `window` where it is a window, and applied where it is a table. Raises InputError.
    """
    pydicom = _library('pydicom', path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return _dicom_frame(pydicom, path, frame or 0, most_pixels)
    except InputError:
        raise
    except Exception as error:  # pydicom and its decoders raise any kind of error on damaged files
        raise InputError(
            f'{path} cannot be read as a DICOM image: {one_line(error)} (export it again, '
            'uncompressed, or as PNG)'
        ) from None


def _dicom_frame(pydicom: ModuleType, path: Path, frame: int, most_pixels: int) -> MedicalImage:
    from pydicom import pixels

    _check_deflated(pydicom, path)
    data = pydicom.dcmread(path, force=True)
    if 'PixelData' not in data:
        raise InputError(f'{path} is a DICOM file without an image (give one that holds pixels)')
    rows, columns = int(data.Rows), int(data.Columns)
    frames = max(1, int(data.get('NumberOfFrames', 1) or 1))
    if rows * columns > most_pixels or rows * columns < 1:
        raise InputError(f'{path} has {columns}×{rows} pixels (allow more with --max_pixels)')
    if frame >= frames:
        return MedicalImage(np.zeros((1, 1)), None, frames=frames)  # the caller reports the error
    if not hasattr(data, 'file_meta') or 'TransferSyntaxUID' not in data.file_meta:
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    if data.file_meta.TransferSyntaxUID.is_encapsulated:
        _check_codestream(pydicom, data, frame, frames, path)
    values = pixels.pixel_array(data, index=frame)  # decodes only this frame
    kind = str(data.get('PhotometricInterpretation', 'MONOCHROME2'))
    if values.ndim == 3:
        bits = int(data.get('BitsStored', 8))
        return MedicalImage(values, (0.0, 2.0**bits - 1), None, frames)
    if kind == 'PALETTE COLOR':
        colours = pixels.apply_color_lut(values, data)
        top = 65535.0 if colours.dtype.itemsize > 1 else 255.0
        return MedicalImage(colours, (0.0, top), None, frames)
    measured = np.asarray(pixels.apply_modality_lut(values, data), np.float64)
    full, window = _stored_range(data, pixels), _window(data)
    notes: tuple[str, ...] = ()
    if window is None and 'VOILUTSequence' in data:
        measured = np.asarray(
            pixels.apply_voi_lut(pixels.apply_modality_lut(values, data), data, prefer_lut=True),
            np.float64,
        )
        full = (0.0, 2.0 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1)
        notes += (f'{path.name}: values went through the VOI table of the file',)
    if kind == 'MONOCHROME1':  # low values are bright
        low, high = full
        measured = low + high - measured
        window = window and (low + high - window[1], low + high - window[0])
        notes += (f'{path.name} is MONOCHROME1: its values were turned round ({low:g}+{high:g} '
                  'minus the value), so that high ones are bright',)  # fmt: skip
    return MedicalImage(measured.astype(np.float32), full, window, frames, notes=notes)


def _check_deflated(pydicom: ModuleType, path: Path) -> None:
    """Raise InputError for a large file that is compressed as a whole: it could become a thousand
    times as large."""
    if path.stat().st_size <= MOST_DEFLATED:
        return
    meta = pydicom.filereader.read_file_meta_info(path) if is_part10(path) else {}
    if str(meta.get('TransferSyntaxUID', '')) == str(pydicom.uid.DeflatedExplicitVRLittleEndian):
        raise InputError(f'{path} is deflated as a whole (export it uncompressed)')


def is_part10(path: Path) -> bool:
    """Whether a file begins with the preamble of DICOM part 10."""
    with path.open('rb') as stream:
        return stream.read(132)[128:] == b'DICM'


def _check_codestream(pydicom: ModuleType, data, frame: int, frames: int, path: Path) -> None:
    """Raise InputError where the header of a compressed frame names a larger size than the file:
    decoders reserve memory for the size in that header."""
    stream = pydicom.encaps.get_frame(data.PixelData, frame, number_of_frames=frames)
    size = codestream_size(stream)
    if size is not None and size[0] * size[1] > 2 * int(data.Rows) * int(data.Columns):
        raise InputError(
            f'{path} holds a compressed frame of {size[1]}×{size[0]} pixels, but says it is '
            f'{data.Columns}×{data.Rows} (export it again)'
        )


def codestream_size(stream: bytes) -> tuple[int, int] | None:
    """(height, width) in the header of a JPEG, JPEG-LS or JPEG 2000 codestream; None for other
    bytes."""
    start = stream.find(b'\xff\x4f\xff\x51')
    if start >= 0 and len(stream) >= start + 24:  # JPEG 2000: SIZ
        width, height, left, top = struct.unpack('>4I', stream[start + 8 : start + 24])
        return max(0, height - top), max(0, width - left)
    position = 2
    while stream[:2] == b'\xff\xd8' and position + 9 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        length = int.from_bytes(stream[position + 2 : position + 4], 'big')
        if marker in FRAME_MARKERS:
            return struct.unpack('>2H', stream[position + 5 : position + 9])
        position += 1 if marker == 0xFF else 2 + length
    return None


def _stored_range(data, pixels) -> tuple[float, float]:
    """The lowest and the highest value that the stored bits can hold, after the modality lookup."""
    bits = int(data.get('BitsStored', 16))
    signed = int(data.get('PixelRepresentation', 0))
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if 'ModalityLUTSequence' in data:
        top = 2 ** int(data.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
        return 0.0, float(top)
    slope = float(data.get('RescaleSlope', 1) or 1)
    shift = float(data.get('RescaleIntercept', 0) or 0)
    low, high = sorted(end * slope + shift for end in ends)
    return low, high


def _window(data) -> tuple[float, float] | None:
    """The (first) window that a file asks for. The linear function of DICOM PS3.3 C.11.2.1.2 runs
    from centre - 0.5 - (width - 1) / 2 to centre - 0.5 + (width - 1) / 2."""
    try:
        centre, width = _first(data.get('WindowCenter')), _first(data.get('WindowWidth'))
    except (TypeError, ValueError, IndexError):
        return None
    if str(data.get('VOILUTFunction', 'LINEAR')).upper() != 'LINEAR_EXACT':
        centre, width = centre - 0.5, width - 1
    makes_sense = math.isfinite(centre) and math.isfinite(width) and width > 0
    return (centre - width / 2, centre + width / 2) if makes_sense else None


def _first(value) -> float:
    """A number, or the first of several numbers."""
    several = hasattr(value, '__len__') and not isinstance(value, str)
    return float(value[0] if several else value)


# --------------------------------------------------------------------------- NIfTI


def _open_nifti(path: Path):
    """A NIfTI image, of which only the header has been read, and its shape. Raises InputError."""
    nibabel = _library('nibabel', path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            image = nibabel.load(path, mmap=False)
            shape = tuple(int(side) for side in image.shape)
            while len(shape) > 3 and shape[-1] == 1:
                shape = shape[:-1]
            kind = image.get_data_dtype()
    except Exception as error:  # nibabel raises any kind of error on damaged files
        raise InputError(
            f'{path} cannot be read as a NIfTI volume: {one_line(error)} (export it again)'
        ) from None
    if len(shape) not in (2, 3, 4) or min(shape, default=0) < 1 or kind.kind not in 'uif':
        raise InputError(
            f'{path} holds {kind} of shape {image.shape}; a volume has three axes of numbers '
            '(give a volume, or a series of volumes)'
        )
    return image, shape


def shape_of_nifti(path: Path) -> tuple[int, ...]:
    """The lengths of a volume's axes; of a series also the number of volumes. Raises InputError."""
    return _open_nifti(path)[1]


def read_nifti(
    path: Path, part: str | None, most_values: int, frame: int | None = None
) -> MedicalImage:
    """One slice of a NIfTI volume as it is stored: rows are the first of the two remaining axes,
    columns the second. Slope and intercept of the file are applied. Raises InputError.

    part: AXIS:INDEX; without the index, the middle slice. frame: which volume of a series.
    """
    volume = read_volume(path, most_values, frame)
    frames = (*_open_nifti(path)[1], 1, 1)[3]
    axis, index, slice_notes = _which_slice(volume.shape, part, path)
    values = np.array(np.take(volume, index, axis), dtype=np.float32)
    geometry = Geometry(path, axis, index, volume.shape)
    if volume.dtype == np.uint8:
        return MedicalImage(values, (0.0, 255.0), None, frames, geometry, slice_notes)
    notes = (*slice_notes, *_scale_note(path, volume))
    return MedicalImage(values, _percentiles(volume), None, frames, geometry, notes)


def read_volume(path: Path, most_values: int, frame: int | None = None) -> np.ndarray:
    """A whole NIfTI volume, (X, Y, Z), as it is stored. frame: which volume of a series; None: the
    first. Raises InputError."""
    status = path.stat()
    return _volume(path, most_values, frame or 0, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # an image and its mask, whose slices are read in turn
def _volume(path: Path, most_values: int, frame: int, changed: int, size: int) -> np.ndarray:
    image, shape = _open_nifti(path)
    frames = (*shape, 1, 1)[3]
    if frame >= frames:
        raise InputError(f'{path} has {frames} volumes, so there is no {frame} (--frame, from 0)')
    if math.prod(shape) > most_values:
        raise InputError(f'{path} has the shape {shape} (split it, or allow more, --max_pixels)')
    _check_length(path, math.prod(shape) * image.get_data_dtype().itemsize)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            data = image.dataobj[..., frame] if len(shape) > 3 else image.dataobj
            values = _scaled_data(data, image.dataobj).reshape((*shape, 1)[:3])
    except Exception as error:
        raise InputError(
            f'{path} cannot be read as a NIfTI volume: {one_line(error)} (export it again)'
        ) from None
    values = values.astype(np.float32) if values.dtype.itemsize > 4 else np.array(values)
    values.flags.writeable = False
    return values


def _scaled_data(data, proxy) -> np.ndarray:
    """The values of a volume, in the unit of the file: float32 where the file scales them."""
    unscaled = (proxy.slope, proxy.inter) in ((1, 0), (None, None)) or isinstance(data, np.ndarray)
    return np.asanyarray(data) if unscaled else proxy.get_scaled(np.float32)


def _percentiles(volume: np.ndarray) -> tuple[float, float] | None:
    """The 0.5th and 99.5th percentile of a whole volume: a NIfTI file does not say which values are
    black and white, and all slices must be scaled in the same way."""
    if not np.isfinite(volume).all():
        return None
    sample = volume.reshape(-1)[:: max(1, volume.size // MOST_SAMPLED)]
    low, high = (float(end) for end in np.percentile(sample, (0.5, 99.5)))
    if low >= high:
        low, high = float(volume.min()), float(volume.max())
    return (low, high) if low < high else (low, low + 1)


def _scale_note(path: Path, volume: np.ndarray) -> tuple[str, ...]:
    ends = _percentiles(volume)
    if ends is None:
        return ()
    return (
        f'{path.name} does not say what is black and white: by default {ends[0]:.4g} and '
        f'{ends[1]:.4g}, the 0.5th and 99.5th percentile of the volume (--window=LOW:HIGH says '
        'otherwise)',
    )


def _which_slice(
    volume: tuple[int, ...], part: str | None, path: Path
) -> tuple[int, int, tuple[str, ...]]:
    """Axis and index of the slice that `part` names, and a note on it."""
    axis_text, _, index = (part or '2').partition(':')
    axis = int(axis_text)
    number = int(index) if index else volume[axis] // 2
    if number >= volume[axis]:
        raise InputError(
            f'{path} has {volume[axis]} slices along axis {axis}, so there is no slice {number} '
            '(--slice AXIS:INDEX counts from 0)'
        )
    middle = ', the middle one (another with --slice AXIS:INDEX)'
    extra = '' if index or volume[axis] == 1 else middle
    axes = [other for other in range(3) if other != axis]
    return axis, number, (
        f'{path.name}: slice {number} of {volume[axis]} along axis {axis}{extra}; rows are axis '
        f'{axes[0]}, columns axis {axes[1]}, as stored',
    )  # fmt: skip


def _check_length(path: Path, expected: int) -> None:
    """Raise InputError where a file holds less than its header says; no memory is reserved yet."""
    try:
        length = 0 if path.name.lower().endswith('.gz') else path.stat().st_size
        if path.name.lower().endswith('.gz'):
            with gzip.open(path) as stream:
                while length < expected and (block := stream.read(1 << 20)):
                    length += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f'{path} is damaged: {one_line(error)} (copy it again)') from None
    if length < expected:
        raise InputError(f'{path} is cut short (copy or export it again)')


def save_volume(geometry: Geometry, slices: dict[int, np.ndarray], path: Path) -> None:
    """Write maps (H, W) float32 as a volume with a given geometry. slices: the maps by the index of
    their slice; the other slices of the volume hold NaN. Raises OSError, InputError."""
    nibabel = _library('nibabel', path)
    volume = np.full(geometry.shape, np.nan, np.float32)
    for index, values in slices.items():
        place: list[slice | int] = [slice(None)] * 3
        place[geometry.axis] = index
        volume[tuple(place)] = values
    if geometry.path is None:  # an image: rows and columns at a distance of 1
        _write(nibabel.Nifti1Image(volume, np.eye(4)), path)
        return
    source, shape = _open_nifti(geometry.path)
    header = source.header.copy()
    header.set_data_dtype(np.float32)
    with contextlib.suppress(AttributeError):
        header.set_slope_inter(1, 0)
    kind = nibabel.Nifti2Image if isinstance(source, nibabel.Nifti2Image) else nibabel.Nifti1Image
    _write(kind(volume.reshape(shape[:3]), source.affine, header), path)


def _write(image, path: Path) -> None:
    path.write_bytes(gzip.compress(image.to_bytes()))
