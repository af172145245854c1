"""How far can an attribution map be trusted? Checks for any map of any segmentation network.

A heatmap convinces whether or not it is true, so each check has something to fail against:

- deletion and insertion curves beside those of a random map and of the image's edges;
- the map of a network whose weights are redrawn layer by layer (it should change);
- the map of the image under a little noise, and against other baselines (it should not);
- what the map says a patch is worth against what removing the patch really does (infidelity);
- where the map lies: inside masks, how far from the target, in the rim and the padding.

Arrays are NumPy, at model resolution; a *relevance* is a map (H, W). `evaluate` runs all checks on
one `Subject`, which may hold the map of any tool. METRICS defines every number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.ndimage import distance_transform_edt
from scipy.stats import rankdata
from skimage.metrics import structural_similarity
from skimage.segmentation import slic
from torch import nn
from tqdm import tqdm

from gradient_engine import Score, segmentation_logits
from segmentation_dataset import Preprocessing

STRONGEST = 0.05  # share of the pixels that "top" means
RIM = 0.05  # width of the outer rim, share of the longer side
NEAR = 0.05  # "near the target": within this share of the longer side
NOISE_RADIUS = 0.02  # of the pixel range: of max-sensitivity's perturbations
BLUR_SIGMA = 0.05  # of the longer side: of the fill and the baseline "blur"
FILL_NOISE = 0.01  # of the pixel range: standard deviation on top of local means
LEAST_CHANGE = 0.01  # of the score by a fill, relative, below which its curve is only noise
SUPERPIXELS = 100
PROFILE_BINS = 48
COMPARED_BASELINES = ('zero', 'blur', 'mean', 'white')
FORWARDS_A_GRADIENT = 3  # a gradient costs about as much as three forward passes


@dataclass(frozen=True)
class Effort:
    """How much work an evaluation does."""

    fills: tuple[str, ...]  # what removed pixels are replaced by, of FILLS
    units: tuple[str, ...]  # what is removed: 'pixel', 'superpixel'
    points: int  # intervals of a curve
    random_maps: int  # that the random control averages over
    patches: int = 0  # removed for infidelity
    stages: int = 0  # of model randomisation
    noisy: int = 0  # noisy images for max-sensitivity
    baselines: int = 0  # whose maps are compared: all of the subject's, if this is not 0
    map_steps: int = 0  # interpolation steps of each map computed for a check

    def forwards(self) -> int:
        """Forward passes of one evaluation."""
        return self.curve_forwards() + (self.patches + 1 if self.patches else 0)

    def curve_forwards(self) -> int:
        """Those of the deletion and insertion curves: ends once, what lies between for each."""
        inner = len(self.units) * 2 * (2 + self.random_maps) * (self.points - 1)
        return 1 + len(self.fills) * (1 + inner)

    def gradients(self) -> int:
        """Gradient evaluations of one evaluation, at most."""
        maps = self.baselines
        maps += self.stages + 1 if self.stages else 0
        maps += self.noisy + 1 if self.noisy else 0
        return 1 + maps * self.map_steps


EFFORTS: dict[str, Effort] = {
    'quick': Effort(fills=('blur',), units=('pixel',), points=10, random_maps=1, patches=20),
    'full': Effort(
        fills=('baseline', 'blur', 'local mean'),
        units=('pixel', 'superpixel'),
        points=10,
        random_maps=2,
        patches=50,
        stages=5,
        noisy=4,
        baselines=len(COMPARED_BASELINES),
        map_steps=8,
    ),
}


@dataclass(frozen=True)
class Metric:
    """The meaning of one number, for the documentation, the page and the tests."""

    definition: str
    range: str
    better: str  # 'higher', 'lower', '' where neither is
    source: str


_ARRAS = 'Arras et al. 2022'
_YEH = 'Yeh et al. 2019'
_PETSIUK = 'Petsiuk et al. 2018'
METRICS: dict[str, Metric] = {
    'deletion_area': Metric(
        'area under the score while pixels are removed, most relevant first; 1 is F(x), 0 the '
        'score of the filled image; mean over fills and units',
        'about 0 to 1', 'lower', _PETSIUK),
    'insertion_area': Metric(
        'the same while pixels are put back into the filled image', 'about 0 to 1', 'higher',
        _PETSIUK),
    'deletion_margin': Metric(
        'deletion area of the better of the two controls (random map, Sobel edges) minus that of '
        'the map', '-1 to 1', 'higher', _PETSIUK),
    'insertion_margin': Metric(
        'insertion area of the map minus that of the better control', '-1 to 1', 'higher',
        _PETSIUK),
    'infidelity': Metric(
        'squared difference of what the map says random patches are worth and what replacing them '
        'by the baseline changes, best scale, relative to the change', '0 to 1', 'lower', _YEH),
    'max_sensitivity': Metric(
        f'largest relative L2 change of the map under uniform noise of {NOISE_RADIUS:.0%} of the '
        'pixel range', '0 and up', 'lower', _YEH),
    'randomised_correlation': Metric(
        'rank correlation of the signed map with that of the network whose weights are all '
        'redrawn', '-1 to 1', 'lower', 'Adebayo et al. 2018'),
    'randomised_ssim': Metric(
        'structural similarity of the two magnitudes', '-1 to 1', 'lower', 'Adebayo et al. 2018'),
    'baseline_correlation': Metric(
        'rank correlation of |attribution| between baselines, median of all pairs', '-1 to 1',
        'higher', 'Sturmfels et al. 2020'),
    'baseline_overlap': Metric(
        f'overlap of the strongest {STRONGEST:.0%} of pixels, median of all pairs', '0 to 1',
        'higher', 'Sturmfels et al. 2020'),
    **{
        f'{name}_in_{where}': Metric(f'{text}{of}', '0 to 1', 'higher', source)
        for where, of in (('prediction', 'the predicted mask'), ('truth', 'the ground truth'))
        for name, text, source in (
            ('mass', 'relevance mass accuracy: share of |attribution| inside ', _ARRAS),
            ('rank', 'relevance rank accuracy: share of the n strongest pixels inside, n being '
             'the size of ', _ARRAS),
            ('pointing', 'pointing game: whether the strongest pixel lies inside ',
             'Zhang et al. 2016'),
            ('top', f'top-k intersection: share of the strongest {STRONGEST:.0%} of pixels '
             'inside ', 'Theiner et al. 2021'),
        )
    },
    **{
        f'{who}_radius_{share}': Metric(
            f'distance from the target within which {share} % of {what} lies, in pixels of the '
            'model input; 0: inside', '0 and up', '', source)
        for who, what, source in (
            ('context', '|attribution|', 'this toolkit'),
            ('receptive', '|gradient of the target at the input|', 'Luo et al. 2016'))
        for share in (50, 90, 95)
    },
    'context_inside': Metric('share of |attribution| inside the target', '0 to 1', '',
                             'this toolkit'),
    'context_near': Metric(
        f'share outside it, but within {NEAR:.0%} of the longer side', '0 to 1', '',
        'this toolkit'),
    'rim_excess': Metric(
        f'share of |attribution| in the outer rim ({RIM:.0%} of the longer side, target '
        'left out) over its share of the area', '0 and up', 'lower', 'this toolkit'),
    'padding_excess': Metric(
        'the same for letterbox padding', '0 and up', 'lower', 'this toolkit'),
}  # fmt: skip


def plain_map(
    network: Callable[[torch.Tensor], object],
    x: torch.Tensor,
    baseline: torch.Tensor,
    target: Score,
    steps: int,
) -> np.ndarray:
    """Integrated Gradients (3, H, W) by the midpoint rule, for comparing maps of the same steps."""
    total = torch.zeros_like(x)
    for step in range(steps):
        point = torch.lerp(baseline, x, (step + 0.5) / steps).detach().requires_grad_()
        with torch.enable_grad():
            score = target(segmentation_logits(network(point))).sum()
            total += torch.autograd.grad(score, point)[0]
    return (total * (x - baseline) / steps)[0].cpu().numpy()


@dataclass(frozen=True)
class Subject:
    """An attribution map, and the network, input and target that it explains.

    `method` makes further maps for the checks that need them: (network, x, baseline, target,
    steps), as `plain_map` takes them, -> (3, H, W).
    """

    attributions: np.ndarray  # (3, H, W), signed, in units of the score where the tool has any
    network: nn.Module  # (N, 3, H, W) -> logits; in evaluation mode, no parameter gradients
    target: Score  # logits (N, C, h, w) -> (N,)
    x: torch.Tensor  # (1, 3, H, W), normalised, on the network's device
    baseline: torch.Tensor  # the same
    preprocessing: Preprocessing
    region: np.ndarray  # (H, W) bool: the target region
    prediction: np.ndarray  # (H, W) bool: the predicted mask
    truth: np.ndarray | None = None  # (H, W) bool
    content: np.ndarray | None = None  # (H, W) bool: not letterbox padding; None: all of it
    others: dict[str, np.ndarray] = field(default_factory=dict)  # baselines (H, W, 3), 0-255
    batch: int = 1  # images that go through the network at once
    run: Callable[[torch.Tensor], torch.Tensor] | None = None  # a faster way to the same logits
    method: Callable[..., np.ndarray] = plain_map  # that made the map

    def logits(self, points: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, C, h, w)."""
        return segmentation_logits((self.run or self.network)(points))

    @cached_property
    def pixels(self) -> np.ndarray:
        """The image, (H, W, 3) float32, 0-255."""
        return self.preprocessing.to_pixels(self.x)

    @cached_property
    def baseline_pixels(self) -> np.ndarray:
        """The baseline, (H, W, 3) float32, 0-255."""
        return self.preprocessing.to_pixels(self.baseline)

    @cached_property
    def blurred(self) -> np.ndarray:
        """The image under a strong Gaussian blur, (H, W, 3) float32, 0-255."""
        return strong_blur(self.pixels)

    @cached_property
    def signed(self) -> np.ndarray:
        """(H, W) float64: the map, summed over the channels."""
        return self.attributions.sum(axis=0, dtype=np.float64)

    @cached_property
    def magnitude(self) -> np.ndarray:
        """(H, W) float64: |attribution|, summed over the channels."""
        return np.abs(self.attributions).sum(axis=0, dtype=np.float64)

    def scores(self, images: Iterator[np.ndarray], bar: tqdm) -> list[float]:
        """The target score of images (H, W, 3) in pixel space."""
        found: list[float] = []
        waiting: list[torch.Tensor] = []

        def flush() -> None:
            with torch.no_grad():
                found.extend(self.target(self.logits(torch.cat(waiting)).float()).tolist())
            bar.update(len(waiting))
            waiting.clear()

        for image in images:
            waiting.append(self.preprocessing.normalise(image).to(self.x))
            if len(waiting) == self.batch:
                flush()
        if waiting:
            flush()
        return found


