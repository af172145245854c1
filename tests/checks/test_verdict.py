"""Findings in plain words, and the thresholds they compare with."""

from __future__ import annotations

import string
from dataclasses import fields
from pathlib import Path

import pytest
from hand_made import statistics_for_figures

from igseg.checks.verdict import (
    CONCERN,
    FINDING_RULES,
    GOOD,
    NOTE,
    Thresholds,
    accuracy_warning,
    batch_findings,
    findings,
    map_verdict,
    parse_thresholds,
    thresholds_table,
)
from integrated_gradients import (
    InputError,
)

SETTINGS = {'settings': {'gap_tolerance': 0.05}}
SPOT = {'distant_spot_x': 1.0, 'distant_spot_y': 2.0}
MARGINS = {'deletion_margin': 0.3, 'insertion_margin': 0.3}


def flags(figures: dict, **limits: float) -> list[str]:
    return [finding.flag for finding in findings({**figures, **SETTINGS}, Thresholds(**limits))]


@pytest.mark.parametrize(
    ('figures', 'expected'),
    [
        ({'attribution_ratio_in_target': 2.1}, ['good focus']),
        ({'attribution_ratio_in_target': 2.0}, []),
        ({'attribution_ratio_in_target': 1.2}, []),
        ({'attribution_ratio_in_target': 1.1}, ['background focus']),
        ({'attribution_ratio_in_target': None}, []),
        (
            {'attribution_ratio_in_target': 0.9, 'baseline_contrast': 0.7},
            ['baseline hides the target'],
        ),
        (
            {'attribution_ratio_in_target': 3.0, 'baseline_contrast': 0.7},
            ['baseline hides the target'],
        ),
        ({'attribution_ratio_in_target': 3.0, 'baseline_contrast': 0.95}, ['good focus']),
        (
            {'baseline_contrast': 0.7, **MARGINS},
            ['baseline hides the target', 'beats its controls'],
        ),
        (
            {'score': 0.3, 'baseline_score': 0.0, 'trend': {'scores': [0.0, -0.6, 1.0, 0.3]}},
            ['nothing to explain'],
        ),
        ({'score': 5.0, 'baseline_score': -6.0, 'trend': {'scores': [-6.0, -7.0, 5.0]}}, []),
        ({'completeness_gap': 0.05}, []),
        ({'completeness_gap': 0.06}, ['gap too large']),
        ({'map_error': 0.2}, ['map not settled']),
        ({'map_error': 0.6}, ['map not computed']),
        ({'rim_excess': 1.5, 'padding_excess': 0.5}, ['border artefact']),
        ({'rim_excess': 0.5, 'padding_excess': 1.5}, ['padding artefact']),
        ({**SPOT, 'distant_spot_effect': 0.25}, ['distant spot']),
        ({**SPOT, 'distant_spot_effect': 0.15}, []),
        ({'deletion_margin': 0.2, 'insertion_margin': 0.0}, ['beats its controls']),
        ({'deletion_margin': 0.0, 'insertion_margin': 0.2}, ['beats its controls']),
        ({'deletion_margin': 0.02, 'insertion_margin': 0.02}, ['fails its control']),
        ({'deletion_margin': None, 'insertion_margin': 0.1}, []),
        ({'recomputed_correlation': 0.3}, ['not reproduced']),
        ({'recomputed_correlation': 0.6}, []),
        ({'randomised_correlation': 0.6}, ['survives randomisation']),
        ({'broad_sensitivity': 1.2}, ['unstable under noise']),
        ({'max_sensitivity': 1.2}, []),
        ({'infidelity': 0.95}, ['unfaithful to patches']),
        ({'baseline_correlation': 0.1}, ['unstable between baselines']),
        ({'dice': 0.3}, ['poor mask']),
    ],
)
def test_each_rule_at_its_threshold(figures, expected):
    assert flags(figures)[1:] == expected


def test_what_to_do_comes_first_then_concerns():
    figures = {'attribution_ratio_in_target': 3.0, 'map_error': 0.5, 'rim_excess': 3.0}
    results = findings(figures | SETTINGS)
    assert [finding.level for finding in results[1:]] == [CONCERN, NOTE, GOOD]
    assert results[0].flag == 'not checked' and '--evaluate quick' in results[0].text


@pytest.mark.parametrize(
    ('figures', 'flag'),
    [
        ({}, 'not checked'),
        ({'map_error': 0.5}, 'not checked'),
        ({'map_error': 0.6}, 'do not trust'),
        ({'baseline_contrast': 0.5}, 'do not trust'),
        (MARGINS, 'trust broadly'),
        ({**MARGINS, 'map_error': 0.5}, 'trust in part'),
        ({**MARGINS, 'randomised_correlation': 0.9}, 'do not trust'),
        ({**MARGINS, 'recomputed_correlation': 0.1}, 'do not trust'),
        ({'deletion_margin': -0.1, 'insertion_margin': -0.1}, 'do not trust'),
    ],
)
def test_the_first_sentence_says_what_to_do(figures, flag):
    results = findings(figures | SETTINGS)
    assert results[0].flag == flag and results[0].text.endswith('.')
    assert [finding.flag for finding in results].count(flag) == 1


def test_a_true_map_may_raise_doubts_about_the_model():
    only_model = {**MARGINS, **SPOT, 'distant_spot_effect': 0.9, 'rim_excess': 2.0}
    first = findings(only_model | SETTINGS)[0]
    assert first.flag == 'trust in part'
    assert 'map can be trusted' in first.text and 'hangs on a spot' in first.text
    first = findings(only_model | {'map_error': 0.5} | SETTINGS)[0]
    assert first.flag == 'trust in part' and 'broad features' in first.text


