"""Values that are not finite are found at once on a CPU, and once per round on a GPU. Here a CPU
takes the part of the GPU."""

import re

import numpy as np
import pytest
import torch
from helpers import relative_error
from torch import nn

from igseg.engine.engine import Crops, FiniteFlags, GradientEngine
from igseg.engine.sampler import AtImage, PathSampler
from igseg.errors import NonFiniteError
from igseg.method.paths import StraightPath
from igseg.network.score import Target
from integrated_gradients import IntegratedGradients

CPU = torch.device('cpu')
X = torch.ones(1, 3, 16, 16)


class Breaking(nn.Module):
    """From the middle of the path on, its logits are not finite, or only its gradients."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.head = what, nn.Conv2d(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        beyond = x.mean(dim=(1, 2, 3), keepdim=True) - 0.5
        if self.what == 'logits':
            return self.head(x) + (-beyond).log()
        root = (-beyond).sqrt()  # beyond the middle NaN, and not used, but its gradient is 0 * NaN
        return self.head(x) + torch.where(beyond < 0, root, 0.0)


@pytest.fixture(params=[False, True], ids=['at once', 'once a round'])
def waits(request, monkeypatch) -> bool:
    monkeypatch.setattr(GradientEngine, 'waits', property(lambda engine: request.param))
    return request.param


def sampler_of(network: nn.Module, batch: int) -> PathSampler:
    engine = GradientEngine(network.eval(), CPU, batch)
    engine.network = network
    target = Target('image', torch.full((1, 16, 16), 1 / 256))
    at_image = AtImage(X, torch.zeros(1, 1, 16, 16), (target,), None, Crops((target,)))
    path = StraightPath(torch.zeros_like(X), X.clone())
    return PathSampler(engine, path, at_image, lambda logits: torch.zeros(len(logits)))


@pytest.mark.parametrize('batch', [1, 2, 3])
@pytest.mark.parametrize('what', ['logits', 'gradients'])
def test_the_first_node_that_is_not_finite_is_named(waits, what, batch):
    densities = []
    with pytest.raises(NonFiniteError) as error:
        for density in sampler_of(Breaking(what), batch)(np.array([0.1, 0.3, 0.6, 0.8, 0.9])):
            densities.append(density)
    assert str(error.value).startswith(
        f'the {what} are not finite at alpha = 0.6 between baseline and image'
    )
    assert len(densities) < 5  # not all densities of the round were yielded


def test_a_round_of_many_step_batches_is_asked_once(monkeypatch, waits):
    checks = []
    check = FiniteFlags.check
    monkeypatch.setattr(FiniteFlags, 'check', lambda flags: [checks.append(1), check(flags)][1])
    sampler = sampler_of(nn.Conv2d(3, 1, 1), 2)
    densities = list(sampler(np.linspace(0.1, 0.9, 12)))
    assert len(densities) == 12 and len(checks) == (1 if waits else 12)  # two for each of six


@pytest.mark.parametrize('rule, tolerance', [('midpoint', None), ('midpoint', 0.1),
                                             ('trapezoid', 0.1), ('adaptive', 0.1)])  # fmt: skip
def test_no_map_is_made_of_what_is_not_finite(waits, rule, tolerance):
    ig = IntegratedGradients(Breaking('gradients').eval(), 'cpu', step_batch=2)
    options = {'tolerance': tolerance, 'max_steps': 40} if tolerance else {'num_steps': 9}
    with pytest.raises(NonFiniteError, match='the gradients are not finite at alpha'):
        ig.explain(X, 'image', torch.zeros_like(X), rule=rule, **options)


def test_the_map_is_the_same_however_often_it_is_asked(monkeypatch, brain):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3)).eval()
    maps = []
    for waits in (False, True):
        monkeypatch.setattr(GradientEngine, 'waits', property(lambda engine, w=waits: w))
        ig = IntegratedGradients(network, 'cpu', step_batch=3)
        maps.append(ig.explain(brain, 'image', tolerance=0.02, max_steps=60, precision='bfloat16'))
    assert torch.equal(maps[0].attributions, maps[1].attributions)
    assert maps[0].trend == maps[1].trend and maps[0].map_error == maps[1].map_error
    assert maps[0].cost.precision_deviation == maps[1].cost.precision_deviation


class Overflowing(nn.Conv2d):
    """A convolution that overflows in float16."""

    def __init__(self) -> None:
        super().__init__(3, 1, 1)
        nn.init.constant_(self.weight, 3e4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1e-4


def test_overflow_in_reduced_precision_is_computed_again_in_float32(waits):
    ig = IntegratedGradients(Overflowing().eval(), 'cpu', step_batch=2)
    explanation = ig.explain(X, 'image', torch.zeros_like(X), num_steps=9, precision='float16')
    assert explanation.cost.precision == 'float32'
    assert re.search(
        r'float16 the (logits|gradients) are not finite at alpha', explanation.cost.retried
    )
    exact = ig.explain(X, 'image', torch.zeros_like(X), num_steps=9)
    assert relative_error(explanation.attributions, exact.attributions) == 0
