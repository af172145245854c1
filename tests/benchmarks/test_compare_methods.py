"""The comparison of methods: intervals over images, and the rows of its tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare_methods import (
    BETTER,
    COSTS,
    TRUST,
    WORSE,
    Column,
    Remembering,
    bootstrap_interval,
    cell,
    mark,
    parse,
    table,
)

GAP = Column('gap', 'completeness_gap', '{:.1%}', lower=True)
MARGIN = Column('margin', 'deletion_margin', '{:+.2f}')


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap_interval(rng.normal(size=25)) for _ in range(200)]
    assert 0.9 <= np.mean([low <= 0 <= high for low, high in found]) <= 1
    assert bootstrap_interval([1.0, 2.0]) is None
    assert bootstrap_interval([3.0] * 5) == (3, 3)
    assert bootstrap_interval([1, 2, 3, 9]) == bootstrap_interval([1, 2, 3, 9])


def test_what_is_better_follows_what_the_figure_means():
    plain = {str(k): float(k) for k in range(8)}
    more = {name: value + 1 for name, value in plain.items()}
    assert mark(more, plain, 1) == BETTER and mark(more, plain, -1) == WORSE
    assert mark(plain, plain, 1) == ''
    assert mark({'0': 5.0}, plain, 1) == ''  # too few images that both have
    signs = {column.key: column.sign for column in (*COSTS, *TRUST)}
    assert signs['deletion_margin'] == signs['mass_in_truth'] == 1
    assert signs['infidelity'] == signs['max_sensitivity'] == signs['seconds'] == -1


def test_a_figure_that_is_not_promised_is_not_applicable():
    images = {'a': {'completeness_gap': None}, 'b': {'completeness_gap': None}}
    assert cell(images, GAP, None) == 'n/a'
    images['b'] = {'completeness_gap': 0.25}
    assert cell(images, GAP, None) == '25.0%'


def test_a_table_has_a_row_for_each_method_and_marks_all_but_plain_ig():
    def images(shift: float) -> dict:
        return {str(k): {'deletion_margin': k / 10 + shift} for k in range(6)}

    lines = table({'ig': images(0), 'blur': images(-0.5)}, [MARGIN], compared=True).splitlines()
    assert lines[0] == '| method | margin |' and lines[1] == '| --- | --- |'
    assert lines[2].startswith('| `ig` | +0.25 (') and WORSE not in lines[2]
    assert lines[3].startswith('| `blur` | -0.25 (') and lines[3].endswith(f'{WORSE} |')


def test_no_image_goes_through_the_network_twice():
    seen = []

    def run(points: torch.Tensor) -> torch.Tensor:
        seen.append(len(points))
        return points[:, :1] * 2

    points = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    remembering = Remembering(run)
    assert torch.equal(remembering(points), run(points))
    count = len(seen)
    assert torch.equal(remembering(points.flip(0)), 2 * points.flip(0)[:, :1])
    assert len(seen) == count


@pytest.mark.parametrize('method', ['ig', 'layer:encoder.stage4', 'occlusion'])
def test_all_methods_are_compared_unless_some_are_named(method):
    line = ['--name', 'a', '--model_path', 'm', '--data_dir', 'd']
    assert method in parse(line).methods
    assert parse([*line, '--methods', 'blur']).methods == ['blur']
