"""Maps where the truth is known: pictures with planted evidence, and a network trained on them.

    python benchmarks/planted_evidence.py

Each scenario says what decides whether a spot belongs to the mask, and nothing else does:

- look: the spot's own look; marks lie about that mean nothing (distractors);
- cue: a small mark at a fixed distance to the right of the spot; spots without it are background;
- shortcut: a watermark in a corner; without it no spot is in the mask.

Spots are dark on light or bright on dark. A small U-Net learns each scenario in about a minute;
then its maps are taken on new pictures, against every baseline: how much of the attribution lies
on what is known to matter, and what the verdict says. A shortcut has to be found (the score hangs
on a distant spot), and nothing may be cried where there is none. Everything is seeded.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / 'demo')]

from train_demo_model import segmentation_loss  # noqa: E402

from errors import InputError  # noqa: E402
from faithfulness import evaluate_explanation  # noqa: E402
from image_statistics import explanation_statistics  # noqa: E402
from integrated_gradients import IntegratedGradients, ModelInput, Settings  # noqa: E402
from segmentation_dataset import Preprocessing  # noqa: E402
from verdict import verdict_of  # noqa: E402

SIDE = 96  # pixels
PREPROCESSING = Preprocessing(image_size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)
RADIUS, MARK, DISTANCE = 7, 5, 18  # pixels: of a spot, side of a mark, from spot to mark
STAMP = 8  # pixels: side of the watermark
TOLERANCE, MAX_STEPS = 0.1, 100
BOUNDARY_POINTS = 33  # at which the score is looked at for the boundary
SCENARIOS = ('look', 'cue', 'shortcut')
BASELINES = ('zero', 'white', 'mean', 'blur', 'boundary', 'auto')
SHORTCUT = 'distant spot'  # what a verdict has to find
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
        loss = segmentation_loss(network(x), truth)
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
    (rough,) = ig.explain_with(Settings(baseline='mean', num_steps=2), given.x,
                               placement=given.placement)  # fmt: skip
    (mean,) = ig.baseline_images('mean', given.x[None])
    start = PREPROCESSING.normalise(mean)
    alphas = torch.linspace(1, 0, BOUNDARY_POINTS).view(-1, 1, 1, 1)
    with torch.no_grad():
        scores = rough.objective(ig.model(start + alphas * (given.x - start)))
    below = (scores <= 0).nonzero()
    return start + alphas[int(below[0]) if len(below) else -1] * (given.x - start)


def examine(network: UNet, picture: Picture, baseline: str) -> Seen | None:
    """The map of a picture, checked; None where nothing is predicted."""
    ig = IntegratedGradients(network, 'cpu', PREPROCESSING)
    given = ModelInput.of(PREPROCESSING, picture.image, picture.mask.astype(np.uint8))
    settings = Settings(tolerance=TOLERANCE, max_steps=MAX_STEPS)
    try:
        against = boundary(ig, given) if baseline == 'boundary' else baseline
        found = ig.explain(given.x, 'predicted', against, placement=given.placement,
                           tolerance=TOLERANCE, max_steps=MAX_STEPS)  # fmt: skip
    except InputError:
        return None
    statistics = explanation_statistics(found, picture.mask)
    statistics |= evaluate_explanation(ig, given.x, found, 'quick', picture.mask, given.placement)
    statistics |= {'notes': [], 'settings': {**settings.record(), 'evaluate': 'quick'}}
    magnitude = found.attributions.abs().sum(dim=0).numpy()
    flags = [one['flag'] for one in verdict_of(statistics)]
    shares = [float(magnitude[where].sum() / magnitude.sum())
              for where in (picture.evidence, picture.distractors)]  # fmt: skip
    return Seen(*shares, flags, statistics['dice'])


def row_of(scenario: str, kind: str, baseline: str, seen: Sequence[Seen]) -> str:
    """A row of the table."""
    first = Counter(one.flags[0] for one in seen)
    found = sum(SHORTCUT in one.flags for one in seen)
    cells = [
        scenario, kind, baseline, f'{np.mean([one.dice for one in seen]):.2f}',
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
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    columns = ('evidence', 'spots', 'baseline', 'Dice', 'on evidence', 'on distractors',
               SHORTCUT, *VERDICTS)  # fmt: skip
    lines = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    for scenario in SCENARIOS:
        network = trained(scenario, args.batches, args.seed)
        for bright in (False, True):
            rng = np.random.default_rng(args.seed + 1)
            stamped = [scenario == 'shortcut' or k % 2 == 0 for k in range(args.pictures)]
            pictures = [generate(scenario, bright, rng, stamp) for stamp in stamped]
            for baseline in args.baselines:
                kind = 'bright' if bright else 'dark'
                several = tqdm(pictures, desc=f'{scenario}, {kind}, {baseline}', unit='picture')
                seen = [one for p in several if (one := examine(network, p, baseline))]
                if seen:
                    lines.append(row_of(scenario, kind, baseline, seen))
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
