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
one `Subject`, which may hold the map of any tool. METRICS defines every number.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, combinations, product
from typing import Protocol

import cv2
import numpy as np
import torch
from skimage.segmentation import slic
from torch import nn
from tqdm import tqdm

from attribution_path import Score, plain_map, segmentation_logits
from errors import InputError
from explanation import GIVEN, Explanation
from gradient_engine import GradientEngine, View
from image_statistics import FAR, METRICS, NEAR, NOISE_RADIUS, contrast
from map_metrics import (
    Curve,
    edge_excess,
    has_one_sign,
    holding_radii,
    infidelity,
    known_mean,
    known_median,
    linear_correlation,
    localisation,
    max_sensitivity,
    mean_curve,
    profile,
    rank_correlation,
    signed_distance,
    similarity,
    top_overlap,
)
from segmentation_dataset import Placement, Preprocessing, resized, strong_blur

FILL_NOISE = 0.01  # of the pixel range: standard deviation on top of local means
LEAST_CHANGE = 0.01  # of the score by a fill, relative, below which its curve is only noise
BEYOND = 1.0  # ranges beyond 0 and 1 that a curve may leave them by, before its fill is not counted
BROAD = 0.02  # of the longer side: sigma of the blur that leaves a map's broad features
SUPERPIXELS = 100
SPOT_SIDES = (0.08, 0.16)  # of the longer side: sides of the squares that a spot is looked for in
COMPARED_BASELINES = ('zero', 'blur', 'mean', 'white')
FORWARDS_A_GRADIENT = 3  # a gradient costs about as much as three forward passes
RADIUS_SHARES = (50, 90, 95)  # per cent of a map that a radius holds


@dataclass(frozen=True)
class Effort:
    """How much work an evaluation does."""

    fills: tuple[str, ...]  # what removed pixels are replaced by, of FILLS
    units: tuple[str, ...]  # what is removed: 'pixel', 'superpixel'
    points: int  # intervals of a curve
    displaced: int  # copies of the map in the wrong place, that this control averages over
    random_maps: int  # that the random control averages over
    patches: int = 0  # removed for infidelity
    stages: int = 0  # of model randomisation
    noisy: int = 0  # noisy images for max-sensitivity
    baselines: int = 0  # whose maps are compared: all of the subject's, if this is not 0
    map_steps: int = 0  # interpolation steps of each map computed for a check

    def forwards(self) -> int:
        """Forward passes of one evaluation."""
        patches = self.patches + 1 if self.patches else 0
        return self.curve_forwards() + patches + 2 + len(SPOT_SIDES)

    def curve_forwards(self) -> int:
        """Those of the deletion and insertion curves: ends once, what lies between for each."""
        maps = 2 + self.displaced + self.random_maps
        inner = len(self.units) * 2 * maps * (self.points - 1)
        return 1 + len(self.fills) * (1 + inner)

    def gradients(self) -> int:
        """Gradient evaluations of one evaluation, at most."""
        maps = self.baselines
        maps += self.stages + 1 if self.stages else 0
        maps += self.noisy + 1 if self.noisy else 0
        return 1 + maps * self.map_steps


EFFORTS: dict[str, Effort] = {
    'quick': Effort(
        fills=('local mean',),
        units=('superpixel',),
        points=4,
        displaced=2,
        random_maps=1,
        patches=16,
        stages=1,
        map_steps=4,
    ),
    'full': Effort(
        fills=('baseline', 'blur', 'local mean'),
        units=('pixel', 'superpixel'),
        points=6,
        displaced=3,
        random_maps=2,
        patches=50,
        stages=5,
        noisy=4,
        baselines=len(COMPARED_BASELINES),
        map_steps=8,
    ),
}


def evaluation_cost(effort: str) -> str:
    """What the checks of an effort will cost for each image and target, in words."""
    work = EFFORTS[effort]
    steps = work.gradients() + work.forwards() / FORWARDS_A_GRADIENT
    return (
        f'--evaluate {effort}: {work.forwards()} forward passes and '
        f'{work.gradients()} gradients for each image and target, about as much work as '
        f'{steps:.0f} more interpolation steps'
    )


# --------------------------------------------------------------------------- what is checked


