"""Captum's Integrated Gradients and ours, side by side in one process.

    pip install -e . -r requirements-dev.txt
    python benchmarks/compare_captum.py --name demo --model_path demo/demo_model.pth \\
        --data_dir demo/Dataset_no_preprocessing --image_size 256

Runs are interleaved, and the medians of --repeats runs are compared: seconds for the same nodes in
float32 and in reduced precision, for the same map error, until a map is known to be good, for
targets of different size, for 1 and 3 targets, for 1 and several images. Captum runs with
Gauss-Legendre nodes and internal_batch_size 1, which needs the least memory; our tool measures its
step batch. Writes benchmarks/results/compare_captum_NAME.md. With --memory: instead the peak memory
of each tool in a separate process, in compare_captum_NAME_memory.md. With --profile: where the time
of one gradient goes, and how it compares with the fastest matrix product of the machine, in
compare_captum_NAME_profile.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import captum.attr
import cv2
import numpy as np
import torch
from quadrature import benchmark_parser, cpu_name, shown
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from igseg.data.samples import list_samples
from igseg.preprocessing import Preprocessing
from integrated_gradients import (
    EmptyTargetError,
    IntegratedGradients,
    choose_samples,
    load_model,
)

CAPTUM_NODES = 50  # Captum's default
KNOWN_ERROR = 0.05  # of a map, relative L2
STEP_COUNTS = (8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 80, 96, 128)
# Parts of a profile, and texts in the names of their operators; the first match counts.
PARTS = {
    'convolutions': ('conv',),
    'batch norms': ('batch_norm',),
    'activations': ('silu', 'relu', 'sigmoid', 'gelu'),
    'concatenation and its gradient': ('cat', 'slice', 'narrow'),
    'resampling': ('upsample', 'pool', 'mean'),
    'sums and products': ('add', 'mul', 'sum', 'div'),
    'copies and memory': ('copy', 'clone', 'contiguous', 'empty', 'fill', 'zero', 'pad', 'resize'),
}
PEAK_SIDE = 4096  # of the matrices by which the arithmetic peak is measured


@dataclass
class Bench:
    """A model, its images, and both tools."""

    model: torch.nn.Module
    ours: IntegratedGradients
    images: list[torch.Tensor]  # (1, 3, H, W) each
    regions: list[torch.Tensor]  # (h, w) bool each: the predicted masks

    def captum(
        self, number: int, nodes: int, region: torch.Tensor | None = None, batch: int | None = 1
    ) -> torch.Tensor:
        """Captum's map. If no region is given, its prediction is part of the measured work."""
        x = self.images[number]
        if region is None:
            with torch.no_grad():
                region = self.model(x)[0, 0] > 0
        black = self.ours.preprocessing.normalise(np.zeros((*x.shape[-2:], 3), np.float32))

        def mean_logit(points: torch.Tensor) -> torch.Tensor:
            return self.model(points)[:, 0][:, region].mean(dim=1)

        return captum.attr.IntegratedGradients(mean_logit).attribute(
            x, black, n_steps=nodes, method='gausslegendre', internal_batch_size=batch
        )

    def explain(self, number: int, **options: object):
        return self.ours.explain(self.images[number], **options)


def thirds(region: torch.Tensor) -> list[torch.Tensor]:
    """Three parts of a mask with the same number of pixels: three targets."""
    order = region.flatten().cumsum(0).view(region.shape)
    total = int(region.sum())
    cuts = [0, total // 3, 2 * total // 3, total]
    return [region & (order > a) & (order <= b) for a, b in pairwise(cuts)]


def load(arguments: argparse.Namespace, count: int) -> Bench:
    """The model, and images on which it predicts something."""
    model = load_model(arguments.model_path, 'cpu').requires_grad_(False)
    stored = model.preprocessing
    fit = Preprocessing(arguments.image_size, 'stretch', stored.mean, stored.std)
    bench = Bench(model, IntegratedGradients(model, 'cpu', fit), [], [])
    samples = list_samples(arguments.data_dir)
    for sample in choose_samples(samples, min(len(samples), 6 * count)):
        x = fit.normalise(fit.resize_image(sample.image()))
        with torch.no_grad():
            region = model(x)[0, 0] > 0
        if region.any() and len(bench.images) < count:
            bench.images.append(x)
            bench.regions.append(region)
    return bench


def interleave(
    tasks: dict[str, Callable[[], object]], repeats: int, warm: int = 0
) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each task, and its last result. The tasks run in turn, after `warm` rounds
    that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    results = {}
    for round_number in tqdm(range(repeats + warm), desc=' / '.join(tasks), leave=False):
        for name, task in tasks.items():
            started = time.perf_counter()
            results[name] = task()
            if round_number >= warm:
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in times.items()}, results


