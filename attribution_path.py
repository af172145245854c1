"""Integrated Gradients: where the gradient is asked, and what is summed.

For a network f (logit map), a target score F (one number made of f), an image x and a baseline x',

    IG_i(x) = (x_i - x'_i) * integral over alpha in [0, 1] of dF(x' + alpha (x - x')) / dx_i

(Sundararajan, Taly, Yan: Axiomatic Attribution for Deep Networks, ICML 2017, eq. 1). The straight
line from x' to x is one *path*; for any path gamma the same theorem holds, and what is integrated
is the *density*, gradient times velocity:

    dF(gamma(alpha)) / dx_i * dgamma_i / dalpha

`plain_map` is the method in ten lines, without an engine: the reference that tests compare with. In
the engine a path class says where to ask (points, and velocities there), `path_integral` how to
sum, and `gradient_engine.PathSampler` stands between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from errors import InputError


class Score(Protocol):
    """A target: one number for every image."""

    scale: float  # by which scores are multiplied on the way back, of the order of the region

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, h, w) -> scores (N,)."""


class AttributionPath(Protocol):
    """A way from a baseline (alpha = 0) to an image (alpha = 1).

    A class with these two is all that a new kind of path needs. It may bend (through a scale
    space), end elsewhere than at the image explained (at a noisy copy of it), or jump between
    alphas (to another baseline in every stratum of a fixed rule). Of several paths the mean is
    taken.
    """

    image: torch.Tensor  # (1, C, H, W): where it ends

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alphas (steps,) -> points (steps, C, H, W), and the velocities there, of that shape or
        (1, C, H, W)."""


@dataclass(frozen=True)
class StraightPath:
    """The straight line from a baseline to an image."""

    baseline: torch.Tensor  # (1, C, H, W)
    image: torch.Tensor  # (1, C, H, W)

    def at(self, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttributionPath`; the velocity is the same everywhere."""
        change = self.image - self.baseline
        return self.baseline + alphas.view(-1, 1, 1, 1) * change, change


def plain_map(
    network: Callable[[torch.Tensor], object],
    x: torch.Tensor,
    baseline: torch.Tensor,
    target: Score,
    steps: int,
) -> np.ndarray:
    """Integrated Gradients by the midpoint rule, and nothing else; (C, H, W) float, in units of F.

    network: images (N, C, H, W) -> logits (N, K, h, w), see `segmentation_logits`. x, baseline:
    (1, C, H, W). target: F. steps: how many gradients.
    """
    total = torch.zeros_like(x)
    for step in range(steps):
        point = torch.lerp(baseline, x, (step + 0.5) / steps).detach().requires_grad_()
        with torch.enable_grad():
            score = target(segmentation_logits(network(point))).sum()
            total += torch.autograd.grad(score, point)[0]
    return (total * (x - baseline) / steps)[0].cpu().numpy()


def segmentation_logits(output: object) -> torch.Tensor:
    """The logit map (N, K, h, w) in a model's output: itself, the first of a tuple (smp with an
    auxiliary head), or under `out` (torchvision). Raises InputError for anything else."""
    if isinstance(output, dict):
        output = output.get('out')
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.ndim != 4:
        raise InputError('the model must return a logit map (N, C, H, W) (wrap it so that it does)')
    return output
