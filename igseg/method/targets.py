"""Targets: the one number of a segmentation that is explained.

Everything hangs on choosing it well and saying so. `TARGETS` holds what a user may ask for; a row
is one function from the network's answer on the original image to a `Target`, or one that says
which targets a name stands for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import cv2
import numpy as np
import torch

from igseg.errors import EmptyTargetError, InputError, attempt, check_choice
from igseg.network.description import NetworkDescription
from igseg.network.outputs import MULTILABEL
from igseg.network.score import ANY_NETWORK, Target
from igseg.preprocessing import Placement

MOST_OBJECTS = 250  # of an image: each has maps of its own in memory, and a folder


@dataclass(frozen=True)
class TargetContext:
    """What a target may be built from: the network's answer on the original image."""

    logits: torch.Tensor  # (K, h, w)
    masks: torch.Tensor  # (K, h, w) bool: the predicted pixels of every label
    truth: torch.Tensor | None = None  # (h, w) int64: numbers of the ground-truth mask; below 0:
    # pixels that do not count
    placement: Placement | None = None  # where the original image lies in the input
    network: NetworkDescription = ANY_NETWORK
    min_object_area: int = 1  # pixels; smaller objects are left out

    @cached_property
    def labels(self) -> torch.Tensor:
        """(h, w) int64: the label of every pixel; of independent ones that of the highest logit."""
        return self.logits.argmax(dim=0) if len(self.logits) > 1 else self.masks[0].long()

    @cached_property
    def counted(self) -> torch.Tensor:
        """`masks` without the pixels that do not count in the ground truth, where that is known:
        they are in no target but those that name them, `image` and `pixel:X,Y`."""
        return self.masks if self.truth is None else self.masks & (self.truth >= 0)

    @property
    def foreground(self) -> torch.Tensor:
        """The predicted mask, (h, w) bool: what is not background."""
        return self.network.foreground(self.masks)

    @cached_property
    def objects(self) -> list[tuple[torch.Tensor, int]]:
        """Connected components (8 neighbours) of the predicted mask of each label, (h, w) bool,
        with the label; largest first. Raises InputError where there are too many."""
        found: list[tuple[int, int, np.ndarray, int]] = []
        for label, mask in enumerate(self.network.without_background(self.counted)):
            pixels = mask.cpu().numpy().astype(np.uint8)
            count, numbers, sizes, _ = cv2.connectedComponentsWithStats(pixels, connectivity=8)
            for number in range(1, count):
                if sizes[number, cv2.CC_STAT_AREA] >= self.min_object_area:
                    found.append((-sizes[number, cv2.CC_STAT_AREA], label, numbers, number))
        if len(found) > MOST_OBJECTS:
            raise InputError(
                f'the predicted mask has {len(found):,} objects, more than {MOST_OBJECTS} '
                '(leave out small ones with --min_object_area)'
            )
        found.sort(key=lambda one: one[0])
        return [
            (torch.from_numpy(numbers == number).to(self.masks.device), label)
            for _, label, numbers, number in found
        ]

    def known_truth(self, target: str) -> torch.Tensor:
        """The ground truth as masks (K, h, w) bool of every label. Raises InputError where it is
        unknown."""
        if self.truth is None:
            raise InputError(
                f'target "{target}" needs a ground-truth mask (give --mask_path, or use '
                '--target predicted)'
            )
        return self.network.drawn(self.truth, self.masks)

    def check_truth(self) -> None:
        """Raise InputError where the ground truth holds a class that the network lacks."""
        classes = len(self.masks)
        known = classes + (self.network.kind(self.masks) == MULTILABEL)
        if classes > 1 and int(self.truth.max()) >= known:
            raise InputError(
                f'the ground truth holds class {int(self.truth.max())}, but the model has '
                f'only {classes} classes ({known - classes} to {known - 1})'
            )

    def mean_of(self, masks: torch.Tensor, label: int | None = None) -> Target:
        """The mean over masks (K, h, w) bool, each in its label's logit map; label: the class that
        is explained."""
        weights = masks.float() / max(1, int(masks.sum()))
        return Target('mask', weights, label=label, network=self.network)

    def mean_over(
        self, region: torch.Tensor, labels: torch.Tensor, label: int | None = None
    ) -> Target:
        """The mean over a region (h, w) bool, in each pixel of the logit map of its label (h, w);
        label: the class that is explained."""
        channels = labels if len(self.logits) > 1 else torch.zeros_like(labels)
        masks = torch.zeros_like(self.masks)
        return self.mean_of(masks.scatter_(0, channels[None], region[None]), label)


