"""Closed forms, the axioms, and an independent implementation."""

import captum.attr
import pytest
import torch
from helpers import explain, relative_error
from torch import nn

import integrated_gradients as module
from integrated_gradients import BASELINES, IntegratedGradients, Target


@pytest.fixture
def x():
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def baseline():
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights():
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize('rule', ['adaptive', 'midpoint', 'gauss-legendre'])
def test_linear_function_is_exact_with_one_step(x, baseline, weights, rule):
    result = explain(lambda v: (v * weights).sum((1, 2, 3)), x, baseline, num_steps=1, rule=rule)
    torch.testing.assert_close(result.attributions, (weights * (x - baseline))[0])
    assert result.completeness_gap < 1e-5


def test_quadratic_function(x, baseline, weights):
    result = explain(lambda v: (weights * v**2).sum((1, 2, 3)), x, baseline, num_steps=1)
    torch.testing.assert_close(result.attributions, (weights * (x**2 - baseline**2))[0])
    assert result.completeness_gap < 1e-4


def test_product_shares_equally_between_its_factors(x):
    def product(v):
        return v[:, 0, 0, 0] * v[:, 1, 2, 3]

    result = explain(product, x, torch.zeros_like(x), num_steps=1)
    expected = torch.zeros_like(x)
    expected[0, 0, 0, 0] = expected[0, 1, 2, 3] = x[0, 0, 0, 0] * x[0, 1, 2, 3] / 2
    torch.testing.assert_close(result.attributions, expected[0])


def test_cubic_function_is_exact_with_two_gauss_legendre_nodes_only(x, baseline):
    exact = x**3 - baseline**3
    for rule, good in (('gauss-legendre', True), ('midpoint', False)):
        result = explain(lambda v: (v**3).sum((1, 2, 3)), x, baseline, num_steps=2, rule=rule)
        assert torch.allclose(result.attributions, exact[0], atol=1e-4) == good


def test_all_rules_agree_as_steps_grow(x, baseline):
    maps = [
        explain(lambda v: v.sin().sum((1, 2, 3)).tanh(), x, baseline, rule=rule,
                num_steps=63 if rule == 'gauss-kronrod' else 400)
        for rule in module.RULE_NAMES
    ]  # fmt: skip
    for other in maps[1:]:
        torch.testing.assert_close(other.attributions, maps[0].attributions, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------ axioms


def test_completeness_on_a_trained_network(ig, brain):
    few = ig.explain(brain, num_steps=16)
    many = ig.explain(brain, num_steps=128)
    assert many.map_error < few.map_error / 3
    change = many.score - many.baseline_score
    assert abs(float(many.attributions.sum()) - change) / abs(change) < 0.05
    assert many.completeness_gap < few.completeness_gap
    assert many.score > 0 > many.baseline_score  # it found the structure; black holds none


def test_sensitivity_dummy_pixels_get_nothing_and_the_only_difference_gets_all(x):
    baseline = x.clone()
    baseline[0, 1, 2, 2] += 1
    result = explain(lambda v: v[:, :, 2, 2].sum(1).exp(), x, baseline, num_steps=64)
    only = result.attributions[1, 2, 2]
    assert abs(float(only)) == pytest.approx(abs(result.score - result.baseline_score), rel=1e-3)
    assert result.attributions.abs().sum() == only.abs()
    dummy = explain(lambda v: v[:, 0].sum((1, 2)) ** 2, x, torch.zeros_like(x), num_steps=4)
    assert not dummy.attributions[1:].any()


def test_implementation_invariance_batch_norm_folded_or_not():
    torch.manual_seed(3)
    conv, norm, head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    plain = nn.Sequential(conv, norm, nn.ReLU(), head).eval()
    folded = nn.Sequential(
        nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.ReLU(), head
    )
    image = torch.randn(1, 3, 16, 16)
    maps = [
        IntegratedGradients(net, 'cpu').compute_integrated_gradients(image, 'mean', 20, 'image')
        for net in (plain, folded)
    ]
    torch.testing.assert_close(maps[0], maps[1], atol=1e-6, rtol=1e-4)


def test_linearity_in_the_target(exact_ig, brain):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 64, 64, generator=generator) / 64**2
    map_of_first, map_of_second, map_of_sum = (
        exact_ig.explain(brain, Target('t', weights), num_steps=5).attributions
        for weights in (first, second, 2 * first - 3 * second)
    )
    assert relative_error(map_of_sum, 2 * map_of_first - 3 * map_of_second) < 1e-5


def test_exchanging_image_and_baseline_changes_the_sign(exact_ig, brain):
    black = torch.full_like(brain, -1.0)
    there = exact_ig.explain(brain, 'image', black, 6).attributions
    back = exact_ig.explain(black, 'image', brain, 6).attributions
    assert relative_error(there, -back) < 1e-5


def test_image_equal_to_baseline_gives_zero_and_no_gap(ig, brain):
    result = ig.explain(brain, baseline_type=brain, num_steps=3)
    assert not result.attributions.any()
    assert result.completeness_gap is None


@pytest.mark.parametrize(
    'total, score, low, gap',
    [(9.0, 10.0, 0.0, 0.1), (-9.0, -10.0, 0.0, 0.1), (1.0, 5.0, 5.0, None), (0.0, 0.0, 0.0, None)],
)
def test_completeness_gap_by_hand(total, score, low, gap):
    computed = module.completeness_gap(total, score, low)
    assert computed == (None if gap is None else pytest.approx(gap))


# ------------------------------------------------------------------ an independent implementation


@pytest.mark.parametrize(
    ('rule', 'method', 'baseline_type'),
    [('gauss-legendre', 'gausslegendre', 'zero'), ('midpoint', 'riemann_middle', 'blur')],
)
def test_agreement_with_captum(exact_ig, brain, rule, method, baseline_type):
    ours = exact_ig.explain(brain, baseline_type=baseline_type, num_steps=9, rule=rule)
    assert ours.rule == rule
    pixels = BASELINES[baseline_type](exact_ig.preprocessing.to_pixels(brain), None)
    region = ours.region

    def mean_logit(images):
        return exact_ig.model(images)[:, 0][:, region].mean(dim=1)

    theirs = captum.attr.IntegratedGradients(mean_logit).attribute(
        brain.double(),
        exact_ig.preprocessing.normalise(pixels).double(),
        n_steps=9,
        method=method,
        internal_batch_size=3,
    )
    assert relative_error(ours.attributions, theirs) < 1e-4
