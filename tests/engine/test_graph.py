"""The graph of a network gives the same results, for the whole output and for any box of it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from igseg.engine import crops
from igseg.engine.crops import contains, merged, part_of, slices_of, trimmed
from igseg.engine.graph import NetworkGraph
from igseg.engine.rewrites import Kernel, flipped, fold_batch_norms
from igseg.engine.trace import NotExportable, trace
from igseg.network.loading import create_model

SIZE = 16
EXACT = 1e-10


class Formula(nn.Module):
    """A network from a formula and the layers that it uses."""

    def __init__(self, formula, **layers):
        super().__init__()
        self.formula = formula
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.formula(self, x)


def randomised(network: nn.Module) -> nn.Module:
    """The network in double precision, with random weights and statistics of batch norms."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
    return network.eval().double().requires_grad_(False)


def image(size: int = SIZE, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, channels, size, size, generator=generator, dtype=torch.float64)


def graph_of(network: nn.Module, size: int = SIZE, channels: int = 3) -> NetworkGraph:
    torch.manual_seed(0)
    return NetworkGraph(randomised(network), image(size, channels))


def difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    values, expected = values.detach(), expected.detach()
    return float((values - expected).norm() / (expected.norm() + 1e-30))


def spans(size: int) -> list[tuple[int, int]]:
    """Spans at both ends, in the middle, of one pixel, of all but the border, and of everything."""
    third = max(1, size // 3)
    within = (1, size - 1) if size > 2 else (0, 1)
    return [(0, third), (size - third, size), (third, third + 1), within, (0, size)]


def check_boxes(network: nn.Module, graph: NetworkGraph, size: int, groups, channels: int = 3):
    """Compare each group of boxes of the output, and its gradient, from a plan and the network."""
    x = torch.cat([image(size, channels), 0.5 * image(size, channels).flip(2)])
    for boxes in groups:
        plan = graph.plan(boxes)
        gradients = []
        for cropped in (False, True):
            point = x.clone().requires_grad_()
            if cropped:
                maps = graph.run(point, plan)
            else:
                y = network(point)
                maps = [y[slices_of((None,) * y.ndim, box)] for box in plan.boxes]
            weights = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view(part.shape)
                       for part in maps]  # fmt: skip
            total = sum((w * part * part).sum() for w, part in zip(weights, maps, strict=True))
            gradients.append((maps, torch.autograd.grad(total, point)[0]))
        (expected, gradient), (maps_of_plan, gradient_of_plan) = gradients
        for box in boxes:
            assert any(contains(part, trimmed(box, graph.output_shape))
                       for part in plan.boxes)  # fmt: skip
        for part, expected_part in zip(maps_of_plan, expected, strict=True):
            assert part.shape == expected_part.shape and difference(part, expected_part) < EXACT
        assert difference(gradient_of_plan, gradient) < EXACT


def check_everywhere(network: nn.Module, size: int = SIZE, channels: int = 3) -> NetworkGraph:
    """Check the whole output, boxes at corners, edges and inside, and several boxes at once."""
    graph = graph_of(network, size, channels)
    *_, height, width = graph.output_shape
    single = [[(None, None, rows, columns)]
              for rows, columns in zip(spans(height), spans(width)[1:] + spans(width)[:1],
                                       strict=True)]  # fmt: skip
    check_boxes(network, graph, size, [*single, [single[0][0], single[1][0], single[2][0]]],
                channels)  # fmt: skip
    return graph


# ------------------------------------------------------------------ rules, in closed form


def up(**options):
    return lambda net, x: F.interpolate(x, **options)


