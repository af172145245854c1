"""What a network is: channels, sizes, and what its outputs mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import DEMO_MODEL, Scaled

from igseg.network.description import NetworkDescription, describe_network
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL
from igseg.network.loading import create_model
from integrated_gradients import InputError, IntegratedGradients, Preprocessing, load_model


def test_what_a_loaded_network_is():
    description = load_model(DEMO_MODEL, 'cpu').network_description
    assert (description.channels, description.size_multiple, description.output_kind) == (
        3,
        32,
        FOREGROUND,
    )
    assert description.preprocessing.mean == (0.5, 0.5, 0.5) and description.background == 0
    assert (
        description.source['model_path'] == str(DEMO_MODEL) and description.source['classes'] == 1
    )


def test_any_module_is_described():
    description = describe_network(create_model('unet', 'resnet18', 3))
    assert description.source == {} and description.output_kind is None
    assert description.preprocessing == Preprocessing()
    net = Scaled()
    net.preprocessing = Preprocessing(64, mean=(0.5,) * 3)
    assert IntegratedGradients(net, 'cpu').preprocessing.image_size == 64


def test_outputs_by_hand():
    network = NetworkDescription()
    binary = torch.tensor([[[[2.0, -1.0]]]])  # (1, 1, 1, 2)
    several = torch.tensor([[[[3.0, 0.0]], [[0.0, 5.0]], [[0.0, 0.0]]]])  # (1, 3, 1, 2)
    assert network.kind(binary) == FOREGROUND and network.kind(several) == EXCLUSIVE
    assert network.predicted(binary, 0.5).tolist() == [[[[True, False]]]]
    assert network.predicted(binary, 0.9).tolist() == [[[[False, False]]]]
    assert network.probabilities(several).sum(dim=1) == pytest.approx(np.ones((1, 1, 2)))
    masks = network.predicted(several, 0.5)[0]
    assert masks.tolist() == [[[True, False]], [[False, True]], [[False, False]]]
    mask, chance = network.explained(several, masks, None)
    assert mask.tolist() == [[False, True]]
    expected = 1 - network.probabilities(several)[0, 0]
    torch.testing.assert_close(chance, expected)
    mask, _ = network.explained(several, masks, 0)
    assert mask.tolist() == [[True, False]]
    assert network.drawn(torch.tensor([[0, 2]]), masks).tolist() == [
        [[True, False]], [[False, False]], [[False, True]]]  # fmt: skip
    assert network.drawn(torch.tensor([[0, 2]]), masks[:1]).tolist() == [[[False, True]]]


def test_another_background_or_none():
    logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 5.0]], [[0.0, 0.0]]]])  # (1, 3, 1, 2)
    last = NetworkDescription(background=1)
    masks = last.predicted(logits, 0.5)[0]
    assert last.foreground(masks).tolist() == [[True, False]]
    torch.testing.assert_close(
        last.explained(logits, masks, None)[1], 1 - last.probabilities(logits)[0, 1]
    )
    none = NetworkDescription(background=None)
    assert none.foreground(masks).tolist() == [[True, True]]
    assert none.drawn_objects(torch.tensor([[0, 1]]), masks).tolist() == [[True, True]]
    assert last.drawn_objects(torch.tensor([[0, 1]]), masks).tolist() == [[True, False]]
    with pytest.raises(InputError, match='background class 3: the network has 3 classes'):
        NetworkDescription(output_kind=EXCLUSIVE, background=3).kind(logits)


def test_independent_labels_by_hand():
    logits = torch.tensor([[[[3.0, -1.0]], [[2.0, 5.0]], [[-4.0, -2.0]]]])  # (1, 3, 1, 2)
    network = NetworkDescription(output_kind=MULTILABEL)
    masks = network.predicted(logits, 0.5)[0]
    assert masks.tolist() == [[[True, False]], [[True, True]], [[False, False]]]
    torch.testing.assert_close(network.probabilities(logits), logits.sigmoid())
    mask, chance = network.explained(logits, masks, None)
    assert mask.tolist() == [[True, True]]
    torch.testing.assert_close(chance, torch.tensor([[3.0, 5.0]]).sigmoid())
    drawn = network.drawn(torch.tensor([[0, 2]]), masks)  # 0: none of them
    assert drawn.tolist() == [[[False, False]], [[False, True]], [[False, False]]]
    with pytest.raises(InputError, match='output_kind foreground does not fit a network with 3'):
        NetworkDescription(output_kind=FOREGROUND).kind(logits)
    with pytest.raises(InputError, match='output_kind exclusive does not fit a network with 1'):
        NetworkDescription(output_kind=EXCLUSIVE).kind(logits[:, :1])


@pytest.mark.parametrize(('multiple', 'size', 'accepted'), [(1, 100, 128), (16, 100, 112),
                                                            (14, 200, 210)])  # fmt: skip
def test_accepted_sizes(multiple, size, accepted):
    assert NetworkDescription(size_multiple=multiple).accepted_size(size) == accepted
    oblong = NetworkDescription(size_multiple=multiple).accepted_size((size, 2 * size))
    assert oblong[0] == accepted and 2 * size <= oblong[1] < 2 * size + 32


def test_input_of_another_shape_is_told():
    with pytest.raises(InputError, match=r'\(3, H, W\) or \(1, 3, H, W\), not \(2, 3, 8, 8\)'):
        NetworkDescription(channels=3).check_input((2, 3, 8, 8))
    NetworkDescription(channels=4).check_input((4, 8, 8))
    with pytest.raises(InputError, match=r'multiples of 32, not 100×80 \(pad it to 128×96\)'):
        NetworkDescription(size_multiple=32).check_input((3, 80, 100))
    with pytest.raises(InputError, match='224×224 only, not 32×32'):
        NetworkDescription(fixed_size=(224, 224)).check_input((3, 32, 32))
    with pytest.raises(InputError, match='multiples of 32'):
        unet = create_model('unetplusplus', 'resnet18', 1)
        IntegratedGradients(unet, 'cpu').explain(torch.rand(3, 80, 100), 'image')


def test_a_vision_transformer_takes_a_single_size():
    encoder = 'tu-vit_tiny_patch16_224.augreg_in21k'
    fixed = describe_network(create_model('dpt', encoder, 1))
    assert (fixed.fixed_size, fixed.accepted_size(640)) == ((224, 224), 224)
    free = describe_network(create_model('dpt', encoder, 1, dynamic_img_size=True))
    assert (free.fixed_size, free.size_multiple, free.accepted_size(100)) == (None, 16, 112)
