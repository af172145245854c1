"""The figures of an explanation: the table `STATISTICS` says what each is and how it is computed.

The statistics file, the columns of a batch's tables, its medians, the page, the printed text and
the tables in docs/ are all made, or checked, from this table; a new figure is a new row. This file
needs no torch, so that processes which only draw and write start quickly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from igseg.explanation import BY_CONSTRUCTION, Explanation
from igseg.maps import FAR, NEAR, NOISE_RADIUS, RIM, STRONGEST, contrast, mask_scores, mean_of

Statistics = dict[str, Any]  # the content of a statistics file, by the names of STATISTICS

# Kinds of figures: types of columns; and lists and dictionaries, which are in no table.
TEXT, WHOLE, NUMBER, TRUTH = 'string', 'Int64', 'float64', 'boolean'
COMPOUND = ''
WORK, RESULT, COST, CHECK, RECORD = 'work', 'result', 'cost', 'check', 'record'  # groups

CLIP_PERCENTILE = 99  # with 100, a few extreme pixels would make the rest of a heatmap black


# --------------------------------------------------------------------------- measured figures


class Measured:
    """An explanation, with the figures that statistics are computed from."""

    def __init__(self, explanation: Explanation, truth: np.ndarray | None) -> None:
        """truth: (H, W) bool, the true pixels of the explained class; None: unknown."""
        self.explanation, self.truth = explanation, truth
        self.mask = explanation.predicted_mask.numpy()  # (H, W) bool

    @cached_property
    def signed(self) -> np.ndarray:
        """(C, H, W) float64: the attributions, in units of the score."""
        return np.asarray(self.explanation.attributions.cpu().double().numpy())

    @cached_property
    def magnitude(self) -> np.ndarray:
        """(H, W) float64: |attribution|, summed over the channels."""
        return np.asarray(np.abs(self.signed).sum(axis=0))

    @cached_property
    def total(self) -> float:
        """The sum of |attribution|."""
        return float(self.magnitude.sum())

    @cached_property
    def inside(self) -> float | None:
        """Mean |attribution| of a predicted pixel."""
        return mean_of(self.magnitude[self.mask])

    @cached_property
    def outside(self) -> float | None:
        """Mean |attribution| of any other pixel."""
        return mean_of(self.magnitude[~self.mask])

    @cached_property
    def counted(self) -> np.ndarray:
        """(H, W) bool: the pixels whose truth counts."""
        counted = self.explanation.counted
        return np.ones(self.mask.shape, bool) if counted is None else counted

    def share_in(self, mask: np.ndarray | None) -> float | None:
        """The share of |attribution| in a mask (H, W) bool."""
        if mask is None or not (self.total and mask.any()):
            return None
        return float(self.magnitude[mask].sum()) / self.total

    @property
    def share_in_truth(self) -> float | None:
        """The share of |attribution| in the truth, relative to that where the truth counts."""
        counted = self.magnitude[self.counted].sum()
        if self.truth is None or not (counted and self.truth.any()):
            return None
        return float(self.magnitude[self.truth].sum() / counted)

    @property
    def ratio(self) -> float | None:
        return self.inside / self.outside if self.inside is not None and self.outside else None

    @cached_property
    def region(self) -> np.ndarray:
        """(H, W) bool: the target region."""
        return np.asarray(self.explanation.region.numpy())

    @cached_property
    def elsewhere(self) -> np.ndarray:
        """(H, W) bool: neither the target region nor another predicted object."""
        return np.asarray(~(self.region | self.mask))

    @property
    def ratio_in_target(self) -> float | None:
        """Mean |attribution| of the target's pixels, divided by that of pixels elsewhere."""
        return contrast(self.magnitude, self.region, self.elsewhere)

    @property
    def on_baseline(self) -> float | None:
        trend = self.explanation.trend
        return trend.mask_iou[0] if trend.alphas and trend.alphas[0] == 0 else None

    @property
    def contrast(self) -> float | None:
        """Mean |x - x'| in the target region, divided by its mean elsewhere."""
        difference = self.explanation.difference
        if difference is None:
            return None
        finite = np.isfinite(difference)
        return contrast(difference, self.region & finite, self.elsewhere & finite)

    @cached_property
    def summed(self) -> np.ndarray:
        """(H, W) float64: |sum over the channels|, to which the uncertainty refers."""
        return np.asarray(np.abs(self.signed.sum(axis=0)))

    @property
    def settled_share(self) -> float | None:
        """The share of `summed` on pixels where it is at least its uncertainty."""
        uncertainty = self.explanation.uncertainty
        if uncertainty is None or not self.summed.any():
            return None
        settled = self.summed >= uncertainty.numpy()
        return float(self.summed[settled].sum() / self.summed.sum())

    @property
    def uncertainty_level(self) -> float | None:
        """The 99th percentile of the uncertainty, divided by that of `summed`."""
        uncertainty = self.explanation.uncertainty
        level = np.percentile(self.summed, CLIP_PERCENTILE)
        if uncertainty is None or not level:
            return None
        return float(np.percentile(uncertainty.numpy(), CLIP_PERCENTILE) / level)

    @property
    def uncertainty_ratio(self) -> float | None:
        """The mean of the uncertainty, divided by that of `summed`."""
        uncertainty = self.explanation.uncertainty
        if uncertainty is None or not self.summed.any():
            return None
        return float(uncertainty.cpu().double().mean()) / float(self.summed.mean())

    @cached_property
    def scores(self) -> dict[str, float | None]:
        """Dice, IoU and pixel accuracy of the predicted mask."""
        if self.truth is None:
            return {'dice': None, 'iou': None, 'pixel_accuracy': None}
        counted = self.counted
        scores = mask_scores(self.mask[counted], self.truth[counted])
        by_label = self.explanation.label_scores
        return scores | ({'pixel_accuracy': by_label.pixel_accuracy} if by_label else {})

    @property
    def class_scores(self) -> dict[str, dict[str, float | None]] | None:
        """Scores of each label, by its number as text."""
        by_label = self.explanation.label_scores
        if by_label is None:
            return None
        return {str(label): scores for label, scores in by_label.scores.items()}

    def class_mean(self, name: str) -> float | None:
        """The mean of a score over all classes in the image, without the background."""
        by_label = self.explanation.label_scores
        if by_label is None:
            return None
        values = [
            value
            for label, scores in by_label.scores.items()
            if label != by_label.background and (value := scores[name]) is not None
        ]
        return sum(values) / len(values) if values else None

    @property
    def channel_shares(self) -> list[float] | None:
        if not self.total:
            return None
        shares: list[float] = (np.abs(self.signed).sum(axis=(1, 2)) / self.total).tolist()
        return shares