# An operation, a span of rows of its result, and the span of its 16 input rows that it needs.
NEEDED = [
    (nn.Conv2d(3, 2, 3, padding=1), (5, 7), (4, 8)),
    (nn.Conv2d(3, 2, 3, padding=1), (0, 2), (0, 3)),
    (nn.Conv2d(3, 2, 3, padding=1), (14, 16), (13, 16)),
    (nn.Conv2d(3, 2, 3), (0, 2), (0, 4)),
    (nn.Conv2d(3, 2, 5, stride=2, padding=2), (2, 4), (2, 9)),
    (nn.Conv2d(3, 3, 3, padding=2, dilation=2, groups=3), (5, 6), (3, 8)),
    (nn.Conv2d(3, 2, (2, 3), padding='same'), (5, 6), (5, 7)),
    (nn.Conv2d(3, 2, 1), (5, 6), (5, 6)),
    (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 2, 3, stride=2)), (2, 4), (4, 9)),
    (nn.ConvTranspose2d(3, 2, 2, stride=2), (4, 7), (2, 4)),
    (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (4, 6), (2, 4)),
    (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (31, 32), (15, 16)),
    (nn.ConvTranspose2d(3, 2, 3), (0, 2), (0, 2)),
    (nn.MaxPool2d(3, stride=2, padding=1), (1, 3), (1, 6)),
    (nn.MaxPool2d(3, stride=2, padding=1), (0, 1), (0, 2)),
    (nn.MaxPool2d(3, stride=2, ceil_mode=True), (7, 8), (14, 16)),
    (nn.AvgPool2d(2), (3, 5), (6, 10)),
    (nn.AvgPool2d(3, stride=1, padding=1), (0, 1), (0, 2)),
    (nn.AvgPool2d(3, stride=2, ceil_mode=True), (2, 3), None),
    (nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), (5, 6), (4, 7)),
    (nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), (0, 1), None),
    (nn.UpsamplingNearest2d(scale_factor=2), (5, 8), (2, 4)),
    (Formula(up(size=(40, 40), mode='nearest')), (5, 8), (2, 3)),
    (Formula(up(scale_factor=2, mode='bilinear')), (4, 6), (1, 4)),
    (Formula(up(scale_factor=2, mode='bilinear')), (0, 1), (0, 1)),
    (Formula(up(size=(31, 31), mode='bilinear', align_corners=True)), (4, 6), (2, 4)),
    (Formula(up(size=(31, 31), mode='bilinear', align_corners=True)), (30, 31), (15, 16)),
    (Formula(up(scale_factor=2, mode='bicubic')), (4, 6), None),
    (Formula(up(size=(8, 8), mode='bilinear', antialias=True)), (4, 6), None),
    (nn.PixelUnshuffle(2), (2, 3), (4, 6)),
    (nn.BatchNorm2d(3), (5, 6), (5, 6)),
    (nn.SiLU(), (5, 6), (5, 6)),
    (nn.PReLU(3), (5, 6), (5, 6)),
    (nn.Softmax(dim=1), (5, 6), (5, 6)),
    (nn.Softmax(dim=2), (5, 6), None),
    (nn.GroupNorm(3, 3), (5, 6), None),
    (nn.InstanceNorm2d(3), (5, 6), None),
    (nn.BatchNorm2d(3, track_running_stats=False), (5, 6), None),
    (nn.ReflectionPad2d(2), (6, 8), (4, 6)),
    (nn.ReflectionPad2d(2), (0, 1), (0, 3)),
    (nn.ReflectionPad2d(2), (19, 20), (13, 16)),
    (nn.ReplicationPad2d(2), (0, 3), (0, 1)),
    (nn.ConstantPad2d(2, 7.0), (0, 4), (0, 2)),
    (nn.ConstantPad2d(2, 7.0), (0, 2), None),
    (nn.ZeroPad2d(-3), (0, 2), (3, 5)),
    (nn.CircularPad2d(2), (6, 8), None),
    (Formula(lambda net, x: x[:, :, 4::3] * 2), (1, 3), (7, 11)),
    (Formula(lambda net, x: x.flip(2)), (1, 3), None),
    (Formula(lambda net, x: x.roll(2, 2)), (1, 3), None),
    (Formula(lambda net, x: x.transpose(2, 3).transpose(2, 3)), (1, 3), (1, 3)),
    (Formula(lambda net, x: torch.fft.fft2(x).abs()), (1, 3), None),
]  # fmt: skip


