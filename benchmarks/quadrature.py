"""Which quadrature rule gives the most accurate map for a number of gradient evaluations?

    python benchmarks/quadrature.py --name demo --model_path demo/demo_model.pth \\
        --data_dir demo/Dataset_no_preprocessing --images 8 --image_size 128

The map of each rule is compared with a reference of 1,025 equidistant nodes (trapezoid rule) on
several images and three baselines: relative L2 and L1 error, raw and smoothed (Gaussian, sigma 2
pixels), overlap of the strongest 5 % of pixels, completeness gap, and the error that the rule
reports. Finished cases are stored in --work_dir and not computed again. Writes
benchmarks/results/quadrature_NAME.md and .png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rival_rules import NUIG_INTERVALS, nuig_rule, riemannopt_rule
from tqdm import tqdm

from igseg.data.samples import list_samples
from igseg.engine.preparation import prepared_network
from igseg.method.integral import Interval, PathIntegral, adaptive_rounds, run_alone, sum_rule
from igseg.method.rules import ADAPTIVE, FIXED_RULES
from igseg.network.loading import load_model
from igseg.preprocessing import Preprocessing
from integrated_gradients import build_baselines, choose_samples

HERE = Path(__file__).resolve().parent

BASELINES = ('zero', 'blur', 'mean')
REFERENCE_NODES = 1025
COUNTS: dict[str, tuple[int, ...]] = {
    ADAPTIVE: (8, 12, 16, 24, 32, 50, 64),
    'adaptive by residual': (8, 12, 16, 24, 32, 50, 64),
    'midpoint': (8, 12, 16, 24, 32, 50, 64),
    'trapezoid': (9, 17, 33, 65),
    'gauss-legendre': (8, 12, 16, 24, 32, 50),
    'clenshaw-curtis': (9, 17, 33, 65),
    'gauss-kronrod': (7, 15, 31, 63),
    'nuig': (8, 16, 32, 64),
    'riemannopt': (8, 16, 32, 64),
}
SMOOTHING = 2.0  # pixels
STRONGEST = 0.05
ROUGHNESS_CELLS = 128


class Case:
    """An image with a baseline; no node of its path is evaluated twice."""

    def __init__(
        self, network: torch.nn.Module, x: torch.Tensor, baseline: torch.Tensor, region
    ) -> None:
        self.network, self.x, self.baseline = network, x, baseline
        self.weights = region / region.sum()
        self.results: dict[float, tuple[float, torch.Tensor]] = {}  # results of `at`

    def at(self, alpha: float) -> tuple[float, torch.Tensor]:
        """The score and the attribution density (1, 3, H, W) at a node."""
        key = round(alpha, 12)
        if key not in self.results:
            change = self.x - self.baseline
            point = (self.baseline + alpha * change).requires_grad_()
            score = (self.network(point) * self.weights).sum()
            (gradient,) = torch.autograd.grad(score, point)
            self.results[key] = (score.item(), gradient * change)
        return self.results[key]

    def evaluate(self, nodes: np.ndarray) -> Iterator[torch.Tensor]:
        return (self.at(float(node))[1] for node in nodes)

    def residual(self, interval: Interval) -> torch.Tensor:
        """The completeness gap of an interval: the error of its part of the sum."""
        (low, a), (high, b) = self.at(interval.left), self.at(interval.right)
        by_rule = (interval.right - interval.left) / 2 * (a.sum() + b.sum())
        return (high - low - by_rule).abs().reshape(1)

    def roughness(self) -> np.ndarray:
        """How much the density changes within each of many equal cells (RiemannOpt)."""
        nodes = np.linspace(0, 1, ROUGHNESS_CELLS + 1)
        maps = [self.at(float(node))[1] for node in nodes]
        changes = np.array([float((b - a).abs().sum()) for a, b in pairwise(maps)])
        return changes / changes.sum()

    def run(self, rule: str, steps: int, roughness: np.ndarray) -> PathIntegral:
        """The map of a rule."""
        if rule == ADAPTIVE:
            return run_alone(adaptive_rounds(steps), self.evaluate)
        if rule == 'adaptive by residual':
            return run_alone(adaptive_rounds(steps, priority=self.residual), self.evaluate)
        if rule == 'nuig':
            ends = np.linspace(0, 1, NUIG_INTERVALS + 1)
            quadrature = nuig_rule(steps, [self.at(float(end))[0] for end in ends])
        elif rule == 'riemannopt':
            quadrature = riemannopt_rule(steps, roughness)
        else:
            quadrature = FIXED_RULES[rule](steps)
        return sum_rule(self.evaluate, quadrature)


def compare(attributions: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Errors of a map (3, H, W), relative to the reference."""

    def relative(order: int, smooth: bool) -> float:
        maps = [attributions - reference, reference]
        if smooth:
            maps = [cv2.GaussianBlur(m.transpose(1, 2, 0), (0, 0), SMOOTHING) for m in maps]
        off, size = (np.linalg.norm(m.ravel(), order) for m in maps)
        return float(off / size)

    def strongest(m: np.ndarray) -> np.ndarray:
        magnitude = np.abs(m).sum(axis=0).ravel()
        return np.argsort(-magnitude, kind='stable')[: int(STRONGEST * magnitude.size)]

    common = np.intersect1d(strongest(attributions), strongest(reference)).size
    return {
        'l2': relative(2, False), 'l1': relative(1, False),
        'l2_smooth': relative(2, True), 'l1_smooth': relative(1, True),
        'overlap': common / len(strongest(reference)),
    }  # fmt: skip


