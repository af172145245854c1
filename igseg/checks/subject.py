"""The input of the checks, a `Subject`: a map with everything that it explains; and their result,
an `Evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from igseg.checks.effort import COMPARED_BASELINES, Effort
from igseg.engine.engine import Crops, GradientEngine
from igseg.explanation import USER_BASELINE, Explanation
from igseg.maps import contrast
from igseg.method.baselines import baseline_pictures
from igseg.method.choice import Question
from igseg.network.facts import NetworkFacts
from igseg.network.outputs import segmentation_logits
from igseg.network.score import Score
from igseg.preprocessing import Placement, Preprocessing, strong_blur

# --------------------------------------------------------------------------- the checked map

# (network, x, baseline, target, steps) -> a map (C, H, W), like `plain_map`.
Method = Callable[..., np.ndarray]


@dataclass(frozen=True, eq=False)
class MethodOfMap:
    """A method and the map that it made. Checks must not use the method for another map."""

    make: Method
    map: np.ndarray  # (C, H, W)

    def __call__(self, *arguments: object) -> np.ndarray:
        """A map (C, H, W) of this method."""
        return self.make(*arguments)


@dataclass(frozen=True)
class NetworkCall:
    """The network that a method gets to make further maps: a function images (N, C, H, W) ->
    logits, with the module itself for methods that need its layers."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    module: nn.Module

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        return self.logits(points)


@dataclass(frozen=True)
class Subject:
    """An attribution map, and the network, input and target that it explains.

    `method` makes further maps for the checks that need them. It belongs to the map with which it
    was given: the method of `replace(subject, attributions=another)` is unknown, and
    `replace(subject, method=other)` says by which method the present map was made.
    """

    attributions: np.ndarray  # (C, H, W), signed; in units of the score, if the tool has units
    network: nn.Module  # (N, C, H, W) -> logits; in evaluation mode, no parameter gradients
    target: Score  # logits (N, K, h, w) -> (N,)
    x: torch.Tensor  # (1, C, H, W), normalised, on the network's device
    baseline: torch.Tensor  # (1, C, H, W), normalised, on the network's device
    preprocessing: Preprocessing
    region: np.ndarray  # (H, W) bool: the target region
    prediction: np.ndarray  # (H, W) bool: the predicted mask
    truth: np.ndarray | None = None  # (H, W) bool
    counted: np.ndarray | None = None  # (H, W) bool: where the truth counts; None: everywhere
    content: np.ndarray | None = None  # (H, W) bool: not letterbox padding; None: everywhere
    others: dict[str, np.ndarray] = field(default_factory=dict)  # other baselines, (H, W, C), 0-255
    batch: int = 1  # images that go through the network at once
    # A faster way to the same logits. They may be zero where the target does not depend on them.
    run: Callable[[torch.Tensor], torch.Tensor] | None = None
    method: Method | None = None  # which made the map; see `again`
    settles_early: bool = True  # whether a few steps give nearly the same map

    def __post_init__(self) -> None:
        if self.method is not None and not isinstance(self.method, MethodOfMap):
            object.__setattr__(self, 'method', MethodOfMap(self.method, self.attributions))

    @property
    def again(self) -> Method | None:
        """The method that made the present map. None: it is unknown; then the checks that need
        further maps have no result."""
        method = self.method
        if isinstance(method, MethodOfMap) and method.map is self.attributions:
            return method
        return None

    def logits(self, points: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, K, h, w)."""
        return segmentation_logits((self.run or self.network)(points), points.shape[-2:])

    def map_of(
        self, steps: int, x: torch.Tensor | None = None, baseline: torch.Tensor | None = None
    ) -> np.ndarray:
        """A map (C, H, W) by the same method: of another image, or with another baseline, if these
        are given."""
        x = self.x if x is None else x
        baseline = self.baseline if baseline is None else baseline
        network = NetworkCall(self.logits, self.network)
        assert self.again is not None  # the callers have checked this
        return self.again(network, x, baseline, self.target, steps)

    def as_input(self, pixels: np.ndarray) -> torch.Tensor:
        """An image (H, W, C), 0-255, as input of the network, (1, C, H, W)."""
        return self.preprocessing.normalise(pixels).to(self.x)

    @cached_property
    def pixels(self) -> np.ndarray:
        """The image, (H, W, C) float32, 0-255."""
        return self.preprocessing.to_pixels(self.x)

    @cached_property
    def baseline_pixels(self) -> np.ndarray:
        """The baseline, (H, W, C) float32, 0-255."""
        return self.preprocessing.to_pixels(self.baseline)

    @cached_property
    def blurred(self) -> np.ndarray:
        """The image under a strong Gaussian blur, (H, W, C) float32, 0-255."""
        return strong_blur(self.pixels)

    @cached_property
    def signed(self) -> np.ndarray:
        """(H, W) float64: the map, summed over the channels."""
        return self.attributions.sum(axis=0, dtype=np.float64)

    @cached_property
    def magnitude(self) -> np.ndarray:
        """(H, W) float64: |attribution|, summed over the channels."""
        return np.abs(self.attributions).sum(axis=0, dtype=np.float64)

    def stands_out(self, baseline: np.ndarray) -> bool:
        """Whether the target differs from a baseline (H, W, C), 0-255, more than the rest of the
        image does."""
        difference = np.abs(self.pixels - baseline).sum(axis=2)
        rest = ~(self.region | self.prediction)
        if self.content is not None:
            rest &= self.content
        ratio = contrast(difference, self.region, rest)
        return ratio is None or ratio >= 1

    def scores(self, images: Iterator[np.ndarray], bar: tqdm) -> list[float]:
        """The target score of images (H, W, C), 0-255."""
        scores: list[float] = []
        waiting: list[torch.Tensor] = []

        def flush() -> None:
            with torch.no_grad():
                scores.extend(self.target(self.logits(torch.cat(waiting)).float()).tolist())
            bar.update(len(waiting))
            waiting.clear()

        for image in images:
            waiting.append(self.as_input(image))
            if len(waiting) == self.batch:
                flush()
        if waiting:
            flush()
        return scores


@dataclass(frozen=True)
class LogitsOfTarget:
    """The logits on which the target of an explanation depends, computed by the engine."""

    engine: GradientEngine
    explanation: Explanation

    @cached_property
    def crops(self) -> Crops:
        """The crops of the target; available only while the engine runs."""
        target = (self.explanation.objective,)
        return Crops(target) if self.explanation.cropping.fell_back else self.engine.crops(target)

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        return self.engine.cropped_logits(points, self.crops)


class Explainer(Protocol):
    """The part of the user's `IntegratedGradients` that is needed here."""

    facts: NetworkFacts

    @property
    def engine(self) -> GradientEngine:
        """The engine that computes gradients of the network."""