@pytest.mark.parametrize('network, span, expected', NEEDED)
def test_what_an_operation_needs(network, span, expected):
    """expected: rows; None: all of them."""
    graph = graph_of(network).graph
    source, needed = graph.output, (None, None, span, span)
    while source is not graph.image:
        needs = part_of(source, needed).needs
        source, needed = next(pair for pair in needs if pair[0] not in graph.constants)
    assert needed[2] == expected


# ------------------------------------------------------------------ rules, cropped against full

CHANNELS = nn.Conv2d(3, 4, 3, padding=1)
NETWORKS = {
    'asymmetric kernel': nn.Conv2d(3, 2, (2, 5), padding=(1, 2), dilation=(3, 1)),
    'more padding than kernel': nn.Conv2d(3, 2, 3, padding=4),
    'stride 3': nn.Conv2d(3, 2, 3, stride=3, padding=1, bias=False),
    'kernel 4, same': nn.Conv2d(3, 3, 4, padding='same', groups=3),
    'reflecting convolution': nn.Conv2d(3, 2, 3, padding=1, padding_mode='reflect'),
    'circular convolution': nn.Conv2d(3, 2, 3, padding=1, padding_mode='circular'),
    'one-sided padding, stride 2': nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)),
    'padding that others read too': Formula(
        lambda net, x: net.conv(p := F.pad(x, (1, 1, 1, 1))) + p[:, :1, 1:-1, 1:-1],
        conv=nn.Conv2d(3, 2, 3)),
    'ones around': nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(3, 2, 3)),
    'transposed, gaps': nn.ConvTranspose2d(3, 2, 2, stride=3),
    'transposed, dilated': nn.ConvTranspose2d(3, 2, 3, stride=2, dilation=2, padding=1),
    'transposed, far side': nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1),
    'transposed, groups': nn.Sequential(
        CHANNELS, nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=2), nn.BatchNorm2d(4)),
    'max pool, ceil': nn.MaxPool2d(3, stride=2, ceil_mode=True),
    'max pool, dilated': nn.MaxPool2d(2, stride=1, padding=1, dilation=2),
    'average pool': nn.AvgPool2d(3, stride=2, padding=1),
    'average pool of what counts': nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    'average pool, ceil': nn.AvgPool2d(3, stride=2, ceil_mode=True),
    'nearest, factor 1.5': Formula(up(scale_factor=1.5)),
    'nearest, down': Formula(up(scale_factor=0.5)),
    'nearest exact': Formula(up(size=(23, 30), mode='nearest-exact')),
    'bilinear by size': Formula(up(size=(23, 30), mode='bilinear')),
    'bilinear by factor': Formula(up(scale_factor=(1.7, 2.3), mode='bilinear')),
    'bilinear, corners': Formula(up(scale_factor=4, mode='bilinear', align_corners=True)),
    'bilinear, down': Formula(up(size=(5, 7), mode='bilinear')),
    'bilinear from a pixel': Formula(
        lambda net, x: x + F.interpolate(x.mean((2, 3), keepdim=True), x.shape[2:],
                                         mode='bilinear')),
    'bicubic': Formula(up(scale_factor=2, mode='bicubic')),
    'shuffles': nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, padding=1), nn.PixelShuffle(2)),
    'squeeze and excitation': Formula(
        lambda net, x: (y := net.conv(x)) * net.gate(F.adaptive_avg_pool2d(y, 1)).sigmoid(),
        conv=nn.Conv2d(3, 4, 3, padding=1), gate=nn.Conv2d(4, 4, 1)),
    'broadcast along one side': Formula(
        lambda net, x: net.conv(x * x.mean(2, keepdim=True) + x.amax(3, keepdim=True)),
        conv=nn.Conv2d(3, 2, 3)),
    'a constant map': Formula(
        lambda net, x: x * torch.arange(16, dtype=x.dtype) + net.bias,
        bias=nn.Parameter(torch.randn(3, 16, 1))),
    'layer norm over channels': Formula(
        lambda net, x: net.norm(net.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        conv=nn.Conv2d(3, 4, 3, padding=1), norm=nn.LayerNorm(4)),
    'linear over channels': Formula(
        lambda net, x: net.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), mix=nn.Linear(3, 2)),
    'stacked and summed': Formula(
        lambda net, x: (s := torch.stack([x, net.conv(x)], dim=-1)).softmax(-1).mul(s).sum(-1),
        conv=nn.Conv2d(3, 3, 3, padding=1)),
    'parts of channels': Formula(
        lambda net, x: torch.cat([(p := net.conv(x).chunk(2, 1))[1], p[0] * 2, x], dim=1),
        conv=nn.Conv2d(3, 4, 3, padding=1)),
    'joined side by side': Formula(
        lambda net, x: net.conv(torch.cat([x, 2 * x, x[:, :, :, :3]], dim=3)),
        conv=nn.Conv2d(3, 2, 3, padding=1)),
    'expanded': Formula(
        lambda net, x: torch.cat([x, x[:, :, :1].expand(-1, -1, 16, -1)], dim=1)),
    'squeezed': Formula(
        lambda net, x: net.conv(x)[:, :, None].squeeze(2).unsqueeze(1).squeeze(1),
        conv=nn.Conv2d(3, 2, 3)),
    'attention': Formula(
        lambda net, x: x + ((f := x.flatten(2)) @ f.transpose(1, 2)).softmax(-1).matmul(f).view(
            x.shape)),
    'written in place': Formula(
        lambda net, x: F.relu((y := net.conv(x)).add_(1), inplace=True) + y,
        conv=nn.Conv2d(3, 2, 3)),
    'slices written in place': Formula(
        lambda net, x: written_in_slices(net.conv(x)), conv=nn.Conv2d(3, 2, 3)),
    'one convolution twice': Formula(
        lambda net, x: net.norm(net.conv(net.norm(net.conv(x)))),
        conv=nn.Conv2d(3, 3, 3), norm=nn.BatchNorm2d(3)),
    'weights that are computed': Formula(
        lambda net, x: F.conv2d(x, torch.stack([net.weight.tanh()] * 2), padding=1),
        weight=nn.Parameter(torch.randn(3, 3, 3))),
}  # fmt: skip


