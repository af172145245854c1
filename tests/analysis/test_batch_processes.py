"""Batches of several processes, one of which may die."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import torch
from helpers import (
    PATIENCE,
    PLAIN_BATCH,
    SLOW_BATCH,
    differences,
    family,
    torchrun,
    wait_until,
)

import integrated_gradients

SIX_IMAGES = [*SLOW_BATCH, '--num_samples', '6']
SIX_DRAWN = [*PLAIN_BATCH, '--num_samples', '6']

# ------------------------------------------------------------------ sharing


def results_of_one_process(arguments: list[str], folder: Path) -> Path:
    """What one process makes of a batch, undisturbed, with one thread as each rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert integrated_gradients.main([*arguments, '--output_dir', str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
    return results_of_one_process(SIX_IMAGES, tmp_path_factory.mktemp('alone'))


def test_ranks_give_what_one_process_gives(tmp_path, alone):
    process = torchrun(2, [*SIX_IMAGES, '--output_dir', str(tmp_path)])
    said, progress = process.communicate()
    assert process.returncode == 0, progress
    assert not differences(alone, tmp_path)
    assert said.count('6 images explained') == 1  # one summary, and one bar
    counts = [int(count) for count in re.findall(r'(\d)/6 \[', progress)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6


@pytest.mark.long
def test_two_machines_give_what_one_process_gives(tmp_path):
    """Figures too. Ranks of one machine, above, meet in another way and then do the same."""
    alone = results_of_one_process(SIX_DRAWN, tmp_path / 'alone')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    meeting = ['--nnodes=2', '--rdzv-backend=c10d', '--rdzv-id=test',
               f'--rdzv-endpoint=localhost:{port}']  # fmt: skip
    arguments = [*SIX_DRAWN, '--output_dir', str(tmp_path / 'together')]
    machines = [torchrun(1, arguments, meeting) for _ in range(2)]
    for machine in machines:
        _, said = machine.communicate(timeout=PATIENCE)
        assert machine.returncode == 0, said
    assert not differences(alone, tmp_path / 'together')


def test_when_a_rank_dies_the_others_start_again_and_finished_images_stay(tmp_path, alone):
    arguments = [*SIX_IMAGES, '--output_dir', str(tmp_path)]
    process = torchrun(2, arguments, ['--standalone', '--max_restarts=1'])

    def two_images() -> list[Path]:
        found = list(tmp_path.glob('*/[!.]*_statistics.json'))  # not those about to be renamed
        return found if len(found) >= 2 else []

    finished = wait_until(two_images, process)
    before = {path: path.stat().st_mtime_ns for path in finished}
    ranks = [one for one in family(process.pid)[1:] if b'--output_dir' in command_of(one)]
    os.kill(ranks[-1], 9)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not differences(alone, tmp_path)


def command_of(process: int) -> bytes:
    try:
        return Path(f'/proc/{process}/cmdline').read_bytes()
    except OSError:
        return b''
