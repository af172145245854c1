"""Shared fixtures: the demo checkpoint on small images, and tiny datasets made on the spot."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from integrated_gradients import IntegratedGradients, load_model  # noqa: E402
from segmentation_dataset import Preprocessing, read_image  # noqa: E402

DEMO_MODEL = ROOT / 'demo' / 'demo_model.pth'
DEMO_DATA = ROOT / 'demo' / 'Dataset_no_preprocessing'
DEMO_IMAGE = DEMO_DATA / 'test' / 'colin27_axial_079.jpg'
SIZE = 128  # of the model input in most tests

if 'PYTEST_XDIST_WORKER' in os.environ:  # beside other workers, more threads only wait for a core
    os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def demo_model() -> torch.nn.Module:
    """A real, trained U-Net++."""
    return load_model(DEMO_MODEL, 'cpu')


@pytest.fixture(scope='session')
def preprocessing(demo_model) -> Preprocessing:
    own = demo_model.preprocessing
    return Preprocessing(SIZE, 'stretch', own.mean, own.std)


@pytest.fixture
def ig(demo_model, preprocessing) -> IntegratedGradients:
    return IntegratedGradients(demo_model, 'cpu', preprocessing)


@pytest.fixture(scope='session')
def exact_ig(demo_model, preprocessing) -> IntegratedGradients:
    """The same network in double precision, for exact comparisons: in single precision, rounding
    that depends on the batch can push a ReLU over its kink (seen: 2e-4 of a map)."""
    return IntegratedGradients(copy.deepcopy(demo_model).double(), 'cpu', preprocessing)


@pytest.fixture(scope='session')
def brain(preprocessing) -> torch.Tensor:
    """The demo image as model input, (1, 3, 128, 128), with a scanner's noise: where a picture
    is exactly black, many ReLUs sit on their kink, and rounding alone decides their gradient."""
    pixels = preprocessing.resize_image(read_image(DEMO_IMAGE)).astype(np.float32)
    noise = np.random.default_rng(0).uniform(0, 8, pixels.shape)
    return preprocessing.normalise(np.clip(pixels + noise, 0, 255))


@pytest.fixture(scope='session')
def brain_detail(brain) -> torch.Tensor:
    """The part of it around what the demo model finds, (1, 3, 64, 64), where many runs compare."""
    return brain[..., 16:80, 16:80].clone()


def save_image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise_image(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error of a map."""
    return float((found - expected).norm() / expected.norm())