def written_in_slices(y):
    y[:, :, 2:5] *= 3
    y[:, 1] = y[:, 0] + 1
    return y


@pytest.mark.parametrize('name', NETWORKS)
def test_boxes_are_those_of_the_whole(name):
    check_everywhere(NETWORKS[name])


def test_a_bad_box_would_be_noticed(monkeypatch):
    """The error: zero padding at the ends of a crop, and not of the map."""
    monkeypatch.setattr(crops, '_read', lambda span, size, window: (span, window.pads))
    with pytest.raises(AssertionError):
        check_everywhere(nn.Conv2d(3, 2, 3, padding=1))


# ------------------------------------------------------------------ rewrites


def conv_norm(**layers):
    return {'conv': nn.Conv2d(3, 3, 3, padding=1), 'other': nn.Conv2d(3, 3, 3, padding=1),
            'norm': nn.BatchNorm2d(3), **layers}  # fmt: skip


@pytest.mark.parametrize(
    'folded, formula',
    [
        (1, lambda net, x: net.norm(net.conv(x))),
        (1, lambda net, x: net.norm(y) if (y := net.conv(x)).shape[-1] == 16 else y),
        (2, lambda net, x: net.norm(net.conv(net.norm(net.conv(x))))),
        (2, lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x))),
        (0, lambda net, x: net.norm(y := net.conv(x)) + y),
        (0, lambda net, x: net.norm(y := net.conv(x)) * y.mean()),
        (0, lambda net, x: torch.cat([net.norm(y := net.conv(x)), y], dim=1)),
        (0, lambda net, x: net.norm(F.relu(net.conv(x)))),
        (0, lambda net, x: net.conv(net.norm(x))),
        (0, lambda net, x: net.norm(net.conv(x).mul_(2))),
    ],
)
def test_a_batch_norm_is_folded_where_it_alone_reads_a_convolution(folded, formula):
    network = Formula(formula, **conv_norm())
    graph = check_everywhere(network)
    assert graph.rewrites.folded == folded
    assert all(operation.kind != 'batch_norm' for operation in graph.graph.operations)


