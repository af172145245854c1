"""Reduced precision is checked, chosen where it is faster, and not used where it overflows."""

import math
import re

import pytest
import torch
from helpers import relative_error
from torch import nn

from igseg.command_line import say_cost
from igseg.engine import preparation
from igseg.engine.preparation import slowdown
from integrated_gradients import InputError, IntegratedGradients, Settings, Target


def test_an_outer_autocast_does_not_matter(smooth_network, brain):
    engine = IntegratedGradients(smooth_network, 'cpu')
    expected = engine.compute_integrated_gradients(brain, num_steps=3, target='image')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        attributions = engine.compute_integrated_gradients(brain, num_steps=3, target='image')
    assert torch.equal(attributions, expected)


def test_double_precision_model_agrees_with_single(brain):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 1)).eval()
    single = IntegratedGradients(net, 'cpu').compute_integrated_gradients(brain, 'zero', 9, 'image')
    double = IntegratedGradients(net.double(), 'cpu').compute_integrated_gradients(
        brain, 'zero', 9, 'image'
    )
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert relative_error(single, double) < 1e-5


class Overflowing(nn.Module):
    """A linear network whose intermediate sum, for a white image, does not fit into float16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 1, 1, bias=False)
        nn.init.constant_(self.up.weight, 5e4)
        nn.init.constant_(self.down.weight, 1e-6)

    def forward(self, v):
        return self.down(self.up(v))


def test_overflow_in_reduced_precision_is_computed_again_in_float32():
    x = torch.ones(3, 32, 32)
    engine = IntegratedGradients(Overflowing(), 'cpu')
    explanation = engine.explain(x, 'image', torch.zeros_like(x), num_steps=9, precision='float16')
    assert explanation.cost.precision == 'float32' and explanation.cost.precision_deviation is None
    assert re.search(
        r'float16 the (logits|gradients) are not finite at alpha', explanation.cost.retried
    )
    assert explanation.completeness_gap < 1e-5
    exact = engine.explain(x, 'image', torch.zeros_like(x), num_steps=9)
    assert exact.cost.retried is None
    assert torch.equal(explanation.attributions, exact.attributions)


@pytest.fixture
def smooth_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3)).eval()


@pytest.mark.parametrize('rule', ['adaptive', 'midpoint'])
def test_reduced_precision_is_checked_against_float32(smooth_network, brain, rule):
    engine = IntegratedGradients(smooth_network, 'cpu', step_batch=3)
    options = {'target': 'image', 'num_steps': 11, 'rule': rule}
    exact = engine.explain(brain, **options)
    reduced = engine.explain(brain, precision='bfloat16', **options)
    assert exact.cost.precision == 'float32' and exact.cost.precision_deviation is None
    assert reduced.cost.precision == 'bfloat16'
    assert 1e-4 < reduced.cost.precision_deviation < 0.03
    assert 1e-4 < relative_error(reduced.attributions, exact.attributions) < 0.03
    assert reduced.map_error > exact.map_error
    assert reduced.gradient_evaluations == 13  # two nodes are also computed in float32
    assert reduced.attributions.dtype == torch.float32


def test_auto_takes_reduced_precision_where_it_is_fast_and_accurate(
    monkeypatch, smooth_network, brain
):
    engine = IntegratedGradients(smooth_network, 'cpu')

    def chosen(fast, **options):
        monkeypatch.setattr('igseg.engine.preparation.cpu_has_bfloat16', lambda: fast)
        return engine.explain(
            brain, 'image', num_steps=5, precision='auto', **options
        ).cost.precision

    assert chosen(True) == 'bfloat16'
    assert chosen(False) == 'float32'
    assert chosen(True, precision_tolerance=1e-5) == 'float32'
    assert chosen(True, tolerance=1e-3) == 'float32'  # the map is to be more exact than that


class Fourier(nn.Module):
    """A network with an operation that has no reduced precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(torch.fft.fft2(torch.complex(y, 0.5 * y)).real)


def test_auto_leaves_a_type_that_the_network_does_not_take(monkeypatch, brain):
    monkeypatch.setattr('igseg.engine.preparation.cpu_has_bfloat16', lambda: True)
    ig = IntegratedGradients(Fourier().eval(), 'cpu')
    chosen = ig.explain(brain, 'image', num_steps=5, precision='auto')
    exact = ig.explain(brain, 'image', num_steps=5)
    assert chosen.cost.precision == 'float32'
    assert relative_error(chosen.attributions, exact.attributions) < 1e-5
    with pytest.raises(InputError, match='precision bfloat16, which the network does not take'):
        ig.explain(brain, 'image', num_steps=5, precision='bfloat16')


def test_reduced_precision_of_a_gpu_follows_its_generation(monkeypatch):
    from igseg.engine.preparation import reduced_dtype

    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _, c=capability: c)
        assert reduced_dtype('auto', torch.device('cuda')) == dtype
    assert reduced_dtype('float16', torch.device('cuda')) == torch.float16
    assert reduced_dtype('auto', torch.device('mps')) is None


def test_float16_does_not_underflow(smooth_network, brain):
    """Weights of 1 / (size of the region) would become 0 in half precision in the backward pass."""
    engine = IntegratedGradients(smooth_network, 'cpu')
    exact = engine.explain(brain, 'image', num_steps=4)
    half = engine.explain(brain, 'image', num_steps=4, precision='float16')
    assert relative_error(half.attributions, exact.attributions) < 0.01


def test_a_target_whose_map_is_zero_leaves_the_others_error_known():
    """Its maps are zero both in float32 and in reduced precision, so they do not deviate."""
    x = torch.ones(1, 3, 8, 8)
    network = nn.Conv2d(3, 1, 1)
    none, whole = (Target('t', torch.full((1, 8, 8), weight)) for weight in (0.0, 1 / 64))
    explanations = IntegratedGradients(network, 'cpu').explain_targets(
        x, [none, whole], torch.zeros_like(x), 5, precision='bfloat16'
    )
    assert not explanations[0].attributions.any()
    assert all(math.isfinite(explanation.cost.precision_deviation) for explanation in explanations)
    assert explanations[1].map_error is not None


def test_a_precision_without_instructions_is_told_before_the_work(monkeypatch, capsys):
    settings = Settings(precision='bfloat16')
    for times, told in ((300.0, True), (0.5, False)):
        monkeypatch.setattr(preparation, 'slowdown', lambda precision, device, t=times: t)
        say_cost(settings, 'cpu')
        assert ('300 times as long' in capsys.readouterr().err) is told
    say_cost(Settings(), 'cpu')
    assert not capsys.readouterr().err


def test_a_convolution_is_timed_only_where_a_precision_is_named():
    cpu = torch.device('cpu')
    assert slowdown('auto', cpu) == slowdown('float32', cpu) == 1
    assert slowdown('bfloat16', torch.device('meta')) == 1
    assert 0 < slowdown('bfloat16', cpu) < math.inf
