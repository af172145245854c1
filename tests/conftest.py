"""Shared fixtures: the demo checkpoint on small images."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from helpers import DEMO_IMAGE, DEMO_MODEL, SIZE

from igseg.data.pixels import read_image
from igseg.preprocessing import Preprocessing
from integrated_gradients import IntegratedGradients, load_model

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


@pytest.fixture(scope='module')
def ig(demo_model, preprocessing) -> IntegratedGradients:
    """One for all tests of a file, which leave it as it was: it prepares the network once."""
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
