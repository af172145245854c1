"""Captum's Integrated Gradients and ours, side by side in one process.

    pip install -r requirements-dev.txt
    python benchmarks/compare_captum.py --name demo --model_path demo/demo_model.pth \\
        --data_dir demo/Dataset_no_preprocessing --image_size 256

Runs are interleaved, the medians of --repeats compared: seconds for the same nodes in float32 and
in reduced precision, for the same map error, for 1 and 3 targets, for 1 and several images. Captum
runs with Gauss-Legendre nodes and internal_batch_size 1, which needs the least memory; ours
measures its step batch. Writes benchmarks/results/compare_captum_NAME.md. With --memory: instead
the peak memory of each in a process of its own, in compare_captum_NAME_memory.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import captum.attr
import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from quadrature import benchmark_parser, shown  # noqa: E402

from integrated_gradients import (  # noqa: E402
    EmptyTargetError,
    IntegratedGradients,
    choose_samples,
    load_model,
)
from segmentation_dataset import Preprocessing, list_samples  # noqa: E402

CAPTUM_NODES = 50  # its default
MAX_STEPS = 200


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
        """Captum's map; the prediction that finds the region is part of the work."""
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
    """The model and images in which it finds something."""
    model = load_model(arguments.model_path, 'cpu').requires_grad_(False)
    own = model.preprocessing
    fit = Preprocessing(arguments.image_size, 'stretch', own.mean, own.std)
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
    """Median seconds of each task, taken in turn after `warm` rounds that are not counted, and
    what each gave last."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    results = {}
    for round_number in tqdm(range(repeats + warm), desc=' / '.join(tasks), leave=False):
        for name, task in tasks.items():
            started = time.perf_counter()
            results[name] = task()
            if round_number >= warm:
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in times.items()}, results


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def peak_memory(tool: str, arguments: argparse.Namespace) -> int:
    """Peak bytes of a fresh process that explains one image with one of the tools."""
    command = [sys.executable, __file__, *arguments.command, '--only', tool]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def run_only(arguments: argparse.Namespace) -> None:
    """What `peak_memory` measures."""
    bench = load(arguments, 1)
    if arguments.only == 'ours':
        bench.explain(0, num_steps=arguments.nodes)
    else:
        batch = 1 if arguments.only == 'captum' else None
        bench.captum(0, arguments.nodes, batch=batch)
    # Not getrusage, whose peak starts from that of the process it was forked from.
    status = Path('/proc/self/status').read_text()
    print(1024 * int(status.split('VmHWM:')[1].split()[0]))


def compare_memory(arguments: argparse.Namespace) -> str:
    """The table of peak memory."""
    tools = {'captum': 'Captum, internal_batch_size 1', 'ours': 'ours, adaptive rule'}
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


def equal_error_steps(bench: Bench) -> tuple[float, int]:
    """The map error of Captum's default, and how many steps of the adaptive rule reach it.

    Against a reference of 257 equidistant nodes (trapezoid rule).
    """
    reference = bench.explain(0, rule='trapezoid', num_steps=257).attributions
    level = deviation(bench.captum(0, CAPTUM_NODES), reference)
    for steps in (8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 80, 96):
        if deviation(bench.explain(0, num_steps=steps).attributions, reference) <= level:
            return level, steps
    return level, MAX_STEPS


def compare(arguments: argparse.Namespace) -> list[str]:
    """The rows of the table."""
    bench = load(arguments, arguments.batch)
    nodes, repeats = arguments.nodes, arguments.repeats
    gauss = {'num_steps': nodes, 'rule': 'gauss-legendre'}
    rows = []

    def row(what: str, theirs: float, mine: float, remark: str = '') -> None:
        rows.append(f'| {what} | {theirs:.2f} s | {mine:.2f} s | {theirs / mine:.2f} | {remark} |')
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
        f'maps differ by {off:.1e}; {exact.step_batch} steps at once')  # fmt: skip
    off = deviation(reduced.attributions, maps['Captum'])
    row(f'{nodes} equal nodes, bfloat16', theirs, seconds['bfloat16'],
        f'maps differ by {off:.3f}, reported {reduced.precision_deviation:.3f}')  # fmt: skip

    if not arguments.skip_error:
        level, steps = equal_error_steps(bench)
        seconds, _ = interleave(
            {
                'Captum': lambda: bench.captum(0, CAPTUM_NODES),
                'ours': lambda: bench.explain(0, num_steps=steps),
            },
            max(1, repeats // 2),
        )
        remark = f'relative L2 {level:.3f}: {CAPTUM_NODES} nodes of theirs, {steps} of ours'
        row('equal map error, float32', seconds['Captum'], seconds['ours'], remark)

    parts = thirds(bench.regions[0])
    seconds, _ = interleave(
        {
            'Captum': lambda: [bench.captum(0, nodes, part) for part in parts],
            'ours': lambda: bench.ours.explain_targets(bench.images[0], parts, **gauss),
            'one': lambda: bench.explain(0, **gauss),
        },
        repeats,
    )
    row('3 targets of one image', seconds['Captum'], seconds['ours'],
        f'{seconds["ours"] / seconds["one"]:.2f} times one target')  # fmt: skip

    some = range(len(bench.images))
    seconds, _ = interleave(
        {
            'Captum': lambda: [bench.captum(k, nodes) for k in some],
            'ours': lambda: [bench.explain(k, **gauss) for k in some],
        },
        1,
    )
    row(f'{len(some)} images', seconds['Captum'], seconds['ours'])
    return rows


def cpu_name() -> str:
    """The processor, as Linux tells it."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), '')


def write(rows: Sequence[str], arguments: argparse.Namespace) -> None:
    repeats = arguments.repeats
    text = f"""# Captum and this toolkit: {arguments.name}

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
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f'compare_captum_{arguments.name}.md').write_text(text)
    print(text)


def main(command: Sequence[str]) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument('--image_size', type=int, default=640)
    parser.add_argument('--nodes', type=int, default=12)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--batch', type=int, default=10, help='images of the last comparison')
    parser.add_argument('--skip_error', action='store_true', help='leave out equal map error')
    parser.add_argument('--memory', action='store_true', help='compare peak memory, not time')
    parser.add_argument('--skip_default', action='store_true', help='with --memory: batch 1 only')
    parser.add_argument('--only', choices=('captum', 'captum_default', 'ours'))
    arguments = parser.parse_args(command)
    arguments.command = list(command)
    try:
        if arguments.only:
            run_only(arguments)
        elif arguments.memory:
            text = compare_memory(arguments)
            (arguments.results / f'compare_captum_{arguments.name}_memory.md').write_text(text)
            print(text)
        else:
            write(compare(arguments), arguments)
    except EmptyTargetError as error:
        raise SystemExit(f'error: {error}') from None
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
