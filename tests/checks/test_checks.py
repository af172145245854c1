"""Checks of faithfulness: by hand on analytic maps, against other tools, on networks whose
important pixels are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import captum.metrics
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from igseg.checks import checks, curves
from igseg.checks.checks import evaluate, redraw, strongest_square
from igseg.checks.curves import (
    FILLS,
    Curve,
    _curve_metrics,
    displaced,
    removal_order,
    stays_between,
    superpixels,
    without,
)
from igseg.checks.subject import COMPARED_BASELINES, EFFORTS, FORWARDS_A_GRADIENT, Effort, Subject
from igseg.checks.verdict import findings
from igseg.maps import (
    FAR,
    edge_excess,
    holding_radii,
    infidelity,
    localisation,
    max_sensitivity,
    profile,
    rank_correlation,
    signed_distance,
    similarity,
    top_overlap,
)
from igseg.method.paths import plain_map
from igseg.preprocessing import Preprocessing
from igseg.statistics import METRICS
from integrated_gradients import IntegratedGradients, Target, evaluate_explanation

SIDE = 32
AS_IT_IS = Preprocessing(SIDE, 'stretch', (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PATCH = np.zeros((SIDE, SIDE), bool)
PATCH[8:24, 8:24] = True  # a quarter of the image
SMALL = replace(EFFORTS['full'], points=8, patches=20, noisy=2, map_steps=4, baselines=0)


class PatchScorer(nn.Module):
    """A linear network: every logit is the weighted sum of the image."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32))  # (3, H, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).sum(dim=(1, 2, 3))
        return score.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])


