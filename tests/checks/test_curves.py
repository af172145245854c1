"""Deletion and insertion: by hand on analytic maps, and against Quantus."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from patch_scorer import (
    PATCH,
    PERFECT,
    SIDE,
    patch_subject,
)
from torch import nn

from igseg.checks import curves
from igseg.checks.checks import evaluate
from igseg.checks.curves import (
    FILLS,
    Curve,
    curve_metrics,
    displaced,
    removal_order,
    stays_between,
    superpixels,
    without,
)
from igseg.checks.effort import EFFORTS, FORWARDS_A_GRADIENT, Effort


def areas(attributions: np.ndarray, fill: str = 'baseline', points: int = 16) -> dict:
    effort = Effort(fills=(fill,), units=('pixel',), points=points, displaced=2, random_maps=4)
    rows = evaluate(patch_subject(attributions), effort).details['curves']
    return {row['kind']: {k: row[k]['area'] for k in ('attribution', 'random')} for row in rows}


def test_curves_of_the_exact_map_by_hand():
    areas_of_map = areas(PERFECT)  # a quarter of the pixels hold the whole score
    assert areas_of_map['deletion']['attribution'] == pytest.approx(1 / 8)
    assert areas_of_map['insertion']['attribution'] == pytest.approx(7 / 8)
    assert areas_of_map['deletion']['random'] == pytest.approx(0.5, abs=0.03)
    assert areas_of_map['insertion']['random'] == pytest.approx(0.5, abs=0.03)


def test_curves_of_an_inverted_and_of_a_constant_map():
    inverted = np.repeat(~PATCH[None], 3, axis=0) * 1.0
    assert areas(inverted)['deletion']['attribution'] == pytest.approx(7 / 8)
    assert areas(inverted)['insertion']['attribution'] == pytest.approx(1 / 8)
    constant = np.ones((3, SIDE, SIDE))
    assert areas(constant)['deletion']['attribution'] == pytest.approx(0.5, abs=0.05)


def test_a_displaced_map_is_the_same_elsewhere():
    relevance = np.random.default_rng(0).random((20, 30))
    moved = [displaced(relevance, np.random.default_rng(seed)) for seed in range(3)]
    for copy in moved:
        assert sorted(copy.ravel()) == sorted(relevance.ravel())
        assert (copy == relevance).mean() < 0.1
    assert not np.array_equal(moved[0], moved[1])
    again = displaced(relevance, np.random.default_rng(0))
    assert np.array_equal(moved[0], again)


def test_the_exact_map_beats_itself_in_the_wrong_place_and_a_random_one_does_not():
    """The network depends on a patch, a quarter of the image."""
    exact = evaluate(patch_subject(PERFECT), CHECKED).metrics
    assert exact['deletion_margin'] > 0.3 and exact['insertion_margin'] > 0.3
    noise = np.random.default_rng(0).normal(size=PERFECT.shape)
    random = evaluate(patch_subject(noise), CHECKED).metrics
    assert abs(random['deletion_margin']) < 0.1 and abs(random['insertion_margin']) < 0.1


CHECKED = Effort(fills=('baseline',), units=('pixel',), points=8, displaced=4, random_maps=1)


@pytest.mark.parametrize(
    ('scores', 'sane'),
    [([1.0, 0.6, 0.0], True), ([1.0, -0.9, 0.0], True), ([1.0, -1.1, 0.0], False),
     ([1.0, 2.1, 0.0], False), (None, False)],
)  # fmt: skip
def test_a_fill_that_drives_the_score_itself_is_not_sane(scores, sane):
    assert stays_between(Curve([0.0, 0.5, 1.0], scores)) == sane


def test_what_is_not_sane_is_not_counted():
    curve = Curve([0.0, 1.0], [1.0, 0.0])
    row = dict.fromkeys(('attribution', 'displaced', 'random', 'edges'), curve)
    rows = [{'kind': kind, 'sane': False} | row for kind in ('deletion', 'insertion')]
    assert curve_metrics(rows) == {}
    rows = [{'kind': kind, 'sane': True} | row for kind in ('deletion', 'insertion')]
    assert curve_metrics(rows)['deletion_margin'] == 0


def test_quick_costs_no_more_than_77_forward_passes_and_full_than_487():
    """Also one gradient, which costs as much as three forward passes."""
    quick = EFFORTS['quick']
    assert quick.forwards() + FORWARDS_A_GRADIENT * quick.gradients() <= 77 + FORWARDS_A_GRADIENT
    assert EFFORTS['full'].forwards() <= 487 and EFFORTS['full'].gradients() <= 121


def test_deletion_by_pixel_is_quantus_pixel_flipping():
    """The scores are the same at the same steps. Quantus gives them in units of the model's output,
    and the area in steps, so that images cannot be compared."""
    quantus = pytest.importorskip('quantus', reason='pip install --no-deps quantus')
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.Tanh(), nn.Conv2d(4, 1, 1)).eval()
    grey, relevance = torch.rand(1, 1, SIDE, SIDE), torch.rand(SIDE, SIDE)
    subject = replace(
        patch_subject(relevance.expand(3, -1, -1) / 3),
        network=network.requires_grad_(False),
        x=grey.expand(-1, 3, -1, -1),
    )
    effort = Effort(fills=('baseline',), units=('pixel',), points=8, displaced=1, random_maps=1)
    (ours,) = (row['attribution'] for row in evaluate(subject, effort).details['curves']
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
    evaluation = evaluate(subject, effort)  # the image is even: its blur is itself
    assert evaluation.metrics['deletion_area'] is None
    assert evaluation.metrics['insertion_margin'] is None


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