# --------------------------------------------------------------------------- the table
#
# Builders of targets: (context, what stands behind the colon) -> Target; the docstring is the
# target's line in --help.
def predicted_target(context: TargetContext, argument: str) -> Target:
    """the predicted mask: pixels above the threshold (several classes: not background)"""
    return context.mean_of(context.network.without_background(context.counted))


def object_target(context: TargetContext, argument: str) -> Target:
    """the K-th largest connected part of the predicted mask of a class, from 1"""
    if not argument.isdecimal() or int(argument) < 1:
        raise InputError(f'target "object:{argument}": K must be a whole number from 1')
    if int(argument) > len(context.objects):
        raise EmptyTargetError(
            f'target "object:{argument}" is empty: the predicted mask has '
            f'{len(context.objects)} objects (use --each_object, or --target predicted)'
        )
    region, label = context.objects[int(argument) - 1]
    labels = torch.full_like(context.labels, label)
    return context.mean_over(region, labels, label if len(context.masks) > 1 else None)


def each_object(context: TargetContext) -> list[str]:
    """every connected part of the predicted mask: object:1, object:2, …"""
    return [f'object:{k + 1}' for k in range(max(1, len(context.objects)))]


def truth_target(context: TargetContext, argument: str) -> Target:
    """the ground-truth mask"""
    truth = context.known_truth('truth')
    context.check_truth()
    return context.mean_of(context.network.without_background(truth))


def false_positive_target(context: TargetContext, argument: str) -> Target:
    """predicted, but not so in the ground truth: why did it see this?"""
    truth = context.known_truth('false-positive')
    wrong = context.counted & ~truth
    return context.mean_of(context.network.without_background(wrong))


def false_negative_target(context: TargetContext, argument: str) -> Target:
    """in the ground truth, but not so predicted: why did it miss this?"""
    truth = context.known_truth('false-negative')
    context.check_truth()
    return context.mean_of(context.network.without_background(truth) & ~context.masks)


def image_target(context: TargetContext, argument: str) -> Target:
    """every pixel (independent labels: of every label)"""
    if context.network.kind(context.masks) == MULTILABEL:
        return context.mean_of(torch.ones_like(context.masks))
    return context.mean_over(torch.ones_like(context.labels, dtype=torch.bool), context.labels)


def pixel_target(context: TargetContext, argument: str) -> Target:
    """one output pixel, X to the right and Y down from 0,0 in the original image"""
    try:
        x, y = (int(part) for part in argument.split(','))
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
    region = torch.zeros_like(context.labels, dtype=torch.bool)
    region[row, column] = True
    return context.mean_over(region, context.labels)


def class_target(context: TargetContext, argument: str) -> Target:
    """pixels of class K, on the logit of K (models with several classes)"""
    classes = len(context.logits)
    if classes == 1:
        raise InputError(f'target "class:{argument}": the model has one class (use predicted)')
    if not argument.isdecimal() or int(argument) >= classes:
        raise InputError(f'target "class:{argument}": K must be a class from 0 to {classes - 1}')
    label = int(argument)
    masks = torch.zeros_like(context.masks)
    masks[label] = context.counted[label]
    return context.mean_of(masks, label)


