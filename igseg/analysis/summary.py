"""The tables, figures and pages of a batch, made without holding its images in memory.

While a batch runs, a `Journal` adds the rows of each image to summary.csv. At the end the rows are
put into the order of the dataset. Everything else is made from that table and from the statistics
files of the images, which are read one after the other.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from tqdm import tqdm

from igseg.analysis.job import DONE, FAILED, GRACE, NETWORK_DELAY, POLL, SKIPPED, Outcome, Share
from igseg.checks.verdict import (
    Thresholds,
    accuracy_warning,
    batch_findings,
    concerns,
    gap_tolerance_of,
)
from igseg.errors import OutputError
from igseg.maps import rank_correlation
from igseg.results.files import figure_writer, image_files, read_statistics, write_files
from igseg.results.page import Page, report_html
from igseg.settings import reproducing_command
from igseg.statistics import (
    CHECK,
    COMPOUND,
    COST,
    NUMBER,
    RECORD,
    RESULT,
    STATISTICS,
    TEXT,
    WHOLE,
    Statistics,
    names_of_channels,
)

if TYPE_CHECKING:  # slow to import, and needed only when a batch ends
    import pandas as pd

CHANNELS = ('share_red', 'share_green', 'share_blue')  # from `channel_shares` of colours
_FLAT = {key: row.kind for key, row in STATISTICS.items() if row.kind != COMPOUND}
_RECORDS = {key: kind for key, kind in _FLAT.items() if STATISTICS[key].group == RECORD}
COLUMNS = {  # of summary.csv and summary.parquet: the flat statistics, and what a batch adds
    'image': TEXT, **dict.fromkeys(('status', 'reason', 'flags'), TEXT),
    **{key: kind for key, kind in _FLAT.items() if key not in _RECORDS},
    **dict.fromkeys(CHANNELS, NUMBER),
    **_RECORDS,
    'number': WHOLE,  # of the image in the batch, from 0
}  # fmt: skip
SUMMARISED = tuple(  # figures whose median over a batch is given
    key
    for group in (RESULT, COST, CHECK)
    for key, row in STATISTICS.items()
    if row.summarised and row.group == group
)
FAILURES = ('image', 'reason')  # columns of failures.csv
NOT_REPEATED = ('evaluation', 'trend')  # in summary.json: long, and in the image's statistics
DEGENERATE_RATIO = 0.95  # a mask covering more than this looks like wrong preprocessing
BOOTSTRAPPED = 1000  # values at most; for more, the bootstrap is slow and gives the same
PAGE_LENGTH = 500  # explanations on one page
VANISHED = (
    'its files have disappeared from the output folder during the run (run the same command again)'
)


Median = tuple[float | None, list[float] | None]  # the median and its 95 % interval

Reasons = list[dict[str, str]]  # {'image', 'reason'} of each image that is not done


@dataclass(frozen=True)
class BatchResult:
    """The result of a batch."""

    images: Sequence[Statistics]  # the contents of the statistics files, read when needed
    skipped: Reasons = field(default_factory=list)  # empty target
    failed: Reasons = field(default_factory=list)  # unusable, not written
    overview: dict[str, Any] = field(default_factory=dict)  # see `batch_summary`
    unwritten: str = ''  # why the summary could not be written; empty: it was written

    @property
    def summary(self) -> dict[str, Any]:
        """The overview as it stands in summary.json: its figures are replaced by `median_NAME` and
        `interval_NAME` of each figure."""
        flat: dict[str, Any] = {}
        for key, value in self.overview.items():
            flat |= _flat(value) if key == 'figures' else {key: value}
        return flat


def _flat(figures: dict[str, Median]) -> dict[str, float | list[float] | None]:
    flat: dict[str, float | list[float] | None] = {}
    for name, (median, interval) in figures.items():
        flat |= {f'median_{name}': median, f'interval_{name}': interval}
    return flat


class StatisticsFiles(Sequence[Statistics]):
    """The statistics of many images; each is read from its file when it is needed."""

    def __init__(self, output_dir: Path, folders: Iterable[str]) -> None:
        self._output_dir, self._folders = output_dir, list(folders)

    def __len__(self) -> int:
        return len(self._folders)

    @overload
    def __getitem__(self, index: int) -> Statistics: ...

    @overload
    def __getitem__(self, index: slice) -> list[Statistics]: ...

    def __getitem__(self, index: int | slice) -> Statistics | list[Statistics]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return read_statistics(self._output_dir / self._folders[index])


def say_warnings(statistics: dict[str, Any], printed: Sequence[str] = ()) -> None:
    """Print on stderr what the user must not miss about an image. printed: notes that were printed
    before."""
    for text in (*statistics['notes'], accuracy_warning(statistics)):
        if text and text not in printed:
            tqdm.write(f'{statistics["image"]}: {text}', file=sys.stderr)


# --------------------------------------------------------------------------- while it runs


class AppendedTable:
    """A CSV file to which rows are added as they come: either whole lines or nothing.

    Rows that cannot be written (the disk is full) are written together with the next rows.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self._waiting = ''
        path.unlink(missing_ok=True)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows; cells of columns that a row lacks stay empty."""
        self._waiting += _csv_text([[row.get(name) for name in self.columns] for row in rows])
        if self._waiting and _append_whole(self.path, _csv_text([self.columns]), self._waiting):
            self._waiting = ''

    def text(self) -> str:
        """All rows that were added, as the text of a CSV file."""
        written = self.path.read_text(encoding='utf-8') if self.path.is_file() else ''
        return (written or _csv_text([self.columns])) + self._waiting


def _csv_text(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    # A file name that is no valid Unicode must not stop the table.
    return text.getvalue().encode(errors='backslashreplace').decode()


def _append_whole(path: Path, header: str, text: str) -> bool:
    """Add text to a file, and before it a header if the file is new. If that fails, the file stays
    as it was, and the result is False. The file has no buffer: a buffer would be written again when
    the file is closed, and would leave a part of a row if the disk is almost full."""
    try:
        with path.open('ab', buffering=0) as stream:
            before = stream.tell()
            content = (text if before else header + text).encode()
            whole = False
            try:
                whole = stream.write(content) == len(content)
            finally:
                if not whole:
                    os.ftruncate(stream.fileno(), before)
    except OSError:
        return False
    return whole


class Journal:
    """summary.csv and failures.csv, to which rows are added while the batch runs."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._rows = AppendedTable(output_dir / 'summary.csv', tuple(COLUMNS))
        self._failures = AppendedTable(output_dir / 'failures.csv', FAILURES)

    def add(self, outcome: Outcome) -> None:
        """Add what came of an image."""
        common = {
            'image': outcome.image,
            'number': outcome.number,
            'status': outcome.status,
            'reason': outcome.reason,
        }
        rows = [{**row, 'flags': _flags_text(row['flags'])} for row in outcome.rows]
        self._rows.add([{**row, **common} for row in rows or [{}]])
        if outcome.status == FAILED:
            self._failures.add([common])

    def table(self, names: Sequence[str], complete: bool, patience: float = 0.0) -> pd.DataFrame:
        """All rows in the order of the dataset, with the columns COLUMNS.

        names: of all images of the batch. complete: whether each image was added. Images whose
        files have disappeared since are listed as failed. patience: seconds after which missing
        files are looked for again.
        """
        import pandas as pd

        table = read_table(io.StringIO(self._rows.text()))
        gone = self._gone(table)
        if gone and patience:
            time.sleep(patience)
            gone = self._gone(table)
        table = table[~table['number'].isin(gone)]
        if complete:
            gone = sorted(set(range(len(names))) - set(table['number']))
        lost = [
            {'image': names[number], 'status': FAILED, 'reason': VANISHED, 'number': number}
            for number in dict.fromkeys(gone)
        ]
        lines = [[row.get(name) for name in COLUMNS] for row in lost]
        lost_table = read_table(io.StringIO(_csv_text([tuple(COLUMNS), *lines])))
        both = pd.concat([table, lost_table])
        ordered: pd.DataFrame = both.sort_values('number', kind='stable', ignore_index=True)
        return ordered

    def _gone(self, table: pd.DataFrame) -> list[int]:
        """The numbers of images that are done, but whose files have disappeared."""
        done = table[table['status'] == DONE]
        return [
            int(number)
            for number, folder in zip(done['number'], done['folder'], strict=True)
            if not image_files(self._output_dir / folder)['statistics'].is_file()
        ]


