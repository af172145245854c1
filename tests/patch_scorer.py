"""A network whose important pixels are known, and its exact map."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from igseg.checks.subject import Subject
from igseg.preprocessing import Preprocessing
from integrated_gradients import Target

SIDE = 32
AS_IT_IS = Preprocessing(SIDE, 'stretch', (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PATCH = np.zeros((SIDE, SIDE), bool)
PATCH[8:24, 8:24] = True  # a quarter of the image


class PatchScorer(nn.Module):
    """A linear network: every logit is the weighted sum of the image."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight, dtype=torch.float32))  # (3, H, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).sum(dim=(1, 2, 3))
        return score.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])


def whole_image_target() -> Target:
    return Target('image', torch.full((1, SIDE, SIDE), 1 / SIDE**2))


def patch_subject(attributions: np.ndarray, **options) -> Subject:
    """An evenly bright image, scored by its patch alone, against black."""
    network = PatchScorer(np.repeat(PATCH[None], 3, axis=0) / PATCH.sum())
    network.eval().requires_grad_(False)
    x = torch.full((1, 3, SIDE, SIDE), 0.5)
    return Subject(
        np.asarray(attributions, np.float32), network, whole_image_target(), x,
        torch.zeros_like(x), AS_IT_IS, region=PATCH, prediction=PATCH, truth=PATCH,
        batch=4, **options,
    )  # fmt: skip


PERFECT = np.repeat(PATCH[None], 3, axis=0) * 0.5 / PATCH.sum()  # the exact map of that network
