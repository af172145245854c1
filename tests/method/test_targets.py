"""The table of targets."""

import re

import numpy as np
import pytest
import torch
from helpers import ROOT

from igseg.method import choice, targets
from igseg.network.description import NetworkDescription
from igseg.preprocessing import Preprocessing
from igseg.setting import resolved
from integrated_gradients import (
    BASELINES,
    METHODS,
    TARGETS,
    EmptyTargetError,
    InputError,
    TargetContext,
    build_target,
)

ERRORS = ('false-positive', 'false-negative')


def context(logits, truth=None, placement=None) -> TargetContext:
    logits = torch.tensor(logits, dtype=torch.float32)
    truth = None if truth is None else torch.tensor(truth)
    return TargetContext(logits, NetworkDescription().predicted(logits, 0.5), truth, placement)


BINARY = [[[2.0, -1.0], [4.0, -3.0]]]  # (1, 2, 2)


THREE = [[[3.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 1.0]], [[0.0, 0.0], [7.0, 2.0]]]


def score(spec, logits, kind='logit', **options) -> float:
    target = build_target(spec, context(logits, **options), kind)
    assert float(target.weights.sum()) == pytest.approx(1)
    return float(target(torch.tensor(logits)[None]))


@pytest.mark.parametrize(
    'spec, expected',
    [('predicted', 3.0), ('image', 0.5), ('truth', 1.5), ('pixel:1,0', -1.0), ('pixel:0,1', 4.0)],
)
def test_binary_targets_by_hand(spec, expected):
    truth = [[0, 1], [1, 0]]
    assert score(spec, BINARY, truth=truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    'spec, expected',
    [
        ('predicted', (5 + 7 + 2) / 3),  # the winning logit wherever it is not background
        ('image', (3 + 5 + 7 + 2) / 4),
        ('class:2', (7 + 2) / 2),
        ('class:0', 3.0),
        ('truth', (5 + 1) / 2),
        ('pixel:1,1', 2.0),
    ],
)
def test_targets_of_several_classes_by_hand(spec, expected):
    assert score(spec, THREE, truth=[[0, 1], [0, 1]]) == pytest.approx(expected)


ISLANDS = [[[1.0, -1.0, 5.0], [-1.0, 3.0, -1.0], [-1.0, -1.0, -1.0], [7.0, -1.0, -1.0]]]


def test_objects_by_hand():
    """Three pixels that touch at their corners are one object. The largest object comes first."""
    assert score('object:1', ISLANDS) == pytest.approx((1 + 5 + 3) / 3)
    assert score('object:2', ISLANDS) == pytest.approx(7)
    with pytest.raises(EmptyTargetError, match='has 2 objects'):
        score('object:3', ISLANDS)
    for wrong in ('object:0', 'object:a', 'object:-1'):
        with pytest.raises(InputError, match='whole number from 1'):
            score(wrong, ISLANDS)


def test_probability_scores():
    assert score('pixel:0,0', BINARY, 'probability') == pytest.approx(1 / (1 + np.exp(-2)))
    expected = np.exp(7) / (np.exp(7) + 2)
    assert score('pixel:0,1', THREE, 'probability') == pytest.approx(expected)


def test_target_is_the_vector_of_the_vector_jacobian_product():
    logits = torch.tensor(THREE)[None].requires_grad_()
    target = build_target('predicted', context(THREE))
    (gradient,) = torch.autograd.grad(target(logits).sum(), logits)
    torch.testing.assert_close(gradient[0], target.weights)


def test_region_does_not_move_with_the_logits():
    target = build_target('predicted', context(BINARY))
    assert target.region.tolist() == [[True, False], [True, False]]
    assert float(target(-torch.tensor(BINARY)[None])) == pytest.approx(-3.0)


def test_pixel_is_given_in_original_coordinates():
    wide = Preprocessing(64, 'letterbox').place((100, 200))  # content: 32 rows from row 16
    logits = torch.zeros(1, 64, 64)
    target = build_target('pixel:199,0', TargetContext(logits, logits > 0, None, wide))
    assert target.region.nonzero().tolist() == [[16, 63]]


