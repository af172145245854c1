"""A file of another variant of the network than the factory builds is refused."""

import json

import pytest
import torch
from helpers import noise_image, save_image
from plain_network import FACTORY, build
from torch import nn

from igseg.errors import InputError
from igseg.network.loading import load_model
from igseg.settings import Settings, reproducing_command
from integrated_gradients import main


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.decoder = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
        self.register_buffer('places', torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = EncoderDecoder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 1, 3, padding=1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(x)


BUILDERS = {'EncoderDecoder': EncoderDecoder, 'Wrapped': Wrapped, 'build': build,
            'Blocks': Blocks, 'Flat': Flat}  # fmt: skip
KERNEL = torch.randn(4, 4, 1, 1)

REFUSED = [  # the network, tensors beside its own, and what the sentence holds
    ('EncoderDecoder', {'decoder.attention.weight': KERNEL}, 'decoder.attention.weight'),
    ('EncoderDecoder', {'decoder.3.weight': KERNEL, 'decoder.3.bias': KERNEL}, '2 tensors'),
    ('EncoderDecoder', {'encoder.0.lora_A.default.weight': KERNEL}, 'merge'),
    ('EncoderDecoder', {'adapter.down.weight': KERNEL}, 'merge'),
    ('Wrapped', {'net.decoder.scse.weight': KERNEL}, 'net.decoder.scse.weight'),
    ('build', {'3.weight': KERNEL}, '3.weight'),
    ('Blocks', {'blocks.1.weight': KERNEL}, 'blocks.1.weight'),
    ('Flat', {'conv2.weight': KERNEL}, 'conv2.weight'),
    ('EncoderDecoder', {'decoder.attention.weight': KERNEL.char()}, 'decoder.attention.weight'),
]
NOTED = [
    ('EncoderDecoder', {'aux_classifier.0.weight': KERNEL}),
    ('EncoderDecoder', {'criterion.weight': torch.ones(2), 'classification_head.weight': KERNEL}),
    ('Wrapped', {'net.aux_head.weight': KERNEL}),
    ('Wrapped', {'loss.weight': torch.ones(2)}),
    ('Wrapped', {'net.boundary_head.weight': KERNEL}),
    ('EncoderDecoder', {'encoder.fc.weight': torch.ones(9, 4), 'encoder.fc.bias': torch.ones(9)}),
    ('EncoderDecoder', {'decoder.aux_head.weight': KERNEL}),
    ('Flat', {'refine.weight': KERNEL}),
]
NOT_COUNTED = [
    ('EncoderDecoder', {'encoder.1.total_ops': torch.zeros(1, dtype=torch.float64)}),
    ('EncoderDecoder', {'decoder.relative_position_index': torch.arange(9)}),
    ('EncoderDecoder', {'decoder.1.num_batches_tracked': torch.tensor(3)}),
    ('EncoderDecoder', {'encoder.0.attn_mask': KERNEL, 'decoder.rope.inv_freq': torch.ones(4)}),
    ('EncoderDecoder', {'encoder.mean': torch.ones(3), 'encoder.1.min_val': torch.ones(1)}),
    ('EncoderDecoder', {'decoder.0.weight_u': torch.ones(3), 'decoder.empty': torch.ones(0)}),
    ('build', {'1.num_batches_tracked': torch.tensor(3)}),
]


@pytest.fixture
def load(tmp_path):
    """Loads a network's weights with further tensors beside them, by its factory."""

    def loaded(name: str, beside: dict, without: str = '', **options: bool) -> nn.Module:
        torch.manual_seed(0)
        state = BUILDERS[name]().state_dict()
        state.pop(without, None)
        torch.save({**state, **beside}, tmp_path / 'net.pth')
        factory = FACTORY if name == 'build' else f'{__file__}:{name}'
        return load_model(tmp_path / 'net.pth', 'cpu', model_factory=factory, **options)

    return loaded


@pytest.mark.parametrize('name, beside, text', REFUSED)
def test_weights_in_parts_that_the_network_has_are_refused_unless_allowed(load, name, beside, text):
    with pytest.raises(InputError) as error:
        load(name, beside)
    assert text in str(error.value) and '--allow_unused' in str(error.value)
    notes = load(name, beside, allow_unused=True).network_description.notes
    assert [note for note in notes if 'not used' in note and next(iter(beside)) in note]


def test_what_lies_beside_the_place_of_the_network_is_counted(tmp_path):
    state = {f'backbone.{name}': value for name, value in Flat().state_dict().items()}
    torch.save({'state_dict': {**state, 'refine.weight': KERNEL}}, tmp_path / 'net.pth')
    net = load_model(tmp_path / 'net.pth', 'cpu', model_factory=f'{__file__}:Flat')
    assert [note for note in net.network_description.notes if 'refine.weight' in note]


def test_a_place_that_holds_all_comes_before_a_place_that_lacks_some(tmp_path):
    state = EncoderDecoder().state_dict()
    part = {f'pretrained.{name}': value for name, value in state.items() if '.2.' not in name}
    whole = {f'model.{name}': value + 1 for name, value in state.items()}
    torch.save({**part, **whole}, tmp_path / 'net.pth')
    net = load_model(tmp_path / 'net.pth', 'cpu', model_factory=f'{__file__}:EncoderDecoder')
    assert torch.equal(net.decoder[0].weight, state['decoder.0.weight'] + 1)


@pytest.mark.parametrize('name, beside', NOTED)
def test_whole_parts_that_the_network_lacks_are_a_note(load, name, beside):
    notes = load(name, beside).network_description.notes
    prefixed = [key.removeprefix('net.') for key in beside]
    assert name == 'Wrapped' or [n for n in notes if 'not used' in n and prefixed[0] in n]


@pytest.mark.parametrize('name, beside', NOT_COUNTED)
def test_counters_and_indices_do_not_count(load, name, beside):
    assert not [n for n in load(name, beside).network_description.notes if 'not used' in n]


@pytest.mark.parametrize('without', ['decoder.0.weight', 'decoder.2.bias', 'encoder.1.running_var'])
def test_a_missing_parameter_is_an_error_also_if_others_may_be_unused(load, without):
    with pytest.raises(InputError, match='1 tensors are missing'):
        load('EncoderDecoder', {}, without, allow_unused=True)


@pytest.mark.parametrize('without', ['places', 'encoder.1.num_batches_tracked'])
def test_a_missing_counter_or_index_is_none(load, without):
    assert torch.equal(load('EncoderDecoder', {}, without).places, torch.arange(4))


def test_adapters_that_are_not_merged_are_called_so(load):
    state = EncoderDecoder().state_dict()
    beside = {'decoder.0.base_layer.weight': state['decoder.0.weight'],
              'decoder.0.lora_A.default.weight': KERNEL}  # fmt: skip
    with pytest.raises(InputError, match=r'adapters.*merge_and_unload'):
        load('EncoderDecoder', beside, 'decoder.0.weight')


def test_the_flag_is_recorded_and_in_the_command_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({**build().state_dict(), '3.weight': KERNEL}, 'net.pth')
    save_image(tmp_path / 'a.png', noise_image(32, 32))
    flags = ['--model_path', 'net.pth', '--image_path', 'a.png', '--model_factory', FACTORY,
             '--image_size', '32', '--num_steps', '2', '--target', 'image']  # fmt: skip
    assert main(flags) == 2
    assert main([*flags, '--allow_unused']) == 0
    out = tmp_path / 'integrated_gradients_results'
    statistics = json.loads(next(out.glob('*/*_statistics.json')).read_text())
    assert statistics['settings']['allow_unused'] is True
    command = reproducing_command(statistics, Settings().record())
    assert '--allow_unused' in command.split()


def test_adapters_in_a_checkpoint_of_smp_are_called_so(tmp_path):
    state = {'encoder.conv1.weight': KERNEL, 'segmentation_head.0.weight': KERNEL}
    torch.save({**state, 'encoder.conv1.lora_A': torch.randn(4, 4)}, tmp_path / 'net.pth')
    with pytest.raises(InputError, match='adapters'):
        load_model(tmp_path / 'net.pth', 'cpu')
