"""Networks that the user's code builds: from torchvision and other libraries, or hand-written."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT, noise_image, save_image
from torch import nn

from igseg.errors import InputError
from igseg.network.factory import build_network, tried_channels
from igseg.network.kinds import parse_options
from igseg.network.loading import load_model
from integrated_gradients import IntegratedGradients, main

UNET = """
import torch
from torch import nn
from layers import block

class UNet(nn.Module):
    def __init__(self, channels=1, classes=2, width=4):
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.last = nn.Conv2d(2 * width, classes, 1)
        self.down1, self.down2 = block(channels, width), block(width, 2 * width)
    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(nn.functional.max_pool2d(fine, 2))
        return self.last(torch.cat([fine, self.up(coarse)], dim=1))

class Wrapped(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.net = UNet(**options)
    def forward(self, x):
        return {'out': self.net(x)}

def fails():
    raise ValueError('no such size')

number = int
"""
LAYERS = """
from torch import nn

def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'unet.py').write_text(UNET)
    (tmp_path / 'layers.py').write_text(LAYERS)
    return tmp_path


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def flags(folder, factory, *options):
    extra = ['--model_option', *options] if options else []
    return ['--model_path', str(folder / 'm.pth'), '--model_factory', factory, *extra, '--device',
            'cpu', '--image_size', '64', '--num_steps', '2', '--step_batch', '1', '--target',
            'image', '--image_path', str(save_image(folder / 'a.png', noise_image())),
            '--output_dir', str(folder / 'out')]  # fmt: skip


def test_a_hand_written_unet_from_the_command_line(folder, capsys):
    factory = f'{folder}/unet.py:UNet'
    net = randomised(build_network(factory, {'classes': 3, 'width': 8}))
    torch.save({'epoch': 3, 'state_dict': {f'model.{k}': v for k, v in net.state_dict().items()}},
               folder / 'm.pth')  # fmt: skip
    assert main(flags(folder, factory, 'classes=3', 'width=8')) == 0
    (path,) = folder.glob('out/*/*_statistics.json')
    statistics = json.loads(path.read_text())
    assert statistics['settings']['model_factory'] == factory
    assert statistics['settings']['model_options'] == {'classes': 3, 'width': 8}
    assert statistics['channel_names'] == ['grey']
    assert any('pictures are read as grey' in note for note in statistics['notes'])
    loaded = load_model(folder / 'm.pth', 'cpu', model_factory=factory,
                        model_options={'classes': 3, 'width': 8})  # fmt: skip
    x = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(loaded(x), net(x))
    assert main(flags(folder, factory, 'classes=2', 'width=8')) == 2
    error = capsys.readouterr().err
    assert '2 have another shape (last.weight: (3, 16, 1, 1), the network has' in error
    assert 'Traceback' not in error


def test_what_the_factory_computes_is_part_of_what_is_finished(folder):
    factory = f'{folder}/unet.py:UNet'
    torch.save(build_network(factory, {}).state_dict(), folder / 'm.pth')
    runs = []
    for changed in (False, False, True):
        if changed:
            (folder / 'unet.py').write_text(UNET.replace('max_pool2d', 'avg_pool2d'))
        assert main([*flags(folder, factory), '--figures', 'none']) == 0
        (path,) = folder.glob('out/*/*_statistics.json')
        runs.append((path.stat().st_mtime_ns, json.loads(path.read_text())['resume_key']))
    assert runs[0] == runs[1] and runs[1][1] != runs[2][1]


def test_code_beside_the_factory_is_part_of_the_network(tmp_path):
    """However it is imported, in whatever process, and although no weight tells."""
    ways = {'import layers': 'layers.block', 'from layers import block': 'block'}
    for number, (how, used) in enumerate(ways.items()):
        forward = f'    def forward(self, x):\n        return {used}(super().forward(x))\n'
        code = f'{how}\nfrom torch import nn\n\n\nclass Net(nn.Conv2d):\n{forward}'
        (tmp_path / f'net{number}.py').write_text(code)
    script = (
        'import sys; from igseg.network.factory import build_network; '
        'from igseg.network.identity import structure_digest; '
        'options = {"in_channels": 3, "out_channels": 1, "kernel_size": 1}; '
        'print(*(structure_digest(build_network(one, options)) for one in sys.argv[1:]))'
    )
    factories = [f'{tmp_path}/net{number}.py:Net' for number in range(len(ways))]
    digests = []
    for factor in (1, 1, 2):
        (tmp_path / 'layers.py').write_text(f'def block(x):\n    return {factor} * x\n')
        command = [sys.executable, '-B', '-c', script, *factories]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        digests.append(done.stdout.split())
    assert digests[0] == digests[1]
    for before, after in zip(digests[1], digests[2], strict=True):
        assert before != after