@dataclass(frozen=True)
class Evaluation:
    """What the checks found; numbers that do not apply are None."""

    metrics: dict[str, float | None]  # the names of METRICS
    details: dict[str, object] = field(default_factory=dict)  # curves, stages, tables, profile


def evaluate(
    subject: Subject, effort: str | Effort = 'full', seed: int = 0, progress: bool = False
) -> Evaluation:
    """Run the checks on one attribution map. effort: a key of EFFORTS. Same seed, same result."""
    work = EFFORTS[effort] if isinstance(effort, str) else effort
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    details: dict[str, object] = {}
    for where, mask in (('prediction', subject.prediction), ('truth', subject.truth)):
        if mask is not None:
            found = localisation(subject.magnitude, mask)
            metrics |= {f'{name}_in_{where}': value for name, value in found.items()}
    metrics |= edge_excess(subject.magnitude, subject.region, subject.content)
    checks: list[Callable[[Subject, Effort, int, bool], Evaluation]] = [context, curves]
    checks += [infidelity_check] if work.patches else []
    checks += [randomisation] if work.stages else []
    checks += [noise_sensitivity] if work.noisy else []
    checks += [baseline_agreement] if work.baselines and subject.others else []
    for check in checks:
        result = check(subject, work, seed, progress)
        metrics |= result.metrics
        details |= result.details
    return Evaluation(metrics, details)


