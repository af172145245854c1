"""Networks without a word about them: what their weights' names and shapes tell."""

import gzip
import json
import time

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch

from igseg.errors import InputError
from igseg.network.loading import create_model, load_model
from igseg.network.recognise import (
    LEAVES_NO_TRACE,
    encoder_index,
    index_is_current,
    index_key,
    recognise,
    tensor_shapes,
)

SMALL = 'timm-mobilenetv3_small_minimal_100'
VIT = 'tu-vit_tiny_patch16_224.augreg_in21k'
# Architecture, encoder and other arguments, which must be recognised from the weights alone.
NETWORKS = [
    ('unet', 'resnet18', {}),
    ('unet', 'resnet18', {'in_channels': 1, 'encoder_depth': 4,
                          'decoder_channels': (48, 33, 17, 9), 'classes': 5}),
    ('unet', 'mobilenet_v2', {'in_channels': 4, 'decoder_attention_type': 'scse', 'classes': 3}),
    ('unet', 'vgg11', {'encoder_depth': 3, 'decoder_channels': (24, 16, 8)}),
    ('unet', 'mit_b0', {'in_channels': 2}),
    ('unet', 'timm-efficientnet-b0', {'decoder_use_norm': False}),
    ('unet', 'efficientnet-b0', {'decoder_use_norm': {'type': 'instancenorm', 'affine': True}}),
    ('unet', 'tu-regnetx_002', {'in_channels': 4}),
    ('unet', 'tu-convnext_atto', {'decoder_channels': (64, 32, 16, 16, 8)}),
    ('unet', 'tu-mobilenetv3_small_050', {'encoder_depth': 4, 'decoder_channels': (32, 16, 8, 8)}),
    ('unetplusplus', SMALL, {'in_channels': 1, 'classes': 2}),
    ('unetplusplus', 'resnet18', {'encoder_depth': 3, 'decoder_channels': (29, 21, 17),
                                  'decoder_attention_type': 'scse'}),
    ('unetplusplus', 'tu-regnetx_002', {'decoder_channels': (32, 24, 16, 12, 8)}),
    ('manet', SMALL, {'decoder_pab_channels': 24}),
    ('manet', 'resnet18', {'encoder_depth': 4, 'decoder_channels': (32, 16, 8, 8)}),
    ('linknet', 'resnet18', {'in_channels': 4, 'decoder_use_norm': False}),
    ('linknet', 'tu-regnetx_002', {'encoder_depth': 4}),
    ('fpn', 'resnet18', {'decoder_pyramid_channels': 96, 'decoder_segmentation_channels': 64,
                         'decoder_merge_policy': 'cat', 'classes': 4}),
    ('fpn', 'resnet18', {'encoder_depth': 3, 'in_channels': 2}),
    ('fpn', 'mit_b0', {}),
    ('pspnet', 'resnet18', {'psp_out_channels': 60}),
    ('pspnet', 'tu-mobilenetv3_small_050', {'encoder_depth': 4, 'decoder_use_norm': False}),
    ('deeplabv3', 'resnet18', {'decoder_channels': 40, 'in_channels': 1}),
    ('deeplabv3', 'mobilenet_v2', {'decoder_aspp_separable': True, 'encoder_depth': 4}),
    ('deeplabv3plus', SMALL, {'decoder_channels': 72}),
    ('deeplabv3plus', 'resnet18', {'decoder_aspp_separable': False}),
    ('pan', 'resnet18', {'decoder_channels': 20, 'in_channels': 4}),
    ('pan', 'mobilenet_v2', {'encoder_depth': 4}),
    ('upernet', 'resnet18', {'decoder_channels': 36, 'classes': 3}),
    ('upernet', 'tu-convnext_atto', {'encoder_depth': 4, 'decoder_channels': 36}),
    ('segformer', 'mit_b0', {'decoder_segmentation_channels': 48, 'classes': 7}),
    ('segformer', 'resnet18', {'encoder_depth': 4}),
    ('dpt', VIT, {'decoder_fusion_channels': 32, 'encoder_depth': 3, 'in_channels': 1,
                  'decoder_intermediate_channels': (16, 24, 32)}),
    ('dpt', 'tu-vit_tiny_patch16_224', {'decoder_intermediate_channels': (16, 24, 32, 32),
                                        'decoder_fusion_channels': 32, 'img_size': 64}),
]  # fmt: skip


