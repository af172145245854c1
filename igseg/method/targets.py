"""Targets: the number of a segmentation that is explained.

An explanation is only as good as the choice of its target. `TARGETS` (in `choice`) holds the
targets that users may choose. This file holds the functions that its rows name: from the network's
prediction for the original image to a `Target`, or, for a name that stands for several targets, to
their names. It also compares the prediction with the ground truth, and makes the explanations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import cv2
import numpy as np
import torch

from igseg.errors import EmptyTargetError, InputError, attempt
from igseg.explanation import (
    NO_BASELINE,
    USER_BASELINE,
    Cost,
    Declared,
    Explanation,
    LabelScores,
    MethodResult,
)
from igseg.maps import label_scores
from igseg.method.choice import Question, kind_of
from igseg.network.description import NetworkDescription
from igseg.network.kinds import EXCLUSIVE, MULTILABEL
from igseg.network.score import ANY_NETWORK, Target
from igseg.preprocessing import Placement
from igseg.setting import resolved

MOST_OBJECTS = 250  # of an image: each object needs memory for its maps, and a folder


@dataclass(frozen=True)
class TargetContext:
    """The network's prediction for the original image, from which targets are built."""

    logits: torch.Tensor  # (K, h, w)
    masks: torch.Tensor  # (K, h, w) bool: the predicted pixels of every label
    # (h, w) int64: class numbers of the ground truth; negative: pixels that do not count.
    truth: torch.Tensor | None = None
    placement: Placement | None = None  # where the original image lies in the input
    network: NetworkDescription = ANY_NETWORK
    min_object_area: int = 1  # pixels; smaller objects are left out

    @cached_property
    def labels(self) -> torch.Tensor:
        """(h, w) int64: the label of every pixel; of independent labels that with the highest
        logit."""
        return self.logits.argmax(dim=0) if len(self.logits) > 1 else self.masks[0].long()

    @cached_property
    def counted(self) -> torch.Tensor:
        """`masks` without the pixels that do not count in the ground truth, if there is one. Only
        the targets `image` and `pixel:X,Y` contain such pixels."""
        return self.masks if self.truth is None else self.masks & (self.truth >= 0)

    @property
    def foreground(self) -> torch.Tensor:
        """The predicted mask, (h, w) bool: every pixel that is not background."""
        return self.network.foreground(self.masks)

    @cached_property
    def objects(self) -> list[tuple[torch.Tensor, int]]:
        """Connected components (8 neighbours) of the predicted mask of each label, (h, w) bool,
        with the label; the largest first. Raises InputError if there are too many."""
        components: list[tuple[int, int, np.ndarray, int]] = []
        for label, mask in enumerate(self.network.without_background(self.counted)):
            pixels = mask.cpu().numpy().astype(np.uint8)
            count, numbers, sizes, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
            for number in range(1, count):
                if sizes[number, cv2.CC_STAT_AREA] >= self.min_object_area:
                    components.append((-sizes[number, cv2.CC_STAT_AREA], label, numbers, number))
        if len(components) > MOST_OBJECTS:
            raise InputError(
                f'the predicted mask has {len(components):,} objects, more than {MOST_OBJECTS} '
                '(leave out small ones with --min_object_area)'
            )
        components.sort(key=lambda component: component[0])
        return [
            (torch.from_numpy(numbers == number).to(self.masks.device), label)
            for _, label, numbers, number in components
        ]

    def truth_masks(self, target: str) -> torch.Tensor:
        """The ground truth as masks (K, h, w) bool of every label. Raises InputError if there is
        none."""
        if self.truth is None:
            raise InputError(
                f'target "{target}" needs a ground-truth mask (give --mask_path, or use '
                '--target predicted)'
            )
        return self.network.drawn(self.truth, self.masks)

    def check_truth(self) -> None:
        """Raise InputError if the ground truth holds a class that the network does not have."""
        classes = len(self.masks)
        if self.truth is None or classes == 1:
            return
        end = classes + (self.network.kind(self.masks) == MULTILABEL)
        if int(self.truth.max()) >= end:
            raise InputError(
                f'the ground truth holds class {int(self.truth.max())}, but the model has '
                f'only {classes} classes ({end - classes} to {end - 1})'
            )

    def mean_of(self, masks: torch.Tensor, label: int | None = None) -> Target:
        """The mean over masks (K, h, w) bool, each in the logit map of its label. label: the class
        that is explained."""
        weights = masks.float() / max(1, int(masks.sum()))
        return Target('mask', weights, label=label, network=self.network)

    def mean_over(
        self, region: torch.Tensor, labels: torch.Tensor, label: int | None = None
    ) -> Target:
        """The mean over a region (h, w) bool; each pixel counts in the logit map of its label.
        labels: (h, w). label: the class that is explained."""
        channels = labels if len(self.logits) > 1 else torch.zeros_like(labels)
        masks = torch.zeros_like(self.masks)
        return self.mean_of(masks.scatter_(0, channels[None], region[None]), label)


