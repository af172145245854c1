"""Every method: closed forms, promises, numbers of reference implementations, the command line."""

from __future__ import annotations

import importlib.util
import json
import shlex
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import (
    DEMO_DATA,
    DEMO_IMAGE,
    differences,
    integrate,
    noise_image,
    relative_error,
    save_image,
    tiny_model,
)
from torch import nn

import integrated_gradients
from igseg.analysis.image import ModelInput
from igseg.analysis.references import ReferenceImages
from igseg.checks.checks import evaluate
from igseg.checks.subject import subject_of
from igseg.data.pixels import Reading
from igseg.data.samples import list_samples
from igseg.errors import InputError
from igseg.explanation import NO_BASELINE, USER_BASELINE, Declared
from igseg.method.choice import METHODS, MethodKind, Question, form_of
from igseg.method.layers import enlarged_sum
from igseg.method.method import Method, build_methods
from igseg.method.methods import IntegratedGradientsMethod, guided_step
from igseg.method.paths import BlurPath, DrawnPath
from igseg.method.rules import Integration, Stratified
from igseg.preprocessing import Preprocessing
from igseg.results.figures import methods_figure
from igseg.results.files import load_view
from igseg.results.regions import rank_regions, segments_of
from igseg.setting import resolved
from igseg.settings import reproducing_command
from igseg.statistics import explanation_statistics
from integrated_gradients import IntegratedGradients, Settings, build_parser, main, settings_from

PLAIN = Preprocessing(8, 'stretch', (0.0,) * 3, (1.0,) * 3)
ALL = [form_of(name).replace('NAME', 'encoder') for name in METHODS]


def explainer(network: nn.Module, step_batch: int | None = None) -> IntegratedGradients:
    return IntegratedGradients(network.double(), 'cpu', PLAIN, step_batch)


@pytest.fixture
def images() -> torch.Tensor:
    """Image and baseline, (2, 3, 8, 8)."""
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def others() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


class Formula(nn.Module):
    """A network (N, 3, H, W) -> (N, 1, 1, 1) in double precision: a formula of the output of its
    encoder, which changes nothing."""

    def __init__(self, formula) -> None:
        super().__init__()
        self.formula, self.encoder = formula, nn.Identity()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, v):
        return (self.one * self.formula(self.encoder(v))).reshape(len(v), 1, 1, 1)


SQUARES = Formula(lambda v: (v**2).sum((1, 2, 3)))
OPTIONS = {'occlusion': {'window': 3}, 'smooth': {'samples': 2}}  # so that they are quick


