"""Does a batch survive kills, scale, and stay small in memory?

Each command measures a row of the table in docs/many_images.md:

    python benchmarks/reliability.py kills --kills 50
    python benchmarks/reliability.py ranks --ranks 1 2 3
    python benchmarks/reliability.py pipeline --images 100
    python benchmarks/reliability.py large --images 2000
    python benchmarks/reliability.py writing --image_size 640

kills: a batch is killed (SIGKILL) at random instants and started again. Every few kills it is
    finished and compared, file by file, with an undisturbed run.
ranks: the same batch under torchrun with several numbers of processes, one thread each. Results
    are compared file by file, and the times with 1 and 2 ranks give the throughput ratio.
pipeline: the demo at 256x256: wall time of the command divided by the time spent explaining, and
    memory.
large: many small synthetic images through a tiny network: memory from the first to the last image.
writing: the time to draw and write one image, and the bytes of its files.

Each command writes benchmarks/results/reliability_NAME.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from runs import (
    DEMO,
    DEMO_DATA,
    DEMO_MODEL,
    SMALL,
    differences,
    family,
    run_kills,
    tiny_model,
    torchrun,
)
from tqdm import tqdm

import integrated_gradients
from igseg.analysis.summary import read_table
from igseg.data.samples import list_samples
from igseg.results.files import FIGURES, FILE_ENDINGS, write_image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# --------------------------------------------------------------------------- ranks


def run_ranks(ranks: Sequence[int], images: int, size: int, work: Path) -> dict:
    """Run a batch with several numbers of ranks, time it, and compare it with the first."""
    arguments = [*SMALL, '--image_size', str(size), '--num_steps', '16', '--num_samples',
                 str(images), '--figures', 'none', '--output_dir']  # fmt: skip
    figures: dict[str, object] = {'images': images}
    seconds: dict[int, float] = {}
    for count in ranks:
        started = time.perf_counter()
        process = torchrun(count, [*arguments, str(work / f'ranks_{count}')])
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        seconds[count] = time.perf_counter() - started
        figures[f'seconds with {count}, start included'] = round(seconds[count], 1)
        if count != ranks[0]:
            different = differences(work / f'ranks_{ranks[0]}', work / f'ranks_{count}')
            figures[f'files that differ, {count} against {ranks[0]}'] = len(different)
    if {1, 2} <= seconds.keys():
        figures['throughput of 2 ranks by that of 1'] = round(seconds[1] / seconds[2], 2)
    return figures


# --------------------------------------------------------------------------- memory and time


def watched(command: Sequence[str], table: Path) -> Iterator[tuple[float, int, int]]:
    """Run a command. Yields every half second: the seconds so far, the number of finished images,
    and the resident bytes of all its processes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        rows = table.read_bytes().count(b'\n') - 1 if table.is_file() else 0
        memory = sum(resident(member) for member in family(process.pid))
        yield time.perf_counter() - started, rows, memory
        time.sleep(0.5)
    assert process.returncode == 0, command


def resident(process: int) -> int:
    """Resident bytes of a process, with a share of the bytes that it shares (PSS)."""
    try:
        lines = Path(f'/proc/{process}/smaps_rollup').read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith('Pss:')), 0)


def run_watched(arguments: Sequence[str], output: Path, early: int, late: int) -> dict:
    """Run a batch. Its time, and its memory after about `early` and `late` images."""
    command = [sys.executable, str(ROOT / 'integrated_gradients.py'), *arguments]
    started = time.perf_counter()
    moments = list(watched([*command, '--output_dir', str(output)], output / 'summary.csv'))
    wall = time.perf_counter() - started
    finished = max(rows for _, rows, _ in moments)
    last = min(moment for moment, rows, _ in moments if rows == finished)
    table = read_table(output / 'summary.csv')
    spent = float(table['seconds'].sum())

    width = max(2, late // 20)

    def memory(images: int) -> float:
        near = [size for _, rows, size in moments if abs(rows - images) <= width]
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
        'peak MiB of all processes': round(max(size for _, _, size in moments) / 2**20),
        'files for each image': sum(
            (output / str(table['folder'][0]) / f'{table["folder"][0]}_{end}').is_file()
            for end in FILE_ENDINGS.values()
        ),
    }


def run_pipeline(images: int, work: Path) -> dict:
    """The demo at 256x256, with all figures."""
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
    figures = run_watched(arguments, work / 'large', 20, images - 5)
    del figures['ratio']  # drawing takes longer than such a network
    figures['pages'] = len(list((work / 'large').glob('index*.html')))
    return figures


def run_writing(size: int, work: Path) -> dict:
    """Draw and write one image of the demo, with each choice of figures."""
    settings = integrated_gradients.Settings(num_steps=2, image_size=size, target='image')
    model = integrated_gradients.load_model(DEMO_MODEL, 'cpu')
    preprocessing = integrated_gradients.input_preprocessing(model, settings)
    ig = integrated_gradients.IntegratedGradients(model, 'cpu', preprocessing)
    image = list_samples(DEMO_DATA)[0].image()
    ((statistics, arrays),) = integrated_gradients.analyse_image(ig, 'image', image, None, settings)
    costs: dict[str, object] = {'image size': size}
    for figures in FIGURES:
        descriptions = [({**statistics, 'folder': figures}, arrays)]
        write_image(work, descriptions, figures)  # not timed: libraries are loaded at first use
        started = time.process_time()
        write_image(work, descriptions, figures)
        costs[f'core-seconds, {figures}'] = round(time.process_time() - started, 2)
        sizes = [path.stat().st_size for path in (work / figures).iterdir()]
        costs[f'megabytes, {figures}'] = round(sum(sizes) / 1e6, 1)
        costs[f'files, {figures}'] = len(sizes)
    return costs


# --------------------------------------------------------------------------- command line


def write(name: str, command: Sequence[str], figures: dict) -> None:
    """Write the figures as a table."""
    lines = [
        '# Reliability: ' + name,
        '',
        '    python ' + ' '.join(command),
        '',
        '| | |',
        '|---|---|',
    ]
    lines += [f'| {key} | {value} |' for key, value in figures.items()]
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
        command = commands.add_parser(name)
        for flag, default in flags.items():
            command.add_argument(flag, type=int, default=default)
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
    figures = jobs[args.command]()
    words = ['benchmarks/reliability.py', *(sys.argv[1:] if argv is None else argv)]
    write(args.command, words, figures)
    return 0


if __name__ == '__main__':
    sys.exit(main())
