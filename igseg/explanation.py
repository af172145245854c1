"""The data classes of an explanation: the attributions of an image and everything needed to judge
them."""

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
    """How a private copy of a network was changed, and how far it deviates from the original."""

    folded: int  # batch norms folded into convolutions
    transposed: int  # convolutions whose gradient is computed as a forward convolution
    logit_deviation: float  # relative L2 difference of the logits from those of the original
    gradient_deviation: float  # the same for a gradient
    fell_back: bool  # the original is used, because the copy deviated too much
    padded: int = 0  # paddings folded into convolutions
    no_graph: str | None = None  # why the network runs unchanged and without cropping
    # Rows and columns of the input where the network's map lies; None: it shows the whole input.
    place: tuple[tuple[int, int], tuple[int, int]] | None = None


@dataclass(frozen=True)
class Cropping:
    """Which part of the network is computed for some targets of an image, and how exact that is."""

    computed_share: float = 1.0  # of the operations in the convolutions of the whole network
    boxes: int = 1  # of the output
    # Relative L2 difference of the logits from those of the whole map; None: nothing is cropped.
    logit_deviation: float | None = None
    gradient_deviation: float | None = None  # the same for a gradient, on one image of this size
    fell_back: bool = False  # nothing is cropped, because the crops deviated too much


@dataclass(frozen=True)
class Trend:
    """Score and mask along the path from the baseline to the image, at the evaluated nodes."""

    alphas: tuple[float, ...]  # of the nodes, rising
    scores: tuple[float, ...]  # F at each node
    # IoU of the predicted mask at each node with that on the image; None where only the target's
    # part of the logit map was computed.
    mask_iou: tuple[float | None, ...]


@dataclass(frozen=True)
class Cost:
    """How an explanation was computed, and its cost, for all targets of the image together."""

    gradient_evaluations: int  # all gradients, with those of the precision check
    forward_passes: int  # images through the network, for the prediction and the gradients
    seconds: float
    step_batch: int  # interpolation steps computed at once
    peak_memory_bytes: int | None
    precision: str  # type of the gradients; they are summed in float32 or better
    precision_deviation: float | None  # of the map from float32, relative L2; None: not reduced
    retried: str | None  # why the map was computed again in float32; None: it was not
    preparation: Preparation
    cropping: Cropping = field(default_factory=Cropping)  # for all targets together


@dataclass(frozen=True)
class LabelScores:
    """How well each label of a network with several labels was predicted."""

    # By the label: dice, iou and accuracy, for labels that are predicted or true somewhere.
    scores: dict[int, dict[str, float | None]]
    background: int | None  # the label of the background
    # Share of pixels with the right class; of independent labels, share of pairs (pixel, label).
    pixel_accuracy: float


# Why the sum of a method's map is the change of the score: by the integral, only in expectation, or
# always, whatever is computed.
BY_INTEGRAL, IN_EXPECTATION, BY_CONSTRUCTION = 'integral', 'expectation', 'construction'


# The baseline that a method compares the image with: chosen by the user, or by the method, or none.
USER_BASELINE, METHOD_BASELINE, NO_BASELINE = 'given', 'own', 'none'


@dataclass(frozen=True)
class Declared:
    """What a method promises; figures, statistics and checks depend on nothing else of it."""

    name: str = 'ig'  # as on the command line
    completeness: str | None = BY_INTEGRAL  # why the sum is F(x) - F(x'); None: it is not
    quadrature: bool = True  # the map is an integral whose error is estimated
    sequential: bool = False  # each step needs the result of the step before
    baseline: str = USER_BASELINE  # USER_BASELINE, METHOD_BASELINE or NO_BASELINE
    settles_early: bool = True  # a few steps give nearly the same map
    channels: bool = True  # the map has values for each channel of the input
    signed: bool = True  # the sign means that the score is raised or lowered


@dataclass(frozen=True)
class Tiles:
    """How a picture that is larger than the network's input was explained in tiles."""

    count: int  # of all tiles of the picture
    explained: int  # number of tiles with pixels of the target
    size: tuple[int, int]  # (height, width) of a tile, in pixels of the picture
    overlap: int  # of neighbouring tiles, in pixels, at least


def _of_the_cost(name: str) -> property:
    return property(lambda explanation: getattr(explanation.cost, name))


