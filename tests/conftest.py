"""Shared fixtures: the demo checkpoint on small images."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import DEMO_IMAGE, DEMO_MODEL, SIZE

from igseg.data.pixels import read_image
from igseg.preprocessing import Preprocessing
from integrated_gradients import IntegratedGradients, load_model

torch.set_warn_always(True)  # or what torch warns of once is an error of whichever test comes first

if 'PYTEST_XDIST_WORKER' in os.environ:  # beside other workers, more threads only wait for a core
    os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start
    torch.set_num_threads(1)

BEGUN_FIRST = ('test_batch_processes.py', 'test_pairs_of_settings.py', 'test_command_line.py')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: where they came last, a worker would wait for another."""
    items.sort(key=lambda item: item.path.name not in BEGUN_FIRST)


@pytest.fixture(scope='session')
def demo_model() -> torch.nn.Module:
    """A real, trained U-Net++."""
    return load_model(DEMO_MODEL, 'cpu')


@pytest.fixture(scope='session')
def preprocessing(demo_model) -> Preprocessing:
    own = demo_model.preprocessing
    return Preprocessing(SIZE, 'stretch', own.mean, own.std)


@pytest.fixture(scope='session')
def ig(demo_model, preprocessing) -> IntegratedGradients:
    """One for all tests, which leave it as it was: it prepares the network once. With a step batch
    of its own, since one that is measured, and so rounding, hangs on how busy the machine is."""
    return IntegratedGradients(demo_model, 'cpu', preprocessing, step_batch=2)


@pytest.fixture(scope='session')
def exact_ig(demo_model, preprocessing) -> IntegratedGradients:
    """The same network in double precision, for exact comparisons: in single precision, rounding
    that depends on the batch can push a ReLU over its kink (seen: 2e-4 of a map)."""
    exact = copy.deepcopy(demo_model).double()
    return IntegratedGradients(exact, 'cpu', preprocessing, step_batch=2)


@pytest.fixture(scope='session')
def brain(preprocessing) -> torch.Tensor:
    """The part of the demo image around what the demo model finds, as model input (1, 3, 64, 64),
    with a scanner's noise: where a picture is exactly black, many ReLUs sit on their kink, and
    rounding alone decides their gradient."""
    whole = replace(preprocessing, image_size=2 * SIZE)
    pixels = whole.resize_image(read_image(DEMO_IMAGE)).astype(np.float32)
    noise = np.random.default_rng(0).uniform(0, 8, pixels.shape)
    return whole.normalise(np.clip(pixels + noise, 0, 255))[..., 16:80, 16:80].clone()
