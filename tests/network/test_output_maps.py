"""Which of a network's outputs is explained: maps of classes only, and the map that is chosen."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from igseg.errors import InputError
from igseg.network.outputs import (
    ChosenMap,
    choice_among,
    maps_in,
    named_tensors,
    segmentation_logits,
)
from integrated_gradients import IntegratedGradients

SIZE = (16, 16)
QUERIES, BOXES, TOKENS = torch.randn(1, 9, 4), torch.rand(9, 4), torch.randn(1, 49, 32)
MAP, COARSE, DEPTH = torch.randn(1, 2, 16, 16), torch.randn(1, 3, 4, 4), torch.randn(1, 16, 16)
Pair = namedtuple('Pair', 'mask edge')


@dataclass(slots=True)
class Inner:
    mask: torch.Tensor


@dataclass
class Outer:
    inner: Inner


REFUSED = {
    'MaskFormer': {'class_queries_logits': QUERIES, 'masks_queries_logits': COARSE},
    'DETR': {'logits': QUERIES, 'pred_boxes': QUERIES, 'pred_masks': COARSE},
    'an object of transformers': SimpleNamespace(class_queries_logits=QUERIES, masks=COARSE),
    'YOLO': (torch.randn(1, 116, 84), torch.randn(1, 32, 4, 4)),
    'YOLO in training': (torch.randn(1, 37, 84), ([COARSE, COARSE], torch.randn(1, 32, 4, 4))),
    'prototypes': {'proto': COARSE, 'masks': MAP},
    'boxes of torchvision': [{'boxes': BOXES, 'scores': torch.rand(9), 'masks': MAP}],
    'a map beside boxes': {'out': MAP, 'boxes': QUERIES},
    'tokens': (MAP, TOKENS),
    'DETR under out': {'out': {'pred_logits': QUERIES, 'pred_masks': COARSE}},
    'scores of each query': {'logits': COARSE, 'class_logits': torch.randn(1, 3, 7)},
    'objects': {'masks': COARSE, 'scores': torch.rand(1, 3), 'labels': torch.ones(1, 3)},
}
TAKEN = {  # and the name of the map that is taken
    'a tensor': (MAP, '0'),
    'out and aux': ({'out': MAP, 'aux': COARSE}, 'out'),
    'logits and hidden states': ({'logits': COARSE, 'hidden_states': (TOKENS, COARSE)}, 'logits'),
    'a map beside scores of the image': ((MAP, torch.randn(1, 5)), '0'),
    'a map beside a depth without channel': ({'mask': MAP, 'depth': DEPTH}, 'mask'),
    'a named tuple': (Pair(COARSE, MAP), 'mask'),
    'deep supervision': ([COARSE, [MAP, MAP]], '1.0'),
    'an attention map': ({'seg': COARSE, 'attentions': [MAP]}, 'seg'),
    'a depth before': ({'depth': MAP[:, :1], 'seg': COARSE}, 'seg'),
    'features beside': ({'features': MAP, 'x': COARSE}, 'x'),
    'an argmax before': ((MAP.argmax(1, keepdim=True), MAP), '1'),
    'prototypes of classes': ({'out': MAP, 'prototypes': torch.randn(2, 8)}, 'out'),
    'query features': ({'logits': MAP, 'query_features': COARSE}, 'logits'),
    'named tokens': ({'seg': MAP, 'tokens': TOKENS}, 'seg'),
    'hidden states': ({'masks': MAP, 'hidden_states': TOKENS}, 'masks'),
    'a coarse depth': ({'seg': MAP, 'depth': torch.randn(1, 4, 4)}, 'seg'),
    'data classes': (Outer(Inner(MAP)), 'inner.mask'),
    "a dictionary of one's own": (UserDict({'mask': MAP}), 'mask'),
    'integers beside': ((MAP, torch.zeros(1, 9, 4, dtype=torch.long)), '0'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_masks_of_queries_or_boxes_are_refused(kind):
    with pytest.raises(InputError, match=r'not of classes: .*choose it with --output_map'):
        segmentation_logits(REFUSED[kind], SIZE)


@pytest.mark.parametrize('kind', TAKEN)
def test_the_map_of_classes_is_taken_and_named(kind):
    output, name = TAKEN[kind]
    maps = maps_in(output)
    assert segmentation_logits(output, SIZE) is maps[name]
    note = choice_among(output, SIZE)
    assert not note if len(maps) == 1 else f': {name} is explained' in note
    assert all(f'{other} {tuple(maps[other].shape)}' in note for other in maps if len(maps) > 1)


def test_an_empty_map_is_one_sentence():
    with pytest.raises(InputError, match='empty'):
        segmentation_logits(torch.zeros(1, 1, 0, 0), SIZE)


def test_a_number_that_names_something_else_chooses_no_map():
    class Listed(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return [x.mean((2, 3)), x, 2 * x]

    with pytest.raises(InputError, match='no map "0"'):
        ChosenMap(Listed(), '0')(MAP)
    assert torch.equal(ChosenMap(Listed(), '2')(MAP), 2 * MAP)


def test_an_output_that_holds_itself_ends():
    output = {'map': MAP}
    output['self'] = output
    assert 'map' in named_tensors(output)


class Several(nn.Module):
    """Gives a dictionary, or a list, of maps, and perhaps queries beside them."""

    def __init__(self, form=dict, beside=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.form, self.beside = form, beside or {}

    def forward(self, x: torch.Tensor) -> object:
        maps = {'coarse': self.first(x), 'fine': self.second(x), **self.beside}
        return maps if self.form is dict else list(maps.values())


X = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
OPTIONS = {'target': 'image', 'num_steps': 3}


@pytest.mark.parametrize(
    'form, chosen', [(dict, 'fine'), (dict, '1'), (dict, 1), (list, '1'), (list, 1)]
)
def test_the_chosen_map_is_explained(form, chosen):
    network = Several(form)
    got = IntegratedGradients(network, 'cpu').explain(X, output_map=chosen, **OPTIONS)
    wanted = IntegratedGradients(network.second, 'cpu').explain(X, **OPTIONS)
    torch.testing.assert_close(got.attributions, wanted.attributions)
    assert not got.notes


def test_one_explainer_takes_one_map_after_the_other():
    network = Several()
    ig = IntegratedGradients(network, 'cpu')
    plain = ig.explain(X, **OPTIONS)
    assert 'coarse is explained' in ''.join(plain.notes)
    fine = ig.explain(X, output_map='fine', method='gradcam:second', **OPTIONS)
    again = ig.explain(X, **OPTIONS)
    assert fine.prediction.shape == SIZE and torch.equal(plain.attributions, again.attributions)


def test_probabilities_are_told_for_each_map():
    class OneOfEach(Several):
        def forward(self, x: torch.Tensor) -> object:
            return {'coarse': self.first(x), 'fine': self.second(x).sigmoid()}

    ig = IntegratedGradients(OneOfEach(), 'cpu')
    logits, chances = (ig.explain(X, output_map=name, **OPTIONS) for name in ('coarse', 'fine'))
    assert 'probabilities' in ''.join(chances.notes) and 'probabilities' not in ''.join(
        logits.notes
    )


def test_the_user_may_choose_a_map_that_stands_beside_queries():
    network = Several(beside={'class_queries_logits': QUERIES})
    ig = IntegratedGradients(network, 'cpu')
    with pytest.raises(InputError, match='queries'):
        ig.explain(X, **OPTIONS)
    assert ig.explain(X, output_map='fine', **OPTIONS).prediction.shape == SIZE


@pytest.mark.parametrize('chosen', ['none', '7', ''])
def test_a_map_that_is_not_there_is_one_sentence(chosen):
    with pytest.raises(InputError, match=r'coarse \(1, 2, 16, 16\), fine|output_map must be'):
        IntegratedGradients(Several(), 'cpu').explain(X, output_map=chosen, **OPTIONS)