def network(architecture: str, encoder: str, options: dict) -> torch.nn.Module:
    """With random weights, those of the batch norms too."""
    torch.manual_seed(0)
    net = create_model(architecture, encoder, **{'classes': 1, **options})
    for name, buffer in net.named_buffers():
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 2)
    return net.eval()


def same_output(model: torch.nn.Module, other: torch.nn.Module, channels: int, size: int) -> bool:
    noise = torch.rand(1, channels, size, size)
    with torch.no_grad():
        return torch.equal(model(noise), other(noise))


@pytest.mark.parametrize(('architecture', 'encoder', 'options'), NETWORKS)
def test_weights_alone_tell_the_network(tmp_path, architecture, encoder, options):
    net = network(architecture, encoder, options)
    channels = options.get('in_channels', 3)
    size = options.get('img_size', {'dpt': 224, 'pan': 128}.get(architecture, 64))
    safetensors.torch.save_file(net.state_dict(), tmp_path / 'm.safetensors')  # sorts the names
    loaded = load_model(tmp_path / 'm.safetensors', 'cpu')
    description = loaded.network_description
    assert description.source['architecture'] == architecture
    assert description.source['classes'] == options.get('classes', 1)
    assert description.channels == channels
    assert description.fixed_size == ((size, size) if architecture == 'dpt' else None)
    assert f'this is {architecture} with encoder' in description.notes[0]
    assert same_output(loaded, net, channels, size)


OTHER = {'decoder_interpolation': 'bicubic', 'upsampling': 2, 'encoder_output_stride': 16,
         'decoder_atrous_rates': (3, 5, 7), 'encoder_output_indices': [0, 1, 2, 3],
         'decoder_readout': 'add', 'dynamic_img_size': True}  # fmt: skip


@pytest.mark.parametrize(
    ('architecture', 'option'), [(a, o) for a, names in LEAVES_NO_TRACE.items() for o in names]
)
def test_what_leaves_no_trace(architecture, option):
    encoder = 'tu-vit_tiny_patch16_224' if architecture == 'dpt' else 'resnet18'
    readout = {'decoder_readout': 'ignore'} if option == 'decoder_readout' else {}
    with torch.device('meta'):
        usual = create_model(architecture, encoder, 1, **readout)
        other = create_model(architecture, encoder, 1, **{option: OTHER[option]})
    assert tensor_shapes(usual.state_dict()) == tensor_shapes(other.state_dict())


@pytest.mark.parametrize('named', ['architecture', 'encoder', 'both'])
def test_what_is_named_is_kept_and_the_rest_guessed(tmp_path, named):
    net = network('unet', 'resnet18', {'decoder_channels': (20, 16, 12, 8, 8), 'in_channels': 4})
    torch.save(net.state_dict(), tmp_path / 'm.pth')
    names = {'architecture': 'unet', 'encoder': 'resnet18'}
    arguments = names if named == 'both' else {named: names[named]}
    loaded = load_model(tmp_path / 'm.pth', 'cpu', **arguments)
    assert same_output(loaded, net, 4, 64)
    note = loaded.network_description.notes[0]
    assert 'decoder_channels=(20, 16, 12, 8, 8)' in note and 'in_channels=4' in note
    assert ('--encoder' in note) == (named == 'architecture')


def test_nothing_is_said_where_all_was_named_and_usual(tmp_path):
    torch.save(network('unet', 'resnet18', {}).state_dict(), tmp_path / 'm.pth')
    loaded = load_model(tmp_path / 'm.pth', 'cpu', 'resnet18', 'unet')
    assert loaded.network_description.notes == ()


def test_an_encoder_that_several_could_be_must_be_named(tmp_path):
    net = network('unet', 'tu-tf_efficientnet_lite0', {})
    torch.save(net.state_dict(), tmp_path / 'm.pth')
    with pytest.raises(InputError, match='--encoder') as caught:
        load_model(tmp_path / 'm.pth', 'cpu')
    assert 'tu-efficientnet_lite0, tu-tf_efficientnet_lite0' in str(caught.value)
    loaded = load_model(tmp_path / 'm.pth', 'cpu', 'tu-tf_efficientnet_lite0')
    assert same_output(loaded, net, 3, 64)
    other = load_model(tmp_path / 'm.pth', 'cpu', 'tu-efficientnet_lite0')
    assert not same_output(other, net, 3, 64)  # so asking is right


