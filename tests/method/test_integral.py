"""The integral: the adaptive rule, tolerances, and whether reported errors are true."""

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import integrate
from torch import nn

from igseg.method.integral import PathIntegral, sum_rule
from igseg.method.rules import ADAPTIVE, FIRST_NODES, FIXED_RULES, NESTED, RULE_NAMES, first_nodes
from integrated_gradients import InputError


class Density:
    """A density from a function of alpha, which remembers the alphas at which it was evaluated."""

    def __init__(self, function: Callable[[float], torch.Tensor]) -> None:
        self.function, self.nodes = function, []

    def __call__(self, alphas):
        for alpha in alphas:
            self.nodes.append(float(alpha))
            yield self.function(float(alpha))


def images(values) -> torch.Tensor:
    """(targets, 3, H, W) from (targets, pixels)."""
    return torch.as_tensor(np.array(values), dtype=torch.float64).reshape(len(values), 3, -1, 1)


def jumping(alpha: float) -> torch.Tensor:
    """Each of 300 pixels jumps once, most of them between 0.2 and 0.4, as with a ReLU network."""
    places = 0.2 + 0.2 * np.random.default_rng(0).beta(2, 2, 300)
    return images([(alpha > places).astype(float)])


JUMPING_EXACT = images([1 - (0.2 + 0.2 * np.random.default_rng(0).beta(2, 2, 300))])


def smooth(alpha: float) -> torch.Tensor:
    return images([np.exp(-alpha * np.linspace(0, 4, 300)) * np.cos(np.linspace(0, 9, 300))])


RATES = np.linspace(0, 4, 300)


SMOOTH_EXACT = images(
    [-np.expm1(-RATES) / np.maximum(RATES, 1e-300) * np.cos(np.linspace(0, 9, 300))]
)


SMOOTH_EXACT[0].view(-1)[0] = 1.0  # rate 0


def relative(result: PathIntegral, exact: torch.Tensor) -> float:
    return float((result.integral - exact).norm() / exact.norm())


@pytest.mark.parametrize('steps', [1, 2, 3, 4, 5, 6, 17, 80])
def test_the_adaptive_rule_spends_its_steps_and_never_twice_on_a_node(steps):
    density = Density(jumping)
    integrate(density, ADAPTIVE, steps)
    assert len(density.nodes) == len(set(density.nodes)) == steps
    assert all(0 <= node <= 1 for node in density.nodes)


def test_the_adaptive_rule_is_the_trapezoid_rule_on_its_nodes():
    density = Density(jumping)
    result = integrate(density, ADAPTIVE, 60)
    nodes = np.sort(density.nodes)
    values = torch.cat([jumping(node) for node in nodes]).numpy()
    assert result.integral[0].numpy() == pytest.approx(np.trapezoid(values, nodes, axis=0))
    assert np.mean((nodes > 0.19) & (nodes < 0.41)) > 0.8  # it looks where something happens


def test_the_adaptive_rule_needs_fewer_steps_where_gradients_jump():
    adaptive = relative(integrate(Density(jumping), ADAPTIVE, 32), JUMPING_EXACT)
    for name in ('midpoint', 'gauss-legendre', 'clenshaw-curtis'):
        assert adaptive < relative(integrate(Density(jumping), name, 32), JUMPING_EXACT) / 1.5


def test_memory_of_the_adaptive_rule_is_bounded(monkeypatch):
    """For any number of steps, densities are kept for open intervals only, not for all nodes."""
    monkeypatch.setattr('igseg.method.integral.MAX_OPEN_INTERVALS', 20)
    references, most = [], 0

    def density(alpha):
        nonlocal most
        values = jumping(alpha)
        references.append(weakref.ref(values))
        most = max(most, sum(reference() is not None for reference in references))
        return values

    integrate(Density(density), ADAPTIVE, 400)
    assert len(references) == 400 and 20 < most <= 4 * 20


@pytest.mark.parametrize('name', RULE_NAMES)
@pytest.mark.parametrize('function, exact', [(jumping, JUMPING_EXACT), (smooth, SMOOTH_EXACT)])
def test_all_rules_converge_and_their_reported_error_is_honest(name, function, exact):
    for steps in (7, 15, 31, 63):
        result = integrate(Density(function), name, steps)
        (reported,) = result.relative_errors().tolist()
        true = relative(result, exact)
        assert true <= 1.1 * reported
        if name == ADAPTIVE and function is jumping:
            assert reported < 3 * true  # not only cautious, but near
    assert true < 0.02


@pytest.mark.parametrize('name', [ADAPTIVE, *NESTED])
def test_a_tolerance_is_reached_without_computing_anything_twice(name):
    density = Density(jumping)
    result = integrate(density, name, 2000, lambda result: float(result.relative_errors()) < 0.01)
    assert relative(result, JUMPING_EXACT) < 0.01 or name == 'gauss-kronrod'  # it ends at 63
    assert len({round(node, 9) for node in density.nodes}) == len(density.nodes)
    if name == ADAPTIVE:
        assert len(density.nodes) < 100


def test_tolerance_needs_a_nested_rule_and_enough_steps():
    with pytest.raises(InputError, match='not nested'):
        integrate(Density(smooth), 'gauss-legendre', 100, lambda result: True)
    with pytest.raises(InputError, match='at least 3'):
        integrate(Density(smooth), 'midpoint', 2, lambda result: True)