@dataclass(frozen=True)
class Subject:
    """An attribution map, and the network, input and target that it explains.

    `method` makes further maps for the checks that need them: (network, x, baseline, target,
    steps), as `plain_map` takes them, -> (C, H, W).
    """

    attributions: np.ndarray  # (C, H, W), signed, in units of the score where the tool has any
    network: nn.Module  # (N, C, H, W) -> logits; in evaluation mode, no parameter gradients
    target: Score  # logits (N, K, h, w) -> (N,)
    x: torch.Tensor  # (1, C, H, W), normalised, on the network's device
    baseline: torch.Tensor  # the same
    preprocessing: Preprocessing
    region: np.ndarray  # (H, W) bool: the target region
    prediction: np.ndarray  # (H, W) bool: the predicted mask
    truth: np.ndarray | None = None  # (H, W) bool
    counted: np.ndarray | None = None  # (H, W) bool: where it counts; None: everywhere
    content: np.ndarray | None = None  # (H, W) bool: not letterbox padding; None: all of it
    others: dict[str, np.ndarray] = field(default_factory=dict)  # baselines (H, W, C), 0-255
    batch: int = 1  # images that go through the network at once
    run: Callable[[torch.Tensor], torch.Tensor] | None = None  # a faster way to the same logits,
    # which may be zero where the target does not look
    method: Callable[..., np.ndarray] = plain_map  # that made the map
    settles_early: bool = True  # a few steps give much the same map, so that it is computed afresh

    def logits(self, points: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, K, h, w)."""
        return segmentation_logits((self.run or self.network)(points), points.shape[-2:])

    def map_of(
        self, steps: int, x: torch.Tensor | None = None, baseline: torch.Tensor | None = None
    ) -> np.ndarray:
        """The method's map (C, H, W), of another image or against another baseline if given."""
        x = self.x if x is None else x
        baseline = self.baseline if baseline is None else baseline
        network = NetworkCall(self.logits, self.network)
        return self.method(network, x, baseline, self.target, steps)

    def as_input(self, pixels: np.ndarray) -> torch.Tensor:
        """An image (H, W, C), 0-255, as the network takes it."""
        return self.preprocessing.normalise(pixels).to(self.x)

    @cached_property
    def pixels(self) -> np.ndarray:
        """The image, (H, W, C) float32, 0-255."""
        return self.preprocessing.to_pixels(self.x)

    @cached_property
    def baseline_pixels(self) -> np.ndarray:
        """The baseline, (H, W, C) float32, 0-255."""
        return self.preprocessing.to_pixels(self.baseline)

    @cached_property
    def blurred(self) -> np.ndarray:
        """The image under a strong Gaussian blur, (H, W, C) float32, 0-255."""
        return strong_blur(self.pixels)

    @cached_property
    def signed(self) -> np.ndarray:
        """(H, W) float64: the map, summed over the channels."""
        return self.attributions.sum(axis=0, dtype=np.float64)

    @cached_property
    def magnitude(self) -> np.ndarray:
        """(H, W) float64: |attribution|, summed over the channels."""
        return np.abs(self.attributions).sum(axis=0, dtype=np.float64)

    def stands_out(self, baseline: np.ndarray) -> bool:
        """Whether the target differs from a baseline (H, W, C), 0-255, more than the rest does."""
        difference = np.abs(self.pixels - baseline).sum(axis=2)
        rest = ~(self.region | self.prediction)
        if self.content is not None:
            rest &= self.content
        found = contrast(difference, self.region, rest)
        return found is None or found >= 1

    def scores(self, images: Iterator[np.ndarray], bar: tqdm) -> list[float]:
        """The target score of images (H, W, C) in pixel space."""
        scores: list[float] = []
        waiting: list[torch.Tensor] = []

        def flush() -> None:
            with torch.no_grad():
                scores.extend(self.target(self.logits(torch.cat(waiting)).float()).tolist())
            bar.update(len(waiting))
            waiting.clear()

        for image in images:
            waiting.append(self.as_input(image))
            if len(waiting) == self.batch:
                flush()
        if waiting:
            flush()
        return scores


