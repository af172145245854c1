"""What the numbers of an explanation mean, in plain words: findings from stated thresholds.

One table, `RULES`, holds every rule; `Thresholds` holds every number they compare with. Each rule
looks at an image's statistics and says nothing where its figures were not measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from segmentation_dataset import InputError

GOOD, NOTE, CONCERN = 'good', 'note', 'concern'  # levels of a finding


@dataclass(frozen=True)
class Thresholds:
    """Where a figure begins to mean something. Each can be set on the command line."""

    focus_ratio: float = 2.0  # attribution ratio above which the focus is good
    background_ratio: float = 1.0  # below which the background weighs more than the prediction
    map_error: float = 0.1  # above which only broad features are settled
    rim_excess: float = 1.0  # above which the outer rim holds more than its area explains
    padding_excess: float = 1.0  # the same for letterbox padding
    control_margin: float = 0.0  # by which deletion or insertion must beat its controls
    randomised_correlation: float = 0.5  # above which the map outlives the network's weights
    max_sensitivity: float = 1.0  # above which a little noise changes the map by its own size
    infidelity: float = 0.9  # above which the map says next to nothing about removed patches
    baseline_correlation: float = 0.3  # below which baselines tell different stories
    dice: float = 0.5  # below which the mask itself is poor


@dataclass(frozen=True)
class Finding:
    """One sentence about an explanation."""

    flag: str  # a short name, the same in all images
    level: str  # GOOD, NOTE or CONCERN
    text: str


@dataclass(frozen=True)
class Rule:
    """A finding and when it holds; `holds` is asked only where every figure in `needs` is known."""

    flag: str
    level: str
    needs: tuple[str, ...]
    holds: Callable[[dict, Thresholds], bool]
    text: str  # formatted with the statistics


def _fails_controls(figures: dict, limits: Thresholds) -> bool:
    return max(figures['deletion_margin'], figures['insertion_margin']) <= limits.control_margin


RULES: tuple[Rule, ...] = (
    Rule('good focus', GOOD, ('attribution_ratio',),
         lambda s, t: s['attribution_ratio'] > t.focus_ratio,
         'The predicted mask weighs {attribution_ratio:.3g} times as much as the background, '
         'pixel for pixel.'),
    Rule('background focus', CONCERN, ('attribution_ratio',),
         lambda s, t: s['attribution_ratio'] < t.background_ratio,
         'The background weighs more than the predicted mask, pixel for pixel (attribution ratio '
         '{attribution_ratio:.3g}).'),
    Rule('gap too large', CONCERN, ('completeness_gap', 'settings'),
         lambda s, t: s['completeness_gap'] > s['settings']['gap_tolerance'],
         'The attributions miss the change of the score by {completeness_gap:.1%} (more than '
         '{settings[gap_tolerance]:.0%}): use more steps.'),
    Rule('map not settled', NOTE, ('map_error',),
         lambda s, t: s['map_error'] > t.map_error,
         'Only the broad features of the map are settled (estimated error {map_error:.0%}): use '
         'more steps before reading details.'),
    Rule('border artefact', CONCERN, ('rim_excess',),
         lambda s, t: s['rim_excess'] > t.rim_excess,
         'The outer rim of the image holds {rim_excess:.2g} times the attribution that its area '
         'explains: look for labels, rulers or frames there.'),
    Rule('padding artefact', CONCERN, ('padding_excess',),
         lambda s, t: s['padding_excess'] > t.padding_excess,
         'The letterbox padding holds {padding_excess:.2g} times the attribution that its area '
         'explains: the model reads the padding.'),
    Rule('beats its controls', GOOD, ('deletion_margin', 'insertion_margin'),
         lambda s, t: not _fails_controls(s, t),
         'Removing (or restoring) the pixels it names changes the score faster than a random map '
         'and an edge map do (margins: deletion {deletion_margin:+.2f}, insertion '
         '{insertion_margin:+.2f}).'),
    Rule('fails its control', CONCERN, ('deletion_margin', 'insertion_margin'), _fails_controls,
         'Neither deletion nor insertion beats both a random map and an edge map (margins '
         '{deletion_margin:+.2f}, {insertion_margin:+.2f}): the map does not tell which pixels '
         'matter.'),
    Rule('survives randomisation', CONCERN, ('randomised_correlation',),
         lambda s, t: s['randomised_correlation'] > t.randomised_correlation,
         'The map hardly changes when all weights are random (rank correlation '
         '{randomised_correlation:.2f}): it shows the image, not what the model learned.'),
    Rule('unstable under noise', NOTE, ('max_sensitivity',),
         lambda s, t: s['max_sensitivity'] > t.max_sensitivity,
         'Noise too faint to see changes the map by {max_sensitivity:.0%}: rely on its broad '
         'features only.'),
    Rule('unfaithful to patches', NOTE, ('infidelity',),
         lambda s, t: s['infidelity'] > t.infidelity,
         'What the map says a patch is worth tells little about what happens without it '
         '(infidelity {infidelity:.2f} of 1).'),
    Rule('unstable between baselines', CONCERN, ('baseline_correlation',),
         lambda s, t: s['baseline_correlation'] < t.baseline_correlation,
         'Other baselines give other maps (median rank correlation {baseline_correlation:.2f}): '
         'say which baseline you mean.'),
    Rule('poor mask', NOTE, ('dice',),
         lambda s, t: s['dice'] < t.dice,
         'The mask itself is poor (Dice {dice:.2f}): the map explains a mistake.'),
)  # fmt: skip


def findings(statistics: dict, limits: Thresholds | None = None) -> list[Finding]:
    """The findings about one image, concerns first. statistics: of its statistics file; a figure
    that is missing or None was not measured."""
    limits = limits or Thresholds()
    found = [
        Finding(rule.flag, rule.level, rule.text.format(**statistics))
        for rule in RULES
        if all(statistics.get(name) is not None for name in rule.needs)
        and rule.holds(statistics, limits)
    ]
    order = (CONCERN, NOTE, GOOD)
    return sorted(found, key=lambda finding: order.index(finding.level))


def batch_findings(images: Sequence[Sequence[str]]) -> list[str]:
    """How many images have each flag, in the order of RULES. images: the flags of each."""
    counts = Counter(flag for flags in images for flag in flags)
    return [
        f'{rule.flag}: {counts[rule.flag]} of {len(images)} images'
        for rule in RULES
        if counts[rule.flag]
    ]


def concerns(flags: Sequence[str]) -> int:
    """How many of these flags are concerns."""
    levels = {rule.flag: rule.level for rule in RULES}
    return sum(levels.get(flag) == CONCERN for flag in flags)


def parse_thresholds(pairs: Sequence[str]) -> Thresholds:
    """The thresholds with some replaced, each given as NAME=VALUE. Raises InputError."""
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
