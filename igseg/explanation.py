"""What an explanation is: the attributions of one image and everything needed to judge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from igseg.network.score import Target


@dataclass(frozen=True)
class Preparation:
    """What was done to a private copy of a network, and what it changed."""

    folded: int  # batch norms folded into convolutions
    transposed: int  # convolutions whose backward runs as a forward convolution
    logit_deviation: float  # relative L2 difference of the logits from the original's
    gradient_deviation: float  # of one gradient
    fell_back: bool  # the original is used, because the copy deviated too much
    padded: int = 0  # paddings folded into convolutions
    no_graph: str | None = None  # why the network runs as it is, without these and without cropping


@dataclass(frozen=True)
class Cropping:
    """What is computed for some targets of an image, and how exact that was measured to be."""

    computed_share: float = 1.0  # of the convolutions' operations of the whole network
    boxes: int = 1  # of the output
    logit_deviation: float | None = None  # in them, from the whole map's; None: nothing is cropped
    gradient_deviation: float | None = None  # None: measured on another image of this size
    fell_back: bool = False  # nothing is cropped, because the crops deviated too much


BY_CONSTRUCTION = 'construction'  # of a method's completeness: whatever is computed


@dataclass(frozen=True)
class Trend:
    """What happens along the path, at the nodes used, from the baseline to the image."""

    alphas: tuple[float, ...]  # rising
    scores: tuple[float, ...]  # F there
    mask_iou: tuple[float | None, ...]  # of the predicted mask there with the one on the image;

    # None where only the target's part of the map was computed


@dataclass(frozen=True)
class Cost:
    """How an explanation was computed, and what it cost, for all targets of the image together."""

    gradient_evaluations: int  # all gradients, those of the precision check included
    forward_passes: int  # images through the network, for the prediction and the gradients
    seconds: float
    step_batch: int
    peak_memory_bytes: int | None
    precision: str  # what the gradients were computed in; they are summed in float32 or better
    precision_deviation: float | None  # of the map from float32, relative L2; None: not reduced
    retried: str | None  # why it was computed again in float32; None: it was not
    preparation: Preparation
    cropping: Cropping = field(default_factory=Cropping)  # to all targets together


@dataclass(frozen=True)
class LabelScores:
    """How well each label of a network with several was predicted."""

    scores: dict[int, dict[str, float | None]]  # dice, iou, accuracy of each label that is there
    background: int | None  # the label that is no object
    pixel_accuracy: float  # share of pixels whose class is right; of independent labels, of pairs


# What a method promises of the sum of its map.
BY_INTEGRAL, IN_EXPECTATION = 'integral', 'expectation'  # or BY_CONSTRUCTION


# The baseline that a method compares the image with: chosen by the user, or by the method, or none.
USER_BASELINE, METHOD_BASELINE, NO_BASELINE = 'given', 'own', 'none'


@dataclass(frozen=True)
class Declared:
    """What a method says of itself: all that figures, statistics and checks ask of it."""

    name: str = 'ig'  # as on the command line
    completeness: str | None = BY_INTEGRAL  # how the sum comes to F(x) - F(x'); None: it need not
    quadrature: bool = True  # an integral whose error is estimated, to a tolerance if wanted
    sequential: bool = False  # each step needs the result of the one before
    baseline: str = USER_BASELINE  # USER_BASELINE, METHOD_BASELINE or NO_BASELINE
    settles_early: bool = True  # a map in a few steps is much the same: not of what is drawn
    channels: bool = True  # whether it tells the input's channels apart
    signed: bool = True  # whether its sign means raising or lowering the score


@dataclass(frozen=True)
class Tiles:
    """How a picture was explained that is larger than the network's input."""

    count: int  # of tiles that the picture has
    explained: int  # of these, those that hold pixels of the target
    size: tuple[int, int]  # (height, width) of each, in pixels of the picture
    overlap: int  # of neighbours, at least


def _of_the_cost(name: str) -> property:
    return property(lambda explanation: getattr(explanation.cost, name))