class Small(nn.Module):
    """A smooth network with an encoder that gives a list of features, and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)  # of others a Grad-CAM has no positive part

        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
                self.second = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Tanh())

            def forward(self, x):
                features = [x, self.first(x)]
                return [*features, self.second(features[-1])]

        self.inside = Encoder()
        self.encoder = nn.Conv2d(6, 4, 1)  # gives one map
        self.head = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        _, fine, coarse = self.inside(x)
        up = nn.functional.interpolate(self.encoder(coarse).tanh(), scale_factor=2)
        return self.head(torch.cat([fine, up], dim=1))


@pytest.fixture(scope='module')
def small() -> nn.Module:
    return Small().double().eval()


def explain(ig, x, baseline, method, options=None, **more):
    return ig.explain(x, 'image', baseline, method=method, method_option=options or {}, **more)


# ------------------------------------------------------------------ closed forms


def test_ig_and_its_mean_gradient_in_closed_form(images):
    x, baseline = images
    ig = explainer(SQUARES)
    explanation = explain(ig, x, baseline, 'ig', num_steps=3)
    torch.testing.assert_close(explanation.attributions, x**2 - baseline**2)
    plain = explain(ig, x, baseline, 'ig', num_steps=3, no_multiply=True)
    torch.testing.assert_close(plain.attributions, x + baseline)
    assert plain.completeness_gap is None and plain.promised_sum is None
    assert plain.map_error is not None  # the integral is one as before


def test_gradient_and_input_times_gradient_in_closed_form(images):
    x, baseline = images
    ig = explainer(SQUARES)
    gradient = explain(ig, x, baseline, 'gradient')
    torch.testing.assert_close(gradient.attributions, 2 * x)
    assert gradient.gradient_evaluations == 1 and gradient.baseline is None
    times = explain(ig, x, baseline, 'input_x_gradient')
    torch.testing.assert_close(times.attributions, 2 * x * (x - baseline))
    assert times.completeness_gap is times.map_error is times.rule is None


@pytest.mark.parametrize('kind', ['mean', 'square', 'variance'])
def test_smooth_in_closed_form(images, kind):
    x, baseline = images
    options = {'samples': 5, 'noise': 0.3, 'kind': kind}
    explanation = explain(explainer(SQUARES), x, baseline, 'smooth', options, num_steps=3, seed=4)
    generator = torch.Generator().manual_seed(4)
    spread = 0.3 * float(x.max() - x.min())
    noisy = [x + spread * torch.randn(1, 3, 8, 8, generator=generator)[0] for _ in range(5)]
    maps = torch.stack([image**2 - baseline**2 for image in noisy])
    square = (maps**2).mean(0)
    expected = {'mean': maps.mean(0), 'square': square, 'variance': square - maps.mean(0) ** 2}
    torch.testing.assert_close(explanation.attributions, expected[kind])
    if kind == 'mean':  # the promise is of the copies, not of the image
        assert explanation.promised_sum == pytest.approx(float(maps.sum(dim=(1, 2, 3)).mean()))
        assert explanation.completeness_gap < 1e-9
    else:
        assert explanation.completeness_gap is None and explanation.map_error < 1e-6


def test_the_error_of_second_moments_is_that_of_what_they_are_made_of(images):
    """The gradient of the function jumps; the estimated error covers the error of few steps."""
    x, baseline = images
    ig = explainer(Formula(lambda v: (v - 0.5).relu().pow(2).sum((1, 2, 3))))
    for kind in ('square', 'variance'):
        options = {'samples': 3, 'noise': 0.5, 'kind': kind}
        few, many = (
            explain(ig, x, baseline, 'smooth', options, num_steps=n, rule=rule)
            for n, rule in ((9, 'adaptive'), (400, 'midpoint'))
        )
        off = relative_error(few.attributions, many.attributions)
        assert 0.2 * off < few.map_error < 20 * off


def test_expected_in_closed_form_within_its_standard_error(images, others):
    x, baseline = images
    explanation = explain(
        explainer(SQUARES), x, baseline, 'expected', num_steps=1500, references=others
    )
    exact = (x**2 - others**2).mean(dim=0)
    error = (explanation.attributions - exact).sum(dim=0).abs()
    ratio = error / explanation.uncertainty
    assert 0.3 < float(ratio.square().mean()) < 3  # of 64 sums, in standard errors
    assert relative_error(explanation.attributions, exact) == pytest.approx(
        explanation.map_error, rel=0.5
    )
    assert explanation.promised_sum == pytest.approx(float(exact.sum()))
    assert explanation.completeness_gap < 4 * explanation.gap_error
    assert explanation.baseline == '6 other images' and explanation.rule == 'stratified'


def test_the_standard_error_falls_with_the_draws_and_a_tolerance_asks_for_as_many(images, others):
    x, baseline = images
    run = partial(explain, explainer(SQUARES), x, baseline, 'expected', references=others)
    few, many = run(num_steps=100), run(num_steps=1600)
    assert many.map_error == pytest.approx(few.map_error / 4, rel=0.4)
    explanation = run(tolerance=0.1, max_steps=5000)
    assert explanation.within_tolerance and explanation.map_error <= 0.1
    assert 16 < explanation.steps < 1600


def test_draws_are_stratified_and_what_is_no_chance_has_no_error():
    rule = Stratified(3)
    (nodes,) = rule.sets(10, refined=False)
    assert [int(5 * node) for node in nodes] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(list(rule.sets(50, refined=True))) == 3  # of 16 each
    integral = integrate(lambda alphas: [torch.ones(1, 3, 2, 2)] * len(alphas), rule, 10)
    assert integral.integral.eq(1).all() and not integral.error.uncertainty.any()
    assert integral.sum_variance.item() == 0 and integral.evaluations == 10


def test_the_same_alpha_draws_the_same_baseline_and_all_are_drawn(others):
    path = DrawnPath(others, torch.zeros(1, 3, 8, 8).double(), seed=0)
    alphas = torch.rand(600, generator=torch.Generator().manual_seed(0)).double()
    points, velocities = path.at(alphas)
    torch.testing.assert_close(path.at(alphas[5:6])[0], points[5:6])
    drawn = [int((others + v).flatten(1).norm(dim=1).argmin()) for v in velocities]
    counts = np.bincount(drawn, minlength=6)
    assert counts.min() > 60 and counts.max() < 145


def test_the_blur_path_in_closed_form():
    """A blur multiplies a cosine wave by exp(-sigma^2 w^2 / 2)."""
    n = torch.arange(16).double()
    wave = torch.cos(torch.pi * 3 * (n + 0.5) / 16)  # 3 half waves
    x = wave.expand(1, 3, 16, 16)
    frequency = 3 * torch.pi / 16
    alphas = torch.tensor([0.0, 0.25, 1.0]).double()
    points, velocities = BlurPath(x, 4.0).at(alphas)
    sigma = 4 * (1 - alphas).view(-1, 1, 1, 1)
    factor = torch.exp(-(sigma**2) * frequency**2 / 2)
    torch.testing.assert_close(points, factor * x)
    torch.testing.assert_close(velocities, factor * frequency**2 * sigma * 4 * x)
    assert torch.equal(points[2], x[0])


def test_blur_has_a_completeness_of_its_own(images):
    x, baseline = images
    explanation = explain(explainer(SQUARES), x, baseline, 'blur', {'sigma': 0.5}, num_steps=200)
    most = BlurPath(x[None], 4.0).at(torch.zeros(1).double())[0][0]
    assert explanation.promised_sum == pytest.approx(float((x**2).sum() - (most**2).sum()))
    assert explanation.completeness_gap < 1e-3 and explanation.baseline == 'blurred (sigma 4 px)'
    assert explanation.baseline_pixels == pytest.approx(
        255 * most.permute(1, 2, 0).numpy(), abs=1e-3
    )


def test_guided_of_a_square_is_ig_whatever_its_path(images):
    """The gradient of an input depends on this input alone, so every path gives x^2 - x'^2."""
    x, baseline = images
    explanation = explain(
        explainer(SQUARES), x, baseline, 'guided', {'max_dist': 0.3}, num_steps=40
    )
    torch.testing.assert_close(explanation.attributions, x**2 - baseline**2)
    assert explanation.completeness_gap < 1e-9 and explanation.map_error is None