# --------------------------------------------------------------------------- builders of targets
#
# The rows of TARGETS name these functions: (context, the text behind the colon) -> Target.
def predicted_target(context: TargetContext, argument: str) -> Target:
    """The mean over the predicted mask."""
    return context.mean_of(context.network.without_background(context.counted))


def object_target(context: TargetContext, argument: str) -> Target:
    """The mean over a connected part of the predicted mask."""
    if not argument.isdecimal() or int(argument) < 1:
        raise InputError(f'target "object:{argument}": K must be a whole number from 1')
    if int(argument) > len(context.objects):
        raise EmptyTargetError(
            f'target "object:{argument}" is empty: the predicted mask has '
            f'{len(context.objects)} objects (use --target each-object, or --target predicted)'
        )
    region, label = context.objects[int(argument) - 1]
    labels = torch.full_like(context.labels, label)
    return context.mean_over(region, labels, label if len(context.masks) > 1 else None)


def each_object(context: TargetContext) -> list[str]:
    """The names of all objects; `object:1` also where there is no object."""
    return [f'object:{k + 1}' for k in range(max(1, len(context.objects)))]


def truth_target(context: TargetContext, argument: str) -> Target:
    """The mean over the ground-truth mask."""
    truth = context.truth_masks('truth')
    context.check_truth()
    return context.mean_of(context.network.without_background(truth))


def false_positive_target(context: TargetContext, argument: str) -> Target:
    """The mean over pixels that were predicted wrongly."""
    truth = context.truth_masks('false-positive')
    wrong = context.counted & ~truth
    return context.mean_of(context.network.without_background(wrong))


def false_negative_target(context: TargetContext, argument: str) -> Target:
    """The mean over pixels of the ground truth that were not predicted."""
    truth = context.truth_masks('false-negative')
    context.check_truth()
    return context.mean_of(context.network.without_background(truth) & ~context.masks)


def image_target(context: TargetContext, argument: str) -> Target:
    """The mean over every pixel."""
    inside = context.network.inside(context.masks)
    if context.network.kind(context.masks) == MULTILABEL:
        return context.mean_of(inside.expand_as(context.masks))
    return context.mean_over(inside, context.labels)


def pixel_target(context: TargetContext, argument: str) -> Target:
    """One output pixel."""
    try:
        x, y = (int(number) for number in argument.split(','))
    except ValueError:
        raise InputError(f'target "pixel:{argument}" is not of the form pixel:X,Y') from None
    height, width = context.placement.original_size if context.placement else context.labels.shape
    left, top = context.placement.origin if context.placement else (0, 0)
    if not (left <= x < left + width and top <= y < top + height):
        raise InputError(
            f'target pixel {x},{y} lies outside the image (X from {left} to {left + width - 1}, '
            f'Y from {top} to {top + height - 1})'
        )
    column, row = context.placement.to_model(x, y) if context.placement else (x, y)
    if not (row < context.labels.shape[0] and column < context.labels.shape[1]):
        raise InputError(
            f'target pixel {x},{y}: the network gives one number for each image, not a map (use '
            '--target image)'
        )
    region = torch.zeros_like(context.labels, dtype=torch.bool)
    region[row, column] = True
    if not (region & context.network.inside(region)).any():
        raise InputError(
            f'target pixel {x},{y} lies beside the map of the network, which does not show the '
            'whole input (choose a pixel further inside)'
        )
    return context.mean_over(region, context.labels)


def class_target(context: TargetContext, argument: str) -> Target:
    """The mean of the logit of a class over the predicted pixels of this class."""
    classes = len(context.logits)
    if classes == 1:
        raise InputError(f'target "class:{argument}": the model has one class (use predicted)')
    if not argument.isdecimal() or int(argument) >= classes:
        raise InputError(f'target "class:{argument}": K must be a class from 0 to {classes - 1}')
    label = int(argument)
    masks = torch.zeros_like(context.masks)
    masks[label] = context.counted[label]
    return context.mean_of(masks, label)