class Progress:
    """What came of the images so far. On rank 0: of the images of all ranks, with the progress bar
    and the summary."""

    def __init__(self, share: Share, output_dir: Path, names: Sequence[str]) -> None:
        """names: of the images of the batch."""
        self._share, self._output_dir, self._names = share, output_dir, names
        self._journal = Journal(output_dir) if share.rank == 0 else None
        self._bar = tqdm(total=len(names), desc='images', unit='image', disable=share.rank > 0)
        self._count = 0  # on rank 0: of images whose outcome is known

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Report outcomes of images of this process."""
        for outcome in outcomes:
            self._share.report(outcome)
        if self._journal is None:
            return
        for outcome in self._share.collect():
            self._journal.add(outcome)
            self._count += 1
            self._bar.update()
            if outcome.status == FAILED:
                why = outcome.reason.partition('\n')[0]  # a traceback stands in failures.csv
                tqdm.write(f'failed: {outcome.image}: {why}', file=sys.stderr)

    def wait_for_others(self, seconds: float = math.inf) -> None:
        """On rank 0: collect the other ranks' outcomes until they have all left."""
        deadline = time.monotonic() + seconds
        while self._journal and not self._share.others_left() and time.monotonic() < deadline:
            time.sleep(POLL)
            self.add([])
        self.add([])

    def finish(self, settings: dict[str, Any], defaults: dict[str, Any]) -> BatchResult:
        """Leave the group. On rank 0, write the summary and return the result of all ranks."""
        self._share.leave()
        if self._journal is None:
            return BatchResult([])
        self.wait_for_others(GRACE)
        self._bar.close()
        complete = self._count == len(self._names)
        patience = NETWORK_DELAY if self._share.size > 1 else 0.0
        table = self._journal.table(self._names, complete, patience)
        result = result_of(table, self._output_dir)
        try:
            write_summary(table, result, settings, defaults, self._output_dir)
        except OutputError as error:
            return replace(result, unwritten=str(error))
        return result


