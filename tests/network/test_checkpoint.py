"""Where in a file the weights lie, whatever is beside them; and that nothing of it is ever run."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import types

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from torch import nn

from igseg.errors import InputError
from igseg.network.checkpoint import SAVE_WEIGHTS, read_checkpoint
from igseg.network.loading import load_model

ENCODER = 'timm-mobilenetv3_small_minimal_100'


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return smp.Unet(ENCODER, encoder_weights=None, decoder_channels=(8, 8, 8, 4, 4)).eval()


@pytest.fixture(scope='module')
def state(network):
    return network.state_dict()


def same(state: dict, expected: dict) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )


def read(tmp_path, content, weights_key=None, **options):
    torch.save(content, tmp_path / 'm.ckpt', **options)
    return read_checkpoint(tmp_path / 'm.ckpt', weights_key)


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


# ------------------------------------------------------------------ finding


@pytest.mark.parametrize(
    ('wrap', 'key'),
    [
        (lambda s: s, ''),
        (lambda s: {'weights': s, 'epoch': 3}, 'weights'),
        (lambda s: {'params': {'generator': s}}, 'params.generator'),
        (lambda s: [{'epoch': 3}, {'net': s}], '1.net'),
        (lambda s: {'state_dict': under('model.', s)}, 'state_dict.model'),
        (lambda s: {'state_dict': under('segmentation_model.net.', s)},
         'state_dict.segmentation_model.net'),
        (lambda s: {'state_dict': under('module._orig_mod.', s)}, 'state_dict.module._orig_mod'),
        (lambda s: {'model_ema': under('module.', s), 'n': 1}, 'model_ema.module'),
        (lambda s: {'state_dict': under('net.', s) | {'loss.weight': torch.ones(3),
                                                      'metric.total': torch.tensor(5)}},
         'state_dict.net'),
        (lambda s: {'state_dict': under('net.', s) | {'hparams': None, 3: torch.ones(1)}},
         'state_dict.net'),
    ],
)  # fmt: skip
def test_weights_are_found_wherever_they_lie(tmp_path, state, wrap, key):
    checkpoint = read(tmp_path, wrap(state))
    assert same(checkpoint.state, state) and checkpoint.key == key and not checkpoint.others


def test_a_note_says_which_of_several_networks_is_used(tmp_path, state):
    average = {name: value.clone() for name, value in state.items()}
    content = {'ema': {'shadow': average}, 'state_dict': under('student.', state)}
    checkpoint = read(tmp_path, content)
    assert checkpoint.key == 'state_dict.student' and checkpoint.others == ('ema.shadow',)
    assert 'choose with --weights_key' in checkpoint.notes[0]
    chosen = read(tmp_path, content, 'ema.shadow')
    assert chosen.key == 'ema.shadow' and same(chosen.state, average)
    with pytest.raises(InputError, match=r'under "ema" \(there are: .*ema\.shadow'):
        read(tmp_path, content, 'ema')


def test_the_same_tensors_under_two_keys_are_one(tmp_path, state):
    assert not read(tmp_path, {'model': state, 'best': {'model': state}}).others


def test_content_that_holds_itself(tmp_path, state):
    content = {'model': state, 'parents': []}
    content['parents'].append(content)
    assert same(read(tmp_path, content).state, state)


@pytest.mark.parametrize('scale', [1.0, 255.0])
def test_mean_and_std_beside_the_weights_are_used(tmp_path, state, scale):
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.125])
    buffers = {'pixel_mean': scale * mean.view(1, 3, 1, 1), 'pixel_std': scale * std}
    normalisation = read(tmp_path, {'state_dict': under('model.', state) | buffers}).normalisations[
        3
    ]
    assert normalisation['mean'] == pytest.approx((0.1, 0.2, 0.3), abs=1e-6)
    assert normalisation['std'] == pytest.approx((0.5, 0.25, 0.125), abs=1e-6)
    options = {'decoder_channels': (8, 8, 8, 4, 4)}
    model = load_model(tmp_path / 'm.ckpt', 'cpu', ENCODER, 'unet', model_options=options)
    loaded = model.network_description
    assert loaded.preprocessing.mean == normalisation['mean'] and 'mean' in loaded.notes[-1]
    named = {'settings': {'mean': [0.5] * 3, 'std': [0.5] * 3}}
    checkpoint = read(tmp_path, {'state_dict': under('model.', state) | buffers, **named})
    assert checkpoint.settings['mean'] == [0.5] * 3  # stored settings come first
    assert not checkpoint.normalisations and not checkpoint.notes


@pytest.mark.parametrize(
    'buffers', [{'mean': torch.ones(3)}, {'mean': torch.ones(3), 'std': torch.zeros(3)},
                {'mean': torch.ones(7), 'std': torch.ones(7)}])  # fmt: skip
def test_what_is_no_mean_and_std_is_left_alone(tmp_path, state, buffers):
    assert 3 not in read(tmp_path, {'state_dict': under('m.', state) | buffers}).normalisations


def test_hyperparameters_name_the_network(tmp_path, state):
    hyper = {'arch': 'Unet', 'encoder_name': 'resnet18', 'lr': 1e-3}
    checkpoint = read(tmp_path, {'state_dict': state, 'hyper_parameters': hyper})
    assert checkpoint.settings == {'architecture': 'unet', 'encoder': 'resnet18'}
    odd = {'arch': 'os.system', 'encoder_name': 'hf-hub:evil'}
    assert read(tmp_path, {'state_dict': state, 'hyper_parameters': odd}).settings == {}


def test_what_is_in_a_file_without_a_network_is_said(tmp_path):
    with pytest.raises(InputError, match='its entries are epoch, args'):
        read(tmp_path, {'epoch': 3, 'args': {'a': 1}})
    with pytest.raises(InputError, match='they begin with weight, bias'):
        read(tmp_path, nn.Conv2d(3, 1, 1).state_dict())


def test_folders_of_accelerate_and_saved_transforms(tmp_path, network, state):
    torch.save(state, tmp_path / 'pytorch_model.bin')
    assert same(read_checkpoint(tmp_path).state, state)
    safetensors.torch.save_file(under('module.', state), tmp_path / 'model.safetensors')
    assert read_checkpoint(tmp_path).key == 'module'
    steps = [
        {'__class_fullname__': 'LongestMaxSize', 'max_size': 96},
        {'__class_fullname__': 'albumentations.PadIfNeeded'},
        {'__class_fullname__': 'Normalize', 'mean': [0.5] * 3, 'std': [0.25] * 3,
         'max_pixel_value': 255.0},
    ]  # fmt: skip
    network.save_pretrained(tmp_path / 'saved')
    transforms = tmp_path / 'saved' / 'albumentations_config_eval.json'
    transforms.write_text(json.dumps({'transform': {'transforms': steps}}))
    description = load_model(tmp_path / 'saved', 'cpu').network_description
    fit = description.preprocessing
    assert (fit.image_size, fit.resize, fit.mean, fit.std) == (
        96, 'letterbox', (0.5,) * 3, (0.25,) * 3,
    )  # fmt: skip
    assert 'albumentations_config_eval.json' in description.notes[0]
    transforms.write_text('{"transform": 3}')
    with pytest.raises(InputError, match=r'config_eval\.json cannot be read'):
        read_checkpoint(tmp_path / 'saved')


@pytest.mark.parametrize(
    ('name', 'message'), [('m.onnx', 'an ONNX file'), ('m.h5', 'a Keras file'),
                       ('m.tflite', 'a TensorFlow Lite file')])  # fmt: skip
def test_files_of_other_frameworks(tmp_path, name, message):
    (tmp_path / name).write_bytes(b'\x08\x07pytorch' + bytes(100))
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / name)


def test_torchscript_is_called_so(tmp_path):
    torch.jit.script(nn.Conv2d(3, 1, 1)).save(str(tmp_path / 'm.pt'))
    with pytest.raises(InputError, match='is a TorchScript file'):
        read_checkpoint(tmp_path / 'm.pt')


# ------------------------------------------------------------------ objects in the file


class Colour(enum.Enum):
    RED = 1


class Settings(dict):
    """A subclass of dict, as OmegaConf has one."""


class Names(list):
    pass


def gone() -> type:
    """A class that will not exist when the file is read."""
    module = types.ModuleType('gone_package')
    module.Config = type('Config', (), {'__module__': 'gone_package'})
    sys.modules['gone_package'] = module
    return module.Config


OBJECTS = [
    lambda: pathlib.PurePosixPath('/data'),
    lambda: argparse.Namespace(lr=1e-3, path=pathlib.PurePosixPath('/data')),
    lambda: functools.partial(print, 'x'),
    lambda: Colour.RED,
    lambda: collections.defaultdict(list, a=[1]),
    lambda: Settings(arch='Unet', inner=Settings(a=1)),
    lambda: Names([1, 2]),
    lambda: gone()(),
    lambda: {'criterion': nn.CrossEntropyLoss(weight=torch.ones(2))},
]


@pytest.mark.parametrize('make', OBJECTS)
def test_weights_are_read_past_objects(tmp_path, state, make):
    torch.save({'hyper_parameters': make(), 'state_dict': state}, tmp_path / 'm.ckpt')
    sys.modules.pop('gone_package', None)
    before = torch.serialization.get_safe_globals()
    assert same(read_checkpoint(tmp_path / 'm.ckpt').state, state)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_whole_modules_are_read_for_their_weights(tmp_path, network, state):
    checkpoint = read(tmp_path, {'model': network, 'epoch': 3})
    assert checkpoint.key == 'model' and same(checkpoint.state, state)
    assert same(read(tmp_path, nn.DataParallel(network)).state, state)


class Evil:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    'call',
    [
        lambda mark: (open, str(mark), 'w'),
        lambda mark: (eval, f'open({str(mark)!r}, "w")'),
        lambda mark: (exec, f'open({str(mark)!r}, "w")'),
        lambda mark: (subprocess.Popen, ['touch', str(mark)]),
        lambda mark: (functools.reduce, open, [str(mark), 'w']),
        lambda mark: (shutil.copy, __file__, str(mark)),
        lambda mark: (getattr, 'text', 'upper'),
    ],
)
def test_names_that_could_do_harm_do_nothing(tmp_path, state, call):
    mark = tmp_path / 'ran'
    evil = Evil(*call(mark))
    checkpoint = read(tmp_path, {'hook': evil, 'state_dict': state})
    assert same(checkpoint.state, state) and not mark.exists()
    # The weights of an evil tensor are none.
    with pytest.raises(InputError, match='no state dict'):
        read(tmp_path, {'state_dict': dict.fromkeys(state, evil)})
    assert not mark.exists()


@pytest.mark.parametrize('old', [True, False])
def test_what_torch_blocks_is_one_sentence(tmp_path, state, old):
    import os

    content = {'hook': Evil(os.system, f'touch {tmp_path / "ran"}'), 'state_dict': state}
    with pytest.raises(InputError, match='could run code') as caught:
        read(tmp_path, content, _use_new_zipfile_serialization=not old)
    assert '\n' not in str(caught.value) and 'torch.save' in str(caught.value)
    if not old:
        assert 'posix.system' in str(caught.value)
    assert not (tmp_path / 'ran').exists()


def test_too_many_kinds_of_objects(tmp_path, state):
    kinds = [type(f'K{k}', (), {'__module__': 'many'}) for k in range(301)]
    sys.modules['many'] = types.ModuleType('many')
    for kind in kinds:
        setattr(sys.modules['many'], kind.__name__, kind)
    with pytest.raises(InputError, match='301 kinds of pickled Python objects'):
        read(tmp_path, {'a': [kind() for kind in kinds], 'state_dict': state})
    del sys.modules['many']


def test_the_remedy_of_the_sentence_works(tmp_path, state):
    """The lines that it gives make a file that is read."""
    stream = io.BytesIO()
    torch.save({'state_dict': state}, stream)
    stream.seek(0)
    c = torch.load(stream, weights_only=False)
    torch.save(c['state_dict'], tmp_path / 'new.pth')
    assert same(read_checkpoint(tmp_path / 'new.pth').state, state)
    assert SAVE_WEIGHTS == 'torch.save(model.state_dict(), path)'
    pickle.dumps(state)
