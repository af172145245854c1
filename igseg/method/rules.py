"""Quadrature rules: the nodes of [0, 1] at which the density is evaluated, and their weights.

`FIXED_RULES` holds the rules whose nodes are known beforehand. Of the adaptive rule, this file has
the first nodes; of the rule with random nodes, how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from igseg.errors import InputError

ADAPTIVE = 'adaptive'
PRECISIONS = ('auto', 'float32', 'bfloat16', 'float16')  # of gradients

FIRST_NODES = 5  # of the adaptive rule: both ends, and three nodes between them

DRAWN_AT_ONCE = 16  # random nodes between two tests whether the tolerance is reached


@dataclass(frozen=True)
class Integration:
    """How integrals along paths are computed."""

    rule: str = ADAPTIVE  # one of RULE_NAMES
    steps: int = 50  # interpolation steps for each baseline; with a tolerance at most
    tolerance: float | None = None  # of map error and completeness gap; None: take all steps
    precision: str = 'float32'  # one of PRECISIONS
    precision_tolerance: float = 0.03  # relative L2 deviation of the map that `auto` accepts
    seed: int = 0  # of methods that draw random numbers


# --------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """A quadrature rule on [0, 1]: integral of g ~ sum of weights * g(nodes)."""

    name: str
    nodes: np.ndarray  # (steps,) float64 in [0, 1], rising
    weights: np.ndarray  # (steps,) float64, sum 1
    degree: int  # polynomials up to this degree are integrated exactly


def midpoint_rule(steps: int) -> Rule:
    """Equal cells, evaluated at their centres."""
    nodes = (np.arange(steps) + 0.5) / steps
    return Rule('midpoint', nodes, np.full(steps, 1 / steps), degree=1)


def _check_two_steps(steps: int, name: str) -> None:
    if steps < 2:
        raise InputError(f'the {name} rule needs at least 2 steps (use num_steps 2 or more)')


def trapezoid_rule(steps: int) -> Rule:
    """Equal cells, evaluated at their ends; the first and the last node count half."""
    _check_two_steps(steps, 'trapezoid')
    weights = np.full(steps, 1 / (steps - 1))
    weights[[0, -1]] /= 2
    return Rule('trapezoid', np.linspace(0, 1, steps), weights, degree=1)


def gauss_legendre_rule(steps: int) -> Rule:
    """Gauss-Legendre nodes, best for smooth integrands."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return Rule('gauss-legendre', (nodes + 1) / 2, weights / 2, degree=2 * steps - 1)


def _interpolatory_weights(nodes: np.ndarray) -> np.ndarray:
    """Weights on nodes of [-1, 1], sum 1, that integrate Legendre polynomials P_0 .. P_(n-1)."""
    basis = np.polynomial.legendre.legvander(nodes, len(nodes) - 1)  # (n, n)
    return np.linalg.solve(basis.T, np.eye(len(nodes))[0])


