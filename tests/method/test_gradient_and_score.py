"""Whether a network's gradient describes its score is measured with every map."""

import pytest
import torch
from torch import nn

from igseg.checks.verdict import accuracy_warning, verdict_of
from igseg.network.outputs import gradient_stops
from integrated_gradients import IntegratedGradients, Settings, explanation_statistics

X = nn.functional.interpolate(
    torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), (24, 24), mode='bicubic'
)


class Hidden(nn.Module):
    """A network whose hidden map, or whose result, is changed by a function."""

    def __init__(self, hidden=lambda y: y, result=lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.beside = nn.Conv2d(3, 1, 3, padding=1)  # a shallow branch that always has a gradient
        self.hidden, self.result = hidden, result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = self.last(self.hidden(3 * self.first(x)).relu())
        return self.result(4 * deep + 0.2 * self.beside(x))


@torch.no_grad()
def without_grad(y: torch.Tensor) -> torch.Tensor:
    return y * 1.0


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return torch.tanh(3 * y)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Exact(torch.autograd.Function):
    """The square, with its right gradient."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


WRONG = {  # and what is said of the cause
    'no_grad': (lambda: Hidden(without_grad), 'torch.no_grad'),
    'detach': (lambda: Hidden(lambda y: y.detach()), '.detach'),
    'data': (lambda: Hidden(lambda y: y.data), '.data'),
    'round': (lambda: Hidden(lambda y: (2 * y).round() / 2), 'torch.round'),
    'sign': (lambda: Hidden(torch.sign), 'torch.sign'),
    'floor': (lambda: Hidden(result=lambda y: (4 * y).floor() / 4), 'torch.floor'),
    'hard mask': (lambda: Hidden(lambda y: (y > 0.5).float() + 0 * y), 'torch.gt'),
    'straight through': (lambda: Hidden(StraightThrough.apply), 'autograd.Function'),
    'another gradient': (lambda: Hidden(lambda y: y + (y * y - y).detach()), '.detach'),
}
RIGHT = {
    'as it is': Hidden,
    'ReLU, steep': lambda: Hidden(lambda y: (20 * y).relu() - (20 * y - 3).relu()),
    'sigmoid, steep': lambda: Hidden(result=lambda y: 8 * torch.sigmoid(8 * y) - 4.1),
    'maximum': lambda: Hidden(lambda y: nn.functional.max_pool2d(y, 3, 1, 1)),
    'clamp': lambda: Hidden(lambda y: y.clamp(-0.5, 0.5)),
    'an autograd.Function with its right gradient': lambda: Hidden(Exact.apply),
    'a large constant': lambda: Hidden(result=lambda y: y + 300),
    'double precision': lambda: Hidden().double(),
    'detached numbers of no weight': lambda: Hidden(lambda y: y + 0.001 * y.detach()),
}


def explained(network: nn.Module, **options):
    settings = {'target': 'image', 'num_steps': 24, **options}
    ig = IntegratedGradients(network.eval(), 'cpu')
    explanation = ig.explain(X, **settings)
    statistics = explanation_statistics(explanation)
    record = Settings(**settings).record()
    return explanation, {**statistics, 'settings': record}


@pytest.mark.parametrize('kind', WRONG)
def test_a_gradient_that_is_not_that_of_the_score_is_a_finding(kind):
    build, cause = WRONG[kind]
    explanation, statistics = explained(build())
    assert explanation.gradient_deviation > 0.1
    assert cause in explanation.gradient_cause
    findings = {finding['flag']: finding['text'] for finding in verdict_of(statistics)}
    assert list(findings)[:2] == ['do not trust', 'wrong gradient']
    texts = ' '.join([*findings.values(), accuracy_warning(statistics)])
    assert cause in texts and 'use more steps' not in texts


OPTIONS = [{'score': 'probability'}, {'target': 'pixel:11,12'}, {'num_steps': 3},
           {'rule': 'gauss-legendre'}, {'tolerance': 0.02}]  # fmt: skip


@pytest.mark.parametrize(
    'kind, options', [*((kind, {}) for kind in RIGHT), *(('ReLU, steep', o) for o in OPTIONS)]
)
def test_a_gradient_that_describes_the_score_is_none(kind, options):
    explanation, statistics = explained(RIGHT[kind](), **options)
    assert explanation.gradient_deviation < 0.05
    assert 'wrong gradient' not in [finding['flag'] for finding in verdict_of(statistics)]


@pytest.mark.parametrize('method', ['guided', 'idgi', 'smooth', 'blur', 'input_x_gradient'])
def test_every_method_that_uses_gradients_tells_it(method):
    wrong, _ = explained(WRONG['detach'][0](), method=method, num_steps=8)
    right, _ = explained(Hidden(), method=method, num_steps=8)
    assert wrong.gradient_deviation > 0.1 > right.gradient_deviation


def test_occlusion_needs_no_gradient():
    explanation, _ = explained(WRONG['sign'][0](), method='occlusion')
    assert explanation.gradient_deviation is None and explanation.gradient_cause is None


def test_the_cause_is_named_in_a_network_that_writes_into_its_input():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = WRONG['sign'][0]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x -= 0.1
            return self.network(x)

    explanation, _ = explained(Writing())
    assert explanation.gradient_deviation > 0.1 and 'torch.sign' in explanation.gradient_cause


def test_a_map_is_made_though_the_network_is_not_finite_on_a_path_that_no_method_walks():
    black = torch.zeros_like(X)
    with torch.no_grad():
        start, end = (float(Hidden()(points).mean()) for points in (black, X))

    def finite_at_the_ends(y: torch.Tensor) -> torch.Tensor:
        share = (y.mean((1, 2, 3), keepdim=True) - start) / (end - start)
        return y + ((share - 0.02) * (share - 0.98)).sqrt()

    ig = IntegratedGradients(Hidden(result=finite_at_the_ends).eval(), 'cpu')
    explanation = ig.explain(X, 'image', baseline_type=black, method='input_x_gradient')
    assert explanation.gradient_deviation is None and explanation.attributions.isfinite().all()


def test_several_targets_are_told_apart():
    class TwoMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right, self.wrong = Hidden(), WRONG['sign'][0]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.right(x), self.wrong(x)], dim=1)

    ig = IntegratedGradients(TwoMaps().eval(), 'cpu')
    options = {'output_kind': 'multilabel', 'num_steps': 16, 'skip_empty': True, 'threshold': 0.4}
    right, wrong = ig.explain_targets(X, ['class:0', 'class:1'], **options)
    assert right.gradient_deviation < 0.05 < 0.1 < wrong.gradient_deviation


def test_what_stops_gradients_is_named_only_where_it_depends_on_the_image():
    def with_grid(y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            grid = torch.linspace(-1, 1, y.shape[-1]).round()
        return y + grid.detach()

    assert gradient_stops(Hidden(with_grid), X) == ''
    assert gradient_stops(Hidden(torch.sign), X) == 'torch.sign'