# --------------------------------------------------------------------------- from what users write


def build_target(spec: str, context: TargetContext, score: str = 'logit') -> Target:
    """The target that a user wrote as `spec`.

    Raises InputError for a wrong spec, EmptyTargetError where its region holds no pixel.
    """
    kind = kind_of(spec)
    if kind.several:
        raise InputError(f'target "{spec}" stands for several (use {kind.first})')
    target: Target = resolved(kind.made_by)(context, spec.partition(':')[2])
    if not target.weights.any():
        ignored = context.truth is not None and bool((context.truth < 0).any())
        counts = ' that counts in its ground truth' if ignored else ''
        raise EmptyTargetError(
            f'target "{spec}" is empty: no such pixel{counts} in this image '
            '(use --target image to explain the whole logit map, or a lower --threshold)'
        )
    return replace(target, name=spec, score=score)


def as_target(form: str | Target | torch.Tensor, score: str, context: TargetContext) -> Target:
    """A target from a spec, a region (h, w) or a target object."""
    if isinstance(form, Target):
        return form
    if isinstance(form, str):
        return build_target(form, context, score)
    region = torch.as_tensor(form, dtype=torch.bool, device=context.logits.device)
    if region.shape != context.labels.shape:
        raise InputError(
            f'the target mask has shape {tuple(region.shape)}, the prediction '
            f'{tuple(context.labels.shape)}'
        )
    region = region & context.network.inside(region)
    if not region.any():
        raise EmptyTargetError('the target mask is empty, as far as the network predicts anything')
    return replace(context.mean_over(region, context.labels), score=score)


def build_targets(question: Question, context: TargetContext) -> list[Target]:
    """The targets of a question. A name that stands for several targets gives all of them. Raises
    InputError, EmptyTargetError."""
    expanded: list[str | Target | torch.Tensor] = []
    for form in question.targets:
        several = isinstance(form, str) and kind_of(form).several
        expanded += resolved(kind_of(form).made_by)(context) if several else [form]
    targets: list[Target] = []
    last_empty = None
    for form in expanded:
        build = partial(as_target, form, question.score, context)
        target, empty = attempt(build, EmptyTargetError)
        last_empty = empty or last_empty
        targets += [] if target is None else [target]
    if not targets and question.on_empty == 'image':
        return [build_target('image', context, question.score)]
    if last_empty and not (targets and question.skip_empty):
        raise EmptyTargetError(last_empty)
    return targets


# --------------------------------------------------------------------------- the prediction


@dataclass(frozen=True)
class Prediction:
    """What the network predicts for the image, and the targets that are explained. Both are fixed
    before any path is walked."""

    network: NetworkDescription  # as the user describes it
    logits: torch.Tensor  # (1, K, h, w)
    masks: torch.Tensor  # (K, h, w) bool: the predicted pixels of every label
    targets: Sequence[Target]
    numbers: torch.Tensor | None  # (h, w) int64: class numbers of the ground truth; None: unknown

    @classmethod
    def of(
        cls,
        network: NetworkDescription,
        logits: torch.Tensor,
        question: Question,
        truth: np.ndarray | None,
        placement: Placement | None,
    ) -> Prediction:
        """logits: (1, K, h, w), of the image. truth: (h, w) class labels. Raises InputError,
        EmptyTargetError."""
        if not len(question.targets):
            raise InputError('no target is given (use predicted)')
        numbers = None if truth is None else torch.as_tensor(truth).long().to(logits.device)
        masks = network.predicted(logits[0], question.threshold)
        if numbers is not None and network.place is not None and numbers.shape == masks.shape[-2:]:
            numbers = torch.where(network.inside(numbers), numbers, -1)  # does not count
        if numbers is not None and numbers.shape != masks.shape[-2:]:
            raise InputError(
                f'truth has shape {tuple(numbers.shape)}, the prediction {tuple(masks.shape[-2:])} '
                '(leave out the truth, or give it in that shape)'
            )
        context = TargetContext(
            logits[0], masks, numbers, placement, network, question.min_object_area
        )
        return cls(network, logits, masks, build_targets(question, context), numbers)

    def notes(self) -> tuple[str, ...]:
        """Notes about the ground truth, in sentences."""
        if self.numbers is None:
            return ()
        return unknown_numbers(self.network, self.masks, self.numbers)


# --------------------------------------------------------------------------- the ground truth