def test_guided_moves_what_has_the_least_gradient_first():
    gradient = torch.tensor([4.0, 1.0, 3.0, 2.0]).double()
    ones, zeros = torch.ones(4).double(), torch.zeros(4).double()
    moved = guided_step(zeros, ones, gradient, 0.25, 0.25, 0.5)
    assert moved.tolist() == [0, 0.75, 0, 0.25]  # one at a time, each up to alpha + 0.5
    near = guided_step(zeros, ones, gradient, 0.5, 0.25, 1e-6)
    torch.testing.assert_close(near, 0.5 * ones, atol=2e-6, rtol=0)
    assert guided_step(zeros, ones, gradient, 1.0, 0.25, 0.1).tolist() == [1, 1, 1, 1]


def test_idgi_in_closed_form(images):
    x, baseline = images
    explanation = explain(explainer(SQUARES), x, baseline, 'idgi', num_steps=7)
    expected, ends = torch.zeros_like(x), torch.linspace(0, 1, 8).double().tolist()
    for low, high in pairwise(ends):
        point, after = (baseline + a * (x - baseline) for a in (low, high))
        rise = (after**2).sum() - (point**2).sum()
        expected += (2 * point) ** 2 / ((2 * point) ** 2).sum() * rise
    torch.testing.assert_close(explanation.attributions, expected)
    assert explanation.completeness_gap < 1e-12
    assert explanation.method.completeness == 'construction'


def test_occlusion_of_a_linear_score_is_the_mean_of_the_windows_over_a_pixel(images):
    x, baseline = images
    weights = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    ig = explainer(Formula(lambda v: (v * weights).sum((1, 2, 3))))
    explanation = explain(ig, x, baseline, 'occlusion', {'window': 3, 'stride': 2})
    worth = (weights * (x - baseline)).sum(dim=0)  # of each pixel
    expected = torch.zeros(8, 8).double()
    for row in range(8):
        for column in range(8):
            over = [
                worth[r : r + 3, c : c + 3].sum()
                for r in (0, 2, 4, 6)
                for c in (0, 2, 4, 6)
                if r <= row < r + 3 and c <= column < c + 3
            ]
            expected[row, column] = torch.stack(over).mean()
    torch.testing.assert_close(explanation.attributions[0], expected)
    assert explanation.steps == 16 and explanation.gradient_evaluations == 0
    alone = explain(ig, x, baseline, 'occlusion', {'window': 1, 'stride': 1})
    torch.testing.assert_close(alone.attributions[0], worth)


def test_a_layer_that_gives_the_input_itself_explains_as_ig(images):
    x, baseline = images
    ig = explainer(Formula(lambda v: (v**3).sum((1, 2, 3))))
    layer, plain = (explain(ig, x, baseline, m, num_steps=9) for m in ('layer:encoder', 'ig'))
    torch.testing.assert_close(layer.fine, plain.attributions)
    torch.testing.assert_close(layer.attributions[0], plain.attributions.sum(dim=0))
    assert layer.promised_sum == pytest.approx(plain.promised_sum)


def test_the_stages_of_an_encoder_carry_all_that_follows(images, small):
    """It explains not only the skip connection: the coarse stage depends on the fine one too."""
    x, baseline = images
    ig = explainer(small)
    explanation = explain(ig, x, baseline, 'layer:inside.stage1', num_steps=200)
    inner = small.inside.first
    same = explain(ig, x, baseline, 'layer:inside.first', num_steps=200)
    torch.testing.assert_close(explanation.fine, same.fine)
    whole = ig.explain(x, 'image', baseline, num_steps=3)
    assert explanation.promised_sum == pytest.approx(whole.promised_sum)  # all goes through it
    assert explanation.completeness_gap < 1e-3 and not inner._forward_hooks
    coarse = explain(ig, x, baseline, 'layer:inside.stage2', num_steps=50)
    off = abs(coarse.promised_sum / whole.promised_sum - 1)
    assert off > 0.05  # the skip sees the image