@dataclass(frozen=True)
class NetworkCall:
    """A network as a method that makes further maps is given it: a function, images (N, C, H, W) ->
    logits; and the module itself, for a method that looks inside."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    module: nn.Module

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        return self.logits(points)


@dataclass(frozen=True)
class LogitsOfTarget:
    """The logits that the target of an explanation looks at, by what the engine computes of it."""

    engine: GradientEngine
    explanation: Explanation

    @cached_property
    def view(self) -> View:
        """Of the target alone; known only while the engine runs."""
        target = (self.explanation.objective,)
        return View(target) if self.explanation.cropping.fell_back else self.engine.view(target)

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        return self.engine.seen(points, self.view)


class Explainer(Protocol):
    """What is asked of `IntegratedGradients`."""

    model: nn.Module
    engine: GradientEngine
    preprocessing: Preprocessing

    def check_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input as (1, C, H, W) on the network's device."""

    def baseline_images(
        self, kind: str, x: torch.Tensor, draws: int = 1, seed: int = 0
    ) -> list[np.ndarray]:
        """The baselines of a kind for an input, as images (H, W, C), 0-255."""


def subject_of(
    ig: Explainer,
    input_tensor: torch.Tensor,
    explanation: Explanation,
    truth: np.ndarray | None = None,
    placement: Placement | None = None,
    seed: int = 0,
) -> Subject:
    """What is checked of an explanation. Arguments: see `evaluate_explanation`."""
    x = ig.check_input(input_tensor)  # (1, C, H, W)
    declared = explanation.method
    kinds = COMPARED_BASELINES if declared.baseline == GIVEN else ()
    content = None if placement is None else placement.content(x.shape[-2:])
    return Subject(
        attributions=explanation.attributions.cpu().numpy(),
        network=ig.engine.model,
        target=explanation.objective,
        x=x,
        baseline=ig.preprocessing.normalise(explanation.baseline_pixels).to(x),
        preprocessing=ig.preprocessing,
        region=explanation.region.numpy(),
        prediction=explanation.predicted_mask.numpy(),
        truth=truth,
        counted=explanation.counted,
        content=content,
        others={kind: ig.baseline_images(kind, x, seed=seed)[0] for kind in kinds},
        batch=ig.engine.step_batch.size,
        run=LogitsOfTarget(ig.engine, explanation),
        method=explanation.again,
        settles_early=declared.settles_early and explanation.draws == 1,
    )


@dataclass(frozen=True)
class Evaluation:
    """What the checks found; numbers that do not apply are missing or None."""

    metrics: dict[str, float | None] = field(default_factory=dict)  # of the names of METRICS
    details: dict[str, object] = field(default_factory=dict)  # curves, stages, tables, profile


# A check of what an evaluation is made of: (subject, how much work, seed, progress) -> what it
# found; nothing where it does not apply.
Check = Callable[[Subject, Effort, int, bool], Evaluation]


def _bar(name: str, total: int, progress: bool, unit: str = 'image') -> tqdm:
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=not progress)


# --------------------------------------------------------------------------- where it lies