def subject_of(
    ig: Explainer,
    input_tensor: torch.Tensor,
    explanation: Explanation,
    truth: np.ndarray | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
) -> Subject:
    """The subject of the checks of an explanation. Arguments: see `evaluate_explanation`."""
    x = ig.facts.checked(input_tensor)  # (1, C, H, W)
    fit, question = preprocessing or ig.facts.preprocessing, Question(seed=seed)
    image = fit.to_pixels(x)
    objective = explanation.objective
    target = replace(objective, weights=objective.weights.to(x.device))
    declared = explanation.method
    kinds = COMPARED_BASELINES if declared.baseline == USER_BASELINE else ()
    content = None if placement is None else placement.content(x.shape[-2:])
    return Subject(
        attributions=explanation.attributions.cpu().numpy(),
        network=ig.engine.original,
        target=target,
        x=x,
        baseline=fit.normalise(explanation.baseline_pixels).to(x),
        preprocessing=fit,
        region=explanation.region.numpy(),
        prediction=explanation.predicted_mask.numpy(),
        truth=truth,
        counted=explanation.counted,
        content=content,
        others={kind: baseline_pictures(question, kind, image, fit)[0] for kind in kinds},
        batch=ig.engine.step_batch.size,
        run=LogitsOfTarget(ig.engine, explanation),
        method=explanation.again,
        settles_early=declared.settles_early and explanation.draws == 1,
    )


@dataclass(frozen=True)
class Evaluation:
    """The results of checks; numbers that do not apply are missing or None."""

    metrics: dict[str, float | None] = field(default_factory=dict)  # by the names of METRICS
    details: dict[str, object] = field(default_factory=dict)  # curves, stages, tables, profile


# A check: (subject, effort, seed, progress) -> its results; empty where the check does not apply.
Check = Callable[[Subject, Effort, int, bool], Evaluation]


def progress_bar(name: str, total: int, progress: bool, unit: str = 'image') -> tqdm:
    """A progress bar on stderr, which disappears when it is full. progress: whether it is shown."""
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=not progress)
