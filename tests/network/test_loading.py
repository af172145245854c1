"""All forms of checkpoints, and bad checkpoints."""

import numpy as np
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from helpers import DEMO_MODEL

from igseg.network.kinds import parse_options
from igseg.network.loading import create_model
from integrated_gradients import ARCHITECTURES, InputError, load_model

ENCODER = 'timm-mobilenetv3_small_minimal_100'


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return create_model('unetplusplus', ENCODER, 1).eval()


def same(loaded, network) -> bool:
    state, expected = loaded.state_dict(), network.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )


KEYS = [None, 'model_state_dict', 'state_dict', 'model', 'net']
PREFIXES = ['module.', 'model.', '_orig_mod.', 'module._orig_mod.']


@pytest.mark.parametrize(
    ('key', 'prefix'),
    [*((key, '') for key in KEYS), *(('state_dict', prefix) for prefix in PREFIXES)],
)
def test_state_dict_forms(tmp_path, network, key, prefix):
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(state if key is None else {key: state, 'epoch': 3}, tmp_path / 'm.pth')
    loaded = load_model(tmp_path / 'm.pth', 'cpu', ENCODER)
    assert same(loaded, network) and not loaded.training


def test_safetensors(tmp_path, network):
    safetensors.torch.save_file(network.state_dict(), tmp_path / 'm.safetensors')
    assert same(load_model(tmp_path / 'm.safetensors', 'cpu', ENCODER), network)


def test_save_pretrained_folder_brings_its_own_settings(tmp_path):
    net = smp.Unet(ENCODER, encoder_weights=None, classes=4, decoder_channels=(32, 16, 16, 8, 8))
    net.save_pretrained(tmp_path / 'saved')
    loaded = load_model(tmp_path / 'saved', 'cpu')
    assert same(loaded, net)
    assert loaded.network_description.source['architecture'] == 'unet'
    assert loaded.network_description.source['classes'] == 4


def test_half_precision_comes_back_as_float32(tmp_path, network):
    torch.save({k: v.half() for k, v in network.state_dict().items()}, tmp_path / 'm.pth')
    loaded = load_model(tmp_path / 'm.pth', 'cpu', ENCODER)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_checkpoint_with_optimizer_and_numpy_numbers(tmp_path, network):
    optimizer = torch.optim.AdamW(network.parameters())
    extra = {
        'optimizer': optimizer.state_dict(),
        'best_dice': np.float64(0.9),
        'epoch': np.int64(3),
    }
    torch.save({'model_state_dict': network.state_dict(), **extra}, tmp_path / 'm.pth')
    assert same(load_model(tmp_path / 'm.pth', 'cpu', ENCODER), network)


def test_own_settings_are_used_and_explicit_flags_win(tmp_path, network):
    settings = {'architecture': 'unetplusplus', 'encoder': ENCODER, 'classes': 1, 'image_size': 96,
                'mean': [0.5, 0.4, 0.3], 'std': [0.1, 0.2, 0.3]}  # fmt: skip
    path = tmp_path / 'm.pth'
    torch.save({'state_dict': network.state_dict(), 'settings': settings}, path)
    loaded = load_model(path, 'cpu')
    assert same(loaded, network)
    assert loaded.network_description.preprocessing.image_size == 96
    assert loaded.network_description.preprocessing.mean == (0.5, 0.4, 0.3)
    settings['encoder'] = 'resnet18'  # wrong; the flag corrects it
    torch.save({'state_dict': network.state_dict(), 'settings': settings}, path)
    assert same(load_model(path, 'cpu', ENCODER), network)
    with pytest.raises(InputError, match='does not fit unetplusplus with encoder resnet18'):
        load_model(path, 'cpu')


def test_demo_checkpoint_needs_no_flag():
    loaded = load_model(DEMO_MODEL, 'cpu')
    assert loaded.network_description.preprocessing.mean == (0.5, 0.5, 0.5)
    assert DEMO_MODEL.stat().st_size < 14e6


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_architecture_by_name(tmp_path, architecture):
    encoder = 'tu-vit_tiny_patch16_224.augreg_in21k' if architecture == 'dpt' else ENCODER
    net = create_model(architecture, encoder, 3)
    torch.save(net.state_dict(), tmp_path / 'm.pth')
    loaded = load_model(tmp_path / 'm.pth', 'cpu', encoder, architecture)
    assert same(loaded, net)
    assert loaded.network_description.source['classes'] == 3


# ------------------------------------------------------------------ bad checkpoints