def test_enlarging_keeps_the_sum_and_a_constant_inside():
    fine = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    large = enlarged_sum(fine, (15, 24))
    assert large.shape == (1, 15, 24) and float(large.sum()) == pytest.approx(float(fine.sum()))
    flat = enlarged_sum(torch.ones(1, 8, 8), (32, 32))
    assert float(flat[0, 8:-8, 8:-8].std()) < 1e-6


# ------------------------------------------------------------------ promises


@pytest.mark.parametrize('method', ALL)
def test_what_a_method_declares_is_what_its_statistics_hold(method, images, others, small):
    x, baseline = images
    options = (
        {'window': 3} if method == 'occlusion' else {'samples': 2} if method == 'smooth' else {}
    )
    steps = 300 if method in ('blur', 'expected') else 60
    explanation = explain(explainer(small), x, baseline, method, options, num_steps=steps,
                          references=others)  # fmt: skip
    statistics, declared = explanation_statistics(explanation), explanation.method
    assert declared.name == statistics['method'] == method
    assert (statistics['completeness_gap'] is None) == (declared.completeness is None)
    assert (statistics['map_error'] is None) == (not declared.quadrature)
    assert (statistics['rule'] is None) == (not declared.quadrature)
    assert (statistics['baseline'] is None) == (declared.baseline == NO_BASELINE)
    assert (explanation.difference is None) == (declared.baseline == NO_BASELINE)
    assert explanation.attributions.shape == (3 if declared.channels else 1, 8, 8)
    assert explanation.attributions.isfinite().all() and explanation.attributions.abs().sum() > 0
    gap, chance = statistics['completeness_gap'], statistics['gap_error']
    assert gap is None or gap < (4 * chance if chance else 0.02)
    json.dumps(statistics, allow_nan=False)


@pytest.mark.parametrize('method', ALL)
def test_same_seed_same_result_whatever_the_step_batch(method, images, others, small):
    x, baseline = images
    options = (
        {'window': 3} if method == 'occlusion' else {'samples': 2} if method == 'smooth' else {}
    )
    maps = [
        explain(explainer(small, batch), x, baseline, method, options, num_steps=13,
                references=others, seed=seed).attributions
        for batch, seed in ((1, 0), (4, 0), (None, 0), (1, 1))
    ]  # fmt: skip
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(maps[2], maps[0], rtol=1e-9, atol=1e-12)
    random = method in ('smooth', 'expected')
    assert torch.equal(maps[3], maps[0]) != random


LINEAR = [m for m in ALL if m not in ('idgi', 'guided', 'gradcam:encoder')]


@pytest.mark.parametrize('method', LINEAR)
def test_linear_methods_are_linear_in_the_score(method, images, others):
    x, baseline = images
    parts = [lambda v: (v**3).sum((1, 2, 3)), lambda v: v[:, 0].sin().sum((1, 2))]

    both = Formula(lambda v: 2 * parts[0](v) - parts[1](v))
    options = (
        {'window': 3} if method == 'occlusion' else {'samples': 2} if method == 'smooth' else {}
    )
    first, second, sum_of = (
        explain(explainer(n), x, baseline, method, options, num_steps=9, rule='midpoint',
                references=others).attributions
        for n in (Formula(parts[0]), Formula(parts[1]), both)
    )  # fmt: skip
    torch.testing.assert_close(sum_of, 2 * first - second)


@pytest.mark.parametrize('method', ALL)
def test_several_targets_get_what_each_gets_alone_and_the_network_is_left_alone(
    method, images, others, small
):
    x, baseline = images
    options = (
        {'window': 3} if method == 'occlusion' else {'samples': 2} if method == 'smooth' else {}
    )
    run = partial(explainer(small).explain_targets, x, baseline_type=baseline, num_steps=9,
                  method=method, method_option=options, references=others)  # fmt: skip
    before = {name: value.clone() for name, value in small.state_dict().items()}
    together = run(['image', 'pixel:2,3'])
    for target, explanation in zip(('image', 'pixel:2,3'), together, strict=True):
        torch.testing.assert_close(explanation.attributions, run([target])[0].attributions)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert not any(module._forward_hooks for module in small.modules())


@pytest.mark.parametrize('method', ALL)
def test_the_checks_make_the_methods_own_map(method, images, others, small):
    """For the same image and as many midpoints, `again` gives the map itself."""
    x, baseline = images
    options = (
        {'window': 3} if method == 'occlusion' else {'samples': 2} if method == 'smooth' else {}
    )
    ig = explainer(small)
    explanation = explain(ig, x, baseline, method, options, num_steps=8, rule='midpoint',
                    references=others)  # fmt: skip
    subject = subject_of(ig, x, explanation)
    again = torch.from_numpy(subject.map_of(8, baseline=baseline[None]))
    torch.testing.assert_close(again, explanation.attributions, rtol=1e-6, atol=1e-9)
    assert bool(subject.others) == (explanation.method.baseline == USER_BASELINE)
    checked = evaluate(subject, 'quick').metrics
    assert checked['randomised_correlation'] is not None
    assert (checked['recomputed_correlation'] is None) == (not explanation.method.settles_early)


