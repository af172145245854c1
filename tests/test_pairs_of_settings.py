"""The net for faults where two features meet: every pair of values of two settings is run, or is
refused in one sentence before anything is computed.

The runs are a covering array: each holds a value of every setting, so that one run covers some
thousand pairs. It is built greedily, with a fixed seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shlex
import shutil
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import noise_image, save_image, square_mask
from PIL import Image
from test_settings import CHANGED

from igseg.checks.verdict import Thresholds
from integrated_gradients import InputError, Settings, build_parser, main, settings_from

MOST_RUNS = 100

NETWORK = '''
import torch


class Squares(torch.nn.Module):
    """A polynomial of degree two, whose gradients two steps integrate exactly."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.last = torch.nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        return self.last(y + y * y)


def build():
    torch.manual_seed(1)
    return Squares()
'''

Value = dict[str, object]  # the flags that give a setting its value, and what it goes with only

MEAN_AND_STD = {name: CHANGED[name] for name in ('mean', 'std')}

# Beside those of CHANGED, or instead of them where another value says more on a small picture.
SPECIAL: dict[str, list[Value]] = {
    'image_size': [{'image_size': '32x48'}],
    'tile': [{'tile': 32}],
    'overlap': [{'tile': 32, 'overlap': 8}],
    'crop': [{'crop': '1,2,30,32'}],
    'max_pixels': [{'max_pixels': 10**6}],
    'num_steps': [{'num_steps': 3}],
    'max_steps': [{'tolerance': 0.5, 'max_steps': 17}],
    'window': [{'window': '20:200', 'image_path': 'volume.nii'}],
    'frame': [{'frame': 1, 'image_path': 'pages.tif'}],
    'slice': [{'slice': '2:1', 'image_path': 'volume.nii'}],
    'mean': [MEAN_AND_STD], 'std': [MEAN_AND_STD],
    'ignore_label': [{'ignore_label': 255}],
    'target': [{'target': one} for one in
               (('image', 'pixel:1,2'), ('each-object',), ('truth',), ('class:1',))],
    'baseline': [{'baseline': one} for one in ('blur', 'random', 'auto')],
    'baseline_draws': [{'baseline': 'random', 'baseline_draws': 2}],
    'method': [{'method': ('guided',)}, {'method': ('occlusion',)}, {'method': ('gradcam:first',)},
               {'method': ('smooth', 'ig')}, {'method': ('expected',), 'reference_dir': 'others'}],
    'method_option': [{'method': ('smooth',), 'method_option': ('samples=3', 'noise=0.2')}],
    'export': [{'export': 'nifti'}, {'export': 'tiff'}],
    'figures': [{'figures': 'all'}],
}  # fmt: skip
BASE = {'model_path': 'net.pth', 'model_factory': 'net.py:build', 'device': 'cpu'}
DEFAULT = {'image_path': 'a.png', 'image_size': 32, 'num_steps': 2, 'figures': 'none'}


def values_of(name: str) -> list[Value]:
    """The default of a setting, then its unusual values."""
    return [{}, *SPECIAL.get(name, [{name: CHANGED.get(name)}])]


VALUES = {name: values_of(name) for name in [*CHANGED, 'export', 'figures']}
Choice = tuple[str, int]  # a setting, and which of its values


def argv_of(choices: Iterable[Choice]) -> list[str]:
    """The command line that makes these choices, and no others."""
    flags = dict(item for name, number in choices for item in VALUES[name][number].items())
    exclusive = {'image_size': 'tile', 'num_steps': 'tolerance'}  # given instead of them
    left_out = {name for name, other in exclusive.items() if other in flags}
    flags = BASE | {k: v for k, v in DEFAULT.items() if k not in left_out} | flags
    return [word for name, value in flags.items() for word in words_of(name, value)]


def conflict(choices: Iterable[Choice]) -> bool:
    """Whether choices give one flag several values, as two methods do."""
    given = [item for name, number in choices for item in VALUES[name][number].items()]
    return len({flag for flag, _ in given}) < len(set(given))


def words_of(name: str, value: object) -> list[str]:
    if isinstance(value, Thresholds):
        return [f'--{name}', f'dice={value.dice}']
    if isinstance(value, tuple):
        return [f'--{name}', *map(str, value)]
    return [f'--{name}'] if value is True else [f'--{name}={value}']


# --------------------------------------------------------------------------- running


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Iterator[Path]:
    """A network, pictures of several kinds with their masks, and what settings name."""
    here = tmp_path_factory.mktemp('pairs')
    (here / 'net.py').write_text(NETWORK)
    space: dict = {}
    exec(NETWORK, space)
    torch.save(space['build']().state_dict(), here / 'net.pth')
    picture, mask = noise_image(48, 40), square_mask(48, 40)
    (here / 'others').mkdir()
    for number, path in enumerate(('pages.tif', 'others/0.tif', 'others/1.tif'), 1):
        pages = [Image.fromarray(noise_image(48, 40, 10 * number + k)) for k in range(3)]
        pages[0].save(here / path, save_all=True, append_images=pages[1:])
    volume = np.stack([noise_image(40, 48, k)[..., 0] for k in range(3)], axis=-1)
    labels = np.repeat(mask.T[..., None], 3, axis=-1)
    for name, values in (('volume', volume.astype(np.int16)), ('volume_mask', labels)):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), here / f'{name}.nii')
    for name in ('a', 'pages'):
        save_image(here / f'{name}_mask.png', mask)
    save_image(here / 'a.png', picture)
    (here / 'map.txt').write_text('0 = 0\n1 = 1\n')
    before = Path.cwd()
    os.chdir(here)
    yield here
    os.chdir(before)


def run(choices: Iterable[Choice]) -> str | None:
    """Run a command line; None where it finished, else the sentence by which it was refused.
    Whatever is neither fails."""
    argv, said = argv_of(choices), io.StringIO()
    shutil.rmtree('out', ignore_errors=True)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(said), quiet, warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)  # of NumPy: a figure that is none
        try:
            status = main([*argv, '--output_dir', 'out'])
        except SystemExit as stopped:
            status = stopped.code
    lines = [line for line in said.getvalue().splitlines() if not line.startswith('--evaluate')]
    if status:
        assert status == 2 and len(lines) == 1 and lines[0].startswith('error: '), said.getvalue()
        assert not [p for p in Path('out').rglob('*') if p.is_file()], 'refused after it was begun'
        return lines[0]
    results = [json.loads(p.read_text()) for p in Path('out').glob('*/*_statistics.json')]
    assert results
    for one in results:
        check(one)
    return None


def check(found: dict) -> None:
    """What holds for every map: finite figures, and completeness where the integral is exact."""
    assert math.isfinite(found['score']) and math.isfinite(found['attribution_sum'])
    exact = found['score_type'] == 'logit' and found['precision'] == 'float32'
    gap = found['completeness_gap']
    assert not (exact and found['method'] in ('ig', 'guided')) or gap is None or gap < 1e-3


# --------------------------------------------------------------------------- covering pairs


def all_pairs() -> set[frozenset[Choice]]:
    choices = [(name, k) for name in VALUES for k in range(len(VALUES[name]))]
    return {frozenset(pair) for pair in combinations(choices, 2) if pair[0][0] != pair[1][0]}


@cache
def refused_pairs() -> frozenset[frozenset[Choice]]:
    """The pairs whose flags alone are refused, which needs no network and no picture."""
    parser = build_parser()

    def is_refused(pair: Iterable[Choice]) -> bool:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                settings_from(parser.parse_args(argv_of(pair)))
        except (InputError, SystemExit):
            return True
        return False

    return frozenset(pair for pair in all_pairs() if conflict(pair) or is_refused(pair))


class Cover:
    """Which pairs of choices are still to be shown, and which are known to be refused."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.refused = set(refused_pairs())
        self.left = all_pairs() - self.refused
        self.sets: list[frozenset[Choice]] = []  # of three and more, which are refused together

    def goes_with(self, choice: Choice, row: Sequence[Choice]) -> bool:
        if any(frozenset((choice, one)) in self.refused for one in row):
            return False
        return not any(one <= {choice, *row} for one in self.sets)

    def row(self) -> list[Choice]:
        """A choice for every setting, with many pairs that are left: from one pair on, always the
        choice that adds most; the default among equals."""
        row = list(self.draw.choice(sorted(map(sorted, self.left))))
        for name in self.draw.sample(list(VALUES), len(VALUES)):
            if name in dict(row):
                continue
            good = [(name, k) for k in range(len(VALUES[name])) if self.goes_with((name, k), row)]
            row.append(max(good, key=lambda one: sum({one, other} in self.left for other in row)))
        return row

    def blame(self, row: Sequence[Choice]) -> frozenset[Choice]:
        """The fewest choices of a refused row that are refused together."""
        guilty = [one for one in row if one[1]]
        for one in list(guilty):
            fewer = [other for other in guilty if other != one]
            if run(fewer) is not None:
                guilty = fewer
        return frozenset(guilty)

    def finished(self, row: Sequence[Choice]) -> None:
        self.left -= {frozenset(pair) for pair in combinations(row, 2)}

    def was_refused(self, row: Sequence[Choice]) -> None:
        guilty = self.blame(row)
        assert len(guilty) > 1, f'refused alone: {argv_of(guilty)}'
        if len(guilty) == 2:
            self.refused.add(guilty)
            self.left.discard(guilty)
        else:
            self.sets.append(guilty)


def test_every_pair_of_settings_runs_or_is_refused_in_one_sentence(folder):
    cover, faults = Cover(seed=0), {}
    for _ in range(MOST_RUNS):
        if not cover.left:
            break
        row = cover.row()
        try:
            cover.was_refused(row) if run(row) else cover.finished(row)
        except Exception as error:
            faults[shlex.join(argv_of(row))] = ''.join(traceback.format_exception(error)[-2:])
            cover.finished(row)
    assert not faults, '\n'.join(f'{argv}\n{error}' for argv, error in faults.items())
    assert not cover.left


def test_flags_that_do_not_go_together_are_told_in_one_sentence(folder):
    pairs = [pair for pair in refused_pairs() if not conflict(pair)]
    assert pairs and all(run(pair) for pair in pairs)


def test_every_setting_is_in_pairs():
    assert VALUES.keys() == {*Settings.table(), 'export', 'figures'}
