"""The walk along the paths: what targets share, tolerances, and the trend of score and mask."""

import math

import pytest
import torch
from helpers import explain, relative_error

from igseg.engine.graph import Plan
from igseg.engine.sampler import PathSampler
from igseg.method import walk
from integrated_gradients import InputError, Target


@pytest.mark.parametrize('step_batch', [1, 3])
@pytest.mark.parametrize(
    ('what', 'formula'),
    [
        ('logits', lambda v: 1 / (v - 0.625).mean((1, 2, 3))),
        ('gradients', lambda v: (v - 0.625).mean((1, 2, 3)).abs().sqrt()),
    ],
)
def test_the_step_where_something_is_not_finite_is_named(what, formula, step_batch):
    x = torch.ones(3, 8, 8)
    with pytest.raises(InputError, match=rf'the {what} are not finite at alpha = 0\.625 '):
        explain(formula, x, torch.zeros_like(x), num_steps=4, rule='midpoint',
                step_batch=step_batch)  # fmt: skip


# ------------------------------------------------------------------ shared forward passes


def test_several_targets_share_the_forward_passes(exact_ig, brain, monkeypatch):
    exact_ig.explain(brain, num_steps=9, rule='midpoint')  # prepares, and tries a batch
    rows = torch.arange(64).view(-1, 1).expand(64, 64)
    regions = [rows < 20, rows > 50, torch.ones(64, 64, dtype=torch.bool)]
    spent = {'forwards': 0, 'backwards': 0}

    def count(what, work):
        def counted(plan, x, *rest):
            spent[what] += len(x)
            return work(plan, x, *rest)

        return counted

    gradients = torch.autograd.grad

    def grad(outputs, inputs, **options):
        spent['backwards'] += len(inputs)
        return gradients(outputs, inputs, **options)

    monkeypatch.setattr(Plan, 'run', count('forwards', Plan.run))
    monkeypatch.setattr(torch.autograd, 'grad', grad)
    counted = []
    for targets in (regions[:1], regions):
        spent |= {'forwards': 0, 'backwards': 0}
        together = exact_ig.explain_targets(brain, targets, num_steps=9, rule='midpoint')
        counted.append((spent['forwards'], spent['backwards']))
        passes = {explanation.cost.forward_passes + 2 for explanation in together}
        assert passes == {spent['forwards']}
    # 9 nodes, the prediction, F(x'), the crop to the first region, which is compared, and 2 points
    # beside the path for the slopes, which do not count.
    assert counted == [(14, 9), (13, 27)]
    for region, explanation in zip(regions, together, strict=True):
        alone = exact_ig.explain(brain, region, num_steps=9, rule='midpoint')
        assert relative_error(explanation.attributions, alone.attributions) < 1e-9
        assert explanation.score == pytest.approx(alone.score)
        assert explanation.trend.scores == pytest.approx(alone.trend.scores)


def test_the_same_target_object_may_be_given_twice(ig, brain):
    target = Target('t', torch.rand(1, 64, 64) / 64**2)
    first, second = ig.explain_targets(brain, [target, target], num_steps=3)
    assert relative_error(second.attributions, first.attributions) < 1e-6


def test_open_rules_need_two_more_forward_passes_and_a_crop_one_for_comparison(exact_ig, brain):
    explanation = exact_ig.explain(brain, num_steps=9, rule='midpoint')
    assert explanation.cropping.computed_share < 0.9
    assert explanation.cost.forward_passes == 9 + 2 + 1 and explanation.gradient_evaluations == 9
    whole = exact_ig.explain(brain, 'image', num_steps=9, rule='midpoint')
    assert whole.cropping.computed_share == 1 and whole.cost.forward_passes == 9 + 2


# ------------------------------------------------------------------ tolerance


@pytest.mark.parametrize('rule', ['adaptive', 'clenshaw-curtis'])
def test_a_tolerance_is_reached_and_is_true(ig, brain, rule):
    explanation = ig.explain(brain, rule=rule, tolerance=0.15, max_steps=150)
    assert explanation.within_tolerance and explanation.map_error <= 0.15
    assert explanation.completeness_gap <= 0.15
    assert explanation.steps == explanation.gradient_evaluations < 150
    reference = ig.explain(brain, rule='trapezoid', num_steps=129)
    assert relative_error(explanation.attributions, reference.attributions) < 0.15
    assert explanation.uncertainty.shape == brain.shape[-2:]
    assert (explanation.uncertainty >= 0).all()


def test_a_tolerance_out_of_reach_is_told(ig, brain):
    explanation = ig.explain(brain, tolerance=1e-6, max_steps=9)
    assert explanation.within_tolerance is False and explanation.steps == 9
    assert ig.explain(brain, num_steps=2).within_tolerance is None


def test_tolerance_of_image_equal_to_baseline(ig, brain):
    explanation = ig.explain(brain, baseline_type=brain, tolerance=0.1, max_steps=9)
    assert not explanation.attributions.any() and explanation.map_error is None


@pytest.mark.parametrize('deviation', [math.inf, math.nan])
def test_an_error_that_rounding_makes_infinite_is_unknown(ig, brain, monkeypatch, deviation):
    monkeypatch.setattr(PathSampler, 'check_precision', lambda *args: deviation)
    explanation = ig.explain(brain, num_steps=3, precision='bfloat16')
    assert explanation.cost.precision == 'bfloat16'
    assert explanation.map_error is None and explanation.uncertainty is None
    monkeypatch.setattr(walk, 'reduced_dtype', lambda *args: torch.bfloat16)
    chosen = ig.explain(brain, num_steps=3, precision='auto')
    assert chosen.cost.precision == 'float32' and chosen.map_error is not None


# ------------------------------------------------------------------ the way along the path


@pytest.mark.parametrize('rule', ['adaptive', 'midpoint', 'trapezoid'])
def test_trend_from_the_baseline_to_the_image(ig, brain, rule):
    explanation = ig.explain(brain, num_steps=7, rule=rule)
    trend = explanation.trend
    assert len(trend.alphas) == len(trend.scores) == 7 + 2 * (rule == 'midpoint')
    assert trend.alphas[0] == 0 and trend.alphas[-1] == 1
    assert list(trend.alphas) == sorted(trend.alphas)
    assert trend.scores[0] == pytest.approx(explanation.baseline_score)
    assert trend.scores[-1] == pytest.approx(explanation.score)
    assert trend.mask_iou[-1] == 1
    assert all(0 <= iou <= 1 for iou in trend.mask_iou if iou is not None)
    assert trend.mask_iou[0] == 0  # black holds no structure
