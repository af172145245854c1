"""The files of one image: written completely or not at all, read back, drawn again.

This module works without torch, so that the processes which only draw and write start quickly and
need little memory. matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from igseg.errors import InputError, OutputError, one_line
from igseg.explanation import Explanation
from igseg.preprocessing import Placement, as_picture
from igseg.results.view import View
from igseg.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE_ENDINGS = {  # of the files in an image's folder; the last marks the image as finished
    'attribution': 'attribution.png', 'channels': 'channels.png', 'image': 'image.png',
    'overlay': 'overlay.png', 'uncertainty': 'uncertainty.png', 'thumbnail': 'thumbnail.png',
    'regions': 'regions.png', 'arrays': 'attributions.npz', 'statistics': 'statistics.json',
}  # fmt: skip
FIGURES = {  # the pictures that --figures draws of each image, with regions where they were
    # computed; `all` also draws the pictures of the page
    'none': (),
    'png': ('attribution', 'channels', 'regions'),
    'all': ('attribution', 'channels', 'regions', 'image', 'overlay', 'uncertainty', 'thumbnail'),
}

DISPLAY_SIDE = 1024  # pixels: the longer side of the image that is stored for figures

Description = tuple[Statistics, dict[str, np.ndarray]]  # statistics, and the arrays for figures


@contextlib.contextmanager
def _explained_writing(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f'cannot write {path}: {error.strerror or error} '
            '(free some space, or choose another --output_dir)'
        ) from None


def make_output_folder(folder: str | Path) -> Path:
    """Make the output folder and check that files can be written there, before a long computation
    starts. Raises OutputError."""
    folder = Path(folder)
    with _explained_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))  # empty files can be made even on a full disk
    return folder


def write_files(writers: dict[Path, Callable[[Path], object]]) -> None:
    """Write files so that each is complete or missing, and the last file exists only together with
    all the others. writers: by file, the function that writes it.

    All files are first written to the disk under temporary names. Only when all are complete are
    they renamed. The last file marks the set as finished, so its old version is deleted before the
    renaming. Raises OutputError; the old files then still exist.
    """
    if not writers:
        return
    temporary = {path: path.with_name(f'.tmp{os.getpid()}_{path.name}') for path in writers}
    try:
        for path, write in writers.items():
            with _explained_writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                for remnant in path.parent.glob('.tmp*_' + glob.escape(path.name)):
                    remnant.unlink(missing_ok=True)  # from a process that was killed
                write(temporary[path])
                _bring_to_disk(temporary[path])
        with _explained_writing(path):
            path.unlink(missing_ok=True)
            for path, complete in temporary.items():
                os.replace(complete, path)
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _bring_to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk. Otherwise a power failure could leave a file
    with the new name but without content."""
    with path.open('rb+') as stream:
        os.fsync(stream.fileno())


def json_writer(content: object) -> Callable[[Path], object]:
    """The function that writes a content as JSON. Raises ValueError for NaN."""
    text = json.dumps(content, indent=2, allow_nan=False) + '\n'
    return lambda path: path.write_text(text, encoding='utf-8')


def figure_writer(figure: Figure) -> Callable[[Path], object]:
    """The function that writes a matplotlib figure as PNG."""
    # Packed more tightly, the file is a tenth smaller and takes a third longer.
    return lambda path: figure.savefig(path, format='png', pil_kwargs={'compress_level': 3})


def _picture_writer(array: np.ndarray) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(array).save(path, format='png')


def _arrays_writer(arrays: dict[str, np.ndarray]) -> Callable[[Path], object]:
    save: Callable[..., None] = np.savez_compressed  # the keywords are names of arrays

    def write(path: Path) -> None:
        with path.open('wb') as stream:  # a path would get .npz added to its name
            save(stream, **arrays)

    return write


def in_file_names(text: str) -> str:
    """A target or a method as text for the names of files."""
    return text.replace(':', '-').replace(',', '-')


def methods_figure_name(statistics: Statistics) -> str | None:
    """The name of the figure in the output folder that shows an explanation beside those of the
    other methods; None where there is a single method. statistics: of the explanation."""
    if len(statistics.get('methods') or ()) < 2:
        return None
    return statistics['folder'].removesuffix(f'_{in_file_names(statistics["method"])}') + (
        '_methods.png'
    )