def test_a_check_that_tells_nothing_is_not_said_to_be_missing():
    """The image is so small that removing parts of it says nothing about any map."""
    settings = {'settings': SETTINGS['settings'] | {'evaluate': 'quick'}}
    (first,) = findings(SETTINGS | settings | {'deletion_margin': None})
    assert first.flag == 'not checked' and '--evaluate' not in first.text


def test_what_a_tolerance_promises_is_no_concern():
    figures = {'completeness_gap': 0.08, 'settings': {'gap_tolerance': 0.05, 'tolerance': 0.1}}
    assert 'gap too large' not in [finding.flag for finding in findings(figures)]
    figures['completeness_gap'] = 0.11
    assert 'gap too large' in [finding.flag for finding in findings(figures)]


def test_every_text_can_be_written_and_every_threshold_is_used():
    figures = {name: 0.5 for rule in FINDING_RULES for name in rule.needs} | SETTINGS
    figures |= {'trend': {'scores': [0.0, 1.0]}, 'baseline_score': 0.0}
    figures |= {'deletion_margin': 0.0, 'insertion_margin': 0.0}
    for rule in FINDING_RULES:
        text = rule.text.format(**figures)
        assert text.endswith('.') and '{' not in text
        names = {part[1] for part in string.Formatter().parse(rule.text) if part[1]}
        assert {name.split('.')[0].split('[')[0] for name in names} <= set(rule.needs)
    # Moving a threshold far to either side changes what is found in some image.
    figures['gradient_deviation'] = None  # a wrong gradient leaves out other findings
    shown = figures | {'baseline_contrast': None, 'deletion_margin': None}  # nothing is hidden
    wrong = {'gradient_deviation': 0.5, 'gradient_cause': 'sign'}
    for threshold in (field.name for field in fields(Thresholds)):
        assert any(
            flags(example, **{threshold: -9.0}) != flags(example, **{threshold: 9.0})
            for example in (figures, shown, wrong)
        ), threshold


def test_thresholds_are_overridden_by_name():
    limits = parse_thresholds(['focus_ratio=5', 'dice=0.9'])
    assert limits == Thresholds(focus_ratio=5, dice=0.9)
    assert parse_thresholds([]) == Thresholds()


@pytest.mark.parametrize(
    ('pair', 'message'),
    [('focus=5', 'unknown threshold "focus" .choose from focus_ratio,'),
     ('dice=much', 'not of the form dice=NUMBER'), ('dice', 'not of the form'),
     ('dice=nan', 'not of the form')],
)  # fmt: skip
def test_a_wrong_threshold_is_explained(pair, message):
    with pytest.raises(InputError, match=message):
        parse_thresholds([pair])


def test_the_batch_counts_flags_in_the_order_of_the_rules():
    images = [
        ['not checked', 'poor mask', 'good focus'],
        ['do not trust', 'poor mask'],
    ]
    assert batch_findings(images) == [
        'do not trust: 1 of 2 images', 'not checked: 1 of 2 images',
        'good focus: 1 of 2 images', 'poor mask: 2 of 2 images']  # fmt: skip
    assert batch_findings([]) == []


def test_the_words_for_a_map_error_are_those_of_the_findings():
    assert map_verdict(0.05) == 'settled, small details aside'
    assert map_verdict(0.3) == 'only its broad features are settled'
    assert map_verdict(0.6) == 'not even its broad features are settled'


@pytest.mark.parametrize('gap, warned', [(None, False), (0.05, False), (0.051, True)])
def test_gap_warning(gap, warned):
    assert bool(accuracy_warning(statistics_for_figures(completeness_gap=gap))) == warned


def test_a_tolerance_that_was_not_reached_is_told():
    settings = {'gap_tolerance': 0.05, 'tolerance': 0.01}
    missed = statistics_for_figures(settings=settings, within_tolerance=False)
    assert 'tolerance of 1 % was not reached in 4 steps' in accuracy_warning(missed)
    assert accuracy_warning(missed | {'within_tolerance': True, 'completeness_gap': 0}) is None


def test_map_error_in_words():
    words = [map_verdict(error) for error in (None, 0.01, 0.05, 0.5)]
    assert words[0] == 'unknown' and len(set(words)) == 4


def test_a_fatal_finding_is_a_concern_and_says_why_in_the_first_sentence():
    fatal = [rule for rule in FINDING_RULES if rule.fatal]
    assert len(fatal) == 7 and all(rule.level == CONCERN for rule in fatal)
    assert not any(rule.fatal and rule.of_model for rule in FINDING_RULES)
    assert all(rule.level == CONCERN for rule in FINDING_RULES if rule.of_model)
    figures = SETTINGS | {'recomputed_correlation': 0.1}
    (rule,) = (rule for rule in fatal if rule.flag == 'not reproduced')
    first = findings(figures)[0]
    assert first.flag == 'do not trust' and rule.fatal in first.text


def test_the_page_of_the_verdict_says_what_each_threshold_means():
    page = Path(__file__).parents[2] / 'docs' / 'checks_and_verdict.md'
    assert len(thresholds_table()) == len(fields(Thresholds))
    assert '\n'.join(thresholds_table()) in page.read_text(encoding='utf-8')
