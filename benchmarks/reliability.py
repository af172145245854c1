"""Does a batch survive, scale and stay small? One command for each row of the README's table.

    python benchmarks/reliability.py kills --kills 50
    python benchmarks/reliability.py ranks --ranks 1 2 3
    python benchmarks/reliability.py pipeline --images 100
    python benchmarks/reliability.py large --images 2000
    python benchmarks/reliability.py writing --image_size 640

kills: a batch is killed (SIGKILL) at random instants and started again; every few kills it is
    finished and compared, file by file, with an undisturbed run.
ranks: the same batch under torchrun with several numbers of processes, one thread each; results
    are compared file by file, and the time with 1 and 2 ranks gives the throughput ratio.
pipeline: the demo at 256x256; wall time of the command by the time spent explaining, and memory.
large: many small synthetic images through a tiny network; memory between the first and the last.
writing: what it takes to draw and write one image, and the bytes it leaves.
Each writes benchmarks/results/reliability_NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))  # at the end: this file has the name of no module there

import pandas as pd  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import integrated_gradients  # noqa: E402
from batch_summary import read_table  # noqa: E402
from result_files import FIGURES, FILE_ENDINGS, write_image  # noqa: E402

DEMO_MODEL = ROOT / 'demo' / 'demo_model.pth'
DEMO_DATA = ROOT / 'demo' / 'Dataset_no_preprocessing'
DEMO = ['--model_path', str(DEMO_MODEL), '--data_dir', str(DEMO_DATA)]
SMALL = ['--mode', 'batch', *DEMO, '--image_size', '64', '--num_steps', '2', '--target', 'image',
         '--step_batch', '1', '--device', 'cpu']  # fmt: skip
COST = ('seconds', 'peak_memory_bytes', 'step_batch')  # what may differ between two runs
PARTS = 5  # kills before a batch is finished and compared


# --------------------------------------------------------------------------- comparing


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the results in two output folders, apart from what they cost."""
    names = [{str(p.relative_to(folder)) for p in folder.rglob('*')} for folder in (one, other)]
    found = [f'only in one of them: {name}' for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        compare = {'.json': _json, '.npz': _arrays, '.png': _pixels, '.csv': _table}.get(
            Path(name).suffix
        )
        if compare and name != 'summary.png' and compare(one / name) != compare(other / name):
            found.append(f'differs: {name}')
    return found


def _json(path: Path) -> object:
    return without_cost(json.loads(path.read_text(encoding='utf-8')))


def without_cost(content: object) -> object:
    """Statistics without what they cost, at any depth; a summary without medians of it."""
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


# --------------------------------------------------------------------------- kills


def in_child(arguments: Sequence[str]) -> int:
    """Start the command line in a forked process, which saves the seconds of importing; its id."""
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
    """Wait for a child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int, after: float) -> bool:
    """Kill a child after some seconds; False where it had already finished."""
    time.sleep(after)
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


# --------------------------------------------------------------------------- ranks


def torchrun(
    ranks: int,
    arguments: Sequence[str],
    options: Sequence[str] = ('--standalone',),
    start_new_session: bool = False,
) -> subprocess.Popen:
    """Start the command line under torchrun, one thread for each rank; without torchrun for one
    rank that stands alone."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
               *options, str(ROOT / 'integrated_gradients.py'), *arguments]  # fmt: skip
    if ranks == 1 and '--standalone' in options:
        command = [sys.executable, str(ROOT / 'integrated_gradients.py'), *arguments]
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=start_new_session)  # fmt: skip


