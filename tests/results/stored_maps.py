"""Three small maps in double precision with their statistics, stored as this version computes them.

    python tests/results/stored_maps.py

stores them anew, and refuses to where figures have changed while RESULTS, in igseg/__init__.py, has
not been raised: finished images would pass for results of this kind, and they are none.
`--only_libraries` is for figures that another version of a library has changed, which the key of
finished images knows by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import igseg
from igseg.checks.checks import evaluate
from igseg.checks.effort import Effort
from igseg.checks.subject import subject_of
from igseg.explanation import Explanation
from igseg.preprocessing import Preprocessing
from igseg.results.finished import versions
from igseg.statistics import explanation_statistics
from integrated_gradients import IntegratedGradients

FOLDER = Path(__file__).resolve().parent / 'stored_maps'
SIDE = 16  # pixels
CLOSE = 1e-6
# What a run costs, and how the graph was prepared: no figures of the map.
NO_FIGURES = ('seconds', 'peak_memory_bytes', 'step_batch', 'forward_passes',
              'gradient_evaluations', 'preparation', 'cropping', 'evaluation')  # fmt: skip
# Superpixels are left out: pixels on the border of two may be of either on another processor.
EFFORT = Effort(fills=('baseline', 'blur'), units=('pixel',), points=3, displaced=2, random_maps=1,
                patches=8, stages=2, noisy=2, baselines=3, map_steps=6)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, an image, and the settings of the explanation."""

    channels: int
    activation: type[nn.Module]
    options: dict[str, Any] = field(default_factory=dict)  # of `IntegratedGradients.explain`
    checked: bool = False

    def network(self) -> nn.Module:
        """Two layers, whose weights are the same everywhere."""
        network = nn.Sequential(
            nn.Conv2d(self.channels, 6, 5, padding=2), self.activation(),
            nn.Conv2d(6, 1, 3, padding=1),
        ).double()  # fmt: skip
        draw = np.random.RandomState(0)
        with torch.no_grad():
            for weight in network.parameters():
                weight.copy_(torch.from_numpy(draw.normal(0, 0.3, tuple(weight.shape))))
        return network

    def image(self) -> torch.Tensor:
        """(C, H, W), a bright square in noise; every value is exact in any precision."""
        values = np.random.RandomState(1).randint(-64, 65, (self.channels, SIDE, SIDE)) / 64
        values[:, 4:9, 6:12] += 1
        return torch.from_numpy(values)

    def explained(self) -> tuple[Explanation, dict]:
        """The map and its statistics."""
        half = Preprocessing(SIDE, mean=(0.5,) * self.channels, std=(0.25,) * self.channels)
        ig = IntegratedGradients(self.network(), 'cpu', half)
        explanation = ig.explain(self.image(), **self.options)
        statistics = explanation_statistics(explanation)
        if self.checked:
            subject = subject_of(ig, self.image(), explanation)
            with ig.engine.running(subject.x):
                statistics |= evaluate(subject, EFFORT).metrics
        return explanation, {k: v for k, v in statistics.items() if k not in NO_FIGURES}


CASES: dict[str, Case] = {
    'adaptive': Case(3, nn.ReLU, {'num_steps': 12}, checked=True),
    'drawn': Case(1, nn.Softplus, {'baseline_type': 'random', 'baseline_draws': 2,
                                   'tolerance': 0.02, 'score': 'probability'}),
    'guided': Case(1, nn.ReLU, {'method': 'guided', 'baseline_type': 'mean', 'num_steps': 8}),
}  # fmt: skip


def stored(name: str) -> tuple[np.ndarray, dict]:
    """The stored map (C, H, W) of a case, and its statistics with the `versions` that made them."""
    return np.load(FOLDER / f'{name}.npy'), json.loads((FOLDER / f'{name}.json').read_text())


def differing(current: object, expected: object, name: str) -> Iterator[str]:
    """Sentences on the values that are not as stored; nested values have their path as name."""
    if isinstance(current, dict) and isinstance(expected, dict):
        for key in sorted(current.keys() | expected.keys()):
            yield from differing(current.get(key), expected.get(key), f'{name} {key}')
    elif isinstance(current, list) and isinstance(expected, list) and len(current) == len(expected):
        for number, pair in enumerate(zip(current, expected, strict=True)):
            yield from differing(*pair, f'{name} {number}')
    elif isinstance(current, float) and isinstance(expected, float):
        if not math.isclose(current, expected, rel_tol=CLOSE, abs_tol=CLOSE):
            yield f'{name} {current:.9g}, stored {expected:.9g}'
    elif current != expected:
        yield f'{name} {current}, stored {expected}'


def changes(name: str) -> list[str]:
    """Sentences on what has changed in a case since it was stored."""
    explanation, statistics = CASES[name].explained()
    attributions, before = stored(name)
    current = explanation.attributions.numpy()
    if current.shape != attributions.shape:
        return [f'{name}: the map has another shape']
    difference = float(np.abs(current - attributions).max() / np.abs(attributions).max())
    changed_map = (
        [f'{name}: the map, by {difference:.1e} of its maximum'] if difference > CLOSE else []
    )
    again = json.loads(json.dumps(statistics))  # lists for tuples
    return [*changed_map, *differing(again, before['statistics'], f'{name}:')]


def complaint(name: str) -> str:
    """A sentence that says what must be done about a case; empty where nothing must be done."""
    before = stored(name)[1]['versions']
    if before['results'] != str(igseg.RESULTS):
        return (f'{name} is stored for RESULTS {before["results"]}, and igseg/__init__.py says '
                f'{igseg.RESULTS}: run python tests/results/stored_maps.py')  # fmt: skip
    if not (changed := changes(name)):
        return ''
    other = [f'{key} {value}, stored with {before.get(key)}' for key, value in versions().items()
             if before.get(key) != value]  # fmt: skip
    return (
        f'figures have changed ({"; ".join(changed[:5])}): raise RESULTS in igseg/__init__.py, '
        'else finished images pass for results of this kind; then run '
        'python tests/results/stored_maps.py'
        + (f' (or is it a library? {"; ".join(other)})' if other else '')
    )


def store(name: str) -> None:
    """Write the map and the statistics of a case."""
    explanation, statistics = CASES[name].explained()
    FOLDER.mkdir(exist_ok=True)
    np.save(FOLDER / f'{name}.npy', explanation.attributions.numpy())
    text = json.dumps({'versions': versions(), 'statistics': statistics}, indent=1) + '\n'
    (FOLDER / f'{name}.json').write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Store the cases that have changed, where that is allowed. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only_libraries', action='store_true')
    forced = parser.parse_args(argv).only_libraries
    for name in CASES:
        exists = (FOLDER / f'{name}.json').is_file()
        current = exists and stored(name)[1]['versions']['results'] == str(igseg.RESULTS)
        if current and not forced and (problem := complaint(name)):
            print(f'error: {problem}', file=sys.stderr)
            return 2
        store(name)
    return 0


if __name__ == '__main__':
    sys.exit(main())