def deviation(attributions: torch.Tensor, expected: torch.Tensor) -> float:
    return float((attributions - expected).norm() / expected.norm())


def peak_memory(tool: str, arguments: argparse.Namespace) -> int:
    """Peak bytes of a fresh process that explains one image with a tool."""
    command = [sys.executable, __file__, *arguments.command, '--only', tool]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def run_only(arguments: argparse.Namespace) -> None:
    """What `peak_memory` measures."""
    bench = load(arguments, 1)
    if arguments.only == 'prepared':
        bench.explain(0, num_steps=2)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
    if arguments.only in ('ours', 'prepared'):
        bench.explain(0, num_steps=arguments.nodes)
    else:
        batch = 1 if arguments.only == 'captum' else None
        bench.captum(0, arguments.nodes, batch=batch)
    # Not by getrusage: its peak starts from the peak of the parent process.
    status = Path('/proc/self/status').read_text()
    print(1024 * int(status.split('VmHWM:')[1].split()[0]))


def compare_memory(arguments: argparse.Namespace) -> str:
    """The table of peak memory."""
    tools = {
        'captum': 'Captum, internal_batch_size 1',
        'ours': 'ours, adaptive rule',
        'prepared': 'ours, of later images: the network is prepared and compared',
    }
    if not arguments.skip_default:
        tools['captum_default'] = 'Captum as it comes (all steps at once)'
    peaks = {tool: peak_memory(tool, arguments) / 2**30 for tool in tools}
    rows = [
        f'| {label} | {peaks[tool]:.2f} GiB | {peaks[tool] / peaks["ours"]:.2f} |'
        for tool, label in tools.items()
    ]
    return '\n'.join(
        [
            f'# Peak memory of a process that explains one image: {arguments.name}', '',
            f'`python benchmarks/compare_captum.py {shown(arguments.command)}`', '',
            f'Side {arguments.image_size}, {arguments.nodes} steps, on a CPU.', '',
            '| | peak | relative to ours |', '|---|---|---|', *rows, '',
        ]
    )  # fmt: skip