@pytest.mark.parametrize('name', METHODS)
def test_a_row_names_a_class_that_has_its_options(name):
    kind = METHODS[name]
    made = resolved(kind.made_by)
    options = {field.name for field in fields(made)} - {'declared', 'layer', 'multiply'}
    assert issubclass(made, Method) and options == set(kind.options)
    assert ('layer' in made.__dataclass_fields__) == kind.layer_of
    assert ('multiply' in made.__dataclass_fields__) == kind.multiplies
    assert kind.declared.name == name and kind.meaning and kind.source


def test_adding_a_method_is_one_class_and_one_row(images, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Twice(IntegratedGradientsMethod):
        """ig, twice"""

        def explain(self, task):
            return super().explain(task)

    row = MethodKind(Declared('twice', None), 'ig, twice', 'here', Twice)
    monkeypatch.setitem(METHODS, 'twice', row)
    explanation = explain(explainer(SQUARES), *images, 'twice', num_steps=3)
    assert explanation.method.name == 'twice' and explanation.completeness_gap is None


# ------------------------------------------------------------------ the references' numbers


def score(network, v):
    return network(v).mean(dim=(1, 2, 3))


def test_smooth_layers_occlusion_and_expected_agree_with_captum(images, others, small):
    attr = pytest.importorskip('captum.attr')
    x, baseline = images
    ig, forward = explainer(small), partial(score, small)
    theirs = attr.Occlusion(forward).attribute(
        x[None], (3, 3, 3), strides=(3, 2, 2), baselines=baseline[None]
    )
    ours = explain(ig, x, baseline, 'occlusion', {'window': 3, 'stride': 2}).attributions
    torch.testing.assert_close(ours[0].float(), theirs[0, 0])  # they go to single precision
    layer = attr.LayerIntegratedGradients(forward, small.inside.second)
    theirs = layer.attribute(x[None], baseline[None], n_steps=60)
    ours = explain(ig, x, baseline, 'layer:inside.stage2', num_steps=60, rule='gauss-legendre')
    assert relative_error(ours.fine, theirs[0]) < 1e-6  # their weights are float32
    torch.manual_seed(0)
    shap = attr.GradientShap(forward)
    theirs = shap.attribute(x[None], others, n_samples=20_000)[0]
    ours = explain(ig, x, baseline, 'expected', num_steps=4000, references=others)
    assert relative_error(ours.attributions, theirs) < 3 * ours.map_error < 0.2


@pytest.mark.parametrize(
    'kind, theirs', [('mean', 'smoothgrad'), ('square', 'smoothgrad_sq'), ('variance', 'vargrad')]
)
def test_smooth_agrees_with_captums_noise_tunnel(images, small, kind, theirs, monkeypatch):
    """Both get the same noise."""
    attr = pytest.importorskip('captum.attr')
    x, baseline = images
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(4)]
    noisy = x + 0.1 * float(x.max() - x.min()) * torch.cat(noise).double()
    tunnel = attr.NoiseTunnel(attr.IntegratedGradients(partial(score, small)))
    monkeypatch.setattr(torch, 'normal', lambda mean, std: noisy - x)
    expected = tunnel.attribute(x[None], nt_type=theirs, nt_samples=4, baselines=baseline[None],
                                n_steps=40)[0]  # fmt: skip
    ours = explain(explainer(small), x, baseline, 'smooth', {'samples': 4, 'kind': kind},
                   num_steps=40, rule='gauss-legendre', seed=7)  # fmt: skip
    assert relative_error(ours.attributions, expected) < 1e-5


def call_of(network):
    """A network as a function that `saliency` can call, for images (N, H, W, C)."""

    def call(batch, call_model_args=None, expected_keys=None):
        v = torch.from_numpy(np.moveaxis(np.asarray(batch, np.float64), -1, 1)).requires_grad_()
        score(network, v).sum().backward()
        return {'INPUT_OUTPUT_GRADIENTS': np.moveaxis(v.grad.numpy(), 1, -1)}

    return call


def last(image: torch.Tensor) -> np.ndarray:
    return np.moveaxis(image.numpy(), 0, -1)


@pytest.fixture
def saliency(monkeypatch):
    """Version 0.2.1 uses an argument of np.quantile that new versions of NumPy do not have."""
    if importlib.util.find_spec('saliency') is None:
        pytest.skip('saliency is not installed')
    quantile = np.quantile

    def with_interpolation(a, q, interpolation='linear', **options):
        return quantile(a, q, method=interpolation, **options)

    monkeypatch.setattr(np, 'quantile', with_interpolation)
    import saliency.core

    return saliency.core


