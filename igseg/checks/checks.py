"""How far can an attribution map be trusted? Checks for any map of any segmentation network.

A heatmap looks convincing whether or not it is true. Therefore each check can fail:

- deletion and insertion curves of the map are compared with those of the same map in the wrong
  place (displaced and mirrored: same texture), of a random map, and of the image's edges;
- the map is computed again in a few steps, which should change little; and for a network whose
  weights are redrawn layer by layer, which should change it;
- the map is computed for the image with a little noise, and with other baselines: both should
  change it little;
- the sum of the map over a patch is compared with the change of the score without this patch
  (infidelity);
- the place of the map is measured: inside masks, the distance from the target, rim and padding;
- a spot far from the target is filled, to see whether the score depends on it (a shortcut).

Arrays are NumPy, at model resolution; a *relevance* is a map (H, W). `evaluate` runs all checks on
a `Subject`, which may hold the map of any tool. METRICS defines every number, and names the check
that measures it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations

import cv2
import numpy as np
import torch
from torch import nn

from igseg.checks.curves import is_noise, without
from igseg.checks.effort import EFFORTS, SPOT_SIDES, Effort
from igseg.checks.subject import Check, Evaluation, Explainer, Subject, progress_bar, subject_of
from igseg.errors import InputError
from igseg.explanation import Explanation
from igseg.maps import (
    FAR,
    NEAR,
    NOISE_RADIUS,
    edge_excess,
    has_one_sign,
    holding_radii,
    infidelity,
    known_median,
    linear_correlation,
    localisation,
    max_sensitivity,
    profile,
    rank_correlation,
    signed_distance,
    similarity,
    top_overlap,
)
from igseg.preprocessing import Placement, Preprocessing
from igseg.setting import resolved
from igseg.statistics import METRICS

BROAD = 0.02  # sigma of the blur that keeps a map's broad features, relative to the longer side

RADIUS_SHARES = (50, 90, 95)  # a radius is measured within which the map has this share, in percent


# --------------------------------------------------------------------------- where the map lies


def places(subject: Subject, effort: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Localisation in the target, the predicted mask and the truth; and the attribution in rim and
    padding."""
    metrics = edge_excess(subject.magnitude, subject.region, subject.content)
    masks = {'target': subject.region, 'prediction': subject.prediction, 'truth': subject.truth}
    for where, mask in masks.items():
        if mask is not None:
            counted = subject.counted if where == 'truth' else None
            part = slice(None) if counted is None else counted
            inside = localisation(subject.magnitude[part], mask[part])
            metrics |= {f'{name}_in_{where}': value for name, value in inside.items()}
    return Evaluation(metrics)