def names_of_channels(statistics: Statistics) -> list[str]:
    """The names of the input's channels. Results of earlier versions have no names; their images
    are in colour."""
    return list(statistics.get('channel_names') or ('red', 'green', 'blue'))


def tiles_text(statistics: Statistics) -> str:
    """How an image was cut into tiles; empty for an image in one piece."""
    tiles = statistics.get('tiles')  # missing in older results
    if not tiles:
        return ''
    height, width = tiles['size']
    return (
        f'{tiles["explained"]} of {tiles["count"]} tiles of {width}×{height}, overlap '
        f'{tiles["overlap"]}'
    )


def counts_text(names: Sequence[str], most: int = 3) -> str:
    """A single name; or at most `most` names with their counts, the most frequent first."""
    counts = Counter(names).most_common()
    if len(counts) == 1:
        return counts[0][0]
    parts = [f'{name} ({count})' for name, count in counts[:most]]
    return ', '.join([*parts, *(['…'] if len(counts) > most else [])])


def span_text(numbers: Sequence[int]) -> str:
    """A single number; or the smallest and the largest of several numbers."""
    return ' to '.join(map(str, sorted({min(numbers), max(numbers)}))) if len(numbers) else ''


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Statistic:
    """The meaning of a figure, how it is computed, and where it is shown."""

    meaning: str
    kind: str = NUMBER  # TEXT, WHOLE, NUMBER, TRUTH or COMPOUND
    group: str = RESULT  # WORK, RESULT, COST, CHECK or RECORD
    of: Callable[[Measured], object] | None = None  # None: computed in another part of the program
    unit: str = ''  # '%': a share from 0 to 1, shown as per cent; 'px' of the model input; …
    summarised: bool = False  # whether the summary of a batch has its median
    page: int | None = None  # place in the detail view of the page; None: not shown there
    label: str = ''  # name in the detail view of the page
    heading: str = ''  # of its column in the page's table; empty: no column
    check: str = ''  # the check that measures it with --evaluate, 'package.module:name'
    range: str = ''  # of a check: possible values
    better: str = ''  # of a check: 'higher', 'lower', or '' if neither is better
    source: str = ''  # of a check: where it was published

    @property
    def explanation(self) -> str:
        """The definition of a check in one line."""
        better = self.better and f', better {self.better}'
        return f'{self.meaning} ({self.range}{better}; {self.source})'


