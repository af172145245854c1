"""Batches that are shared, killed, and written to folders that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from helpers import PATIENCE, PLAIN, PLAIN_BATCH, ROOT, csv_rows, wait_until
from torch.distributed import HashStore

import integrated_gradients
from igseg.analysis.job import (
    DONE,
    FAILED,
    Alone,
    Group,
    Outcome,
    Writers,
    device_of_rank,
    hold_folder,
    read_ahead,
    writer_processes,
)
from igseg.analysis.summary import VANISHED, read_table
from integrated_gradients import InputError, OutputError, batch_integrated_gradients_analysis

# ------------------------------------------------------------------ sharing


def test_every_image_is_claimed_once_and_told_once():
    store, total = HashStore(), 50
    claimed: list[list[int]] = [[], [], []]
    store.set('rank 1', 'of a process that died')
    first, slow_one_begun = Group(store, 0, 3), threading.Event()

    def work(rank: int) -> None:
        share = first if rank == 0 else Group(store, rank, 3)
        share.begin()
        for number, read in read_ahead(share, total, lambda number: number):
            assert read() == number
            if rank == 2:  # takes as long over its first image as the others over all of theirs
                slow_one_begun.set()
                wait_until(lambda: len(claimed[0] + claimed[1]) >= total - 2)
            slow_one_begun.wait(PATIENCE)
            claimed[rank].append(number)
            share.report(Outcome(number, str(number), rows=({'folder': 'a'}, {'folder': 'b'})))
        share.leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for own in claimed for number in own) == list(range(total))
    assert len(claimed[2]) == 2  # the slow one, which reads one ahead, holds nobody up
    assert sorted(o.number for o in first.collect()) == list(range(total)) and not first.collect()
    assert first.others_left()


def test_nobody_claims_ahead_what_another_rank_may_be_waiting_for():
    share = Group(HashStore(), 0, 3)
    assert [share.claim(5, ahead=True) for _ in range(3)] == [0, 1, None]
    assert [share.claim(5, ahead=False) for _ in range(4)] == [2, 3, 4, None]


def test_reading_ahead_raises_where_it_is_asked_for():
    def read(number: int) -> int:
        if number == 1:
            raise InputError('unreadable')
        return number

    found = []
    for number, result in read_ahead(Alone(), 3, read):
        try:
            found.append(result())
        except InputError as error:
            found.append(f'{number} {error}')
    assert found == [0, '1 unreadable', 2]


# ------------------------------------------------------------------ interruption


def test_a_second_run_in_the_same_folder_is_told_who_holds_it(tmp_path, data, capsys):
    arguments = [*PLAIN_BATCH, '--data_dir', str(data), '--output_dir', str(tmp_path / 'out'),
                 '--figures', 'none']  # fmt: skip
    (tmp_path / 'out').mkdir()
    with hold_folder(tmp_path / 'out'):
        assert integrated_gradients.main(arguments) == 2
        said = capsys.readouterr().err
        assert f'in use by another run (process {os.getpid()} on ' in said
        assert 'Traceback' not in said
        single = [*arguments, '--mode', 'single', '--image_path', str(data / 'image_0.png')]
        assert integrated_gradients.main(single) == 2
    assert not list((tmp_path / 'out').iterdir())
    assert integrated_gradients.main(arguments) == 0


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    script = (
        'import sys; from pathlib import Path; from igseg.analysis.job import hold_folder\n'
        'with hold_folder(Path(sys.argv[1])):\n    print("held", flush=True); sys.stdin.read()'
    )
    process = subprocess.Popen([sys.executable, '-c', script, str(tmp_path)], cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(InputError, match=f'process {process.pid}'), hold_folder(tmp_path):
        pass
    process.kill()
    process.communicate()
    with hold_folder(tmp_path):
        pass


# ------------------------------------------------------------------ what fails under a run


def test_a_folder_that_is_deleted_under_the_run(tmp_path, data):
    seen = []

    def before_image() -> None:
        seen.append(1)
        if len(seen) == 3:
            shutil.rmtree(tmp_path / 'out')

    result = batch_integrated_gradients_analysis(
        data_dir=data,
        output_dir=tmp_path / 'out',
        before_image=before_image,
        figures='none',
        **PLAIN,
    )
    assert [entry['image'] for entry in result.images] == ['image_2', 'image_3', 'image_4']
    assert [entry['image'] for entry in result.failed] == ['image_0', 'image_1']
    assert {entry['reason'] for entry in result.failed} == {VANISHED}
    rows = (tmp_path / 'out' / 'failures.csv').read_text().splitlines()
    assert rows[0] == 'image,reason' and [row.split(',')[0] for row in rows[1:]] == [
        'image_0', 'image_1',
    ]  # fmt: skip
    again = batch_integrated_gradients_analysis(
        data_dir=data, output_dir=tmp_path / 'out', figures='none', **PLAIN
    )
    assert len(again.images) == 5 and not again.failed
    assert not (tmp_path / 'out' / 'failures.csv').exists()


def test_images_that_become_unreadable_during_the_run(tmp_path, data):
    """A share that returns less than the file holds, and a file that goes."""
    (data / 'image_2.png').write_bytes((data / 'image_2.png').read_bytes()[:3000])

    def before_image() -> None:
        (data / 'image_4.png').unlink(missing_ok=True)

    result = batch_integrated_gradients_analysis(
        data_dir=data,
        output_dir=tmp_path / 'out',
        before_image=before_image,
        figures='none',
        **PLAIN,
    )
    assert [entry['image'] for entry in result.images] == ['image_0', 'image_1', 'image_3']
    reasons = {entry['image']: entry['reason'] for entry in result.failed}
    assert 'image_2.png is damaged' in reasons['image_2']
    assert 'not found' in reasons['image_4']


def test_damaged_maps_cost_one_image(tmp_path, data):
    options = {'data_dir': data, 'output_dir': tmp_path / 'out', 'num_samples': 2, **PLAIN}
    batch_integrated_gradients_analysis(figures='none', **options)
    _, maps = tmp_path.glob('out/*/*_attributions.npz')
    maps.write_bytes(maps.read_bytes()[:1000])
    result = batch_integrated_gradients_analysis(figures='png', **options)
    (failed,) = result.failed
    assert failed['image'] == maps.parent.name and 'damaged' in failed['reason']
    again = batch_integrated_gradients_analysis(overwrite=True, figures='none', **options)
    assert len(again.images) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A disk on which the results of a few images fit."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=120k', 'tmpfs', str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('file systems cannot be mounted here')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.mark.parametrize('copies', [1, 2])
def test_a_disk_that_fills_up(tmp_path, data, small_disk, capsys, copies):
    """copies: with two, there are enough images for worker processes."""
    for path in list(data.iterdir()) * (copies - 1):
        shutil.copy(path, data / f'copy_of_{path.name}')
    arguments = [*PLAIN_BATCH, '--data_dir', str(data), '--output_dir', str(small_disk / 'out'),
                 '--num_samples', 'all', '--figures', 'none']  # fmt: skip
    assert integrated_gradients.main(arguments) == 1
    said = capsys.readouterr()
    assert 'No space left on device' in said.err and 'Traceback' not in said.err
    assert said.err.count('failed: ') >= 2
    assert not list(small_disk.rglob('.tmp*'))
    whole = len(list(small_disk.glob('out/*/*_statistics.json')))
    assert 0 < whole < 5 * copies
    subprocess.run(['mount', '-o', 'remount,size=50m', str(small_disk)], check=True)
    assert integrated_gradients.main(arguments) == 0
    table = read_table(small_disk / 'out' / 'summary.csv')
    assert list(table['status']) == [DONE] * 5 * copies


def test_a_worker_that_is_killed_costs_one_image():
    with Writers(1) as writers:
        writers.add(Outcome(0, 'a'), partial(os._exit, 1))
        wait_until(lambda: writers.settle_done() or not writers.waiting)
        writers.add(Outcome(1, 'b'), partial(time.sleep, 0))
    first, second = writers.finished()
    assert (first.status, second.status) == (FAILED, DONE)
    assert 'was killed' in first.reason


@pytest.mark.parametrize(
    ('images', 'on_gpu', 'cores', 'ranks', 'expected'),
    [(7, True, 64, 1, 0), (8, False, 16, 1, 2), (8, True, 64, 8, 8), (8, True, 16, 8, 2),
     (8, False, 2, 3, 1)],
)  # fmt: skip
def test_writers_by_cores_and_ranks(monkeypatch, images, on_gpu, cores, ranks, expected):
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    assert writer_processes(images, on_gpu) == expected


@pytest.mark.parametrize(
    ('device', 'ranks', 'gpu', 'expected'),
    [('auto', 4, True, 'cuda:2'), ('cuda', 4, True, 'cuda:2'), ('auto', 1, True, 'auto'),
     ('cpu', 4, True, 'cpu'), ('cuda:0', 4, True, 'cuda:0'), ('auto', 4, False, 'auto')],
)  # fmt: skip
def test_each_rank_has_a_gpu_of_its_own(monkeypatch, device, ranks, gpu, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setenv('LOCAL_RANK', '2')
    assert device_of_rank(device, ranks) == expected
    assert chosen == ([torch.device('cuda:2')] if expected == 'cuda:2' else [])


def test_more_ranks_than_gpus_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(InputError, match='no device cuda:2: there are 2 GPUs'):
        device_of_rank('auto', 4)


@pytest.mark.parametrize('processes', [0, 1])
def test_an_image_that_cannot_be_written_is_told(processes):
    def refuse() -> None:
        raise OutputError('the disk is full')

    with Writers(processes) as writers:
        writers.add(Outcome(0, 'a', rows=({'folder': 'a'},)), refuse)
    assert writers.finished() == [Outcome(0, 'a', FAILED, 'the disk is full')]
    assert writers.in_trouble


def test_figures_can_be_left_out_and_drawn_later(tmp_path, data):
    def files(figures: str) -> set[str]:
        result = batch_integrated_gradients_analysis(
            data_dir=data, output_dir=tmp_path, num_samples=1, figures=figures, **PLAIN
        )
        assert not result.failed
        page = (tmp_path / 'index.html').read_text()
        assert ('image_0_thumbnail.png' in page) == (figures == 'all')
        return {path.name.removeprefix('image_0_') for path in tmp_path.glob('image_0/*')}

    numbers = {'attributions.npz', 'statistics.json'}
    assert files('none') == numbers
    written = (tmp_path / 'image_0' / 'image_0_statistics.json').stat().st_mtime_ns
    assert files('png') == numbers | {'attribution.png', 'channels.png'}
    assert files('all') == numbers | {
        'attribution.png', 'channels.png', 'image.png', 'overlay.png', 'thumbnail.png',
        'uncertainty.png',
    }  # fmt: skip
    assert (tmp_path / 'image_0' / 'image_0_statistics.json').stat().st_mtime_ns == written
    with pytest.raises(InputError, match='unknown figures "svg"'):
        files('svg')


def test_rows_appear_while_the_batch_runs(tmp_path, data):
    rows = []

    def before_image() -> None:
        path = tmp_path / 'out' / 'summary.csv'
        rows.append(len(csv_rows(path)) if path.exists() else 0)

    batch_integrated_gradients_analysis(
        data_dir=data,
        output_dir=tmp_path / 'out',
        before_image=before_image,
        figures='none',
        **PLAIN,
    )
    assert rows == [0, 1, 2, 3, 4]
    content = json.loads((tmp_path / 'out' / 'summary.json').read_text())
    assert [entry['image'] for entry in content['images']] == [f'image_{k}' for k in range(5)]
