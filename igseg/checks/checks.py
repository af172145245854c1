"""How far can an attribution map be trusted? Checks for any map of any segmentation network.

A heatmap convinces whether or not it is true, so each check has something to fail against:

- deletion and insertion curves beside those of the same map in the wrong place (displaced and
  mirrored: same texture), of a random map and of the image's edges;
- the map computed afresh in a few steps (it should be much the same), and that of a network whose
  weights are redrawn layer by layer (it should change);
- the map of the image under a little noise, and against other baselines (it should not);
- what the map says a patch is worth against what removing the patch really does (infidelity);
- where the map lies: inside masks, how far from the target, in the rim and the padding;
- whether the score hangs on a spot far from the target, which is filled to see (a shortcut).

Arrays are NumPy, at model resolution; a *relevance* is a map (H, W). `evaluate` runs all checks on
one `Subject`, which may hold the map of any tool. METRICS defines every number, and names the check
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

BROAD = 0.02  # of the longer side: sigma of the blur that leaves a map's broad features

RADIUS_SHARES = (50, 90, 95)  # per cent of a map that a radius holds


# --------------------------------------------------------------------------- where it lies


def places(subject: Subject, effort: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Localisation in the target, the predicted mask and the truth, and what lies in rim and
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
    """How far from the target the map reaches, beside the network's effective receptive field.

    The receptive field is |dF/dx| at the image (Luo et al. 2016): what could matter at once; the
    attribution is what did, compared with the baseline.
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
    for who, values in (('context', subject.magnitude), ('receptive', receptive_field)):
        radii = holding_radii(values, distance, RADIUS_SHARES)
        metrics |= {f'{who}_radius_{share}': radius for share, radius in radii.items()}
        profiles[who] = profile(values, distance)
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
    """A rectangle (H, W) bool at a random place, each side 1/8 to 1/2 of the image's."""
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
    """The square (H, W) bool that holds most of a map (H, W), of all that lie wholly farther than
    FAR from what `distance` is measured from; None: none does. share: of the longer side."""
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
    """How far the score falls when the squares that hold most of the attribution, of all that lie
    far from the target and from other predicted objects, are filled with the mean of what is left
    nearby. A watermark in a corner may hold less of the map than the corner's area explains, and
    still carry the whole mask: only removing it tells."""
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
    filled = (without(subject, 'local mean', mask, rng) for mask in masks)
    with progress_bar('distant spots', 1 + len(masks), progress) as bar:
        full, empty, *others = subject.scores(chain([subject.pixels], filled), bar)
    if is_noise(full, empty):
        return Evaluation()
    effects = [(full - score) / abs(full - empty) for score in others]
    worst = int(np.argmax(effects))
    rows, columns = np.nonzero(spots[worst])
    return Evaluation(
        {
            'distant_spot_effect': effects[worst],
            'distant_spot_x': float(columns.mean()),
            'distant_spot_y': float(rows.mean()),
        }
    )


# --------------------------------------------------------------------------- model randomisation


def own_weights(layer: nn.Module) -> Iterator[torch.Tensor]:
    """The weights that belong to a layer itself, not to one inside it."""
    return layer.parameters(recurse=False)


def redraw(layer: nn.Module, generator: torch.Generator) -> None:
    """Replace a layer's own weights by random ones of the same mean and deviation, in place."""
    with torch.no_grad():
        for weight in own_weights(layer):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            spread = weight.std() if weight.numel() > 1 else weight.abs().mean()
            weight.copy_(weight.mean() + spread * noise)


