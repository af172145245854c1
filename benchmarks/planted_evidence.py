"""Maps where the truth is known: pictures with planted evidence, and a network trained on them.

    python benchmarks/planted_evidence.py
    python benchmarks/planted_evidence.py --batches 150 --pictures 2 --baselines mean --methods all

Each scenario says what decides whether a spot belongs to the mask, and nothing else does:

- look: the spot's own look; marks lie about that mean nothing (distractors);
- cue: a small mark at a fixed distance to the right of the spot; spots without it are background;
- shortcut: a watermark in a corner; without it no spot is in the mask.

Spots are dark on light or bright on dark. A small U-Net learns each scenario in about a minute;
then its maps are taken on new pictures, against every baseline: how much of the attribution lies
on what is known to matter, and what the verdict says. A shortcut has to be found (the score hangs
on a distant spot), and nothing may be cried where there is none. With --methods the same is asked
of other methods, beside the image's Sobel edges as a yardstick. Everything is seeded.
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
    build_baselines,
    given_baseline,
)

HERE = Path(__file__).resolve().parent
DEMO_TRAINING = runpy.run_path(str(HERE.parent / 'demo' / 'train_demo_model.py'))

SIDE = 96  # pixels
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)
RADIUS, MARK, DISTANCE = 7, 5, 18  # pixels: of a spot, side of a mark, from spot to mark
STAMP = 8  # pixels: side of the watermark
TOLERANCE, MAX_STEPS = 0.1, 100
REFERENCES = 16  # other pictures, for methods that compare with such
BOUNDARY_POINTS = 33  # at which the score is looked at for the boundary
SCENARIOS = ('look', 'cue', 'shortcut')
BASELINES = ('zero', 'white', 'mean', 'blur', 'boundary', 'auto')
SHORTCUT = 'distant spot'  # what a verdict has to find
EDGES = 'edges'  # a yardstick that no network is asked for
LAYER = 'down.3'  # of layer and gradcam: 12x12, before the coarsest levels
EDGES_DECLARED = Declared(EDGES, None, baseline=NO_BASELINE)
METHODS_COMPARED = (*(form_of(name).replace('NAME', LAYER) for name in METHODS), EDGES)
VERDICTS = ('trust broadly', 'trust in part', 'do not trust')


@dataclass(frozen=True)
class Picture:
    """A generated image and where everything in it lies; masks are (S, S) bool."""

    image: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray  # what is to be segmented
    evidence: np.ndarray  # what decides it: spots in the mask, their marks, the watermark
    distractors: np.ndarray  # what looks as if it could, and does not


def generate(scenario: str, bright: bool, rng: np.random.Generator, stamped: bool) -> Picture:
    """A picture. bright: bright spots on a dark ground, else the other way round. stamped: with a
    watermark (elsewhere than in `shortcut` it has no meaning)."""
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
    """Around a centre."""
    half = side // 2
    return slice(row - half, row - half + side), slice(column - half, column - half + side)


def _pattern(side: int) -> np.ndarray:
    """A checkerboard of -1 and 1."""
    return np.where(np.indices((side, side)).sum(axis=0) // 2 % 2, 1.0, -1.0)


class UNet(nn.Module):
    """Five levels, the last of which sees the whole picture."""

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
        some = [generate(scenario, k % 2 == 0, rng, rng.random() < 0.5) for k in range(16)]
        x = torch.cat([PREPROCESSING.normalise(one.image) for one in some])
        truth = torch.from_numpy(np.stack([one.mask for one in some])).float().unsqueeze(1)
        loss = DEMO_TRAINING['segmentation_loss'](network(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@dataclass(frozen=True)
class Seen:
    """What was found of one picture against one baseline."""

    on_evidence: float  # shares of |attribution|
    on_distractors: float
    flags: list[str]
    dice: float


def boundary(ig: IntegratedGradients, given: ModelInput) -> torch.Tensor:
    """A baseline at the decision boundary (after Morasso et al. 2025): the point nearest to the
    picture, on the way to its mean, at which the mean logit over the prediction is not positive."""
    (rough,) = explanations(ig, given, Settings(baseline='mean', num_steps=2))
    (mean,) = build_baselines('mean', PREPROCESSING.to_pixels(given.x), PREPROCESSING)
    start = PREPROCESSING.normalise(mean)
    alphas = torch.linspace(1, 0, BOUNDARY_POINTS).view(-1, 1, 1, 1)
    with torch.no_grad():
        scores = rough.objective(ig.model(start + alphas * (given.x - start)))
    below = (scores <= 0).nonzero()
    return start + alphas[int(below[0]) if len(below) else -1] * (given.x - start)


def declared_by(method: str) -> Declared:
    """What a method says of itself."""
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
) -> Seen | None:
    """The map of a picture, checked; None where nothing is predicted. references: other pictures
    (n, 3, S, S), for methods that compare with such."""
    ig = IntegratedGradients(network, 'cpu', PREPROCESSING)
    given = ModelInput.of(PREPROCESSING, picture.image, picture.mask.astype(np.uint8))
    settings = Settings(method=('ig' if method == EDGES else method,))
    if declared_by(method).quadrature:
        settings = replace(settings, tolerance=TOLERANCE, max_steps=MAX_STEPS)
    try:
        against = boundary(ig, given) if baseline == 'boundary' else baseline
        question = replace(settings.question, **given_baseline(against, 3))
        (chosen,) = map(build_method, settings.methods)
        (found,) = ig.explain_with(given, question, settings.integration, chosen, references)
    except InputError:
        return None
    if method == EDGES:
        found = replace(with_map(found, edges_of(ig, given.x).sum(axis=0)), again=edges_of)
    statistics = explanation_statistics(found, picture.mask)
    statistics |= evaluate_explanation(ig, given.x, found, 'quick', picture.mask, given.placement)
    statistics |= {'notes': [], 'settings': {**settings.record(), 'evaluate': 'quick'}}
    magnitude = found.attributions.abs().sum(dim=0).numpy()
    flags = [one['flag'] for one in verdict_of(statistics)]
    shares = [float(magnitude[where].sum() / magnitude.sum())
              for where in (picture.evidence, picture.distractors)]  # fmt: skip
    return Seen(*shares, flags, statistics['dice'])


def row_of(names: Sequence[str], seen: Sequence[Seen]) -> str:
    """A row of the table, which the names head."""
    first = Counter(one.flags[0] for one in seen)
    found = sum(SHORTCUT in one.flags for one in seen)
    cells = [
        *names, f'{np.mean([one.dice for one in seen]):.2f}',
        f'{np.mean([one.on_evidence for one in seen]):.0%}',
        f'{np.mean([one.on_distractors for one in seen]):.0%}',
        f'{found}/{len(seen)}', *(str(first[flag]) for flag in VERDICTS),
    ]  # fmt: skip
    return f'| {" | ".join(cells)} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batches', type=int, default=400, help='of 16 pictures, to learn from')
    parser.add_argument('--pictures', type=int, default=8, help='to explain, of each kind')
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
            references = torch.cat([PREPROCESSING.normalise(one.image) for one in others])
            kind = 'bright' if bright else 'dark'
            for baseline, method in product(args.baselines, methods):
                several = tqdm(pictures, desc=f'{scenario}, {kind}, {baseline}, {method}',
                               unit='picture')  # fmt: skip
                seen = [one for p in several
                        if (one := examine(network, p, baseline, method, references))]  # fmt: skip
                names = [scenario, kind, baseline]
                if several_methods:
                    against = declared_by(method).baseline
                    names[2:] = [baseline if against == USER_BASELINE else against, f'`{method}`']
                if seen:
                    print(row_of(names, seen), flush=True)


if __name__ == '__main__':
    main()