def read_table(source: Path | io.StringIO) -> pd.DataFrame:
    """summary.csv with the types of its columns; a figure that does not apply is missing."""
    import pandas as pd

    missing = {name: [''] for name, kind in COLUMNS.items() if kind != TEXT}
    return pd.read_csv(source, dtype=COLUMNS, keep_default_na=False, na_values=missing)


def row_of(statistics: Statistics) -> dict[str, Any]:
    """The row of summary.csv for an explanation; its flags are a list until they are written."""
    row = {
        **statistics,
        **_channel_shares(statistics),
        'flags': [finding['flag'] for finding in statistics['verdict']],
    }
    return {name: row[name] for name in COLUMNS if name in row}


def _channel_shares(statistics: Statistics) -> dict[str, float | None]:
    """Each channel's share of |attribution|, by the name of its column; None if the map does not
    tell channels apart."""
    names = names_of_channels(statistics)
    shares = statistics['channel_shares'] or [None] * len(names)
    if len(shares) != len(names):
        return {}
    return {f'share_{name}': share for name, share in zip(names, shares, strict=True)}


def _flags_text(flags: Sequence[str]) -> str:
    """An explanation's flags as one cell of summary.csv."""
    return '; '.join(flags)


def flags_of(table: pd.DataFrame) -> list[list[str]]:
    """The flags of each explanation in the table of summary.csv."""
    return [text.split('; ') if text else [] for text in table['flags']]


# --------------------------------------------------------------------------- at the end