def test_encoders_that_compute_the_same_are_no_question(tmp_path):
    net = network('unet', 'tu-nf_resnet101', {'encoder_depth': 3, 'decoder_channels': (16, 8, 8)})
    torch.save(net.state_dict(), tmp_path / 'm.pth')
    loaded = load_model(tmp_path / 'm.pth', 'cpu')
    assert loaded.network_description.source['encoder'] == 'tu-nf_resnet50'  # the same stages
    assert same_output(loaded, net, 3, 64)


def test_names_of_earlier_versions(tmp_path):
    """DeepLabV3's decoder was a list until 0.4; encoders of timm had no `model.` in their names."""
    net = network('deeplabv3', 'tu-resnest14d', {})
    parts = {'decoder.aspp.': 'decoder.0.', 'decoder.conv.': 'decoder.1.', 'decoder.bn.':
             'decoder.2.', 'encoder.model.': 'encoder.'}  # fmt: skip
    old = {}
    for name, value in net.state_dict().items():
        for now, then in parts.items():
            name = name.replace(now, then)
        old[name] = value
    torch.save(old, tmp_path / 'm.pth')
    for encoder in (None, 'timm-resnest14d', 'tu-resnest14d'):
        assert same_output(load_model(tmp_path / 'm.pth', 'cpu', encoder), net, 3, 64)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'encoder.conv1.weight': torch.zeros(65, 3, 7, 7)}, 'encoder that was not recognised'),
        ({'encoder.odd': torch.zeros(1)}, 'encoder that was not recognised'),
        ({'decoder.blocks.0.conv1.0.weight': torch.zeros(9, 9, 9, 9)}, 'was not recognised'),
        ({'decoder.blocks.0.conv1.0.weight': None}, 'no architecture'),
    ],
)
def test_weights_that_fit_nothing_are_an_error_at_once(tmp_path, change, message):
    state = {**network('unet', 'resnet18', {}).state_dict(), **change}
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / 'm.pth')
    started = time.process_time()  # of this process alone, however busy the machine is
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path / 'm.pth', 'cpu')
    assert time.process_time() - started < 10
    assert '--model_factory' in str(caught.value) and '\n' not in str(caught.value)


def test_a_model_much_larger_than_its_file_is_not_built(tmp_path):
    state = network('unet', 'resnet18', {}).state_dict()
    stem = torch.zeros(1).expand(64, 10**8, 7, 7)  # a single number for very many channels
    with pytest.raises(InputError, match='encoder that was not recognised'):
        recognise({**state, 'encoder.conv1.weight': stem}, tmp_path, create_model)


def test_encoders_of_smp_are_recognised_without_an_index(tmp_path, monkeypatch):
    state = network('unet', 'resnet18', {'in_channels': 1}).state_dict()
    empty = {'versions': {}, 'loose': [], 'encoders': {}}
    (tmp_path / 'i.gz').write_bytes(gzip.compress(json.dumps(empty).encode()))
    monkeypatch.setattr('igseg.network.recognise.INDEX', tmp_path / 'i.gz')
    monkeypatch.setattr(
        smp.encoders, 'get_encoder_names', lambda: ['vgg11', 'resnet34', 'resnet18']
    )
    encoder_index.cache_clear()
    try:
        recognised = recognise(state, tmp_path, create_model)
    finally:
        encoder_index.cache_clear()
    assert (recognised.encoder, recognised.in_channels) == ('resnet18', 1)


SAMPLE = ['resnet18', 'vgg11_bn', 'efficientnet-b5', 'tu-resnet18', 'tu-regnetx_002']


@pytest.mark.parametrize('encoder', SAMPLE)
def test_the_index_agrees_with_the_installed_libraries(encoder):
    if not index_is_current():
        pytest.skip(f'the index was made with {encoder_index()["versions"]}')
    index = encoder_index()
    for depth in ('3', '5'):
        with torch.device('meta'):
            built = smp.encoders.get_encoder(encoder, depth=int(depth), weights=None, in_channels=1)
        shapes = tensor_shapes(built.state_dict())
        keys = [index_key(shapes, loose) for loose in index['loose']]
        kinds = [
            names for key in keys for names in index['encoders'].get(key, {}).get(f'{depth}', ())
        ]
        assert any(encoder in names for names in kinds)
