"""The methods of attribution: Integrated Gradients, its variants, and methods to compare with.

A method is a class, and the row of METHODS (in `choice`) that names the class. The row declares
what the method promises (see `Declared`: completeness, a quadrature, a baseline, …); statistics,
figures, checks and resume depend on nothing else. It also lists the options, which are fields of
the class. The class turns a `Task` (an image, its targets, its baselines, an engine) into a result
for each target. Most classes only name paths; `Task.walk` does the rest: the integral along the
paths, its error, precision, batches and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import nn

from igseg.engine.memory import widest_type
from igseg.engine.sampler import AttributionPath, PathSampler
from igseg.errors import InputError
from igseg.explanation import (
    NOTHING_SEEN,
    Declared,
    MethodResult,
    Trend,
)
from igseg.method.layers import at_layer, enlarged_sum, layer_named
from igseg.method.method import Method, Multiplied, PathMethod
from igseg.method.paths import BlurPath, DrawnPath, StraightPath, UnitVelocity
from igseg.method.rules import MethodRule, Rule, Stratified
from igseg.method.walk import Task, trend_of
from igseg.network.kinds import Place
from igseg.network.outputs import fitted

# One gradient, at the image: no integral.
AT_IMAGE = Rule('at the image', np.ones(1), np.ones(1), degree=0)


# --------------------------------------------------------------------------- integrals along paths


@dataclass(frozen=True, kw_only=True)
class IntegratedGradientsMethod(Multiplied):
    """`ig`: Sundararajan, Taly, Yan 2017, eq. 1."""

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """A path from each baseline."""
        for baseline in task.baselines:
            yield self._along(StraightPath(baseline, task.x))


@dataclass(frozen=True, kw_only=True)
class SmoothMethod(Multiplied):
    """`smooth`: Smilkov et al. 2017, section 3, on ig."""

    samples: int
    noise: float
    kind: str

    @property
    def declares(self) -> Declared:
        """Only the sum of the mean is known: it is the mean change of the score."""
        if self.kind == 'mean':
            return super().declares
        return replace(self.declared, completeness=None, signed=False)

    @property
    def _copies(self) -> int:
        return self.samples

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """A path from each baseline to each noisy copy."""
        spread = self.noise * float(task.x.max() - task.x.min())
        generator = torch.Generator().manual_seed(task.integration.seed)
        for _ in range(self.samples):
            noise = torch.randn(task.x.shape, generator=generator).to(task.x)
            for baseline in task.baselines:
                yield self._along(StraightPath(baseline, task.x + spread * noise))

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`."""
        if self.kind == 'mean':
            return super().explain(task)
        walk = task.walk(self.paths(task), complete=False, second=True)
        results = []
        for number, mean in enumerate(walk.means):
            moment, error = mean.second_moment(about_mean=self.kind == 'variance')
            summed = None if error is None else error.sum(dim=1)  # an upper bound
            results.append(walk.result_of(number, moment[0], error, summed))
        return results


@dataclass(frozen=True, kw_only=True)
class ExpectedMethod(PathMethod):
    """`expected`: Erion et al. 2021, eq. 3."""

    references: int

    @property
    def most_references(self) -> int:
        """See `Method`."""
        return self.references

    def rule(self, seed: int) -> MethodRule:
        """Random steps, two in each of equal strata, from which the standard error is estimated."""
        return Stratified(seed)

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        return None if task.integration.tolerance is not None else task.integration.steps

    def baseline(self, task: Task) -> tuple[str, torch.Tensor]:
        """The mean of the other images."""
        references = _references(task)
        name = f'{len(references)} other image{"" if len(references) == 1 else "s"}'
        return name, references.mean(dim=0, keepdim=True)

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """One path, which starts at another image for every step."""
        yield DrawnPath(_references(task), task.x, task.integration.seed)


def _references(task: Task) -> torch.Tensor:
    """The other images, (n, C, H, W)."""
    assert task.references is not None  # the method asks for references
    return task.references


