"""An explanation of 2x2 pixels whose statistics are worked out by hand."""

from __future__ import annotations

import numpy as np
import torch

from integrated_gradients import (
    Cost,
    Explanation,
    Preparation,
    Target,
    Trend,
    explanation_statistics,
)

MASK = torch.tensor([[True, False], [False, False]])


def explanation(
    attributions, mask=MASK, score=10.0, baseline_score=0.0, uncertainty=None
) -> Explanation:
    attributions = torch.as_tensor(attributions, dtype=torch.float32)
    return Explanation(
        attributions=attributions,
        prediction=mask.float(),
        predicted_mask=mask,
        region=mask,
        baseline_pixels=np.zeros((2, 2, 3), np.float32),
        target='predicted',
        objective=Target('predicted', mask[None].float()),
        baseline='zero',
        rule='midpoint',
        steps=4,
        score=score,
        baseline_score=baseline_score,
        attribution_sum=float(attributions.sum()),
        uncertainty=uncertainty,
        map_error=0.05,
        tolerance=None,
        trend=Trend((0.0, 0.5, 1.0), (baseline_score, 4.0, score), (0.0, 0.5, 1.0)),
        cost=Cost(
            gradient_evaluations=4,
            forward_passes=5,
            seconds=1.0,
            step_batch=1,
            peak_memory_bytes=None,
            precision='float32',
            precision_deviation=None,
            retried=None,
            preparation=Preparation(2, 1, 1e-7, 1e-6, False),
        ),
    )


HAND = [[[4.0, -1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]], [[-1.0, 0.0], [2.0, 0.0]]]


def statistics_for_figures(**changes) -> dict:
    found = explanation_statistics(explanation(HAND))
    return {'image': 'scan', **found, 'settings': {'gap_tolerance': 0.05}, **changes}
