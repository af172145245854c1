"""The integral along the path: where to evaluate the gradient, and how far off the result may be.

Integrated Gradients is the integral over alpha in [0, 1] of the *density*

    a(alpha) = (x - x') * dF/dx at x' + alpha (x - x')        (*: pixel by pixel)

(on other paths than the straight one: velocity times gradient).

A *rule* says at which nodes the density is evaluated and with which weights it is summed:

    fixed     nodes and weights known beforehand (`FIXED_RULES` in igseg/method/rules.py)
    nested    the same, refined level by level until the error is small; nothing is computed twice
    adaptive  intervals bisected where the density changes most, summed by the trapezoid rule
    drawn     nodes at random, two in each of equal strata (`Stratified`), for densities that are
              themselves drawn; the error is then the standard error

The *error of the map* is estimated from the same densities, interval by interval. Two things are
known about the trapezoid rule's error on an interval of length h with densities a, b at its ends:

    bound       where a pixel rises or falls all the way: at most h/2 |b - a|
    curvature   two neighbouring intervals against one that spans both: what the finer rule changed

The smaller of the two stands for the interval (a jump keeps the bound small, a smooth stretch the
curvature), and these parts are taken to be independent: their squares add up. Where the density is
smooth, errors of neighbouring intervals lean the same way: a third of what the finer rule changed
there altogether (Richardson) is added.

All of it is known twice: of each attribution, and of their sum over the channels, whose error is
not the sum of theirs. Mathematics only: `evaluate` turns nodes into densities, and no network is
known here.
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

BISECTED_SHARE = 4  # each round bisects a quarter of the intervals, so that a GPU gets batches

# Intervals that may still be bisected hold the densities at their ends: at most so many, and so
# many bytes. The least promising are left as they are.
MAX_OPEN_INTERVALS = 128
MAX_OPEN_BYTES = 256 * 2**20

# alphas -> the densities there, (targets, C, H, W), one after the other
Evaluate = Callable[[np.ndarray], Iterable[torch.Tensor]]

# alphas, each with the targets asked there -> their densities, one alpha after the other
EvaluateSome = Callable[[Sequence[tuple[float, tuple[int, ...]]]], Iterable[torch.Tensor]]


# --------------------------------------------------------------------------- integration


@dataclass(frozen=True)
class IntervalError:
    """What is known about the error of the trapezoid rule on one interval."""

    bound: torch.Tensor  # (targets,): L2 norm of the bound
    variance: torch.Tensor  # (targets, C, H, W): squared, by bound or curvature
    refinement: torch.Tensor  # (targets, C, H, W): its half of the curvature, where that counts


# Of each attribution, and of their sum over the channels, which counts as one channel.
ErrorPair = tuple[IntervalError, IntervalError]


@dataclass
class MapError:
    """The estimated error of a map, gathered interval by interval; nothing is known without one."""

    variance: torch.Tensor | None = None  # (targets, C, H, W): squared
    refinement: torch.Tensor | None = None  # what finer intervals changed where it is smooth

    def count(self, error: IntervalError, sign: int = 1) -> None:
        """Count the error of an interval, or (sign -1) no longer."""
        if self.variance is None or self.refinement is None:
            self.variance, self.refinement = error.variance, error.refinement
        else:
            self.variance = self.variance + error.variance * sign
            self.refinement = self.refinement + error.refinement * sign

    def of(self, target: int) -> MapError:
        """That of one of the targets."""
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
    """A running integral of the density: the attributions, and what is known of their error."""

    integral: torch.Tensor  # (targets, C, H, W)
    evaluations: int = 0  # of the density
    error: MapError = field(default_factory=MapError)  # of each attribution
    summed_error: MapError = field(default_factory=MapError)  # of their sum over the channels
    sum_variance: torch.Tensor | None = None  # (targets,): of the sum of all, where it was drawn

    def count(self, errors: ErrorPair, sign: int = 1) -> None:
        """Count the errors of an interval, or (sign -1) no longer."""
        self.error.count(errors[0], sign)
        self.summed_error.count(errors[1], sign)

    def of(self, target: int) -> PathIntegral:
        """That of one of the targets."""
        integral = self.integral[target : target + 1]
        errors = self.error.of(target), self.summed_error.of(target)
        drawn = None if self.sum_variance is None else self.sum_variance[target : target + 1]
        return PathIntegral(integral, self.evaluations, *errors, drawn)

    def relative_errors(self) -> torch.Tensor | None:
        """Estimated relative L2 error of each target's map, (targets,); None for a single node."""
        uncertainty = self.error.uncertainty
        return None if uncertainty is None else norms(uncertainty) / norms(self.integral)