def test_missing_empty_and_damaged_files(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    cases = {
        'missing.pth': (None, 'not found'),
        'empty.pth': (b'', r'empty \(0 bytes\)'),
        'text.pth': (b'hello\n' * 100, 'damaged'),
        'cut.pth': (whole[: len(whole) // 2], 'damaged'),
        'text.safetensors': (b'hello\n' * 100, 'damaged'),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_model(tmp_path / name, 'cpu')
        assert name in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('content', [[1, 2], {'epoch': 3}, {}, {'model': {'a': 1}}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / 'm.pth')
    with pytest.raises(InputError, match='holds no state dict'):
        load_model(tmp_path / 'm.pth', 'cpu')


def test_networks_of_another_library(tmp_path):
    torch.save(torch.nn.Conv2d(3, 1, 3).state_dict(), tmp_path / 'm.pth')
    with pytest.raises(InputError, match='no segmentation-models-pytorch checkpoint'):
        load_model(tmp_path / 'm.pth', 'cpu')


def test_the_weights_show_the_network_where_nothing_else_names_it(tmp_path):
    torch.save(create_model('fpn', 'resnet18', 2).state_dict(), tmp_path / 'm.pth')
    description = load_model(tmp_path / 'm.pth', 'cpu').network_description
    assert (description.source['architecture'], description.source['encoder']) == (
        'fpn',
        'resnet18',
    )
    assert 'this is fpn with encoder resnet18' in description.notes[0]
    with pytest.raises(InputError, match='add --architecture fpn --encoder resnet18'):
        load_model(tmp_path / 'm.pth', 'cpu', 'resnet34')
    with pytest.raises(InputError, match='looks like fpn with encoder resnet18'):
        load_model(tmp_path / 'm.pth', 'cpu', 'resnet18', 'unet')


def test_options_that_leave_no_trace_in_the_weights(tmp_path):
    net = smp.DeepLabV3Plus(ENCODER, encoder_weights=None, encoder_output_stride=8).eval()
    torch.save(net.state_dict(), tmp_path / 'm.pth')
    loaded = [
        load_model(tmp_path / 'm.pth', 'cpu', ENCODER, 'deeplabv3plus', model_options=options)
        for options in (None, parse_options(['encoder_output_stride=8']))
    ]
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        same_as = [torch.equal(model(x), net(x)) for model in loaded]
    assert same_as == [False, True]
    assert loaded[1].network_description.source['model_options'] == {'encoder_output_stride': 8}


@pytest.mark.parametrize(
    ('pairs', 'options'),
    [
        (['a=8', 'b=(1, 2)', 'c=None', 'd=swish'],
         {'a': 8, 'b': (1, 2), 'c': None, 'd': 'swish'}),
        ([], {}),
    ],
)  # fmt: skip
def test_model_options(pairs, options):
    assert parse_options(pairs) == options


@pytest.mark.parametrize('pair', ['a', '=3', 'a b=3', '__import__("os")'])
def test_model_options_that_are_none(pair):
    with pytest.raises(InputError, match='of the form NAME=VALUE'):
        parse_options([pair])


def test_the_activation_is_left_out_and_said(tmp_path):
    net = smp.Unet(ENCODER, encoder_weights=None, activation='sigmoid').eval()
    net.save_pretrained(tmp_path / 'saved')
    loaded = load_model(tmp_path / 'saved', 'cpu')
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).sigmoid(), net(x))
    assert 'activation is left out' in loaded.network_description.notes[0]


def test_a_wrong_encoder_is_told_with_the_one_that_fits(tmp_path):
    net = smp.Unet(ENCODER, encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8))
    torch.save(net.state_dict(), tmp_path / 'm.pth')
    assert same(load_model(tmp_path / 'm.pth', 'cpu', ENCODER, 'unet'), net)
    torch.save(smp.Unet('tu-regnetx_002', encoder_weights=None).state_dict(), tmp_path / 'm.pth')
    with pytest.raises(InputError, match='add --architecture unet --encoder tu-regnetx_002'):
        load_model(tmp_path / 'm.pth', 'cpu', 'resnet18', 'unet')
    net = smp.Unet(ENCODER, encoder_weights=None).state_dict()
    with pytest.raises(InputError, match=r'--model_option decoder_channels=\(256, 128'):
        torch.save(net, tmp_path / 'm.pth')
        load_model(tmp_path / 'm.pth', 'cpu', model_options={'decoder_channels': (9, 9, 9, 9, 9)})


def test_unknown_names_are_told(tmp_path):
    with pytest.raises(InputError, match='unknown architecture "unetx"'):
        create_model('unetx', ENCODER, 1)
    with pytest.raises(InputError, match='did you mean'):
        create_model('unet', 'efficientnet_b5', 1)


@pytest.mark.parametrize('config', [None, 'x{', '{}', '{"_model_class": "Odd"}'])
def test_folders_that_save_pretrained_did_not_write(tmp_path, config):
    if config is not None:
        (tmp_path / 'config.json').write_text(config)
        safetensors.torch.save_file({'a': torch.zeros(1)}, tmp_path / 'model.safetensors')
    with pytest.raises(InputError, match=r'save_pretrained|architecture'):
        load_model(tmp_path, 'cpu')