def clenshaw_curtis_rule(steps: int) -> Rule:
    """Chebyshev points, both ends included; 2^k + 1 of them are nested."""
    _check_two_steps(steps, 'clenshaw-curtis')
    nodes = -np.cos(np.pi * np.arange(steps) / (steps - 1))
    nodes[(steps - 1) // 2 : (steps + 1) // 2] *= steps % 2 == 0  # the centre is exactly 0
    degree = steps - 1 if steps % 2 == 0 else steps
    return Rule('clenshaw-curtis', (nodes + 1) / 2, _interpolatory_weights(nodes), degree)


@cache
def _patterson_nodes(extensions: int) -> np.ndarray:
    """The 3 Gauss-Legendre nodes on [-1, 1] after so many optimal extensions. Each extension adds
    n + 1 nodes to n.

    G is the polynomial whose roots are the old nodes. The new nodes are the roots of the polynomial
    E of degree n + 1 that is orthogonal, with G as weight, to all polynomials of lower degree
    (Patterson, Math. Comp. 22, 1968).
    """
    if extensions == 0:
        first: np.ndarray = np.polynomial.legendre.leggauss(3)[0]
        return first
    old = _patterson_nodes(extensions - 1)
    n = len(old)
    points, weights = np.polynomial.legendre.leggauss(2 * n + 4)  # exact for G E P_k
    old_polynomial = np.prod(2 * (points[:, None] - old), axis=1)  # G, scaled to stay near 1
    basis = np.polynomial.legendre.legvander(points, n + 1)  # (points, n + 2)
    products = basis[:, :-1].T @ (basis * (weights * old_polynomial)[:, None])  # (n + 1, n + 2)
    coefficients = np.append(np.linalg.solve(products[:, :-1], -products[:, -1]), 1.0)
    new = np.polynomial.legendre.legroots(coefficients).real
    nodes = np.sort(np.concatenate([old, new]))
    symmetric: np.ndarray = (nodes - nodes[::-1]) / 2  # exactly symmetric
    return symmetric


# Numbers of steps. The nodes of each contain the nodes of the number before it.
NESTED: dict[str, tuple[int, ...]] = {
    'midpoint': tuple(3**k for k in range(1, 9)),
    'trapezoid': tuple(2**k + 1 for k in range(1, 14)),
    'clenshaw-curtis': tuple(2**k + 1 for k in range(1, 11)),
    'gauss-kronrod': (3, 7, 15, 31, 63),
}


def gauss_kronrod_rule(steps: int) -> Rule:
    """Gauss-Legendre with 3 nodes, extended by Kronrod and Patterson to 7, 15, 31, 63."""
    counts = NESTED['gauss-kronrod']
    if steps not in counts:
        raise InputError(
            f'the gauss-kronrod rule has {", ".join(map(str, counts))} steps, not {steps} '
            '(use one of these for num_steps)'
        )
    nodes = _patterson_nodes(counts.index(steps))
    degree = 5 if steps == 3 else (3 * steps + 1) // 2
    return Rule('gauss-kronrod', (nodes + 1) / 2, _interpolatory_weights(nodes), degree)


FIXED_RULES: dict[str, Callable[[int], Rule]] = {
    'midpoint': midpoint_rule,
    'trapezoid': trapezoid_rule,
    'gauss-legendre': gauss_legendre_rule,
    'clenshaw-curtis': clenshaw_curtis_rule,
    'gauss-kronrod': gauss_kronrod_rule,
}
RULE_NAMES = (ADAPTIVE, *FIXED_RULES)


@dataclass(frozen=True)
class Stratified:
    """Two random nodes in each of equal strata of [0, 1]. To refine the integral, further sets of
    nodes are drawn; it is the mean over all sets. The differences within the pairs give the
    variance of the drawn densities (Cochran: Sampling Techniques, 1977, section 5.4)."""

    seed: int
    name: str = 'stratified'

    def sets(self, steps: int, refined: bool) -> Iterator[np.ndarray]:
        """Rising nodes. refined: set by set; else all in one set. A single step has no pair."""
        count = min(DRAWN_AT_ONCE, steps) if refined else steps
        count -= count % 2 if count > 1 else 0
        strata, rng = max(1, count // 2), np.random.default_rng(self.seed)
        for _ in range(steps // count):
            offsets = np.sort(rng.random((strata, min(2, count))), axis=1)
            yield ((np.arange(strata)[:, None] + offsets) / strata).ravel()


MethodRule = Rule | Stratified  # a rule that a method prescribes

AnyRule = str | MethodRule  # or one of RULE_NAMES


def first_rule(steps: int) -> Rule:
    """The rule from which the adaptive rule starts."""
    return midpoint_rule(1) if steps == 1 else trapezoid_rule(min(FIRST_NODES, steps))


def nested_counts(rule: str, steps: int) -> list[int]:
    """The levels of a nested rule up to a number of steps. Raises InputError."""
    if rule not in NESTED:
        raise InputError(
            f'the {rule} rule cannot be refined to a tolerance, its nodes are not nested '
            f'(use rule {ADAPTIVE}, {", ".join(NESTED)}, or num_steps)'
        )
    counts = [count for count in NESTED[rule] if count <= steps]
    if not counts:
        raise InputError(
            f'the {rule} rule needs at least {NESTED[rule][0]} steps (use a larger max_steps)'
        )
    return counts


def first_nodes(rule: AnyRule, steps: int, refined: bool) -> np.ndarray:
    """The nodes that are always evaluated: all nodes of a fixed rule, the first nodes of another.

    Raises InputError: the rule does not have this number of steps, or is not nested.
    """
    if isinstance(rule, Rule):
        return rule.nodes
    if isinstance(rule, Stratified):
        return next(rule.sets(steps, refined))
    if rule == ADAPTIVE:
        return first_rule(steps).nodes
    return FIXED_RULES[rule](nested_counts(rule, steps)[0] if refined else steps).nodes