def methods_figures(
    output_dir: Path, described: Sequence[Statistics]
) -> dict[Path, list[Statistics]]:
    """The figures that show methods side by side, one figure for each target, with the statistics
    of the explanations in it. Empty where there is a single method."""
    figures: dict[Path, list[Statistics]] = {}
    for statistics in described:
        if name := methods_figure_name(statistics):
            figures.setdefault(output_dir / name, []).append(statistics)
    return figures


def image_files(folder: Path) -> dict[str, Path]:
    """The files in one image's folder by their content (FILE_ENDINGS)."""
    return {name: folder / f'{folder.name}_{end}' for name, end in FILE_ENDINGS.items()}


def _no_number(name: str) -> None:
    raise ValueError(f'{name} is no number that JSON knows')


def read_statistics(folder: Path) -> Statistics:
    """The statistics in an image's folder. Raises OSError or ValueError where they cannot be
    read."""
    text = image_files(folder)['statistics'].read_text(encoding='utf-8')
    return json.loads(text, parse_constant=_no_number)


def unpacked(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The uncertainties (H, W) float32 in arrays that `packed` made."""
    return arrays['uncertainty'].astype(np.float32) * arrays['uncertainty_scale']


def view_of(arrays: dict[str, np.ndarray]) -> View:
    """The view that figures show of an image's arrays, without letterbox padding."""
    size = (int(arrays['original_size'][0]), int(arrays['original_size'][1]))
    top, left, height, width = (int(side) for side in arrays['content'])
    crop = Placement(size, top, left, height, width).crop
    shapes = {arrays[key].shape[-2:] for key in ('attributions', 'predicted_mask', 'region')}
    shapes |= {arrays[key].shape for key in ('uncertainty', 'truth', 'regions') if key in arrays}
    if len(shapes) > 1:
        raise ValueError(f'its maps have different shapes: {sorted(shapes)}')
    return View(
        image=arrays['image'],
        original_size=size,
        attributions=np.moveaxis(crop(np.moveaxis(arrays['attributions'], 0, 2)), 2, 0),
        predicted_mask=crop(arrays['predicted_mask']),
        region=crop(arrays['region']),
        truth=crop(arrays['truth']) if 'truth' in arrays else None,
        baseline=crop(arrays['baseline']),
        uncertainty=crop(unpacked(arrays)) if 'uncertainty' in arrays else None,
        regions=crop(arrays['regions']) if 'regions' in arrays else None,
    )


def _picture_writers(
    files: dict[str, Path], view: View, statistics: Statistics, figures: str
) -> dict[Path, Callable[[Path], object]]:
    """For each picture of one image that `figures` names: its file, and the function that writes
    it."""
    wanted = FIGURES[figures]
    if not wanted:
        return {}
    from igseg.results.figures import (  # with matplotlib, which is slow to import
        attribution_figure,
        channels_figure,
        page_pictures,
        regions_figure,
    )

    drawn = {'attribution': attribution_figure, 'channels': channels_figure}
    if view.regions is not None:
        drawn['regions'] = regions_figure
    writers = {
        files[name]: figure_writer(draw(view, statistics))
        for name, draw in drawn.items()
        if name in wanted
    }
    if 'image' in wanted:
        writers |= {files[name]: _picture_writer(a) for name, a in page_pictures(view).items()}
    return writers


def load_view(folder: str | Path) -> tuple[View, Statistics]:
    """The view that the figures of an image folder show, and the statistics, read from the files in
    the folder. Raises InputError where files are missing or damaged."""
    folder = Path(folder)
    try:
        with np.load(image_files(folder)['arrays'], allow_pickle=False) as arrays:
            return view_of(dict(arrays)), read_statistics(folder)
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile,
            zlib.error) as error:  # fmt: skip
        reason = one_line(error)
        raise InputError(
            f'the files in {folder} are damaged: {reason} (make them again with --overwrite)'
        ) from None


def _write_methods_figures(figures: dict[Path, list[Statistics]], views: dict[str, View]) -> None:
    """Write figures of `methods_figures`. views: by folder."""
    if not figures:
        return
    from igseg.results.figures import methods_figure  # with matplotlib, which is slow to import

    write_files(
        {
            path: figure_writer(methods_figure([views[s['folder']] for s in several], several))
            for path, several in figures.items()
        }
    )


