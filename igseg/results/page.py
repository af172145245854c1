"""The page `index.html` of a batch: the results of all images, to read and to pass on.

The page is one file with styles, script and data inside; only pictures lie beside it and have
relative paths. It opens from disk without a network. Everything that comes from files, names
included, reaches the page through Jinja2's escaping or as text nodes.
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
BESIDE = {  # the statistics that compare the methods of an image, and their headings
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
MOST_LISTED = 200  # skipped or failed images that are listed by name


@dataclass(frozen=True)
class Page:
    """One of the pages of a report; the first is index.html and holds the summary."""

    number: int = 1
    of: int = 1

    @property
    def file(self) -> str:
        """The file name of this page."""
        return self.file_of(self.number)

    @staticmethod
    def file_of(number: int) -> str:
        """The file name of the page with this number."""
        return 'index.html' if number == 1 else f'index_{number}.html'


def file_links(statistics: Statistics, output_dir: Path | None) -> dict[str, str]:
    """The relative addresses of an image's files that exist in `output_dir`; of all its files
    where that is None."""
    folder = statistics['folder']
    files = {name: f'{folder}/{folder}_{end}' for name, end in FILE_ENDINGS.items()}
    if figure_name := methods_figure_name(statistics):
        files['methods'] = figure_name
    return {
        name: quote(file)
        for name, file in files.items()
        if output_dir is None or (output_dir / file).is_file()
    }


def what_of(statistics: Statistics) -> str:
    """The target and the method of an explanation, as far as its image has others; else empty."""
    target = '' if statistics['target'] == 'predicted' else statistics['target']
    method = statistics['method'] if methods_figure_name(statistics) else ''
    return ', '.join(word for word in (target, method) if word)


def table_row(statistics: Statistics, output_dir: Path | None) -> dict:
    """The row of an explanation in the table of images."""
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
    """The explanations of an image and target by several methods, by the figure that shows them
    side by side."""
    several: dict[str, list[Statistics]] = {}
    for statistics in images:
        if name := methods_figure_name(statistics):
            several.setdefault(name, []).append(statistics)
    return several


def _beside(statistics: Statistics, key: str) -> str:
    """A statistic as text; the text of a gap says where the method promises none."""
    return gap_text(statistics) if key == 'completeness_gap' else shown(key, statistics[key])


def methods_table(several: Sequence[Statistics]) -> dict:
    """A table of the methods of one image and target: the verdict on each map, and the statistics
    that at least one of the maps has."""
    keys = [key for key in BESIDE if any(statistics[key] is not None for statistics in several)]
    return {
        'headings': ['method', 'verdict', *(BESIDE[key] for key in keys)],
        'rows': [
            [
                statistics['method'],
                statistics['verdict'][0]['flag'],
                *(_beside(statistics, key) for key in keys),
            ]
            for statistics in several
        ],
    }


def detail(
    statistics: Statistics, command: str, output_dir: Path | None, beside: dict | None = None
) -> dict:
    """The data of an explanation for the detail view, which the page's script shows. beside: the
    table of `methods_table`."""
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
    """Nested lists and dictionaries with all floats rounded to three digits, so that the data of a
    thousand images fit in a page."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f'{value:.3g}') if isinstance(value, float) else value


def summary_rows(summary: dict) -> list[tuple[str, str, str]]:
    """The name, the median and the interval of every statistic that has a median."""
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
    """The text of a page. images: the statistics of the explanations on it. summary: of the whole
    batch; its `figures` are medians and intervals by name. skipped, failed: images without results.
    commands: for each explanation, the command that makes it again. output_dir: the folder with the
    pictures; pictures that do not exist there are left out."""
    from jinja2 import Environment, PackageLoader, select_autoescape  # slow to import

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