def test_guided_takes_saliencys_path_and_sums_it_better(images, small, saliency):
    x, baseline = images
    steps, fraction, near = 60, 0.25, 0.1
    theirs = saliency.GuidedIG().GetMask(
        last(x), call_of(small), x_steps=steps, x_baseline=last(baseline), fraction=fraction,
        max_dist=near,
    )  # fmt: skip
    progress, left = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(steps):  # our path, summed as they do: the gradient at each step's start
        point = (baseline + progress * (x - baseline))[None].requires_grad_()
        (gradient,) = torch.autograd.grad(score(small, point).sum(), point)
        moved = guided_step(progress, (x - baseline).abs(), gradient[0].abs(), (step + 1) / steps,
                            fraction, near)  # fmt: skip
        left += gradient[0] * (moved - progress) * (x - baseline)
        progress = moved
    assert relative_error(left, torch.from_numpy(np.moveaxis(theirs, -1, 0))) < 1e-6
    ours = explain(explainer(small), x, baseline, 'guided', {'fraction': fraction,
                   'max_dist': near}, num_steps=steps)  # fmt: skip
    missed = abs(theirs.sum() - ours.promised_sum) / abs(ours.promised_sum)
    assert ours.completeness_gap < missed / 3  # theirs is a left Riemann sum
    assert relative_error(ours.attributions, left) < 0.2


def test_blur_agrees_with_saliency_where_no_border_is_near(small, saliency):
    """saliency pads with black (we reflect), samples the Gaussian, and takes left Riemann sums."""
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(3, 40, 40).double()
    x[:, 14:26, 14:26] = torch.rand(3, 12, 12, generator=generator).double()
    theirs = saliency.BlurIG().GetMask(last(x), call_of(small), max_sigma=2, steps=500,
                                       grad_step=1e-4)  # fmt: skip
    ours = explain(explainer(small), x, 'zero', 'blur', {'sigma': 2 / 40}, num_steps=400)
    assert relative_error(ours.attributions, torch.from_numpy(np.moveaxis(theirs, -1, 0))) < 0.03
    assert ours.completeness_gap < 2e-3


def test_grad_cam_agrees_with_pytorch_grad_cam(images, small):
    cams = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget

    x, baseline = images
    for name, layer in (('inside.stage2', small.inside.second), ('encoder', small.encoder)):
        explanation = explain(explainer(small), x, baseline, f'gradcam:{name}')
        target = SemanticSegmentationTarget(0, np.ones((8, 8), np.float32))
        with cams.GradCAM(small, [layer]) as cam:
            cam.get_target_width_height = lambda v: None  # not enlarged
            (theirs,) = cam.compute_cam_per_layer(*_after_a_pass(cam, x[None], [target]))
        low, high = explanation.fine.min(), explanation.fine.max()
        scaled = (explanation.fine - low) / (high - low)
        np.testing.assert_allclose(scaled[0].numpy(), np.squeeze(theirs), atol=2e-6)


def _after_a_pass(cam, x, targets):
    outputs = cam.activations_and_grads(x.requires_grad_())
    sum(target(output) for target, output in zip(targets, outputs, strict=True)).backward()
    return x, targets, False


def test_ranked_regions_agree_with_saliencys(saliency):
    rng = np.random.default_rng(0)
    relevance = rng.random((40, 50)) ** 2
    relevance[5:15, 10:30] += 1
    masks = [rng.random((5, 5)) > 0.6 for _ in range(25)]
    masks = [np.kron(mask, np.ones((8, 10))).astype(bool) for mask in masks]
    parameters = saliency.XRAIParameters(return_xrai_segments=True)
    parameters.experimental_params['min_pixel_diff'] = 1
    theirs = saliency.XRAI().GetMaskWithDetails(
        np.zeros((40, 50, 1)), None, segments=masks, base_attribution=relevance[..., None],
        extra_parameters=parameters,
    )  # fmt: skip
    ours = rank_regions(relevance, masks)
    covered = np.any(masks, axis=0)
    assert np.array_equal(ours.ranks[covered], theirs.segments[covered])


def test_regions_by_hand():
    relevance = np.zeros((4, 4))
    relevance[:2, :2], relevance[2:, 2:], relevance[:2, 2:] = 8, 1, 2
    quarters = [np.zeros((4, 4), bool) for _ in range(3)]
    quarters[0][2:, 2:] = quarters[1][:2, :2] = True
    quarters[2][:2] = True  # the upper half, which holds the second
    regions = rank_regions(relevance, quarters)
    assert regions.ranks.tolist() == [[1, 1, 2, 2]] * 2 + [[4, 4, 3, 3]] * 2
    assert regions.shares == pytest.approx((32 / 44, 8 / 44, 4 / 44, 0))
    assert [regions.needed(part) for part in (50, 80, 95)] == [1, 2, 3]
    assert regions.statistics()['regions_80_area'] == 0.5
    nothing = rank_regions(np.zeros((4, 4)), quarters).statistics()
    assert set(nothing.values()) == {None}