def write_image(output_dir: Path, described: Sequence[Description], figures: str = 'all') -> None:
    """Write the files of one image's explanations, each into the `folder` that its statistics name.

    figures: a key of FIGURES. The statistics of the first explanation name the other targets and
    are written last: they mark the image as finished. Where there are several methods, a figure for
    each target shows them side by side, in the output folder. Raises OutputError.
    """
    if FIGURES[figures]:
        views = {statistics['folder']: view_of(arrays) for statistics, arrays in described}
        side_by_side = methods_figures(output_dir, [statistics for statistics, _ in described])
        _write_methods_figures(side_by_side, views)
    for statistics, arrays in reversed(described):
        files = image_files(output_dir / statistics['folder'])
        write_files(
            {
                **_picture_writers(files, view_of(arrays), statistics, figures),
                files['arrays']: _arrays_writer(arrays),
                files['statistics']: json_writer(statistics),
            }
        )


def redraw_figures(folder: str | Path, figures: str = 'all') -> None:
    """Draw the pictures of an image folder again from its files, without the model. Raises
    InputError, OutputError."""
    if figures not in FIGURES:
        raise InputError(f'unknown figures "{figures}" (choose from {", ".join(FIGURES)})')
    view, statistics = load_view(folder)
    write_files(_picture_writers(image_files(Path(folder)), view, statistics, figures))


def _lacks_figures(output_dir: Path, statistics: Statistics, figures: str) -> bool:
    files = image_files(output_dir / statistics['folder'])
    wanted = set(FIGURES[figures])
    if statistics.get('regions_50') is None:
        wanted.discard('regions')
    return not all(files[name].is_file() for name in wanted)


def redraw_missing(output_dir: Path, described: Sequence[Statistics], figures: str) -> None:
    """Draw the missing pictures of finished explanations. described: the statistics of these."""
    for statistics in described:
        if _lacks_figures(output_dir, statistics, figures):
            redraw_figures(output_dir / statistics['folder'], figures)
    side_by_side = methods_figures(output_dir, described)
    missing = {path: several for path, several in side_by_side.items() if not path.is_file()}
    folders = [statistics['folder'] for several in missing.values() for statistics in several]
    views = {folder: load_view(output_dir / folder)[0] for folder in folders}
    if FIGURES[figures]:
        _write_methods_figures(missing, views)


def missing_figures(output_dir: Path, described: Sequence[Statistics], figures: str) -> bool:
    """Whether a picture that `figures` names is missing for finished explanations of an image.
    described: the statistics of these."""
    side_by_side = methods_figures(output_dir, described) if FIGURES[figures] else {}
    return not all(path.is_file() for path in side_by_side) or any(
        _lacks_figures(output_dir, statistics, figures) for statistics in described
    )


def packed(uncertainty: np.ndarray) -> dict[str, np.ndarray]:
    """Uncertainties (H, W), from 0 up, as two arrays of the .npz file: divided by their maximum and
    stored in half precision (which would underflow without the division), and that maximum."""
    scale = np.float32(uncertainty.max(initial=0))
    halves = (uncertainty / (scale or 1)).astype(np.float16)
    return {'uncertainty': halves, 'uncertainty_scale': np.asarray(scale)}


def display_arrays(
    explanation: Explanation, image: np.ndarray, truth: np.ndarray | None, placement: Placement
) -> dict[str, np.ndarray]:
    """The arrays of the .npz file. Maps are at model resolution, padding included.

    image: (H0, W0, C); it is stored with a longer side of at most DISPLAY_SIDE. truth: (h, w) bool
    or None.
    """
    image = as_picture(image[:, :, None] if image.ndim == 2 else image)
    scale = min(1.0, DISPLAY_SIDE / max(image.shape[:2]))
    size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
    arrays = {
        'attributions': explanation.attributions.cpu().float().numpy(),
        'prediction': explanation.prediction.numpy(),
        'predicted_mask': explanation.predicted_mask.numpy(),
        'region': explanation.region.numpy(),
        'baseline': as_picture(explanation.baseline_pixels),
        'image': cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image,
        'original_size': np.array(placement.original_size),
        'content': np.array([placement.top, placement.left, placement.height, placement.width]),
    }
    if explanation.uncertainty is not None:
        arrays |= packed(explanation.uncertainty.numpy())
    return arrays if truth is None else arrays | {'truth': truth}
