"""What the figures of an explanation mean, in plain words: findings, by stated thresholds.

The table `FINDING_RULES` holds every rule, and `Thresholds` every number that the rules compare
with. A rule reads an image's statistics; it gives no finding where its figures were not measured.
At the end of this file the statistics of an image become lines of text, which also say what its
accuracy means. This file needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace

from igseg.errors import InputError
from igseg.setting import setting
from igseg.statistics import gap_text, how_text, names_of_channels, shown, tiles_text

GOOD, NOTE, CONCERN = 'good', 'note', 'concern'  # levels of a finding

WRONG_GRADIENT = 'wrong gradient'  # a finding, beside which those of MORE_STEPS are left out
MORE_STEPS = ('gap too large', 'map not computed', 'map not settled')


def _threshold(default: float, meaning: str) -> float:
    """A field of Thresholds."""
    return setting(default, 'thresholds of the verdict', meaning)


@dataclass(frozen=True)
class Thresholds:
    """The values from which figures lead to a finding. Each can be set on the command line."""

    focus_ratio: float = _threshold(
        2.0, 'attribution ratio of the target above which the focus is good'
    )
    background_ratio: float = _threshold(
        1.2, 'below which the target hardly weighs more than the background'
    )
    gradient_deviation: float = _threshold(
        0.1,
        "share of the score's change that the network's gradient misses, above which it does "
        'not describe the score',
    )
    baseline_contrast: float = _threshold(
        0.9, 'below which the baseline is more like the target than the rest'
    )
    baseline_change: float = _threshold(
        0.5, "of F's range on the path, that F(x) - F(x') must at least be"
    )
    map_error: float = _threshold(0.1, 'above which only broad features are settled')
    lost_map: float = _threshold(0.5, 'map error above which not even those are')
    rim_excess: float = _threshold(
        1.0, 'above which the outer rim holds more than its area explains'
    )
    padding_excess: float = _threshold(1.0, 'the same for letterbox padding')
    distant_spot_effect: float = _threshold(
        0.2, 'above which the score hangs on a spot far from the target'
    )
    control_margin: float = _threshold(
        0.08,
        'by which deletion and insertion must beat, on the average, the same map in the wrong '
        'place',
    )
    recomputed_correlation: float = _threshold(
        0.45, 'below which the map is not what its method computes'
    )
    randomised_correlation: float = _threshold(
        0.5, "above which the map outlives the network's weights"
    )
    broad_sensitivity: float = _threshold(
        1.0, 'above which a little noise changes even the broad features'
    )
    infidelity: float = _threshold(
        0.9, 'above which the map says next to nothing about removed patches'
    )
    baseline_correlation: float = _threshold(0.3, 'below which baselines tell different stories')
    dice: float = _threshold(0.5, 'below which the mask itself is poor')


@dataclass(frozen=True)
class Finding:
    """One sentence about an explanation."""

    flag: str  # a short name, the same in all images
    level: str  # GOOD, NOTE or CONCERN
    text: str


@dataclass(frozen=True)
class FindingRule:
    """A finding, and when it holds."""

    flag: str
    level: str
    needs: tuple[str, ...]  # statistics; `holds` is called only where none of them is None
    holds: Callable[[dict, Thresholds], bool]
    text: str  # formatted with the statistics
    fatal: str = ''  # why the map cannot be trusted at all, in a few words; empty: it may be
    of_model: str = ''  # a fault of the model that the map shows; empty: it is one of the map


def _margin(figures: dict) -> float:
    """The mean margin of deletion and insertion over copies of the map in the wrong place."""
    return (figures['deletion_margin'] + figures['insertion_margin']) / 2


def _fails_controls(figures: dict, limits: Thresholds) -> bool:
    return _margin(figures) <= limits.control_margin


def hides_target(figures: dict, limits: Thresholds) -> bool:
    """Whether the baseline is so similar to the target that the map cannot be trusted.

    This holds even if the map beats its controls: with such baselines, maps that did so still gave
    the target less than half of the weight that it had with other baselines."""
    contrast = figures.get('baseline_contrast')
    return contrast is not None and contrast < limits.baseline_contrast


def _explains_nothing(figures: dict, limits: Thresholds) -> bool:
    """Whether the scores of baseline and image are nearly equal, compared with the range of the
    score between them."""
    scores = figures['trend']['scores']
    change = abs(figures['score'] - figures['baseline_score'])
    return change < limits.baseline_change * (max(scores) - min(scores))


def gap_tolerance_of(settings: dict) -> float:
    """The gap above which to warn; never below the tolerance that the user chose."""
    return max(settings['gap_tolerance'], settings.get('tolerance') or 0.0)


FINDING_RULES: tuple[FindingRule, ...] = (
    FindingRule(WRONG_GRADIENT, CONCERN, ('gradient_deviation', 'gradient_cause'),
         lambda s, t: s['gradient_deviation'] > t.gradient_deviation,
         "The network's gradient does not describe its score: it misses {gradient_deviation:.0%} "
         'of the change of the score ({gradient_cause}). More steps do not help: the map is not '
         "that of the network's score.",
         fatal="the network's gradient does not describe its score"),
    FindingRule('baseline hides the target', CONCERN, ('baseline_contrast',), hides_target,
         'The baseline is more like the target than like the rest of the image (contrast '
         '{baseline_contrast:.2g}), so that the target can get no attribution whatever the model '
         'does: take another --baseline, or auto.',
         fatal='the baseline is too like the target, which hides it'),
    FindingRule('nothing to explain', CONCERN, ('score', 'baseline_score', 'trend'),
         _explains_nothing,
         'The score on the baseline ({baseline_score:.3g}) is about that on the image '
         '({score:.3g}), for what it does between them: take another --baseline, or auto.',
         fatal='the baseline scores like the image, so that there is nothing to explain'),
    FindingRule('good focus', GOOD, ('attribution_ratio_in_target',),
         lambda s, t: s['attribution_ratio_in_target'] > t.focus_ratio and not hides_target(s, t),
         'The target weighs {attribution_ratio_in_target:.3g} times as much as the background, '
         'pixel for pixel.'),
    FindingRule('background focus', CONCERN, ('attribution_ratio_in_target',),
         lambda s, t: s['attribution_ratio_in_target'] < t.background_ratio
         and not hides_target(s, t),
         'The target hardly weighs more than the background, pixel for pixel (attribution ratio of '
         'the target {attribution_ratio_in_target:.3g}).'),
    FindingRule('gap too large', CONCERN, ('completeness_gap', 'settings'),
         lambda s, t: s['completeness_gap'] > gap_tolerance_of(s['settings']),
         'The attributions miss the change of the score by {completeness_gap:.1%}, more than the '
         'tolerance: use more steps.'),
    FindingRule('map not computed', CONCERN, ('map_error',),
         lambda s, t: s['map_error'] > t.lost_map,
         'Not even the broad features of the map are settled (estimated error {map_error:.0%}): '
         'use more steps, or --tolerance.',
         fatal='too few steps were computed for it'),
    FindingRule('map not settled', NOTE, ('map_error',),
         lambda s, t: t.map_error < s['map_error'] <= t.lost_map,
         'Only the broad features of the map are settled (estimated error {map_error:.0%}): use '
         'more steps before reading details.'),
    FindingRule('border artefact', CONCERN, ('rim_excess',),
         lambda s, t: s['rim_excess'] > t.rim_excess,
         'The outer rim of the image holds {rim_excess:.2g} times the attribution that its area '
         'explains: look for labels, rulers or frames there.',
         of_model='it looks at the rim of the image'),
    FindingRule('padding artefact', CONCERN, ('padding_excess',),
         lambda s, t: s['padding_excess'] > t.padding_excess,
         'The letterbox padding holds {padding_excess:.2g} times the attribution that its area '
         'explains: the model reads the padding.',
         of_model='it looks at the padding'),
    FindingRule('distant spot', CONCERN,
         ('distant_spot_effect', 'distant_spot_x', 'distant_spot_y'),
         lambda s, t: s['distant_spot_effect'] > t.distant_spot_effect,
         'Without a spot far from the target (around x {distant_spot_x:.0f}, y '
         '{distant_spot_y:.0f} of the model input) the score falls by {distant_spot_effect:.0%} of '
         'its range: if that is a label or a watermark, the model has learned a shortcut.',
         of_model='its score hangs on a spot far from the target'),
    FindingRule('beats its controls', GOOD, ('deletion_margin', 'insertion_margin'),
         lambda s, t: not _fails_controls(s, t),
         'Removing (or restoring) what it names changes the score faster than the same map in the '
         'wrong place does (margins: deletion {deletion_margin:+.2f}, insertion '
         '{insertion_margin:+.2f}).'),
    FindingRule('fails its control', CONCERN, ('deletion_margin', 'insertion_margin'),
         _fails_controls,
         'The same map in the wrong place does as well (margins: deletion '
         '{deletion_margin:+.2f}, insertion {insertion_margin:+.2f}): it does not tell which '
         'pixels matter.',
         fatal='in the wrong place it does as well'),
    FindingRule('not reproduced', CONCERN, ('recomputed_correlation',),
         lambda s, t: s['recomputed_correlation'] < t.recomputed_correlation,
         'Computed afresh in a few steps, the map is another (rank correlation '
         '{recomputed_correlation:.2f}): it had too few steps, or is not of this image and model.',
         fatal='computed afresh, it is another map'),
    FindingRule('survives randomisation', CONCERN, ('randomised_correlation',),
         lambda s, t: s['randomised_correlation'] > t.randomised_correlation,
         'The map hardly changes when all weights are random (correlation '
         '{randomised_correlation:.2f}): it shows the image, not what the model learned.',
         fatal='it hardly depends on what the model learned'),
    FindingRule('unstable under noise', NOTE, ('broad_sensitivity',),
         lambda s, t: s['broad_sensitivity'] > t.broad_sensitivity,
         'Noise too faint to see changes even the broad features of the map by '
         '{broad_sensitivity:.0%}.'),
    FindingRule('unfaithful to patches', NOTE, ('infidelity',),
         lambda s, t: s['infidelity'] > t.infidelity,
         'What the map says a patch is worth tells little about what happens without it '
         '(infidelity {infidelity:.2f} of 1).'),
    FindingRule('unstable between baselines', CONCERN, ('baseline_correlation',),
         lambda s, t: s['baseline_correlation'] < t.baseline_correlation,
         'Other baselines give other maps (median rank correlation {baseline_correlation:.2f}): '
         'say which baseline you mean.'),
    FindingRule('poor mask', NOTE, ('dice',),
         lambda s, t: s['dice'] < t.dice,
         'The mask itself is poor (Dice {dice:.2f}): the map explains a mistake.'),
)  # fmt: skip


# The first sentence says what to do with the map. By its flag: level and text.
TRUST = {
    'trust broadly': (GOOD, 'This map can be trusted broadly: {why}.'),
    'trust in part': (NOTE, 'Trust this map only in its broad features: {why}.'),
    'do not trust': (CONCERN, 'Do not trust this map: {why}.'),
    'not checked': (NOTE, 'This map was not checked: {why}.'),
}

LEVELS = {  # of every flag, in order
    **{flag: level for flag, (level, _) in TRUST.items()},
    **{rule.flag: rule.level for rule in FINDING_RULES},
}


def first_sentence(findings: Sequence[Finding], unchecked: str | None) -> Finding:
    """What a reader should do with a map, by its findings. unchecked: why the map was not checked;
    None: it was checked."""
    flags = {finding.flag for finding in findings}
    doubts = [finding.flag for finding in findings if finding.level != GOOD]
    of_model = {rule.flag: rule.of_model for rule in FINDING_RULES}
    fatal = [rule.fatal for rule in FINDING_RULES if rule.fatal and rule.flag in flags]
    if fatal:
        flag, why = 'do not trust', '; '.join(fatal)
    elif unchecked:
        objections = (
            f'already against it: {", ".join(doubts)}' if doubts else 'nothing is against it yet'
        )
        flag, why = 'not checked', f'{unchecked}; {objections}'
    elif doubts and all(of_model.get(flag) for flag in doubts):
        reasons = '; '.join(of_model[flag] for flag in doubts)
        text = 'This map can be trusted; trust the model only once you know why {why}.'
        return Finding('trust in part', NOTE, text.format(why=reasons))
    elif doubts:
        flag, why = 'trust in part', ', '.join(doubts)
    else:
        flag, why = 'trust broadly', 'it beat its controls, and nothing speaks against it'
    level, text = TRUST[flag]
    return Finding(flag, level, text.format(why=why))


def findings(statistics: dict, limits: Thresholds | None = None) -> list[Finding]:
    """The findings about an image: first what to do with its map, then concerns, notes and good
    findings. statistics: of its statistics file; a figure that is missing or None was not measured.
    """
    limits = limits or Thresholds()
    results = [
        Finding(rule.flag, rule.level, rule.text.format(**statistics))
        for rule in FINDING_RULES
        if all(statistics.get(name) is not None for name in rule.needs)
        and rule.holds(statistics, limits)
    ]
    if any(finding.flag == WRONG_GRADIENT for finding in results):
        results = [finding for finding in results if finding.flag not in MORE_STEPS]
    order = (CONCERN, NOTE, GOOD)
    results.sort(key=lambda finding: order.index(finding.level))
    return [first_sentence(results, _unchecked(statistics)), *results]


def _unchecked(statistics: dict) -> str | None:
    """Why a map was not checked; None: it was checked."""
    if statistics.get('deletion_margin') is not None:
        return None
    if statistics.get('tiles'):
        return 'with --tile there are no checks; --crop and --evaluate quick check a part'
    if not statistics.get('settings', {}).get('evaluate'):
        return 'add --evaluate quick'
    return 'removing parts of this image tells nothing about any map'


def verdict_of(statistics: dict, limits: Thresholds | None = None) -> list[dict]:
    """The findings about an image, ready for JSON."""
    return [asdict(finding) for finding in findings(statistics, limits)]


def batch_findings(images: Sequence[Sequence[str]]) -> list[str]:
    """How many images have each flag. The flags of the first sentence come first, then the others
    in the order of FINDING_RULES. images: the flags of each image."""
    counts = Counter(flag for flags in images for flag in flags)
    return [f'{flag}: {counts[flag]} of {len(images)} images' for flag in LEVELS if counts[flag]]


def concerns(flags: Sequence[str]) -> int:
    """How many of these flags are concerns."""
    return sum(LEVELS.get(flag) == CONCERN and flag not in TRUST for flag in flags)


def thresholds_table() -> list[str]:
    """The thresholds, their defaults and what they mean, as rows of a table for docs/."""
    return [
        f'| `{row.name}` | {row.default:g} | {row.metadata["setting"].meaning} |'
        for row in fields(Thresholds)
    ]


def parse_thresholds(pairs: Sequence[str]) -> Thresholds:
    """The thresholds, of which some are replaced by texts NAME=VALUE. Raises InputError."""
    limits = Thresholds()
    names = [field.name for field in fields(Thresholds)]
    for pair in pairs:
        name, _, value = pair.partition('=')
        if name not in names:
            raise InputError(f'unknown threshold "{name}" (choose from {", ".join(names)})')
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise InputError(f'threshold "{pair}" is not of the form {name}=NUMBER')
        limits = replace(limits, **{name: limit})
    return limits


# --------------------------------------------------------------------------- accuracy of a map


def accuracy_warning(statistics: dict) -> str | None:
    """The warning for a map that is less accurate than the user wants; None: there is none."""
    settings = statistics['settings']
    gap_tolerance = gap_tolerance_of(settings)
    limits = Thresholds(**settings.get('thresholds') or {})
    error = shown('map_error', statistics['map_error'])
    gap = shown('completeness_gap', statistics['completeness_gap'])
    deviation = statistics.get('gradient_deviation')  # older results have none
    if deviation is not None and deviation > limits.gradient_deviation:
        return (
            "WARNING: the network's gradient does not describe its score, of whose change it "
            f'misses {deviation:.0%} ({statistics["gradient_cause"]}): do not rely on this map; '
            'more steps do not help.'
        )
    if statistics['within_tolerance'] is False:
        return (
            f'WARNING: the tolerance of {shown("map_error", settings["tolerance"])} was not '
            f'reached in {statistics["steps"]} steps: map error {error}, completeness gap {gap} '
            '(allow more with --max_steps).'
        )
    if hides_target(statistics, limits):
        contrast = statistics['baseline_contrast']
        return (
            f'WARNING: the baseline hides the target (contrast {contrast:.2g}): the map cannot '
            'show it, whatever the model does (use another --baseline, or auto).'
        )
    if statistics['completeness_gap'] is None or statistics['completeness_gap'] <= gap_tolerance:
        return None
    return (
        f'WARNING: the completeness gap of {gap} is above the tolerance of '
        f'{shown("completeness_gap", gap_tolerance)}: use more steps (--num_steps) before you '
        'rely on this map.'
    )


def map_verdict(error: float | None) -> str:
    """What an estimated map error means, in words."""
    if error is None:
        return 'unknown'
    if error <= 0.02:
        return 'exact to the eye'
    limits = Thresholds()
    if error > limits.lost_map:
        return 'not even its broad features are settled'
    if error > limits.map_error:
        return 'only its broad features are settled'
    return 'settled, small details aside'


def _of_channels(names: Sequence[str]) -> str:
    """The heading of the shares of channels."""
    return f'{" / ".join(names)} share'.capitalize() if len(names) == 3 else 'Share of each channel'


def statistics_text(statistics: dict) -> str:
    """The statistics of an image as lines of text."""

    def show(key: str) -> str:
        return shown(key, statistics[key], precise=True)

    shares, names = statistics['channel_shares'], names_of_channels(statistics)
    channels = ' / '.join(f'{100 * share:.1f} %' for share in shares) if shares else 'n/a'
    tiles = tiles_text(statistics)
    by_class = statistics.get('class_scores') or {}
    classes = ', '.join(f'{name} {scores["dice"]:.4g}' for name, scores in by_class.items())
    lines = [
        f'Attribution mean, std       {show("attribution_mean")}, {show("attribution_std")}',
        f'Attribution min, max        {show("attribution_min")}, {show("attribution_max")}',
        f'Attribution ratio           {show("attribution_ratio")}',
        f'Mean |attribution|          {show("attribution_in_prediction")} in the prediction, '
        f'{show("attribution_in_background")} in the background',
        f'Share of |attribution|      {show("share_in_prediction")} in the prediction, '
        f'{show("share_in_truth")} in the ground truth',
        *([f'{_of_channels(names):27} {channels}'] if len(names) > 1 else []),
        f'Prediction ratio            {show("prediction_ratio")} '
        f'({statistics["prediction_area"]:,} pixels)',
        f'Dice, IoU, pixel accuracy   {show("dice")}, {show("iou")}, {show("pixel_accuracy")}',
        *([f'Dice of each class          {classes}'] if classes else []),
        f'F(x), F(baseline)           {show("score")}, {show("baseline_score")}',
        f'Completeness gap            {gap_text(statistics, precise=True)} '
        f'({how_text(statistics)})',
        f'Map error (estimate)        {show("map_error")}: {map_verdict(statistics["map_error"])}',
        f'Sign settled                {show("settled_share")} of |attribution|',
        *([f'Tiles explained             {tiles}'] if tiles else []),
        f'Time                        {statistics["seconds"]:.1f} s, '
        f'{statistics["gradient_evaluations"]} gradient evaluations in {statistics["precision"]}, '
        f'{statistics["step_batch"]} at once',
    ]
    heading = (
        f'{statistics["image"]} ({statistics["method"]}, target {statistics["target"]}, '
        f'baseline {statistics["baseline"] or "none"})'
    )
    return '\n  '.join([heading, *lines])