# Whether the integral is good enough, asked between rounds.
Enough = Callable[[PathIntegral], bool]

# A refinement, round by round: gives the nodes of a round, takes the densities there one by one
# (and gives None between them: nothing new is asked), returns the integral.
Rounds = Generator[np.ndarray | None, torch.Tensor, PathIntegral]


def interval_errors(
    lengths: Sequence[float], densities: Sequence[torch.Tensor]
) -> list[IntervalError]:
    """The errors of two neighbouring intervals, with densities at their three ends; or of one
    interval, of which only the bound is known."""
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
        # Each of the two stands for 1/sqrt 2 of the pair's curvature, which is twice `half`.
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
    if len(lengths):  # what lies outside the outermost nodes is as uncertain as what is beside it
        lengths[0] += rule.nodes[0]
        lengths[-1] += 1 - rule.nodes[-1]
    running: PathIntegral | None = None
    recent: list[torch.Tensor] = []  # densities whose intervals are still to be judged
    for number, density in enumerate(evaluate(rule.nodes)):
        part = density * float(rule.weights[number])
        if running is None:
            running = PathIntegral(part, len(rule.nodes))
        else:
            running.integral = running.integral + part
        recent.append(density)
        if len(recent) == 3 or (len(recent) == 2 and number == len(lengths)):
            between = lengths[number - len(recent) + 1 : number].tolist()
            for errors in error_pairs(between, recent):
                running.count(errors)
            recent = [density]
    assert running is not None  # every rule has a node
    return running


def _known_at(
    known: dict[float, torch.Tensor], keys: Sequence[float], nodes: np.ndarray
) -> list[torch.Tensor]:
    return [known[key] for key in keys]


def nested_rounds(rule: str, steps: int, enough: Enough) -> Rounds:
    """Levels of a nested rule, one after the other; all densities are kept between them."""
    known: dict[float, torch.Tensor] = {}
    for count in nested_counts(rule, steps):
        level = FIXED_RULES[rule](count)
        keys = [round(float(node), 12) for node in level.nodes]
        fresh = [row for row, key in enumerate(keys) if key not in known]
        asked: np.ndarray | None = level.nodes[fresh]
        for row in fresh:
            known[keys[row]] = yield asked
            asked = None
        by_level = sum_rule(partial(_known_at, known, keys), level)
        if enough(by_level):
            break
    return by_level


def stratified_rounds(rule: Stratified, steps: int, enough: Enough | None = None) -> Rounds:
    """Means over nodes drawn in strata, set after set; what is known of their variance: of each
    attribution, of their sum over the channels, and of the sum of all."""
    total = torch.zeros(())
    moments = [total, total, total]
    for count, nodes in enumerate(rule.sets(steps, enough is not None), start=1):
        asked: np.ndarray | None = nodes
        strata = (len(nodes) + 1) // 2
        for _ in range(strata):
            pair: list[torch.Tensor] = []
            for _ in range(min(2, len(nodes))):
                pair.append((yield asked))
                asked = None
            total = total + sum(pair, start=torch.zeros(())) / (len(pair) * strata)
            half = (pair[-1] - pair[0]) / (2 * strata)  # of the difference, of a stratum's share
            parts = half, half.sum(dim=1, keepdim=True), half.flatten(1).double().sum(dim=1)
            moments = [m + part.square() for m, part in zip(moments, parts, strict=True)]
        running = PathIntegral(total / count, count * len(nodes))
        if len(nodes) > 1:
            each, summed, whole = (moment / count**2 for moment in moments)
            running.error = MapError(each, torch.zeros_like(each))
            running.summed_error = MapError(summed, torch.zeros_like(summed))
            running.sum_variance = whole
        if enough and enough(running):
            break
    return running


