"""An image as it was read -> its explanations -> what is told of them: statistics and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from igseg.analysis.image import Explained, ModelInput, explain_by_all
from igseg.analysis.tiles import TiledInput, explain_tiles
from igseg.analysis.truth import names_of_labels
from igseg.checks.checks import evaluate_explanation
from igseg.checks.verdict import verdict_of
from igseg.data.medical import Geometry
from igseg.data.truth import IGNORED
from igseg.method.choice import kind_of
from igseg.preprocessing import Preprocessing
from igseg.results.files import Description, display_arrays
from igseg.results.finished import versions
from igseg.results.regions import Regions, rank_regions, segments_of
from igseg.statistics import explanation_statistics

if TYPE_CHECKING:
    from igseg.analysis.study import Study
    from igseg.explanation import Explanation


@dataclass(frozen=True)
class ReadImage:
    """An image and its truth, as they were read."""

    image: np.ndarray  # (H, W, C), 0-255
    truth: np.ndarray | None  # (H, W) labels; below 0: pixels that do not count
    origin: tuple[int, int] = (0, 0)  # (x, y) of the image in a larger one that it was cut from
    class_names: Mapping[int, str] = field(default_factory=dict)  # of the dataset
    notes: tuple[str, ...] = ()  # on the reading, in sentences
    value_range: tuple[float, float] | None = None  # of the file's values
    geometry: Geometry | None = None  # of a slice in its volume
    whole_size: tuple[int, int] | None = None  # (height, width), where it was cut out

    @property
    def channels(self) -> int:
        """C."""
        return self.image.shape[2] if self.image.ndim == 3 else 1

    def placement(self) -> dict[str, object]:
        """Where it lies, for the statistics file."""
        slice_of = self.geometry and {'axis': self.geometry.axis, 'index': self.geometry.index}
        size = self.whole_size or self.image.shape[:2]
        return {'size': list(size), 'origin': list(self.origin), **(slice_of or {})}


def fit(study: Study, read: ReadImage) -> ModelInput | TiledInput:
    """An image as the network takes it, with the preprocessing that made it: where the numbers of
    each image are wanted, its baselines are normalised with its own. Raises InputError."""
    usual = study.explainer.facts.preprocessing_for(read.channels)
    if study.tile is not None:
        return TiledInput.of(usual, read.image, read.truth, study.tile, study.overlap, read.origin)
    background = study.network.background
    nothing = IGNORED if background is None else background
    own = usual.of_image(read.image)
    return ModelInput.of(own, read.image, read.truth, read.origin, nothing)


def explain(
    study: Study, given: ModelInput | TiledInput, progress: bool = False
) -> list[Explained]:
    """For each target, and each method, the explanation, and the pixels (H, W) bool that truly are
    of its class, if known. Of several targets, empty ones are left out."""
    question = study.question_for(given.preprocessing.channels)
    if isinstance(given, TiledInput):
        (method,) = study.methods
        return explain_tiles(study.explainer, given, question, study.integration, method, progress)
    return explain_by_all(
        study.explainer, given, question, study.integration, study.methods,
        study.files.references, progress,
    )  # fmt: skip


def describe(
    study: Study,
    name: str,
    read: ReadImage,
    given: ModelInput | TiledInput,
    explained: Sequence[Explained],
    progress: bool = False,
) -> list[Description]:
    """For each explanation its statistics, and what its figures are drawn from."""
    common = _common(study, read, given.preprocessing, [one for one, _ in explained])
    described = []
    for explanation, truth in explained:
        statistics = {'image': name, **explanation_statistics(explanation, truth), **common}
        by_class = statistics['class_scores']
        if by_class is not None:
            names = names_of_labels(study, explanation, read.class_names)
            statistics['class_scores'] = {names[int(k)]: scores for k, scores in by_class.items()}
        if study.effort and isinstance(given, ModelInput):
            statistics |= evaluate_explanation(
                study.explainer, given.x, explanation, study.effort, truth, given.placement,
                study.question.seed, progress, given.preprocessing, unchanged=True,
            )  # fmt: skip
        statistics['verdict'] = verdict_of(statistics, study.thresholds)
        assert given.placement is not None  # it was made of a picture
        arrays = display_arrays(explanation, read.image, truth, given.placement)
        if study.segments:
            regions = ranked_regions(explanation, given)
            statistics |= regions.statistics()
            arrays['regions'] = regions.ranks
        described.append((statistics, arrays))
    return described


def _common(
    study: Study, read: ReadImage, own: Preprocessing, explanations: Sequence[Explanation]
) -> dict[str, object]:
    """The statistics that all explanations of an image share. own: the preprocessing of it."""
    return {
        'notes': [
            *study.explainer.facts.description.notes,
            *read.notes,
            *notes_on(read.image, read.truth, study.question.targets, explanations),
        ],
        'targets': list(dict.fromkeys(one.target for one in explanations)),
        'methods': list(study.method_names),
        'settings': {**study.record, **asdict(own)},
        'versions': versions(),
        'channel_names': list(own.channel_names),
        'value_range': read.value_range and list(read.value_range),
        'placement': read.placement(),
    }


def ranked_regions(explanation: Explanation, given: ModelInput | TiledInput) -> Regions:
    """Regions of the image by the |attribution| they carry."""
    magnitude = explanation.attributions.cpu().abs().sum(dim=0).double().numpy()
    if isinstance(given, TiledInput):
        return rank_regions(magnitude, segments_of(given.image.astype(np.float32)))
    return rank_regions(magnitude, segments_of(given.preprocessing.to_pixels(given.x)))


def notes_on(
    image: np.ndarray,
    truth: np.ndarray | None,
    asked_targets: Sequence[str],
    explanations: Sequence[Explanation],
) -> list[str]:
    """What was decided or left out, in sentences."""
    notes = []
    if truth is not None and truth.shape != image.shape[:2]:
        notes.append(
            f'the mask is {truth.shape[1]}×{truth.shape[0]}, the image '
            f'{image.shape[1]}×{image.shape[0]}: the mask was resized (nearest neighbour)'
        )
    notes += explanations[0].notes
    targets = list(dict.fromkeys(one.target for one in explanations))
    asked = [target for target in asked_targets if not kind_of(target).several]
    left_out = [target for target in asked if target not in targets]
    if targets == ['image'] and 'image' not in asked_targets:
        wanted = ' '.join(asked_targets)
        notes.append(f'target "{wanted}" was empty: the whole image was explained')
    elif left_out:
        notes.append(f'empty, so left out: target {", ".join(left_out)}')
    if explanations[0].cost.retried:
        notes.append(explanations[0].cost.retried)
    if explanations[0].cost.preparation.fell_back:
        notes.append(
            'the faster copy of the network did not compute quite the same: the original was used'
        )
    return notes
