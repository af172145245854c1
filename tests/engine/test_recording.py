"""A network is recorded on meta tensors. What cannot be recorded is exported, or runs as it is."""

import pytest
import torch
import torch.nn.functional as F
from helpers import prepared_copy
from torch import nn

from igseg.engine import graph as graphs
from igseg.engine import trace as tracing
from igseg.engine.graph import NetworkGraph
from igseg.engine.preparation import measure_deviation, prepared_network
from igseg.engine.trace import NotExportable, export, record, trace
from igseg.errors import InputError

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Formula(nn.Module):
    """A convolution, and a formula that uses it."""

    def __init__(self, formula) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.formula = nn.Conv2d(3, 3, 3, padding=1), formula
        self.register_buffer('calls', torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(self, x)


def network(formula) -> nn.Module:
    return Formula(formula).eval().requires_grad_(False)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def without_grad(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    with torch.no_grad():
        gate = y.sigmoid()
    return y * gate


def halved(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.conv(x)
    if y.requires_grad:  # as in code that watches gradients
        y.register_hook(lambda gradient: gradient / 2)
    return y


def reduced(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast('cpu', dtype=torch.bfloat16):
        return net.conv(x).float()


def cached(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(net, 'grid'):
        net.grid = torch.linspace(0, 1, x.shape[-1], device=x.device)
    return net.conv(x) * net.grid


def grid_without_grad(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        grid = torch.arange(x.shape[-1], device=x.device).float().sin()
    return net.conv(x) + grid


RECORDED = {
    'in place': lambda net, x: F.relu_(net.conv(x).mul_(2).add_(x)),
    'splits': lambda net, x: torch.cat([part * k for k, part in enumerate(net.conv(x).chunk(3, 1))],
                                       1),
    'largest values': lambda net, x: net.conv(x).max(dim=1, keepdim=True)[0] + x,
    'reshaped by the batch': lambda net, x: net.conv(x).view(len(x) * 3, -1).softmax(-1).view_as(x),
    'attention': lambda net, x: F.scaled_dot_product_attention(*3 * [net.conv(x)]),
    'products': lambda net, x: torch.einsum('nchw,nchv->nhwv', net.conv(x), x).transpose(1, 3),
    'a fixed grid': grid_without_grad,
    'numbers': lambda net, x: net.conv(x) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1),
    'the number of images': lambda net, x: net.conv(x) / len(x),
    'a grid made on the first call': cached,
    'other types': lambda net, x: net.conv(x).double().exp().float(),
    'detached': lambda net, x: net.conv(x) + net.conv(x).detach(),
    'dropout that is off': lambda net, x: F.dropout2d(net.conv(x), 0.5, net.training),
    'sizes': lambda net, x: F.interpolate(net.conv(x)[..., ::2, ::2], size=x.shape[-2:]),
    'a part for training': lambda net, x: net.conv(x if not net.training else x + 1),
}  # fmt: skip
NOT_RECORDED = {
    'no_grad': without_grad,
    'own backward': lambda net, x: Doubled.apply(net.conv(x)),
    'autocast': reduced,
    'a branch on values': lambda net, x: net.conv(x) if x.sum() > 1e9 else net.conv(2 * x),
    'a number read': lambda net, x: net.conv(x) * (1 + x.mean().item()),
    'numpy': lambda net, x: net.conv(x) * float(x.detach().numpy().max()),
    'dropout that is on': lambda net, x: F.dropout(net.conv(x), 0.5, True),
    'random numbers': lambda net, x: net.conv(x) + torch.rand(3, 1, 1),
    'a buffer that changes': lambda net, x: net.conv(x) * net.calls.add_(1),
    'the input changes': lambda net, x: net.conv(x.mul_(2)),
    'a view changes': lambda net, x: net.conv(x)[:, :1].mul_(2) + x,
    'the batch decides': lambda net, x: net.conv(x) if len(x) < 4 else net.conv(2 * x),
    'the inverse of the batch': lambda net, x: net.conv(x) * (1 / len(x)),
    'nothing of the image': lambda net, x: net.conv.weight[None, 0],
}


@pytest.mark.parametrize('kind', RECORDED)
def test_what_is_recorded_is_the_network(kind):
    net = network(RECORDED[kind])
    graph = NetworkGraph(net, X)
    assert graph.graph.not_recorded is None
    assert not hasattr(net, 'grid')
    for count in (1, 2, 4, 7):
        assert max(measure_deviation(net, graph, torch.cat([X * k for k in range(count)]))) < 1e-5


@pytest.mark.parametrize('kind', NOT_RECORDED)
def test_what_cannot_be_recorded_is_refused(kind):
    with pytest.raises(NotExportable) as error:
        record(network(NOT_RECORDED[kind]), X)
    assert str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['no_grad', 'own backward'])
def test_what_an_export_would_lose_is_not_exported(kind):
    with pytest.raises(NotExportable, match=r'no_grad.*autograd\.Function'):
        trace(network(NOT_RECORDED[kind]), X)
    net = network(NOT_RECORDED[kind])
    prepared, preparation = prepared_copy(net, X)
    assert 'autograd.Function' in preparation.no_graph and not preparation.fell_back
    assert max(measure_deviation(net, prepared, X)) < 1e-5


@pytest.mark.parametrize('kind', ['a view changes', 'in place', 'detached', 'attention'])
def test_the_second_way_is_an_export(kind, monkeypatch):
    net = network({**RECORDED, **NOT_RECORDED}[kind])
    monkeypatch.setattr(graphs, 'trace', export)
    graph = NetworkGraph(net, X)
    assert max(measure_deviation(net, graph, torch.cat([X, 2 * X]))) < 1e-5


def test_a_graph_says_why_it_was_exported():
    assert 'in place' in trace(network(NOT_RECORDED['a view changes']), X).not_recorded


def test_a_hook_on_a_gradient_is_seen_in_the_comparison():
    prepared, preparation = prepared_copy(network(halved), X)
    assert preparation.fell_back and preparation.gradient_deviation == pytest.approx(1)
    hooked = network(lambda net, x: net.conv(x))
    hooked.conv.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,))
    prepared, preparation = prepared_copy(hooked, X)
    assert preparation.fell_back or preparation.no_graph
    assert max(measure_deviation(hooked, prepared, X)) < 1e-5


def test_network_and_random_state_stay_as_they_were():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state, attributes = torch.get_rng_state(), [dict(vars(module)) for module in net.modules()]
    record(net, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [vars(module) for module in net.modules()] == attributes
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_network_is_recorded_three_times_and_never_exported(monkeypatch):
    counts, recording = [], tracing._recording

    def counted(net, example, count):
        counts.append(count)
        return recording(net, example, count)

    monkeypatch.setattr(tracing, '_recording', counted)
    monkeypatch.setattr(tracing, 'export', None)
    prepared_copy(network(RECORDED['in place']), X)
    assert counts[:3] == [2, 3, 5] and counts[3:] == [2]


# ------------------------------------------------------------------ what small images do not show


def large(x):
    return x.shape[-1] > 100


def hooked_where_large(net, x):
    y = net.conv(x)
    if large(x) and y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.1)
    return y.relu()


def normed_where_large(net, x):
    y = net.conv(x)
    return F.batch_norm(y, None, None, training=True) if large(x) else y


def test_what_happens_to_large_gradients_only_is_compared_at_full_size():
    x = torch.randn(1, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    by_code = network(hooked_where_large)
    by_module = network(lambda net, x: net.conv(x))
    by_module.conv.register_full_backward_hook(
        lambda module, grads, _: (grads[0] * 0.1,) if large(grads[0]) else None
    )
    for net in (by_code, by_module):
        prepared, preparation = prepared_copy(net, x)
        assert preparation.fell_back and preparation.gradient_deviation > 0.5
        assert max(measure_deviation(net, prepared, x)) < 1e-5


def test_another_way_of_large_images_is_compared_at_full_size():
    x = torch.randn(1, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    assert prepared_network(network(normed_where_large), x).in_part is None
    in_part = prepared_network(network(normed_where_large), x[..., :80, :80]).in_part
    assert in_part.same and in_part.independent


@pytest.mark.parametrize('start', [0, 1])
def test_a_network_that_alternates_is_refused(start):
    def alternating(net, x):
        net.count += 1
        return net.conv(x) * (1 + net.count % 2)

    net = network(alternating)
    net.count = start
    with pytest.raises(InputError, match='another answer each time'):
        prepared_copy(net, X)
