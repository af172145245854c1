"""What tests share: tiny files made on the spot, and what they share with the benchmarks."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from plain_network import FACTORY, WEIGHTS
from runs import DEMO_DATA, DEMO_MODEL, ROOT, differences, family, tiny_model, torchrun

import integrated_gradients
from igseg.analysis.summary import StatisticsFiles, read_table
from igseg.engine.preparation import Network, prepared_network
from igseg.explanation import Preparation
from igseg.method.integral import (
    Enough,
    Evaluate,
    PathIntegral,
    fixed_rule,
    rounds_of,
    run_alone,
    sum_rule,
)
from igseg.method.rules import AnyRule
from integrated_gradients import Explanation, IntegratedGradients

__all__ = ['DEMO_DATA', 'DEMO_MODEL', 'ROOT', 'differences', 'family', 'tiny_model',
           'torchrun']  # of benchmarks/runs.py  # fmt: skip

T = TypeVar('T')

DEMO_IMAGE = DEMO_DATA / 'test' / 'colin27_axial_079.jpg'
SIZE = 64  # of the model input in most tests
PATIENCE = 1200  # seconds until what a test waits for is given up, however busy the machine is


def flags_of(settings: dict[str, object]) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f'--{name}', str(value))]


PLAIN = {'model_path': str(WEIGHTS), 'model_factory': FACTORY, 'num_steps': 2, 'image_size': 32,
         'target': 'image', 'step_batch': 1, 'device': 'cpu'}  # fmt: skip
PLAIN_FLAGS = flags_of(PLAIN)
PLAIN_BATCH = ['--mode', 'batch', '--data_dir', str(DEMO_DATA), *PLAIN_FLAGS]
# An image takes a while, so that its process is killed or stopped before the last one.
SLOW_BATCH = [*PLAIN_BATCH, '--num_steps', '250', '--figures', 'none']


def wait_until(happened: Callable[[], T], process: subprocess.Popen | None = None) -> T:
    """Wait for an event, and give what tells of it. process: the one that brings it about, which
    must not end before."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = process is not None and process.poll() is not None
        if told := happened():
            return told
        assert not ended, f'the process ended before: {process.communicate()}'
        assert time.monotonic() < deadline, 'it never happened'
        time.sleep(0.05)


def integrate(
    evaluate: Evaluate, rule: AnyRule, steps: int, enough: Enough | None = None
) -> PathIntegral:
    """The integral of one density over [0, 1]; of the densities of several targets, with nodes that
    suit all. What explains an image is `integrate_targets`, where each target has its own."""
    fixed = fixed_rule(rule, steps, enough is not None)
    if fixed is not None:
        return sum_rule(evaluate, fixed)
    return run_alone(rounds_of(rule, steps, enough), evaluate)


def save_image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise_image(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(path.read_text(encoding='utf-8'))))


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def square_mask(height: int = 40, width: int = 60) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 15:30] = 1
    return mask


def write_coco(folder: Path, annotations: list[dict], images: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / '_annotations.coco.json'
    categories = [{'id': 0, 'name': 'all', 'supercategory': 'none'}, {'id': 1, 'name': 'organ'}]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    path.write_text(json.dumps(content))
    return path


SHAPE = [[15, 10, 30, 10, 30, 20, 15, 20]]  # a polygon


def lay(root: Path, images: dict[str, object]) -> None:
    """Write images (None), masks (arrays), text and JSON by their paths."""
    for name, content in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            save_image(path, content)
        elif isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, dict):
            path.write_text(json.dumps(content))
        else:
            save_image(path, noise_image())


def coco(name: str, folder: str = '') -> dict:
    """A COCO file of one image with one annotation."""
    return {
        'images': [{'id': 1, 'file_name': folder + name, 'height': 40, 'width': 60}],
        'annotations': [{'id': 1, 'image_id': 1, 'category_id': 1, 'segmentation': SHAPE}],
        'categories': [{'id': 1, 'name': 'organ'}],
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error of a map."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm())


class Function(torch.nn.Module):
    """A network (N, 3, H, W) -> (N, 1, 1, 1) from a formula of one image's values."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x).reshape(len(x), 1, 1, 1)


def explain(
    formula: torch.nn.Module | Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    baseline: str | torch.Tensor,
    **options: object,
) -> Explanation:
    """The whole output of a network or a formula explained; options: those of `explain`."""
    model = formula if isinstance(formula, torch.nn.Module) else Function(formula)
    ig = IntegratedGradients(model, 'cpu', step_batch=options.pop('step_batch', None))
    return ig.explain(x, target='image', baseline_type=baseline, **options)


EVIL = '<img src=x onerror=document.title=1>'  # a name that would run code on a careless page


def checked_batch(folder: Path) -> Path:
    """The results of a batch of three images, one of them EVIL, with all checks."""
    for number, name in enumerate(('first', 'second', EVIL)):
        save_image(folder / 'data' / 'images' / f'{name}.png', noise_image(40, 60, number))
        mask = np.zeros((40, 60), np.uint8)
        mask[5:15, 5 : 20 + 10 * number] = 255
        save_image(folder / 'data' / 'masks' / f'{name}.png', mask)
    arguments = [*PLAIN_BATCH, '--data_dir', str(folder / 'data'), '--output_dir',
                 str(folder / 'results'), '--image_size', '64', '--num_steps', '4', '--target',
                 'truth', '--evaluate', 'full', '--thresholds', 'dice=0.9']  # fmt: skip
    assert integrated_gradients.main(arguments) == 0
    return folder / 'results'


def images_of(batch: Path) -> list[dict]:
    """The statistics of a batch's images."""
    table = read_table(batch / 'summary.csv')
    return StatisticsFiles(batch, table['folder'])[:]


class Scaled(torch.nn.Module):
    """Brightness times a factor that is no weight."""

    def __init__(self, factor: float = 1.0, formula=None) -> None:
        super().__init__()
        self.factor, self.formula = factor, formula or (lambda v: v)
        self.conv = torch.nn.Conv2d(3, 1, 1)
        torch.nn.init.constant_(self.conv.weight, 1.0)
        torch.nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.formula(self.conv(x)) * self.factor


def prepared_copy(network: torch.nn.Module, example: torch.Tensor) -> tuple[Network, Preparation]:
    """What runs instead of a network, and how it was prepared."""
    prepared = prepared_network(network, example)
    return prepared.network, prepared.preparation