def test_of_several_targets_the_less_exact_decides():
    def both(alpha):
        return torch.cat([smooth(alpha) * 1e6, jumping(alpha)])

    alone, together = Density(jumping), Density(both)
    integrate(alone, ADAPTIVE, 40)
    result = integrate(together, ADAPTIVE, 40)
    near = [sum(0.2 < node < 0.4 for node in d.nodes) for d in (alone, together)]
    assert near[1] > 0.6 * near[0]  # the large target does not drown the small one
    assert result.relative_errors().shape == (2,)


def test_constant_and_zero_densities():
    for value in (0.0, 3.0):
        result = integrate(Density(lambda _, v=value: torch.full((1, 3, 2, 2), v)), ADAPTIVE, 20)
        assert torch.allclose(result.integral, torch.tensor(value))
        assert not result.error.variance.any()
    assert PathIntegral(torch.zeros(1, 3, 2, 2)).relative_errors() is None
    assert integrate(Density(smooth), 'midpoint', 1).relative_errors() is None


# ------------------------------------------------------------------ exact ground truth


def test_polynomial_networks_in_closed_form():
    """F = sum of w x^4 with x = alpha u: the density is 4 w u^4 alpha^3, the map w u^4."""
    u, w = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()

    def density(alpha):
        return 4 * w * u**4 * alpha**3

    exact = w * u**4
    for name, steps in (('gauss-legendre', 2), ('clenshaw-curtis', 5), ('gauss-kronrod', 3)):
        assert relative(integrate(Density(density), name, steps), exact) < 1e-12
    for name in RULE_NAMES:
        result = integrate(Density(density), name, 15)
        assert relative(result, exact) <= 1e-12 + float(result.relative_errors()) < 0.2


class ReluNetwork(nn.Module):
    """Two hidden layers of ReLUs on 12 inputs: piecewise linear along a line."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(12, 40).double(), nn.Linear(40, 40).double()
        self.last = nn.Linear(40, 1).double()

    def before(self, points):
        """Inputs of both ReLU layers, (points, 80)."""
        first_inputs = self.first(points)
        return torch.cat([first_inputs, self.second(first_inputs.relu())], dim=1)

    def forward(self, points):
        return self.last(self.second(self.first(points).relu()).relu())[:, 0]

    def gradient(self, points):
        points = points.clone().requires_grad_()
        return torch.autograd.grad(self(points).sum(), points)[0]


def breakpoints(network, start, change) -> np.ndarray:
    """The alphas at which a ReLU switches. Between two of them, all inputs are linear in alpha.

    ExactLine (Sotoudeh and Thakur, NeurIPS 2019): solve the first layer, then between its
    breakpoints the second.
    """
    with torch.no_grad():
        points = np.array([0.0, 1.0])
        for layer in (slice(0, 40), slice(40, 80)):
            ends = network.before(start + torch.from_numpy(points)[:, None] * change)[:, layer]
            low, high = ends[:-1].numpy(), ends[1:].numpy()
            with np.errstate(divide='ignore', invalid='ignore'):
                share = low / (low - high)
            piece, unit = np.nonzero((share > 0) & (share < 1))
            new = points[piece] + share[piece, unit] * np.diff(points)[piece]
            points = np.unique(np.concatenate([points, new]))
    return points


@pytest.mark.parametrize('seed', range(4))
def test_a_relu_network_against_its_exact_integral(seed):
    network = ReluNetwork()
    generator = torch.Generator().manual_seed(seed)
    start, change = 3 * torch.randn(2, 1, 12, generator=generator, dtype=torch.float64)
    ends = breakpoints(network, start, change)
    assert len(ends) > 15
    middles = torch.from_numpy((ends[1:] + ends[:-1]) / 2)[:, None]
    gradients = network.gradient(start + middles * change)  # constant on each piece
    exact = (torch.from_numpy(np.diff(ends)) @ gradients * change).reshape(1, 3, 2, 2)
    with torch.no_grad():
        total = float(network(start + change) - network(start))
    assert float(exact.sum()) == pytest.approx(total)  # completeness holds exactly

    def density(alpha):
        return (network.gradient(start + alpha * change) * change).reshape(1, 3, 2, 2)

    for name in RULE_NAMES:
        for steps in (15, 31, 63):
            result = integrate(Density(density), name, steps)
            # one small network: single maps may be off by more, see benchmarks/quadrature.py
            assert relative(result, exact) <= 1.5 * float(result.relative_errors())
    result = integrate(
        Density(density), ADAPTIVE, 1000, lambda f: float(f.relative_errors()) < 0.01
    )
    assert relative(result, exact) < 0.01


def test_fixed_rules_start_with_all_their_nodes_adaptive_with_a_few():
    assert len(first_nodes('midpoint', 50, False)) == 50
    assert len(first_nodes('midpoint', 50, True)) == 3
    assert len(first_nodes(ADAPTIVE, 50, False)) == FIRST_NODES


def test_lengths_outside_open_rules_count_as_uncertain():
    """The midpoint rule has no information about the density before its first node."""
    rule = FIXED_RULES['midpoint'](2)
    result = sum_rule(Density(lambda alpha: torch.full((1, 3, 1, 1), alpha)), rule)
    assert float(result.error.variance[0, 0, 0, 0]) == pytest.approx((1.0 / 2 * 0.5) ** 2)
