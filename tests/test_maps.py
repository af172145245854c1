"""Maps compared and located: by hand, against other tools."""

from __future__ import annotations

import numpy as np
import pytest
from patch_scorer import (
    PATCH,
    PERFECT,
    SIDE,
    patch_subject,
)
from scipy.stats import spearmanr

from igseg.checks.checks import evaluate
from igseg.maps import (
    edge_excess,
    holding_radii,
    localisation,
    profile,
    rank_correlation,
    signed_distance,
    similarity,
    top_overlap,
)

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