_prepared: dict[str, tuple] = {}  # by path; a worker process prepares a network once


def load(model_path: str, size: int | None) -> tuple[torch.nn.Module, Preprocessing]:
    if model_path not in _prepared:
        model = load_model(model_path, 'cpu')
        stored = model.preprocessing
        fit = Preprocessing(size or stored.image_size, 'stretch', stored.mean, stored.std)
        example = torch.zeros(1, 3, fit.image_size, fit.image_size)
        _prepared[model_path] = prepared_network(model, example).network, fit
    return _prepared[model_path]


def make_case(model_path: str, size: int | None, image: np.ndarray, baseline: str) -> Case | None:
    """The case of an image; None if the network predicts nothing."""
    network, fit = load(model_path, size)
    pixels = fit.resize_image(image).astype(np.float32)
    x = fit.normalise(pixels)
    with torch.no_grad():
        region = network(x)[0, 0] > 0
    (built,) = build_baselines(baseline, pixels, fit)
    return Case(network, x, fit.normalise(built).to(x), region.float()) if region.any() else None


def run_case(
    model_path: str,
    size: int | None,
    name: str,
    image: np.ndarray,
    baseline: str,
    roughness: list[float],
    path: Path,
) -> list[dict]:
    """All rules on one case. A finished case is stored in a file and read back from there."""
    if path.is_file():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    case = make_case(model_path, size, image, baseline)
    reference = sum_rule(case.evaluate, FIXED_RULES['trapezoid'](REFERENCE_NODES)).integral[0]
    change = case.at(1.0)[0] - case.at(0.0)[0]
    rows = []
    for rule, counts in COUNTS.items():
        for steps in counts:
            path_integral = case.run(rule, steps, np.array(roughness))
            total = float(path_integral.integral.double().sum())
            rows.append({
                'image': name, 'baseline': baseline, 'rule': rule, 'evaluations': steps,
                **compare(path_integral.integral[0].numpy(), reference.numpy()),
                'estimate': float(path_integral.relative_errors()),
                'gap': abs(total - change) / abs(change),
            })  # fmt: skip
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(rows))
    os.replace(temporary, path)
    return rows


def choose_cases(arguments: argparse.Namespace) -> list:
    """Images evenly spaced through the test split, without images on which nothing is predicted."""
    samples = list_samples(arguments.data_dir)
    for count in range(arguments.images, len(samples) + 1):
        chosen = [
            sample
            for sample in choose_samples(samples, count)
            if make_case(arguments.model_path, arguments.image_size, sample.image(), 'zero')
        ]
        if len(chosen) >= arguments.images:
            return chosen[: arguments.images]
    raise SystemExit('error: too few images with a predicted pixel')


# --------------------------------------------------------------------------- tables and figure


def middle(rows: Sequence[dict], key: str) -> float:
    return float(np.median([row[key] for row in rows]))


def honest_share(rows: Sequence[dict]) -> float:
    return float(np.mean([row['l2'] <= row['estimate'] for row in rows]))