def context(subject: Subject, effort: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """How far the map reaches from the target, beside the network's effective receptive field.

    The receptive field is |dF/dx| at the image (Luo et al. 2016): the pixels on which the score can
    depend. The attribution shows the pixels that changed the score from that of the baseline.
    """
    with progress_bar('context', 1, progress, 'gradient') as bar:
        point = subject.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            score = subject.target(subject.logits(point)).sum()
            (gradient,) = torch.autograd.grad(score, point)
        bar.update()
    receptive_field = gradient[0].abs().sum(dim=0).cpu().double().numpy()
    distance = signed_distance(subject.region)
    metrics: dict[str, float | None] = {}
    profiles = {}
    for name, values in (('context', subject.magnitude), ('receptive', receptive_field)):
        radii = holding_radii(values, distance, RADIUS_SHARES)
        metrics |= {f'{name}_radius_{share}': radius for share, radius in radii.items()}
        profiles[name] = profile(values, distance)
    total = subject.magnitude.sum()
    near = (distance > 0) & (distance <= NEAR * max(distance.shape))
    for name, mask in (('context_inside', distance <= 0), ('context_near', near)):
        metrics[name] = float(subject.magnitude[mask].sum() / total) if total > 0 else None
    (distances, attribution), (_, receptive) = profiles['context'], profiles['receptive']
    return Evaluation(metrics, {'profile': {
        'distances': distances, 'attribution': attribution, 'receptive_field': receptive,
    }})  # fmt: skip


# --------------------------------------------------------------------------- infidelity


def random_patch(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A rectangle (H, W) bool at a random place; its sides are 1/8 to 1/2 of the image's sides."""
    mask = np.zeros(shape, bool)
    spans = []
    for side in shape:
        length = max(1, int(side * rng.uniform(1 / 8, 1 / 2)))
        start = rng.integers(0, side - length + 1)
        spans.append(slice(start, start + length))
    mask[tuple(spans)] = True
    return mask


def patches(subject: Subject, effort: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Infidelity over random rectangles that are replaced by the baseline."""
    if not effort.patches:
        return Evaluation()
    rng = np.random.default_rng(seed)
    masks = [random_patch(subject.region.shape, rng) for _ in range(effort.patches)]
    predicted = np.array([subject.signed[mask].sum() for mask in masks])
    with progress_bar('infidelity', effort.patches + 1, progress) as bar:
        (full,) = subject.scores(iter([subject.pixels]), bar)
        changed = subject.scores((without(subject, 'baseline', m, rng) for m in masks), bar)
    return Evaluation({'infidelity': infidelity(predicted, full - np.array(changed))})


# --------------------------------------------------------------------------- distant spots


def strongest_square(
    magnitude: np.ndarray, distance: np.ndarray, share: float
) -> np.ndarray | None:
    """The square (H, W) bool with the largest sum of a map (H, W), among all squares in which
    `distance` is larger than FAR everywhere; None: there is no such square.

    distance: (H, W), in pixels. share: side of the square, relative to the map's longer side."""
    longer = max(magnitude.shape)
    half = max(1, round(share * longer / 2))
    side = 2 * half + 1
    sums = cv2.boxFilter(magnitude, -1, (side, side), normalize=False,
                         borderType=cv2.BORDER_CONSTANT)  # fmt: skip
    allowed = distance > FAR * longer + half * 2**0.5
    if not allowed.any():
        return None
    row, column = np.unravel_index(np.argmax(np.where(allowed, sums, -1)), magnitude.shape)
    square = np.zeros(magnitude.shape, bool)
    square[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1] = True
    return square


def distant_spots(
    subject: Subject, effort: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """How far the score falls when a distant spot is filled with the mean of the pixels nearby. The
    spots are the squares with the most attribution among those far from the target and from other
    predicted objects.

    A watermark in a corner may hold less attribution than the corner's area explains, although the
    whole mask depends on it. Only its removal shows that."""
    distance = signed_distance(subject.region | subject.prediction)
    if subject.content is not None:
        distance = np.where(subject.content, distance, -np.inf)
    spots = [
        spot
        for share in SPOT_SIDES
        if (spot := strongest_square(subject.magnitude, distance, share)) is not None
    ]
    if not spots:
        return Evaluation()
    rng = np.random.default_rng(seed)
    everything = np.ones(distance.shape, bool)
    masks = [everything, *spots]
    images = (without(subject, 'local mean', mask, rng) for mask in masks)
    with progress_bar('distant spots', 1 + len(masks), progress) as bar:
        full, empty, *scores = subject.scores(chain([subject.pixels], images), bar)
    if is_noise(full, empty):
        return Evaluation()
    effects = [(full - score) / abs(full - empty) for score in scores]
    strongest = int(np.argmax(effects))
    rows, columns = np.nonzero(spots[strongest])
    return Evaluation(
        {
            'distant_spot_effect': effects[strongest],
            'distant_spot_x': float(columns.mean()),
            'distant_spot_y': float(rows.mean()),
        }
    )


# --------------------------------------------------------------------------- model randomisation


def weights_of(layer: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of a layer, without those of layers inside it."""
    return layer.parameters(recurse=False)


def redraw(layer: nn.Module, generator: torch.Generator) -> None:
    """Replace `weights_of` a layer by random weights with the same mean and deviation, in place."""
    with torch.no_grad():
        for weight in weights_of(layer):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            spread = weight.std() if weight.numel() > 1 else weight.abs().mean()
            weight.copy_(weight.mean() + spread * noise)


def survival(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """How similar a map (C, H, W) is after a change of the network.

    The ranks of a map of one sign mainly show the receptive field, which does not depend on the
    weights. For such maps the values of the magnitudes have to agree as well.
    """
    if not np.isfinite(after).all():
        return {'correlation': None, 'ssim': None}
    signed = before.sum(axis=0), after.sum(axis=0)
    correlation = rank_correlation(*signed)
    if correlation is not None and has_one_sign(signed[0]):
        correlation = min(correlation, linear_correlation(*map(np.abs, signed)) or 0.0)
    return {
        'correlation': correlation,
        'ssim': similarity(np.abs(before).sum(axis=0), np.abs(after).sum(axis=0)),
    }


def randomisation(
    subject: Subject, effort: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Compute the map again in a few steps, which should give a similar map. Then compare it with
    the maps of copies of the network whose weights are redrawn, from the head down (cascading
    randomisation, Adebayo et al. 2018).

    The weights of a layer are drawn from a normal distribution with the layer's mean and deviation.
    So signals keep their size, and only what the network has learned is lost.
    """
    if not effort.stages or subject.again is None:
        return Evaluation()
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(subject.network).eval().requires_grad_(False)
    layers = [module for module in network.modules() if [*weights_of(module)]]
    if not layers:
        return Evaluation()
    layers = layers[::-1]
    redrawn = replace(subject, network=network, run=None)
    count = min(effort.stages, len(layers))  # a single stage redraws all layers
    cuts = np.unique(np.linspace(len(layers), 1, count).astype(int))
    original = redrawn.map_of(effort.map_steps)
    stages = []
    with progress_bar('model randomisation', len(cuts), progress, 'stage') as bar:
        done = 0
        for cut in cuts:
            for layer in layers[done:cut]:
                redraw(layer, generator)
            done = int(cut)
            stages.append(
                {'layers': done, 'of': len(layers)}
                | survival(original, redrawn.map_of(effort.map_steps))
            )
            bar.update()
    last = stages[-1]
    early = subject.settles_early
    recomputed = rank_correlation(subject.signed, original.sum(axis=0)) if early else None
    return Evaluation(
        {
            'recomputed_correlation': recomputed,
            'randomised_correlation': last['correlation'],
            'randomised_ssim': last['ssim'],
        },
        {'randomisation': stages},
    )


# --------------------------------------------------------------------------- noise, baselines


def broad_features(signed: np.ndarray) -> np.ndarray:
    """A signed map (H, W) without its details."""
    return cv2.GaussianBlur(signed, (0, 0), BROAD * max(signed.shape))


def noise_sensitivity(
    subject: Subject, effort: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Max-sensitivity of the method to small uniform noise on the image."""
    if not effort.noisy or subject.again is None:
        return Evaluation()
    rng = np.random.default_rng(seed)
    maps = []
    with progress_bar('noise', effort.noisy + 1, progress, 'map') as bar:
        for number in range(effort.noisy + 1):
            radius = 255 * NOISE_RADIUS if number else 0.0  # the first map is of the image itself
            noise = rng.uniform(-radius, radius, subject.pixels.shape)
            noisy = subject.as_input(subject.pixels + noise.astype(np.float32))
            maps.append(subject.map_of(effort.map_steps, x=noisy))
            bar.update()
    broad = [broad_features(attributions.sum(axis=0)) for attributions in maps]
    return Evaluation(
        {
            'max_sensitivity': max_sensitivity(maps[0], maps[1:]),
            'broad_sensitivity': max_sensitivity(broad[0], broad[1:]),
        }
    )


def baseline_agreement(
    subject: Subject, effort: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Rank correlation and top overlap of |attribution| between baselines, pair by pair. Baselines
    that hide the target are left out, since their maps cannot agree with others."""
    if not effort.baselines or subject.again is None:
        return Evaluation()
    others = {name: image for name, image in subject.others.items() if subject.stands_out(image)}
    if len(others) < 2:
        return Evaluation()
    maps = {}
    with progress_bar('baselines', len(others), progress, 'map') as bar:
        for name, image in others.items():
            signed = subject.map_of(effort.map_steps, baseline=subject.as_input(image))
            maps[name] = np.abs(signed).sum(axis=0)
            bar.update()
    pairs = {
        (first, second): {
            'correlation': rank_correlation(maps[first], maps[second]),
            'overlap': top_overlap(maps[first], maps[second]),
        }
        for first, second in combinations(maps, 2)
    }
    medians = {
        f'baseline_{key}': known_median(agreement[key] for agreement in pairs.values())
        for key in ('correlation', 'overlap')
    }
    rows = [{'one': first, 'other': second, **agreement}
            for (first, second), agreement in pairs.items()]  # fmt: skip
    return Evaluation(medians, {'baselines': rows})


# --------------------------------------------------------------------------- all checks

CHECKS = tuple(dict.fromkeys(row.check for row in METRICS.values()))  # 'package.module:name'


def evaluate(
    subject: Subject, effort: str | Effort = 'full', seed: int = 0, progress: bool = False
) -> Evaluation:
    """Run all checks on an attribution map. effort: a key of EFFORTS. The same seed gives the same
    result."""
    chosen_effort = EFFORTS[effort] if isinstance(effort, str) else effort
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    details: dict[str, object] = {}
    for name in CHECKS:
        check: Check = resolved(name)
        result = check(subject, chosen_effort, seed, progress)
        metrics |= result.metrics
        details |= result.details
    return Evaluation(metrics, details)


def evaluate_explanation(
    ig: Explainer,
    input_tensor: torch.Tensor,
    explanation: Explanation,
    effort: str = 'full',
    truth: np.ndarray | None = None,
    placement: Placement | None = None,
    seed: int = 0,
    progress: bool = False,
    preprocessing: Preprocessing | None = None,
    unchanged: bool = False,
) -> dict:
    """Check how far an explanation can be trusted.

    input_tensor: the input that was explained. effort: a key of EFFORTS. truth: (h, w) bool, for
    localisation. placement: for the padding check. preprocessing: of the input; by default that of
    the explainer. unchanged: whether the network is surely the same as at the explanation. Returns
    the figures of METRICS, ready for the statistics (None where a figure does not apply), and under
    `evaluation` the details from which they were computed.
    """
    if effort not in EFFORTS:
        raise InputError(f'unknown evaluate "{effort}" (choose from {", ".join(EFFORTS)})')
    started = time.perf_counter()
    subject = subject_of(ig, input_tensor, explanation, truth, placement, seed, preprocessing)
    with ig.engine.running(subject.x, ig.facts.state if unchanged else None):
        result = evaluate(subject, effort, seed, progress)
    details = {'effort': effort, 'seconds': time.perf_counter() - started, **result.details}
    return {**result.metrics, 'evaluation': details}
