"""How often each finding, and the verdict, speaks against good maps and against broken maps.

    python benchmarks/calibrate_verdicts.py measure --model_path demo/demo_model.pth \
        --data_dir demo/Dataset_no_preprocessing --name demo --images 12
    python benchmarks/calibrate_verdicts.py table

`measure` explains images of a split and adds a line of figures for each map to a file. The maps are
the good map of an image; a random map; the image's edges; the map in the wrong place; another
image's map; the map of a network with redrawn weights; the map against the baseline that hides the
target most; and a map of two steps. All but the last three keep the sum and the error of the good
map, so that only the *checks* can tell them apart. `table` judges the maps by the present rules.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from runs import explanations
from tqdm import tqdm

from igseg.checks.checks import evaluate, redraw, weights_of
from igseg.checks.curves import displaced, edge_map
from igseg.checks.subject import subject_of
from igseg.checks.verdict import LEVELS, verdict_of
from igseg.data.samples import Sample
from igseg.errors import InputError
from igseg.explanation import Explanation
from igseg.network.kinds import NetworkSource
from igseg.statistics import explanation_statistics
from integrated_gradients import (
    CANDIDATES,
    IntegratedGradients,
    ModelInput,
    Settings,
    choose_samples,
    list_samples,
    load_explainer,
    plain_map,
)

HERE = Path(__file__).resolve().parent

GOOD, HIDDEN = 'good', 'hidden target'  # kinds of maps
LEAST_DICE = 0.8  # of the mask that a good map explains
TOLERANCE = 0.1


def randomised(ig: IntegratedGradients, seed: int) -> IntegratedGradients:
    """The same network with all weights redrawn."""
    network = copy.deepcopy(ig.model)
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if [*weights_of(layer)]:
            redraw(layer, generator)
    return IntegratedGradients(network, ig.device, ig.preprocessing)


def with_map(good: Explanation, signed: np.ndarray) -> Explanation:
    """The explanation with another map (H, W), scaled to the same sum of |attribution|."""
    maps = np.repeat(signed[None] / 3, len(good.attributions), axis=0)
    size = float(good.attributions.abs().sum())
    return replace(good, attributions=torch.from_numpy(maps / np.abs(maps).sum() * size).float())


def broken_maps(
    ig: IntegratedGradients,
    redrawn: IntegratedGradients,
    model_input: ModelInput,
    good: Explanation,
    other: np.ndarray | None,
    settings: Settings,
    rng: np.random.Generator,
) -> Iterator[tuple[str, Explanation, Callable[..., np.ndarray]]]:
    """Maps that should not be trusted: what is wrong, the map, and a method that makes it."""

    def of_edges(network: object, x: torch.Tensor, *_: object) -> np.ndarray:
        return np.repeat(edge_map(ig.preprocessing.to_pixels(x))[None], x.shape[1], axis=0)

    def of_random_weights(network: object, x: torch.Tensor, *others: object) -> np.ndarray:
        return plain_map(redrawn.model, x, *others)

    signed = good.attributions.sum(dim=0).cpu().numpy()
    yield 'random', with_map(good, rng.normal(size=signed.shape)), plain_map
    yield 'edges', with_map(good, of_edges(None, model_input.x)[0]), of_edges
    yield 'displaced', with_map(good, displaced(signed, rng)), plain_map
    if other is not None:
        yield 'another image', with_map(good, other), plain_map
    noise = redrawn.explain(model_input.x, good.objective, good.baseline, num_steps=8)
    noisy = with_map(good, noise.attributions.sum(dim=0).cpu().numpy())
    yield 'random weights', noisy, of_random_weights
    contrasts = {
        kind: explanation_statistics(
            ig.explain(
                model_input.x, good.objective, kind, num_steps=2, placement=model_input.placement
            )
        )['baseline_contrast']
        for kind in CANDIDATES
    }
    worst = min(contrasts, key=lambda kind: contrasts[kind] or 0)
    if (contrasts[worst] or 0) < 1:
        (hidden,) = explanations(ig, model_input, replace(settings, baseline=worst))
        yield HIDDEN, hidden, plain_map
    two_steps = Settings(num_steps=2, baseline=good.baseline, rule='trapezoid')
    rough = explanations(ig, model_input, two_steps)[0]
    yield 'two steps', rough, plain_map


def figures(
    ig: IntegratedGradients,
    model_input: ModelInput,
    explanation: Explanation,
    method: Callable[..., np.ndarray],
    effort: str,
    settings: Settings,
) -> dict:
    """The statistics of a map, with its checks, from which its verdict is made."""
    truth = explanation.objective.explained(model_input.truth)
    statistics = explanation_statistics(explanation, truth)
    subject = subject_of(ig, model_input.x, explanation, truth, model_input.placement)
    subject = replace(subject, method=method)
    with ig.engine.running(subject.x):
        statistics |= evaluate(subject, effort).metrics
    statistics.pop('preparation')
    return {**statistics, 'notes': [], 'settings': {**settings.record(), 'evaluate': effort}}


def remembering(method: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The method, with a memory of its maps: the checks of all maps of an image need many of the
    same maps. A network is recognised by its output for the image."""
    maps: dict[tuple, np.ndarray] = {}

    def remembered(
        network: Callable, x: torch.Tensor, baseline: torch.Tensor, target: object, steps: int
    ) -> np.ndarray:
        with torch.no_grad():
            output = network(x)
        key = (steps, *(tensor.cpu().numpy().tobytes() for tensor in (x, baseline, output)))
        if key not in maps:
            maps[key] = method(network, x, baseline, target, steps)
        return maps[key]

    return remembered


def has_right_mask(statistics: dict) -> bool:
    """Whether the mask that a map explains is right."""
    return (statistics['dice'] or 0) > LEAST_DICE