def table(rows: Sequence[dict]) -> str:
    """Medians over all cases, a line for each rule and number of evaluations."""
    lines = [
        '| rule | evaluations | L2 | L1 | L2 smoothed | L1 smoothed | top 5 % overlap | gap | '
        'reported error | error below reported |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for rule, counts in COUNTS.items():
        for steps in counts:
            cases = [r for r in rows if r['rule'] == rule and r['evaluations'] == steps]
            figures = [
                f'{middle(cases, key):.3f}' for key in ('l2', 'l1', 'l2_smooth', 'l1_smooth')
            ]
            lines.append(
                f'| {rule} | {steps} | {" | ".join(figures)} | {middle(cases, "overlap"):.1%} | '
                f'{middle(cases, "gap"):.1%} | {middle(cases, "estimate"):.3f} | '
                f'{honest_share(cases):.0%} |'
            )
    return '\n'.join(lines)


def needed(rows: Sequence[dict], level: float) -> Iterator[tuple[str, str]]:
    """For each rule the fewest evaluations with a median L2 error of at most `level`."""
    for rule, counts in COUNTS.items():
        enough = [
            steps
            for steps in counts
            if middle([r for r in rows if r['rule'] == rule and r['evaluations'] == steps], 'l2')
            <= level
        ]
        yield rule, str(enough[0]) if enough else f'more than {counts[-1]}'


def figure(rows: Sequence[dict], name: str) -> Figure:
    """Three plots: error and gap over evaluations, and true over reported error."""
    fig = Figure(figsize=(15, 5), dpi=120, layout='constrained')
    error, gap, calibration = fig.subplots(1, 3)
    for rule, counts in COUNTS.items():
        by_count = [
            [r for r in rows if r['rule'] == rule and r['evaluations'] == steps] for steps in counts
        ]
        style = {'marker': 'o', 'markersize': 3, 'linewidth': 2.5 if rule == ADAPTIVE else 1}
        error.loglog(counts, [middle(cases, 'l2') for cases in by_count], label=rule, **style)
        gap.loglog(counts, [middle(cases, 'gap') for cases in by_count], label=rule, **style)
        of_rule = [row for cases in by_count for row in cases]
        calibration.loglog(
            [row['estimate'] for row in of_rule], [row['l2'] for row in of_rule], '.', markersize=3
        )
    for axis, title in ((error, 'map error (relative L2)'), (gap, 'completeness gap')):
        axis.set_title(f'{title}, median over the cases')
        axis.set_xlabel('gradient evaluations')
        axis.grid(which='both', alpha=0.3)
        axis.set_xticks([8, 16, 32, 64], ['8', '16', '32', '64'])
    error.legend(fontsize=8)
    line = [min(r['estimate'] for r in rows), max(r['estimate'] for r in rows)]
    calibration.plot(line, line, 'k--', linewidth=1)
    calibration.set_title(f'true below reported in {honest_share(rows):.0%} of {len(rows)} maps')
    calibration.set_xlabel('reported error')
    for axis in (error, gap, calibration):  # labels only at the decades and at our ticks
        axis.xaxis.set_minor_formatter(NullFormatter())
    calibration.set_ylabel('true error (relative L2)')
    fig.suptitle(f'{name}: {len({(r["image"], r["baseline"]) for r in rows})} cases')
    return fig


def shown(command: Sequence[str]) -> str:
    """A command as text for the results, without the names of files outside the project."""
    return ' '.join('…' if word.startswith(('..', '/')) else word for word in command)


def write(rows: Sequence[dict], arguments: argparse.Namespace) -> None:
    images = sorted({row['image'] for row in rows})
    level = middle(
        [r for r in rows if r['rule'] == 'gauss-legendre' and r['evaluations'] == 50], 'l2'
    )
    ours = [row for row in rows if row['rule'] == ADAPTIVE]
    text = f"""# Quadrature rules: {arguments.name}

`python benchmarks/quadrature.py {shown(arguments.command)}`

{len(images)} images ({', '.join(images)}) × baselines {', '.join(BASELINES)}, input side
{arguments.image_size or "the model's own"}, target: mean logit over the predicted mask. Reference:
{REFERENCE_NODES} equidistant nodes. Figures are medians over the {len(images) * len(BASELINES)}
cases; errors are relative to the reference map, raw or under a Gaussian of sigma
{SMOOTHING:g} pixels. *Reported error* is what the rule says of itself, to be compared with L2.
NUIG spends another {NUIG_INTERVALS - 1} forward passes; RiemannOpt's points were found on the
first image of each baseline.

The reported error was not exceeded in **{honest_share(rows):.1%}** of all {len(rows)} maps, and in
**{honest_share(ours):.1%}** of the {len(ours)} maps of the adaptive rule.

Evaluations needed for the median error of Gauss-Legendre with 50 nodes ({level:.3f}):
{'; '.join(f'{rule} {count}' for rule, count in needed(rows, level))}.

{table(rows)}

![](quadrature_{arguments.name}.png)
"""
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f'quadrature_{arguments.name}.md').write_text(text)
    figure(rows, arguments.name).savefig(arguments.results / f'quadrature_{arguments.name}.png')


def cpu_name() -> str:
    """The name of the processor, from Linux."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(': ')[1] for line in lines if line.startswith('model name')), '')


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks need."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('--name', required=True, help='names the result files')
    parser.add_argument('--model_path', required=True)
    parser.add_argument('--data_dir', required=True)
    parser.add_argument('--results', type=Path, default=HERE / 'results')
    return parser


def main(command: Sequence[str]) -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument('--images', type=int, default=8)
    parser.add_argument('--image_size', type=int)
    parser.add_argument('--workers', type=int, default=os.cpu_count())
    parser.add_argument('--work_dir', type=Path, default=HERE / 'work')
    arguments = parser.parse_args(command)
    arguments.command = list(command)
    samples = choose_cases(arguments)
    folder = arguments.work_dir / f'{arguments.name}_{arguments.image_size}'
    folder.mkdir(parents=True, exist_ok=True)
    source = (arguments.model_path, arguments.image_size)
    rough = {
        baseline: make_case(*source, samples[0].image(), baseline).roughness().tolist()
        for baseline in tqdm(BASELINES, desc='RiemannOpt')
    }
    rows: list[dict] = []
    spawn = multiprocessing.get_context('spawn')  # torch's threads do not survive a fork
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn) as pool:
        jobs = [
            pool.submit(
                run_case, *source, sample.name, sample.image(), baseline, rough[baseline],
                folder / f'{sample.name}_{baseline}.json',
            )
            for sample in samples
            for baseline in BASELINES
        ]  # fmt: skip
        for job in tqdm(as_completed(jobs), total=len(jobs), desc='cases'):
            rows += job.result()
    write(rows, arguments)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
