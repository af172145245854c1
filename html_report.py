"""The page `index.html` of a batch: what was found, image by image, to read and to pass on.

One self-contained file (styles, script and figures' data inside, pictures beside it by relative
path) that opens from disk without a network. Everything that comes from files, names included,
reaches the page through Jinja2's escaping or as text nodes.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, select_autoescape

from faithfulness import METRICS
from result_files import FILE_ENDINGS
from verdict import RULES, concerns

TEMPLATE = 'report_template.html'
COLUMNS = (  # statistic, heading, what it is
    ('dice', 'Dice', 'overlap of prediction and truth, 0 to 1'),
    ('attribution_ratio', 'Ratio', 'mean |attribution| in the prediction / in the background'),
    ('completeness_gap', 'Gap', 'how far the sum of the map misses the change of the score'),
    ('map_error', 'Map error', 'estimated relative L2 error of the map'),
)
MOST_LISTED = 200  # skipped or failed images
PERCENT = ('completeness_gap', 'map_error', 'prediction_ratio', 'share_in_prediction')
FIGURES = (  # statistics shown in the detail view, before those of METRICS
    ('dice', 'Dice'), ('attribution_ratio', 'Attribution ratio'),
    ('completeness_gap', 'Completeness gap'), ('map_error', 'Map error (estimate)'),
    ('share_in_prediction', 'Share of |attribution| in the prediction'),
    ('prediction_ratio', 'Share of pixels predicted'), ('score', 'F(x)'),
    ('baseline_score', 'F(baseline)'), ('gradient_evaluations', 'Gradient evaluations'),
    ('seconds', 'Seconds'),
)  # fmt: skip


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


def report_html(
    images: Sequence[dict],
    summary: dict,
    skipped: Sequence[dict],
    failed: Sequence[dict],
    commands: Sequence[str],
    page: Page = Page(),
    output_dir: Path | None = None,
) -> str:
    """The page. images: those on it: statistics with `folder` and `verdict`; commands: what makes
    each again. output_dir: where the pictures are, to leave out those that are not."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=select_autoescape(['html']),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    flags = {rule.flag: rule.level for rule in RULES}
    used = {finding['flag'] for entry in images for finding in entry['verdict']}
    return environment.get_template(TEMPLATE).render(
        page=page,
        rows=[table_row(entry, output_dir) for entry in images],
        data=[
            detail(entry, command, output_dir)
            for entry, command in zip(images, commands, strict=True)
        ],
        meanings={
            name: f'{metric.definition} ({metric.range}'
            f'{metric.better and ", better " + metric.better}; {metric.source})'
            for name, metric in METRICS.items()
        },
        columns=COLUMNS,
        flags={flag: level for flag, level in flags.items() if flag in used},
        summary=summary_rows(summary),
        counts=summary,
        skipped=skipped,
        most_listed=MOST_LISTED,
        failed=failed,
        first=images[0] if images else None,
    )


def table_row(statistics: dict, output_dir: Path | None) -> dict:
    """What the table shows of one image."""
    files = file_links(statistics, output_dir)
    return {
        'name': statistics['image'],
        'target': statistics['target'],
        'thumbnail': files.get('thumbnail'),
        'cells': [
            {'text': show(key, statistics[key]), 'value': statistics[key]} for key, _, _ in COLUMNS
        ],
        'verdict': statistics['verdict'],
        'concerns': concerns([finding['flag'] for finding in statistics['verdict']]),
    }


def file_links(statistics: dict, output_dir: Path | None) -> dict[str, str]:
    """Relative addresses of the files of an image, of those that are there."""
    folder = statistics['folder']
    files = {name: f'{folder}/{folder}_{end}' for name, end in FILE_ENDINGS.items()}
    return {
        name: quote(file)
        for name, file in files.items()
        if output_dir is None or (output_dir / file).is_file()
    }


def detail(statistics: dict, command: str, output_dir: Path | None) -> dict:
    """What the detail view shows of one image, as data for the page's script."""
    evaluation = statistics['evaluation'] or {}
    figures = [[label, show(key, statistics[key]), ''] for key, label in FIGURES]
    figures += [
        [key.replace('_', ' '), show(key, statistics[key]), key]
        for key in METRICS
        if statistics[key] is not None
    ]
    return {
        'name': statistics['image'],
        'target': statistics['target'],
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
    for key, value in summary.items():
        name = key.removeprefix('median_')
        if name == key or value is None:
            continue
        interval = summary[f'interval_{name}']
        between = ' to '.join(show(name, end) for end in interval) if interval else 'n/a'
        rows.append((name.replace('_', ' '), show(name, value), between))
    return rows


def show(key: str, value: float | None) -> str:
    """A figure as text."""
    if value is None:
        return 'n/a'
    return f'{100 * value:.3g} %' if key in PERCENT else f'{value:.3g}'


def reproducing_command(statistics: dict, defaults: dict[str, object]) -> str:
    """The command that explains one image again with the same settings.

    defaults: of the settings, which need not be said.
    """
    used = statistics['settings']
    words = ['python', 'integrated_gradients.py', '--model_path', str(used.get('model_path'))]
    words += ['--image_path', str(statistics['image_path'])]
    for name in ('encoder', 'architecture'):
        words += [f'--{name}', str(used[name])] if name in used else []
    for name, default in defaults.items():
        value = used[name]
        if value == default or value is None:
            continue
        if name == 'target':
            words += ['--each_object'] if value == 'each-object' else ['--target', *value.split()]
        elif name == 'thresholds':
            changed = {key: limit for key, limit in value.items() if limit != default[key]}
            words += ['--thresholds', *(f'{key}={limit:g}' for key, limit in changed.items())]
        elif name != 'num_steps' or used['tolerance'] is None:
            words += [f'--{name}'] if value is True else [f'--{name}', str(value)]
    return shlex.join(words)
