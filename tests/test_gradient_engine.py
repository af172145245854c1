"""The prepared copy of a network computes the same, and only what may be folded is folded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

import gradient_engine
from gradient_engine import (
    TransposedBackwardConv2d,
    find_followers,
    improved_copy,
    is_replaceable,
    measure_deviation,
    prepared_copy,
)
from model_loading import create_model


def randomise(network: nn.Module) -> nn.Module:
    """Batch norms with statistics that matter."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
    return network.eval()


def check_same(network: nn.Module, size: int = 16) -> tuple[nn.Module, int]:
    """The improved copy in double precision agrees to rounding; returns it and what was folded."""
    network = randomise(network).double()
    x = torch.randn(
        1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    improved, folded, _ = improved_copy(network, x)
    assert max(measure_deviation(network, improved, x)) < 1e-12
    return improved, folded


class Twisted(nn.Module):
    """Its children stand in another order than they run."""

    def __init__(self):
        super().__init__()
        self.norm_b = nn.BatchNorm2d(5)
        self.first = nn.Conv2d(3, 5, 3)
        self.norm_a = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 5, 3, bias=False)

    def forward(self, x):
        return self.norm_b(self.second(F.relu(self.norm_a(self.first(x)))))


def test_folding_follows_the_data_not_the_order_of_the_children():
    network = Twisted()
    followers = find_followers(randomise(network), torch.randn(1, 3, 16, 16))
    assert followers == {network.first: network.norm_a, network.second: network.norm_b}
    improved, folded = check_same(network)
    assert folded == 2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in improved.modules())


class Custom(nn.Module):
    """conv, norm and a formula of both."""

    def __init__(self, formula):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


def read_twice(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def read_by_a_method(net, x):
    y = net.conv(x)
    return net.norm(y) * y.mean()


def read_in_a_list(net, x):
    y = net.conv(x)
    return torch.cat([net.norm(y), y], dim=1)


def activation_between(net, x):
    return net.norm(F.relu(net.conv(x)))


def norm_first(net, x):
    return net.conv(net.norm(x))


def convolution_runs_twice(net, x):
    return net.norm(net.conv(net.conv(x)))


def norm_runs_twice(net, x):
    return net.norm(net.conv(x)) + net.norm(net.other(x))


def changed_in_place_before(net, x):
    y = net.conv(x)
    y.mul_(2)
    return net.norm(y)


@pytest.mark.parametrize(
    'formula',
    [read_twice, read_by_a_method, read_in_a_list, activation_between, norm_first,
     convolution_runs_twice, norm_runs_twice, changed_in_place_before],
)  # fmt: skip
def test_what_cannot_be_folded_is_left_alone(formula):
    _, folded = check_same(Custom(formula))
    assert folded == 0


def test_asking_for_the_shape_does_not_prevent_folding():
    def asks(net, x):
        y = net.conv(x)
        assert y.shape[-1] == y.size(-1) and y.dim() == y.ndim == 4
        return net.norm(y)

    assert check_same(Custom(asks))[1] == 1


def test_shared_weights_are_not_folded():
    network = Custom(lambda net, x: net.norm(net.conv(x)) + net.other(x))
    network.other.weight = network.conv.weight
    assert check_same(network)[1] == 0


@pytest.mark.parametrize(
    'options', [{'affine': False}, {'track_running_stats': False}, {'eps': 0.1}]
)
def test_kinds_of_batch_norm(options):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options))
    if 'track_running_stats' in options:  # such a norm uses the batch: it stays
        improved, folded, _ = improved_copy(network.eval(), torch.randn(1, 3, 8, 8))
        assert folded == 0 and isinstance(improved[1], nn.BatchNorm2d)
    else:
        assert check_same(network)[1] == 1


