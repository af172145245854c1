"""Baselines: the images that an image is compared with.

A baseline is an image in pixel space, built from the image it stands against and then normalised
like it. `BASELINES` (in `choice`) holds what a user may ask for; here stands what its rows name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from igseg.errors import InputError
from igseg.maps import contrast
from igseg.method.choice import AUTO, BASELINES, CANDIDATES, Question, check_baseline
from igseg.method.targets import ChosenBaseline, Prediction
from igseg.network.outputs import enlarged
from igseg.preprocessing import Placement, Preprocessing, strong_blur

if TYPE_CHECKING:
    from igseg.engine.engine import GradientEngine

LEAST_CONTRAST = 0.8  # of the best candidate's, that a baseline must have to be chosen
STILL_PREDICTED = 0.1  # share of the target that may still be predicted on it


# --------------------------------------------------------------------------- what rows name
#
# Builders of baselines: (pixels (H, W, C) float32 0-255, generator) -> (H, W, C) float32 0-255.


def zero_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Black."""
    return np.zeros_like(pixels)


def white_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White."""
    return np.full_like(pixels, 255)


def random_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise."""
    return rng.uniform(0, 255, pixels.shape).astype(np.float32)


def blur_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image under a strong blur."""
    return strong_blur(pixels)


def mean_baseline(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image's mean colour."""
    return np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape).astype(np.float32)


# --------------------------------------------------------------------------- those of an image


def baseline_pictures(
    question: Question, kind: str, pixels: np.ndarray, fit: Preprocessing
) -> list[np.ndarray]:
    """The baselines of a kind for an image (H, W, C) float32, 0-255, of the same shape and range:
    several draws for one that is drawn, one for the others.

    kind: a key of BASELINES, or the file whose picture `question.baseline_image` is.
    """
    if kind in BASELINES:
        row, rng = BASELINES[kind], np.random.default_rng(question.seed)
        return [row(pixels, rng) for _ in range(question.baseline_draws if row.drawn else 1)]
    if question.baseline_image is None:
        check_baseline(kind)
        raise InputError(f'the baseline {kind} is a file that nobody has read')
    return [fitted_baseline(question.baseline_image, pixels.shape[:2], fit)]


def fitted_baseline(image: np.ndarray, size: tuple[int, int], fit: Preprocessing) -> np.ndarray:
    """The picture (h, w, C) of a baseline's file at the size (H, W) of the image, float32."""
    return replace(fit, image_size=size).resize_image(image).astype(np.float32)


def choose_baseline(
    engine: GradientEngine,
    x: torch.Tensor,
    prediction: Prediction,
    question: Question,
    fit: Preprocessing,
    placement: Placement | None,
) -> tuple[ChosenBaseline, list[torch.Tensor]]:
    """The baselines of an input x (1, C, H, W) that was made by `fit`, as pictures and as inputs.
    Raises InputError."""
    image = fit.to_pixels(x)
    if len(question.baselines):
        tensors = _of_the_shape(question.baselines, x)
        return ChosenBaseline(question.baseline, image, list(map(fit.to_pixels, tensors))), tensors

    def pictures(kind: str) -> list[np.ndarray]:
        return baseline_pictures(question, kind, image, fit)

    def on_baseline(kind: str) -> tuple[np.ndarray, torch.Tensor]:
        (pixels,) = pictures(kind)
        with torch.no_grad():
            logits = engine.run(fit.normalise(pixels).to(x))
        return pixels, enlarged(logits, x.shape[-2:])

    kind = question.baseline
    notes: list[str] = []
    if kind == AUTO:
        kind, *notes = best_baseline(image, prediction, question.threshold, placement, on_baseline)
    baseline = ChosenBaseline(kind, image, pictures(kind), (*notes,))
    return baseline, [fit.normalise(one).to(x) for one in baseline.pictures]


def _of_the_shape(given: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Baselines that were given, each (1, C, H, W) like x. Raises InputError."""
    if any(tuple(one.shape) not in (tuple(x.shape), tuple(x.shape[1:])) for one in given):
        raise InputError(f'the baseline must have the shape {tuple(x.shape)} of the input')
    return [one.detach().to(x).reshape(x.shape) for one in given]


def best_baseline(
    image: np.ndarray,
    prediction: Prediction,
    threshold: float,
    placement: Placement | None,
    on_baseline: Callable[[str], tuple[np.ndarray, torch.Tensor]],
) -> tuple[str, str]:
    """Which of CANDIDATES explains the targets of an image (H, W, C) best, and why: where they
    stand out against it, and the network does not see them in it; of those the one with the lowest
    score. on_baseline: of a kind, the baseline (H, W, C) and the logits (1, K, h, w) there, a
    forward pass each."""
    network = prediction.network
    weights = torch.stack([target.weights for target in prediction.targets]).amax(dim=0)
    there = prediction.masks & (weights > 0)  # (K, h, w): what is predicted of the targets
    inside = (weights != 0).any(dim=0).cpu().numpy()
    outside = ~(inside | network.foreground(prediction.masks).cpu().numpy())
    if placement is not None:
        outside &= placement.content(outside.shape)
    rows: dict[str, tuple[float, float, float]] = {}
    for kind in CANDIDATES:
        pixels, logits = on_baseline(kind)
        still = (network.predicted(logits[0], threshold) & there).sum() / there.sum()
        score = np.mean([float(target(logits)) for target in prediction.targets])
        stands_out = contrast(np.abs(image - pixels).sum(axis=2), inside, outside)
        stands_out = math.inf if stands_out is None else stands_out
        rows[kind] = (stands_out, float(torch.nan_to_num(still)), float(score))
    best = max(row[0] for row in rows.values())
    fit = {k: v for k, v in rows.items() if v[1] <= STILL_PREDICTED}
    fit = {k: v for k, v in fit.items() if v[0] >= LEAST_CONTRAST * best} or fit or rows
    chosen = min(fit, key=lambda kind: fit[kind][2])
    said = ', '.join(f'{k} {v[0]:.2g} ({v[1]:.0%})' for k, v in rows.items())
    return chosen, (
        f'baseline auto: {chosen}; contrast of the target against each, and how much of it is '
        f'still predicted there: {said}'
    )