@pytest.mark.parametrize('options', [{'affine': False}, {'eps': 0.1}])
def test_kinds_of_batch_norm(options):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options))
    assert check_everywhere(network).rewrites.folded == 1


def test_folding_asks_no_device_for_double_precision():
    class WithoutDouble(torch.Tensor):
        def double(self):
            raise TypeError('no float64 here')

        def cpu(self):
            return super().cpu().as_subclass(torch.Tensor)

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    x = torch.randn(1, 3, 8, 8)
    graph = trace(network, x)
    graph.constants = {o: v.as_subclass(WithoutDouble) for o, v in graph.constants.items()}
    assert fold_batch_norms(graph) == 1


@pytest.mark.parametrize('kernel, groups, stride', [(1, 1, 1), (3, 1, 1), ((2, 5), 2, 1),
                                                    (3, 4, 1), (3, 1, 2)])  # fmt: skip
def test_a_gradient_as_a_forward_convolution(kernel, groups, stride):
    network = nn.Conv2d(4, 8, kernel, stride, padding=2, groups=groups)
    graph = check_everywhere(network, channels=4)
    assert graph.rewrites.transposed == (stride == 1)


@pytest.mark.parametrize('dtype, close', [(None, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Conv2d(8, 8, 5, groups=8),
        nn.Conv2d(8, 8, 3, 2, groups=8),
        nn.Conv2d(8, 4, 1),
    ],
)
def test_packed_weights_compute_the_same(layer, dtype, close):
    layer = layer.eval().requires_grad_(False)
    graph = NetworkGraph(layer, torch.randn(1, 8, 16, 16))
    plans = [graph.whole, graph.plan([(None, None, (1, 4), (0, 5))])]
    for count, plan in product((1, 2, 3, 4, 1), plans):
        x = torch.randn(count, 8, 16, 16).requires_grad_()
        (box,), (result,) = plan.boxes, graph.run(x, plan, dtype)
        expected = layer(x)[(..., *(slice(*(span or (None,))) for span in box[2:]))]
        sums = [y.float().square().sum() for y in (result, expected)]
        gradients = [torch.autograd.grad(value, x)[0] for value in sums]
        assert difference(result.detach().float(), expected.detach()) < close
        assert difference(*gradients) < close
    constants = graph._constants_in(dtype).values()
    kernels = [constant for constant in constants if isinstance(constant, Kernel)]
    assert all(1 <= len(kernel.packed) <= 2 for kernel in kernels)


def test_squeeze_and_excitation_is_a_product_of_matrices():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2, 1), nn.SiLU())
    graph = check_everywhere(network)
    assert [o.kind for o in graph.graph.operations if o.target] == [
        'pixel_mean', 'pixel_linear', 'silu'
    ]  # fmt: skip


def test_flipped_weights_in_closed_form():
    weight = torch.arange(12.0).view(2, 2, 1, 3)
    assert flipped(weight, 1)[0, 1].tolist() == [[8, 7, 6]]  # from output 1 to input 0
    assert flipped(weight, 2).shape == (4, 1, 1, 3)


def test_padding_becomes_that_of_the_convolution():
    network = NETWORKS['one-sided padding, stride 2']
    graph = graph_of(network)
    assert graph.rewrites.padded == 1
    (convolution,) = [o for o in graph.graph.operations if o.kind == 'conv2d']
    assert convolution.arguments['sliding'].pads == ((0, 1), (0, 1))
    assert graph_of(NETWORKS['padding that others read too']).rewrites.padded == 0


# ------------------------------------------------------------------ what has no graph


def in_two_modes(net, x):
    with torch.no_grad():
        scale = net.conv(x).mean()
    return net.conv(x) * scale


@pytest.mark.parametrize('formula', [
    lambda net, x: net.conv(x) if x.sum() > 0 else x,
    in_two_modes,
    lambda net, x: net.count.add_(1) * net.conv(x),
    lambda net, x: [net.conv(x), x],
    lambda net, x: net.conv(x.mul_(2)),
    lambda net, x: net.conv(x[torch.randperm(int(x.argmax()))]),
])  # fmt: skip
def test_what_cannot_be_exported_says_so(formula, capsys):
    network = Formula(formula, conv=nn.Conv2d(3, 2, 3))
    network.register_buffer('count', torch.zeros(1))
    with pytest.raises(NotExportable) as error:
        NetworkGraph(network.eval().requires_grad_(False), torch.randn(1, 3, 8, 8))
    assert str(error.value) and '\n' not in str(error.value)
    assert not capsys.readouterr().err