@pytest.mark.parametrize('kernel', [1, 3, (1, 5), (3, 2)])
@pytest.mark.parametrize('padding', [0, 1])
@pytest.mark.parametrize('dilation', [1, 2])
def test_transposed_backward_is_the_gradient(kernel, padding, dilation):
    convolution = nn.Conv2d(3, 7, kernel, padding=padding, dilation=dilation).double()
    reaches = [dilation * (k - 1) for k in convolution.kernel_size]
    assert is_replaceable(convolution) == (padding <= min(reaches))
    if not is_replaceable(convolution):
        return
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64, requires_grad=True)
    outputs = [net(x) for net in (convolution, TransposedBackwardConv2d(convolution))]
    vector = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, x, vector)[0] for y in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    'module',
    [
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(4, 4, 3, padding='same'),
        nn.Conv2d(4, 4, 3, padding=3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.ReLU(),
    ],
)
def test_other_modules_keep_their_backward(module):
    assert not is_replaceable(module)


@pytest.mark.parametrize(
    'architecture, encoder',
    [('unetplusplus', 'efficientnet-b0'), ('unet', 'resnet18'), ('fpn', 'mobilenet_v2'),
     ('deeplabv3plus', 'tu-tf_efficientnet_lite0'), ('pan', 'resnet18'), ('linknet', 'resnet18')],
)  # fmt: skip
def test_real_networks_agree_to_rounding(architecture, encoder):
    torch.manual_seed(0)
    network = create_model(architecture, encoder, 1)
    _, folded = check_same(network, 128)
    assert folded >= 20


def test_demo_model_in_single_precision(demo_model, brain):
    before = {name: value.clone() for name, value in demo_model.state_dict().items()}
    network, prepared = prepared_copy(demo_model, brain)
    assert not prepared.fell_back and prepared.folded == 70 and prepared.transposed > 30
    assert prepared.logit_deviation < 1e-5
    assert network is not demo_model
    for name, value in demo_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in demo_model.parameters())


def test_a_copy_that_deviates_is_not_used(monkeypatch, demo_model, brain):
    fold = gradient_engine.fold

    def wrong(convolution, norm):
        fold(convolution, norm)
        convolution.bias.data += 0.01

    monkeypatch.setattr(gradient_engine, 'fold', wrong)
    network, prepared = prepared_copy(demo_model, brain)
    assert prepared.fell_back and network is demo_model
    assert prepared.logit_deviation > 1e-4


def test_a_kink_that_rounding_moved_is_no_reason_to_fall_back(monkeypatch, brain):
    """Single precision may differ by more than the tolerance; double precision decides."""
    network = randomise(Twisted())
    measured = []

    def measure(original, other, example):
        measured.append(example.dtype)
        return (1e-3, 1e-3) if example.dtype == torch.float32 else (1e-13, 1e-13)

    monkeypatch.setattr(gradient_engine, 'measure_deviation', measure)
    _, prepared = prepared_copy(network, brain)
    assert measured == [torch.float32, torch.float64]
    assert not prepared.fell_back and prepared.gradient_deviation == 1e-3


def test_a_network_that_cannot_be_copied_runs_as_it_is(brain):
    class Stubborn(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise TypeError('no copies')

    network = Stubborn(3, 1, 3).eval()
    copied, prepared = prepared_copy(network, brain)
    assert copied is network and prepared.folded == prepared.transposed == 0


def test_improved_copy_of_a_network_in_training_mode_evaluates():
    network = randomise(Twisted()).train()
    x = torch.randn(1, 3, 16, 16)
    improved, _, _ = improved_copy(network, x)
    expected = copy.deepcopy(network).eval()(x)
    assert relative_error(improved(x), expected) < 1e-5
    assert network.training


class WithoutDouble(torch.Tensor):
    """A tensor of a device that has no float64, as MPS."""

    def double(self):
        raise TypeError('no float64 here')

    def cpu(self):
        return super().cpu().as_subclass(torch.Tensor)


def test_folding_asks_no_device_for_double_precision():
    conv, norm = nn.Conv2d(3, 4, 3), randomise(nn.BatchNorm2d(4))
    expected = norm(conv(x := torch.randn(1, 3, 8, 8)))
    for module in (conv, norm):
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                delattr(module, name)
                setattr(module, name, value.detach().as_subclass(WithoutDouble))
    gradient_engine.fold(conv, norm)
    torch.testing.assert_close(conv(x).as_subclass(torch.Tensor), expected.detach())
