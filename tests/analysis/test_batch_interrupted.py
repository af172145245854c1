"""Batches that are killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, PLAIN_BATCH, ROOT, SLOW_BATCH, torchrun, wait_until
from torch.distributed import HashStore

from igseg.analysis.job import Group


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
    arguments = [*SLOW_BATCH, '--num_samples', '60', '--output_dir', str(tmp_path)]
    process = torchrun(2, arguments, start_new_session=True)
    table = tmp_path / 'summary.csv'  # to which rank 0 adds what it was told of
    wait_until(lambda: table.is_file() and table.read_text().count('\n') > 3, process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    content = json.loads((tmp_path / 'summary.json').read_text())
    assert 3 <= len(content['images']) < 60 and not content['failed'], said
    assert not list(tmp_path.rglob('.tmp*')) and not (tmp_path / '.lock').exists()


def test_an_outcome_that_a_rank_did_not_write_any_more_is_not_waited_for():
    """A rank reserves its place first; Ctrl-C may end it before it writes."""
    store = HashStore()
    group = Group(store, 0, 2)
    store.add('reported', 1)
    assert group.collect() == []
