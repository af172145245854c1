"""One sample of a dataset: read, recognised where it is finished, explained, written."""

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

NEED_TRUTH = ('truth', 'false-positive', 'false-negative')  # of the targets
LARGE_IN_TILES = 10_000_000  # pixels, from which on their memory is told
TILED_BYTES_A_PIXEL = 180  # of a picture in tiles, its maps and their figures: 165, measured


# --------------------------------------------------------------------------- reading


def read_sample(study: Study, sample: Sample) -> ReadImage:
    """The image and the truth of a sample. Raises InputError where it cannot be read."""
    known, crop, name = study.truth_reading, study.reading.crop, str(sample.image_path)
    loaded = sample.load(study.channels, study.reading)
    size = (loaded.pixels.shape[0], loaded.pixels.shape[1])
    truth, said = _truth_of(study, sample, loaded)
    if truth is not None and crop is not None:
        truth = crop_image(over_image(truth, size), crop, name)
    return ReadImage(
        image=crop_image(loaded.pixels, crop, name),
        truth=truth,
        origin=(crop[0], crop[1]) if crop else (0, 0),
        class_names={} if truth is None else sample.names_of_classes(known),
        notes=(*sample.notes, *loaded.notes, *said, *_memory_note(size, study.tile is not None)),
        value_range=loaded.value_range,
        geometry=loaded.geometry,
        whole_size=size,
    )


def _truth_of(
    study: Study, sample: Sample, image: LoadedImage
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The truth of a sample as it lies over its image, and what is to be said of it. Raises
    InputError where it is needed and cannot be used."""
    labels = sample.labels(study.truth_reading)
    truth, notes = labels.values, labels.notes
    if truth is not None:
        truth, said = fitted_truth(image, truth)
        notes += said
    needed = [target for target in study.question.targets if target in NEED_TRUTH]
    if truth is None and sample.read_truth is not None and needed and notes:
        raise InputError(f'target "{needed[0]}" of {sample.image_path}: {notes[-1]}')
    return truth, notes


def _memory_note(size: tuple[int, int], tiled: bool) -> tuple[str, ...]:
    """What a very large image needs, in words."""
    pixels = size[0] * size[1]
    if pixels <= (LARGE_IN_TILES if tiled else MOST_PIXELS):
        return ()
    memory = pixels * (TILED_BYTES_A_PIXEL if tiled else BYTES_A_PIXEL) / 2**30
    return (f'an image of {pixels:,} pixels, which takes about {memory:.1f} GiB',)


# --------------------------------------------------------------------------- explaining


@dataclass(frozen=True)
class Pending:
    """A sample as it was read, and what an earlier run has left of it."""

    sample: Sample
    read: ReadImage
    key: str  # see `resume_key`
    finished: list[dict[str, Any]] | None  # of its targets and methods, where there are all

    @classmethod
    def of(cls, study: Study, sample: Sample, output: Output) -> Pending:
        """Raises InputError where the sample cannot be read."""
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
    """The statistics of a sample's targets, explained if need be, and what writes its files: None
    where they are there already."""
    if pending.finished is not None:
        judged = [judged_again(one, study.thresholds, output.folder) for one in pending.finished]
        if missing_figures(output.folder, judged, output.figures):
            return judged, partial(redraw_missing, output.folder, judged, output.figures)
        return judged, None
    name, read = pending.sample.name, pending.read
    given = fit(study, read)
    described = describe(study, name, read, given, explain(study, given, progress), progress)
    naming = study.naming(name)
    for statistics, _ in described:
        statistics |= {
            'image_path': str(pending.sample.image_path),
            'mask_flags': pending.sample.mask_flags or None,
            'folder': naming.folder(statistics['target'], statistics['method']),
            'resume_key': pending.key,
        }
    by_target = [statistics for statistics, _ in described]
    return by_target, partial(write_image, output.folder, described, output.figures)


def finish_sample(
    study: Study, sample: Sample, output: Output, progress: bool = False
) -> list[dict[str, Any]]:
    """Read and explain one sample and write its files; the contents of its statistics files."""
    by_target, write = statistics_of(study, Pending.of(study, sample, output), output, progress)
    if write is not None:
        write()
    return by_target