def median_interval(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """The 95 % confidence interval of the median; None for fewer than three values.

    It comes from a seeded bootstrap: bias-corrected and accelerated if that can be computed, else
    by percentiles. For more than BOOTSTRAPPED values it comes from their ranks (the sign test),
    which is exact; the bootstrap approaches it.
    """
    from scipy import stats  # slow to import

    if len(values) < 3:
        return None
    if min(values) == max(values):
        return [float(values[0])] * 2
    if len(values) > BOOTSTRAPPED:
        ranks = stats.quantile_test(np.asarray(values), p=0.5).confidence_interval(0.95)
        return [float(ranks.low), float(ranks.high)]
    for method in ('BCa', 'percentile'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # SciPy warns if BCa is degenerate
            interval = stats.bootstrap(
                (np.asarray(values, float),), np.median, method=method, rng=np.random.default_rng(0)
            ).confidence_interval
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            return [float(interval.low), float(interval.high)]
    return None


def spearman(pairs: Sequence[Sequence[float]] | np.ndarray) -> float | None:
    """Spearman's rank correlation of at least three pairs; None if one side is constant."""
    if len(pairs) < 3:
        return None
    first, second = np.asarray(pairs, float).T
    return rank_correlation(first, second)


def batch_summary(table: pd.DataFrame) -> dict[str, Any]:
    """The counts, the median of each figure with its 95 % interval, the correlation of the
    attribution ratio with Dice, the findings, and what looks wrong about the predictions."""
    done, skipped = table[table['status'] == DONE], int((table['status'] == SKIPPED).sum())
    return {
        'images': len(done),
        'skipped': skipped,
        'failed': int((table['status'] == FAILED).sum()),
        'figures': {name: _median_of(_values_of(done, name)) for name in SUMMARISED},
        'ratio_dice_correlation': spearman(_values_of(done, 'attribution_ratio', 'dice')),
        'findings': batch_findings(flags_of(done)),
        'suspicion': _suspicion(done, skipped),
    }


def _values_of(table: pd.DataFrame, *names: str) -> np.ndarray:
    """The values of columns in the rows where none of them is missing: (N,) of one column,
    (N, names) of several."""
    values: np.ndarray = table[list(names)].dropna().to_numpy(float)
    return values[:, 0] if len(names) == 1 else values


def _median_of(values: np.ndarray) -> Median:
    return float(np.median(values)) if len(values) else None, median_interval(values)


def _suspicion(done: pd.DataFrame, skipped: int) -> str | None:
    """A sentence if most predictions are all foreground or empty; else None."""
    full = int((done['prediction_ratio'] > DEGENERATE_RATIO).sum())
    empty = skipped + int((done['prediction_area'] == 0).sum())
    if 2 * (full + empty) <= len(done) + skipped:
        return None
    return (
        f'the prediction is empty on {empty} and all foreground on {full} of '
        f'{len(done) + skipped} images: the preprocessing may not be what the model '
        'was trained with (try --normalize none, another --image_size or --resize letterbox)'
    )


def median_lines(result: BatchResult) -> list[str]:
    """Lines of text: the median and the interval of each figure that was measured."""
    lines = []
    for name, (median, interval) in result.overview.get('figures', {}).items():
        if median is not None:
            between = ' (95 %: {:.4g} to {:.4g})'.format(*interval) if interval else ''
            lines.append(f'{f"median {name}".replace("_", " "):32}{median:.4g}{between}')
    return lines


def result_of(table: pd.DataFrame, output_dir: Path) -> BatchResult:
    """The result of a batch, from its table."""
    skipped, failed = (_reasons(table[table['status'] == status]) for status in (SKIPPED, FAILED))
    folders = table[table['status'] == DONE]['folder']
    images = StatisticsFiles(output_dir, folders)
    return BatchResult(images, skipped, failed, batch_summary(table))


def _reasons(table: pd.DataFrame) -> Reasons:
    pairs = zip(table['image'], table['reason'], strict=True)
    return [{'image': image, 'reason': reason} for image, reason in pairs]


def write_summary(
    table: pd.DataFrame,
    result: BatchResult,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    output_dir: Path,
) -> None:
    """Write index.html (and index_2.html, … for many images), summary.csv and summary.parquet (a
    row for each explanation), summary.json, summary.png, and failures.csv if images failed.

    settings: of this batch, as they are recorded. defaults: values that commands leave out.
    """
    writers: dict[Path, Callable[[Path], object]] = {
        output_dir / 'summary.csv': lambda path: table.to_csv(path, index=False),
        output_dir / 'summary.parquet': lambda path: table.to_parquet(path, index=False),
    }
    if result.failed:
        failures = table[table['status'] == FAILED][list(FAILURES)]
        writers[output_dir / 'failures.csv'] = lambda path: failures.to_csv(path, index=False)
    done = table[table['status'] == DONE]
    if len(done):
        from igseg.results.figures import summary_figure  # with matplotlib, which is slow to import

        figure = summary_figure(
            done, gap_tolerance_of(settings), result.overview['ratio_dice_correlation'],
            Thresholds(**settings['thresholds']),
        )  # fmt: skip
        writers[output_dir / 'summary.png'] = figure_writer(figure)
    pages = page_plan(done)
    for page, folders in pages:
        images = StatisticsFiles(output_dir, folders)
        writers[output_dir / page.file] = partial(
            _write_page, page=page, images=images, result=result, defaults=defaults,
            output_dir=output_dir,
        )  # fmt: skip
    _remove_stale(output_dir, keep={path.name for path in writers})
    writers[output_dir / 'summary.json'] = partial(_write_json, result=result, settings=settings)
    write_files(writers)


def page_plan(done: pd.DataFrame) -> list[tuple[Page, list[str]]]:
    """The pages, each with the folders that it shows. A single page is in the order of the dataset;
    of several pages, the first shows the images with the most concerns."""
    if len(done) > PAGE_LENGTH:
        count = [concerns(flags) for flags in flags_of(done)]
        done = done.assign(concerns=count).sort_values('concerns', ascending=False, kind='stable')
    folders = list(done['folder'])
    parts = [folders[k : k + PAGE_LENGTH] for k in range(0, len(folders), PAGE_LENGTH)] or [[]]
    return [(Page(number, len(parts)), part) for number, part in enumerate(parts, start=1)]


def _write_page(
    path: Path,
    page: Page,
    images: Sequence[Statistics],
    result: BatchResult,
    defaults: dict[str, Any],
    output_dir: Path,
) -> None:
    shown = images[:]
    commands = [reproducing_command(entry, defaults) for entry in shown]
    text = report_html(
        shown, result.overview, result.skipped, result.failed, commands, page, output_dir
    )
    # A file name that is no valid Unicode must not stop the page.
    path.write_text(text, encoding='utf-8', errors='backslashreplace')


def _write_json(path: Path, result: BatchResult, settings: dict[str, Any]) -> None:
    """Write summary.json, image by image."""
    head = {
        'summary': result.summary,
        'settings': settings,
        'skipped': result.skipped,
        'failed': result.failed,
    }
    with path.open('w', encoding='utf-8') as stream:
        stream.write(json.dumps(head, indent=2, allow_nan=False).removesuffix('\n}'))
        stream.write(',\n  "images": [')
        for number, statistics in enumerate(result.images):
            short = {key: v for key, v in statistics.items() if key not in NOT_REPEATED}
            stream.write(',\n' if number else '\n')
            stream.write(json.dumps(short, indent=2, allow_nan=False))
        stream.write('\n  ]\n}\n')


def _remove_stale(output_dir: Path, keep: set[str]) -> None:
    """Remove the picture and the pages of an earlier run that do not belong to this summary."""
    for path in (*output_dir.glob('index_*.html'), output_dir / 'summary.png'):
        if path.name not in keep and re.fullmatch(r'index_\d+\.html|summary\.png', path.name):
            path.unlink(missing_ok=True)