# ------------------------------------------------------------------ boxes


def test_distant_boxes_stay_apart_and_near_ones_become_one():
    shape = (None, 4, 200, 200)
    near = [(None, None, (0, 20), (0, 20)), (None, None, (22, 40), (3, 20))]
    assert merged(near, shape) == [(None, None, (0, 40), (0, 20))]
    far = [(None, None, (0, 20), (0, 20)), (None, None, (150, 200), (150, 200))]
    assert merged(far, shape) == sorted(far, key=repr)
    everything = (None, None, None, None)
    assert merged([*far, everything], shape) == [everything]


def test_a_span_over_all_of_an_axis_is_all_of_it():
    assert trimmed(((0, 1), (0, 4), (-3, 200), (5, 300)), (None, 4, 200, 200)) == (
        None, None, None, (5, 200),
    )  # fmt: skip


# ------------------------------------------------------------------ random graphs

LAYERS = {
    'conv': lambda c, k, s, d: nn.Conv2d(c, c, k, s, padding=d * (k // 2), dilation=d),
    'pad': lambda c, k, s, d: nn.Sequential(nn.ZeroPad2d((0, k, d, 0)), nn.Conv2d(c, c, k, s)),
    'depthwise': lambda c, k, s, d: nn.Conv2d(c, c, k, s, padding=1, groups=c),
    'up': lambda c, k, s, d: nn.ConvTranspose2d(c, c, k, s, padding=(k - 1) // 2),
    'nearest': lambda c, k, s, d: nn.UpsamplingNearest2d(scale_factor=s),
    'bilinear': lambda c, k, s, d: nn.Upsample(scale_factor=1 + k / 4, mode='bilinear',
                                               align_corners=d == 1),
    'max': lambda c, k, s, d: nn.MaxPool2d(k, s, padding=k // 2, ceil_mode=d == 2),
    'mean': lambda c, k, s, d: nn.AvgPool2d(k, s, padding=k // 2, count_include_pad=d == 1),
    'norm': lambda c, k, s, d: nn.Sequential(nn.BatchNorm2d(c), nn.SiLU()),
    'reflect': lambda c, k, s, d: nn.ReflectionPad2d((d, 0, 1, k - 1)),
    'group': lambda c, k, s, d: nn.GroupNorm(1, c),
}  # fmt: skip
LAYER = st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(1, 3), st.integers(1, 2),
                  st.integers(1, 2), st.integers(0, 3))  # fmt: skip


class RandomNetwork(nn.Module):
    """Layers one after the other; some results are joined with an earlier result, cut to fit."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[kind](3, *sizes) for kind, *sizes, _ in layers)
        self.joins = [back for *_, back in layers]

    def forward(self, x):
        results = [x]
        for layer, back in zip(self.layers, self.joins, strict=True):
            y = layer(results[-1])
            other = results[max(0, len(results) - back)] if back else None
            if other is not None:
                height = min(y.shape[2], other.shape[2])
                width = min(y.shape[3], other.shape[3])
                y, other = y[..., :height, :width], other[..., -height:, :width]
                y = torch.cat([y[:, :1], other[:, 1:]], dim=1) if back == 1 else y + 0.5 * other
            results.append(y)
        return results[-1]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck),
          derandomize=True)  # fmt: skip
@given(st.lists(LAYER, min_size=2, max_size=6), st.tuples(*[st.floats(0, 1)] * 8))
def test_random_graphs_give_the_same_cropped_as_in_full(layers, places):
    torch.manual_seed(0)
    network = randomised(RandomNetwork(layers))
    x = image(12)
    try:
        shape = network(x).shape
    except RuntimeError:  # nothing is left of the map
        assume(False)
    graph = NetworkGraph(network, x)
    boxes = []
    for part in (places[:4], places[4:]):
        ends = [sorted(int(place * (size - 1)) for place in part[2 * axis : 2 * axis + 2])
                for axis, size in enumerate(shape[2:])]  # fmt: skip
        boxes.append((None, None, *((low, high + 1) for low, high in ends)))
    check_boxes(network, graph, 12, [boxes[:1], boxes])


# ------------------------------------------------------------------ real networks


ARCHITECTURES = ('unet', 'unetplusplus', 'manet', 'linknet', 'fpn', 'pspnet', 'deeplabv3',
                 'deeplabv3plus', 'pan', 'upernet', 'segformer')  # fmt: skip
QUICK = {  # of all pairs of an architecture and an encoder
    ('unetplusplus', 'efficientnet-b0'), ('unet', 'tu-convnext_atto'), ('fpn', 'mobilenet_v2'),
    ('deeplabv3plus', 'tu-tf_efficientnet_lite0'), ('linknet', 'resnet18'), ('manet', 'resnet18'),
    ('pspnet', 'vgg11'), ('upernet', 'resnet18'), ('segformer', 'mit_b0'), ('pan', 'resnet18'),
}  # fmt: skip
PAIRS = QUICK | {*product(ARCHITECTURES, ('resnet18', 'efficientnet-b0', 'mobilenet_v2')),
                 *product(['dpt'], ('tu-vit_tiny_patch16_224', 'tu-deit_tiny_patch16_224',
                                    'tu-vit_small_patch32_224'))}  # fmt: skip


@pytest.mark.parametrize(
    'architecture, encoder',
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.long)
     for pair in sorted(PAIRS)],
)  # fmt: skip
def test_real_networks_agree_to_rounding(architecture, encoder):
    torch.manual_seed(0)
    size = {'pan': 128, 'dpt': 224}.get(architecture, 64)
    network = randomised(create_model(architecture, encoder, 1))
    graph = NetworkGraph(network, image(size))
    boxes = [
        [(None, None, (0, 7), (size - 9, size))],
        [(None, None, (size // 2, size // 2 + 1), (20, 21))],
        [(None, None, None, None)],
        [(None, None, (0, 4), (0, 4)), (None, None, (size - 4, size), (size - 4, size))],
    ]
    check_boxes(network, graph, size, boxes)


@pytest.mark.parametrize('name', ['deeplabv3_mobilenet_v3_large', 'fcn_resnet50'])
def test_networks_of_torchvision(name):
    segmentation = pytest.importorskip('torchvision').models.segmentation
    torch.manual_seed(0)
    built = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=2)
    network = randomised(Formula(lambda net, x: net.built(x)['out'], built=built))
    graph = NetworkGraph(network, image(64))
    check_boxes(network, graph, 64, [[(None, None, (0, 9), (30, 64))], [(None,) * 4]])


def operations_of(run, x: torch.Tensor) -> int:
    """Floating-point operations of a forward and a backward pass."""

    def of_packed(x, weight, *_, out_shape, **__):
        return 2 * x[0] * math.prod(out_shape[2:]) * math.prod(weight)

    packed = torch.ops.mkldnn._convolution_pointwise
    with FlopCounterMode(display=False, custom_mapping={packed: of_packed}) as counter:
        point = x.clone().requires_grad_()
        run(point).sum().backward()
    return counter.get_total_flops()


def test_a_small_box_of_the_reference_architecture_is_two_fifths_of_the_work():
    torch.manual_seed(0)
    network = create_model('unetplusplus', 'efficientnet-b5', 1).eval().requires_grad_(False)
    x = torch.randn(1, 3, 256, 256)
    graph = NetworkGraph(network, x)
    whole = operations_of(network, x)
    assert operations_of(graph, x) == pytest.approx(whole, rel=0.01)
    side = round((0.02 * 256 * 256) ** 0.5)
    plan = graph.plan([(None, None, (110, 110 + side), (90, 90 + side))])
    cropped = operations_of(lambda point: graph.run(point, plan)[0], x)
    assert cropped <= 0.4 * whole
    assert plan.flops / graph.whole.flops == pytest.approx(cropped / whole, abs=0.02)