@dataclass(frozen=True)
class TargetKind:
    """A row of the table of targets: one target, or a name that stands for several."""

    form: str  # how the user writes it
    build: Callable[[TargetContext, str], Target] | None = None
    expand: Callable[[TargetContext], list[str]] | None = None  # what it stands for
    first: str = ''  # of these, the one there is in every image
    argument: str = ''  # what may stand behind the colon, a regular expression

    @property
    def meaning(self) -> str:
        return ' '.join((self.build or self.expand).__doc__.split())


TARGETS: dict[str, TargetKind] = {
    'predicted': TargetKind('predicted', predicted_target),
    'object': TargetKind('object:K', object_target, argument=r'0*[1-9]\d*'),
    'each-object': TargetKind('each-object', expand=each_object, first='object:1'),
    'truth': TargetKind('truth', truth_target),
    'false-positive': TargetKind('false-positive', false_positive_target),
    'false-negative': TargetKind('false-negative', false_negative_target),
    'image': TargetKind('image', image_target),
    'pixel': TargetKind('pixel:X,Y', pixel_target, argument=r'-?\d+,-?\d+'),
    'class': TargetKind('class:K', class_target, argument=r'\d+'),
}


# --------------------------------------------------------------------------- from what users write


def kind_of(spec: str) -> TargetKind:
    """The row of TARGETS of a target as the user wrote it. Raises InputError."""
    kind, _, argument = spec.partition(':')
    check_choice('target', kind, TARGETS)
    if (':' in TARGETS[kind].form) != bool(argument):
        raise InputError(f'target "{spec}" is not of the form {TARGETS[kind].form}')
    return TARGETS[kind]


def check_form(spec: str) -> None:
    """Raise InputError for a target that no image can have, before anything is computed."""
    kind, argument = kind_of(spec), spec.partition(':')[2]
    if argument and not re.fullmatch(kind.argument, argument):
        raise InputError(f'target "{spec}" is not of the form {kind.form} ({kind.meaning})')


def build_target(spec: str, context: TargetContext, score: str = 'logit') -> Target:
    """The target that a user wrote as `spec`.

    Raises InputError for a wrong spec, EmptyTargetError where its region holds no pixel.
    """
    kind = kind_of(spec)
    if kind.build is None:
        raise InputError(f'target "{spec}" stands for several (use {kind.first})')
    target = kind.build(context, spec.partition(':')[2])
    if not target.weights.any():
        ignored = context.truth is not None and bool((context.truth < 0).any())
        counts = ' that counts in its ground truth' if ignored else ''
        raise EmptyTargetError(
            f'target "{spec}" is empty: no such pixel{counts} in this image '
            '(use --target image to explain the whole logit map, or a lower --threshold)'
        )
    return replace(target, name=spec, score=score)


def as_target(form: str | Target | torch.Tensor, score: str, context: TargetContext) -> Target:
    """A target given as a spec, a region (h, w) or a target object."""
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
    if not region.any():
        raise EmptyTargetError('the target mask is empty')
    return replace(context.mean_over(region, context.labels), score=score)


def build_targets(
    forms: Sequence[str | Target | torch.Tensor],
    score: str,
    context: TargetContext,
    skip_empty: bool,
    on_empty: str,
) -> list[Target]:
    """The targets that were asked for, in whichever form, those that stand for several expanded.

    skip_empty: leave out empty ones, unless all are. on_empty: 'image' explains the whole image
    where all are empty. Raises EmptyTargetError.
    """
    expanded: list[str | Target | torch.Tensor] = []
    for form in forms:
        expand = kind_of(form).expand if isinstance(form, str) else None
        expanded += expand(context) if expand else [form]
    targets, last_empty = [], None
    for form in expanded:
        target, empty = attempt(partial(as_target, form, score, context), EmptyTargetError)
        last_empty = empty or last_empty
        targets += [] if target is None else [target]
    if not targets and on_empty == 'image':
        return [build_target('image', context, score)]
    if last_empty and not (targets and skip_empty):
        raise EmptyTargetError(last_empty)
    return targets
