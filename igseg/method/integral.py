"""The integral along the path: where to evaluate the gradient, and the error of the result.

Integrated Gradients is the integral over alpha in [0, 1] of the *density*

    a(alpha) = (x - x') * dF/dx at x' + alpha (x - x')        (*: pixel by pixel)

(on other paths than the straight one: velocity times gradient).

A *rule* says at which nodes the density is evaluated and with which weights it is summed:

    fixed     nodes and weights are known beforehand (`FIXED_RULES` in igseg/method/rules.py)
    nested    such a rule, refined level by level until the error is small; each level reuses the
              densities of the levels before
    adaptive  intervals are bisected where the density changes most, and summed by the trapezoid
              rule
    random    nodes are drawn, two in each of equal strata (`Stratified`), for densities that are
              random too; the error is then the standard error

The *error of the map* is estimated from the same densities, interval by interval. There are two
estimates of the trapezoid rule's error on an interval of length h with densities a, b at its ends:

    bound       at most h/2 |b - a|, if the density of a pixel only rises or only falls
    curvature   the difference between two neighbouring intervals and one interval over both

The smaller estimate is used for each interval: at a jump this is the bound, where the density is
smooth the curvature. The errors of intervals are taken to be independent, so their squares are
summed. Where the density is smooth, the errors of neighbouring intervals have the same sign;
therefore a third of the summed differences (Richardson) is added.

All this is computed twice: for each attribution, and for their sum over the channels, since the
error of a sum is not the sum of the errors. This file is mathematics only: `evaluate` turns nodes
into densities, and no network occurs here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from igseg.method.rules import (
    ADAPTIVE,
    FIXED_RULES,
    AnyRule,
    Rule,
    Stratified,
    first_rule,
    midpoint_rule,
    nested_counts,
)

BISECTED_SHARE = 4  # each round bisects one of 4 intervals, so that a GPU gets batches

# Intervals that may still be bisected keep the densities at their ends. There are at most so many,
# and of so many bytes; the intervals with the smallest errors are never bisected then.
MAX_OPEN_INTERVALS = 128
MAX_OPEN_BYTES = 256 * 2**20

# alphas -> the densities there, (targets, C, H, W), one after the other
Evaluate = Callable[[np.ndarray], Iterable[torch.Tensor]]

# alphas, each with the numbers of targets -> the densities of these, one alpha after the other
EvaluateSome = Callable[[Sequence[tuple[float, tuple[int, ...]]]], Iterable[torch.Tensor]]


# --------------------------------------------------------------------------- integration


@dataclass(frozen=True)
class IntervalError:
    """The estimated error of the trapezoid rule on one interval."""

    bound: torch.Tensor  # (targets,): L2 norm of the bound
    variance: torch.Tensor  # (targets, C, H, W): square of the smaller estimate
    # (targets, C, H, W): the interval's half of the curvature; 0 where the bound is used.
    refinement: torch.Tensor


# For each attribution, and for their sum over the channels (as a single channel).
ErrorPair = tuple[IntervalError, IntervalError]


@dataclass
class MapError:
    """The estimated error of a map, summed over intervals; None as long as there is no interval."""

    variance: torch.Tensor | None = None  # (targets, C, H, W): sum of squared errors
    refinement: torch.Tensor | None = None  # (targets, C, H, W): sum of curvatures

    def count(self, error: IntervalError, sign: int = 1) -> None:
        """Add the error of an interval; with sign -1 subtract it again."""
        if self.variance is None or self.refinement is None:
            self.variance, self.refinement = error.variance, error.refinement
        else:
            self.variance = self.variance + error.variance * sign
            self.refinement = self.refinement + error.refinement * sign

    def of(self, target: int) -> MapError:
        """The error of one target."""
        if self.variance is None or self.refinement is None:
            return self
        rows = slice(target, target + 1)
        return MapError(self.variance[rows], self.refinement[rows])

    @property
    def uncertainty(self) -> torch.Tensor | None:
        """Estimated error at each place, (targets, C, H, W); None for a single node."""
        if self.variance is None or self.refinement is None:
            return None
        return (self.variance.clamp(min=0) + (self.refinement / 3) ** 2).sqrt()


def norms(maps: torch.Tensor) -> torch.Tensor:
    """L2 norm of each map, (maps, C, H, W) -> (maps,)."""
    sizes: torch.Tensor = maps.flatten(1).norm(dim=1)
    return sizes


@dataclass
class PathIntegral:
    """A running integral of the density: the attributions, and their estimated error."""

    integral: torch.Tensor  # (targets, C, H, W)
    evaluations: int = 0  # of the density
    error: MapError = field(default_factory=MapError)  # of each attribution
    summed_error: MapError = field(default_factory=MapError)  # of their sum over the channels
    sum_variance: torch.Tensor | None = None  # (targets,): of the total sum, if nodes are random

    def count(self, errors: ErrorPair, sign: int = 1) -> None:
        """Add the errors of an interval; with sign -1 subtract them again."""
        self.error.count(errors[0], sign)
        self.summed_error.count(errors[1], sign)

    def of(self, target: int) -> PathIntegral:
        """The integral of one target."""
        integral = self.integral[target : target + 1]
        errors = self.error.of(target), self.summed_error.of(target)
        drawn = None if self.sum_variance is None else self.sum_variance[target : target + 1]
        return PathIntegral(integral, self.evaluations, *errors, drawn)

    def relative_errors(self) -> torch.Tensor | None:
        """Estimated relative L2 error of each target's map, (targets,); None for a single node."""
        uncertainty = self.error.uncertainty
        return None if uncertainty is None else norms(uncertainty) / norms(self.integral)