def _check(check: str, meaning: str, range: str, better: str, source: str) -> Statistic:
    """A row for a figure that a check measures."""
    return Statistic(meaning, NUMBER, CHECK, summarised=True, check=check, range=range,
                     better=better, source=source)  # fmt: skip


# The checks that measure something.
_CURVES = 'igseg.checks.curves:curves'
_PATCHES = 'igseg.checks.checks:patches'
_NOISE = 'igseg.checks.checks:noise_sensitivity'
_RANDOMISATION = 'igseg.checks.checks:randomisation'
_BASELINES = 'igseg.checks.checks:baseline_agreement'
_PLACES = 'igseg.checks.checks:places'
_CONTEXT = 'igseg.checks.checks:context'
_SPOTS = 'igseg.checks.checks:distant_spots'

# Where the checks were published.
_ARRAS = 'Arras et al. 2022'
_YEH = 'Yeh et al. 2019'
_PETSIUK = 'Petsiuk et al. 2018'
_ADEBAYO = 'Adebayo et al. 2018'
_STURMFELS = 'Sturmfels et al. 2020'

STATISTICS: dict[str, Statistic] = {
    'image': Statistic('name of the image', TEXT, RECORD),
    'target': Statistic('what is explained', TEXT, WORK, lambda m: m.explanation.target),
    'target_area': Statistic('size of the target region', WHOLE, WORK,
        lambda m: int(m.explanation.region.sum()), 'px'),
    'score_type': Statistic('what is averaged over the region: logit or probability', TEXT, WORK,
        lambda m: m.explanation.score_type),
    'method': Statistic('how it is explained', TEXT, WORK, lambda m: m.explanation.method.name),
    'completeness': Statistic(
        'how the sum of the map comes to the change of the score, as the method promises: by the '
        'integral, by construction (so that the gap tells nothing), in expectation', TEXT, WORK,
        lambda m: m.explanation.method.completeness),
    'signed': Statistic('whether a sign of the map means that the score is raised or lowered',
        TRUTH, WORK, lambda m: m.explanation.method.signed),
    'baseline': Statistic('what the image is compared with', TEXT, WORK,
        lambda m: m.explanation.baseline),
    'rule': Statistic('quadrature rule', TEXT, WORK, lambda m: m.explanation.rule),
    'steps': Statistic('interpolation steps for each baseline (the most, where draws differ), or '
        'what else the method takes many of', WHOLE, WORK, lambda m: m.explanation.steps),
    'gradient_evaluations': Statistic(
        'all gradients computed, those of the precision check included', WHOLE, COST,
        lambda m: m.explanation.cost.gradient_evaluations, page=10, label='Gradient evaluations'),
    'forward_passes': Statistic(
        'images through the network, for the prediction and the gradients', WHOLE, COST,
        lambda m: m.explanation.cost.forward_passes),
    'step_batch': Statistic('interpolation steps computed at once', WHOLE, COST,
        lambda m: m.explanation.cost.step_batch),
    'precision': Statistic('type the gradients were computed in', TEXT, WORK,
        lambda m: m.explanation.cost.precision),
    'precision_deviation': Statistic(
        'measured relative L2 deviation of the map from float32, where precision was reduced',
        NUMBER, WORK, lambda m: m.explanation.cost.precision_deviation),
    'seconds': Statistic('time for all targets of the image together', NUMBER, COST,
        lambda m: m.explanation.cost.seconds, 's', True, page=11, label='Seconds'),
    'peak_memory_bytes': Statistic(
        "peak memory so far: of the GPU's tensors, on a CPU of the whole process", WHOLE, COST,
        lambda m: m.explanation.cost.peak_memory_bytes, 'bytes'),
    'score': Statistic("F(x): the target's score on the image", of=lambda m: m.explanation.score,
        unit='score', page=8, label='F(x)'),
    'baseline_score': Statistic("F(x'): its score on the baseline, mean over the draws",
        of=lambda m: m.explanation.baseline_score, unit='score', page=9, label='F(baseline)'),
    'baseline_contrast': Statistic(
        "mean |x - x'| inside the target region by its mean elsewhere, other predicted objects "
        'and padding left out: below 1 the baseline is more like the target than like the rest',
        of=lambda m: m.contrast, summarised=True, page=15, label='Contrast of the target'),
    'target_on_baseline': Statistic(
        'IoU of the predicted mask on the (first) baseline with that on the image',
        of=lambda m: m.on_baseline, unit='%'),
    'attribution_sum': Statistic('sum of the attributions',
        of=lambda m: m.explanation.attribution_sum, unit='score'),
    'promised_sum': Statistic(
        'what that should be: the change of F along the paths; null where the method promises '
        'nothing', of=lambda m: m.explanation.promised_sum, unit='score'),
    'completeness_gap': Statistic(
        'how far the sum of the map misses the change of the score, by that change',
        of=lambda m: m.explanation.completeness_gap, unit='%', summarised=True, page=3,
        label='Completeness gap', heading='Gap'),
    'gap_error': Statistic('standard error of the gap, where baselines are drawn',
        of=lambda m: m.explanation.gap_error, unit='%'),
    'map_error': Statistic('estimated relative L2 error of the map',
        of=lambda m: m.explanation.map_error, unit='%', summarised=True, page=4,
        label='Map error (estimate)', heading='Map error'),
    'gradient_deviation': Statistic(
        "how far the network's gradient misses the change of its score: the median at three places "
        'of the path, or what is missed between its nodes however many there are', unit='%',
        of=lambda m: m.explanation.gradient_deviation),
    'gradient_cause': Statistic('why, where the gradient misses much', COMPOUND,
        of=lambda m: m.explanation.gradient_cause),
    'settled_share': Statistic(
        'share of |attribution|, summed over channels with its sign, on pixels where it is at '
        'least its uncertainty', of=lambda m: m.settled_share, unit='%', summarised=True,
        page=5, label='Share of |attribution| whose sign is settled'),
    'uncertainty_level': Statistic(
        f'{CLIP_PERCENTILE}th percentile of the uncertainty by that of the |attribution| it is of',
        of=lambda m: m.uncertainty_level, unit='%'),
    'uncertainty_ratio': Statistic(
        'mean uncertainty (of drawn baselines: standard error) of a pixel by the mean of the '
        '|attribution| it is of', of=lambda m: m.uncertainty_ratio, unit='%'),
    'within_tolerance': Statistic('whether map error and gap are below the tolerance', TRUTH,
        of=lambda m: m.explanation.within_tolerance),
    'attribution_mean': Statistic('mean of the signed attributions, all pixels and channels',
        of=lambda m: m.signed.mean(), unit='score'),
    'attribution_std': Statistic('their standard deviation', of=lambda m: m.signed.std(),
        unit='score'),
    'attribution_min': Statistic('the lowest of them', of=lambda m: m.signed.min(), unit='score'),
    'attribution_max': Statistic('the highest of them', of=lambda m: m.signed.max(), unit='score'),
    'attribution_ratio': Statistic(
        'mean |attribution| (summed over channels) inside the predicted mask by its mean outside',
        of=lambda m: m.ratio, summarised=True, page=2, label='Attribution ratio',
        heading='Ratio'),
    'attribution_in_prediction': Statistic('mean |attribution| inside the predicted mask',
        of=lambda m: m.inside, unit='score'),
    'attribution_in_background': Statistic('mean |attribution| outside it',
        of=lambda m: m.outside, unit='score'),
    'attribution_ratio_in_target': Statistic(
        'mean |attribution| inside the target region by its mean elsewhere, other predicted '
        'objects left out', of=lambda m: m.ratio_in_target, summarised=True, page=13,
        label='Attribution ratio of the target'),
    'share_in_target': Statistic('share of |attribution| that lies in the target region',
        of=lambda m: m.share_in(m.region), unit='%', summarised=True, page=14,
        label='Share of |attribution| in the target'),
    'share_in_other_objects': Statistic(
        'share that lies in predicted pixels outside the target region',
        of=lambda m: m.share_in(m.mask & ~m.region), unit='%', summarised=True),
    'share_in_prediction': Statistic('share of |attribution| that lies in the predicted mask',
        of=lambda m: m.share_in(m.mask), unit='%', summarised=True, page=6,
        label='Share of |attribution| in the prediction'),
    'share_in_truth': Statistic('share that lies in the ground truth',
        of=lambda m: m.share_in_truth, unit='%', summarised=True),
    'prediction_ratio': Statistic('share of predicted pixels', of=lambda m: m.mask.mean(),
        unit='%', summarised=True, page=7, label='Share of pixels predicted'),
    'prediction_area': Statistic('number of predicted pixels', WHOLE,
        of=lambda m: int(m.mask.sum()), unit='px'),
    'dice': Statistic(
        'Dice of prediction and truth, 0 to 1, of the explained class, else of all that is not '
        'background, whichever class; two empty masks score 1',
        of=lambda m: m.scores['dice'], summarised=True, page=1, label='Dice', heading='Dice'),
    'iou': Statistic('intersection over union of the two', of=lambda m: m.scores['iou'],
        summarised=True),
    'pixel_accuracy': Statistic('share of pixels whose class is right',
        of=lambda m: m.scores['pixel_accuracy'], summarised=True),
    'class_dice': Statistic(
        'networks with several classes: mean Dice of the classes that are there, predicted or '
        'true, but the background', of=lambda m: m.class_mean('dice'), summarised=True, page=12,
        label='Dice, mean of the classes'),
    'class_iou': Statistic('the same: intersection over union', of=lambda m: m.class_mean('iou'),
        summarised=True),
    'class_accuracy': Statistic("the same: share of a class's true pixels that were found",
        of=lambda m: m.class_mean('accuracy'), summarised=True),
    'class_scores': Statistic('Dice, IoU and accuracy of each class that is there, by its name',
        COMPOUND, of=lambda m: m.class_scores),
    'channel_shares': Statistic(
        "share of |attribution| of each input channel (share_red, … in a batch's tables)", COMPOUND,
        of=lambda m: m.channel_shares, unit='%'),
    'channel_names': Statistic("names of the input's channels, in the network's order", COMPOUND,
        RECORD),
    'trend': Statistic(
        'at every node of the path from the (first) baseline: alpha, F, and the IoU of the '
        'predicted mask there with that on the image (null where the map was cropped)', COMPOUND,
        of=lambda m: {name: list(values) for name, values in vars(m.explanation.trend).items()}),
    'preparation': Statistic(
        "the network's graph: batch norms and paddings folded, convolutions run backwards as "
        'forward ones, relative deviation of logits and gradient, whether the original was used '
        'instead, why there is no graph',
        COMPOUND, COST, lambda m: dict(vars(m.explanation.cost.preparation))),
    'cropping': Statistic(
        "what was computed for the image's targets together: share of the convolutions' "
        'operations, number of boxes, relative deviation of their logits and gradient from the '
        "whole map's (null: not cropped, or measured on another image), whether it fell back",
        COMPOUND, COST, lambda m: dict(vars(m.explanation.cost.cropping))),

    # What `--segments` adds.
    **{
        f'regions_{part}{end}': Statistic(f'{what} of ranked regions that carries {part} % of '
                                          '|attribution|', kind, of=lambda m: None, unit=unit)
        for part in (50, 80, 95)
        for end, what, kind, unit in (
            ('', 'size of the smallest set', WHOLE, ''),
            ('_area', 'share of the image under the smallest set', NUMBER, '%'))
    },
    'tiles': Statistic(
        'with --tile: how many tiles the picture has (count), how many hold the target and were '
        'explained, their size (height, width) and overlap in pixels of the picture', COMPOUND,
        of=lambda m: m.explanation.tiles and _listed(vars(m.explanation.tiles))),

    # What `--evaluate` measures.
    'deletion_area': _check(_CURVES,
        'area under the score while pixels are removed, most relevant first; 1 is F(x), 0 the '
        'score of the filled image; mean over fills and units',
        'about 0 to 1', 'lower', _PETSIUK),
    'insertion_area': _check(_CURVES,
        'the same while pixels are put back into the filled image', 'about 0 to 1', 'higher',
        _PETSIUK),
    'deletion_margin': _check(_CURVES,
        'mean deletion area of copies of the map in the wrong place (displaced and mirrored) minus '
        'that of the map', '-1 to 1', 'higher', _PETSIUK),
    'insertion_margin': _check(_CURVES,
        'insertion area of the map minus the mean of such copies', '-1 to 1', 'higher', _PETSIUK),
    'deletion_margin_others': _check(_CURVES,
        'deletion area of the better of a random map and Sobel edges minus that of the map',
        '-1 to 1', 'higher', _PETSIUK),
    'insertion_margin_others': _check(_CURVES,
        'insertion area of the map minus that of the better of the two', '-1 to 1', 'higher',
        _PETSIUK),
    'infidelity': _check(_PATCHES,
        'squared difference of what the map says random patches are worth and what replacing them '
        'by the baseline changes, best scale, relative to the change', '0 to 1', 'lower', _YEH),
    'max_sensitivity': _check(_NOISE,
        f'largest relative L2 change of the map under uniform noise of {NOISE_RADIUS:.0%} of the '
        'pixel range', '0 and up', 'lower', _YEH),
    'broad_sensitivity': _check(_NOISE,
        'the same of the broad features, the signed map under a blur of 2 % of the longer side',
        '0 and up', 'lower', 'this toolkit'),
    'recomputed_correlation': _check(_RANDOMISATION,
        'rank correlation of the signed map with the same computed afresh in a few steps; not for '
        'a mean over drawn baselines, nor for methods that a few steps do not suffice', '-1 to 1',
        'higher', 'this toolkit'),
    'randomised_correlation': _check(_RANDOMISATION,
        'rank correlation of the signed map with that of the network whose weights are all '
        'redrawn; of a map of one sign, at most the linear one of magnitudes', '-1 to 1', 'lower',
        _ADEBAYO),
    'randomised_ssim': _check(_RANDOMISATION,
        'structural similarity of the two magnitudes', '-1 to 1', 'lower', _ADEBAYO),
    'baseline_correlation': _check(_BASELINES,
        'rank correlation of |attribution| between baselines that do not hide the target, median '
        'of all pairs', '-1 to 1',
        'higher', _STURMFELS),
    'baseline_overlap': _check(_BASELINES,
        f'overlap of the strongest {STRONGEST:.0%} of pixels, median of all pairs', '0 to 1',
        'higher', _STURMFELS),
    **{
        f'{name}_in_{where}': _check(_PLACES, f'{text}{of}', '0 to 1', 'higher', source)
        for where, of in (('target', 'the target region'), ('prediction', 'the predicted mask'),
                          ('truth', 'the ground truth'))
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
        f'{who}_radius_{share}': _check(_CONTEXT,
            f'distance from the target within which {share} % of {what} lies, in pixels of the '
            'model input; 0: inside', '0 and up', '', source)
        for who, what, source in (
            ('context', '|attribution|', 'this toolkit'),
            ('receptive', '|gradient of the target at the input|', 'Luo et al. 2016'))
        for share in (50, 90, 95)
    },
    'context_inside': _check(_CONTEXT, 'share of |attribution| inside the target', '0 to 1', '',
                             'this toolkit'),
    'context_near': _check(_CONTEXT,
        f'share outside it, but within {NEAR:.0%} of the longer side', '0 to 1', '',
        'this toolkit'),
    'rim_excess': _check(_PLACES,
        f'share of |attribution| in the outer rim ({RIM:.0%} of the longer side, target '
        'left out) over its share of the area', '0 and up', 'lower', 'this toolkit'),
    'padding_excess': _check(_PLACES,
        'the same for letterbox padding', '0 and up', 'lower', 'this toolkit'),
    'distant_spot_effect': _check(_SPOTS,
        'how far the score falls, from F(x) to that of the filled image, when the strongest square '
        f'of the map farther than {FAR:.0%} of the longer side from the target and other predicted '
        'objects is filled with the mean of its surroundings; the larger of two sizes of squares',
        'about 0 to 1', 'lower', 'this toolkit'),
    'distant_spot_x': _check(_SPOTS,
        'where that square lies, in pixels of the model input from the left',
        '0 and up', '', 'this toolkit'),
    'distant_spot_y': _check(_SPOTS, 'the same from the top', '0 and up', '', 'this toolkit'),
    'evaluation': Statistic('what those were taken from: curves, profile, stages, pairs of '
        'baselines', COMPOUND, of=lambda m: None),

    'value_range': Statistic(
        "values of the image's file that became black and white, 0 and 255", COMPOUND, RECORD),
    'placement': Statistic(
        'where the explained part lies: size (height, width) of the whole image, origin (x, y) of '
        'the part in it, and axis and index of the slice of a volume', COMPOUND, RECORD),
    'notes': Statistic('what was decided or left out, in sentences', COMPOUND, RECORD),
    'targets': Statistic('all targets explained in the same run', COMPOUND, RECORD),
    'methods': Statistic('all methods they were explained by', COMPOUND, RECORD),
    'settings': Statistic('all settings as they took effect', COMPOUND, RECORD),
    'versions': Statistic('versions of what decides the numbers', COMPOUND, RECORD),
    'verdict': Statistic('the findings: flag, level (good, note, concern) and sentence', COMPOUND,
                         RECORD),
    'image_path': Statistic('the file of the image', TEXT, RECORD),
    'mask_flags': Statistic('flags by which it was said where the mask lies, where any were',
                            COMPOUND, RECORD),
    'folder': Statistic("the folder of the image's files", TEXT, RECORD),
    'resume_key': Statistic('hash of everything that decides the files', TEXT, RECORD),
}  # fmt: skip