def _bar(name: str, total: int, progress: bool, unit: str = 'image') -> tqdm:
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=not progress)


# --------------------------------------------------------------------------- comparing two maps


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Spearman's rank correlation of two arrays of one shape; None where one is constant."""
    ranks = [rankdata(values, axis=None) for values in (one, other)]
    centred = [values - values.mean() for values in ranks]
    size = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else None


def similarity(one: np.ndarray, other: np.ndarray) -> float | None:
    """Structural similarity of two non-negative maps, each scaled to a maximum of 1; None where
    one is all zero or smaller than the window of 7 pixels."""
    if not (one.max() > 0 and other.max() > 0) or min(one.shape) < 7:
        return None
    return float(structural_similarity(one / one.max(), other / other.max(), data_range=1.0))


def top_overlap(one: np.ndarray, other: np.ndarray, share: float = STRONGEST) -> float | None:
    """Share that the strongest pixels of two maps have in common; None where one is constant."""
    if one.max() == one.min() or other.max() == other.min():
        return None
    count = max(1, round(share * one.size))
    tops = [set(np.argsort(-m, axis=None, kind='stable')[:count].tolist()) for m in (one, other)]
    return len(tops[0] & tops[1]) / count


# --------------------------------------------------------------------------- localisation


def localisation(relevance: np.ndarray, mask: np.ndarray) -> dict[str, float | None]:
    """Mass and rank accuracy, pointing game and top-k intersection of a map (H, W) >= 0.

    None for an empty mask or an all-zero map. Where pixels tie, each counts in part, so that a
    constant map gets the mask's share of the area, whatever the order of the pixels.
    """
    total = relevance.sum()
    if not mask.any() or not total > 0:
        return dict.fromkeys(('mass', 'rank', 'pointing', 'top'))
    return {
        'mass': float(relevance[mask].sum() / total),
        'rank': _share_of_top(relevance, mask, int(mask.sum())),
        'pointing': _share_of_top(relevance, mask, 1),
        'top': _share_of_top(relevance, mask, max(1, round(STRONGEST * mask.size))),
    }