# Whether the integral is accurate enough; called between rounds.
Enough = Callable[[PathIntegral], bool]

# A refinement. In each round it yields the nodes, and is then sent the densities there, one by one;
# for all but the last density of a round it yields None. It returns the integral.
Rounds = Generator[np.ndarray | None, torch.Tensor, PathIntegral]


def interval_errors(
    lengths: Sequence[float], densities: Sequence[torch.Tensor]
) -> list[IntervalError]:
    """The errors of two neighbouring intervals, with the densities at their three ends; or of a
    single interval, for which there is only the bound."""
    bounds = [
        (right - left).mul_(length / 2)
        for length, (left, right) in zip(lengths, pairwise(densities), strict=True)
    ]
    sizes = [norms(bound) for bound in bounds]
    squares = [bound.square_() for bound in bounds]
    if len(lengths) == 1:
        return [IntervalError(sizes[0], squares[0], torch.zeros_like(squares[0]))]
    (a, m, b), (left, right) = densities, lengths
    half = (m * ((left + right) / 2) - a * (right / 2) - b * (left / 2)).mul_(0.5)
    errors = []
    for size, square in zip(sizes, squares, strict=True):
        # Each interval has 1/sqrt 2 of the pair's curvature, which is twice `half`.
        jumps = (size <= norms(half) * 2**0.5).view(-1, 1, 1, 1)
        variance = torch.where(jumps, square, 2 * half.square())
        errors.append(IntervalError(size, variance, torch.where(jumps, 0.0, half)))
    return errors


def error_pairs(lengths: Sequence[float], densities: Sequence[torch.Tensor]) -> list[ErrorPair]:
    """`interval_errors` of the densities, and of their sums over the channels."""
    summed = [density.sum(dim=1, keepdim=True) for density in densities]
    pairs = zip(interval_errors(lengths, densities), interval_errors(lengths, summed), strict=True)
    return list(pairs)


def sum_rule(evaluate: Evaluate, rule: Rule) -> PathIntegral:
    """The weighted sum of a fixed rule, in memory that does not grow with its steps."""
    lengths = np.diff(rule.nodes)
    if len(lengths):  # the ends of [0, 1] outside the nodes count to the intervals beside them
        lengths[0] += rule.nodes[0]
        lengths[-1] += 1 - rule.nodes[-1]
    running: PathIntegral | None = None
    recent: list[torch.Tensor] = []  # densities whose intervals have no errors yet
    for number, density in enumerate(evaluate(rule.nodes)):
        part = density * float(rule.weights[number])
        if running is None:
            running = PathIntegral(part, len(rule.nodes))
        else:
            running.integral = running.integral + part
        recent.append(density)
        if len(recent) == 3 or (len(recent) == 2 and number == len(lengths)):
            interval_lengths = lengths[number - len(recent) + 1 : number].tolist()
            for errors in error_pairs(interval_lengths, recent):
                running.count(errors)
            recent = [density]
    assert running is not None  # every rule has a node
    return running


def _densities_at(
    densities: dict[float, torch.Tensor], keys: Sequence[float], nodes: np.ndarray
) -> list[torch.Tensor]:
    return [densities[key] for key in keys]