METRICS = {key: row for key, row in STATISTICS.items() if row.check}  # measured by checks


def explanation_statistics(explanation: Explanation, truth: np.ndarray | None = None) -> Statistics:
    """The figures of an explanation, flat and ready for JSON. A figure that does not apply is None.

    truth: (h, w) bool, the true pixels of the explained class; None: unknown. STATISTICS says what
    each figure is. The figures of METRICS are None here: `evaluate_explanation` measures them.
    """
    measured = Measured(explanation, truth)
    return {
        key: _plain(row.of(measured)) if row.of else None
        for key, row in STATISTICS.items()
        if row.of or key in METRICS
    }


def _listed(values: dict[str, object]) -> dict[str, object]:
    """A dictionary with lists instead of tuples, as JSON reads it back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _plain(value: object) -> object:
    """NumPy numbers as Python's numbers; numbers that JSON cannot hold as None."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


# --------------------------------------------------------------------------- as text


def how_text(statistics: Statistics) -> str:
    """The rule, if there is one, and the number of steps with which a map was computed."""
    count, rule = statistics['steps'], statistics['rule']
    steps = f'{count} step{"" if count == 1 else "s"}'
    return f'{rule} rule, {steps}' if rule else steps


def gap_text(statistics: Statistics, precise: bool = False) -> str:
    """The completeness gap, with its standard error or a note that it is 0 by construction."""
    gap = shown('completeness_gap', statistics['completeness_gap'], precise)
    error = statistics.get('gap_error')  # missing in older results
    if error is not None:
        return f'{gap} (standard error {shown("gap_error", error, precise)})'
    if statistics.get('completeness') == BY_CONSTRUCTION:
        return f'{"0 %" if (statistics["completeness_gap"] or 0) < 5e-4 else gap} (by construction)'
    return gap


def shown(key: str, value: float | None, precise: bool = False) -> str:
    """A figure as text, by its unit. precise: with one digit more."""
    if value is None:
        return 'n/a'
    if key in STATISTICS and STATISTICS[key].unit == '%':
        text = f'{100 * value:.2f}' if precise else f'{100 * value:.3g}'
        whole = float(text) == 100 and value < 1  # rounded to 100 %, but less
        return f'{"above 99.9" if whole else text} %'
    return f'{value:.4g}' if precise else f'{value:.3g}'