def run_ranks(ranks: Sequence[int], images: int, size: int, work: Path) -> dict:
    """Run one batch with several numbers of ranks; compare with the first, and time them."""
    arguments = [*SMALL, '--image_size', str(size), '--num_steps', '16', '--num_samples',
                 str(images), '--figures', 'none', '--output_dir']  # fmt: skip
    found: dict[str, object] = {'images': images}
    seconds: dict[int, float] = {}
    for count in ranks:
        started = time.perf_counter()
        process = torchrun(count, [*arguments, str(work / f'ranks_{count}')])
        _, said = process.communicate()
        assert process.returncode == 0, said
        seconds[count] = time.perf_counter() - started
        found[f'seconds with {count}, start included'] = round(seconds[count], 1)
        if count != ranks[0]:
            different = differences(work / f'ranks_{ranks[0]}', work / f'ranks_{count}')
            found[f'files that differ, {count} against {ranks[0]}'] = len(different)
    if {1, 2} <= seconds.keys():
        found['throughput of 2 ranks by that of 1'] = round(seconds[1] / seconds[2], 2)
    return found


# --------------------------------------------------------------------------- memory and time


def watched(command: Sequence[str], table: Path) -> Iterator[tuple[float, int, int]]:
    """Run a command; every half second, the seconds so far, the images it has finished and the
    resident bytes of all its processes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        rows = table.read_bytes().count(b'\n') - 1 if table.is_file() else 0
        memory = sum(resident(one) for one in family(process.pid))
        yield time.perf_counter() - started, rows, memory
        time.sleep(0.5)
    assert process.returncode == 0, command


def family(process: int) -> list[int]:
    """A process and its descendants (Linux)."""
    found = [process]
    try:
        children = Path(f'/proc/{process}/task/{process}/children').read_text().split()
    except OSError:
        return found
    for child in children:
        found += family(int(child))
    return found


def resident(process: int) -> int:
    """Resident bytes of a process that no other process shares, and its share of the others."""
    try:
        lines = Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith('Pss:')), 0)


def run_watched(arguments: Sequence[str], output: Path, early: int, late: int) -> dict:
    """Run a batch and report its memory around two numbers of images, and its time."""
    command = [sys.executable, str(ROOT / 'integrated_gradients.py'), *arguments]
    started = time.perf_counter()
    seen = list(watched([*command, '--output_dir', str(output)], output / 'summary.csv'))
    wall = time.perf_counter() - started
    last = min(when for when, rows, _ in seen if rows == max(rows for _, rows, _ in seen))
    table = read_table(output / 'summary.csv')
    spent = float(table['seconds'].sum())

    width = max(2, late // 20)

    def memory(images: int) -> float:
        near = [size for _, rows, size in seen if abs(rows - images) <= width]
        return float(np.median(near)) / 2**20

    changes = [memory(images) / memory(early) - 1 for images in range(early, late + 1, width)]

    return {
        'images': len(table),
        'seconds of the whole command': round(wall, 1),
        'seconds spent explaining': round(spent, 1),
        'ratio': round(wall / spent, 3),
        'seconds from the last image to the end': round(wall - last, 1),
        f'MiB of all processes around image {early}': round(memory(early)),
        f'MiB of all processes around image {late}': round(memory(late)),
        'change': f'{memory(late) / memory(early) - 1:+.1%}',
        'changes on the way': f'{min(changes):+.1%} to {max(changes):+.1%}',
        'peak MiB of all processes': round(max(size for _, _, size in seen) / 2**20),
        'files for each image': sum(
            (output / str(table['folder'][0]) / f'{table["folder"][0]}_{end}').is_file()
            for end in FILE_ENDINGS.values()
        ),
    }


def run_pipeline(images: int, work: Path) -> dict:
    """The demo at 256x256, everything drawn."""
    arguments = ['--mode', 'batch', *DEMO, '--image_size', '256', '--num_samples', str(images),
                 '--on_empty', 'image', '--device', 'cpu']  # fmt: skip
    return run_watched(arguments, work / 'pipeline', 20, images - 5)


def run_large(images: int, work: Path) -> dict:
    """Many small images through a tiny network."""
    data = work / 'data'
    data.mkdir()
    for number in tqdm(range(images), desc='making images', unit='image'):
        rng = np.random.default_rng(number)
        array = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(array).save(data / f'image_{number:05}.png')
    arguments = ['--mode', 'batch', *tiny_model(work), '--data_dir', str(data), '--image_size',
                 '32', '--num_samples', 'all', '--num_steps', '2', '--target', 'image',
                 '--device', 'cpu']  # fmt: skip
    found = run_watched(arguments, work / 'large', 20, images - 5)
    del found['ratio']  # what is drawn takes longer than such a network
    found['pages'] = len(list((work / 'large').glob('index*.html')))
    return found


def run_writing(size: int, work: Path) -> dict:
    """Draw and write one image of the demo, with each choice of figures."""
    from segmentation_dataset import list_samples

    settings = integrated_gradients.Settings(num_steps=2, image_size=size, target='image')
    model = integrated_gradients.load_model(DEMO_MODEL, 'cpu')
    preprocessing = integrated_gradients.input_preprocessing(model, settings)
    ig = integrated_gradients.IntegratedGradients(model, 'cpu', preprocessing)
    image = list_samples(DEMO_DATA)[0].image()
    ((statistics, arrays),) = integrated_gradients.describe_targets(
        ig, 'image', image, None, settings
    )
    found: dict[str, object] = {'image size': size}
    for figures in FIGURES:
        described = [({**statistics, 'folder': figures}, arrays)]
        write_image(work, described, figures)  # once before: what is loaded at first use
        started = time.process_time()
        write_image(work, described, figures)
        found[f'core-seconds, {figures}'] = round(time.process_time() - started, 2)
        written = [path.stat().st_size for path in (work / figures).iterdir()]
        found[f'megabytes, {figures}'] = round(sum(written) / 1e6, 1)
        found[f'files, {figures}'] = len(written)
    return found


def tiny_model(work: Path) -> list[str]:
    """A small untrained network of segmentation-models-pytorch, and the flags for it."""
    import torch

    from model_loading import create_model

    torch.manual_seed(0)
    options = {'encoder_depth': 3, 'decoder_channels': (16, 8, 4)}
    model = create_model('unet', 'mobilenet_v2', 1, **options)
    settings = {'architecture': 'unet', 'encoder': 'mobilenet_v2', 'options': options}
    torch.save({'state_dict': model.state_dict(), 'settings': settings}, work / 'tiny.pth')
    return ['--model_path', str(work / 'tiny.pth')]


# --------------------------------------------------------------------------- command line


def write(name: str, command: Sequence[str], found: dict) -> None:
    """The results as a table."""
    lines = [
        '# Reliability: ' + name,
        '',
        '    python ' + ' '.join(command),
        '',
        '| | |',
        '|---|---|',
    ]
    lines += [f'| {key} | {value} |' for key, value in found.items()]
    text = '\n'.join(lines) + '\n'
    (HERE / 'results' / f'reliability_{name}.md').write_text(text, encoding='utf-8')
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work_dir', type=Path, default=HERE / 'work' / 'reliability')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, flags in {
        'kills': {'--kills': 50, '--images': 10, '--seed': 0},
        'ranks': {'--images': 40, '--image_size': 128},
        'pipeline': {'--images': 100},
        'large': {'--images': 2000},
        'writing': {'--image_size': 640},
    }.items():
        added = commands.add_parser(name)
        for flag, default in flags.items():
            added.add_argument(flag, type=int, default=default)
    commands.choices['ranks'].add_argument('--ranks', type=int, nargs='+', default=[1, 2, 3])
    args = parser.parse_args(argv)
    work = args.work_dir / args.command
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    jobs: dict[str, Callable[[], dict]] = {
        'kills': lambda: run_kills(args.kills, args.images, args.seed, work),
        'ranks': lambda: run_ranks(args.ranks, args.images, args.image_size, work),
        'pipeline': lambda: run_pipeline(args.images, work),
        'large': lambda: run_large(args.images, work),
        'writing': lambda: run_writing(args.image_size, work),
    }
    found = jobs[args.command]()
    words = ['benchmarks/reliability.py', *(sys.argv[1:] if argv is None else argv)]
    write(args.command, words, found)
    return 0


if __name__ == '__main__':
    sys.exit(main())
