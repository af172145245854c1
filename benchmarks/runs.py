"""Shared by benchmarks and tests: paths of the demo, a tiny model, comparing and killing runs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

import integrated_gradients
from igseg.analysis.describe import explain
from igseg.analysis.study import Study
from igseg.network.loading import create_model
from integrated_gradients import Explanation, IntegratedGradients, ModelInput, Sample, Settings

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / 'demo' / 'demo_model.pth'
DEMO_DATA = ROOT / 'demo' / 'Dataset_no_preprocessing'
DEMO = ['--model_path', str(DEMO_MODEL), '--data_dir', str(DEMO_DATA)]
SMALL = ['--mode', 'batch', *DEMO, '--image_size', '64', '--num_steps', '2', '--target', 'image',
         '--step_batch', '1', '--device', 'cpu']  # fmt: skip
COST = ('seconds', 'peak_memory_bytes', 'step_batch')  # statistics that may differ between two runs
PARTS = 5  # kills before a batch is finished and compared


def tiny_model(folder: Path) -> list[str]:
    """A small untrained network of segmentation-models-pytorch, and the flags for it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {'encoder_depth': 3, 'decoder_channels': (16, 8, 4)}
    model = create_model('unet', 'mobilenet_v2', 1, **options)
    settings = {'architecture': 'unet', 'encoder': 'mobilenet_v2', 'options': options}
    torch.save({'state_dict': model.state_dict(), 'settings': settings}, folder / 'tiny.pth')
    return ['--model_path', str(folder / 'tiny.pth')]


# --------------------------------------------------------------------------- comparing runs


def differences(first: Path, second: Path) -> list[str]:
    """The differences between the results in two output folders, apart from their cost."""
    names = [{str(p.relative_to(folder)) for p in folder.rglob('*')} for folder in (first, second)]
    texts = [f'only in one of them: {name}' for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        compare = {'.json': _json, '.npz': _arrays, '.png': _pixels, '.csv': _table}.get(
            Path(name).suffix
        )
        if compare and name != 'summary.png' and compare(first / name) != compare(second / name):
            texts.append(f'differs: {name}')
    return texts


def _json(path: Path) -> object:
    return without_cost(json.loads(path.read_text(encoding='utf-8')))


def without_cost(content: object) -> object:
    """Statistics without their cost, at any depth; a summary without the medians of the cost."""
    if isinstance(content, dict):
        return {
            key: without_cost(value)
            for key, value in content.items()
            if key.removeprefix('median_').removeprefix('interval_') not in COST
        }
    return [without_cost(value) for value in content] if isinstance(content, list) else content


def _arrays(path: Path) -> dict[str, bytes]:
    with np.load(path) as arrays:
        return {name: arrays[name].tobytes() for name in arrays}


def _pixels(path: Path) -> bytes:
    return np.asarray(Image.open(path)).tobytes()


def _table(path: Path) -> object:
    return pd.read_csv(path, dtype=str).drop(columns=list(COST), errors='ignore').to_dict()


# --------------------------------------------------------------------------- killing runs


def in_child(arguments: Sequence[str]) -> int:
    """Start the command line in a forked process, which imports nothing again. Returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        os._exit(integrated_gradients.main(arguments))
    finally:
        os._exit(99)


def exit_status(child: int) -> int:
    """Wait for a child process. Returns its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int, after: float) -> bool:
    """Kill a child after some seconds. False, at once, if it finishes before."""
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return exit_status(child) == -signal.SIGKILL


def run_kills(count: int, images: int, seed: int, work: Path) -> dict:
    """Kill a batch `count` times, finish it every PARTS kills, and compare."""
    arguments = [*SMALL, '--num_samples', str(images), '--output_dir']
    started = time.perf_counter()
    assert exit_status(in_child([*arguments, str(work / 'undisturbed')])) == 0
    duration = time.perf_counter() - started
    draw = random.Random(seed)
    kills, trusted, different = 0, 0, []
    with tqdm(total=count, unit='kill') as bar:
        while kills < count:
            folder = work / f'after_{kills}'
            for _ in range(min(PARTS, count - kills)):
                left = 1 - len(list(folder.glob('*/*_statistics.json'))) / images
                after = draw.uniform(0.1, duration * max(0.25, left))
                if killed(in_child([*arguments, str(folder)]), after):
                    kills += 1
                    bar.update()
            trusted += len(list(folder.glob('*/*_statistics.json')))
            assert exit_status(in_child([*arguments, str(folder)])) == 0
            different += differences(work / 'undisturbed', folder)
            shutil.rmtree(folder)
    return {'kills': kills, 'images in each batch': images,
            'images found finished before the last runs': trusted,
            'files that differ from the undisturbed run': len(different),
            'which': ', '.join(different) or 'none'}  # fmt: skip


# --------------------------------------------------------------------------- several processes


def torchrun(
    ranks: int,
    arguments: Sequence[str],
    options: Sequence[str] = ('--standalone',),
    start_new_session: bool = False,
) -> subprocess.Popen:
    """Start the command line under torchrun, one thread for each rank. A single rank that stands
    alone is started without torchrun."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
               *options, str(ROOT / 'integrated_gradients.py'), *arguments]  # fmt: skip
    if ranks == 1 and '--standalone' in options:
        command = [sys.executable, str(ROOT / 'integrated_gradients.py'), *arguments]
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=start_new_session)  # fmt: skip


def family(process: int) -> list[int]:
    """A process and its descendants (Linux)."""
    processes = [process]
    try:
        children = Path(f'/proc/{process}/task/{process}/children').read_text().split()
    except OSError:
        return processes
    for child in children:
        processes += family(int(child))
    return processes


def explanations(
    ig: IntegratedGradients,
    model_input: ModelInput,
    settings: Settings,
    samples: Sequence[Sample] = (),
) -> list[Explanation]:
    """The explanations of an input with these settings. samples: other images, for methods that
    need such."""
    explained = explain(Study.of(ig, settings, samples), model_input)
    return [explanation for explanation, _ in explained]