@dataclass(frozen=True)
class Explanation:
    """The attributions of an image and everything needed to judge them.

    Tensors are on the CPU, except `attributions`, which are on the device of the input.
    """

    attributions: torch.Tensor  # (C, H, W), in units of the score
    # (H, W): estimated error of the sum of attributions over the channels; None: a single step.
    # Where precision was reduced, the deviation is spread evenly over the pixels.
    uncertainty: torch.Tensor | None
    prediction: torch.Tensor  # (h, w) float32: probability of the explained class, 0-1
    predicted_mask: torch.Tensor  # (h, w) bool
    region: torch.Tensor  # (h, w) bool: the target region R
    baseline_pixels: np.ndarray  # (H, W, C) float32, 0-255: the (first) baseline
    target: str
    objective: Target  # F itself: logits -> score
    baseline: str | None  # None: the method has no baseline
    rule: str | None  # None: no integral is computed
    # Interpolation steps per baseline (the largest number, where draws differ); without an
    # integral, the number of whatever else the method takes many of.
    steps: int
    score: float  # F(x)
    baseline_score: float | None  # F(x'), mean over the draws; None: no path starts there
    attribution_sum: float
    map_error: float | None  # estimated relative L2 error of the map; None: a single step
    tolerance: float | None
    trend: Trend  # along the path from the (first) baseline
    cost: Cost
    # (h, w) float32: |x - x'| of each pixel for the (first) baseline, summed over the channels,
    # 0-255 each; NaN in letterbox padding.
    difference: np.ndarray | None = None
    label_scores: LabelScores | None = None  # None: a single class, or truth unknown
    draws: int = 1  # number of baselines over which the map is averaged
    counted: np.ndarray | None = None  # (h, w) bool: where the truth counts; None: everywhere
    notes: tuple[str, ...] = ()  # about the network and choices of the program, in sentences
    method: Declared = Declared()
    end_score: float | None = None  # F where the paths end; None: they end at the image
    sum_error: float | None = None  # standard error of the sum, where baselines are drawn
    fine: torch.Tensor | None = None  # (c, h, w): the map of a layer in the layer's resolution
    again: Callable[..., np.ndarray] | None = None  # the method's map of another input, for checks
    tiles: Tiles | None = None  # None: in one piece
    # How far the network's gradient misses the change of its score; None: not measured.
    gradient_deviation: float | None = None
    gradient_cause: str | None = None  # where it misses much: why, in words

    @property
    def score_type(self) -> str:
        """What is averaged over the region, one of SCORES."""
        return self.objective.score

    # The fields of `cost` are also attributes of the explanation.
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
        """The promised sum of the attributions: the change of F along the paths; None: the method
        promises nothing."""
        if self.method.completeness is None or self.baseline_score is None:
            return None
        return (self.score if self.end_score is None else self.end_score) - self.baseline_score

    @property
    def completeness_gap(self) -> float | None:
        """|sum of attributions - (F(x) - F(x'))| / |F(x) - F(x')|; None if F(x) = F(x'), or if the
        method promises nothing."""
        change, start = self.promised_sum, self.baseline_score
        if change is None or start is None:
            return None
        return completeness_gap(self.attribution_sum, change + start, start)

    @property
    def gap_error(self) -> float | None:
        """Standard error of the completeness gap, if baselines are drawn."""
        change = self.promised_sum
        if self.sum_error is None or change is None or self.completeness_gap is None:
            return None
        return self.sum_error / abs(change)

    @property
    def within_tolerance(self) -> bool | None:
        """Whether map error and completeness gap are below the tolerance; None: no tolerance."""
        if self.tolerance is None:
            return None
        reached = self.map_error is not None and self.map_error <= self.tolerance
        return reached and (self.completeness_gap or 0) <= self.tolerance


def completeness_gap(total: float, score: float, baseline_score: float) -> float | None:
    """The relative completeness gap; None if the two scores are equal in float32 precision."""
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
    gradient_deviation: float | None = None  # see `Explanation`
    gradient_cause: str | None = None  # see `Explanation`
    fine: torch.Tensor | None = None  # (c, h, w): the map of a layer, before it was enlarged
    score: float | None = None  # F at the image; None: F of the whole logit map
    tiles: Tiles | None = None  # None: in one piece