@dataclass(frozen=True, kw_only=True)
class BlurMethod(PathMethod):
    """`blur`: Xu, Venugopalan, Sundararajan 2020, eq. 5."""

    sigma: float

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        return None if task.integration.tolerance is not None else task.integration.steps

    def baseline(self, task: Task) -> tuple[str, torch.Tensor]:
        """The most blurred image."""
        path = self._path(task)
        return f'blurred (sigma {path.sigma:.3g} px)', path.at(task.x.new_zeros(1))[0]

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """One path."""
        yield self._path(task)

    def _path(self, task: Task) -> BlurPath:
        return BlurPath(task.x, self.sigma * max(task.x.shape[-2:]))


# --------------------------------------------------------------------------- other sums of steps


@dataclass(frozen=True, kw_only=True)
class IdgiMethod(Method):
    """`idgi`: Yang, Wang, Bilgic 2023, alg. 1."""

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        return task.integration.steps * len(task.baselines)

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`; the sum is F(x) - F(x'), since the changes of F over all steps add up to
        that."""
        steps, starts = task.integration.steps, []
        nothing = total = task.x.new_zeros(())
        first: PathSampler | None = None
        nodes = np.arange(steps) / steps
        for baseline in task.baselines:
            sampler = task.sampler(UnitVelocity(StraightPath(baseline, task.x)))
            first, before, share = first or sampler, 0.0, nothing  # no step lies behind 0
            for alpha, gradients in zip(nodes.tolist(), sampler(nodes), strict=True):
                total = total + share * _rise(sampler, before, alpha)
                before, share = alpha, _shares(gradients)
            total = total + share * _rise(sampler, before, 1.0)
            starts.append(sampler.scores[0.0])
        assert first is not None  # there is a baseline
        maps, start = total / len(task.baselines), torch.stack(starts).mean(dim=0)
        return [MethodResult(maps[t].clone(), steps, trend_of(first, t), float(start[t]))
                for t in range(len(maps))]  # fmt: skip


def _shares(gradients: torch.Tensor) -> torch.Tensor:
    """The squares of gradients (targets, C, H, W), divided by their sum for each target; all 0
    where all gradients are."""
    largest = gradients.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(gradients.dtype).tiny)
    # Scaled first: the squares of small gradients would underflow.
    squares = (gradients / largest.view(-1, 1, 1, 1)).square()
    sums = squares.flatten(1).sum(dim=1).clamp(min=torch.finfo(gradients.dtype).tiny)
    return squares / sums.view(-1, 1, 1, 1)


def _rise(sampler: PathSampler, start: float, end: float) -> torch.Tensor:
    """How much F of each target rises between two nodes, (targets, 1, 1, 1)."""
    return (sampler.scores[end] - sampler.scores[start]).view(-1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class GuidedMethod(Method):
    """`guided`: Kapishnikov et al. 2021, alg. 1."""

    fraction: float
    max_dist: float

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        paths = len(task.baselines) * len(task.at_image.targets)
        return (task.integration.steps + 1) * paths

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`; each target has another path."""
        results = []
        for number in range(len(task.at_image.targets)):
            walks = [self._walk(task, baseline, number) for baseline in task.baselines]
            maps, scores = [walk[0] for walk in walks], [walk[1] for walk in walks]
            alphas = tuple(k / task.integration.steps for k in range(task.integration.steps + 1))
            trend = Trend(alphas, tuple(scores[0]), (None,) * len(alphas))
            start = float(np.mean([walk_scores[0] for walk_scores in scores]))
            mean = torch.stack(maps).mean(dim=0)
            results.append(MethodResult(mean.to(task.x), task.integration.steps, trend, start))
        return results

    def _walk(
        self, task: Task, baseline: torch.Tensor, target: int
    ) -> tuple[torch.Tensor, list[float]]:
        """The map (C, H, W) of one path, and F at the start of every step and at the end."""
        steps, change = task.integration.steps, task.x - baseline
        exact = widest_type(change.device)
        change = change.to(exact)
        progress = torch.zeros_like(change)  # of each input, from 0 (baseline) to 1 (image)
        total, scores = torch.zeros_like(change), []
        last_change = torch.zeros_like(change)  # of the inputs, in the last step
        for step in range(steps + 1):
            point = (baseline + progress * change).to(task.x)
            score, gradient = task.gradients(point, target, (step / steps,))
            scores.append(float(score))
            # The paper takes the gradient at the start of a step. This is the mean of the gradients
            # at both ends (trapezoid rule): the path is the same, and the sum is exact to second
            # order.
            total += gradient * last_change / 2
            if step < steps:
                moved = guided_step(progress, change.abs(), gradient.abs().to(exact),
                                    (step + 1) / steps, self.fraction, self.max_dist)  # fmt: skip
                last_change, progress = (moved - progress) * change, moved
                total += gradient * last_change / 2
            task.on_steps(1)
        return total[0], scores


def guided_step(
    progress: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    alpha: float,
    fraction: float,
    max_dist: float,
) -> torch.Tensor:
    """The progress of every input when all inputs together have made the share alpha of their way.

    progress: of each input, from 0 to 1. weight: the length of its way. gradient: its magnitude.
    After the step no input lies below alpha - max_dist or above alpha + max_dist. The inputs with
    the least gradient move first, a fraction of all inputs at a time, until the way is made.
    """
    low, high = max(alpha - max_dist, 0.0), min(alpha + max_dist, 1.0)
    progress = progress.clamp(min=low)
    count = int(fraction * (progress.numel() - 1)) + 1
    whole = float(weight.sum())
    remaining = whole * alpha - float((weight * progress).sum())  # of the way
    movable = (weight > 0) & (progress < high)
    while remaining > 1e-9 * whole:
        candidates = gradient[movable]
        if not candidates.numel():
            break
        threshold = candidates.kthvalue(min(count, candidates.numel())).values
        chosen = movable & (gradient <= threshold)
        room = float((weight * (high - progress))[chosen].sum())
        share = min(1.0, remaining / room) if room > 0 else 1.0
        progress = torch.where(chosen, progress + share * (high - progress), progress)
        remaining -= share * room
        movable &= ~chosen
    return progress


# --------------------------------------------------------------------------- inside the network


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """`layer`: Sundararajan, Taly, Yan 2017, at a layer."""

    layer: str

    @property
    def declares(self) -> Declared:
        """See `Method`."""
        return replace(self.declared, name=f'{self.declared.name}:{self.layer}')

    def check_network(self, model: nn.Module, x: torch.Tensor) -> None:
        """See `Method`; this costs a forward pass only for a name that is no module's, as that of a
        stage."""
        if self.layer not in dict(model.named_modules()):
            layer_named(model, x, self.layer)

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`; the sum over the layer is complete."""
        with at_layer(task, self.layer) as layer_task:
            paths = (StraightPath(baseline, layer_task.x) for baseline in layer_task.baselines)
            results = layer_task.walk(paths).results()
            size, place = task.x.shape[-2:], layer_task.place
            return [_at_size(result, size, place) for result in results]


