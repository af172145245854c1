"""All methods of attribution on the same images: what each costs, and how far it can be trusted.

    python benchmarks/compare_methods.py --name demo --model_path demo/demo_model.pth \\
        --data_dir demo/Dataset_no_preprocessing --images 20

For each image and method it measures: seconds, gradients and forward passes; the completeness gap,
if the method promises a sum; deletion and insertion, compared with the same map in the wrong place,
and with the better of a random map and the image's edges; infidelity; the share of the map inside
the truth; and the change of the map under a little noise. Tables hold medians over the images with
95 % intervals by the bootstrap. A figure is marked if its paired difference from plain `ig` is
beyond chance. After each image the tables are written to
benchmarks/results/compare_methods_NAME.md, so that a run that is cut off loses nothing. A JPEG
beside them shows one image under all methods.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from quadrature import benchmark_parser, cpu_name, shown
from runs import explanations

from igseg.checks.checks import noise_sensitivity, patches, places
from igseg.checks.curves import curves
from igseg.checks.effort import Effort
from igseg.checks.subject import subject_of
from igseg.data.samples import Sample
from igseg.errors import InputError
from igseg.explanation import Explanation
from igseg.method.choice import METHODS, form_of
from igseg.results.figures import methods_figure
from igseg.results.files import display_arrays, view_of
from igseg.statistics import METRICS, explanation_statistics
from integrated_gradients import (
    IntegratedGradients,
    ModelInput,
    Settings,
    input_preprocessing,
    list_samples,
    load_model,
)

PLAIN = 'ig'  # the method with which the others are compared
CHECKS = (places, curves, patches)  # checks that need no gradient
EFFORT = Effort(fills=('local mean',), units=('superpixel',), points=4, displaced=2, random_maps=1,
                patches=16, noisy=1, map_steps=4)  # fmt: skip
RESAMPLES = 2000
COVERED = 0.95  # probability of an interval
BETTER, WORSE = ' ▲', ' ▼'  # than plain ig, beyond chance
PICTURE_BYTES = 300_000


@dataclass(frozen=True)
class Column:
    """A column of the tables."""

    heading: str
    key: str  # of the statistics
    form: str = '{:.2f}'
    lower: bool | None = None  # whether lower is better; None: as METRICS says

    @property
    def sign(self) -> int:
        """1 if higher is better, -1 if lower is better."""
        lower = METRICS[self.key].better == 'lower' if self.lower is None else self.lower
        return -1 if lower else 1


COSTS = (
    Column('seconds', 'seconds', '{:.1f}', lower=True),
    Column('gradients', 'gradient_evaluations', '{:.0f}', lower=True),
    Column('images through the network', 'forward_passes', '{:.0f}', lower=True),
    Column('completeness gap', 'completeness_gap', '{:.1%}', lower=True),
)
TRUST = (
    Column('deletion, displaced', 'deletion_margin', '{:+.2f}'),
    Column('deletion, random or edges', 'deletion_margin_others', '{:+.2f}'),
    Column('insertion, displaced', 'insertion_margin', '{:+.2f}'),
    Column('insertion, random or edges', 'insertion_margin_others', '{:+.2f}'),
    Column('infidelity', 'infidelity'),
    Column('mass in truth', 'mass_in_truth', '{:.0%}'),
    Column('noise, broad', 'broad_sensitivity'),
    Column('noise, every pixel', 'max_sensitivity'),
)
RECORDED = tuple(column.key for column in (*COSTS, *TRUST))

Rows = dict[str, dict[str, dict]]  # method -> image -> statistics


# --------------------------------------------------------------------------- over many images


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """The interval of the median, by percentiles of resampled medians; None: too few values."""
    if len(values) < 3:
        return None
    array = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    resamples = array[rng.integers(0, len(array), (RESAMPLES, len(array)))]
    low, high = np.quantile(np.median(resamples, axis=1), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def figures_of(images: dict[str, dict], column: Column) -> dict[str, float]:
    """A column's figure of the images to which it applies, by the names of the images."""
    figures = {name: statistics[column.key] for name, statistics in images.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def cell(images: dict[str, dict], column: Column, plain: dict[str, dict] | None) -> str:
    """Median, interval, and a mark if the figure differs from plain ig on the same images."""
    values = figures_of(images, column)
    if not values:
        return 'n/a'
    text = column.form.format(np.median([*values.values()]))
    interval = bootstrap_interval([*values.values()])
    if interval and interval[0] < interval[1]:
        text += ' ({} to {})'.format(*map(column.form.format, interval))
    return text + (mark(values, figures_of(plain, column), column.sign) if plain else '')


def mark(values: dict[str, float], plain: dict[str, float], sign: int) -> str:
    """The mark of figures that are better or worse than the plain figures of the same images."""
    names = values.keys() & plain.keys()
    interval = bootstrap_interval([sign * (values[name] - plain[name]) for name in sorted(names)])
    if interval is None or interval[0] <= 0 <= interval[1]:
        return ''
    return BETTER if interval[0] > 0 else WORSE


def table(rows: Rows, columns: Sequence[Column], compared: bool) -> str:
    """A table in Markdown. compared: whether figures are compared with plain ig."""
    lines = [['method', *(column.heading for column in columns)], ['---'] * (len(columns) + 1)]
    for method, images in rows.items():
        plain = rows.get(PLAIN) if compared and method != PLAIN else None
        lines.append([f'`{method}`', *(cell(images, column, plain) for column in columns)])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


# --------------------------------------------------------------------------- one image


@dataclass(frozen=True)
class Judged:
    """One image under one method."""

    statistics: dict
    explanation: Explanation
    truth: np.ndarray | None  # (H, W) bool: true pixels of the explained class


class Remembering:
    """A network with a memory of its outputs: the checks of all methods need many of the same
    outputs (of the controls, and of patches of the same baseline)."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.run = run
        self.outputs: dict[bytes, torch.Tensor] = {}

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, K, h, w), without gradients."""
        outputs = []
        for point in points.split(1):
            key = hashlib.sha256(point.numpy().tobytes()).digest()
            if key not in self.outputs:
                self.outputs[key] = self.run(point)
            outputs.append(self.outputs[key])
        return torch.cat(outputs)


def judge(
    ig: IntegratedGradients,
    model_input: ModelInput,
    settings: Settings,
    method: str,
    remembering: Remembering,
    samples: Sequence[Sample],
) -> Judged:
    """Explain an image and check its map. Raises InputError if nothing is predicted."""
    (explanation,) = explanations(ig, model_input, of_method(settings, method), samples)
    labels = model_input.truth
    truth = None if labels is None else explanation.objective.explained(labels)
    statistics = explanation_statistics(explanation, truth)
    subject = subject_of(ig, model_input.x, explanation, truth, model_input.placement)
    with ig.engine.running(subject.x):
        for check in CHECKS:
            statistics |= check(replace(subject, run=remembering), EFFORT).metrics
        statistics |= noise_sensitivity(subject, EFFORT).metrics
    return Judged(statistics, explanation, truth)


def of_method(settings: Settings, method: str) -> Settings:
    """The settings for a single one of their methods, with the options of this method."""
    options = METHODS[method.partition(':')[0]].options
    texts = tuple(text for text in settings.method_option if text.partition('=')[0] in options)
    return replace(settings, method=(method,), method_option=texts)


def compare(
    ig: IntegratedGradients, model_input: ModelInput, settings: Settings, samples: Sequence[Sample]
) -> Iterator[Judged]:
    """An image under each method. samples: of its dataset. Raises InputError if nothing is
    predicted."""
    plain = replace(of_method(settings, PLAIN), num_steps=2)
    explanations(ig, model_input, plain)  # so that preparation counts in no method's time
    remembering = Remembering(ig.engine.run)
    for method in settings.method:
        yield judge(ig, model_input, settings, method, remembering, samples)


def picture(
    name: str, image: np.ndarray, model_input: ModelInput, judged: Sequence[Judged], path: Path
) -> None:
    """Save a picture of one image under all methods, in at most PICTURE_BYTES if possible."""
    placement = model_input.placement
    views = [view_of(display_arrays(result.explanation, image, result.truth, placement))
             for result in judged]  # fmt: skip
    figure = methods_figure(views, [{'image': name, **result.statistics} for result in judged])
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=80)
    drawn, quality = Image.open(buffer).convert('RGB'), 90
    drawn.save(path, quality=quality)
    while path.stat().st_size > PICTURE_BYTES and quality > 40:
        quality -= 10
        drawn.save(path, quality=quality)


