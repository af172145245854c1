"""The images of a batch: a process explains its share of them and reports what came of each.

An image that cannot be used does not stop the batch. Nor does an unexpected error: its traceback is
then in failures.csv.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from igseg.analysis.describe import ReadImage, fit
from igseg.analysis.job import (
    FAILED,
    SKIPPED,
    Outcome,
    Share,
    Writers,
    read_ahead,
    writer_processes,
)
from igseg.analysis.sample import Pending, statistics_of
from igseg.analysis.study import Study
from igseg.analysis.summary import BatchResult, Progress, row_of, say_warnings
from igseg.data.pixels import crop_image
from igseg.data.samples import Sample
from igseg.errors import EmptyTargetError, InputError, unexpected
from igseg.results.export import Output
from igseg.results.files import make_output_folder
from igseg.settings import Settings


class Batch:
    """The images of a batch, and how they are explained."""

    def __init__(self, study: Study, samples: Sequence[Sample], output: Output) -> None:
        self.study, self.samples, self.output = study, samples, output
        _ = study.truth_reading  # runs the network, which the reading thread must not
        self._prepared = False

    def run(self, before_image: Callable[[], object], share: Share) -> BatchResult:
        """Explain this process's share. On rank 0, also write the summary of the whole batch."""
        names = [sample.name for sample in self.samples]
        progress = Progress(share, self.output.folder, names)
        on_gpu = self.study.explainer.device.type != 'cpu'
        writers = Writers(writer_processes(len(names), on_gpu))
        try:
            with writers:  # the end of the block waits until all files are written
                for number, pending in read_ahead(share, len(names), self._read):
                    before_image()
                    self._explain(number, pending, writers)
                    progress.add(writers.finished())
            progress.add(writers.finished())
            progress.wait_for_others()
        finally:  # also an interrupted batch gets a summary of its finished images
            progress.add(writers.finished())
            result = progress.finish(self.study.settings, Settings().record())
        return result

    def _read(self, number: int) -> Pending:
        """Read one image; called from another thread."""
        return Pending.of(self.study, self.samples[number], self.output)

    def _explain(self, number: int, pending: Callable[[], Pending], writers: Writers) -> None:
        """Explain one image, unless it is finished, and have its files written."""
        outcome = Outcome(number, self.samples[number].name)
        try:
            if writers.in_trouble:  # the last image could not be written: check the folder
                make_output_folder(self.output.folder)
            by_target, write = self._statistics_of(pending())
        except EmptyTargetError as error:
            writers.settle(replace(outcome, status=SKIPPED, reason=str(error)))
        except InputError as error:
            writers.settle(replace(outcome, status=FAILED, reason=str(error)))
        except Exception as error:  # a bug costs this image, not the batch
            writers.settle(replace(outcome, status=FAILED, reason=unexpected(error)))
        else:
            for statistics in by_target:
                say_warnings(statistics, self.samples[number].notes)
            outcome = replace(outcome, rows=tuple(map(row_of, by_target)))
            if write is None:
                writers.settle(outcome)
            else:
                writers.add(outcome, write)

    def _statistics_of(
        self, pending: Pending
    ) -> tuple[list[dict[str, Any]], Callable[[], object] | None]:
        if pending.finished is None:
            self._prepare_once()
        long = self.study.effort is not None or self.study.tile is not None
        return statistics_of(self.study, pending, self.output, progress=long)

    def _prepare_once(self) -> None:
        """Prepare the network on the first usable image of the batch. So each process, and a run
        that is continued later, prepares it in the same way."""
        if self._prepared:
            return
        self._prepared, study = True, self.study
        for sample in self.samples:
            with contextlib.suppress(InputError):
                pixels = sample.load(study.channels, study.reading).pixels
                image = crop_image(pixels, study.reading.crop, sample.name)
                network_input = fit(study, ReadImage(image, None))
                study.explainer.prepare(network_input.example, study.question.meaning)
                return
