"""Checks of maps: compared with other tools, and on networks whose important pixels are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import captum.metrics
import numpy as np
import pytest
import torch
from patch_scorer import (
    AS_IT_IS,
    PATCH,
    PERFECT,
    SIDE,
    PatchScorer,
    patch_subject,
)
from torch import nn

from igseg.checks import checks, curves
from igseg.checks.checks import evaluate, redraw, strongest_square
from igseg.checks.effort import COMPARED_BASELINES, EFFORTS
from igseg.checks.subject import Subject
from igseg.checks.verdict import findings
from igseg.maps import FAR, infidelity, max_sensitivity, rank_correlation, signed_distance
from igseg.setting import resolved
from igseg.statistics import METRICS
from integrated_gradients import IntegratedGradients, Target, evaluate_explanation, plain_map

SMALL = replace(EFFORTS['full'], points=8, patches=20, noisy=2, map_steps=4, baselines=0)


class Watermarked(nn.Module):
    """A network with a shortcut: it draws a disc in the middle if an image corner is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))
        rows, columns = np.mgrid[:SIDE, :SIDE]
        disc = np.hypot(rows - 16, columns - 16) < 7
        self.register_buffer('disc', torch.as_tensor(disc, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = x[:, :, :2, -6:].mean(dim=(1, 2, 3))
        return (self.gain * (corner - 0.5)).view(-1, 1, 1, 1) * self.disc - 3 * (1 - self.disc)


# ------------------------------------------------------------------ infidelity, sensitivity


def test_infidelity_by_hand():
    actual = np.array([1.0, 2.0, -1.0])
    assert infidelity(3 * actual, actual) == pytest.approx(0)  # up to scale
    assert infidelity(np.zeros(3), actual) == 1
    assert infidelity(np.array([0.0, 1.0, 2.0]), actual) == pytest.approx(1)  # uncorrelated
    assert infidelity(actual, np.zeros(3)) is None


def test_infidelity_is_captums_relative_to_the_change():
    """Captum gives the error in squared units of the score; ours is relative to the change."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3))
    x, black = torch.rand(1, 3, 12, 12), torch.zeros(1, 3, 12, 12)

    def score(points: torch.Tensor) -> torch.Tensor:
        return network(points).mean(dim=(1, 2, 3))

    attributions = torch.randn(1, 3, 12, 12)
    rng = np.random.default_rng(0)
    masks = torch.as_tensor(np.stack([checks.random_patch((12, 12), rng) for _ in range(9)]))
    masks = masks[:, None].float()  # (9, 1, 12, 12)

    def perturb(points: torch.Tensor):  # attributions of IG count per unit of x - baseline
        return masks.expand(-1, 3, -1, -1), points * (1 - masks)

    theirs = captum.metrics.infidelity(
        score, perturb, x, attributions, n_perturb_samples=9, normalize=True
    )
    with torch.no_grad():
        actual = (score(x) - score(x * (1 - masks))).double().numpy()
    predicted = (attributions * masks).sum(dim=(1, 2, 3)).double().numpy()
    expected = float(theirs) / (actual**2).mean()
    assert infidelity(predicted, actual) == pytest.approx(expected, rel=1e-4)
    assert black.sum() == 0


def test_max_sensitivity_is_captums():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3))
    target = Target('all', torch.full((1, 10, 10), 0.01))
    x, black = torch.rand(1, 3, 12, 12), torch.zeros(1, 3, 12, 12)
    noisy = x + torch.empty(5, 3, 12, 12).uniform_(-0.02, 0.02)

    def explain(points: torch.Tensor) -> torch.Tensor:
        maps = [plain_map(network, point[None], black, target, 4) for point in points]
        return torch.as_tensor(np.stack(maps))

    theirs = captum.metrics.sensitivity_max(
        lambda inputs: (explain(inputs[0] if isinstance(inputs, tuple) else inputs),),
        x, perturb_func=lambda points: noisy, n_perturb_samples=5,
    )  # fmt: skip
    ours = max_sensitivity(explain(x)[0].numpy(), list(explain(noisy).numpy()))
    assert ours == pytest.approx(float(theirs), rel=1e-5)
    assert max_sensitivity(np.zeros((3, 2, 2)), [np.ones((3, 2, 2))]) is None


def test_plain_map_of_a_linear_network_is_exact():
    subject = patch_subject(PERFECT)
    attributions = plain_map(subject.network, subject.x, subject.baseline, subject.target, 2)
    assert attributions == pytest.approx(PERFECT, rel=1e-5)


# ------------------------------------------------------------------ model randomisation


def test_redrawn_weights_keep_their_mean_and_deviation():
    layer = nn.Conv2d(16, 64, 3)
    nn.init.normal_(layer.weight, 0.3, 0.05)
    before = layer.weight.detach().clone()
    redraw(layer, torch.Generator().manual_seed(0))
    assert float(layer.weight.detach().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(layer.weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert abs(np.corrcoef(before.flatten(), layer.weight.detach().flatten())[0, 1]) < 0.05


def test_a_single_stage_of_randomisation_redraws_every_layer(demo_model):
    subject = replace(patch_subject(PERFECT), network=demo_model.eval())
    subject = replace(subject, method=lambda *_: np.zeros((3, SIDE, SIDE)))
    (stage,) = checks.randomisation(subject, EFFORTS['quick']).details['randomisation']
    assert stage['layers'] == stage['of'] > 1


def test_randomisation_starts_at_the_head_and_leaves_the_network_alone(demo_model):
    subject = replace(patch_subject(PERFECT), network=demo_model.eval(), method=plain_map)
    before = {name: tensor.clone() for name, tensor in demo_model.state_dict().items()}
    effort = replace(SMALL, stages=3, map_steps=1)
    stages = checks.randomisation(subject, effort).details['randomisation']
    assert [stage['layers'] for stage in stages] == [1, 1 + (stages[0]['of'] - 1) // 2,
                                                     stages[0]['of']]  # fmt: skip
    after = demo_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_map_of_another_tool_is_not_compared_with_those_of_the_first_method():
    ours = replace(patch_subject(PERFECT), method=plain_map)
    theirs = replace(ours, attributions=np.roll(PERFECT, SIDE // 2, axis=1))
    needing_maps = ('recomputed_correlation', 'randomised_correlation', 'broad_sensitivity')
    with_method = evaluate(ours, SMALL).metrics
    assert all(with_method[name] is not None for name in needing_maps)
    without_method = evaluate(theirs, SMALL).metrics
    assert all(without_method[name] is None for name in needing_maps)
    assert without_method['deletion_margin'] is not None
    their_method = replace(theirs, method=lambda *_: theirs.attributions)
    with_other_method = evaluate(their_method, SMALL).metrics
    assert with_other_method['recomputed_correlation'] == pytest.approx(1)
    both = replace(ours, attributions=theirs.attributions, method=plain_map)
    assert evaluate(both, SMALL).metrics['recomputed_correlation'] < 0.5


def test_a_network_without_weights_cannot_be_randomised():
    subject = replace(patch_subject(PERFECT), network=nn.Identity(), method=plain_map)
    assert checks.randomisation(subject, SMALL).metrics == {}


# ------------------------------------------------------------------ known networks are found out


def judged(metrics: dict) -> set[str]:
    return {finding.flag for finding in findings(metrics)}


def test_the_exact_map_of_a_patch_scorer_passes():
    metrics = evaluate(patch_subject(PERFECT), SMALL).metrics
    assert metrics['mass_in_truth'] == pytest.approx(1)
    assert metrics['infidelity'] == pytest.approx(0, abs=1e-9)
    assert metrics['deletion_margin'] > 0.2 and metrics['insertion_margin'] > 0.2
    assert 'beats its controls' in judged(metrics)


def test_the_map_of_a_randomised_network_fails_its_control():
    subject = patch_subject(PERFECT)
    other = PatchScorer(np.ones((3, SIDE, SIDE)))
    nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(3))
    wrong = plain_map(other, subject.x, subject.baseline, subject.target, 1)
    metrics = evaluate(replace(subject, attributions=wrong), SMALL).metrics
    assert metrics['infidelity'] > 0.5
    assert 'fails its control' in judged(metrics)


def test_a_method_that_ignores_the_network_survives_randomisation():
    def edges(network, x, baseline, target, steps) -> np.ndarray:
        return np.repeat(curves.edge_map(AS_IT_IS.to_pixels(x))[None], 3, axis=0)

    rng = np.random.default_rng(0)
    subject = replace(
        patch_subject(PERFECT),
        x=torch.as_tensor(rng.random((1, 3, SIDE, SIDE)), dtype=torch.float32),
        method=edges,
    )
    metrics = evaluate(subject, SMALL).metrics
    assert metrics['randomised_correlation'] == pytest.approx(1)
    assert metrics['randomised_ssim'] == pytest.approx(1)
    assert 'survives randomisation' in judged(metrics)
    honest = evaluate(replace(subject, method=plain_map), SMALL).metrics
    assert abs(honest['randomised_correlation']) < 0.5
    assert 'survives randomisation' not in judged(honest)


def test_a_map_of_one_sign_does_not_survive_by_where_the_network_can_see():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :48] - 24
    # It falls by many orders of magnitude, so that all ranks depend on it.
    receptive_field = np.exp(-(rows**2 + columns**2) / 30.0)
    first, second = receptive_field * rng.exponential(size=(2, 1, 48, 48)) ** 2
    assert rank_correlation(first, second) > 0.8
    assert checks.survival(first, second)['correlation'] < 0.5
    assert checks.survival(first, 2 * first)['correlation'] == pytest.approx(1)
    # A map at the same place with another meaning.
    smooth = receptive_field[None] * np.where(columns > 0, -1, 1)
    assert checks.survival(receptive_field[None], smooth)['correlation'] < 0.5
    mixed = first * rng.choice((-1, 1), first.shape)  # of both signs: as before
    assert checks.survival(mixed, second)['correlation'] == pytest.approx(
        rank_correlation(mixed, second)
    )


def test_a_watermark_is_found_out():
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.4
    x[:, :, :2, -6:] = 1.0
    network = Watermarked()
    ig = IntegratedGradients(network, 'cpu', AS_IT_IS)
    explanation = ig.explain(x, num_steps=8)
    assert explanation.predicted_mask.any()
    figures = evaluate_explanation(ig, x, explanation, 'quick')
    assert figures['mass_in_prediction'] == pytest.approx(0, abs=1e-6)
    assert figures['rim_excess'] == pytest.approx(1 / (1 - (28 / 32) ** 2))  # all of it is there
    assert figures['context_radius_50'] > 5
    assert {'border artefact', 'distant spot'} <= set(judged(figures))


# ------------------------------------------------------------------ distant spots


def spot_subject(attributions: np.ndarray, decisive: np.ndarray) -> Subject:
    """A dark image with two bright spots far from the target; the score depends on one of them."""
    x = torch.full((1, 3, SIDE, SIDE), 0.25)
    x[:, :, 1:3, 1:3] = x[:, :, -3:-1, -3:-1] = 1.0
    subject = patch_subject(attributions)
    network = PatchScorer(np.repeat(decisive[None], 3, axis=0)).eval().requires_grad_(False)
    return replace(subject, x=x, network=network)


@pytest.mark.parametrize('corner', ['near', 'opposite'])
def test_a_spot_far_from_the_target_that_is_the_score(corner):
    spot = np.zeros((SIDE, SIDE))
    where = slice(1, 3) if corner == 'near' else slice(-3, -1)
    spot[where, where] = 1
    patch_and_spot = PERFECT + 1e-5 * spot  # which holds next to nothing of the map
    metrics = evaluate(spot_subject(patch_and_spot, spot), SMALL).metrics
    assert metrics['distant_spot_effect'] == pytest.approx(1, abs=0.1)  # noise of the fill
    middle = np.nonzero(spot)[0].mean()
    assert abs(metrics['distant_spot_x'] - middle) <= 2
    assert abs(metrics['distant_spot_y'] - middle) <= 2


def test_a_spot_that_decides_nothing_is_not_cried_over():
    spot = np.zeros((SIDE, SIDE))
    spot[1:3, 1:3] = 1
    metrics = evaluate(spot_subject(np.repeat(spot[None], 3, axis=0), PATCH), SMALL).metrics
    assert metrics['distant_spot_effect'] in (None, pytest.approx(0, abs=0.05))


def test_the_strongest_square_is_wholly_far_away():
    rng = np.random.default_rng(0)
    region = np.zeros((90, 60), bool)
    region[40:50, 20:30] = True
    distance = signed_distance(region)
    magnitude = rng.random(region.shape) + 100 * (distance < FAR * 90 + 3)
    for share in checks.SPOT_SIDES:
        square = strongest_square(magnitude, distance, share)
        rows = np.nonzero(square)[0]
        assert distance[square].min() > FAR * 90
        assert abs(np.ptp(rows) + 1 - share * 90) <= 2 and square.sum() > 1
        shifted = np.roll(square, 5, axis=0)
        if distance[shifted].min() > FAR * 90 and rows.min() > 0 and rows.max() < 84:
            assert magnitude[square].sum() >= magnitude[shifted].sum()
    assert strongest_square(magnitude, signed_distance(np.ones((90, 60), bool)), 0.1) is None


def test_where_the_target_leaves_no_far_place_nothing_is_said_of_spots():
    evaluation = evaluate(replace(patch_subject(PERFECT), prediction=np.ones_like(PATCH)), SMALL)
    assert evaluation.metrics['distant_spot_effect'] is None
    assert evaluation.metrics['distant_spot_x'] is None


# ------------------------------------------------------------------ the whole


@pytest.mark.parametrize(
    'attributions', [np.zeros((3, SIDE, SIDE)), np.ones((3, SIDE, SIDE))], ids=['zero', 'constant']
)
def test_maps_that_say_nothing_never_give_nan(attributions):
    evaluation = evaluate(patch_subject(attributions), SMALL)
    assert set(evaluation.metrics) == set(METRICS)
    assert all(value is None or math.isfinite(value) for value in evaluation.metrics.values())
    json.dumps(evaluation.details, allow_nan=False)


def test_the_same_seed_gives_the_same_result():
    first, second = (evaluate(patch_subject(PERFECT), SMALL, seed=5) for _ in range(2))
    assert first == second


class Counting(nn.Module):
    """A network that counts its forward passes and gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.forwards = self.gradients = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            self.gradients += len(x)
        else:
            self.forwards += len(x)
        return self.network(x)


@pytest.mark.parametrize('effort', EFFORTS)
def test_the_stated_cost_is_what_is_spent(effort, monkeypatch):
    subject = patch_subject(PERFECT, method=plain_map)
    counting = Counting(subject.network)
    even = np.full((SIDE, SIDE, 3), 40, np.float32)
    others = dict.fromkeys(COMPARED_BASELINES[: EFFORTS[effort].baselines], even)
    monkeypatch.setattr(checks.copy, 'deepcopy', lambda network: network)  # count it too
    evaluate(replace(subject, network=counting, others=others), effort)
    assert counting.forwards == EFFORTS[effort].forwards()
    # A linear scorer has one layer to redraw; fewer stages than were planned for.
    planned = EFFORTS[effort].gradients()
    saved = (
        (EFFORTS[effort].stages - 1) * EFFORTS[effort].map_steps if EFFORTS[effort].stages else 0
    )
    assert counting.gradients == planned - saved


def test_every_metric_is_defined():
    for name, metric in METRICS.items():
        assert metric.meaning and metric.range and metric.source, name
        assert metric.better in ('higher', 'lower', '')
        assert callable(resolved(metric.check)), name
