"""Walking along paths; and `Task`, all that a method gets.

A method gets one image, its targets, its baselines and an engine, and gives a `MethodResult` for
each target. Most methods name paths, and `Task.walk` integrates along these: to a tolerance where
the user wants one, in reduced precision where that is accurate enough, in step batches, for all
targets together. Other methods ask for single gradients or scores (`Task.gradients`,
`Task.scores`), which go through the network in step batches too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from igseg.engine.engine import CHECKED_NODES, Crops, GradientEngine
from igseg.engine.graph import NetworkGraph
from igseg.engine.preparation import reduced_dtype
from igseg.engine.sampler import AtImage, AttributionPath, PathSampler
from igseg.errors import InputError, NonFiniteError, attempt
from igseg.explanation import MethodResult, Trend, completeness_gap
from igseg.method.integral import MeanIntegral, PathIntegral, integrate_targets
from igseg.method.rules import AnyRule, Integration, Stratified, first_nodes
from igseg.network.description import NetworkDescription
from igseg.network.kinds import Place
from igseg.network.outputs import OutOfMemory, out_of_memory_is_one_error
from igseg.network.score import Score

# Between the ends of a path a few whole logit maps are computed, to follow the predicted mask: at
# most MOST_MASKS, and they cost at most MASK_SHARE of the computation for the path. A forward pass
# costs about FORWARD_SHARE of a gradient.
MASK_SHARE = 0.05
FORWARD_SHARE = 0.4
MOST_MASKS = 3

# Whether the gradient describes the score is measured at nodes near these places of a path, by
# central differences of so small a part of the path that kinks (of ReLU) hardly matter.
GRADIENT_PLACES = (0.25, 0.5, 0.75)
GRADIENT_STEP = 1e-4
CLEAR_DEVIATION = 0.02  # up to which a single node is enough
SCORE_ROUNDING = 5e-6  # rounding error of F in single precision, relative to the largest |F|
# A change of the score between two nodes that the gradient misses counts if it is so much larger
# than the estimated error of the map, and than this share of all changes of the score; and if it
# stays when its interval is bisected so often. Then more nodes would not find it.
BEYOND_MAP_ERROR = 3.0
LEAST_MISSED_SHARE = 0.05
BISECTIONS = 8

Result = TypeVar('Result')


@dataclass(frozen=True)
class Walk:
    """The integrals along all paths of one image."""

    means: list[MeanIntegral]  # of each target
    sampler: PathSampler  # of the first path
    starts: list[torch.Tensor]  # F at the start of each path, (targets,) each
    ends: list[torch.Tensor]  # F at the end of each path, (targets,) each
    reduced: torch.dtype | None  # reduced precision; None: the precision of the network
    deviation: float  # of the map from float32, where precision is reduced
    # Of each target: how far the gradient misses the change of the score; None: not measured.
    gradient_deviations: list[float] | None = None

    def results(self) -> list[MethodResult]:
        """The mean over the paths, for each target."""
        return [self.result_of(t, mean.integral[0], mean.uncertainty, mean.summed_uncertainty)
                for t, mean in enumerate(self.means)]  # fmt: skip

    def result_of(
        self,
        number: int,
        attributions: torch.Tensor,
        uncertainty: torch.Tensor | None,
        summed: torch.Tensor | None,
    ) -> MethodResult:
        """The result for one target.

        number: of the target. attributions: its map (C, H, W), made from its integrals.
        uncertainty: the estimated error of the map, (1, C, H, W). summed: the same for the sum over
        the channels, (1, H, W)."""
        attributions = attributions.clone()  # a slice would keep the maps of all targets in memory
        rounding = self.deviation if self.reduced else 0.0
        # Both errors are unknown if the error by rounding is unknown.
        error: float | None = None
        summed_error: torch.Tensor | None = None
        if uncertainty is not None and summed is not None and math.isfinite(rounding):
            error = math.hypot(float(uncertainty[0].norm() / attributions.norm()), rounding)
            size = attributions.sum(dim=0).square().mean().sqrt()  # root mean square of the pixels
            summed_error = summed[0].hypot(rounding * size).cpu()
        sum_variance = self.means[number].sum_variance
        return MethodResult(
            attributions,
            self.means[number].evaluations,
            trend_of(self.sampler, number),
            start_score=_mean_of(self.starts, number),
            end_score=_mean_of(self.ends, number),
            map_error=error if error is None or math.isfinite(error) else None,
            uncertainty=summed_error,
            total_error=None if sum_variance is None else float(sum_variance[0]) ** 0.5,
            reduced=self.reduced,
            deviation=self.deviation if self.reduced else None,
            gradient_deviation=None if self.gradient_deviations is None
            else self.gradient_deviations[number],
        )  # fmt: skip


def _mean_of(scores: Sequence[torch.Tensor], number: int) -> float:
    return float(np.mean([float(row[number]) for row in scores]))


# --------------------------------------------------------------------------- the task of a method


@dataclass(frozen=True)
class Task:
    """One image to explain, its targets and baselines, and the engine."""

    engine: GradientEngine
    at_image: AtImage
    baselines: Sequence[torch.Tensor]  # (1, C, H, W) each
    integration: Integration
    overlap: Callable[[torch.Tensor], torch.Tensor]  # logits (N, K, h, w) -> (N,), of the mask
    references: torch.Tensor | None = None  # (n, C, H, W): other images
    on_steps: Callable[[int], object] = lambda count: None  # called with the number of steps done
    pixels_of_pass: int | None = None  # of the network's input, if x is the output of a layer
    place: Place | None = None  # where x lies in the image, if it is the output of a layer
    checks_gradient: bool = True  # whether to measure how far the gradient misses the score

    @property
    def x(self) -> torch.Tensor:
        """The image, (1, C, H, W)."""
        return self.at_image.x

    @property
    def pixels(self) -> int:
        """The number of pixels of the network's input, on which the cost of a pass depends."""
        return self.pixels_of_pass or self.x.shape[-2] * self.x.shape[-1]

    def sampler(self, path: AttributionPath) -> PathSampler:
        """The densities along a path, for methods that sum them without a rule. Scores and masks at
        both ends are logged."""
        sampler = PathSampler(self.engine, path, self.at_image, self.overlap, self.on_steps)
        sampler.see_the_ends(density_at_start=False)
        self.engine.step_batch.start(self.pixels)
        return sampler

    def walk(
        self,
        paths: Iterable[AttributionPath],
        rule: AnyRule | None = None,
        complete: bool = True,
        second: bool = False,
    ) -> Walk:
        """Integrate along paths, one after the other, and average.

        rule: by default that of `integration`. complete: whether the sum of a map must equal the
        change of the score; a tolerance then applies to this too. second: see `MeanIntegral`.
        """
        integration, rule = self.integration, self.integration.rule if rule is None else rule
        refined = integration.tolerance is not None
        nodes = first_nodes(rule, integration.steps, refined)
        means = [MeanIntegral(second=second) for _ in self.at_image.targets]
        starts, ends, at_image = [], [], self.at_image
        first: PathSampler | None = None
        reduced: torch.dtype | None = None
        deviation = 0.0
        for path in paths:
            if path.image is self.x and at_image.gradient is None and nodes[-1] == 1:
                at_image = self._with_gradient(at_image)  # which several paths share
            sampler = PathSampler(self.engine, path, at_image, self.overlap, self.on_steps)
            sampler.see_the_ends(density_at_start=bool(nodes[0] == 0))
            if first is None:
                first = sampler
                share = at_image.crops.cropping.computed_share if at_image.crops else 1.0
                planned = len(nodes) if refined else integration.steps
                sampler.see_maps(mask_nodes(nodes, planned, share))
                reduced, deviation = self._choose_precision(sampler, nodes)
                self.engine.step_batch.start(self.pixels, reduced)
            sampler.reduced = reduced
            rounding = deviation if reduced else 0.0
            enough = None
            if integration.tolerance is not None:
                enough = partial(exact_enough, integration.tolerance, rounding, complete, sampler)
            integrals = integrate_targets(sampler.some, len(means), rule, integration.steps, enough)
            for mean, integral in zip(means, integrals, strict=True):
                mean.add(integral)
            starts.append(sampler.scores[0.0])
            ends.append(sampler.scores[1.0])
        assert first is not None  # a method names a path
        walk = Walk(means, first, starts, ends, reduced, deviation)
        if not self.checks_gradient:
            return walk
        jumps = isinstance(rule, Stratified)  # to another baseline at each node
        errors = [None if jumps else result.map_error or 0.0 for result in walk.results()]
        return replace(walk, gradient_deviations=deviations_aside(first, errors))

    def _with_gradient(self, at_image: AtImage) -> AtImage:
        """The results at the image, with the gradient of every target."""
        x, crops = at_image.x, at_image.crops or Crops(tuple(at_image.targets))
        # With velocity 1; each path that ends at the image multiplies by its velocity.
        gradient = self.engine.look(x, torch.ones_like(x), crops, alphas=(1.0,))[2][0]
        return replace(at_image, gradient=gradient)

    def _choose_precision(
        self, sampler: PathSampler, nodes: np.ndarray
    ) -> tuple[torch.dtype | None, float]:
        """The reduced type and the deviation of the map from float32. The type is None if the user
        wants none, or if it is not accurate enough, or not possible, and the user leaves the choice
        (`auto`). Raises InputError if a type that the user names is not possible.

        nodes: the nodes that are always evaluated."""
        integration = self.integration
        reduced = reduced_dtype(integration.precision, self.engine.device)
        if reduced is None or self.engine.dtype != torch.float32:
            return None, 0.0
        rows = {int(np.abs(nodes - alpha).argmin()) for alpha in CHECKED_NODES}
        try:
            deviation = sampler.check_precision(reduced, [float(nodes[k]) for k in sorted(rows)])
        except NonFiniteError:
            raise
        except InputError as error:  # an operation of the network does not know this type
            if integration.precision != 'auto':
                raise InputError(
                    f'precision {integration.precision}, which the network does not take (leave it '
                    f'out): {error}'
                ) from None
            return None, 0.0
        limit = min(integration.precision_tolerance, (integration.tolerance or 1.0) / 2)
        refused = integration.precision == 'auto' and not deviation <= limit  # also where it is NaN
        return None if refused else reduced, deviation

    def crops_of(self, target: int) -> Crops:
        """The crops of one target."""
        all_crops = self.at_image.crops
        targets = (self.at_image.targets[target],)
        if all_crops is None or all_crops.cropping.fell_back:
            return Crops(targets)
        return self.engine.crops(targets)

    def gradients(
        self, points: torch.Tensor, target: int, alphas: Sequence[float] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """F of a target at points (n, C, H, W), (n,), and its gradients there, (n, C, H, W)."""
        _, scores, densities = self.engine.look(
            points, torch.ones_like(points[:1]), self.crops_of(target), alphas=alphas
        )
        return scores[:, 0], densities[:, 0]

    def scores(self, points: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """F of every target, (targets,), at each of many points (1, C, H, W). The points go through
        the network in step batches, without gradients."""
        batch = self.engine.step_batch
        crops = self.at_image.crops or Crops(tuple(self.at_image.targets))
        batch.start(self.pixels)
        waiting: list[torch.Tensor] = []
        points = iter(points)
        while True:
            while len(waiting) < batch.size and (point := next(points, None)) is not None:
                waiting.append(point)
            if not waiting:
                return
            chunk = waiting[: batch.size]

            def evaluate(chunk: list[torch.Tensor] = chunk) -> torch.Tensor:
                with batch.timed(len(chunk)), out_of_memory_is_one_error(), torch.no_grad():
                    maps = self.engine.maps(torch.cat(chunk), crops.plan)
                    return torch.stack(crops.scores(maps), dim=1)  # (n, targets)

            scores, _ = attempt(evaluate, OutOfMemory)
            if scores is None:
                batch.halve()
                continue
            waiting = waiting[len(chunk) :]
            self.on_steps(len(chunk))
            yield from scores


def plain_task(
    network: Callable[[torch.Tensor], torch.Tensor],
    module: torch.nn.Module,
    x: torch.Tensor,
    baseline: torch.Tensor,
    target: Score,
    integration: Integration,
    references: torch.Tensor | None = None,
) -> Task:
    """The task of making the map of one target with a network as it is, without a graph of it.

    network: images (N, C, H, W) -> logits; module: the same as a module. x, baseline: (1, C, H, W).
    """
    engine = GradientEngine(module, x.device, None)
    engine.network = network
    with torch.no_grad():
        logits = engine.run(x)
    at_image = AtImage(x, logits, (target,), None)
    return Task(engine, at_image, [baseline], integration, _no_overlap, references,
                checks_gradient=False)  # fmt: skip


def _no_overlap(logits: torch.Tensor) -> torch.Tensor:
    return torch.full((len(logits),), torch.nan)


def in_precision(compute: Callable[[str], Result], precision: str) -> tuple[Result, str | None]:
    """The result of `compute` in the precision that the user wants, and None. Where that precision
    overflows: the result in float32, and a sentence that says why."""
    if precision == 'float32':
        return compute(precision), None
    result, overflow = attempt(partial(compute, precision), NonFiniteError)
    if result is not None:
        return result, None
    wanted_precision = 'reduced precision' if precision == 'auto' else precision
    return compute('float32'), f'computed again in float32, since in {wanted_precision} {overflow}'


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type, as in PRECISIONS."""
    return str(dtype).removeprefix('torch.')


def mask_overlap(
    mask: torch.Tensor, network: NetworkDescription, threshold: float, logits: torch.Tensor
) -> torch.Tensor:
    """Logits (N, K, h, w) -> (N,): IoU of their predicted masks with the mask (h, w)."""
    masks = network.foreground(network.predicted(logits, threshold))
    both = (masks & mask).sum(dim=(1, 2))
    union = (masks | mask).sum(dim=(1, 2))
    return torch.where(union > 0, both / union, 1.0)


def exact_enough(
    tolerance: float,
    rounding: float,
    complete: bool,
    sampler: PathSampler,
    number: int,
    running: PathIntegral,
) -> bool:
    """Whether the map error of a target is below the tolerance; also its completeness gap, if the
    map must be complete.

    rounding: error of the map by reduced precision. number: of the target. running: its integral.
    """
    errors = running.relative_errors()
    if errors is None:
        return False
    ends = (sampler.scores[1.0][number], sampler.scores[0.0][number])
    error, total, high, low = torch.stack([errors[0], running.integral.sum(), *ends]).tolist()
    gap = (completeness_gap(total, high, low) or 0.0) if complete else 0.0
    return math.hypot(error, rounding) <= tolerance and gap <= tolerance


# --------------------------------------------------------------------------- gradient and score


def deviations_aside(
    sampler: PathSampler, map_errors: Sequence[float | None]
) -> list[float] | None:
    """`gradient_deviations`, neither logged nor counted. None: the network is not finite somewhere
    on the path, where the method itself may never be."""
    with sampler.aside():
        return attempt(partial(gradient_deviations, sampler, map_errors), NonFiniteError)[0]


def gradient_deviations(sampler: PathSampler, map_errors: Sequence[float | None]) -> list[float]:
    """How far the gradient misses the change of the score of each target, relative to that change;
    near 0 for a network whose gradient is that of its score.

    The larger of two measures. At three nodes: the median difference between the slope by the
    gradient and that by a central difference, which finds parts of a network that pass no gradient
    or another one. Between nodes: the change that more nodes would not find (`_missed_share`),
    which finds rounding and signs, that small differences do not see. map_errors: the relative
    errors of the maps; None: the second measure says nothing on this path.
    """
    nodes = _checked_nodes(sampler)
    network = sampler.engine.network
    # Where no operation stops a gradient, a single node is enough, unless it deviates.
    clear = isinstance(network, NetworkGraph) and not network.stops_gradients
    deviations = _slope_deviations(sampler, nodes[len(nodes) // 2 :][:1] if clear else nodes)
    if clear and not (deviations <= CLEAR_DEVIATION).all():
        deviations = _slope_deviations(sampler, nodes)
    medians: list[float] = np.median(deviations, axis=0).tolist()
    if getattr(sampler.path, 'unit', False):  # the slopes are not those of the path
        return medians
    missed = [0.0 if error is None else _missed_share(sampler, target, error)
              for target, error in enumerate(map_errors)]  # fmt: skip
    return [max(pair) for pair in zip(medians, missed, strict=True)]


def _slope_deviations(sampler: PathSampler, nodes: Sequence[float]) -> np.ndarray:
    """The relative differences between the slopes by the gradient and by central differences,
    beyond rounding: (nodes, targets)."""
    measured = sampler.measured_slopes(nodes, GRADIENT_STEP).numpy()
    slopes = torch.stack([sampler.slopes[node] for node in nodes]).cpu().double().numpy()
    scores = torch.stack(list(sampler.scores.values())).cpu().double().abs().nan_to_num(0.0)
    noise = SCORE_ROUNDING * scores.amax(dim=0).numpy() / GRADIENT_STEP
    larger = np.maximum(np.abs(measured), np.abs(slopes))
    beyond = np.maximum(np.abs(measured - slopes) - noise, 0)
    relative: np.ndarray = np.divide(beyond, larger, out=np.zeros_like(beyond), where=larger > 0)
    return relative


def _checked_nodes(sampler: PathSampler) -> list[float]:
    """Three nodes near GRADIENT_PLACES at which the slope of every target is known."""
    inner = [alpha for alpha, row in sampler.slopes.items() if 0 < alpha < 1]
    known = [alpha for alpha in inner if not bool(sampler.slopes[alpha].isnan().any())]
    if len(known) < len(GRADIENT_PLACES):
        for alpha in GRADIENT_PLACES:
            sampler.look_between(alpha)
        return list(GRADIENT_PLACES)
    return sorted({min(known, key=lambda alpha: abs(alpha - place)) for place in GRADIENT_PLACES})


def _missed_share(sampler: PathSampler, target: int, map_error: float) -> float:
    """The share of the changes of a score between nodes that the gradient misses, if it stays when
    the interval that misses most is bisected again and again; else 0."""

    def at(alpha: float) -> tuple[float, float, float]:
        return (alpha, float(sampler.scores[alpha][target]), float(sampler.slopes[alpha][target]))

    def missed(left: tuple[float, float, float], right: tuple[float, float, float]) -> float:
        """The change of F beyond that by the trapezoid rule."""
        return right[1] - left[1] - (right[0] - left[0]) * (left[2] + right[2]) / 2

    both = sorted(sampler.scores.keys() & sampler.slopes.keys())
    nodes = [node for node in map(at, both) if math.isfinite(node[1]) and math.isfinite(node[2])]
    if len(nodes) < 2:
        return 0.0
    changes = sum(abs(right[1] - left[1]) for left, right in pairwise(nodes))
    total = sum(abs(missed(*ends)) for ends in pairwise(nodes))
    if not changes or total <= max(LEAST_MISSED_SHARE, BEYOND_MAP_ERROR * map_error) * changes:
        return 0.0
    left, right = max(pairwise(nodes), key=lambda ends: abs(missed(*ends)))
    first, elsewhere = abs(missed(left, right)), 0.0
    for _ in range(BISECTIONS):
        middle = (left[0] + right[0]) / 2
        sampler.look_between(middle)
        halves = sorted(((left, at(middle)), (at(middle), right)),
                        key=lambda ends: abs(missed(*ends)))  # fmt: skip
        elsewhere += abs(missed(*halves[0]))
        left, right = halves[1]
        if elsewhere + abs(missed(left, right)) <= first / 2:
            return 0.0
    return total / changes


# --------------------------------------------------------------------------- what a path logs


def mask_nodes(nodes: np.ndarray, steps: int, share: float) -> list[float]:
    """The nodes between the ends at which the predicted mask is computed too, on a cropped path.
    They are few and spread evenly, since each costs a forward pass of the whole network. On a path
    without crops the list is empty, since the mask is computed at every node anyway.

    nodes: the nodes that are always evaluated. steps: of the path. share: cost of a cropped
    gradient, relative to that of a whole gradient.
    """
    count = min(MOST_MASKS, int(MASK_SHARE * steps * share / FORWARD_SHARE))
    if share == 1:
        return []
    places = (np.arange(count) + 1) / (count + 1)
    return sorted({float(nodes[np.abs(nodes - place).argmin()]) for place in places})


def trend_of(sampler: PathSampler, number: int) -> Trend:
    """The trend of one target along a path, at the nodes where the target was evaluated."""
    scores = {alpha: float(sampler.scores[alpha][number]) for alpha in sorted(sampler.scores)}
    alphas = [alpha for alpha, score in scores.items() if not math.isnan(score)]
    overlaps = sampler.overlaps
    return Trend(
        tuple(alphas),
        tuple(scores[alpha] for alpha in alphas),
        tuple(float(overlaps[alpha]) if alpha in overlaps else None for alpha in alphas),
    )