def _share_of_top(relevance: np.ndarray, mask: np.ndarray, count: int) -> float:
    """The share of the `count` most relevant pixels that lie in a mask; ties in part."""
    least = np.partition(relevance, relevance.size - count, axis=None)[relevance.size - count]
    above, tied = relevance > least, relevance == least
    hits = mask[above].sum() + (count - above.sum()) * mask[tied].mean()
    return float(hits / count)


def edge_excess(
    magnitude: np.ndarray, region: np.ndarray, content: np.ndarray | None = None
) -> dict[str, float | None]:
    """How much more attribution than area the outer rim and the padding hold; 1: just as much.

    The rim is that of the image proper (`content`), without the target region, which may touch
    the border with good reason. None where there is no such pixel, or no attribution.
    """
    height, width = magnitude.shape
    content = np.ones_like(region) if content is None else content
    wide = max(1, round(RIM * max(height, width)))
    inner = cv2.erode(
        np.pad(content, 1).astype(np.uint8), np.ones((2 * wide + 1,) * 2, np.uint8)
    )[1:-1, 1:-1].astype(bool)  # fmt: skip
    return {
        'rim_excess': _excess(magnitude, content & ~inner & ~region),
        'padding_excess': _excess(magnitude, ~content),
    }


def _excess(magnitude: np.ndarray, mask: np.ndarray) -> float | None:
    total = magnitude.sum()
    return float(magnitude[mask].sum() / total / mask.mean()) if total > 0 and mask.any() else None


# --------------------------------------------------------------------------- context profile


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
    field = gradient[0].abs().sum(dim=0).double().cpu().numpy()
    distance = signed_distance(subject.region)
    metrics: dict[str, float | None] = {}
    profiles = {}
    for who, values in (('context', subject.magnitude), ('receptive', field)):
        radii = holding_radii(values, distance, (50, 90, 95))
        metrics |= {f'{who}_radius_{share}': radius for share, radius in radii.items()}
        profiles[who] = profile(values, distance)
    total = subject.magnitude.sum()
    near = (distance > 0) & (distance <= NEAR * max(distance.shape))
    for name, mask in (('context_inside', distance <= 0), ('context_near', near)):
        metrics[name] = float(subject.magnitude[mask].sum() / total) if total > 0 else None
    return Evaluation(
        metrics,
        {
            'profile': {
                'distances': profiles['context'][0],
                'attribution': profiles['context'][1],
                'receptive_field': profiles['receptive'][1],
            }
        },
    )