def nested_rounds(rule: str, steps: int, enough: Enough) -> Rounds:
    """Refine by the levels of a nested rule, one after the other. All densities are kept."""
    densities: dict[float, torch.Tensor] = {}
    for count in nested_counts(rule, steps):
        level = FIXED_RULES[rule](count)
        keys = [round(float(node), 12) for node in level.nodes]
        new_rows = [row for row, key in enumerate(keys) if key not in densities]
        new_nodes: np.ndarray | None = level.nodes[new_rows]
        for row in new_rows:
            densities[keys[row]] = yield new_nodes
            new_nodes = None
        by_level = sum_rule(partial(_densities_at, densities, keys), level)
        if enough(by_level):
            break
    return by_level


def stratified_rounds(rule: Stratified, steps: int, enough: Enough | None = None) -> Rounds:
    """The mean over nodes drawn in strata, set after set, with its variance: of each attribution,
    of their sum over the channels, and of the total sum."""
    total = torch.zeros(())
    moments = [total, total, total]
    for count, nodes in enumerate(rule.sets(steps, enough is not None), start=1):
        new_nodes: np.ndarray | None = nodes
        strata = (len(nodes) + 1) // 2
        for _ in range(strata):
            pair: list[torch.Tensor] = []
            for _ in range(min(2, len(nodes))):
                pair.append((yield new_nodes))
                new_nodes = None
            total = total + sum(pair, start=torch.zeros(())) / (len(pair) * strata)
            half = (pair[-1] - pair[0]) / (2 * strata)  # half the difference, times the share
            parts = half, half.sum(dim=1, keepdim=True), half.flatten(1).sum(dim=1)
            moments = [m + part.square() for m, part in zip(moments, parts, strict=True)]
        running = PathIntegral(total / count, count * len(nodes))
        if len(nodes) > 1:
            each_variance, summed_variance, sum_variance = (moment / count**2 for moment in moments)
            running.error = MapError(each_variance, torch.zeros_like(each_variance))
            running.summed_error = MapError(summed_variance, torch.zeros_like(summed_variance))
            running.sum_variance = sum_variance
        if enough and enough(running):
            break
    return running


@dataclass(frozen=True)
class Interval:
    """A piece of the path between two evaluated nodes."""

    left: float
    right: float
    densities: tuple[torch.Tensor, torch.Tensor]  # at both ends, (targets, C, H, W) each
    bound: torch.Tensor  # (targets,): how much the map may still change here
    # Lengths and densities from which the errors are computed: of this interval and a neighbour.
    family: tuple[Sequence[float], Sequence[torch.Tensor]]
    place: int  # of this interval in the family

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2

    @property
    def errors(self) -> ErrorPair:
        """The errors of the interval, computed again: to keep them would take three more images of
        memory."""
        return error_pairs(*self.family)[self.place]


def intervals_between(
    nodes: Sequence[float], densities: Sequence[torch.Tensor]
) -> list[tuple[Interval, ErrorPair]]:
    """The intervals between two or three nodes, with their errors."""
    family = ([b - a for a, b in pairwise(nodes)], densities)
    intervals = []
    for place, errors in enumerate(error_pairs(*family)):
        left, right = nodes[place : place + 2]
        ends = (densities[place], densities[place + 1])
        intervals.append((Interval(left, right, ends, errors[0].bound, family, place), errors))
    return intervals


# How much an interval may still change the map of each target, (targets,).
Priority = Callable[[Interval], torch.Tensor]


def _bisect(running: PathIntegral, cut: Interval, density: torch.Tensor) -> list[Interval]:
    """Replace an interval by its two halves, in the integral and in its error. density: at the
    middle of the interval."""
    left, right = cut.densities
    length = cut.right - cut.left
    running.integral += density * (length / 2) - (left + right) * (length / 4)
    running.count(cut.errors, -1)
    halves = intervals_between([cut.left, cut.middle, cut.right], [left, density, right])
    for _, errors in halves:
        running.count(errors)
    return [half for half, _ in halves]


