"""Batches of several processes: shared by ranks, killed, and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, differences, family, torchrun

# ------------------------------------------------------------------ sharing


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
    """What one process makes of a batch, undisturbed."""
    folder = tmp_path_factory.mktemp('alone')
    process = torchrun(1, [*SMALL, '--num_samples', '6', '--output_dir', str(folder)])
    _, said = process.communicate()
    assert process.returncode == 0, said
    return folder


def test_ranks_give_what_one_process_gives(tmp_path, alone):
    process = torchrun(3, [*SMALL, '--num_samples', '6', '--output_dir', str(tmp_path)])
    said, progress = process.communicate()
    assert process.returncode == 0, progress
    assert not differences(alone, tmp_path)
    assert said.count('6 images explained') == 1  # one summary, and one bar
    counts = [int(count) for count in re.findall(r'(\d)/6 \[', progress)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6


def test_two_machines_give_what_one_process_gives(tmp_path, alone):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    meeting = ['--nnodes=2', '--rdzv-backend=c10d', '--rdzv-id=test',
               f'--rdzv-endpoint=localhost:{port}']  # fmt: skip
    arguments = [*SMALL, '--num_samples', '6', '--output_dir', str(tmp_path)]
    machines = [torchrun(1, arguments, meeting) for _ in range(2)]
    for machine in machines:
        _, said = machine.communicate(timeout=180)
        assert machine.returncode == 0, said
    assert not differences(alone, tmp_path)


def test_when_a_rank_dies_the_others_start_again_and_finished_images_stay(tmp_path, alone):
    process = torchrun(
        2,
        [*SMALL, '--num_samples', '6', '--output_dir', str(tmp_path)],
        ['--standalone', '--max_restarts=1'],
    )
    deadline = time.time() + 120
    # Not those that are about to be renamed.
    while len(finished := list(tmp_path.glob('*/[!.]*_statistics.json'))) < 2:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    before = {path: path.stat().st_mtime_ns for path in finished}
    ranks = [one for one in family(process.pid)[1:] if b'--output_dir' in command_of(one)]
    os.kill(ranks[-1], 9)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not differences(alone, tmp_path)


def command_of(process: int) -> bytes:
    try:
        return Path(f'/proc/{process}/cmdline').read_bytes()
    except OSError:
        return b''


# ------------------------------------------------------------------ interruption


@pytest.mark.parametrize('kills', [2, pytest.param(50, marks=pytest.mark.long)])
def test_a_batch_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path, kills):
    # A process of its own: one that has computed in parallel must not fork.
    script = (
        'import sys; from pathlib import Path; from runs import run_kills\n'
        f'found = run_kills({kills}, 8, 1, Path(sys.argv[1]))\n'
        'assert found["files that differ from the undisturbed run"] == 0, found'
    )
    command = [sys.executable, '-c', script, str(tmp_path)]
    where = os.environ | {'PYTHONPATH': str(ROOT)}
    subprocess.run(command, cwd=ROOT / 'benchmarks', env=where, check=True, timeout=200 * kills)
    deadline = time.time() + 10  # the processes that wrote for those that were killed end too
    while workers := [one for one in Path('/proc').glob('[0-9]*') if is_orphan(one)]:
        assert time.time() < deadline, workers
        time.sleep(0.2)


def is_orphan(process: Path) -> bool:
    """Whether a process that draws and writes has lost its parent."""
    try:
        return b'loky' in (process / 'cmdline').read_bytes() and (
            '\nPPid:\t1\n' in (process / 'status').read_text()
        )
    except OSError:
        return False


@pytest.mark.skipif(sys.platform == 'win32', reason='process groups')
def test_ctrl_c_under_torchrun_leaves_a_summary(tmp_path):
    """The terminal gives it to all processes, and torchrun passes it on: twice within moments."""
    arguments = [*SMALL, '--num_samples', '60', '--output_dir', str(tmp_path)]
    process = torchrun(2, arguments, start_new_session=True)
    deadline = time.time() + 120
    while len(list(tmp_path.glob('*/*_statistics.json'))) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    content = json.loads((tmp_path / 'summary.json').read_text())
    assert 3 <= len(content['images']) < 60 and not content['failed'], said
    assert not list(tmp_path.rglob('.tmp*')) and not (tmp_path / '.lock').exists()
