"""From an image as it was read to its explanations, and on to their statistics and arrays."""

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
    origin: tuple[int, int] = (0, 0)  # (x, y) in the larger image that it was cut from
    class_names: Mapping[int, str] = field(default_factory=dict)  # of the dataset's labels
    notes: tuple[str, ...] = ()  # sentences about the reading
    value_range: tuple[float, float] | None = None  # of the values in the file
    geometry: Geometry | None = None  # of a slice: its place in the volume
    whole_size: tuple[int, int] | None = None  # (height, width) before it was cropped

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return self.image.shape[2] if self.image.ndim == 3 else 1

    def placement(self) -> dict[str, object]:
        """The place of the image in its file, for the statistics file."""
        slice_of = self.geometry and {'axis': self.geometry.axis, 'index': self.geometry.index}
        size = self.whole_size or self.image.shape[:2]
        return {'size': list(size), 'origin': list(self.origin), **(slice_of or {})}


def fit(study: Study, read: ReadImage) -> ModelInput | TiledInput:
    """The input of the network that is made of an image, with the preprocessing that made it. If
    mean and std come from each image, baselines are normalised with those of their image. Raises
    InputError."""
    usual = study.explainer.facts.preprocessing_for(read.channels)
    if study.tile is not None:
        return TiledInput.of(usual, read.image, read.truth, study.tile, study.overlap, read.origin)
    background = study.network.background
    padding_label = IGNORED if background is None else background
    preprocessing = usual.of_image(read.image)
    return ModelInput.of(preprocessing, read.image, read.truth, read.origin, padding_label)


def explain(
    study: Study, network_input: ModelInput | TiledInput, progress: bool = False
) -> list[Explained]:
    """For each target, and each method, the explanation, and the true pixels (H, W) bool of its
    class, if known. Of several targets, those without pixels are left out."""
    question = study.question_for(network_input.preprocessing.channels)
    if isinstance(network_input, TiledInput):
        (method,) = study.methods
        return explain_tiles(
            study.explainer, network_input, question, study.integration, method, progress
        )
    return explain_by_all(
        study.explainer, network_input, question, study.integration, study.methods,
        study.files.references, progress,
    )  # fmt: skip


def describe(
    study: Study,
    name: str,
    read: ReadImage,
    network_input: ModelInput | TiledInput,
    explained: Sequence[Explained],
    progress: bool = False,
) -> list[Description]:
    """For each explanation its statistics, and the arrays from which its figures are drawn."""
    explanations = [explanation for explanation, _ in explained]
    common = _common(study, read, network_input.preprocessing, explanations)
    descriptions = []
    for explanation, truth in explained:
        statistics = {'image': name, **explanation_statistics(explanation, truth), **common}
        by_class = statistics['class_scores']
        if by_class is not None:
            names = names_of_labels(study, explanation, read.class_names)
            statistics['class_scores'] = {names[int(k)]: scores for k, scores in by_class.items()}
        if study.effort and isinstance(network_input, ModelInput):
            statistics |= evaluate_explanation(
                study.explainer, network_input.x, explanation, study.effort, truth,
                network_input.placement, study.question.seed, progress,
                network_input.preprocessing, unchanged=True,
            )  # fmt: skip
        statistics['verdict'] = verdict_of(statistics, study.thresholds)
        assert network_input.placement is not None  # the input was made of a picture
        arrays = display_arrays(explanation, read.image, truth, network_input.placement)
        if study.segments:
            regions = ranked_regions(explanation, network_input)
            statistics |= regions.statistics()
            arrays['regions'] = regions.ranks
        descriptions.append((statistics, arrays))
    return descriptions


def _common(
    study: Study,
    read: ReadImage,
    preprocessing: Preprocessing,
    explanations: Sequence[Explanation],
) -> dict[str, object]:
    """The statistics that all explanations of an image share. preprocessing: of this image."""
    return {
        'notes': [
            *study.explainer.facts.description.notes,
            *read.notes,
            *notes_on(read.image, read.truth, study.question.targets, explanations),
        ],
        'targets': list(dict.fromkeys(explanation.target for explanation in explanations)),
        'methods': list(study.method_names),
        'settings': {**study.record, **asdict(preprocessing)},
        'versions': versions(),
        'channel_names': list(preprocessing.channel_names),
        'value_range': read.value_range and list(read.value_range),
        'placement': read.placement(),
    }


def ranked_regions(explanation: Explanation, network_input: ModelInput | TiledInput) -> Regions:
    """Regions of the image, ranked by the |attribution| that they carry."""
    magnitude = explanation.attributions.cpu().abs().sum(dim=0).double().numpy()
    if isinstance(network_input, TiledInput):
        picture = network_input.image.astype(np.float32)
    else:
        picture = network_input.preprocessing.to_pixels(network_input.x)
    return rank_regions(magnitude, segments_of(picture))


def notes_on(
    image: np.ndarray,
    truth: np.ndarray | None,
    wanted_targets: Sequence[str],
    explanations: Sequence[Explanation],
) -> list[str]:
    """Sentences that tell what was decided or left out."""
    notes = []
    if truth is not None and truth.shape != image.shape[:2]:
        notes.append(
            f'the mask is {truth.shape[1]}×{truth.shape[0]}, the image '
            f'{image.shape[1]}×{image.shape[0]}: the mask was resized (nearest neighbour)'
        )
    notes += explanations[0].notes
    targets = list(dict.fromkeys(explanation.target for explanation in explanations))
    single_targets = [target for target in wanted_targets if not kind_of(target).several]
    left_out = [target for target in single_targets if target not in targets]
    if targets == ['image'] and 'image' not in wanted_targets:
        wanted = ' '.join(wanted_targets)
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
