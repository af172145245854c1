"""The page `index.html` of a batch: what was found, image by image, to read and to pass on.

One self-contained file (styles, script and figures' data inside, pictures beside it by relative
path) that opens from disk without a network. Everything that comes from files, names included,
reaches the page through Jinja2's escaping or as text nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from igseg.checks.verdict import LEVELS, concerns
from igseg.results.files import FILE_ENDINGS, methods_figure_name
from igseg.statistics import (
    METRICS,
    STATISTICS,
    Statistics,
    counts_text,
    gap_text,
    shown,
    span_text,
)

TEMPLATE = 'page.html'

_SHOWN = sorted((row.page, key) for key, row in STATISTICS.items() if row.page is not None)
ON_PAGE = {key: STATISTICS[key] for _, key in _SHOWN}  # in the detail view, before METRICS
IN_TABLE = {key: row for key, row in ON_PAGE.items() if row.heading}
BESIDE = {  # figures by which the methods of an image are compared, and their headings
    'attribution_ratio_in_target': 'ratio of the target',
    'completeness_gap': 'gap',
    'map_error': 'map error',
    'deletion_margin': 'deletion margin',
    'insertion_margin': 'insertion margin',
    'infidelity': 'infidelity',
    'broad_sensitivity': 'noise, broad',
    'recomputed_correlation': 'recomputed',
    'randomised_correlation': 'randomised',
    'mass_in_truth': 'mass in truth',
    'seconds': 'seconds',
}
MOST_LISTED = 200  # skipped or failed images


@dataclass(frozen=True)
class Page:
    """One of the pages of a report; the first is index.html and holds the summary."""

    number: int = 1
    of: int = 1

    @property
    def file(self) -> str:
        """Its file name."""
        return self.file_of(self.number)

    @staticmethod
    def file_of(number: int) -> str:
        """The file name of a page."""
        return 'index.html' if number == 1 else f'index_{number}.html'


def file_links(statistics: Statistics, output_dir: Path | None) -> dict[str, str]:
    """Relative addresses of the files of an image, of those that are there."""
    folder = statistics['folder']
    files = {name: f'{folder}/{folder}_{end}' for name, end in FILE_ENDINGS.items()}
    if together := methods_figure_name(statistics):
        files['methods'] = together
    return {
        name: quote(file)
        for name, file in files.items()
        if output_dir is None or (output_dir / file).is_file()
    }


def what_of(statistics: Statistics) -> str:
    """Which of the explanations of its image this is; empty where there is one."""
    target = '' if statistics['target'] == 'predicted' else statistics['target']
    method = statistics['method'] if methods_figure_name(statistics) else ''
    return ', '.join(word for word in (target, method) if word)


def table_row(statistics: Statistics, output_dir: Path | None) -> dict:
    """What the table shows of one image."""
    files = file_links(statistics, output_dir)
    return {
        'name': statistics['image'],
        'of': what_of(statistics),
        'thumbnail': files.get('thumbnail'),
        'cells': [
            {'text': shown(key, statistics[key]), 'value': statistics[key]} for key in IN_TABLE
        ],
        'verdict': statistics['verdict'],
        'concerns': concerns([finding['flag'] for finding in statistics['verdict']]),
    }


def _by_methods_figure(images: Sequence[Statistics]) -> dict[str, list[Statistics]]:
    """Explanations of the same image and target by several methods, by the figure of them all."""
    several: dict[str, list[Statistics]] = {}
    for statistics in images:
        if name := methods_figure_name(statistics):
            several.setdefault(name, []).append(statistics)
    return several


def _beside(statistics: Statistics, key: str) -> str:
    """A figure as text; a gap that is none by construction says so."""
    return gap_text(statistics) if key == 'completeness_gap' else shown(key, statistics[key])


def methods_table(several: Sequence[Statistics]) -> dict:
    """The methods of one image and target beside each other: what to do with each map, and the
    figures that any of them has."""
    keys = [key for key in BESIDE if any(one[key] is not None for one in several)]
    return {
        'headings': ['method', 'verdict', *(BESIDE[key] for key in keys)],
        'rows': [
            [one['method'], one['verdict'][0]['flag'], *(_beside(one, key) for key in keys)]
            for one in several
        ],
    }


def detail(
    statistics: Statistics, command: str, output_dir: Path | None, beside: dict | None = None
) -> dict:
    """What the detail view shows of one image, as data for the page's script. beside: see
    `methods_table`."""
    evaluation = statistics['evaluation'] or {}
    figures = [[row.label, shown(key, statistics[key]), ''] for key, row in ON_PAGE.items()]
    figures += [
        [key.replace('_', ' '), shown(key, statistics[key]), key]
        for key in METRICS
        if statistics[key] is not None
    ]
    return {
        'name': statistics['image'],
        'of': what_of(statistics),
        'beside': beside,
        'files': file_links(statistics, output_dir),
        'verdict': statistics['verdict'],
        'figures': figures,
        'curves': rounded(evaluation.get('curves', [])),
        'profile': rounded(evaluation.get('profile')),
        'stages': evaluation.get('randomisation', []),
        'baselines': evaluation.get('baselines', []),
        'settings': statistics['settings'],
        'versions': statistics['versions'],
        'notes': statistics['notes'],
        'settled': statistics['settled_share']
        and shown('settled_share', statistics['settled_share']),
        'level': shown('uncertainty_level', statistics['uncertainty_level']),
        'command': command,
    }


def rounded(value: object) -> object:
    """Nested lists and dictionaries with numbers of three digits: a thousand images fit a page."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f'{value:.3g}') if isinstance(value, float) else value


def summary_rows(summary: dict) -> list[tuple[str, str, str]]:
    """Name, median and interval of every figure that was measured."""
    rows = []
    for name, (median, interval) in summary['figures'].items():
        if median is not None:
            between = ' to '.join(shown(name, end) for end in interval) if interval else 'n/a'
            rows.append((name.replace('_', ' '), shown(name, median), between))
    return rows


def report_html(
    images: Sequence[Statistics],
    summary: dict,
    skipped: Sequence[dict],
    failed: Sequence[dict],
    commands: Sequence[str],
    page: Page = Page(),
    output_dir: Path | None = None,
) -> str:
    """The page. images: those on it: statistics with `folder` and `verdict`; summary: of the whole
    batch, `figures` by name with median and interval; commands: what makes each image again.
    output_dir: where the pictures are, to leave out those that are not."""
    from jinja2 import Environment, PackageLoader, select_autoescape  # takes a while

    environment = Environment(
        loader=PackageLoader('igseg', 'results'),
        autoescape=select_autoescape(['html']),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    used = {finding['flag'] for entry in images for finding in entry['verdict']}
    beside = {name: methods_table(several) for name, several in _by_methods_figure(images).items()}
    return environment.get_template(TEMPLATE).render(
        page=page,
        rows=[table_row(entry, output_dir) for entry in images],
        data=[
            detail(entry, command, output_dir, beside.get(methods_figure_name(entry) or ''))
            for entry, command in zip(images, commands, strict=True)
        ],
        meanings={name: metric.explanation for name, metric in METRICS.items()},
        columns=IN_TABLE,
        flags={flag: level for flag, level in LEVELS.items() if flag in used},
        summary=summary_rows(summary),
        counts=summary,
        skipped=skipped,
        most_listed=MOST_LISTED,
        failed=failed,
        first=images[0] if images else None,
        baselines=counts_text([entry['baseline'] or 'none' for entry in images]),
        steps=span_text([entry['steps'] for entry in images]),
    )