def test_segments_follow_the_colours():
    pixels = np.zeros((60, 90, 3), np.float32)
    pixels[:, 45:] = 255
    masks = segments_of(pixels)
    assert all(mask.shape == (60, 90) for mask in masks)
    left = [mask for mask in masks if mask[30, 10] and not mask[30, 80]]
    assert left and all(mask[:, :40].all() and not mask[:, 55:].any() for mask in left)


# ------------------------------------------------------------------ other images


def test_other_images_are_never_the_image_itself(tmp_path):
    for number in range(5):
        save_image(tmp_path / f'{number}.png', noise_image(8, 8, number))
    save_image(tmp_path / 'copy.png', noise_image(8, 8, 2))
    source = ReferenceImages(list_samples(tmp_path), Reading())
    image = noise_image(8, 8, 2).astype(np.float32)
    x = PLAIN.normalise(image)
    others = source.tensors(PLAIN, x, 16)
    assert len(others) == 4 and not any(torch.equal(image[None], x) for image in others)
    assert 1 <= len(source.tensors(PLAIN, x, 2)) <= 2
    before = source.sha256(16)
    save_image(tmp_path / '0.png', noise_image(8, 8, 9))
    assert source.sha256(16) != before


def test_an_unreadable_reference_image_is_left_out_and_said(tmp_path):
    for number in range(3):
        save_image(tmp_path / f'{number}.png', noise_image(8, 8, number))
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    ig = explainer(SQUARES)
    others = ReferenceImages(list_samples(tmp_path), Reading())
    x = ig.preprocessing.normalise(noise_image(8, 8, 9).astype(np.float32))
    model_input = ModelInput(x, ig.preprocessing)
    question, (method,) = Question(('image',)), build_methods(['expected'])
    (explanation,) = ig.explain_with(model_input, question, Integration(steps=8), method, others)
    (note,) = [note for note in explanation.notes if 'left out of the reference images' in note]
    assert 'broken.png' in note and explanation.baseline.startswith('3 other')
    assert len(others.sha256(16)) == 64


def test_reference_images_none_of_which_can_be_read_are_named(tmp_path, images):
    for name in ('one.png', 'two.png'):
        (tmp_path / name).write_bytes(b'no picture')
    with pytest.raises(InputError, match=r'no other image to compare with can be used: .*one.png'):
        explainer(SQUARES).explain(images[0], 'image', method='expected', reference_dir=tmp_path)


def test_an_empty_folder_of_reference_images_is_named_with_its_flag(tmp_path, images):
    with pytest.raises(InputError, match='--reference_dir: .*' + tmp_path.name):
        explainer(SQUARES).explain(images[0], 'image', method='expected', reference_dir=tmp_path)


def test_a_layer_that_is_not_there_is_told_before_the_network_is_prepared(images):
    ig = explainer(SQUARES)
    with pytest.raises(InputError, match='unknown layer "nothing"'):
        ig.explain(images[0], 'image', method='layer:nothing')
    assert ig.engine.network is None


def test_expected_without_other_images_is_one_sentence(images):
    with pytest.raises(InputError, match=r'no other image .* --reference_dir'):
        explain(explainer(SQUARES), *images, 'expected')
    with pytest.raises(InputError, match=r'references must have the shape \(n, 3, 8, 8\)'):
        explain(explainer(SQUARES), *images, 'expected', references=torch.rand(2, 3, 4, 4))


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    'method, options, message',
    [
        ('layer', {}, 'not of the form layer:NAME'),
        ('layer:', {}, 'not of the form layer:NAME'),
        ('gradient:encoder', {}, 'not of the form gradient'),
        ('guided', {'samples': 3}, 'unknown option "samples" .guided has fraction=0.25, max_dist='),
        ('guided', {'fraction': 2}, 'fraction must lie between 0 and 1'),
        ('occlusion', {'window': 0}, 'window must be a whole number of at least 1'),
        (
            'occlusion',
            {'window': 2, 'stride': 4},
            'stride 4 of occlusion is more than',
        ),
        (
            'layer:nothing',
            {},
            'unknown layer "nothing" .choose from inside.stage1, inside',
        ),
        ('layer:inside', {}, 'layer "inside" gives no map'),
        ('ig gradient', {}, 'an explanation is of one method'),
    ],
)
def test_errors_are_one_sentence_that_helps(method, options, message, images, small):
    with pytest.raises(InputError, match=message):
        explain(explainer(small), *images, method, options)