# --------------------------------------------------------------------------- the whole run


def in_random_order(samples: Sequence[Sample]) -> Iterator[Sample]:
    """The samples with a mask. In random order a run that is cut off has samples of all kinds."""
    for number in np.random.default_rng(0).permutation(len(samples)):
        if (samples[number].truth() > 0).any():
            yield samples[number]


def report(rows: Rows, arguments, ig: IntegratedGradients) -> str:
    """The text of the results."""
    images = sorted({name for by_image in rows.values() for name in by_image})
    of = '' if len(images) == arguments.images else f' (of {arguments.images} that were asked for)'
    return f"""# Methods compared: {arguments.name}

`python benchmarks/compare_methods.py {shown(arguments.command)}`

{len(images)} images{of} with a mask and a prediction, drawn from the test split
({', '.join(images)}), input
{ig.preprocessing.image_size}, baseline {arguments.baseline} where a method takes one,
{arguments.steps} steps a path, target: mean logit over the predicted mask. {cpu_name()},
{os.cpu_count()} cores that other work used too, {torch.get_num_threads()} thread(s), torch
{torch.__version__}: the seconds tell methods apart, no more.

Medians over the images, with {COVERED:.0%} intervals (percentile bootstrap, seeded).{BETTER} and
{WORSE.strip()}: better and worse than `{PLAIN}` on the same images, where the interval of the
paired difference leaves 0 out. Of fewer than ten images an interval is little more than their
range: take marks as hints there.

{table(rows, COSTS, compared=False)}

*Images through the network* counts those of gradients too. A gap is `n/a` where no sum is promised.

{table(rows, TRUST, compared=True)}

*Deletion* and *insertion*: margins over copies of the map in the wrong place (*displaced*), and
over the better of a random map and the image's edges; above 0 the map tells more. *Infidelity*: 0
is perfect, 1 as bad as no map; patches become what the method compares with. *Mass in truth*: of
|attribution|. *Noise*: relative change of the map under noise too faint to see, of its broad
features and of every pixel, from {EFFORT.noisy} noisy image and maps of {EFFORT.map_steps} steps.

![One image under every method](compare_methods_{arguments.name}.jpg)
"""


