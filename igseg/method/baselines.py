"""Baselines: the images that an image is compared with.

A baseline is built in pixel space from the image that is compared with it, and then normalised in
the same way. `BASELINES` (in `choice`) holds the baselines that users may choose; this file holds
the functions that its rows name.
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
from igseg.preprocessing import Placement, Preprocessing, strong_blur

if TYPE_CHECKING:
    from igseg.engine.engine import GradientEngine

# A baseline is chosen automatically only if the target's contrast is at least this share of the
# best candidate's contrast,
LEAST_CONTRAST = 0.8
# and if at most this share of the target is still predicted on the baseline.
STILL_PREDICTED = 0.1


# --------------------------------------------------------------------------- builders of baselines
#
# The rows of BASELINES name these functions: (pixels (H, W, C) float32 0-255, generator) ->
# (H, W, C) float32 0-255.


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


# --------------------------------------------------------------------------- of an image


def baseline_pictures(
    question: Question, kind: str, pixels: np.ndarray, fit: Preprocessing
) -> list[np.ndarray]:
    """The baseline of a kind for an image (H, W, C) float32, 0-255: pictures of the same shape and
    range. A random baseline has several draws, any other a single picture.

    kind: a key of BASELINES, or the name of the file with the picture `question.baseline_image`.
    """
    if kind in BASELINES:
        row, rng = BASELINES[kind], np.random.default_rng(question.seed)
        return [row(pixels, rng) for _ in range(question.baseline_draws if row.drawn else 1)]
    if question.baseline_image is None:
        check_baseline(kind)
        raise InputError(f'the baseline {kind} is a file that nobody has read')
    return [fitted_baseline(question.baseline_image, pixels.shape[:2], fit)]


def fitted_baseline(image: np.ndarray, size: tuple[int, int], fit: Preprocessing) -> np.ndarray:
    """The picture (h, w, C) from a baseline's file, resized to the image's size (H, W), float32."""
    return replace(fit, image_size=size).resize_image(image).astype(np.float32)


def choose_baseline(
    engine: GradientEngine,
    x: torch.Tensor,
    prediction: Prediction,
    question: Question,
    fit: Preprocessing,
    placement: Placement | None,
) -> tuple[ChosenBaseline, list[torch.Tensor]]:
    """The baseline of an input x (1, C, H, W), as pictures, and all draws of it as inputs. fit: the
    preprocessing that made x. Raises InputError."""
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
        return pixels, logits

    kind = question.baseline
    notes: list[str] = []
    if kind == AUTO:
        kind, *notes = best_baseline(image, prediction, question.threshold, placement, on_baseline)
    baseline = ChosenBaseline(kind, image, pictures(kind), (*notes,))
    return baseline, [fit.normalise(picture).to(x) for picture in baseline.pictures]


def _of_the_shape(baselines: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The user's baselines, each as (1, C, H, W) like x. Raises InputError."""
    shapes = (tuple(x.shape), tuple(x.shape[1:]))
    if any(tuple(baseline.shape) not in shapes for baseline in baselines):
        raise InputError(f'the baseline must have the shape {tuple(x.shape)} of the input')
    return [baseline.detach().to(x).reshape(x.shape) for baseline in baselines]


def best_baseline(
    image: np.ndarray,
    prediction: Prediction,
    threshold: float,
    placement: Placement | None,
    on_baseline: Callable[[str], tuple[np.ndarray, torch.Tensor]],
) -> tuple[str, str]:
    """The candidate that suits the targets of an image (H, W, C) best, and a note that says why.

    The targets must stand out against the baseline, and the network must not predict them on it.
    Of such candidates the one with the lowest score is chosen. on_baseline: kind -> the baseline
    (H, W, C) and its logits (1, K, h, w), which costs a forward pass."""
    network = prediction.network
    weights = torch.stack([target.weights for target in prediction.targets]).amax(dim=0)
    predicted = prediction.masks & (weights > 0)  # (K, h, w): the predicted part of the targets
    inside = (weights != 0).any(dim=0).cpu().numpy()
    outside = ~(inside | network.foreground(prediction.masks).cpu().numpy())
    if placement is not None:
        outside &= placement.content(outside.shape)
    rows: dict[str, tuple[float, float, float]] = {}
    for kind in CANDIDATES:
        pixels, logits = on_baseline(kind)
        share = (network.predicted(logits[0], threshold) & predicted).sum() / predicted.sum()
        score = np.mean([float(target(logits)) for target in prediction.targets])
        target_contrast = contrast(np.abs(image - pixels).sum(axis=2), inside, outside)
        target_contrast = math.inf if target_contrast is None else target_contrast
        rows[kind] = (target_contrast, float(torch.nan_to_num(share)), float(score))
    best = max(row[0] for row in rows.values())
    hidden = {k: v for k, v in rows.items() if v[1] <= STILL_PREDICTED}
    contrasting = {k: v for k, v in hidden.items() if v[0] >= LEAST_CONTRAST * best}
    suitable = contrasting or hidden or rows
    chosen = min(suitable, key=lambda kind: suitable[kind][2])
    figures = ', '.join(f'{k} {v[0]:.2g} ({v[1]:.0%})' for k, v in rows.items())
    return chosen, (
        f'baseline auto: {chosen}; contrast of the target against each, and how much of it is '
        f'still predicted there: {figures}'
    )
