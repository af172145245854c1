"""A batch in numbers: medians with intervals, tables, and pages in order of concern."""

import math
import resource
import time

import numpy as np
import pandas as pd
import pytest
from helpers import PLAIN

from igseg.analysis.job import DONE, SKIPPED, Outcome
from igseg.analysis.summary import (
    COLUMNS,
    AppendedTable,
    BatchResult,
    Journal,
    batch_summary,
    flags_of,
    median_interval,
    median_lines,
    page_plan,
    read_table,
    spearman,
)
from integrated_gradients import batch_integrated_gradients_analysis


def test_bootstrap_interval_of_the_median():
    values = np.random.default_rng(0).normal(10, 2, 60).tolist()
    low, high = median_interval(values)
    assert low < np.median(values) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.253 * 2 / math.sqrt(60), rel=0.4)
    assert median_interval(values) == [low, high]  # seeded
    assert median_interval([1.0, 2.0]) is None
    assert median_interval([3.0] * 5) == [3.0, 3.0]


def test_ratio_and_dice_go_together():
    rising = [(1.0, 0.1), (2.0, 0.5), (9.0, 0.6)]
    assert spearman(rising) == pytest.approx(1)
    assert spearman([(-x, y) for x, y in rising]) == pytest.approx(-1)
    assert spearman(rising[:2]) is None
    assert spearman([(1.0, 0.1), (1.0, 0.2), (1.0, 0.3)]) is None


# ------------------------------------------------------------------ tables


def test_rows_are_added_whole_or_not_at_all(tmp_path):
    table = AppendedTable(tmp_path / 'out' / 'a.csv', ('x', 'y'))
    table.add([{'x': 1, 'y': 'a,b'}])  # there is no such folder
    (tmp_path / 'out').mkdir()
    table.add([{'x': 2}])
    assert (tmp_path / 'out' / 'a.csv').read_text() == 'x,y\n1,"a,b"\n2,\n'
    (tmp_path / 'out' / 'a.csv').unlink()
    table.add([{'x': 3}])
    assert table.text() == 'x,y\n3,\n'


def test_a_row_of_which_a_full_disk_takes_a_part_is_left_out_and_comes_with_the_next(tmp_path):
    table = AppendedTable(tmp_path / 'a.csv', ('x',))
    table.add([{'x': 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        table.add([{'x': 23456789}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'a.csv').read_text() == 'x\n1\n'
    table.add([{'x': 2}])
    assert (tmp_path / 'a.csv').read_text() == 'x\n1\n23456789\n2\n'


def test_the_columns_are_the_flat_statistics(tmp_path, data):
    result = batch_integrated_gradients_analysis(
        data_dir=data, output_dir=tmp_path / 'out', num_samples=1, **PLAIN
    )
    (statistics,) = result.images
    nested = {'trend', 'preparation', 'cropping', 'tiles', 'settings', 'versions', 'notes',
              'targets', 'methods', 'mask_flags', 'verdict', 'evaluation', 'channel_shares',
              'channel_names', 'class_scores', 'value_range', 'placement',
              'gradient_cause'}  # fmt: skip
    added = {'status', 'reason', 'flags', 'number', 'share_red', 'share_green', 'share_blue'}
    assert set(statistics) - nested == set(COLUMNS) - added
    assert [key for key in statistics if key in COLUMNS] == [
        key for key in COLUMNS if key not in added
    ]
    table = read_table(tmp_path / 'out' / 'summary.csv')
    same = pd.read_parquet(tmp_path / 'out' / 'summary.parquet')
    pd.testing.assert_frame_equal(table, same, check_dtype=False)
    for key in COLUMNS.keys() - added:
        value = table[key][0]
        assert (value == statistics[key]) or (statistics[key] is None and pd.isna(value)), key


def test_names_that_look_like_nothing_stay_names(tmp_path):
    """pandas takes NA, null and nan for missing values unless it is told."""
    journal = Journal(tmp_path)
    names = ['NA', 'null', 'nan', '007', 'None']
    for number, name in enumerate(names):
        journal.add(Outcome(number, name, SKIPPED, 'empty, "so" skipped'))
    table = journal.table(names, complete=True)
    assert list(table['image']) == names
    assert set(table['reason']) == {'empty, "so" skipped'}


def table_of(count: int, **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame({name: [None] * count for name in COLUMNS})
    names = [f'image_{number}' for number in range(count)]
    frame = frame.assign(image=names, folder=names, status=DONE, number=range(count), flags='')
    frame = frame.assign(reason='', prediction_ratio=0.1, prediction_area=5, **columns)
    return frame.astype(COLUMNS)


def test_a_summary_of_many_images_is_quick():
    values = np.random.default_rng(0).gamma(2, size=40_000)
    started = time.process_time()  # of this process alone, however busy the machine is
    found = batch_summary(table_of(40_000, attribution_ratio=values, dice=values, seconds=values))
    assert time.process_time() - started < 20
    median, (low, high) = found['figures']['attribution_ratio']
    assert low < median == np.median(values) < high
    assert high - low < 0.05 and found['ratio_dice_correlation'] == pytest.approx(1)


def test_the_summary_of_a_batch_is_written_and_printed_from_one_overview():
    values = [0.1, 0.2, 0.4, 0.3]
    result = BatchResult([], overview=batch_summary(table_of(4, completeness_gap=values)))
    median, interval = result.overview['figures']['completeness_gap']
    assert result.summary['median_completeness_gap'] == median == 0.25
    assert result.summary['interval_completeness_gap'] == interval
    assert result.summary['median_dice'] is result.summary['interval_dice'] is None
    assert list(result.summary)[:3] == ['images', 'skipped', 'failed']
    assert 'figures' not in result.summary
    (line,) = (one for one in median_lines(result) if 'gap' in one)
    low, high = interval
    assert line.split() == f'median completeness gap 0.25 (95 %: {low:.4g} to {high:.4g})'.split()


def test_flags_are_a_list_until_they_are_a_cell_of_the_table(tmp_path):
    journal = Journal(tmp_path)
    rows = ({'flags': ['poor mask', 'good focus']}, {'flags': []})
    journal.add(Outcome(0, 'a', rows=rows))
    table = read_table(tmp_path / 'summary.csv')
    assert list(table['flags']) == ['poor mask; good focus', '']
    assert flags_of(table) == [['poor mask', 'good focus'], []]


def test_ranks_give_the_interval_of_the_bootstrap(monkeypatch):
    values = np.random.default_rng(0).gamma(2, size=1500)
    by_ranks = median_interval(values)
    monkeypatch.setattr('igseg.analysis.summary.BOOTSTRAPPED', 2000)
    bootstrapped = median_interval(values)
    assert by_ranks == pytest.approx(bootstrapped, abs=0.15 * (bootstrapped[1] - bootstrapped[0]))


def test_pages_hold_the_most_concerning_first():
    table = table_of(1201)
    table.loc[700, 'flags'] = 'poor mask; fails its control'
    table.loc[900, 'flags'] = 'fails its control; background focus'
    pages = page_plan(table)
    assert [(page.file, len(folders)) for page, folders in pages] == [
        ('index.html', 500), ('index_2.html', 500), ('index_3.html', 201),
    ]  # fmt: skip
    assert pages[0][1][:3] == ['image_900', 'image_700', 'image_0']
    ((page, folders),) = page_plan(table[:500])
    assert page.of == 1 and folders[:2] == ['image_0', 'image_1']  # in the order of the dataset