def adaptive_rounds(
    steps: int,
    enough: Enough | None = None,
    priority: Priority = lambda interval: interval.bound,
) -> Rounds:
    """Bisect the intervals where the map may still change most, until `steps` (at least 2) are
    used or the integral is accurate enough.

    With several targets, the largest relative error decides. The choice of intervals does not
    depend on the size of step batches. priority: which intervals are bisected first;
    benchmarks/quadrature.py compares several.
    """
    first = first_rule(steps)
    nodes: list[float] = first.nodes.tolist()
    densities: list[torch.Tensor] = []
    new_nodes: np.ndarray | None = first.nodes
    for _ in nodes:
        densities.append((yield new_nodes))
        new_nodes = None
    weights = zip(densities, first.weights.tolist(), strict=True)
    parts = (density * weight for density, weight in weights)
    running = PathIntegral(sum(parts, start=torch.zeros(())), len(nodes))
    scale = norms(running.integral).clamp(min=torch.finfo(running.integral.dtype).tiny)
    intervals: list[Interval] = []
    for start in range(0, len(nodes) - 1, 2):
        part = slice(start, start + 3)
        for interval, errors in intervals_between(nodes[part], densities[part]):
            running.count(errors)
            intervals.append(interval)
    open_limit = max(16, min(MAX_OPEN_INTERVALS, MAX_OPEN_BYTES // densities[0].nbytes))
    while running.evaluations < steps and not (enough and enough(running)):
        sizes = torch.stack([(priority(interval) / scale).max() for interval in intervals])
        order = sizes.argsort(descending=True, stable=True).tolist()[:open_limit]
        count = min(max(1, len(order) // BISECTED_SHARE), steps - running.evaluations)
        cuts = sorted((intervals[row] for row in order[:count]), key=lambda cut: cut.left)
        intervals = [intervals[row] for row in sorted(order[count:])]
        new_nodes = np.array([cut.middle for cut in cuts])
        for cut in cuts:
            intervals += _bisect(running, cut, (yield new_nodes))
            new_nodes = None
        running.evaluations += count
    return running


# --------------------------------------------------------------------------- several targets


def fixed_rule(rule: AnyRule, steps: int, refined: bool) -> Rule | None:
    """The rule with so many steps, if all nodes and weights are known beforehand; None: nodes are
    chosen on the way. refined: whether the refinement may stop earlier, when it is accurate enough.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Stratified) or (steps > 1 and (refined or rule == ADAPTIVE)):
        return None
    return midpoint_rule(1) if rule == ADAPTIVE else FIXED_RULES[rule](steps)


def rounds_of(rule: AnyRule, steps: int, enough: Enough | None) -> Rounds:
    """The refinement by a rule that is not fixed."""
    assert not isinstance(rule, Rule)  # which is fixed
    if isinstance(rule, Stratified):
        return stratified_rounds(rule, steps, enough)
    if rule == ADAPTIVE:
        return adaptive_rounds(steps, enough)
    assert enough is not None  # without it, the rule is fixed
    return nested_rounds(rule, steps, enough)


def run_alone(rounds: Rounds, evaluate: Evaluate) -> PathIntegral:
    """Run a single refinement. This is for tests and benchmarks of the rules; an image is explained
    with `integrate_targets`."""
    nodes = next(rounds)
    while True:
        next_nodes = None
        assert nodes is not None  # after all densities of a round come new nodes, or the end
        for density in evaluate(nodes):
            try:
                next_nodes = rounds.send(density)
            except StopIteration as end:
                result: PathIntegral = end.value
                return result
        nodes = next_nodes


def _run_together(all_rounds: Sequence[Rounds], evaluate: EvaluateSome) -> list[PathIntegral]:
    """Run the refinements of several targets together. In each round every node is evaluated once,
    for all targets that need it."""
    results: dict[int, PathIntegral] = {}
    pending = {target: next(rounds) for target, rounds in enumerate(all_rounds)}
    while pending:
        targets_at: dict[float, list[int]] = defaultdict(list)
        for target, nodes in pending.items():
            assert nodes is not None  # `pending` holds only targets with new nodes
            for node in nodes:
                targets_at[float(node)].append(target)
        wanted = [(node, tuple(targets_at[node])) for node in sorted(targets_at)]
        pending = {}
        for (_, targets), densities in zip(wanted, evaluate(wanted), strict=True):
            for density, target in zip(densities.split(1), targets, strict=True):
                try:
                    # A copy: a slice that is kept would keep the densities of all targets.
                    next_nodes = all_rounds[target].send(density.clone())
                except StopIteration as end:
                    results[target] = end.value
                else:
                    pending |= {} if next_nodes is None else {target: next_nodes}
    return [results[target] for target in range(len(all_rounds))]


def integrate_targets(
    evaluate: EvaluateSome,
    count: int,
    rule: AnyRule,
    steps: int,
    enough: Callable[[int, PathIntegral], bool] | None = None,
) -> list[PathIntegral]:
    """For each of `count` targets: the integral of its density over [0, 1], with the estimated
    error and the number of evaluations.

    Each target gets the same nodes as if it were the only target, and no more than it needs. Where
    several targets need the same node, it is evaluated once.

    steps: the number of evaluations of the density. enough: (number of the target, integral) ->
    whether it is accurate enough; the rule is then refined from few nodes until this is True, with
    at most `steps` evaluations. Raises InputError: the rule does not have this number of steps, or
    is not nested.
    """
    all_targets = tuple(range(count))
    fixed = fixed_rule(rule, steps, enough is not None)
    if fixed is not None:
        running = sum_rule(
            lambda nodes: evaluate([(float(node), all_targets) for node in nodes]), fixed
        )
        return [running.of(target) for target in all_targets]
    tests = [enough and partial(enough, target) for target in all_targets]
    return _run_together([rounds_of(rule, steps, test) for test in tests], evaluate)


# --------------------------------------------------------------------------- several paths


@dataclass
class MeanIntegral:
    """The mean of the integrals along several paths, and its error, in memory that does not grow
    with the number of paths. Errors of different paths are taken to be independent."""

    count: int = 0  # of paths
    evaluations: int = 0  # of the density, on the path with the most evaluations
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # (targets, C, H, W)
    squares: torch.Tensor | None = None  # (targets, C, H, W): sum of squared uncertainties
    summed_squares: torch.Tensor | None = None  # (targets, 1, H, W): for the sum over channels
    sum_variance: torch.Tensor | None = None  # (targets,): of the total sum, if nodes are random
    second: bool = False  # whether second moments are computed too
    # Sums of v^2, of u^2 v and of (u v)^2, where v is the value and u its uncertainty.
    moments: tuple[torch.Tensor, ...] = field(default_factory=lambda: (torch.zeros(()),) * 3)

    def add(self, path_integral: PathIntegral) -> None:
        """Add the integral along a path."""
        self.total = self.total + path_integral.integral
        self.sum_variance = path_integral.sum_variance
        if self.second:
            value, uncertainty = path_integral.integral, path_integral.error.uncertainty
            square = torch.zeros_like(value) if uncertainty is None else uncertainty.square()
            parts = value.square(), square * value, square * value.square()
            self.moments = tuple(m + part for m, part in zip(self.moments, parts, strict=True))
        self.squares = self._with(self.squares, path_integral.error)
        self.summed_squares = self._with(self.summed_squares, path_integral.summed_error)
        self.evaluations = max(self.evaluations, path_integral.evaluations)
        self.count += 1

    def _with(self, squares: torch.Tensor | None, error: MapError) -> torch.Tensor | None:
        """The sum of squared uncertainties with that of one more path; None: the error of a path is
        unknown, since it has a single node."""
        uncertainty = error.uncertainty
        if uncertainty is None or (self.count and squares is None):
            return None
        return uncertainty.square() if squares is None else squares + uncertainty.square()

    def second_moment(self, about_mean: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mean of the squares, or the variance, (targets, C, H, W), and its estimated error to
        first order; None: the errors of the paths are unknown. about_mean: the variance."""
        centre = self.integral if about_mean else torch.zeros_like(self.integral)
        squares, linear, quadratic = self.moments
        moment = (squares / self.count - centre.square()).clamp(min=0)
        if self.squares is None:
            return moment, None
        variance = quadratic - 2 * centre * linear + centre.square() * self.squares
        return moment, 2 * variance.clamp(min=0).sqrt() / self.count

    @property
    def integral(self) -> torch.Tensor:
        """The mean, (targets, C, H, W)."""
        return self.total / self.count

    @property
    def uncertainty(self) -> torch.Tensor | None:
        """Estimated error of each attribution, (targets, C, H, W); None: unknown."""
        return None if self.squares is None else self.squares.sqrt() / self.count

    @property
    def summed_uncertainty(self) -> torch.Tensor | None:
        """Estimated error of the sum over the channels, (targets, H, W); None: unknown."""
        return (
            None if self.summed_squares is None else self.summed_squares[:, 0].sqrt() / self.count
        )