@pytest.mark.parametrize('ours', ['errors', 'checks.verdict', 'network.recognise'])
def test_code_beside_the_factory_may_be_named_like_ours(tmp_path, ours):
    name = ours.rpartition('.')[2]
    (tmp_path / f'{name}.py').write_text('WIDTH = 5\n')
    (tmp_path / 'net.py').write_text(
        f'from torch import nn\nfrom {name} import WIDTH\n\n\n'
        'def build():\n    return nn.Conv2d(3, WIDTH, 1)\n'
    )
    before = importlib.import_module(f'igseg.{ours}')
    assert build_network(f'{tmp_path}/net.py:build', {}).out_channels == 5
    assert importlib.import_module(f'igseg.{ours}') is before
    assert Path(before.__file__) == ROOT / 'igseg' / f'{ours.replace(".", "/")}.py'


def test_a_package_beside_the_factory_may_be_named_like_ours(tmp_path):
    """Also with a part that ours has too, and has not imported yet."""
    script = (
        'import sys\n'
        'from igseg.network.factory import build_network\n'
        'assert "igseg.method.methods" not in sys.modules\n'
        f'assert build_network("{tmp_path}/net.py:build", {{}}).out_channels == 5\n'
        'from igseg.method.methods import IntegratedGradientsMethod\n'
    )
    for folder in ('igseg', 'igseg/method'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / '__init__.py').write_text('')
    (tmp_path / 'igseg' / 'method' / 'methods.py').write_text('WIDTH = 5\n')
    (tmp_path / 'net.py').write_text(
        'from torch import nn\nfrom igseg.method.methods import WIDTH\n\n\n'
        'def build():\n    return nn.Conv2d(3, WIDTH, 1)\n'
    )
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_factories_have_each_their_own_code_beside_them(tmp_path):
    for width in (2, 7):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / 'sizes_of_layers.py').write_text(f'WIDTH = {width}\n')
        (folder / 'net.py').write_text(
            'from torch import nn\nimport sizes_of_layers\n\n\n'
            'def build():\n    return nn.Conv2d(3, sizes_of_layers.WIDTH, 1)\n'
        )
        assert build_network(f'{folder}/net.py:build', {}).out_channels == width


def test_a_network_in_half_precision_runs_in_single(tmp_path):
    (tmp_path / 'net.py').write_text(
        'from torch import nn\n\n\ndef build():\n    return nn.Conv2d(3, 1, 1).half()\n'
    )
    factory = f'{tmp_path}/net.py:build'
    saved = nn.Conv2d(3, 1, 1).half()
    torch.save(saved.state_dict(), tmp_path / 'm.pth')
    loaded = load_model(tmp_path / 'm.pth', 'cpu', model_factory=factory)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(loaded(x), saved.float()(x))


@pytest.mark.parametrize('name', ['lraspp_mobilenet_v3_large', 'deeplabv3_mobilenet_v3_large'])
def test_torchvision(folder, name):
    factory, options = f'torchvision.models.segmentation:{name}', ['num_classes=2']
    options.append('weights_backbone=None')
    net = build_network(factory, parse_options(options))
    torch.save({'model': net.state_dict()}, folder / 'm.pth')
    assert main(flags(folder, factory, *options)) == 0
    with np.load(folder / 'out' / 'a' / 'a_attributions.npz') as arrays:
        assert arrays['prediction'].shape == (64, 64) and arrays['attributions'].any()


@pytest.mark.parametrize('wrapped', [True, False])
def test_a_wrapper_in_the_factory_or_around_the_saved_network(folder, wrapped):
    plain, outer = f'{folder}/unet.py:UNet', f'{folder}/unet.py:Wrapped'
    saved, factory = (plain, outer) if wrapped else (outer, plain)
    net = build_network(saved, {})
    safetensors.torch.save_file(net.state_dict(), folder / 'm.safetensors')
    loaded = load_model(folder / 'm.safetensors', 'cpu', model_factory=factory)
    x = torch.randn(1, 1, 16, 16)
    outputs = (loaded(x), net(x))
    maps = [output['out'] if isinstance(output, dict) else output for output in outputs]
    torch.testing.assert_close(*maps)


