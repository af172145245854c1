"""The benchmarks of the verdicts: pictures whose evidence is known, and what counts as broken."""

from __future__ import annotations

import numpy as np
import pytest
from calibrate_verdicts import counted
from planted_evidence import DISTANCE, SCENARIOS, STAMP, generate
from scipy.ndimage import label


def spots(mask: np.ndarray) -> int:
    return label(mask)[1]


@pytest.mark.parametrize('scenario', SCENARIOS)
@pytest.mark.parametrize('bright', [False, True])
@pytest.mark.parametrize('stamped', [False, True])
def test_what_decides_the_mask_and_nothing_else(scenario, bright, stamped):
    one, again = (generate(scenario, bright, np.random.default_rng(3), stamped) for _ in range(2))
    assert np.array_equal(one.image, again.image)
    assert not (one.evidence & one.distractors).any() and (one.mask <= one.evidence).all()
    grey = one.image[..., 0].astype(float)
    if one.mask.any():
        assert (grey[one.mask].mean() > grey[~one.mask].mean()) == bright
    expected = {'look': 2, 'cue': 1, 'shortcut': 2 if stamped else 0}[scenario]
    assert spots(one.mask) == expected
    corner = one.evidence if scenario == 'shortcut' else one.distractors
    assert corner[:STAMP, -STAMP:].all() == stamped


def test_the_cue_stands_beside_the_spot_that_it_marks():
    one = generate('cue', True, np.random.default_rng(0), False)
    rows, columns = (where.mean() for where in np.nonzero(one.mask))
    cue = one.evidence & ~one.mask
    cue_rows, cue_columns = (where.mean() for where in np.nonzero(cue))
    assert abs(cue_rows - rows) < 1 and abs(cue_columns - columns - DISTANCE) < 1


def test_a_target_counts_as_hidden_where_it_lost_half_its_weight():
    def row(kind: str, ratio: float) -> dict:
        return {'data': 'a', 'image': 'b', 'settings': {'evaluate': 'quick'}, 'map': kind,
                'attribution_ratio_in_target': ratio}  # fmt: skip

    rows = [row('good', 4.0), row('hidden target', 1.9), row('hidden target', 2.1),
            row('random', 1.0)]  # fmt: skip
    assert counted(rows) == [rows[0], rows[1], rows[3]]
    assert counted(rows[1:]) == []  # of an image whose good map is not good
