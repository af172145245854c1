"""One sample of a dataset is read, explained unless it is finished, and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from igseg.analysis.describe import ReadImage, describe, explain, fit
from igseg.data.pixels import BYTES_A_PIXEL, MOST_PIXELS, LoadedImage, crop_image
from igseg.data.samples import Sample, fitted_truth, over_image
from igseg.errors import InputError
from igseg.results.export import Output
from igseg.results.files import missing_figures, redraw_missing, write_image
from igseg.results.finished import finished_statistics, judged_again, resume_key

if TYPE_CHECKING:
    from igseg.analysis.study import Study

NEED_TRUTH = ('truth', 'false-positive', 'false-negative')  # targets that need the ground truth
LARGE_IN_TILES = 10_000_000  # pixels; of a larger picture in tiles, a note tells the memory
TILED_BYTES_A_PIXEL = 180  # a picture in tiles with its maps and figures; measured: 165


# --------------------------------------------------------------------------- reading


def read_sample(study: Study, sample: Sample) -> ReadImage:
    """The image and the truth of a sample. Raises InputError if it cannot be read."""
    crop, name = study.reading.crop, str(sample.image_path)
    loaded = sample.load(study.channels, study.reading)
    size = (loaded.pixels.shape[0], loaded.pixels.shape[1])
    truth, truth_notes = _truth_of(study, sample, loaded)
    if truth is not None and crop is not None:
        truth = crop_image(over_image(truth, size), crop, name)
    return ReadImage(
        image=crop_image(loaded.pixels, crop, name),
        truth=truth,
        origin=(crop[0], crop[1]) if crop else (0, 0),
        class_names={} if truth is None else sample.names_of_classes(study.truth_reading),
        notes=(
            *sample.notes,
            *loaded.notes,
            *truth_notes,
            *_memory_note(size, study.tile is not None),
        ),
        value_range=loaded.value_range,
        geometry=loaded.geometry,
        whole_size=size,
    )


def _truth_of(
    study: Study, sample: Sample, image: LoadedImage
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The truth of a sample as it lies over its image, and notes about it. Raises InputError if
    a target needs the truth and it cannot be used."""
    labels = sample.labels(study.truth_reading)
    truth, notes = labels.values, labels.notes
    if truth is not None:
        truth, fitting_notes = fitted_truth(image, truth)
        notes += fitting_notes
    needed = [target for target in study.question.targets if target in NEED_TRUTH]
    if truth is None and sample.read_truth is not None and needed and notes:
        raise InputError(f'target "{needed[0]}" of {sample.image_path}: {notes[-1]}')
    return truth, notes


def _memory_note(size: tuple[int, int], tiled: bool) -> tuple[str, ...]:
    """A note on the memory that a very large image needs; empty for smaller images."""
    pixels = size[0] * size[1]
    if pixels <= (LARGE_IN_TILES if tiled else MOST_PIXELS):
        return ()
    memory = pixels * (TILED_BYTES_A_PIXEL if tiled else BYTES_A_PIXEL) / 2**30
    return (f'an image of {pixels:,} pixels, which takes about {memory:.1f} GiB',)


# --------------------------------------------------------------------------- explaining


@dataclass(frozen=True)
class Pending:
    """A sample as it was read, and its statistics if an earlier run has finished it."""

    sample: Sample
    read: ReadImage
    key: str  # see `resume_key`
    finished: list[dict[str, Any]] | None  # for each target and method; None: not all are there

    @classmethod
    def of(cls, study: Study, sample: Sample, output: Output) -> Pending:
        """Read a sample. Raises InputError if it cannot be read."""
        read = read_sample(study, sample)
        key = resume_key(study.record, read.image, read.truth)
        finished = None
        if not output.overwrite:
            finished = finished_statistics(
                output.folder, study.naming(sample.name), study.question.possible_first_targets, key
            )
        return cls(sample, read, key, finished)


def statistics_of(
    study: Study, pending: Pending, output: Output, progress: bool = False
) -> tuple[list[dict[str, Any]], Callable[[], object] | None]:
    """The statistics of a sample for each target and method, and a function that writes its files:
    None if all of them exist. The sample is explained unless it is finished."""
    if pending.finished is not None:
        judged = [
            judged_again(statistics, study.thresholds, output.folder)
            for statistics in pending.finished
        ]
        if missing_figures(output.folder, judged, output.figures):
            return judged, partial(redraw_missing, output.folder, judged, output.figures)
        return judged, None
    name, read = pending.sample.name, pending.read
    network_input = fit(study, read)
    explained = explain(study, network_input, progress)
    descriptions = describe(study, name, read, network_input, explained, progress)
    naming = study.naming(name)
    for statistics, _ in descriptions:
        statistics |= {
            'image_path': str(pending.sample.image_path),
            'mask_flags': pending.sample.mask_flags or None,
            'folder': naming.folder(statistics['target'], statistics['method']),
            'resume_key': pending.key,
        }
    by_target = [statistics for statistics, _ in descriptions]
    return by_target, partial(write_image, output.folder, descriptions, output.figures)


def finish_sample(
    study: Study, sample: Sample, output: Output, progress: bool = False
) -> list[dict[str, Any]]:
    """Explain one sample and write its files. Returns the contents of its statistics files."""
    by_target, write = statistics_of(study, Pending.of(study, sample, output), output, progress)
    if write is not None:
        write()
    return by_target