def test_an_option_goes_to_every_method_that_has_it():
    smooth, guided = build_methods(['smooth', 'guided'], ['samples=3', 'fraction=0.5'])
    assert (smooth.samples, guided.fraction) == (3, 0.5)
    settings = Settings(method='smooth guided', method_option='samples=3 fraction=0.5')
    assert dict(settings.methods[1].options) == {'fraction': 0.5, 'max_dist': 0.02}
    assert settings.record()['method'] == 'smooth guided'


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope='module')
def line(tmp_path_factory) -> list[str]:
    """A network with an encoder, and what is asked of it."""
    return [*tiny_model(tmp_path_factory.mktemp('network')), '--image_size', '64', '--num_steps',
            '3', '--step_batch', '1', '--device', 'cpu', '--target', 'image']  # fmt: skip


ON_LINE = [form_of(name).replace('NAME', 'encoder.stage3') for name in METHODS]


def test_every_method_runs_from_the_command_line(tmp_path, line):
    arguments = [*line, '--image_path', str(DEMO_IMAGE), '--method', *ON_LINE,
                 '--method_option', 'samples=2', 'window=32', '--figures', 'none',
                 '--output_dir', str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    for method in ON_LINE:
        folder = tmp_path / f'{DEMO_IMAGE.stem}_{method.replace(":", "-")}'
        statistics = load_view(folder)[1]
        assert statistics['method'] == method and statistics['methods'] == ON_LINE


def never(*arguments, **named):
    raise AssertionError('computed again')


def test_methods_side_by_side_and_their_regions(tmp_path, monkeypatch, line):
    """Their figures are written, and drawn again if they are missing, without a new explanation."""
    methods = ['blur', 'gradcam:encoder.stage3', 'occlusion']
    arguments = [*line, '--image_path', str(DEMO_IMAGE), '--method', *methods,
                 '--method_option', 'window=32', '--segments', 'xrai', '--figures', 'png',
                 '--output_dir', str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    together, folder = tmp_path / f'{DEMO_IMAGE.stem}_methods.png', f'{DEMO_IMAGE.stem}_blur'
    view, statistics = load_view(tmp_path / folder)
    assert 1 <= statistics['regions_50'] <= statistics['regions_95'] <= view.regions.max()
    assert statistics['regions_50_area'] <= statistics['regions_95_area']
    regions, before = tmp_path / folder / f'{folder}_regions.png', together.read_bytes()
    distrusted = statistics | {'method': 'other', 'verdict': [{'flag': 'do not trust'}]}
    within = statistics | {'completeness_gap': 0.0, 'baseline_contrast': None, 'verdict': []}
    for several, warned in ([within], False), ([within, distrusted], True):
        figure = methods_figure([view] * len(several), several)
        texts = [' '.join(text.get_text().split()) for text in figure.texts]
        assert any('not to be relied on' in t and t.endswith(': other.') for t in texts) is warned
    together.unlink(), regions.unlink()
    monkeypatch.setattr(IntegratedGradients, 'explain_with', never)
    assert main(arguments) == 0
    assert together.read_bytes() == before and regions.is_file()


def test_a_batch_of_methods_resumes_where_it_stopped(tmp_path, monkeypatch, line):
    arguments = ['--mode', 'batch', *line, '--data_dir', str(DEMO_DATA), '--num_samples', '2',
                 '--method', 'expected', 'gradcam:encoder.stage3', '--method_option',
                 'references=3', '--figures', 'none', '--output_dir']  # fmt: skip
    assert main([*arguments, str(tmp_path / 'whole')]) == 0
    explained, calls = IntegratedGradients.explain_with, []

    def stops(self, *arguments_before, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return explained(self, *arguments_before, **more)

    monkeypatch.setattr(IntegratedGradients, 'explain_with', stops)
    assert main([*arguments, str(tmp_path / 'parts')]) == 130
    monkeypatch.undo()
    assert main([*arguments, str(tmp_path / 'parts')]) == 0
    assert not differences(tmp_path / 'whole', tmp_path / 'parts')
    summary = json.loads((tmp_path / 'whole' / 'summary.json').read_text())
    assert len({image['method'] for image in summary['images']}) == 2
    page = (tmp_path / 'whole' / 'index.html').read_text(encoding='utf-8')
    command = shlex.split(reproducing_command(summary['images'][0], Settings().record()))
    again = settings_from(build_parser().parse_args(command[2:]))
    assert again.method == ('expected', 'gradcam:encoder.stage3') and 'Traceback' not in page
    assert again.method_option == ('references=3',)


def test_a_tolerance_that_a_method_cannot_keep_to_is_status_2(capsys, line):
    line = [*line, '--image_path', str(DEMO_IMAGE), '--method', 'ig', 'occlusion']
    at = line.index('--num_steps')
    assert main([*line[:at], '--tolerance', '0.1', *line[at + 2 :]]) == 2
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and 'occlusion has no integral for' in message
    assert integrated_gradients.METHODS is METHODS


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(InputError, match='larger than the input of 8×6'):
        build_methods(['occlusion'], ['window=9'])[0].windows((6, 8))
