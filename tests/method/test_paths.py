"""Paths in closed form, the ten-line reference, and new kinds of paths, which need only a class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import Function, integrate, relative_error

from igseg.engine.engine import Crops, GradientEngine
from igseg.engine.sampler import AtImage, PathSampler
from igseg.method.integral import MeanIntegral
from igseg.method.paths import StraightPath
from igseg.method.rules import ADAPTIVE
from integrated_gradients import Target, build_baselines, plain_map


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 3, 4, 5, generator=generator, dtype=torch.float64)


WHOLE = Target('image', torch.ones(1, 1, 1))


def sampled(network, paths, x, rule=ADAPTIVE, steps=33, batch=4, shared=True):
    """The mean integral along paths, through the engine, and the samplers."""
    engine = GradientEngine(network.double(), torch.device('cpu'), batch)
    mean, samplers = MeanIntegral(), []
    with engine.running(x):
        maps, _, gradient = engine.look(x, torch.ones_like(x), Crops((WHOLE,)))
        at_image = AtImage(x, maps[0], [WHOLE], gradient[0] if shared else None)
        for path in paths:
            sampler = PathSampler(engine, path, at_image, lambda logits: torch.ones(len(logits)))
            sampler.see_the_ends(density_at_start=False)
            mean.add(integrate(sampler, rule, steps))
            samplers.append(sampler)
    return mean, samplers, engine


# ------------------------------------------------------------------ the straight path


def test_a_straight_path_has_one_velocity(images):
    baseline, x = images
    points, velocity = StraightPath(baseline, x).at(torch.tensor([0.0, 0.25, 1.0]).double())
    torch.testing.assert_close(points, torch.cat([baseline, 0.75 * baseline + 0.25 * x, x]))
    torch.testing.assert_close(velocity, x - baseline)


def test_the_reference_in_closed_form(images):
    baseline, x = images
    attributions = plain_map(Function(lambda v: (v**2).sum((1, 2, 3))), x, baseline, WHOLE, 3)
    assert attributions == pytest.approx((x**2 - baseline**2)[0].numpy())


@pytest.mark.parametrize('baseline_type', ['zero', 'blur'])
def test_the_engine_computes_what_the_reference_does(exact_ig, brain, baseline_type):
    ours = exact_ig.explain(brain, 'predicted', baseline_type, 7, 'midpoint')
    x = brain.double()
    fit = exact_ig.preprocessing
    (image,) = build_baselines(baseline_type, fit.to_pixels(x), fit)
    baseline = fit.normalise(image).double()
    plain = plain_map(exact_ig.model, x, baseline, ours.objective, 7)
    assert relative_error(ours.attributions, torch.from_numpy(plain)) < 1e-6


# ------------------------------------------------------------------ other paths


@dataclass(frozen=True)
class BentPath:
    """From a baseline to an image; each channel moves with another speed, red first."""

    baseline: torch.Tensor
    image: torch.Tensor

    def at(self, alphas):
        powers = torch.tensor([1.0, 2.0, 3.0], dtype=self.image.dtype).view(1, 3, 1, 1)
        alphas = alphas.view(-1, 1, 1, 1)
        change = self.image - self.baseline
        points = self.baseline + alphas**powers * change
        return points, powers * alphas ** (powers - 1) * change


def test_a_bent_path_is_complete_and_gives_its_own_map(images):
    """F = red * green at one place: along r = alpha, g = alpha^2 red gets 1/3, green 2/3."""
    _, x = images
    black = torch.zeros_like(x)
    network = Function(lambda v: v[:, 0, 0, 0] * v[:, 1, 0, 0])
    mean, _, _ = sampled(network, [BentPath(black, x)], x, 'gauss-legendre', 4)
    product = float(x[0, 0, 0, 0] * x[0, 1, 0, 0])
    attributions = mean.integral[0]
    assert float(attributions.sum()) == pytest.approx(product)
    assert float(attributions[0, 0, 0]) == pytest.approx(product / 3)
    assert float(attributions[1, 0, 0]) == pytest.approx(2 * product / 3)


def test_a_path_may_end_elsewhere_than_at_the_image(images):
    """The path ends at a noisy copy, so that the results at the image are not those at its end."""
    baseline, x = images
    noisy = x + 0.5
    network = Function(lambda v: (v**3).sum((1, 2, 3)))
    mean, (sampler,), _ = sampled(network, [StraightPath(baseline, noisy)], x, steps=65)
    exact = noisy**3 - baseline**3
    assert relative_error(mean.integral[0], exact[0]) < 0.01
    assert float(sampler.scores[1.0]) == pytest.approx(float((noisy**3).sum()))


@dataclass(frozen=True)
class StratifiedPath:
    """Another baseline in every stratum of alpha: baselines from data, each used once."""

    baselines: torch.Tensor  # (N, C, H, W)
    image: torch.Tensor

    def at(self, alphas):
        rows = (alphas * len(self.baselines)).long().clamp(max=len(self.baselines) - 1)
        starts = self.baselines[rows]
        change = self.image - starts
        return starts + alphas.view(-1, 1, 1, 1) * change, change


def test_baselines_drawn_from_data_are_a_path_too():
    """Expected gradients, one gradient for each baseline: unbiased, since alpha is stratified."""
    generator = torch.Generator().manual_seed(1)
    x = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    drawn = 0.1 * torch.randn(600, 3, 2, 2, generator=generator, dtype=torch.float64)
    network = Function(lambda v: (v**2).sum((1, 2, 3)))
    mean, _, _ = sampled(network, [StratifiedPath(drawn, x)], x, 'midpoint', 600, batch=64)
    exact = (x**2 - drawn**2).mean(dim=0)
    assert relative_error(mean.integral[0], exact) < 0.02


# ------------------------------------------------------------------ several paths


def test_the_mean_over_paths_is_the_mean_of_their_maps(images):
    baseline, x = images
    network = Function(lambda v: (v**4).sum((1, 2, 3)))
    starts = [baseline, 2 * baseline, baseline - 1]
    paths = [StraightPath(start, x) for start in starts]
    mean, samplers, engine = sampled(network, paths, x)
    assert mean.count == 3 and mean.evaluations == 33
    assert engine.gradient_evaluations == 3 * 32 + 1  # the gradient at the image is shared
    integrals = [sampled(network, [path], x)[0] for path in paths]
    expected = sum(single.integral for single in integrals) / 3
    torch.testing.assert_close(mean.integral, expected)
    squares = sum(single.uncertainty**2 for single in integrals)
    torch.testing.assert_close(mean.uncertainty, squares.sqrt() / 3)
    assert [float(s.scores[0.0]) for s in samplers] == pytest.approx(
        [float((start**4).sum()) for start in starts]
    )


def test_one_path_with_a_single_node_leaves_the_error_unknown(images):
    baseline, x = images
    network = Function(lambda v: (v**2).sum((1, 2, 3)))
    mean, _, _ = sampled(network, [StraightPath(baseline, x)] * 2, x, 'midpoint', 1, shared=False)
    assert mean.uncertainty is None and mean.summed_uncertainty is None


# ------------------------------------------------------------------ the error of the summed map


def test_channels_that_cancel_leave_no_doubt_about_their_sum():
    """Red and green jump at the same alpha in opposite directions: each is uncertain, but not their
    sum."""

    def density(alphas):
        for alpha in alphas:
            jump = float(alpha > 0.3)
            yield torch.tensor([jump, -jump, 1.0]).view(1, 3, 1, 1)

    result = integrate(density, 'midpoint', 8)
    assert result.error.uncertainty[0, :2].min() > 0.05
    assert float(result.summed_error.uncertainty.max()) == 0
    assert result.evaluations == 8


PLACES = np.random.default_rng(0).uniform(size=(1, 3, 5, 5))  # where each pixel jumps


def jumping(alphas):
    return (torch.from_numpy((alpha > PLACES).astype(np.float64)) for alpha in alphas)


def test_the_error_of_the_sum_is_that_of_a_one_channel_density():
    """The error of the sum is accumulated separately, as if the map had only the sums."""
    both = integrate(jumping, 'trapezoid', 17)
    summed = integrate(lambda a: (d.sum(1, keepdim=True) for d in jumping(a)), 'trapezoid', 17)
    torch.testing.assert_close(both.summed_error.uncertainty, summed.error.uncertainty)


@pytest.mark.parametrize('rule', [ADAPTIVE, 'midpoint', 'trapezoid', 'clenshaw-curtis'])
def test_the_error_of_the_sum_is_honest(rule):
    result = integrate(jumping, rule, 33)
    true = (result.integral - torch.from_numpy(1 - PLACES)).sum(dim=1)
    assert 0 < float(true.norm()) <= 1.2 * float(result.summed_error.uncertainty.norm())


def test_uncertainty_of_an_explanation(ig, brain):
    explanation = ig.explain(brain, num_steps=17)
    finer = ig.explain(brain, num_steps=129)
    off = (explanation.attributions - finer.attributions).sum(dim=0)
    assert explanation.uncertainty.shape == off.shape == (64, 64)
    assert float(off.norm()) < 1.5 * float(explanation.uncertainty.norm())
    settled = explanation.attributions.sum(dim=0).abs() >= explanation.uncertainty
    right = explanation.attributions.sum(dim=0).sign() == finer.attributions.sum(dim=0).sign()
    wrong_share = float((settled & ~right).sum() / settled.sum())
    assert wrong_share < 0.1 and float((~settled & ~right).sum()) > 0
    assert ig.explain(brain, 'image', num_steps=1).uncertainty is None