def signed_distance(region: np.ndarray) -> np.ndarray:
    """Distance (H, W) of every pixel from the border of a region that is not empty, in pixels:
    positive outside, 0 or below inside."""
    outside = distance_transform_edt(~region)
    return outside if region.all() else outside - (distance_transform_edt(region) - 1) * region


def holding_radii(
    magnitude: np.ndarray, distance: np.ndarray, shares: Sequence[int]
) -> dict[int, float | None]:
    """The distance from the target within which each share (in per cent) of a map lies."""
    total = magnitude.sum()
    if not total > 0:
        return dict.fromkeys(shares)
    outwards = np.maximum(distance, 0).ravel()
    order = np.argsort(outwards, kind='stable')
    held = np.cumsum(magnitude.ravel()[order])
    rows = [np.searchsorted(held, share / 100 * total * (1 - 1e-12)) for share in shares]
    return {
        share: float(outwards[order[min(row, len(order) - 1)]])
        for share, row in zip(shares, rows, strict=True)
    }


def profile(magnitude: np.ndarray, distance: np.ndarray) -> tuple[list[float], list[float | None]]:
    """Mean of a map over pixels at equal distance: the middle of each bin of distances, and the
    mean there relative to the mean of all pixels (None where the map is all zero)."""
    edges = np.linspace(distance.min() - 0.5, distance.max() + 0.5, PROFILE_BINS + 1)
    pixels = np.histogram(distance, edges)[0]
    held = np.histogram(distance, edges, weights=magnitude)[0]
    mean = magnitude.mean()
    full = pixels > 0
    values = held[full] / pixels[full] / mean if mean > 0 else [None] * int(full.sum())
    return ((edges[:-1] + edges[1:]) / 2)[full].tolist(), list(map(_number, values))


def _number(value: object) -> float | None:
    return None if value is None else float(value)