@dataclass(frozen=True)
class Explanation:
    """The attributions of one image and everything needed to judge them.

    Tensors are on the CPU, except `attributions`, which are where the input was.
    """

    attributions: torch.Tensor  # (C, H, W), in units of the score
    uncertainty: torch.Tensor | None  # (H, W): estimated error of their sum over the channels;
    # None: a single step. Where precision was reduced, its deviation is spread evenly.
    prediction: torch.Tensor  # (h, w) float32: probability of what is explained, 0-1
    predicted_mask: torch.Tensor  # (h, w) bool
    region: torch.Tensor  # (h, w) bool: the target region R
    baseline_pixels: np.ndarray  # (H, W, C) float32, 0-255: the (first) baseline
    target: str
    objective: Target  # F itself: logits -> score
    baseline: str | None  # None: it is compared with nothing
    rule: str | None  # None: no integral is computed
    steps: int  # interpolation steps per baseline (the most, where draws differ); without an
    # integral, what else the method takes many of
    score: float  # F(x)
    baseline_score: float | None  # F(x'), mean over the draws; None: no path starts there
    attribution_sum: float
    map_error: float | None  # estimated relative L2 error of the map; None: a single step
    tolerance: float | None
    trend: Trend  # on the way from the (first) baseline
    cost: Cost
    difference: np.ndarray | None = None  # (h, w) float32: |x - x'| of each pixel, summed over the
    # channels, 0-255 each, of the (first) baseline; NaN in letterbox padding
    label_scores: LabelScores | None = None  # None: one class, or truth unknown
    draws: int = 1  # baselines that the map is the mean over
    counted: np.ndarray | None = None  # (h, w) bool: where the truth counts; None: everywhere
    notes: tuple[str, ...] = ()  # what was found out about the network on the way, in sentences
    method: Declared = Declared()
    end_score: float | None = None  # F where the paths end; None: at the image
    sum_error: float | None = None  # standard error of the sum, where baselines are drawn
    fine: torch.Tensor | None = None  # (c, h, w): the map of a layer in its own resolution
    again: Callable[..., np.ndarray] | None = None  # the method's map of another input, for checks
    tiles: Tiles | None = None  # None: in one piece

    @property
    def score_type(self) -> str:
        """What is averaged over the region, one of SCORES."""
        return self.objective.score

    # What it cost may be asked of the explanation itself.
    gradient_evaluations = _of_the_cost('gradient_evaluations')
    forward_passes = _of_the_cost('forward_passes')
    seconds = _of_the_cost('seconds')
    step_batch = _of_the_cost('step_batch')
    peak_memory_bytes = _of_the_cost('peak_memory_bytes')
    precision = _of_the_cost('precision')
    precision_deviation = _of_the_cost('precision_deviation')
    retried = _of_the_cost('retried')
    preparation = _of_the_cost('preparation')
    cropping = _of_the_cost('cropping')

    @property
    def promised_sum(self) -> float | None:
        """What the attributions should sum to: the change of F along the paths; None where the
        method promises nothing."""
        if self.method.completeness is None or self.baseline_score is None:
            return None
        return (self.score if self.end_score is None else self.end_score) - self.baseline_score

    @property
    def completeness_gap(self) -> float | None:
        """|sum of attributions - (F(x) - F(x'))| / |F(x) - F(x')|; None where F(x) = F(x'), or
        where nothing is promised."""
        change, start = self.promised_sum, self.baseline_score
        if change is None or start is None:
            return None
        return completeness_gap(self.attribution_sum, change + start, start)

    @property
    def gap_error(self) -> float | None:
        """Standard error of the gap, where baselines are drawn."""
        change = self.promised_sum
        if self.sum_error is None or change is None or self.completeness_gap is None:
            return None
        return self.sum_error / abs(change)

    @property
    def within_tolerance(self) -> bool | None:
        """Whether map error and completeness gap are below the tolerance; None without one."""
        if self.tolerance is None:
            return None
        reached = self.map_error is not None and self.map_error <= self.tolerance
        return reached and (self.completeness_gap or 0) <= self.tolerance


def completeness_gap(total: float, score: float, baseline_score: float) -> float | None:
    """The relative completeness gap; None where the two scores agree to float32 precision."""
    change = score - baseline_score
    if abs(change) <= 1e-6 * max(abs(score), abs(baseline_score), 1e-6):
        return None
    return abs(total - change) / abs(change)


NOTHING_SEEN = Trend((), (), ())


@dataclass(frozen=True)
class MethodResult:
    """What a method computed for one target."""

    attributions: torch.Tensor  # (C, H, W), or (1, H, W) where the method tells no channels apart
    evaluations: int = 0  # number of steps, or of what else the method takes many of
    trend: Trend = NOTHING_SEEN
    start_score: float | None = None  # mean of F at the starts of the paths; None: no paths
    end_score: float | None = None  # mean of F at the ends of the paths; None: no paths
    map_error: float | None = None  # estimated relative L2 error of the map; None: unknown
    uncertainty: torch.Tensor | None = None  # (H, W): of the sum over the channels
    total: float | None = None  # sum of the map before it was enlarged; None: sum of `attributions`
    total_error: float | None = None  # standard error of the total, where nodes were drawn
    reduced: torch.dtype | None = None  # reduced precision; None: the precision of the network
    deviation: float | None = None  # of the map from float32, where precision was reduced
    fine: torch.Tensor | None = None  # (c, h, w): the map of a layer, before it was enlarged
    score: float | None = None  # F at the image; None: F of the whole logit map
    tiles: Tiles | None = None  # None: in one piece