def survival(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """How much of a map (C, H, W) is left in another.

    The ranks of a map of one sign say little but where the network can see, which no weights
    change; then the values of the magnitudes have to agree as well.
    """
    if not np.isfinite(after).all():
        return {'correlation': None, 'ssim': None}
    signed = before.sum(axis=0), after.sum(axis=0)
    found = rank_correlation(*signed)
    if found is not None and has_one_sign(signed[0]):
        found = min(found, linear_correlation(*map(np.abs, signed)) or 0.0)
    return {
        'correlation': found,
        'ssim': similarity(np.abs(before).sum(axis=0), np.abs(after).sum(axis=0)),
    }


def randomisation(
    subject: Subject, effort: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Compute the map afresh in a few steps, which should find it again; and compare it with those
    of copies of the network whose weights are redrawn, from the head down (cascading
    randomisation, Adebayo et al. 2018).

    A layer's weights are drawn from the normal distribution of its own mean and deviation, so
    that signals keep their size and only what was learned is lost.
    """
    if not effort.stages or subject.again is None:
        return Evaluation()
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(subject.network).eval().requires_grad_(False)
    layers = [module for module in network.modules() if [*own_weights(module)]]
    if not layers:
        return Evaluation()
    layers = layers[::-1]
    redrawn = replace(subject, network=network, run=None)
    stages_there = min(effort.stages, len(layers))  # a single one redraws all of them
    cuts = np.unique(np.linspace(len(layers), 1, stages_there).astype(int))
    before = redrawn.map_of(effort.map_steps)
    stages = []
    with progress_bar('model randomisation', len(cuts), progress, 'stage') as bar:
        done = 0
        for cut in cuts:
            for layer in layers[done:cut]:
                redraw(layer, generator)
            done = int(cut)
            stages.append(
                {'layers': done, 'of': len(layers)}
                | survival(before, redrawn.map_of(effort.map_steps))
            )
            bar.update()
    last = stages[-1]
    early = subject.settles_early
    again = rank_correlation(subject.signed, before.sum(axis=0)) if early else None
    return Evaluation(
        {
            'recomputed_correlation': again,
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
    """Max-sensitivity of the method under small uniform noise on the image."""
    if not effort.noisy or subject.again is None:
        return Evaluation()
    rng = np.random.default_rng(seed)
    maps = []
    with progress_bar('noise', effort.noisy + 1, progress, 'map') as bar:
        for number in range(effort.noisy + 1):
            radius = 255 * NOISE_RADIUS if number else 0.0  # the first is the image itself
            noise = rng.uniform(-radius, radius, subject.pixels.shape)
            noisy = subject.as_input(subject.pixels + noise.astype(np.float32))
            maps.append(subject.map_of(effort.map_steps, x=noisy))
            bar.update()
    broad = [broad_features(one.sum(axis=0)) for one in maps]
    return Evaluation(
        {
            'max_sensitivity': max_sensitivity(maps[0], maps[1:]),
            'broad_sensitivity': max_sensitivity(broad[0], broad[1:]),
        }
    )


def baseline_agreement(
    subject: Subject, effort: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Rank correlation and top overlap of |attribution| between baselines, pair by pair: of those
    that do not hide the target, since maps against others cannot agree with any."""
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
        (one, other): {
            'correlation': rank_correlation(maps[one], maps[other]),
            'overlap': top_overlap(maps[one], maps[other]),
        }
        for one, other in combinations(maps, 2)
    }
    medians = {
        f'baseline_{key}': known_median(found[key] for found in pairs.values())
        for key in ('correlation', 'overlap')
    }
    rows = [{'one': one, 'other': other, **found} for (one, other), found in pairs.items()]
    return Evaluation(medians, {'baselines': rows})


# --------------------------------------------------------------------------- all of them

CHECKS = tuple(dict.fromkeys(row.check for row in METRICS.values()))  # 'package.module:name'


def evaluate(
    subject: Subject, effort: str | Effort = 'full', seed: int = 0, progress: bool = False
) -> Evaluation:
    """Run the checks on one attribution map. effort: a key of EFFORTS. Same seed, same result."""
    amount = EFFORTS[effort] if isinstance(effort, str) else effort
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    details: dict[str, object] = {}
    for name in CHECKS:
        check: Check = resolved(name)
        result = check(subject, amount, seed, progress)
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

    input_tensor: what was explained. effort: a key of EFFORTS. truth: (h, w) bool, for
    localisation. placement: for the padding check. preprocessing: that made the input; by default
    the explainer's. unchanged: the network is known to be as it was when it was explained. Returns,
    ready for the statistics, the figures of METRICS (None where one does not apply) and under
    `evaluation` what they were taken from.
    """
    if effort not in EFFORTS:
        raise InputError(f'unknown evaluate "{effort}" (choose from {", ".join(EFFORTS)})')
    started = time.perf_counter()
    subject = subject_of(ig, input_tensor, explanation, truth, placement, seed, preprocessing)
    with ig.engine.running(subject.x, ig.facts.state if unchanged else None):
        result = evaluate(subject, effort, seed, progress)
    details = {'effort': effort, 'seconds': time.perf_counter() - started, **result.details}
    return {**result.metrics, 'evaluation': details}
