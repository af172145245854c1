"""What the tests of pages share."""

from pathlib import Path

import pytest
from helpers import checked_batch


@pytest.fixture(scope='session')
def batch(tmp_path_factory) -> Path:
    """The results of a batch of three images with all checks."""
    return checked_batch(tmp_path_factory.mktemp('page'))
