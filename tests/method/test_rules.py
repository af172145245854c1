"""The quadrature rules: weights, nodes, degrees, and the order of their errors."""

import numpy as np
import pytest

from igseg.method.rules import ADAPTIVE, FIXED_RULES, NESTED, first_nodes
from integrated_gradients import InputError


def steps_of(name: str) -> tuple[int, ...]:
    return NESTED[name] if name == 'gauss-kronrod' else (2, 3, 5, 8, 50, 301)


EACH = [(name, steps) for name in FIXED_RULES for steps in steps_of(name)]


FEW = [(name, steps) for name, steps in EACH if steps <= 8]


@pytest.mark.parametrize('name, steps', EACH)
def test_weights_sum_to_one_and_nodes_rise_inside_the_interval(name, steps):
    rule = FIXED_RULES[name](steps)
    assert rule.name == name
    assert rule.nodes.shape == rule.weights.shape == (steps,)
    assert abs(rule.weights.sum() - 1) < 1e-12
    assert (rule.weights > 0).all()
    assert rule.nodes[0] >= 0 and rule.nodes[-1] <= 1 and (np.diff(rule.nodes) > 0).all()
    assert rule.nodes + rule.nodes[::-1] == pytest.approx(1, abs=1e-14)


def moment_errors(rule, degrees) -> np.ndarray:
    """Errors of the rule on Legendre polynomials over [0, 1], whose integrals are 1, 0, 0, …"""
    values = np.polynomial.legendre.legvander(2 * rule.nodes - 1, max(degrees))
    return np.abs(rule.weights @ values - (np.arange(max(degrees) + 1) == 0))


@pytest.mark.parametrize('name, steps', EACH)
def test_polynomials_up_to_the_stated_degree_are_exact(name, steps):
    rule = FIXED_RULES[name](steps)
    assert moment_errors(rule, range(rule.degree + 1)).max() < 1e-12


@pytest.mark.parametrize('name, steps', FEW)
def test_the_stated_degree_is_the_highest(name, steps):
    rule = FIXED_RULES[name](steps)
    assert moment_errors(rule, range(rule.degree + 2))[-1] > 1e-6


@pytest.mark.parametrize('name', NESTED)
def test_nested_rules_keep_their_nodes(name):
    for few, more in zip(NESTED[name][:5], NESTED[name][1:6], strict=False):
        fine = FIXED_RULES[name](more).nodes
        for node in FIXED_RULES[name](few).nodes:
            assert np.abs(fine - node).min() < 1e-12


def test_gauss_kronrod_extends_gauss_as_tables_say():
    """Seven nodes: Kronrod's extension of three Gauss nodes (Patterson 1968; QUADPACK)."""
    nodes = 2 * FIXED_RULES['gauss-kronrod'](7).nodes - 1
    assert nodes[4:] == pytest.approx([0.4342437493468026, 0.7745966692414834, 0.9604912687080202])
    weights = 2 * FIXED_RULES['gauss-kronrod'](7).weights
    assert weights[3:] == pytest.approx(
        [0.4509165386584741, 0.4013974147759622, 0.2684880898683334, 0.1046562260264673]
    )
    with pytest.raises(InputError, match='3, 7, 15, 31, 63 steps, not 50'):
        FIXED_RULES['gauss-kronrod'](50)


@pytest.mark.parametrize('name', ['midpoint', 'trapezoid'])
def test_error_falls_with_the_square_of_the_number_of_cells(name):
    def error(cells):
        rule = FIXED_RULES[name](cells + (name == 'trapezoid'))
        return abs(rule.weights @ np.exp(rule.nodes) - (np.e - 1))

    assert error(10) / error(20) == pytest.approx(4, rel=0.01)


def test_gauss_legendre_is_spectral_on_a_smooth_integrand():
    rule = FIXED_RULES['gauss-legendre'](8)
    assert rule.weights @ np.exp(rule.nodes) == pytest.approx(np.e - 1, abs=1e-13)


def test_one_step():
    assert FIXED_RULES['midpoint'](1).nodes == pytest.approx([0.5])
    assert FIXED_RULES['gauss-legendre'](1).nodes == pytest.approx([0.5])
    assert first_nodes(ADAPTIVE, 1, False) == pytest.approx([0.5])
    for name in ('trapezoid', 'clenshaw-curtis'):
        with pytest.raises(InputError, match='at least 2'):
            FIXED_RULES[name](1)
