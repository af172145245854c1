"""The settings of a run, taken apart once: each stage gets only the part that it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igseg.analysis.image import Explainer, read_baseline, size_taken
from igseg.analysis.references import ReferenceImages, references_of
from igseg.checks.verdict import Thresholds
from igseg.data.pixels import Reading
from igseg.data.samples import Sample
from igseg.data.truth import LabelMap, TruthReading, read_label_map
from igseg.errors import InputError, attempt
from igseg.method.choice import AUTO, BASELINES, Question
from igseg.method.method import Method, build_method
from igseg.method.rules import Integration
from igseg.network.description import NetworkDescription
from igseg.network.kinds import EXCLUSIVE
from igseg.preprocessing import sides
from igseg.results.finished import FolderNaming
from igseg.settings import Settings

# --------------------------------------------------------------------------- files beside images


class BaselineFile:
    """The picture of a baseline from a file, read once for each number of channels. Raises
    InputError if the file cannot be opened."""

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self._reading = path, reading
        content, why = attempt(Path(path).read_bytes, OSError)
        if content is None:
            raise InputError(f'the baseline {path} cannot be read: {why}')
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._read: dict[int, np.ndarray | None] = {}

    def picture(self, channels: int) -> np.ndarray | None:
        """The picture (h, w, C), 0-255. Raises InputError if it cannot be read."""
        if channels not in self._read:
            self._read[channels] = read_baseline(self.path, channels, self._reading)
        return self._read[channels]


@dataclass(frozen=True)
class SideFiles:
    """The files that settings name beside model and images, read once for a run."""

    labels: LabelMap | None  # the meaning of the values in masks
    baseline: BaselineFile | None
    references: ReferenceImages  # other images, for methods that need such

    @classmethod
    def of(cls, settings: Settings, samples: Sequence[Sample] = ()) -> SideFiles:
        """samples: the other images of the dataset. Raises InputError."""
        labels = None if settings.label_map is None else read_label_map(settings.label_map)
        without_file = settings.baseline in BASELINES or settings.baseline == AUTO
        baseline = None if without_file else BaselineFile(settings.baseline, settings.reading)
        return cls(labels, baseline, references_of(settings, samples))


# --------------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Study:
    """Everything that all images of a run share; each part is for the stage that needs it."""

    explainer: Explainer
    settings: dict[str, Any]  # as the user wants them, for the summary
    files: SideFiles
    reading: Reading  # of images
    label_map: str | None  # the file of the label map
    ignore_label: int | None  # of masks
    tile: tuple[int, int] | None  # (height, width); None: the image in one piece
    overlap: int | None  # of tiles
    question: Question
    integration: Integration
    methods: tuple[Method, ...]
    effort: str | None  # of the checks; None: no checks
    thresholds: Thresholds  # of the verdict
    segments: str | None  # how regions are found; None: regions are not ranked
    record: dict[str, Any]  # the settings as they took effect, and the network's identity

    @classmethod
    def of(
        cls,
        explainer: Explainer,
        settings: Settings,
        samples: Sequence[Sample] = (),
        files: SideFiles | None = None,
    ) -> Study:
        """samples: the other images of the dataset. files: if they were read already. Raises
        InputError."""
        files = SideFiles.of(settings, samples) if files is None else files
        network, facts = explainer.facts.look_again(), explainer.facts
        tile = settings.tile
        if tile is not None:
            tile = sides(size_taken(facts.model, network, facts.preprocessing.channels, tile))
        if files.baseline is not None:
            files.baseline.picture(facts.preprocessing.channels)  # read it now: the file may change
        methods = tuple(map(build_method, settings.methods))
        return cls(
            explainer=explainer,
            settings=settings.record(),
            files=files,
            reading=settings.reading,
            label_map=settings.label_map,
            ignore_label=settings.ignore_label,
            tile=tile,
            overlap=settings.overlap,
            question=replace(settings.question, skip_empty=True),
            integration=settings.integration,
            methods=methods,
            effort=settings.evaluate,
            thresholds=settings.thresholds,
            segments=settings.segments,
            record=_record(explainer, settings, files, methods),
        )

    @property
    def network(self) -> NetworkDescription:
        """The description of the network, under the meaning that settings give its outputs."""
        return self.explainer.facts.description_for(self.question.meaning)

    @property
    def channels(self) -> int:
        """The number of channels with which images are read."""
        return self.explainer.facts.preprocessing.channels

    @property
    def method_names(self) -> tuple[str, ...]:
        """The names of the methods, as on the command line."""
        return tuple(method.name for method in self.methods)

    def question_for(self, channels: int) -> Question:
        """The question for images of C channels, with the picture of the baseline's file."""
        baseline = self.files.baseline
        image = None if baseline is None else baseline.picture(channels)
        return replace(self.question, baseline_image=image)

    def naming(self, name: str) -> FolderNaming:
        """How the folders of an image are named."""
        return FolderNaming(name, self.question.several_targets, self.method_names)

    @cached_property
    def truth_reading(self) -> TruthReading:
        """All that is needed to read ground truths: the label map, the number of classes."""
        reading = TruthReading(
            label_map=self.files.labels, ignore_label=self.ignore_label, pixels=self.reading
        )
        count = self.explainer.facts.logit_maps(self.question.meaning.output_map)
        if count is None:
            return reading
        kind = self.network.kind(torch.empty(count, 1, 1))
        if kind == EXCLUSIVE:
            return replace(reading, numbers=count, background=self.network.background)
        return replace(reading, numbers=count + 1, one_class=count == 1)


def _record(
    explainer: Explainer, settings: Settings, files: SideFiles, methods: Sequence[Method]
) -> dict[str, Any]:
    """All settings as they took effect, and the identity of the network: for the statistics, and
    to recognise finished images."""
    facts = explainer.facts
    record = {
        **settings.record(),
        **asdict(facts.preprocessing),
        **facts.description_for(settings.question.meaning, observed=False).record(),
        'device': str(explainer.device),
    }
    counts = [method.most_references for method in methods if method.most_references]
    if counts:
        record['references_sha256'] = files.references.sha256(max(counts))
    if files.labels is not None:
        record['label_map_sha256'] = files.labels.sha256
    if files.baseline is not None:
        record['baseline_sha256'] = files.baseline.sha256
    return record
