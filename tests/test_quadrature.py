"""The quadrature rules."""

import numpy as np
import pytest

from integrated_gradients import RULES, InputError


@pytest.mark.parametrize('steps', [2, 3, 8, 50, 301])
@pytest.mark.parametrize('name', RULES)
def test_weights_sum_to_one_and_nodes_rise_inside_the_interval(name, steps):
    rule = RULES[name](steps)
    assert rule.name == name
    assert rule.nodes.shape == rule.weights.shape == (steps,)
    assert abs(rule.weights.sum() - 1) < 1e-12
    assert (rule.weights > 0).all()
    assert rule.nodes[0] >= 0 and rule.nodes[-1] <= 1 and (np.diff(rule.nodes) > 0).all()


@pytest.mark.parametrize('steps', [2, 5, 8])
@pytest.mark.parametrize('name', RULES)
def test_polynomials_up_to_the_stated_degree_are_exact_and_the_next_is_not(name, steps):
    rule = RULES[name](steps)
    for degree in range(rule.degree + 1):
        assert rule.weights @ rule.nodes**degree == pytest.approx(1 / (degree + 1), abs=1e-12)
    beyond = rule.degree + 1
    error = abs(rule.weights @ rule.nodes**beyond - 1 / (beyond + 1))
    assert error > 1e-13


@pytest.mark.parametrize('name', ['midpoint', 'trapezoid'])
def test_error_falls_with_the_square_of_the_number_of_cells(name):
    def error(cells):
        rule = RULES[name](cells + (name == 'trapezoid'))
        return abs(rule.weights @ np.exp(rule.nodes) - (np.e - 1))

    assert error(10) / error(20) == pytest.approx(4, rel=0.01)


def test_gauss_legendre_is_spectral_on_a_smooth_integrand():
    rule = RULES['gauss-legendre'](8)
    assert rule.weights @ np.exp(rule.nodes) == pytest.approx(np.e - 1, abs=1e-13)


def test_one_step_is_a_rule_except_for_the_trapezoid():
    assert RULES['midpoint'](1).nodes == pytest.approx([0.5])
    assert RULES['gauss-legendre'](1).nodes == pytest.approx([0.5])
    with pytest.raises(InputError, match='at least 2'):
        RULES['trapezoid'](1)
