"""What the tests of batches share."""

from pathlib import Path

import pytest
from helpers import noise_image, save_image


@pytest.fixture
def data(tmp_path) -> Path:
    """Five images."""
    for number in range(5):
        save_image(tmp_path / 'data' / f'image_{number}.png', noise_image(seed=number))
    return tmp_path / 'data'
