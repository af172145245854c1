"""Attribution maps in the geometry of their image, so that a viewer can show both together. There
is a file for each image; the slices of a volume share a file for each target and method.

The maps are made from the files of an explanation, so also for images that were finished earlier.
A map is (H, W) float32 at the resolution of the image: the attributions summed over the channels,
as a density per pixel of the image, so that their sum does not change. Pixels that were not
explained (the rest of a cropped image, the other slices of a volume) hold NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from igseg.data.medical import Geometry, check_nifti, save_volume, shape_of_nifti, slice_ending
from igseg.errors import InputError, check_choice
from igseg.results.files import FIGURES, in_file_names, load_view, read_statistics, write_files
from igseg.statistics import Statistics

EXPORTS = {'nifti': '.nii.gz', 'tiff': '.tif', 'npy': '.npy'}  # format -> ending of its files


def overlap(small: int, large: int) -> np.ndarray:
    """Shares (large, small): a length is divided into `small` equal cells and also into `large`
    equal cells; how much of each of the `small` cells lies in each of the `large` cells. The
    columns sum to one."""
    cuts = np.arange(large + 1) / large
    cells = np.arange(small + 1) / small
    shared = np.minimum(cuts[1:, None], cells[None, 1:]) - np.maximum(
        cuts[:-1, None], cells[None, :-1]
    )
    return np.clip(shared, 0, None) * small


def at_size(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at a size (H, W). Each value is spread over the pixels that it covers, so that
    the sum does not change."""
    if values.shape == tuple(size):
        return values
    rows, columns = (overlap(old, new) for old, new in zip(values.shape, size, strict=True))
    return rows @ values.astype(np.float64) @ columns.T


def exported_map(folder: Path) -> tuple[np.ndarray, Statistics]:
    """The map (H, W) float32 in an image's folder, in the pixels of the whole image, and its
    statistics. Raises InputError where the files are damaged."""
    view, statistics = load_view(folder)
    values = at_size(view.attributions.sum(axis=0), view.original_size)
    (x, y), (height, width) = statistics['placement']['origin'], values.shape
    whole_map = np.full(statistics['placement']['size'], np.nan, np.float32)
    whole_map[y : y + height, x : x + width] = values
    return whole_map, statistics


# --------------------------------------------------------------------------- volumes


class Volume(NamedTuple):
    """A volume of maps: the maps of a volume's slices, for one target and one method."""

    source: str  # the file of the explained volume
    name: str  # for the names of files: safe, and unique in a dataset
    target: str
    method: str


def volume_of(statistics: Statistics) -> Volume:
    """The volume that the map of a slice belongs to. statistics: of the slice."""
    place = statistics['placement']
    # In a batch every slice is a sample, with a name from `with_slices`.
    name = statistics['image'].removesuffix(slice_ending(place['axis'], place['index']))
    return Volume(statistics['image_path'], name, statistics['target'], statistics['method'])


def volume_names(volumes: Sequence[Volume]) -> dict[Volume, str]:
    """The name of each volume's file. It holds the target, or the method, where there are several
    of them."""
    several_targets = len({volume.target for volume in volumes}) > 1
    several_methods = len({volume.method for volume in volumes}) > 1
    names = {}
    for volume in volumes:
        parts = [f'{volume.name}_map']
        parts += [in_file_names(volume.target)] if several_targets else []
        parts += [in_file_names(volume.method)] if several_methods else []
        names[volume] = '_'.join(parts) + EXPORTS['nifti']
    return names


def _save_array(path: Path, values: np.ndarray) -> None:
    with path.open('wb') as stream:  # a path would get .npy added to its name
        np.save(stream, values)


def _write(path: Path, values: np.ndarray, kind: str) -> None:
    if kind == 'nifti':
        geometry = Geometry(None, 2, 0, (*values.shape, 1))
        write_files({path: lambda place: save_volume(geometry, {0: values}, place)})
    elif kind == 'tiff':
        import tifffile  # slow to import

        write_files({path: lambda place: tifffile.imwrite(place, values)})
    else:
        write_files({path: lambda place: _save_array(place, values)})


def _write_volume(path: Path, source: Path, output_dir: Path, folders: Sequence[str]) -> Path:
    """Write the maps of a volume's slices as a volume with the affine of the source. folders: of
    the slices. Returns the file. Raises InputError, OutputError."""
    rows, columns, depth = (*shape_of_nifti(source), 1)[:3]
    shape = rows, columns, depth
    slices: dict[int, np.ndarray] = {}
    for folder in folders:
        values, statistics = exported_map(output_dir / folder)
        axis, index = (statistics['placement'][key] for key in ('axis', 'index'))
        expected = tuple(side for k, side in enumerate(shape) if k != axis)
        if values.shape != expected:
            raise InputError(
                f'{source} has changed since its slices were explained (explain them again)'
            )
        slices[index] = values
    geometry = Geometry(source, axis, index, shape)
    write_files({path: lambda place: save_volume(geometry, slices, place)})
    return path


def export_maps(output_dir: Path, folders: Sequence[str], kind: str) -> list[Path]:
    """Write the maps of images to files, and return these files. folders: of the images. Each map
    is written into the folder of its image; the maps of a volume's slices become one file in the
    output folder. kind: of EXPORTS. Raises InputError, OutputError."""
    written: list[Path] = []
    volumes: dict[Volume, list[str]] = {}
    for folder in folders:
        statistics = read_statistics(output_dir / folder)
        if 'axis' in statistics['placement'] and kind == 'nifti':
            volumes.setdefault(volume_of(statistics), []).append(folder)
            continue
        path = output_dir / folder / f'{folder}_map{EXPORTS[kind]}'
        _write(path, exported_map(output_dir / folder)[0], kind)
        written.append(path)
    names = volume_names(list(volumes))
    for volume, slice_folders in volumes.items():
        written.append(_write_volume(output_dir / names[volume], Path(volume.source), output_dir,
                                     slice_folders))  # fmt: skip
    return written


# --------------------------------------------------------------------------- what is written where


@dataclass(frozen=True)
class Output:
    """Where results go, and what is written."""

    folder: Path
    figures: str = 'all'  # of each image, a key of FIGURES
    overwrite: bool = False  # compute finished images again
    export: str | None = None  # a key of EXPORTS: maps in the geometry of their images

    def __post_init__(self) -> None:
        check_choice('figures', self.figures, FIGURES)
        if self.export is not None:
            check_choice('export', self.export, EXPORTS)
        if self.export == 'nifti':
            check_nifti()  # before hours are spent
        object.__setattr__(self, 'folder', Path(self.folder))

    def exported(self, folders: Sequence[str]) -> list[Path]:
        """The files of the maps of these folders, written now, where that is wanted. Raises
        OutputError, InputError."""
        return [] if self.export is None else export_maps(self.folder, folders, self.export)