class Watermarked(nn.Module):
    """A Clever Hans: it draws a disc in the middle where a corner of the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(20.0))
        rows, columns = np.mgrid[:SIDE, :SIDE]
        disc = np.hypot(rows - 16, columns - 16) < 7
        self.register_buffer('disc', torch.as_tensor(disc, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corner = x[:, :, :2, -6:].mean(dim=(1, 2, 3))
        return (self.gain * (corner - 0.5)).view(-1, 1, 1, 1) * self.disc - 3 * (1 - self.disc)


def whole_image_target() -> Target:
    return Target('image', torch.full((1, SIDE, SIDE), 1 / SIDE**2))


def patch_subject(attributions: np.ndarray, **options) -> Subject:
    """An evenly bright image, scored by its patch alone, against black."""
    network = PatchScorer(np.repeat(PATCH[None], 3, axis=0) / PATCH.sum())
    network.eval().requires_grad_(False)
    x = torch.full((1, 3, SIDE, SIDE), 0.5)
    return Subject(
        np.asarray(attributions, np.float32), network, whole_image_target(), x,
        torch.zeros_like(x), AS_IT_IS, region=PATCH, prediction=PATCH, truth=PATCH,
        batch=4, **options,
    )  # fmt: skip


PERFECT = np.repeat(PATCH[None], 3, axis=0) * 0.5 / PATCH.sum()  # the exact map of that network


# ------------------------------------------------------------------ comparing maps


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 20, 20)).round(1)  # with ties
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other, axis=None)[0])
    assert rank_correlation(one, np.exp(one)) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, np.ones_like(one)) is None


def test_overlap_and_similarity_by_hand():
    ramp = np.arange(100.0).reshape(10, 10)
    assert top_overlap(ramp, ramp) == 1 and top_overlap(ramp, -ramp) == 0
    moved = np.roll(ramp, 2)  # of the five strongest, two have gone elsewhere
    assert top_overlap(ramp, moved) == pytest.approx(3 / 5)
    assert top_overlap(ramp, np.ones_like(ramp)) is None
    assert similarity(ramp, ramp) == pytest.approx(1) and similarity(ramp, 5 * ramp) == 1
    assert similarity(ramp, ramp[::-1]) < 0.5
    assert similarity(ramp, np.zeros_like(ramp)) is None
    assert similarity(ramp[:3], ramp[:3]) is None


# ------------------------------------------------------------------ localisation


@pytest.mark.parametrize(
    ('relevance', 'expected'),
    [
        (PATCH * 1.0, (1, 1, 1, 1)),
        (~PATCH * 1.0, (0, 0, 0, 0)),
        (np.ones((SIDE, SIDE)), (0.25, 0.25, 0.25, 0.25)),  # a constant map knows nothing
        (np.zeros((SIDE, SIDE)), (None, None, None, None)),
        # one pixel inside: all mass, and of the tied rest a share that is inside
        (np.eye(SIDE)[:, [9]] * np.eye(SIDE)[[9]],
         (1, (1 + 255 * 255 / 1023) / 256, 1, (1 + 50 * 255 / 1023) / 51)),
    ],
    ids=['perfect', 'inverted', 'constant', 'zero', 'single pixel'],
)  # fmt: skip
def test_localisation_of_analytic_maps(relevance, expected):
    found = localisation(relevance, PATCH)
    assert list(found) == ['mass', 'rank', 'pointing', 'top']
    for value, wanted in zip(found.values(), expected, strict=True):
        assert value == (None if wanted is None else pytest.approx(wanted))


def test_localisation_in_an_empty_mask_is_unknown():
    assert set(localisation(PATCH * 1.0, np.zeros_like(PATCH)).values()) == {None}


def test_localisation_agrees_with_quantus():
    """Where no pixels tie; where they do, Quantus takes them in the order of their places, and
    counts a constant map as a hit of the pointing game."""
    quantus = pytest.importorskip('quantus', reason='pip install --no-deps quantus')
    rng = np.random.default_rng(1)
    maps = rng.random((3, SIDE, SIDE)) * (1 + 3 * PATCH)
    masks = np.repeat(PATCH[None], 3, axis=0)
    quiet = {'disable_warnings': True, 'display_progressbar': False, 'abs': False,
             'normalise': False, 'return_aggregate': False}  # fmt: skip
    theirs = {
        'mass': quantus.RelevanceMassAccuracy(**quiet),
        'rank': quantus.RelevanceRankAccuracy(**quiet),
        'pointing': quantus.PointingGame(**quiet),
        'top': quantus.TopKIntersection(k=round(0.05 * SIDE**2), **quiet),
    }
    for name, metric in theirs.items():
        found = metric(
            model=None, x_batch=np.zeros((3, 1, SIDE, SIDE)), y_batch=None,
            a_batch=maps[:, None], s_batch=masks[:, None],
        )  # fmt: skip
        ours = [localisation(relevance, PATCH)[name] for relevance in maps]
        assert ours == pytest.approx([float(value) for value in found]), name


# ------------------------------------------------------------------ rim, padding, context


def test_an_even_map_has_no_excess_anywhere():
    content = np.zeros_like(PATCH)
    content[4:28] = True
    found = edge_excess(np.ones((SIDE, SIDE)), PATCH, content)
    assert found == {'rim_excess': pytest.approx(1), 'padding_excess': pytest.approx(1)}
    assert edge_excess(np.ones((SIDE, SIDE)), PATCH)['padding_excess'] is None
    assert edge_excess(np.zeros((SIDE, SIDE)), PATCH)['rim_excess'] is None


def test_rim_and_padding_are_told_apart():
    content = np.zeros_like(PATCH)
    content[4:28] = True
    rim, padding = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
    rim[4, 3], padding[3, 3] = 1, 1
    assert edge_excess(rim, PATCH, content)['rim_excess'] > 1
    assert edge_excess(rim, PATCH, content)['padding_excess'] == 0
    assert edge_excess(padding, PATCH, content)['rim_excess'] == 0
    assert edge_excess(padding, PATCH, content)['padding_excess'] == pytest.approx(4)  # 1 / (1/4)


def test_a_target_at_the_border_is_not_the_rim():
    touching = np.zeros_like(PATCH)
    touching[:, :3] = True
    assert edge_excess(touching * 1.0, touching)['rim_excess'] == 0


def test_signed_distance_by_hand():
    region = np.zeros((5, 7), bool)
    region[1:4, 2:5] = True
    distance = signed_distance(region)
    assert distance[2].tolist() == [2, 1, 0, -1, 0, 1, 2]
    assert signed_distance(np.ones((4, 4), bool)).max() <= 0


def test_radii_that_hold_a_share_by_hand():
    distance = np.array([[-1.0, 0.0, 1.0, 2.0, 3.0]])
    magnitude = np.array([[2.0, 3.0, 4.0, 0.0, 1.0]])
    assert holding_radii(magnitude, distance, (50, 90, 95)) == {50: 0, 90: 1, 95: 3}
    assert holding_radii(magnitude * 0, distance, (50,)) == {50: None}


def test_profile_of_an_even_map_is_one_everywhere():
    middles, values = profile(np.full((SIDE, SIDE), 3.0), signed_distance(PATCH))
    assert values == pytest.approx(np.ones(len(values)))
    assert middles == sorted(middles)
    assert set(profile(np.zeros((SIDE, SIDE)), signed_distance(PATCH))[1]) == {None}


def test_receptive_field_of_a_patch_scorer_is_its_patch():
    found = evaluate(patch_subject(PERFECT), 'quick').metrics
    assert found['receptive_radius_95'] == found['context_radius_95'] == 0
    assert found['context_inside'] == pytest.approx(1) and found['context_near'] == 0


# ------------------------------------------------------------------ deletion and insertion


def areas(attributions: np.ndarray, fill: str = 'baseline', points: int = 16) -> dict:
    effort = Effort(fills=(fill,), units=('pixel',), points=points, displaced=2, random_maps=4)
    rows = evaluate(patch_subject(attributions), effort).details['curves']
    return {row['kind']: {k: row[k]['area'] for k in ('attribution', 'random')} for row in rows}


def test_curves_of_the_exact_map_by_hand():
    found = areas(PERFECT)  # a quarter of the pixels hold the whole score
    assert found['deletion']['attribution'] == pytest.approx(1 / 8)
    assert found['insertion']['attribution'] == pytest.approx(7 / 8)
    assert found['deletion']['random'] == pytest.approx(0.5, abs=0.03)
    assert found['insertion']['random'] == pytest.approx(0.5, abs=0.03)


def test_curves_of_an_inverted_and_of_a_constant_map():
    inverted = np.repeat(~PATCH[None], 3, axis=0) * 1.0
    assert areas(inverted)['deletion']['attribution'] == pytest.approx(7 / 8)
    assert areas(inverted)['insertion']['attribution'] == pytest.approx(1 / 8)
    constant = np.ones((3, SIDE, SIDE))
    assert areas(constant)['deletion']['attribution'] == pytest.approx(0.5, abs=0.05)


def test_a_displaced_map_is_the_same_elsewhere():
    relevance = np.random.default_rng(0).random((20, 30))
    moved = [displaced(relevance, np.random.default_rng(seed)) for seed in range(3)]
    for one in moved:
        assert sorted(one.ravel()) == sorted(relevance.ravel())
        assert (one == relevance).mean() < 0.1
    assert not np.array_equal(moved[0], moved[1])
    again = displaced(relevance, np.random.default_rng(0))
    assert np.array_equal(moved[0], again)


def test_the_exact_map_beats_itself_in_the_wrong_place_and_a_random_one_does_not():
    """What the patch network sees: a quarter of the image."""
    exact = evaluate(patch_subject(PERFECT), CHECKED).metrics
    assert exact['deletion_margin'] > 0.3 and exact['insertion_margin'] > 0.3
    noise = np.random.default_rng(0).normal(size=PERFECT.shape)
    random = evaluate(patch_subject(noise), CHECKED).metrics
    assert abs(random['deletion_margin']) < 0.1 and abs(random['insertion_margin']) < 0.1


CHECKED = Effort(fills=('baseline',), units=('pixel',), points=8, displaced=4, random_maps=1)


@pytest.mark.parametrize(
    ('scores', 'sane'),
    [([1.0, 0.6, 0.0], True), ([1.0, -0.9, 0.0], True), ([1.0, -1.1, 0.0], False),
     ([1.0, 2.1, 0.0], False), ([None, None, None], False)],
)  # fmt: skip
def test_a_fill_that_drives_the_score_itself_is_not_sane(scores, sane):
    assert stays_between(Curve([0.0, 0.5, 1.0], scores)) == sane


def test_what_is_not_sane_is_not_counted():
    curve = Curve([0.0, 1.0], [1.0, 0.0])
    row = dict.fromkeys(('attribution', 'displaced', 'random', 'edges'), curve)
    rows = [{'kind': kind, 'sane': False} | row for kind in ('deletion', 'insertion')]
    assert _curve_metrics(rows) == {}
    rows = [{'kind': kind, 'sane': True} | row for kind in ('deletion', 'insertion')]
    assert _curve_metrics(rows)['deletion_margin'] == 0


def test_quick_costs_no_more_than_77_forward_passes_and_full_than_487():
    """And one gradient; a gradient is as much work as three forward passes."""
    quick = EFFORTS['quick']
    assert quick.forwards() + FORWARDS_A_GRADIENT * quick.gradients() <= 77 + FORWARDS_A_GRADIENT
    assert EFFORTS['full'].forwards() <= 487 and EFFORTS['full'].gradients() <= 121


def test_deletion_by_pixel_is_quantus_pixel_flipping():
    """The same scores at the same steps; Quantus leaves them in units of the model's output, and
    its area in steps, which makes images incomparable."""
    quantus = pytest.importorskip('quantus', reason='pip install --no-deps quantus')
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.Tanh(), nn.Conv2d(4, 1, 1)).eval()
    grey, relevance = torch.rand(1, 1, SIDE, SIDE), torch.rand(SIDE, SIDE)
    subject = replace(
        patch_subject(relevance.expand(3, -1, -1) / 3),
        network=network.requires_grad_(False),
        x=grey.expand(-1, 3, -1, -1),
    )
    work = Effort(fills=('baseline',), units=('pixel',), points=8, displaced=1, random_maps=1)
    (ours,) = (row['attribution'] for row in evaluate(subject, work).details['curves']
               if row['kind'] == 'deletion')  # fmt: skip

    class Scores(nn.Module):
        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return network(points.expand(-1, 3, -1, -1)).mean(dim=(2, 3))

    flipping = quantus.PixelFlipping(
        features_in_step=SIDE**2 // 8, perturb_baseline='black', normalise=False,
        disable_warnings=True,
    )  # fmt: skip
    (theirs,) = flipping(
        model=Scores().eval(), x_batch=grey.numpy(), y_batch=np.array([0]),
        a_batch=relevance.numpy()[None, None].astype(np.float64), softmax=False,
    )  # fmt: skip
    full, empty = float(Scores()(grey)), theirs[-1]
    expected = [1.0, *((score - empty) / (full - empty) for score in theirs)]
    assert ours['scores'] == pytest.approx(expected, abs=1e-3)


def test_a_fill_that_changes_nothing_gives_no_area():
    subject = patch_subject(PERFECT)
    effort = Effort(fills=('blur',), units=('pixel',), points=4, displaced=1, random_maps=1)
    found = evaluate(subject, effort)  # the image is even: its blur is itself
    assert found.metrics['deletion_area'] is None and found.metrics['insertion_margin'] is None


def test_removal_order_by_hand():
    rng = np.random.default_rng(0)
    relevance = np.array([[3.0, 1.0], [4.0, 2.0]])
    assert removal_order(relevance, None, rng).tolist() == [[0.25, 0.75], [0, 0.5]]
    segments = np.array([[0, 0], [1, 1]])  # means 2 and 3
    assert removal_order(relevance, segments, rng).tolist() == [[0.5, 0.5], [0, 0]]


@pytest.mark.parametrize('fill', FILLS)
def test_fills_change_removed_pixels_only(fill):
    rng = np.random.default_rng(0)
    subject = replace(patch_subject(PERFECT), x=torch.rand(1, 3, SIDE, SIDE))
    for removed in (PATCH, ~PATCH, np.ones_like(PATCH)):
        filled = without(subject, fill, removed, rng)
        assert (filled[~removed] == subject.pixels[~removed]).all()
        assert (filled[removed] != subject.pixels[removed]).mean() > 0.9
        assert filled.min() >= 0 and filled.max() <= 255


def test_local_means_carry_on_what_is_around():
    subject = patch_subject(PERFECT)  # even
    filled = without(subject, 'local mean', PATCH, np.random.default_rng(0))
    assert filled[PATCH].mean() == pytest.approx(127.5, abs=1)
    assert filled[PATCH].std() == pytest.approx(2.55, rel=0.2)
    left_half = np.zeros((SIDE, SIDE, 3), np.float32)
    left_half[:, :16] = 200
    hole = np.zeros_like(PATCH)
    hole[10:14, 2:6] = True
    assert curves.local_means(left_half, ~hole)[hole] == pytest.approx(200, abs=1)


def test_superpixels_follow_edges():
    pixels = np.zeros((64, 64, 3), np.float32)
    pixels[:, 32:] = 255
    labels = superpixels(pixels)
    assert not set(np.unique(labels[:, :30])) & set(np.unique(labels[:, 34:]))
    assert 50 < len(np.unique(labels)) < 150


# ------------------------------------------------------------------ infidelity, sensitivity


def test_infidelity_by_hand():
    actual = np.array([1.0, 2.0, -1.0])
    assert infidelity(3 * actual, actual) == pytest.approx(0)  # up to scale
    assert infidelity(np.zeros(3), actual) == 1
    assert infidelity(np.array([0.0, 1.0, 2.0]), actual) == pytest.approx(1)  # uncorrelated
    assert infidelity(actual, np.zeros(3)) is None


def test_infidelity_is_captums_relative_to_the_change():
    """Captum leaves the error in squared units of the score; ours is relative to the change."""
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
    found = max_sensitivity(explain(x)[0].numpy(), list(explain(noisy).numpy()))
    assert found == pytest.approx(float(theirs), rel=1e-5)
    assert max_sensitivity(np.zeros((3, 2, 2)), [np.ones((3, 2, 2))]) is None


def test_plain_map_of_a_linear_network_is_exact():
    subject = patch_subject(PERFECT)
    found = plain_map(subject.network, subject.x, subject.baseline, subject.target, 2)
    assert found == pytest.approx(PERFECT, rel=1e-5)


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
    subject = replace(patch_subject(PERFECT), network=demo_model.eval())
    before = {name: tensor.clone() for name, tensor in demo_model.state_dict().items()}
    work = replace(SMALL, stages=3, map_steps=1)
    stages = checks.randomisation(subject, work).details['randomisation']
    assert [stage['layers'] for stage in stages] == [1, 1 + (stages[0]['of'] - 1) // 2,
                                                     stages[0]['of']]  # fmt: skip
    after = demo_model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_network_without_weights_cannot_be_randomised():
    subject = replace(patch_subject(PERFECT), network=nn.Identity())
    assert checks.randomisation(subject, SMALL).metrics == {}


# ------------------------------------------------------------------ known networks are found out


def judged(metrics: dict) -> set[str]:
    return {finding.flag for finding in findings(metrics)}


def test_the_exact_map_of_a_patch_scorer_passes():
    found = evaluate(patch_subject(PERFECT), SMALL).metrics
    assert found['mass_in_truth'] == pytest.approx(1)
    assert found['infidelity'] == pytest.approx(0, abs=1e-9)
    assert found['deletion_margin'] > 0.2 and found['insertion_margin'] > 0.2
    assert 'beats its controls' in judged(found)


def test_the_map_of_a_randomised_network_fails_its_control():
    subject = patch_subject(PERFECT)
    other = PatchScorer(np.ones((3, SIDE, SIDE)))
    nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(3))
    wrong = plain_map(other, subject.x, subject.baseline, subject.target, 1)
    found = evaluate(replace(subject, attributions=wrong), SMALL).metrics
    assert found['infidelity'] > 0.5
    assert 'fails its control' in judged(found)


def test_a_method_that_ignores_the_network_survives_randomisation():
    def edges(network, x, baseline, target, steps) -> np.ndarray:
        return np.repeat(curves.edge_map(AS_IT_IS.to_pixels(x))[None], 3, axis=0)

    rng = np.random.default_rng(0)
    subject = replace(
        patch_subject(PERFECT),
        x=torch.as_tensor(rng.random((1, 3, SIDE, SIDE)), dtype=torch.float32),
        method=edges,
    )
    found = evaluate(subject, SMALL).metrics
    assert found['randomised_correlation'] == pytest.approx(1)
    assert found['randomised_ssim'] == pytest.approx(1)
    assert 'survives randomisation' in judged(found)
    honest = evaluate(replace(subject, method=plain_map), SMALL).metrics
    assert abs(honest['randomised_correlation']) < 0.5
    assert 'survives randomisation' not in judged(honest)


def test_a_map_of_one_sign_does_not_survive_by_where_the_network_can_see():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :48] - 24
    seen = np.exp(-(rows**2 + columns**2) / 30.0)  # falls by many orders: all ranks hang on it
    one, other = seen * rng.exponential(size=(2, 1, 48, 48)) ** 2
    assert rank_correlation(one, other) > 0.8
    assert checks._survival(one, other)['correlation'] < 0.5
    assert checks._survival(one, 2 * one)['correlation'] == pytest.approx(1)
    smooth = seen[None] * np.where(columns > 0, -1, 1)  # lies there too, and means another thing
    assert checks._survival(seen[None], smooth)['correlation'] < 0.5
    mixed = one * rng.choice((-1, 1), one.shape)  # of both signs: as before
    assert checks._survival(mixed, other)['correlation'] == pytest.approx(
        rank_correlation(mixed, other)
    )


def test_a_watermark_is_found_out():
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.4
    x[:, :, :2, -6:] = 1.0
    network = Watermarked()
    ig = IntegratedGradients(network, 'cpu', AS_IT_IS)
    explanation = ig.explain(x, num_steps=8)
    assert explanation.predicted_mask.any()
    found = evaluate_explanation(ig, x, explanation, 'quick')
    assert found['mass_in_prediction'] == pytest.approx(0, abs=1e-6)
    assert found['rim_excess'] == pytest.approx(1 / (1 - (28 / 32) ** 2))  # all of it is there
    assert found['context_radius_50'] > 5
    assert {'border artefact', 'distant spot'} <= set(judged(found))


# ------------------------------------------------------------------ distant spots


def spot_subject(attributions: np.ndarray, decisive: np.ndarray) -> Subject:
    """A dark image with two bright spots far from the target, one of which alone is the score."""
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
    found = evaluate(spot_subject(patch_and_spot, spot), SMALL).metrics
    assert found['distant_spot_effect'] == pytest.approx(1, abs=0.1)  # noise of the fill
    middle = np.nonzero(spot)[0].mean()
    assert abs(found['distant_spot_x'] - middle) <= 2 and abs(found['distant_spot_y'] - middle) <= 2


def test_a_spot_that_decides_nothing_is_not_cried_over():
    spot = np.zeros((SIDE, SIDE))
    spot[1:3, 1:3] = 1
    found = evaluate(spot_subject(np.repeat(spot[None], 3, axis=0), PATCH), SMALL).metrics
    assert found['distant_spot_effect'] in (None, pytest.approx(0, abs=0.05))


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
    found = evaluate(replace(patch_subject(PERFECT), prediction=np.ones_like(PATCH)), SMALL)
    assert found.metrics['distant_spot_effect'] is None
    assert found.metrics['distant_spot_x'] is None


# ------------------------------------------------------------------ the whole


@pytest.mark.parametrize(
    'attributions', [np.zeros((3, SIDE, SIDE)), np.ones((3, SIDE, SIDE))], ids=['zero', 'constant']
)
def test_maps_that_say_nothing_never_give_nan(attributions):
    found = evaluate(patch_subject(attributions), SMALL)
    assert set(found.metrics) == set(METRICS)
    assert all(value is None or math.isfinite(value) for value in found.metrics.values())
    json.dumps(found.details, allow_nan=False)


def test_the_same_seed_gives_the_same_result():
    one, again = (evaluate(patch_subject(PERFECT), SMALL, seed=5) for _ in range(2))
    assert one == again


class Counting(nn.Module):
    """Counts what goes through a network."""

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
    subject = patch_subject(PERFECT)
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