def test_what_lies_beside_the_weights(folder):
    factory = f'{folder}/unet.py:UNet'
    state = build_network(factory, {}).state_dict()
    beside = {'aux.weight': torch.ones(2), 'pixel_mean': torch.tensor([0.5]),
              'pixel_std': torch.tensor([0.25])}  # fmt: skip
    torch.save({'model': {**state, **beside}, 'ema': dict(state.items())}, folder / 'm.pth')
    loaded = load_model(folder / 'm.pth', 'cpu', model_factory=factory)
    notes = ' '.join(loaded.network_description.notes)
    assert '3 tensors are left over beside the weights, not used (aux.weight' in notes
    assert loaded.preprocessing.mean == (0.5,) and loaded.preprocessing.std == (0.25,)
    del state['down1.0.weight']
    torch.save(state, folder / 'm.pth')
    with pytest.raises(InputError, match=r'1 tensors are missing \(down1.0.weight\)'):
        load_model(folder / 'm.pth', 'cpu', model_factory=factory)
    torch.save({'other.weight': torch.ones(1)}, folder / 'm.pth')
    with pytest.raises(InputError, match='holds no weights of the network of the model factory'):
        load_model(folder / 'm.pth', 'cpu', model_factory=factory)


def test_weights_that_the_factory_has_loaded_itself(folder):
    factory = f'{folder}/unet.py:UNet'
    torch.save({'other.weight': torch.ones(1)}, folder / 'm.pth')
    torch.manual_seed(0)
    expected = build_network(factory, {})
    torch.manual_seed(0)
    loaded = load_model(folder / 'm.pth', 'cpu', model_factory=factory, weights_key='factory')
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in expected.state_dict().items())
    assert loaded.network_description.source['weights_key'] == 'factory'
    assert "the weights are the factory's own" in loaded.network_description.notes


def test_a_module_by_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    network = build_network('unet:UNet', {'channels': 4})
    assert network(torch.zeros(1, 4, 8, 8)).shape == (1, 2, 8, 8)
    assert tried_channels(network) == 4  # its first convolution in order is not the first that runs
    ig = IntegratedGradients(network, 'cpu', step_batch=1)
    assert ig.explain(torch.rand(4, 16, 16), 'image', num_steps=2).attributions.shape[0] == 4


@pytest.mark.parametrize(
    ('factory', 'options', 'message'),
    [
        ('unet.py', {}, 'not of the form FILE.py:FUNCTION'),
        ('none.py:f', {}, 'model factory not found'),
        ('unet.py:nothing', {}, 'there is no "nothing"'),
        ('unet.py:fails', {}, 'ValueError: no such size'),
        ('unet.py:number', {}, 'gives int, not a torch.nn.Module'),
        ('unet.py:UNet', {'odd': 1}, "unexpected keyword argument 'odd'"),
        ('broken.py:f', {}, 'cannot be imported: SyntaxError'),
        ('exits.py:f', {}, 'cannot be imported: SystemExit'),
        ('no_such_package_at_all:f', {}, 'cannot be imported: ModuleNotFoundError'),
    ],
)
def test_factories_that_do_not_work_are_an_error_of_one_sentence(folder, factory, options, message):
    (folder / 'broken.py').write_text('def f(:\n')
    (folder / 'exits.py').write_text('import sys\nsys.exit(3)\n')
    with pytest.raises(InputError, match=message) as error:
        build_network(str(folder / factory) if '.py' in factory else factory, options)
    assert '\n' not in str(error.value)


def test_a_factory_goes_without_the_names_of_smp(folder, capsys):
    (folder / 'm.pth').write_text('weights')  # which are not looked at
    arguments = [*flags(folder, f'{folder}/unet.py:UNet'), '--encoder', 'resnet18']
    assert main(arguments) == 2
    assert 'goes without --architecture and --encoder' in capsys.readouterr().err


