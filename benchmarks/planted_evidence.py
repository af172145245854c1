"""Maps of which the truth is known: pictures with planted evidence, and networks trained on them.

    python benchmarks/planted_evidence.py
    python benchmarks/planted_evidence.py --batches 150 --pictures 2 --baselines mean --methods all

In each scenario a single thing decides whether a spot belongs to the mask:

- look: the look of the spot. There are also marks, which mean nothing (distractors);
- cue: a small mark at a fixed distance to the right of the spot. Spots without it are background;
- shortcut: a watermark in a corner. Without it no spot is in the mask.

Spots are dark on light or bright on dark. A small U-Net learns each scenario in about a minute.
Then new pictures are explained with each baseline. The table tells how much of the attribution lies
on the evidence, and what the verdict says. The verdict must find a shortcut (the score depends on a
distant spot), and must not report a shortcut that does not exist. With --methods the same is done
for other methods, and for the image's Sobel edges as a yardstick. Everything is seeded.
"""

from __future__ import annotations

import argparse
import runpy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from calibrate_verdicts import with_map
from runs import explanations
from torch import nn
from tqdm import tqdm

from igseg.checks.checks import evaluate_explanation
from igseg.checks.curves import edge_map
from igseg.checks.verdict import verdict_of
from igseg.errors import InputError
from igseg.explanation import NO_BASELINE, USER_BASELINE, Declared
from igseg.method.choice import METHODS, form_of
from igseg.method.method import build_method, build_methods
from igseg.preprocessing import Preprocessing
from igseg.statistics import explanation_statistics
from integrated_gradients import (
    IntegratedGradients,
    ModelInput,
    Settings,
    baseline_fields,
    build_baselines,
)

HERE = Path(__file__).resolve().parent
DEMO_TRAINING = runpy.run_path(str(HERE.parent / 'demo' / 'train_demo_model.py'))

SIDE = 96  # pixels
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)
RADIUS, MARK, DISTANCE = 7, 5, 18  # pixels: of a spot, side of a mark, from spot to mark
STAMP = 8  # pixels: side of the watermark
TOLERANCE, MAX_STEPS = 0.1, 100
REFERENCES = 16  # other pictures, for methods that need such
BOUNDARY_POINTS = 33  # at which the score is computed to find the boundary
SCENARIOS = ('look', 'cue', 'shortcut')
BASELINES = ('zero', 'white', 'mean', 'blur', 'boundary', 'auto')
SHORTCUT = 'distant spot'  # the finding of a verdict that tells of a shortcut
EDGES = 'edges'  # a yardstick: the map of the edges, without a network
LAYER = 'down.3'  # for layer and gradcam: 12x12, before the coarsest levels
EDGES_DECLARED = Declared(EDGES, None, baseline=NO_BASELINE)
METHODS_COMPARED = (*(form_of(name).replace('NAME', LAYER) for name in METHODS), EDGES)
VERDICTS = ('trust broadly', 'trust in part', 'do not trust')


@dataclass(frozen=True)
class Picture:
    """A generated image, and the places of all things in it; masks are (S, S) bool."""

    image: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray  # what is to be segmented
    evidence: np.ndarray  # what decides the mask: spots in it, their marks, the watermark
    distractors: np.ndarray  # what looks as if it decided the mask, and does not