def profiled(task: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """The result of a task, and the seconds that it spends in each of PARTS and in all others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = task()
    seconds = dict.fromkeys((*PARTS, 'others'), 0.0)
    for event in profile.key_averages():
        name = event.key.lower()
        part = next((p for p, words in PARTS.items() if any(w in name for w in words)), 'others')
        seconds[part] += event.self_cpu_time_total / 1e6
    return result, seconds


def profile_gradient(
    network: torch.nn.Module, x: torch.Tensor, region: torch.Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each part in a forward and in a backward pass, after a pass as warm-up."""
    for _ in range(2):
        point = x.clone().requires_grad_()
        score, ahead = profiled(lambda point=point: network(point)[0, 0][region].mean())
        _, back = profiled(lambda score=score, point=point: torch.autograd.grad(score, point))
    return ahead, back


def arithmetic_peak() -> float:
    """The most floating-point operations per second of a float32 matrix product on this machine."""
    matrix = torch.rand(PEAK_SIDE, PEAK_SIDE)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2 * PEAK_SIDE**3 / min(times)


def compare_profiles(arguments: argparse.Namespace) -> str:
    """Where the time of one gradient goes in the original network and in the prepared copy."""
    bench = load(arguments, 1)
    x, region = bench.images[0], bench.regions[0]
    with FlopCounterMode(display=False) as counter:
        point = x.clone().requires_grad_()
        bench.model(point)[0, 0][region].mean().backward()
    bench.ours.prepare(x)
    original = profile_gradient(bench.model, x, region)
    prepared = profile_gradient(bench.ours.engine.network, x, region)
    columns = (*original, *prepared)
    rows = [[part, *(column[part] for column in columns)] for part in columns[0]]
    rows.append(['**all**', *(sum(column.values()) for column in columns)])
    table = [f'| {name} | ' + ' | '.join(f'{s:.3f}' for s in values) + ' |'
             for name, *values in rows]  # fmt: skip
    work, peak = counter.get_total_flops(), arithmetic_peak()
    convolutions = sum(column['convolutions'] for column in prepared)
    spent = sum(sum(column.values()) for column in prepared)
    return f"""# Where the time of one gradient goes: {arguments.name}

`python benchmarks/compare_captum.py {shown(arguments.command)}`

{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}; input {arguments.image_size}×\
{arguments.image_size}, float32, one step at a time; seconds by the profiler, second of two passes.

| | original, forward | original, backward | prepared copy, forward | prepared copy, backward |
|---|---|---|---|---|
{chr(10).join(table)}

One gradient takes {work / 1e9:.1f} GFLOP. A float32 matrix product of side {PEAK_SIDE} reaches
{peak / 1e9:.0f} GFLOPS on this machine, so {work / peak:.2f} s is the least it can take; the
prepared copy takes {spent:.2f} s ({100 * work / peak / spent:.0f} % of the peak), its convolutions
{convolutions:.2f} s ({100 * work / peak / convolutions:.0f} %).
"""


def equal_error_steps(bench: Bench, reference: torch.Tensor) -> tuple[float, int]:
    """The map error of Captum's default, and how many steps of the adaptive rule reach it.

    The number of steps is searched by bisection, as if more steps were always better.
    """
    level = deviation(bench.captum(0, CAPTUM_NODES), reference)

    def reaches(steps: int) -> bool:
        return deviation(bench.explain(0, num_steps=steps).attributions, reference) <= level

    return level, STEP_COUNTS[bisect_left(STEP_COUNTS, True, hi=len(STEP_COUNTS) - 1, key=reaches)]


def compare_sharing(bench: Bench, gauss: dict, repeats: int, row: Callable[..., None]) -> None:
    """The rows of several targets and of several images."""
    nodes = gauss['num_steps']
    parts = thirds(bench.regions[0])
    seconds, _ = interleave(
        {
            'Captum': lambda: [bench.captum(0, nodes, part) for part in parts],
            'ours': lambda: bench.ours.explain_targets(bench.images[0], parts, **gauss),
            'single': lambda: bench.explain(0, **gauss),
        },
        repeats,
    )
    row('3 targets of one image', seconds['Captum'], seconds['ours'],
        f'{seconds["ours"] / seconds["single"]:.2f} times one target')  # fmt: skip

    numbers = range(len(bench.images))
    seconds, _ = interleave(
        {
            'Captum': lambda: [bench.captum(k, nodes) for k in numbers],
            'ours': lambda: [bench.explain(k, **gauss) for k in numbers],
        },
        1,
    )
    row(f'{len(numbers)} images', seconds['Captum'], seconds['ours'])


def regions_of(region: torch.Tensor) -> dict[str, torch.Tensor]:
    """Targets of different size, (h, w) bool each: the largest object of a mask; its middle pixel;
    boxes around this pixel, of a fiftieth and of a quarter of the image."""
    _, numbers, sizes, _ = cv2.connectedComponentsWithStats(region.numpy().astype(np.uint8))
    largest = torch.from_numpy(numbers == 1 + int(np.argmax(sizes[1:, cv2.CC_STAT_AREA])))
    row, column = (int(line.float().median()) for line in largest.nonzero().T)

    def box(share: float) -> torch.Tensor:
        height, width = (max(1, round(share**0.5 * size)) for size in region.shape)
        top = min(max(0, row - height // 2), region.shape[0] - height)
        left = min(max(0, column - width // 2), region.shape[1] - width)
        pixels = torch.zeros_like(region)
        pixels[top : top + height, left : left + width] = True
        return pixels

    return {'one object': largest, 'one pixel': box(0), 'a small region': box(0.02),
            'a large region': box(0.25)}  # fmt: skip


def compare_regions(bench: Bench, gauss: dict, repeats: int, row: Callable[..., None]) -> None:
    """The rows of targets of different size."""
    for name, region in regions_of(bench.regions[0]).items():
        seconds, maps = interleave(
            {
                'Captum': lambda region=region: bench.captum(0, gauss['num_steps'], region),
                'ours': lambda region=region: bench.explain(0, target=region, **gauss),
            },
            repeats,
            warm=1,
        )
        share = maps['ours'].cropping.computed_share
        row(f'{name}, {100 * float(region.float().mean()):.2g} % of the image', seconds['Captum'],
            seconds['ours'], f'{100 * share:.0f} % of the convolutions computed; maps differ by '
            f'{deviation(maps["ours"].attributions, maps["Captum"]):.1e}')  # fmt: skip


def compare_known_error(
    bench: Bench, repeats: int, row: Callable[..., None], reference: torch.Tensor
) -> None:
    """The row of the time until a tool takes its map to be within KNOWN_ERROR of the true map."""
    seconds, maps = interleave(
        {
            'Captum': lambda: bench.captum(0, CAPTUM_NODES),
            'ours': lambda: bench.explain(0, tolerance=KNOWN_ERROR),
        },
        repeats,
    )
    attributions = (maps['Captum'], maps['ours'].attributions)
    errors = [deviation(values, reference) for values in attributions]
    row(f'until {100 * KNOWN_ERROR:.0f} % of map error, by what each knows', seconds['Captum'],
        seconds['ours'], f'{CAPTUM_NODES} nodes of theirs, truly off by {errors[0]:.3f}; '
        f'{maps["ours"].steps} of ours, truly off by {errors[1]:.3f}')  # fmt: skip


def compare(arguments: argparse.Namespace) -> list[str]:
    """The rows of the table."""
    bench = load(arguments, arguments.batch)
    nodes, repeats = arguments.nodes, arguments.repeats
    gauss = {'num_steps': nodes, 'rule': 'gauss-legendre'}
    rows = []

    def row(what: str, theirs: float, ours: float, remark: str = '') -> None:
        rows.append(f'| {what} | {theirs:.2f} s | {ours:.2f} s | {theirs / ours:.2f} | {remark} |')
        print(rows[-1], file=sys.stderr, flush=True)

    seconds, maps = interleave(
        {
            'Captum': lambda: bench.captum(0, nodes),
            'float32': lambda: bench.explain(0, **gauss),
            'bfloat16': lambda: bench.explain(0, precision='bfloat16', **gauss),
        },
        repeats,
        warm=1,
    )
    theirs = seconds['Captum']
    exact, reduced = maps['float32'], maps['bfloat16']
    off = deviation(exact.attributions, maps['Captum'])
    row(f'{nodes} equal nodes, float32', theirs, seconds['float32'],
        f'maps differ by {off:.1e}; {exact.cost.step_batch} steps at once')  # fmt: skip
    off = deviation(reduced.attributions, maps['Captum'])
    row(f'{nodes} equal nodes, bfloat16', theirs, seconds['bfloat16'],
        f'maps differ by {off:.3f}, reported {reduced.cost.precision_deviation:.3f}')  # fmt: skip

    if not arguments.skip_error:
        # The true map, from equidistant nodes.
        reference = bench.explain(
            0, rule='trapezoid', num_steps=arguments.reference_nodes
        ).attributions
        level, steps = equal_error_steps(bench, reference)
        seconds, _ = interleave(
            {
                'Captum': lambda: bench.captum(0, CAPTUM_NODES),
                'ours': lambda: bench.explain(0, num_steps=steps),
            },
            max(1, repeats // 2),
        )
        remark = f'relative L2 {level:.3f}: {CAPTUM_NODES} nodes of theirs, {steps} of ours'
        row('equal map error, float32', seconds['Captum'], seconds['ours'], remark)
        compare_known_error(bench, max(1, repeats // 2), row, reference)

    if not arguments.skip_regions:
        compare_regions(bench, gauss, repeats, row)
    compare_sharing(bench, gauss, repeats, row)
    return rows


def table_of(rows: Sequence[str], arguments: argparse.Namespace) -> str:
    """The table of seconds."""
    repeats = arguments.repeats
    return f"""# Captum and this toolkit: {arguments.name}

`python benchmarks/compare_captum.py {shown(arguments.command)}`

{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, captum {captum.__version__}.
Input {arguments.image_size}×{arguments.image_size}, black baseline, target: mean logit over the
predicted mask, found by each tool itself. One process, runs interleaved, medians of {repeats}
(equal map error: {max(1, repeats // 2)}; several images: 1), all warm.
Ratio: Captum's figure by ours.

| | Captum | ours | ratio | |
|---|---|---|---|---|
{chr(10).join(rows)}

Captum was given internal_batch_size 1, which needs the least memory; left unset, it sends all steps
through the network at once.
"""


def write(text: str, suffix: str, arguments: argparse.Namespace) -> None:
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f'compare_captum_{arguments.name}{suffix}.md').write_text(text)
    print(text)


def main(command: Sequence[str]) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument('--image_size', type=int, default=640)
    parser.add_argument('--nodes', type=int, default=12)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--batch', type=int, default=10, help='images of the last comparison')
    parser.add_argument('--reference_nodes', type=int, default=257, help='nodes of the true map')
    parser.add_argument('--skip_error', action='store_true', help='leave out equal map error')
    parser.add_argument('--skip_regions', action='store_true', help='leave out targets by size')
    parser.add_argument('--memory', action='store_true', help='compare peak memory, not time')
    parser.add_argument('--profile', action='store_true', help='show where the time goes')
    parser.add_argument('--skip_default', action='store_true', help='with --memory: batch 1 only')
    parser.add_argument('--only', choices=('captum', 'captum_default', 'ours', 'prepared'))
    arguments = parser.parse_args(command)
    arguments.command = list(command)
    try:
        if arguments.only:
            run_only(arguments)
        elif arguments.memory:
            write(compare_memory(arguments), '_memory', arguments)
        elif arguments.profile:
            write(compare_profiles(arguments), '_profile', arguments)
        else:
            write(table_of(compare(arguments), arguments), '', arguments)
    except EmptyTargetError as error:
        raise SystemExit(f'error: {error}') from None
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