@pytest.mark.parametrize(
    'spec, message',
    [
        ('nonsense', 'unknown target "nonsense"'),
        ('pixel:7', 'form pixel:X,Y'),
        ('pixel:a,b', 'form pixel:X,Y'),
        ('pixel', 'form pixel:X,Y'),
        ('predicted:3', 'form predicted'),
        ('pixel:2,0', 'outside the image'),
        ('pixel:-1,0', 'outside the image'),
        ('class:1', 'one class'),
        ('truth', 'needs a ground-truth mask'),
    ],
)
def test_wrong_specs_are_told(spec, message):
    with pytest.raises(InputError, match=message):
        build_target(spec, context(BINARY))


@pytest.mark.parametrize('spec', ['class:3', 'class:-1', 'class:x'])
def test_class_out_of_range(spec):
    with pytest.raises(InputError, match='0 to 2'):
        build_target(spec, context(THREE))


def test_truth_with_more_classes_than_the_model():
    with pytest.raises(InputError, match='class 3'):
        build_target('truth', context(THREE, truth=[[0, 3], [0, 1]]))


@pytest.mark.parametrize(
    'spec, options', [('predicted', {}), ('truth', {'truth': [[0, 0], [0, 0]]})]
)
def test_empty_region_is_its_own_error_with_the_remedy(spec, options):
    with pytest.raises(EmptyTargetError, match='--target image'):
        build_target(spec, context([[[-1.0, -2.0], [-1.0, -2.0]]], **options))


def test_errors_of_the_prediction_by_hand():
    truth = [[0, 2], [1, 1]]
    binary = {spec: build_target(spec, context(BINARY, truth=truth)) for spec in ERRORS}
    # predicted (positive logits): the left column; true: all but the upper left
    assert binary['false-positive'].region.tolist() == [[True, False], [False, False]]
    assert binary['false-negative'].region.tolist() == [[False, True], [False, True]]
    classes = {spec: build_target(spec, context(THREE, truth=truth)) for spec in ERRORS}
    # predicted classes [[0, 1], [2, 2]] against [[0, 2], [1, 1]]: three confusions
    expected = {'false-positive': [1, 2, 2], 'false-negative': [2, 1, 1]}
    for spec, channels in expected.items():
        weights = classes[spec].weights
        assert classes[spec].region.tolist() == [[False, True], [True, True]]
        assert weights.argmax(dim=0)[classes[spec].region].tolist() == channels
        assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize('spec', ERRORS)
def test_errors_need_a_truth_and_a_mistake(spec):
    with pytest.raises(InputError, match=f'"{spec}" needs a ground-truth mask'):
        build_target(spec, context(BINARY))
    with pytest.raises(EmptyTargetError, match=f'"{spec}" is empty'):
        build_target(spec, context(BINARY, truth=[[1, 0], [1, 0]]))


def test_mask_and_target_objects_as_target(ig, brain):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[20:30, 20:30] = True
    result = ig.explain(brain, mask.numpy(), num_steps=1)
    assert torch.equal(result.region, mask)
    assert result.score == pytest.approx(ig.model(brain)[0, 0][mask].mean().item(), rel=1e-4)
    with pytest.raises(InputError, match='shape'):
        ig.explain(brain, mask[:10], num_steps=1)
    with pytest.raises(EmptyTargetError):
        ig.explain(brain, mask & False, num_steps=1)


def test_the_table_documents_itself():
    for kind in (*TARGETS.values(), *BASELINES.values(), *METHODS.values()):
        assert kind.meaning and callable(resolved(kind.made_by))


def test_the_worked_example_of_contributing_works(monkeypatch):
    """Its function, its row and its test, as they stand there."""
    page = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    part = page.partition('### A worked example')[2].partition('\n## ')[0]
    function, row, test = re.findall(r'```python\n(.*?)```', part, re.DOTALL)
    given = vars(targets).copy()
    exec(function, given)
    monkeypatch.setattr(targets, 'border_target', given['border_target'], raising=False)
    monkeypatch.setitem(TARGETS, 'border', eval(f'{{{row}}}', vars(choice))['border'])
    names = globals().copy()
    exec(test, names)
    names['test_the_border_by_hand']()