# --------------------------------------------------------------------------- deletion, insertion
#
# A fill is an image for the pixels that were removed: (subject, removed (H, W) bool, random
# generator) -> (H, W, 3) float32, 0-255, of which only the removed pixels are used.


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
    """Values (H, W, 3) where known, elsewhere interpolated from the means of the known ones at
    half the resolution, and so on. At least one must be known."""
    if known.all():
        return values
    height, width = known.shape
    half = ((width + 1) // 2, (height + 1) // 2)
    weight = cv2.resize(known.astype(np.float32), half, interpolation=cv2.INTER_AREA)
    total = cv2.resize(values * known[..., None], half, interpolation=cv2.INTER_AREA)
    means = total / np.maximum(weight, 1e-6)[..., None]
    coarse = local_means(means, weight > 0)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(known[..., None], values, smooth)


FILLS: dict[str, Callable[..., np.ndarray]] = {
    'baseline': fill_with_baseline,
    'blur': fill_with_blur,
    'local mean': fill_with_local_mean,
}


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
    """SLIC superpixels of an image (H, W, 3) 0-255: labels (H, W)."""
    return slic(pixels / 255, n_segments=SUPERPIXELS, compactness=10, start_label=0)


def strong_blur(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) under a Gaussian blur of 5 % of its longer side."""
    return cv2.GaussianBlur(pixels, (0, 0), BLUR_SIGMA * max(pixels.shape[:2]))


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Strength of the Sobel gradient (H, W) of an image (H, W, 3), on its grey values."""
    grey = pixels.mean(axis=2).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


@dataclass(frozen=True)
class Curve:
    """A deletion or insertion curve: relative score against the share of pixels changed."""

    shares: list[float]  # rising from 0 to 1
    scores: list[float | None]  # 1: as on the image; 0: as on the filled image

    @property
    def area(self) -> float | None:
        """Under the curve; None where the scores of image and filled image hardly differ."""
        if self.scores[0] is None:
            return None
        return float(trapezoid(self.scores, self.shares))


def mean_curve(several: Sequence[Curve]) -> Curve:
    """The mean of curves, at the mean of their shares."""
    shares = np.mean([curve.shares for curve in several], axis=0).tolist()
    if several[0].scores[0] is None:
        return Curve(shares, several[0].scores)
    return Curve(shares, np.mean([curve.scores for curve in several], axis=0).tolist())


def curves(subject: Subject, work: Effort, seed: int = 0, progress: bool = False) -> Evaluation:
    """Deletion and insertion of the map and its controls, by every unit and fill.

    Pixels go in the order of |attribution|: what pulls a logit down can carry the mask as well as
    what lifts it, and without it the network answers something else altogether.
    """
    rng = np.random.default_rng(seed)
    pixels = subject.pixels
    maps = {'attribution': [subject.magnitude], 'edges': [edge_map(pixels)]}
    maps['random'] = [rng.random(subject.signed.shape) for _ in range(work.random_maps)]
    rows, found = [], {'deletion': {name: [] for name in maps}}
    found['insertion'] = {name: [] for name in maps}
    segments = {unit: superpixels(pixels) if unit == 'superpixel' else None for unit in work.units}
    with _bar('deletion and insertion', work.curve_forwards(), progress) as bar:
        (full,) = subject.scores(iter([pixels]), bar)
        for fill in work.fills:
            everything = np.ones(pixels.shape[:2], bool)
            (empty,) = subject.scores(iter([without(subject, fill, everything, rng)]), bar)
            for unit in work.units:
                orders = {
                    name: [removal_order(relevance, segments[unit], rng) for relevance in several]
                    for name, several in maps.items()
                }
                for kind in found:
                    row = {}
                    for name, several in orders.items():
                        walk = [
                            _curve(subject, order, kind, fill, (full, empty), work.points, rng, bar)
                            for order in several
                        ]
                        row[name] = mean_curve(walk)
                        found[kind][name].append(row[name].area)
                    rows.append({'kind': kind, 'fill': fill, 'unit': unit} | {
                        name: {'shares': curve.shares, 'scores': curve.scores, 'area': curve.area}
                        for name, curve in row.items()
                    })  # fmt: skip
    return Evaluation(_curve_metrics(found), {'curves': rows})


def without(
    subject: Subject, fill: str, removed: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The image (H, W, 3) with the removed pixels (H, W) bool replaced by a fill."""
    return np.where(removed[..., None], FILLS[fill](subject, removed, rng), subject.pixels)


def _curve(
    subject: Subject,
    order: np.ndarray,
    kind: str,
    fill: str,
    ends: tuple[float, float],
    points: int,
    rng: np.random.Generator,
    bar: tqdm,
) -> Curve:
    """One curve; `ends`: the scores of the image and of the filled image, which are known."""
    full, empty = ends
    touched = [order < point / points for point in range(1, points)]
    removed = touched if kind == 'deletion' else [~gone for gone in touched]
    inner = subject.scores((without(subject, fill, gone, rng) for gone in removed), bar)
    scores = [full, *inner, empty] if kind == 'deletion' else [empty, *inner, full]
    shares = [0.0, *(float(gone.mean()) for gone in touched), 1.0]
    change = full - empty
    if abs(change) <= LEAST_CHANGE * max(abs(full), abs(empty), 1e-6):
        return Curve(shares, [None] * len(shares))
    return Curve(shares, [(score - empty) / change for score in scores])


def _curve_metrics(found: dict[str, dict[str, list[float | None]]]) -> dict[str, float | None]:
    """Mean areas of the map, and its margins over the better control."""
    metrics: dict[str, float | None] = {}
    for kind, by_map in found.items():
        known = {
            name: [area for area in areas if area is not None] for name, areas in by_map.items()
        }
        if not known['attribution']:
            continue
        mean = {name: float(np.mean(areas)) for name, areas in known.items()}
        controls = (mean['random'], mean['edges'])
        metrics[f'{kind}_area'] = mean['attribution']
        metrics[f'{kind}_margin'] = (
            min(controls) - mean['attribution']
            if kind == 'deletion'
            else mean['attribution'] - max(controls)
        )
    return metrics


# --------------------------------------------------------------------------- infidelity


def infidelity(predicted: np.ndarray, actual: np.ndarray) -> float | None:
    """Normalised infidelity (Yeh et al. 2019, with the best scale): 0 is perfect, 1 as bad as an
    all-zero map. predicted, actual: change of the score by each perturbation. None where nothing
    changes the score."""
    size = (actual**2).sum()
    if not size > 0:
        return None
    square = (predicted**2).sum()
    scale = (predicted * actual).sum() / square if square > 0 else 0.0
    return float(((scale * predicted - actual) ** 2).sum() / size)


def infidelity_check(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Infidelity over random rectangles that are replaced by the baseline."""
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


# --------------------------------------------------------------------------- model randomisation


def randomisation(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Compare the map with those of copies of the network whose weights are redrawn, from the
    head down (cascading randomisation, Adebayo et al. 2018).

    A layer's weights are drawn from the normal distribution of its own mean and deviation, so
    that signals keep their size and only what was learned is lost.
    """
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(subject.network).eval().requires_grad_(False)
    layers = [module for module in network.modules() if [*own_weights(module)]][::-1]
    if not layers:
        return Evaluation({})
    cuts = np.unique(np.linspace(1, len(layers), min(work.stages, len(layers))).astype(int))
    arguments = (subject.x, subject.baseline, subject.target, work.map_steps)
    before = subject.method(network, *arguments)
    stages = []
    with _bar('model randomisation', len(cuts), progress, 'stage') as bar:
        done = 0
        for cut in cuts:
            for layer in layers[done:cut]:
                redraw(layer, generator)
            done = int(cut)
            stages.append(
                {'layers': done, 'of': len(layers)}
                | _survival(before, subject.method(network, *arguments))
            )
            bar.update()
    last = stages[-1]
    return Evaluation(
        {'randomised_correlation': last['correlation'], 'randomised_ssim': last['ssim']},
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
    """How much of a map (3, H, W) is left in another."""
    if not np.isfinite(after).all():
        return {'correlation': None, 'ssim': None}
    return {
        'correlation': rank_correlation(before.sum(axis=0), after.sum(axis=0)),
        'ssim': similarity(np.abs(before).sum(axis=0), np.abs(after).sum(axis=0)),
    }


def max_sensitivity(reference: np.ndarray, perturbed: Sequence[np.ndarray]) -> float | None:
    """Largest relative L2 change of a map (Yeh et al. 2019); None for an all-zero map."""
    size = np.linalg.norm(reference)
    if not size > 0:
        return None
    return float(max(np.linalg.norm(other - reference) for other in perturbed) / size)


def noise_sensitivity(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Max-sensitivity of the method under small uniform noise on the image."""
    rng = np.random.default_rng(seed)
    maps = []
    with _bar('noise', work.noisy + 1, progress, 'map') as bar:
        for number in range(work.noisy + 1):
            radius = 255 * NOISE_RADIUS if number else 0.0  # the first is the image itself
            noise = rng.uniform(-radius, radius, subject.pixels.shape)
            noisy = subject.preprocessing.normalise(subject.pixels + noise.astype(np.float32))
            maps.append(
                subject.method(subject.logits, noisy.to(subject.x), subject.baseline,
                               subject.target, work.map_steps)
            )  # fmt: skip
            bar.update()
    return Evaluation({'max_sensitivity': max_sensitivity(maps[0], maps[1:])})


def baseline_agreement(
    subject: Subject, work: Effort, seed: int = 0, progress: bool = False
) -> Evaluation:
    """Rank correlation and top overlap of |attribution| between baselines, pair by pair."""
    maps = {}
    with _bar('baselines', len(subject.others), progress, 'map') as bar:
        for name, image in subject.others.items():
            baseline = subject.preprocessing.normalise(image).to(subject.x)
            found = subject.method(
                subject.logits, subject.x, baseline, subject.target, work.map_steps
            )
            maps[name] = np.abs(found).sum(axis=0)
            bar.update()
    pairs = [
        {
            'one': one,
            'other': other,
            'correlation': rank_correlation(maps[one], maps[other]),
            'overlap': top_overlap(maps[one], maps[other]),
        }
        for number, one in enumerate(maps)
        for other in list(maps)[number + 1 :]
    ]
    return Evaluation(
        {f'baseline_{key}': _median(pair[key] for pair in pairs)
         for key in ('correlation', 'overlap')},
        {'baselines': pairs},
    )  # fmt: skip


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