def places(subject: Subject, work: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
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


def context(subject: Subject, work: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """How far from the target the map reaches, beside the network's effective receptive field.

    The receptive field is |dF/dx| at the image (Luo et al. 2016): what could matter at once; the
    attribution is what did, compared with the baseline.
    """
    with _bar('context', 1, progress, 'gradient') as bar:
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


# --------------------------------------------------------------------------- deletion, insertion
#
# A fill is an image for the pixels that were removed: (subject, removed (H, W) bool, random
# generator) -> (H, W, C) float32, 0-255, of which only the removed pixels are used.


def fill_with_baseline(
    subject: Subject, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The baseline."""
    return subject.baseline_pixels


def fill_with_blur(subject: Subject, removed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image under a strong blur."""
    return subject.blurred


def fill_with_local_mean(
    subject: Subject, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The mean of the pixels left nearby, and a little noise, so that the shape of what was
    removed is not itself a signal.

    After ROAD (Rong et al. 2022), which solves one linear system for all removed pixels; here
    each is the mean of its surroundings at the finest scale at which any of them are left.
    """
    pixels = subject.pixels
    if removed.all():
        filled = np.broadcast_to(pixels.mean(axis=(0, 1)), pixels.shape)
    else:
        filled = local_means(pixels, ~removed)
    noise = rng.normal(0, 255 * FILL_NOISE, pixels.shape)
    return np.clip(filled + noise, 0, 255).astype(np.float32)


def local_means(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values (H, W, C) where known, elsewhere interpolated from the means of the known ones at
    half the resolution, and so on. At least one must be known."""
    if known.all():
        return values
    height, width = known.shape
    half = ((width + 1) // 2, (height + 1) // 2)
    weight = cv2.resize(known.astype(np.float32), half, interpolation=cv2.INTER_AREA)
    total = resized(values * known[..., None], half, cv2.INTER_AREA)
    means = total / np.maximum(weight, 1e-6)[..., None]
    coarse = local_means(means, weight > 0)
    smooth = resized(coarse, (width, height), cv2.INTER_LINEAR)
    return np.where(known[..., None], values, smooth)


FILLS: dict[str, Callable[..., np.ndarray]] = {
    'baseline': fill_with_baseline,
    'blur': fill_with_blur,
    'local mean': fill_with_local_mean,
}


def without(
    subject: Subject, fill: str, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The image (H, W, C) with the removed pixels (H, W) bool replaced by a fill."""
    return np.where(removed[..., None], FILLS[fill](subject, removed, rng), subject.pixels)


def removal_order(
    relevance: np.ndarray, segments: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """When each pixel goes: the share of the image (0 up to, not including, 1) gone before it.

    relevance: (H, W), highest first; ties are broken at random, so that a constant map is no order.
    segments: (H, W) labels of superpixels that go as one, by their mean relevance; None: pixels.
    """
    if segments is None:
        segments = np.arange(relevance.size).reshape(relevance.shape)
    labels, inverse, sizes = np.unique(segments, return_inverse=True, return_counts=True)
    means = np.bincount(inverse.ravel(), relevance.ravel()) / sizes
    order = np.lexsort((rng.random(len(labels)), -means))
    before = np.empty(len(labels))
    before[order] = np.concatenate(([0], np.cumsum(sizes[order])[:-1])) / relevance.size
    return before[inverse].reshape(relevance.shape)


def superpixels(pixels: np.ndarray) -> np.ndarray:
    """SLIC superpixels of an image (H, W, C) 0-255: labels (H, W)."""
    return slic(pixels / 255, n_segments=SUPERPIXELS, compactness=10, start_label=0,
                channel_axis=-1)  # fmt: skip


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Strength of the Sobel gradient (H, W) of an image (H, W, C), on its grey values."""
    grey = pixels.mean(axis=2).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def displaced(relevance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A map (H, W) in the wrong place: mirrored and moved around by a quarter to three quarters of
    each side, so that it keeps its texture and loses its meaning."""
    mirrored = relevance[:: rng.choice((-1, 1)), ::-1]
    steps = [int(side * rng.uniform(0.25, 0.75)) for side in relevance.shape]
    return np.roll(mirrored, steps, axis=(0, 1))


def curves(subject: Subject, work: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Deletion and insertion of the map and its controls, by every unit and fill.

    Pixels go in the order of |attribution|: what pulls a logit down can carry the mask as well as
    what lifts it, and without it the network answers something else altogether.
    """
    rng = np.random.default_rng(seed)
    pixels = subject.pixels
    maps = {'attribution': [subject.magnitude], 'edges': [edge_map(pixels)]}
    maps['displaced'] = [displaced(subject.magnitude, rng) for _ in range(work.displaced)]
    maps['random'] = [rng.random(subject.signed.shape) for _ in range(work.random_maps)]
    segments = {unit: superpixels(pixels) if unit == 'superpixel' else None for unit in work.units}
    everything = np.ones(pixels.shape[:2], bool)
    rows = []
    with _bar('deletion and insertion', work.curve_forwards(), progress) as bar:
        (full,) = subject.scores(iter([pixels]), bar)
        empty: dict[str, float] = {}  # the score of the image that is all fill
        for fill, unit in product(work.fills, work.units):
            if fill not in empty:
                (empty[fill],) = subject.scores(
                    iter([without(subject, fill, everything, rng)]), bar
                )
            orders = {
                name: [removal_order(relevance, segments[unit], rng) for relevance in several]
                for name, several in maps.items()
            }
            for kind in ('deletion', 'insertion'):
                ends = (full, empty[fill])
                draw = partial(_curve, subject, kind, fill, ends, work.points, rng, bar)
                row = {name: mean_curve(list(map(draw, several)))
                       for name, several in orders.items()}  # fmt: skip
                sane = stays_between(row['random'])
                rows.append({'kind': kind, 'fill': fill, 'unit': unit, 'sane': sane} | row)
    details = [{name: _curve_record(part) for name, part in row.items()} for row in rows]
    return Evaluation(_curve_metrics(rows), {'curves': details})


def _curve(
    subject: Subject,
    kind: str,
    fill: str,
    ends: tuple[float, float],
    points: int,
    rng: np.random.Generator,
    bar: tqdm,
    order: np.ndarray,
) -> Curve:
    """One curve; `ends`: the scores of the image and of the filled image, which are known."""
    full, empty = ends
    touched = [order < point / points for point in range(1, points)]
    removed = touched if kind == 'deletion' else [~gone for gone in touched]
    inner = subject.scores((without(subject, fill, gone, rng) for gone in removed), bar)
    scores = [full, *inner, empty] if kind == 'deletion' else [empty, *inner, full]
    shares = [0.0, *(float(gone.mean()) for gone in touched), 1.0]
    if is_noise(full, empty):
        return Curve(shares, [None] * len(shares))
    return Curve(shares, [(score - empty) / (full - empty) for score in scores])


def is_noise(full: float, empty: float) -> bool:
    """Whether the scores of an image and of the filled image are so near to each other that what
    lies between them is only noise."""
    return abs(full - empty) <= LEAST_CHANGE * max(abs(full), abs(empty), 1e-6)


def stays_between(curve: Curve) -> bool:
    """Whether a fill can tell maps apart: whether the score stays about between that of the image
    (1) and of the filled image (0) while random parts are filled. Where it leaves that range by
    far, the fill itself, not what it hides, drives the score."""
    if None in curve.scores:
        return False
    return min(curve.scores) >= -BEYOND and max(curve.scores) <= 1 + BEYOND


def _curve_record(part: object) -> object:
    if not isinstance(part, Curve):
        return part
    return {'shares': part.shares, 'scores': part.scores, 'area': part.area}


def _curve_metrics(rows: Sequence[dict]) -> dict[str, float | None]:
    """Mean areas of the map over the sane fills and units, and its margins over the controls."""
    metrics: dict[str, float | None] = {}
    for kind in ('deletion', 'insertion'):
        mean = {
            name: known_mean(row[name].area for row in rows if row['kind'] == kind and row['sane'])
            for name in ('attribution', 'displaced', 'random', 'edges')
        }
        if mean['attribution'] is None:
            continue
        sign = -1 if kind == 'deletion' else 1
        metrics[f'{kind}_area'] = mean['attribution']
        metrics[f'{kind}_margin'] = sign * (mean['attribution'] - mean['displaced'])
        others = max(sign * mean[name] for name in ('random', 'edges'))
        metrics[f'{kind}_margin_others'] = sign * mean['attribution'] - others
    return metrics


# --------------------------------------------------------------------------- infidelity


def patches(subject: Subject, work: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Infidelity over random rectangles that are replaced by the baseline."""
    if not work.patches:
        return Evaluation()
    rng = np.random.default_rng(seed)
    masks = [random_patch(subject.region.shape, rng) for _ in range(work.patches)]
    predicted = np.array([subject.signed[mask].sum() for mask in masks])
    with _bar('infidelity', work.patches + 1, progress) as bar:
        (full,) = subject.scores(iter([subject.pixels]), bar)
        changed = subject.scores((without(subject, 'baseline', m, rng) for m in masks), bar)
    return Evaluation({'infidelity': infidelity(predicted, full - np.array(changed))})


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


# --------------------------------------------------------------------------- distant spots


def distant_spots(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
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
    with _bar('distant spots', 1 + len(masks), progress) as bar:
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


# --------------------------------------------------------------------------- model randomisation


def randomisation(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Compute the map afresh in a few steps, which should find it again; and compare it with those
    of copies of the network whose weights are redrawn, from the head down (cascading
    randomisation, Adebayo et al. 2018).

    A layer's weights are drawn from the normal distribution of its own mean and deviation, so
    that signals keep their size and only what was learned is lost.
    """
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(subject.network).eval().requires_grad_(False) if work.stages else None
    layers = [module for module in network.modules() if [*own_weights(module)]] if network else []
    if not layers:
        return Evaluation()
    layers = layers[::-1]
    redrawn = replace(subject, network=network, run=None)
    stages_there = min(work.stages, len(layers))  # a single one redraws all of them
    cuts = np.unique(np.linspace(len(layers), 1, stages_there).astype(int))
    before = redrawn.map_of(work.map_steps)
    stages = []
    with _bar('model randomisation', len(cuts), progress, 'stage') as bar:
        done = 0
        for cut in cuts:
            for layer in layers[done:cut]:
                redraw(layer, generator)
            done = int(cut)
            stages.append(
                {'layers': done, 'of': len(layers)}
                | _survival(before, redrawn.map_of(work.map_steps))
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


def _survival(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
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


# --------------------------------------------------------------------------- noise, baselines


def broad_features(signed: np.ndarray) -> np.ndarray:
    """A signed map (H, W) without its details."""
    return cv2.GaussianBlur(signed, (0, 0), BROAD * max(signed.shape))


def noise_sensitivity(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Max-sensitivity of the method under small uniform noise on the image."""
    if not work.noisy:
        return Evaluation()
    rng = np.random.default_rng(seed)
    maps = []
    with _bar('noise', work.noisy + 1, progress, 'map') as bar:
        for number in range(work.noisy + 1):
            radius = 255 * NOISE_RADIUS if number else 0.0  # the first is the image itself
            noise = rng.uniform(-radius, radius, subject.pixels.shape)
            noisy = subject.as_input(subject.pixels + noise.astype(np.float32))
            maps.append(subject.map_of(work.map_steps, x=noisy))
            bar.update()
    broad = [broad_features(one.sum(axis=0)) for one in maps]
    return Evaluation(
        {
            'max_sensitivity': max_sensitivity(maps[0], maps[1:]),
            'broad_sensitivity': max_sensitivity(broad[0], broad[1:]),
        }
    )


def baseline_agreement(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Rank correlation and top overlap of |attribution| between baselines, pair by pair: of those
    that do not hide the target, since maps against others cannot agree with any."""
    others = {name: image for name, image in subject.others.items() if subject.stands_out(image)}
    if not work.baselines or len(others) < 2:
        return Evaluation()
    maps = {}
    with _bar('baselines', len(others), progress, 'map') as bar:
        for name, image in others.items():
            signed = subject.map_of(work.map_steps, baseline=subject.as_input(image))
            maps[name] = np.abs(signed).sum(axis=0)
            bar.update()
    pairs = [
        {
            'one': one,
            'other': other,
            'correlation': rank_correlation(maps[one], maps[other]),
            'overlap': top_overlap(maps[one], maps[other]),
        }
        for one, other in combinations(maps, 2)
    ]
    medians = {
        f'baseline_{key}': known_median(pair[key] for pair in pairs)
        for key in ('correlation', 'overlap')
    }
    return Evaluation(medians, {'baselines': pairs})


# --------------------------------------------------------------------------- all of them


CHECKS: tuple[Check, ...] = (
    places, context, curves, patches, distant_spots, randomisation, noise_sensitivity,
    baseline_agreement,
)  # fmt: skip


def evaluate(
    subject: Subject, effort: str | Effort = 'full', seed: int = 0, progress: bool = False
) -> Evaluation:
    """Run the checks on one attribution map. effort: a key of EFFORTS. Same seed, same result."""
    work = EFFORTS[effort] if isinstance(effort, str) else effort
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    details: dict[str, object] = {}
    for check in CHECKS:
        result = check(subject, work, seed, progress)
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
) -> dict:
    """Check how far an explanation can be trusted.

    input_tensor: what was explained. effort: a key of EFFORTS. truth: (h, w) bool, for
    localisation. placement: for the padding check. Returns, ready for the statistics, the figures
    of METRICS (None where one does not apply) and under `evaluation` what they were taken from.
    """
    if effort not in EFFORTS:
        raise InputError(f'unknown evaluate "{effort}" (choose from {", ".join(EFFORTS)})')
    started = time.perf_counter()
    subject = subject_of(ig, input_tensor, explanation, truth, placement, seed)
    with ig.engine.running(subject.x):
        result = evaluate(subject, effort, seed, progress)
    details = {'effort': effort, 'seconds': time.perf_counter() - started, **result.details}
    return {**result.metrics, 'evaluation': details}