ODD = """
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    def __init__(self, form='', channels=3):
        super().__init__()
        self.form, self.c = form, nn.Conv2d(channels, 2, 1)
        self.calls = 0
    def forward(self, x):
        if self.form == 'grey':
            x = x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        if self.form == 'fixed' and tuple(x.shape[-2:]) != (60, 70):
            raise ValueError('only 60 x 70')
        y = self.c(x)
        self.calls += 1
        if self.form == 'random':
            return F.dropout(y, 0.5, training=True)
        if self.form == 'state':
            return y + 0.5 * self.calls
        if self.form == 'detached':
            return y.detach()
        if self.form == 'last':
            return y.permute(0, 2, 3, 1)
        if self.form == 'two':
            return [2 * y, y]
        return y

def lazy():
    return nn.LazyConv2d(1, 3)
"""


def odd(folder, form: str, **changed: object):
    (folder / 'odd.py').write_text(ODD)
    factory = f'{folder}/odd.py:Base'
    torch.save(build_network(factory, {}).state_dict(), folder / 'm.pth')
    words = flags(folder, factory, f'form={form}')
    for name, value in changed.items():
        words += [f'--{name}', *str(value).split()]
    return main(words)


@pytest.mark.parametrize(
    ('form', 'message'),
    [
        ('random', 'another answer each time it is asked'),
        ('state', 'another answer each time it is asked'),
        ('detached', 'gives no gradient at its input'),
        ('last', 'returns a map of shape (1, 64, 64, 2), classes last'),
        ('fixed', 'only 60 x 70'),
    ],
)
def test_networks_that_cannot_be_explained_are_refused(folder, capsys, form, message):
    assert odd(folder, form) == 2
    err = capsys.readouterr().err
    assert message in err and 'Traceback' not in err


def test_a_size_that_the_network_takes_is_not_rounded(folder, capsys):
    assert odd(folder, 'fixed', image_size='60x70') == 0
    with np.load(folder / 'out' / 'a' / 'a_attributions.npz') as arrays:
        assert arrays['attributions'].shape == (3, 60, 70)


def statistics(folder) -> dict:
    (path,) = folder.glob('out/*/*_statistics.json')
    return json.loads(path.read_text())


def test_a_note_says_which_of_several_maps_is_explained(folder):
    assert odd(folder, 'two') == 0
    notes = statistics(folder)['notes']
    assert any('gives 2 maps' in note and '0 is explained' in note for note in notes)


def test_the_user_can_set_the_number_of_channels(folder):
    assert odd(folder, 'grey', mean='0', std='1') == 0
    assert statistics(folder)['channel_names'] == ['grey']


def test_a_lazy_network_is_refused(folder, capsys):
    (folder / 'odd.py').write_text(ODD)
    with pytest.raises(InputError, match='lazy modules'):
        build_network(f'{folder}/odd.py:lazy', {})


def other_library(package: str, folder) -> tuple[str, list[str]]:
    """A network of a library, saved: the factory and its options, as docs/input.md has them."""
    if package == 'monai':
        options = ['spatial_dims=2', 'in_channels=1', 'out_channels=2', 'channels=(4,8,16)',
                   'strides=(2,2)']  # fmt: skip
        return 'monai.networks.nets:UNet', options
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {'hidden_sizes': [8, 16, 24, 32], 'depths': [1] * 4, 'decoder_hidden_size': 16}
    config = SegformerConfig(num_labels=3, **sizes)
    SegformerForSemanticSegmentation(config).save_pretrained(folder / 'saved')
    return ('transformers:SegformerForSemanticSegmentation.from_pretrained',
            [f'pretrained_model_name_or_path={folder}/saved'])  # fmt: skip


@pytest.mark.parametrize('package', ['transformers', 'monai'])
def test_networks_of_other_libraries(folder, package):
    pytest.importorskip(package)
    factory, options = other_library(package, folder)
    torch.save(build_network(factory, parse_options(options)).state_dict(), folder / 'm.pth')
    words = flags(folder, factory, *options)
    if package == 'transformers':  # a folder with older names, and a config.json not of smp
        words[1] = str(folder / 'saved')
        words += ['--weights_key', 'factory']
    assert main(words) == 0
    with np.load(folder / 'out' / 'a' / 'a_attributions.npz') as arrays:
        assert arrays['prediction'].shape == (64, 64) and arrays['attributions'].any()
