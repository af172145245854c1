"""Statistics worked out by hand, and the table that says what each of them is."""

import json
import math

import numpy as np
import pytest
import torch
from hand_made import HAND, MASK, explanation

from igseg.results.files import packed, unpacked
from igseg.statistics import COMPOUND, METRICS, NUMBER, RECORD, STATISTICS, TEXT, TRUTH, WHOLE
from integrated_gradients import (
    explanation_statistics,
    mask_scores,
    statistics_text,
)


def test_statistics_by_hand():
    truth = np.array([[True, True], [False, False]])
    found = explanation_statistics(explanation(HAND), truth)
    expected = {
        'attribution_mean': 7 / 12,
        'attribution_min': -1.0,
        'attribution_max': 4.0,
        'attribution_std': math.sqrt((16 + 1 + 1 + 4 + 1 + 4) / 12 - (7 / 12) ** 2),
        'attribution_in_prediction': 7.0,
        'attribution_in_background': 4 / 3,
        'attribution_ratio': 21 / 4,
        'share_in_prediction': 7 / 11,
        'share_in_truth': 8 / 11,
        'prediction_ratio': 0.25,
        'prediction_area': 1,
        'dice': 2 / 3,
        'iou': 0.5,
        'pixel_accuracy': 0.75,
        'channel_shares': [6 / 11, 2 / 11, 3 / 11],
        'completeness_gap': 0.3,
        'attribution_sum': 7.0,
        'score': 10.0,
        'baseline_score': 0.0,
        'target_area': 1,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key


@pytest.mark.parametrize(
    'attributions, mask, none',
    [
        (HAND, torch.zeros(2, 2, dtype=torch.bool), ('attribution_ratio', 'share_in_prediction')),
        (HAND, torch.ones(2, 2, dtype=torch.bool), ('attribution_ratio',)),
        (np.zeros((3, 2, 2)), MASK, ('attribution_ratio', 'share_in_prediction', 'channel_shares')),
    ],
)
def test_figures_that_do_not_apply_are_none_never_nan(attributions, mask, none):
    found = explanation_statistics(
        explanation(attributions, mask, score=0.0), np.zeros((2, 2), bool)
    )
    for key in (*none, 'completeness_gap', 'share_in_truth'):
        assert found[key] is None, key
    json.dumps(found, allow_nan=False)
    assert 'n/a' in statistics_text({'image': 'x', **found})


def test_background_without_attribution_gives_no_infinite_ratio():
    inside_only = np.zeros((3, 2, 2))
    inside_only[:, 0, 0] = 1
    found = explanation_statistics(explanation(inside_only))
    assert found['attribution_ratio'] is None and found['share_in_prediction'] == 1
    assert found['dice'] is None


def test_scores_of_empty_masks():
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert mask_scores(empty, empty) == {'dice': 1.0, 'iou': 1.0, 'pixel_accuracy': 1.0}
    assert mask_scores(empty, full) == {'dice': 0.0, 'iou': 0.0, 'pixel_accuracy': 0.0}


# ------------------------------------------------------------------ uncertainty


def test_settled_share_by_hand():
    """Summed over channels the map is [[5, -1], [2, 1]]."""
    doubt = torch.tensor([[1.0, 2.0], [2.0, 0.5]])
    found = explanation_statistics(explanation(HAND, uncertainty=doubt))
    assert found['settled_share'] == pytest.approx(8 / 9)  # all but the -1
    assert found['uncertainty_level'] == pytest.approx(
        np.percentile(doubt.numpy(), 99) / np.percentile([5, 1, 2, 1], 99)
    )
    unknown = explanation_statistics(explanation(HAND))
    assert unknown['settled_share'] is None and unknown['uncertainty_level'] is None
    nothing = explanation_statistics(explanation(np.zeros((3, 2, 2)), uncertainty=doubt * 0))
    assert nothing['settled_share'] is None and nothing['uncertainty_level'] is None


@pytest.mark.parametrize('size', [1.0, 1e-9, 1e30, 0.0])
def test_uncertainties_survive_half_precision(size):
    values = (size * np.random.default_rng(0).random((8, 8))).astype(np.float32)
    arrays = packed(values)
    assert arrays['uncertainty'].dtype == np.float16
    assert unpacked(arrays) == pytest.approx(values, rel=1e-3, abs=1e-7 * size)


# ------------------------------------------------------------------ the table


def test_every_statistic_says_what_it_is():
    for key, row in STATISTICS.items():
        assert row.meaning and row.kind in (TEXT, WHOLE, NUMBER, TRUTH, COMPOUND), key
        assert (row.group == RECORD) == (row.of is None and key not in METRICS), key
        assert row.page is None or row.label, key
    places = [row.page for row in STATISTICS.values() if row.page is not None]
    assert len(set(places)) == len(places)


def test_an_explanation_keeps_no_network_alive(ig, brain):
    found = ig.explain(brain, num_steps=2)
    waiting, seen = [found], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        assert not isinstance(part, torch.nn.Module)
        if isinstance(part, torch.Tensor):
            assert part.grad_fn is None
        elif isinstance(part, (dict, list, tuple)):
            waiting += part.values() if isinstance(part, dict) else part
        elif hasattr(part, '__dataclass_fields__'):
            waiting += vars(part).values()


def test_what_an_explanation_cost_may_be_asked_of_itself():
    found = explanation(HAND)
    for name, value in vars(found.cost).items():
        assert getattr(found, name) == value
