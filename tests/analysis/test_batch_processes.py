"""Batches of several processes: shared by ranks, killed, and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PATIENCE, PLAIN_BATCH, ROOT, differences, family, torchrun, wait_until

import integrated_gradients

SIX_IMAGES = [*PLAIN_BATCH, '--figures', 'png', '--num_samples', '6']
SLOW = ['--num_steps', '500', '--figures', 'none']  # seconds an image: it is stopped within some

# ------------------------------------------------------------------ sharing


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
    """What one process makes of a batch, undisturbed, with one thread as each rank has."""
    folder, threads = tmp_path_factory.mktemp('alone'), torch.get_num_threads()
    torch.set_num_threads(1)
    assert integrated_gradients.main([*SIX_IMAGES, '--output_dir', str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


def test_ranks_give_what_one_process_gives(tmp_path, alone):
    process = torchrun(2, [*SIX_IMAGES, '--output_dir', str(tmp_path)])
    said, progress = process.communicate()
    assert process.returncode == 0, progress
    assert not differences(alone, tmp_path)
    assert said.count('6 images explained') == 1  # one summary, and one bar
    counts = [int(count) for count in re.findall(r'(\d)/6 \[', progress)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6


@pytest.mark.long
def test_two_machines_give_what_one_process_gives(tmp_path, alone):
    """Ranks of one machine, above, meet in another way and then do the same."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    meeting = ['--nnodes=2', '--rdzv-backend=c10d', '--rdzv-id=test',
               f'--rdzv-endpoint=localhost:{port}']  # fmt: skip
    arguments = [*SIX_IMAGES, '--output_dir', str(tmp_path)]
    machines = [torchrun(1, arguments, meeting) for _ in range(2)]
    for machine in machines:
        _, said = machine.communicate(timeout=PATIENCE)
        assert machine.returncode == 0, said
    assert not differences(alone, tmp_path)


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


# ------------------------------------------------------------------ interruption


@pytest.mark.parametrize(
    ('kills', 'figures'), [(2, 'none'), pytest.param(50, 'all', marks=pytest.mark.long)]
)
def test_a_batch_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path, kills, figures):
    # A process of its own: one that has computed in parallel must not fork.
    script = (
        'import sys; from pathlib import Path; import runs\n'
        f'runs.SMALL = {[*PLAIN_BATCH, "--figures", figures]}\n'
        f'found = runs.run_kills({kills}, 8, 1, Path(sys.argv[1]))\n'
        'assert found["files that differ from the undisturbed run"] == 0, found'
    )
    command = [sys.executable, '-c', script, str(tmp_path)]
    where = os.environ | {'PYTHONPATH': str(ROOT)}
    subprocess.run(command, cwd=ROOT / 'benchmarks', env=where, check=True)
    # The processes that wrote for those that were killed end too.
    wait_until(lambda: not any(is_orphan(one) for one in Path('/proc').glob('[0-9]*')))


def is_orphan(process: Path) -> bool:
    """Whether a process that draws and writes has lost its parent."""
    try:
        return b'loky' in (process / 'cmdline').read_bytes() and (
            '\nPPid:\t1\n' in (process / 'status').read_text()
        )
    except OSError:
        return False


@pytest.mark.skipif(sys.platform == 'win32', reason='process groups')
def test_ctrl_c_under_torchrun_leaves_a_summary(tmp_path, monkeypatch):
    """The terminal gives it to all processes, and torchrun passes it on: twice within moments."""
    monkeypatch.setenv('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', str(PATIENCE))  # until it kills them
    arguments = [*PLAIN_BATCH, *SLOW, '--num_samples', '60', '--output_dir', str(tmp_path)]
    process = torchrun(2, arguments, start_new_session=True)
    table = tmp_path / 'summary.csv'  # to which rank 0 adds what it was told of
    wait_until(lambda: table.is_file() and table.read_text().count('\n') > 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    content = json.loads((tmp_path / 'summary.json').read_text())
    assert 3 <= len(content['images']) < 60 and not content['failed'], said
    assert not list(tmp_path.rglob('.tmp*')) and not (tmp_path / '.lock').exists()