def parse(command: Sequence[str]):
    """The flags."""
    parser = benchmark_parser(__doc__)
    parser.add_argument('--images', type=int, default=20)
    parser.add_argument('--image_size', type=int, help="default: the model's")
    parser.add_argument('--steps', type=int, default=20, help='of each path')
    parser.add_argument('--baseline', default='mean')
    parser.add_argument(
        '--layer', default='encoder.stage4', help='the layer of methods layer and gradcam'
    )
    parser.add_argument('--methods', nargs='+', help='default: all')
    parser.add_argument('--method_option', nargs='+', default=(), metavar='NAME=VALUE')
    parser.add_argument('--shown', type=int, default=0, help='number of the image in the picture')
    arguments = parser.parse_args(command)
    arguments.command = list(command)
    all_methods = [form_of(name).replace('NAME', arguments.layer) for name in METHODS]
    arguments.methods = arguments.methods or all_methods
    return arguments


def main(command: Sequence[str]) -> int:
    arguments = parse(command)
    settings = Settings(
        num_steps=arguments.steps, baseline=arguments.baseline, image_size=arguments.image_size,
        method=tuple(arguments.methods), method_option=tuple(arguments.method_option),
    )  # fmt: skip
    model = load_model(arguments.model_path, 'cpu')
    ig = IntegratedGradients(model, 'cpu', input_preprocessing(model, settings))
    samples = list_samples(Path(arguments.data_dir))
    rows: Rows = {method: {} for method in settings.method}
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f'compare_methods_{arguments.name}.md'
    say = partial(print, flush=True)
    done = 0
    for sample in in_random_order(samples):
        image = sample.image()
        model_input = ModelInput.of(ig.preprocessing, image, sample.truth())
        ig.prepare(model_input.x)
        judged = []
        try:
            results = compare(ig, model_input, settings, samples)
            for method, result in zip(settings.method, results, strict=True):
                judged.append(result)
                figures = (f'{key}={result.statistics[key]}' for key in RECORDED)
                say(sample.name, method, *figures)
        except InputError as error:
            say(f'{sample.name} is left out: {error}')
            continue
        for method, result in zip(settings.method, judged, strict=True):
            rows[method][sample.name] = {key: result.statistics[key] for key in RECORDED}
        path.write_text(report(rows, arguments, ig), encoding='utf-8')
        if done == arguments.shown:
            picture(sample.name, image, model_input, judged, path.with_suffix('.jpg'))
        done += 1
        if done == arguments.images:
            break
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