@dataclass(frozen=True)
class Interval:
    """A piece of the path between two evaluated nodes."""

    left: float
    right: float
    densities: tuple[torch.Tensor, torch.Tensor]  # at its ends, (targets, C, H, W) each
    bound: torch.Tensor  # (targets,): how much the map may still change here
    family: tuple[Sequence[float], Sequence[torch.Tensor]]  # lengths and densities it is judged by
    place: int  # in the family

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2

    @property
    def errors(self) -> ErrorPair:
        """Computed again where they are needed: to keep them would take three images more."""
        return error_pairs(*self.family)[self.place]


def intervals_between(
    nodes: Sequence[float], densities: Sequence[torch.Tensor]
) -> list[tuple[Interval, ErrorPair]]:
    """The two intervals between three nodes, or the one between two, with their errors."""
    family = ([b - a for a, b in pairwise(nodes)], densities)
    intervals = []
    for place, errors in enumerate(error_pairs(*family)):
        left, right = nodes[place : place + 2]
        ends = (densities[place], densities[place + 1])
        intervals.append((Interval(left, right, ends, errors[0].bound, family, place), errors))
    return intervals


# How much an interval may change the map of each target.
Priority = Callable[[Interval], torch.Tensor]


def _bisect(running: PathIntegral, cut: Interval, density: torch.Tensor) -> list[Interval]:
    """Replace an interval's part of the integral and of its error by that of its two halves."""
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
    """Bisect where the map may still change most, until `steps`, at least 2, are spent or it is
    enough.

    Of several targets the one with the largest relative error decides. What is bisected does not
    depend on how many steps go through the network at once. priority: what is bisected first, which
    benchmarks/quadrature.py compares with others.
    """
    first = first_rule(steps)
    nodes: list[float] = first.nodes.tolist()
    densities: list[torch.Tensor] = []
    asked: np.ndarray | None = first.nodes
    for _ in nodes:
        densities.append((yield asked))
        asked = None
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
    most = max(16, min(MAX_OPEN_INTERVALS, MAX_OPEN_BYTES // densities[0].nbytes))
    while running.evaluations < steps and not (enough and enough(running)):
        sizes = torch.stack([(priority(interval) / scale).max() for interval in intervals])
        order = sizes.argsort(descending=True, stable=True).tolist()[:most]
        count = min(max(1, len(order) // BISECTED_SHARE), steps - running.evaluations)
        cuts = sorted((intervals[row] for row in order[:count]), key=lambda cut: cut.left)
        intervals = [intervals[row] for row in sorted(order[count:])]
        asked = np.array([cut.middle for cut in cuts])
        for cut in cuts:
            intervals += _bisect(running, cut, (yield asked))
            asked = None
        running.evaluations += count
    return running


# --------------------------------------------------------------------------- of several targets


def fixed_rule(rule: AnyRule, steps: int, refined: bool) -> Rule | None:
    """The rule by which so many steps are summed where all nodes and weights are known beforehand;
    None: nodes are chosen on the way. refined: whether it may stop before, when it is enough."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, Stratified) or (steps > 1 and (refined or rule == ADAPTIVE)):
        return None
    return midpoint_rule(1) if rule == ADAPTIVE else FIXED_RULES[rule](steps)


def rounds_of(rule: AnyRule, steps: int, enough: Enough | None) -> Rounds:
    """The refinement by a rule that is not fixed."""
    assert not isinstance(rule, Rule)  # its nodes are known
    if isinstance(rule, Stratified):
        return stratified_rounds(rule, steps, enough)
    if rule == ADAPTIVE:
        return adaptive_rounds(steps, enough)
    assert enough is not None  # else it is fixed
    return nested_rounds(rule, steps, enough)


def alone(rounds: Rounds, evaluate: Evaluate) -> PathIntegral:
    """Give one refinement what it asks for. For tests and benchmarks of the rules: what explains an
    image is `integrate_targets`."""
    nodes = next(rounds)
    while True:
        following = None
        assert nodes is not None  # all that was asked for is given
        for density in evaluate(nodes):
            try:
                following = rounds.send(density)
            except StopIteration as end:
                result: PathIntegral = end.value
                return result
        nodes = following


def _in_step(all_rounds: Sequence[Rounds], evaluate: EvaluateSome) -> list[PathIntegral]:
    """Give refinements of several targets what they ask for: in each round every node once, with
    the targets that ask there."""
    results: dict[int, PathIntegral] = {}
    asked = {target: next(rounds) for target, rounds in enumerate(all_rounds)}
    while asked:
        there: dict[float, list[int]] = defaultdict(list)
        for target, nodes in asked.items():
            assert nodes is not None  # only those who ask for some are in `asked`
            for node in nodes:
                there[float(node)].append(target)
        wanted = [(node, tuple(there[node])) for node in sorted(there)]
        asked = {}
        for (_, targets), densities in zip(wanted, evaluate(wanted), strict=True):
            for density, target in zip(densities.split(1), targets, strict=True):
                try:
                    # Its own memory: it may be kept when the others' are not.
                    following = all_rounds[target].send(density.clone())
                except StopIteration as end:
                    results[target] = end.value
                else:
                    asked |= {} if following is None else {target: following}
    return [results[target] for target in range(len(all_rounds))]


def integrate_targets(
    evaluate: EvaluateSome,
    count: int,
    rule: AnyRule,
    steps: int,
    enough: Callable[[int, PathIntegral], bool] | None = None,
) -> list[PathIntegral]:
    """For each of `count` targets, the integral of its density over [0, 1], its estimated error,
    and the evaluations it took.

    Each has its own nodes, which are those it would get alone, and no more of them than it needs;
    what several ask at one node is asked together. steps: how often the density is evaluated; with
    `enough` at most, and the rule is refined from few nodes until that is True. enough: told the
    number of the target. Raises InputError: a number of steps the rule does not have, a rule that
    is not nested.
    """
    everyone = tuple(range(count))
    fixed = fixed_rule(rule, steps, enough is not None)
    if fixed is not None:
        both = sum_rule(lambda nodes: evaluate([(float(node), everyone) for node in nodes]), fixed)
        return [both.of(target) for target in everyone]
    tests = [enough and partial(enough, target) for target in everyone]
    return _in_step([rounds_of(rule, steps, test) for test in tests], evaluate)


# --------------------------------------------------------------------------- several paths


@dataclass
class MeanIntegral:
    """The mean of the integrals along several paths, and its error, in memory that does not grow
    with their number. Errors of different paths are taken to be independent."""

    count: int = 0
    evaluations: int = 0  # of the density, on the path that took the most
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # (targets, C, H, W)
    squares: torch.Tensor | None = None  # (targets, C, H, W): of the uncertainties, their sum
    summed_squares: torch.Tensor | None = None  # (targets, 1, H, W): of the sum over channels
    sum_variance: torch.Tensor | None = None  # (targets,): of the sum of all, where it was drawn
    second: bool = False  # whether second moments are wanted too
    # Sums of v^2, of u^2 v, of (u v)^2: v is the value, u its uncertainty.
    moments: tuple[torch.Tensor, ...] = field(default_factory=lambda: (torch.zeros(()),) * 3)

    def add(self, one: PathIntegral) -> None:
        """Take in the integral along one more path."""
        self.total = self.total + one.integral
        self.sum_variance = one.sum_variance
        if self.second:
            value, known = one.integral, one.error.uncertainty
            square = torch.zeros_like(value) if known is None else known.square()
            parts = value.square(), square * value, square * value.square()
            self.moments = tuple(m + part for m, part in zip(self.moments, parts, strict=True))
        self.squares = self._with(self.squares, one.error)
        self.summed_squares = self._with(self.summed_squares, one.summed_error)
        self.evaluations = max(self.evaluations, one.evaluations)
        self.count += 1

    def _with(self, squares: torch.Tensor | None, error: MapError) -> torch.Tensor | None:
        """The sum of squares with one more; None where one of the paths has a single node."""
        uncertainty = error.uncertainty
        if uncertainty is None or (self.count and squares is None):
            return None
        return uncertainty.square() if squares is None else squares + uncertainty.square()

    def second_moment(self, about_mean: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The mean of the squares, or the variance, (targets, C, H, W), and its estimated error, to
        first order; None where that of the paths is unknown."""
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
        """Estimated error of each attribution, (targets, C, H, W); None where it is unknown."""
        return None if self.squares is None else self.squares.sqrt() / self.count

    @property
    def summed_uncertainty(self) -> torch.Tensor | None:
        """Estimated error of their sum over the channels, (targets, H, W)."""
        return (
            None if self.summed_squares is None else self.summed_squares[:, 0].sqrt() / self.count
        )