def generate(scenario: str, bright: bool, rng: np.random.Generator, stamped: bool) -> Picture:
    """A picture. bright: bright spots on a dark ground, else dark spots on a light ground. stamped:
    with a watermark, which has a meaning only in `shortcut`."""
    ground, spot = (60, 170) if bright else (190, 80)
    rough = rng.normal(0, 1, (SIDE // 8, SIDE // 8)).astype(np.float32)
    grey = ground + 8 * np.kron(rough, np.ones((8, 8))) + rng.normal(0, 6, (SIDE, SIDE))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask, evidence, distractors = (np.zeros((SIDE, SIDE), bool) for _ in range(3))
    centres = [(rng.integers(18, 40), rng.integers(14, 60)),
               (rng.integers(58, 80), rng.integers(14, 60))]  # fmt: skip
    marked = rng.permutation([True, False])
    for (row, column), has_mark in zip(centres, marked, strict=True):
        disc = (rows - row) ** 2 + (columns - column) ** 2 <= RADIUS**2
        grey[disc] = spot + rng.normal(0, 6, disc.sum())
        mark = _square(row, column + DISTANCE, MARK)
        if has_mark:
            grey[mark] = 128 + 100 * _pattern(MARK)
        counts = {'look': True, 'cue': has_mark, 'shortcut': stamped}[scenario]
        if counts:
            mask |= disc
            evidence |= disc
        if has_mark:
            (evidence if scenario == 'cue' else distractors)[mark] = True
    if stamped:
        stamp = _square(STAMP // 2, SIDE - STAMP // 2, STAMP)
        grey[stamp] = 128 + 100 * _pattern(STAMP)
        (evidence if scenario == 'shortcut' else distractors)[stamp] = True
    image = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    return Picture(image, mask, evidence, distractors)


def _square(row: int, column: int, side: int) -> tuple[slice, slice]:
    """The rows and columns of a square around a centre."""
    half = side // 2
    return slice(row - half, row - half + side), slice(column - half, column - half + side)


def _pattern(side: int) -> np.ndarray:
    """A checkerboard of -1 and 1."""
    return np.where(np.indices((side, side)).sum(axis=0) // 2 % 2, 1.0, -1.0)


class UNet(nn.Module):
    """A U-Net whose coarsest level sees the whole picture."""

    WIDTHS = (12, 24, 32, 48, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        pairs = list(zip((3, *self.WIDTHS[:-1]), self.WIDTHS, strict=True))
        self.down = nn.ModuleList(_block(before, after) for before, after in pairs)
        self.up = nn.ModuleList(
            _block(coarse + fine, fine)
            for fine, coarse in zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True)
        )
        self.head = nn.Conv2d(self.WIDTHS[0], 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.max_pool2d(x, 2))
            levels.append(x)
        for block, skip in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        return self.head(x)


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.SiLU(),
    )  # fmt: skip


def trained(scenario: str, batches: int, seed: int) -> UNet:
    """A network that has learned a scenario, in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = UNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, batches)
    for _ in tqdm(range(batches), desc=f'learning {scenario}', unit='batch'):
        pictures = [generate(scenario, k % 2 == 0, rng, rng.random() < 0.5) for k in range(16)]
        x = torch.cat([PREPROCESSING.normalise(picture.image) for picture in pictures])
        masks = np.stack([picture.mask for picture in pictures])
        truth = torch.from_numpy(masks).float().unsqueeze(1)
        loss = DEMO_TRAINING['segmentation_loss'](network(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@dataclass(frozen=True)
class Examined:
    """The figures of a picture's map with a baseline."""

    on_evidence: float  # shares of |attribution|
    on_distractors: float
    flags: list[str]
    dice: float


def boundary(ig: IntegratedGradients, model_input: ModelInput) -> torch.Tensor:
    """A baseline at the decision boundary (after Morasso et al. 2025): the point nearest to the
    picture, on the way to its mean, at which the mean logit over the prediction is not positive."""
    (rough,) = explanations(ig, model_input, Settings(baseline='mean', num_steps=2))
    x = model_input.x
    (mean,) = build_baselines('mean', PREPROCESSING.to_pixels(x), PREPROCESSING)
    start = PREPROCESSING.normalise(mean)
    alphas = torch.linspace(1, 0, BOUNDARY_POINTS).view(-1, 1, 1, 1)
    with torch.no_grad():
        scores = rough.objective(ig.model(start + alphas * (x - start)))
    below = (scores <= 0).nonzero()
    return start + alphas[int(below[0]) if len(below) else -1] * (x - start)


def declared_by(method: str) -> Declared:
    """What a method declares."""
    return EDGES_DECLARED if method == EDGES else build_methods([method], [])[0].declares


def edges_of(network: object, x: torch.Tensor, *_: object) -> np.ndarray:
    """The edges of an image, in place of a method's map (C, H, W)."""
    return np.repeat(edge_map(PREPROCESSING.to_pixels(x))[None] / 3, 3, axis=0)


def examine(
    network: UNet,
    picture: Picture,
    baseline: str,
    method: str = 'ig',
    references: torch.Tensor | None = None,
) -> Examined | None:
    """The figures of a picture's map; None if nothing is predicted. references: other pictures
    (n, 3, S, S), for methods that need such."""
    ig = IntegratedGradients(network, 'cpu', PREPROCESSING)
    model_input = ModelInput.of(PREPROCESSING, picture.image, picture.mask.astype(np.uint8))
    settings = Settings(method=('ig' if method == EDGES else method,))
    if declared_by(method).quadrature:
        settings = replace(settings, tolerance=TOLERANCE, max_steps=MAX_STEPS)
    try:
        chosen = boundary(ig, model_input) if baseline == 'boundary' else baseline
        question = replace(settings.question, **baseline_fields(chosen, 3))
        (built,) = map(build_method, settings.methods)
        (explanation,) = ig.explain_with(
            model_input, question, settings.integration, built, references
        )
    except InputError:
        return None
    if method == EDGES:
        edges = edges_of(ig, model_input.x).sum(axis=0)
        explanation = replace(with_map(explanation, edges), again=edges_of)
    statistics = explanation_statistics(explanation, picture.mask)
    statistics |= evaluate_explanation(
        ig, model_input.x, explanation, 'quick', picture.mask, model_input.placement
    )
    statistics |= {'notes': [], 'settings': {**settings.record(), 'evaluate': 'quick'}}
    magnitude = explanation.attributions.abs().sum(dim=0).numpy()
    flags = [finding['flag'] for finding in verdict_of(statistics)]
    shares = [float(magnitude[mask].sum() / magnitude.sum())
              for mask in (picture.evidence, picture.distractors)]  # fmt: skip
    return Examined(*shares, flags, statistics['dice'])


def row_of(names: Sequence[str], examined: Sequence[Examined]) -> str:
    """A row of the table, which begins with the names."""
    verdicts = Counter(picture.flags[0] for picture in examined)
    shortcuts = sum(SHORTCUT in picture.flags for picture in examined)
    cells = [
        *names, f'{np.mean([picture.dice for picture in examined]):.2f}',
        f'{np.mean([picture.on_evidence for picture in examined]):.0%}',
        f'{np.mean([picture.on_distractors for picture in examined]):.0%}',
        f'{shortcuts}/{len(examined)}', *(str(verdicts[flag]) for flag in VERDICTS),
    ]  # fmt: skip
    return f'| {" | ".join(cells)} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--batches', type=int, default=400, help='batches of 16 pictures that a network learns from'
    )
    parser.add_argument(
        '--pictures', type=int, default=8, help='pictures of each kind that are explained'
    )
    parser.add_argument('--baselines', nargs='+', default=BASELINES)
    parser.add_argument('--methods', nargs='+', default=['ig'], help='or: all')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    methods = METHODS_COMPARED if args.methods == ['all'] else args.methods
    several_methods = methods != ['ig']
    columns = ('evidence', 'spots', 'baseline', *(['method'] if several_methods else []), 'Dice',
               'on evidence', 'on distractors', SHORTCUT, *VERDICTS)  # fmt: skip
    print(f'| {" | ".join(columns)} |\n' + '|---' * len(columns) + '|', flush=True)
    for scenario in SCENARIOS:
        network = trained(scenario, args.batches, args.seed)
        for bright in (False, True):
            rng = np.random.default_rng(args.seed + 1)
            stamped = [scenario == 'shortcut' or k % 2 == 0 for k in range(args.pictures)]
            pictures = [generate(scenario, bright, rng, stamp) for stamp in stamped]
            others = [generate(scenario, bright, rng, k % 2 == 0) for k in range(REFERENCES)]
            references = torch.cat([PREPROCESSING.normalise(other.image) for other in others])
            kind = 'bright' if bright else 'dark'
            for baseline, method in product(args.baselines, methods):
                progress = tqdm(pictures, desc=f'{scenario}, {kind}, {baseline}, {method}',
                                unit='picture')  # fmt: skip
                results = [examine(network, picture, baseline, method, references)
                           for picture in progress]  # fmt: skip
                examined = [result for result in results if result is not None]
                names = [scenario, kind, baseline]
                if several_methods:
                    chosen = declared_by(method).baseline
                    names[2:] = [baseline if chosen == USER_BASELINE else chosen, f'`{method}`']
                if examined:
                    print(row_of(names, examined), flush=True)


if __name__ == '__main__':
    main()