def is_good(statistics: dict) -> bool:
    """Whether a map should be trusted: the tolerance was reached, and the mask is right."""
    return statistics['within_tolerance'] and has_right_mask(statistics)


def is_right(ig: IntegratedGradients, sample: Sample) -> bool:
    """Whether the mask of a sample is right. This costs a single gradient."""
    model_input = ModelInput.of(ig.preprocessing, sample.image(), sample.truth())
    try:
        (explanation,) = explanations(ig, model_input, Settings(method='gradient'))
    except InputError:
        return False
    truth = explanation.objective.explained(model_input.truth)
    return has_right_mask(explanation_statistics(explanation, truth))


def measure(args: argparse.Namespace) -> None:
    settings = Settings(tolerance=TOLERANCE, baseline='auto', max_steps=args.max_steps)
    sized = Settings(image_size=args.image_size or None)
    ig = load_explainer(NetworkSource(args.model_path, 'cpu'), sized)
    redrawn, rng = randomised(ig, 0), np.random.default_rng(0)
    all_samples = list_samples(args.data_dir, args.split)
    samples = [sample for sample in all_samples if args.match in sample.name]
    if args.right_only:
        samples = [sample for sample in tqdm(samples, 'masks') if is_right(ig, sample)]
    other = None  # the good map of the image before
    with args.output.open('a', encoding='utf-8') as stream:
        for sample in tqdm(choose_samples(samples, args.images)):
            image, truth = sample.image(), sample.truth()
            model_input = ModelInput.of(ig.preprocessing, image, truth)
            try:
                (good,) = explanations(ig, model_input, settings)
            except InputError:
                continue
            truth = good.objective.explained(model_input.truth)
            if not is_good(explanation_statistics(good, truth)):
                continue
            maps = [(GOOD, good, plain_map)]
            maps += broken_maps(ig, redrawn, model_input, good, other, settings, rng)
            shared = remembering(plain_map)
            maps = [(kind, explanation, shared if method is plain_map else remembering(method))
                    for kind, explanation, method in maps]  # fmt: skip
            other = good.attributions.sum(dim=0).cpu().numpy()
            for kind, explanation, method in maps:
                row = figures(ig, model_input, explanation, method, args.effort, settings)
                row |= {'data': args.name, 'map': kind, 'image': sample.name, 'split': args.split}
                stream.write(json.dumps(row) + '\n')
                stream.flush()


def counted(rows: Sequence[dict]) -> list[dict]:
    """The rows of maps whose name is right. A hidden target counts only if it really is hidden: it
    weighs less than half as much as in the good map."""

    def image_of(row: dict) -> tuple[str, ...]:
        return row['data'], row['image'], row['settings']['evaluate']

    good = {image_of(row): row['attribution_ratio_in_target'] for row in rows if row['map'] == GOOD}
    return [
        row
        for row in rows
        if image_of(row) in good
        and (row['map'] != HIDDEN or row['attribution_ratio_in_target'] < good[image_of(row)] / 2)
    ]


def table(args: argparse.Namespace) -> None:
    """Two tables in Markdown: how often maps are not trusted, and how often each rule fires."""
    rows = [json.loads(line) for file in args.files for line in file.open(encoding='utf-8')]
    rows = [row for row in counted(rows) if row['split'] in args.split]
    for row in rows:
        row['flags'] = [finding['flag'] for finding in verdict_of(row)]
    kinds = list(dict.fromkeys(row['map'] for row in rows))
    sets = sorted({(row['settings']['evaluate'], row['data']) for row in rows}, reverse=True)
    _print_row('not trusted', kinds)
    _print_row('---', ['---'] * len(kinds))
    for effort, data in sets:
        chosen = [r for r in rows if (r['settings']['evaluate'], r['data']) == (effort, data)]
        _print_row(f'{data}, `{effort}`', [_share(chosen, kind, 'do not trust') for kind in kinds])
    for effort in dict.fromkeys(effort for effort, _ in sets):
        print()
        _print_row(f'`{effort}`', kinds)
        _print_row('---', ['---'] * len(kinds))
        chosen = [row for row in rows if row['settings']['evaluate'] == effort]
        for flag in (flag for flag in LEVELS if any(flag in row['flags'] for row in chosen)):
            _print_row(flag, [_share(chosen, kind, flag) for kind in kinds])


def _print_row(name: str, cells: Sequence[str]) -> None:
    print(f'| {" | ".join([name, *cells])} |')


def _share(rows: Sequence[dict], kind: str, flag: str) -> str:
    """How many maps of a kind have a flag, and how many there are."""
    maps = [row for row in rows if row['map'] == kind]
    return f'{sum(flag in row["flags"] for row in maps)}/{len(maps)}' if maps else '–'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('measure')
    command.add_argument('--model_path', type=Path, required=True)
    command.add_argument('--data_dir', type=Path, required=True)
    command.add_argument('--name', required=True)
    command.add_argument('--split', default='test')
    command.add_argument('--match', default='', help='only images whose name holds this text')
    command.add_argument('--images', type=int, default=12)
    command.add_argument(
        '--right_only', action='store_true', help='choose only from images whose mask is right'
    )
    command.add_argument('--effort', default='quick')
    command.add_argument('--image_size', type=int, help='default: the size of the checkpoint')
    command.add_argument('--max_steps', type=int, default=100)
    command.add_argument('--output', type=Path, default=HERE / 'results' / 'verdicts.jsonl')
    command.set_defaults(run=measure)
    command = commands.add_parser('table')
    command.add_argument('files', type=Path, nargs='+')
    command.add_argument('--split', nargs='+', default=['test'])
    command.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)


if __name__ == '__main__':
    main()