def _at_size(result: MethodResult, size: Sequence[int], place: Place | None) -> MethodResult:
    """The result at a layer, enlarged to the size (H, W) of the image, where it lies at `place`."""
    fine, uncertainty = result.attributions, result.uncertainty
    return replace(
        result,
        attributions=enlarged_sum(fine.sum(dim=0, keepdim=True), size, place),
        uncertainty=None
        if uncertainty is None
        else enlarged_sum(uncertainty[None], size, place)[0],
        total=float(fine.cpu().double().sum()),
        fine=fine.cpu(),
    )


@dataclass(frozen=True, kw_only=True)
class GradCamMethod(LayerMethod):
    """`gradcam`: Selvaraju et al. 2017, eq. 1 and 2; of a region: Vinogradova et al. 2020."""

    counts = 'gradients'

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`."""
        with at_layer(task, self.layer, baselines=False) as layer_task:
            path = UnitVelocity(StraightPath(layer_task.x, layer_task.x))
            gradients = layer_task.walk([path], AT_IMAGE, complete=False).means
            results = []
            for mean in gradients:
                weights = mean.integral[0].mean(dim=(1, 2), keepdim=True)  # (c, 1, 1)
                layer_map = (weights * layer_task.x[0]).sum(dim=0, keepdim=True).relu()  # (1, h, w)
                enlarged = fitted(layer_map[None], task.x.shape[-2:], layer_task.place)[0]
                results.append(MethodResult(enlarged, 1, fine=layer_map.cpu()))
        return results


# --------------------------------------------------------------------------- to compare with


@dataclass(frozen=True, kw_only=True)
class GradientMethod(PathMethod):
    """`gradient`: Simonyan, Vedaldi, Zisserman 2013, section 3."""

    counts = 'gradients'

    def steps_in_all(self, task: Task) -> int:
        """See `Method`."""
        return 1

    def rule(self, seed: int) -> MethodRule:
        """A single gradient."""
        return AT_IMAGE

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """A path that stays at the image."""
        yield UnitVelocity(StraightPath(task.x, task.x))

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`."""
        return [replace(result, trend=NOTHING_SEEN, start_score=None, end_score=None)
                for result in super().explain(task)]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InputTimesGradient(PathMethod):
    """`input_x_gradient`: Shrikumar et al. 2016, section 2, from a baseline."""

    counts = 'gradients'

    def steps_in_all(self, task: Task) -> int:
        """See `Method`."""
        return len(task.baselines)

    def rule(self, seed: int) -> MethodRule:
        """A single gradient."""
        return AT_IMAGE

    def paths(self, task: Task) -> Iterator[AttributionPath]:
        """A path from each baseline, evaluated at its end only."""
        for baseline in task.baselines:
            yield StraightPath(baseline, task.x)


@dataclass(frozen=True, kw_only=True)
class OcclusionMethod(Method):
    """`occlusion`: Zeiler, Fergus 2014, section 4.2."""

    counts = 'squares'
    uses_gradients = False

    window: int | None
    stride: int | None

    def windows(self, size: Sequence[int]) -> list[tuple[slice, slice]]:
        """All squares on an image (H, W), row by row; the last ones are cut off at its border.
        Raises InputError if squares are too large, or leave pixels between them."""
        window = self.window or max(1, max(size) // 8)
        stride = self.stride or max(1, window // 2)
        if window > max(size):
            raise InputError(
                f'the window {window} of occlusion is larger than the input of {size[1]}×{size[0]} '
                '(use a smaller window)'
            )
        if stride > window:
            raise InputError(
                f'the stride {stride} of occlusion is more than its window {window}: pixels '
                'between would get nothing (use a smaller stride)'
            )
        spans = [
            [slice(s, s + window) for s in range(0, max(1, side - window + stride), stride)]
            for side in size
        ]
        return list(product(*spans))

    def steps_in_all(self, task: Task) -> int | None:
        """See `Method`."""
        return len(self.windows(task.x.shape[-2:])) * len(task.baselines)

    def explain(self, task: Task) -> list[MethodResult]:
        """See `Method`."""
        places = self.windows(task.x.shape[-2:])
        full = torch.stack([target(task.at_image.logits)[0] for target in task.at_image.targets])
        total = task.x.new_zeros((len(full), 1, *task.x.shape[-2:]))
        count = torch.zeros_like(total)
        for baseline in task.baselines:
            covered = (_covered(task.x, baseline, place) for place in places)
            for place, scores in zip(places, task.scores(covered), strict=True):
                index = (..., *place)
                total[index] += (full - scores).view(-1, 1, 1, 1)
                count[index] += 1
        return [MethodResult(attributions, len(places)) for attributions in total / count]


def _covered(x: torch.Tensor, baseline: torch.Tensor, place: tuple[slice, slice]) -> torch.Tensor:
    """An image (1, C, H, W) with a part of the baseline laid over it."""
    x, index = x.clone(), (..., *place)
    x[index] = baseline[index]
    return x
