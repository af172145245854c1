"""Attribution maps in the geometry of the image they belong to, to open beside it in a viewer.

They are made from the files that an explanation left, so also for images that were finished before.
A map is (H, W) float32 at the image's own resolution: the attributions summed over the channels,
as a density per pixel of the image, so that their sum is kept. What was not explained, the rest of
a cropped image and the other slices of a volume, holds NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from igseg.data.medical import Geometry, save_volume, shape_of_nifti
from igseg.errors import InputError
from igseg.results.files import load_view, read_statistics, write_files

EXPORTS = {'nifti': '.nii.gz', 'tiff': '.tif', 'npy': '.npy'}  # and their files' endings


def overlap(small: int, large: int) -> np.ndarray:
    """(large, small): the share of each of `small` equal cells that falls into each of `large` ones
    over the same length; the columns sum to one."""
    cuts = np.arange(large + 1) / large
    cells = np.arange(small + 1) / small
    shared = np.minimum(cuts[1:, None], cells[None, 1:]) - np.maximum(
        cuts[:-1, None], cells[None, :-1]
    )
    return np.clip(shared, 0, None) * small


def at_size(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at a size (H, W), each value spread over the pixels it covers: the sum stays."""
    if values.shape == tuple(size):
        return values
    rows, columns = (overlap(own, new) for own, new in zip(values.shape, size, strict=True))
    return rows @ values.astype(np.float64) @ columns.T


def exported_map(folder: Path) -> tuple[np.ndarray, dict]:
    """The map (H, W) float32 of an image's folder, in the pixels of the whole image, and its
    statistics. Raises InputError where its files are damaged."""
    view, statistics = load_view(folder)
    values = at_size(view.attributions.sum(axis=0), view.original_size)
    (x, y), (height, width) = statistics['placement']['origin'], values.shape
    found = np.full(statistics['placement']['size'], np.nan, np.float32)
    found[y : y + height, x : x + width] = values
    return found, statistics


def export_maps(output_dir: Path, folders: Sequence[str], kind: str) -> list[Path]:
    """Write the maps of these images' folders: beside their other files, those of the slices of a
    volume together, in the output folder. kind: of EXPORTS. Returns the files. Raises InputError,
    OutputError."""
    written, volumes = [], {}
    for folder in folders:
        statistics = read_statistics(output_dir / folder)
        if 'axis' in statistics['placement'] and kind == 'nifti':
            key = statistics['image_path'], statistics['target']
            volumes.setdefault(key, []).append(folder)
            continue
        path = output_dir / folder / f'{folder}_map{EXPORTS[kind]}'
        _write(path, exported_map(output_dir / folder)[0], kind)
        written.append(path)
    several = len({target for _, target in volumes}) > 1
    for (source, target), own in volumes.items():
        written.append(_write_volume(output_dir, Path(source), own, target if several else ''))
    return written


def _write(path: Path, values: np.ndarray, kind: str) -> None:
    if kind == 'nifti':
        geometry = Geometry(None, 2, 0, (*values.shape, 1))
        write_files({path: lambda place: save_volume(geometry, {0: values}, place)})
    elif kind == 'tiff':
        write_files({path: lambda place: tifffile.imwrite(place, values)})
    else:
        write_files({path: lambda place: _save_array(place, values)})


def _save_array(path: Path, values: np.ndarray) -> None:
    with path.open('wb') as stream:  # a path would get .npy added to its name
        np.save(stream, values)


def _write_volume(output_dir: Path, source: Path, folders: Sequence[str], target: str) -> Path:
    """The maps of a volume's slices, with its affine."""
    slices, geometry = {}, None
    shape = (*shape_of_nifti(source), 1)[:3]
    for folder in folders:
        values, statistics = exported_map(output_dir / folder)
        axis, index = (statistics['placement'][key] for key in ('axis', 'index'))
        geometry = Geometry(source, axis, index, shape)
        expected = tuple(side for k, side in enumerate(shape) if k != axis)
        if values.shape != expected:
            raise InputError(
                f'{source} has changed since its slices were explained (explain them again)'
            )
        slices[index] = values
    name = source.name.removesuffix('.gz').removesuffix('.nii')
    ending = target.replace(':', '-').replace(',', '-')
    path = output_dir / f'{name}_map{"_" + ending if ending else ""}.nii.gz'
    write_files({path: lambda place: save_volume(geometry, slices, place)})
    return path
