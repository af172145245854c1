"""The ground truth of an image: which of its pixels count, and the names of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from igseg.data.truth import IGNORED, VOID
from igseg.errors import InputError
from igseg.network.kinds import MULTILABEL

if TYPE_CHECKING:
    from igseg.analysis.study import Study
    from igseg.explanation import Explanation


def counted_truth(
    study: Study, truth: np.ndarray | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """A truth (H, W) from the caller, with values below 0 where pixels do not count; and notes.

    The pixels that do not count have the ignore label of the settings. Without such a label they
    have the value 255, if the truth holds numbers of classes beside it."""
    if truth is None or truth.dtype.kind not in 'ui':
        return truth, ()
    value = study.ignore_label
    notes: tuple[str, ...] = ()
    if value is None:
        values = set(np.unique(truth).tolist())
        class_count = (VOID in values and study.truth_reading.numbers) or 0
        if class_count > VOID:
            return truth, ()
        if max(values - {VOID}, default=0) not in range(1, class_count):
            return truth, ()
        value = VOID
        notes = (
            f'the truth holds {VOID} beside class numbers: taken as "ignore", which counts in no '
            'score and no target',
        )
    return np.where(truth == value, np.int16(IGNORED), truth.astype(np.int16)), notes


def names_of_labels(
    study: Study, explanation: Explanation, of_dataset: Mapping[int, str]
) -> list[str]:
    """The names of all labels of a network: from the settings, else from the checkpoint, else from
    the dataset, else their numbers. Raises InputError if there are too few or too many names."""
    masks = explanation.objective.weights
    names = study.network.class_names
    if names and len(names) != len(masks):
        raise InputError(
            f'class_names gives {len(names)} names, but the network has {len(masks)} classes '
            '(name all in order, the background too)'
        )
    first = 1 if explanation.objective.network.kind(masks) == MULTILABEL else 0
    if not names and len(set(of_dataset.values())) == len(of_dataset):
        names = tuple(of_dataset.get(k + first, str(k)) for k in range(len(masks)))
    label_names = list(names or map(str, range(len(masks))))
    labels = study.files.labels
    for number, name in (labels.names if labels else {}).items():  # they win over all other names
        if 0 <= number - first < len(label_names):
            label_names[number - first] = name
    if len(set(label_names)) < len(label_names):
        raise InputError(
            f'the label map {study.label_map} gives a class the name of another one '
            '(name all classes in it)'
        )
    return label_names