def unknown_numbers(
    network: NetworkDescription, masks: torch.Tensor, numbers: torch.Tensor
) -> tuple[str, ...]:
    """A note about numbers of a ground-truth mask (h, w) for which the network has no class."""
    first = 1 if network.kind(masks) == MULTILABEL else 0
    numbers_present = torch.unique(numbers).tolist()
    unknown = [n for n in numbers_present if n >= len(masks) + first] if len(masks) > 1 else []
    if not unknown:
        return ()
    return (
        f'the ground truth holds {", ".join(map(str, unknown[:5]))}, for which the network has no '
        f'class ({first} to {len(masks) + first - 1}): such pixels count as wrong',
    )


def truth_fields(prediction: Prediction) -> dict[str, Any]:
    """The fields of an explanation that depend on the ground truth."""
    numbers = prediction.numbers
    if numbers is None:
        return {'label_scores': None, 'counted': None}
    ignored = bool((numbers < 0).any())
    return {
        'label_scores': scores_of_labels(prediction.network, prediction.masks, numbers),
        'counted': (numbers >= 0).cpu().numpy() if ignored else None,
    }


def scores_of_labels(
    network: NetworkDescription, masks: torch.Tensor, numbers: torch.Tensor
) -> LabelScores | None:
    """How well each label was predicted; None for a single class.

    masks: (K, h, w) bool, the predicted masks. numbers: (h, w), of the ground-truth mask."""
    if len(masks) == 1:
        return None
    kind = network.kind(masks)
    counted = numbers >= 0
    masks, truth = masks[:, counted], network.drawn(numbers, masks)[:, counted]  # (K, pixels)
    if not counted.any():
        return None
    exclusive = kind == EXCLUSIVE
    correct = (masks & truth).any(dim=0) if exclusive else masks == truth
    background = network.background if exclusive else None
    scores = label_scores(masks.cpu().numpy(), truth.cpu().numpy())
    return LabelScores(scores, background, float(correct.cpu().double().mean()))


# --------------------------------------------------------------------------- explanations


@dataclass(frozen=True)
class ChosenBaseline:
    """The baseline that an image is compared with, as pictures, beside the image itself."""

    name: str
    image: np.ndarray  # (H, W, C) float32, 0-255
    pictures: Sequence[np.ndarray]  # every draw of the baseline, (H, W, C) float32, 0-255 each
    notes: tuple[str, ...] = ()  # why it was chosen, in sentences

    @property
    def pixels(self) -> np.ndarray:
        """The first draw of the baseline, (H, W, C) float32, 0-255."""
        return self.pictures[0]

    def difference(self, placement: Placement | None) -> np.ndarray:
        """|image - baseline| of each pixel, summed over the channels, (H, W); NaN in padding."""
        difference: np.ndarray = np.abs(self.image - self.pixels).sum(axis=2)
        if placement is not None:
            difference[~placement.content(difference.shape)] = np.nan
        return difference


def explanations_of(
    declared: Declared,
    prediction: Prediction,
    baseline: ChosenBaseline,
    results: Sequence[MethodResult],
    cost: Cost,
    common: Mapping[str, Any],
) -> list[Explanation]:
    """The explanation of each target, from the results of a method.

    declared: what the method promises. common: fields that are equal in all explanations."""
    network, of_truth = prediction.network, truth_fields(prediction)
    explanations = []
    for target, result in zip(prediction.targets, results, strict=True):
        mask, probability = network.explained(prediction.logits, prediction.masks, target.label)
        total = result.total
        if total is None:
            total = float(result.attributions.cpu().double().sum())
        explanations.append(
            Explanation(
                attributions=result.attributions,
                uncertainty=result.uncertainty,
                prediction=probability.cpu(),
                predicted_mask=mask.cpu(),
                region=target.region.cpu(),
                baseline_pixels=baseline.pixels,
                target=target.name,
                objective=replace(target, weights=target.weights.cpu()),
                baseline=None if declared.baseline == NO_BASELINE else baseline.name,
                steps=result.evaluations,
                score=float(target(prediction.logits)) if result.score is None else result.score,
                baseline_score=result.start_score,
                attribution_sum=total,
                map_error=result.map_error,
                trend=result.trend,
                cost=cost,
                draws=len(baseline.pictures) if declared.baseline == USER_BASELINE else 1,
                method=declared,
                end_score=result.end_score,
                sum_error=result.total_error,
                fine=result.fine,
                tiles=result.tiles,
                gradient_deviation=result.gradient_deviation,
                gradient_cause=result.gradient_cause,
                **of_truth,
                **common,
            )
        )
    return explanations
