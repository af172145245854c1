"""Which results are today's: versions in the statistics, the key, and the number of results."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import cv2
import numpy as np
import pytest
import stored_maps
from helpers import image_size
from stored_maps import CASES, complaint, stored

import igseg
from igseg.program import PROJECT
from igseg.results import finished
from igseg.results.files import FIGURES, image_files, load_view, read_statistics, redraw_figures
from igseg.results.finished import FolderNaming, finished_statistics, resume_key, versions
from igseg.results.page import table_row
from integrated_gradients import Settings

IMAGE = np.zeros((4, 4, 3), np.uint8)


def key() -> str:
    return resume_key(Settings().record(), IMAGE, None)


def test_versions_name_the_toolkit_its_results_and_whatever_opencv_is_installed():
    named = versions()
    assert named[PROJECT] == igseg.__version__ and named['results'] == str(igseg.RESULTS)
    assert named['opencv'] == cv2.__version__
    assert {'python', 'torch', 'timm', 'numpy', 'scikit-image', 'scipy'} <= named.keys()


def test_another_build_of_opencv_has_a_version_too(monkeypatch):
    def version(name: str) -> str:
        if name == 'opencv-python-headless':
            raise PackageNotFoundError(name)
        return '1'

    monkeypatch.setattr(finished, 'version', version)
    named = versions()
    assert named['opencv'] == cv2.__version__ and 'opencv-python-headless' not in named


def test_a_new_version_computes_nothing_again_and_a_new_kind_of_results_does(monkeypatch):
    before = key()
    monkeypatch.setattr(igseg, '__version__', '9.9.9')
    assert versions()[PROJECT] == '9.9.9' and key() == before
    monkeypatch.setattr(igseg, 'RESULTS', igseg.RESULTS + 1)
    assert key() != before


@pytest.mark.parametrize('library', ['torch', 'numpy', 'scikit-image', 'scipy'])
def test_another_version_of_a_library_that_decides_figures_computes_again(library, monkeypatch):
    before, real = key(), finished.version
    monkeypatch.setattr(finished, 'version', lambda name: '0' if name == library else real(name))
    assert key() != before


# ------------------------------------------------------------------ the stored maps


@pytest.mark.parametrize('name', CASES)
def test_figures_are_as_stored_or_the_number_of_results_was_raised(name):
    assert complaint(name) == ''


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the stored maps, which a test may change."""
    for path in stored_maps.FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(stored_maps, 'FOLDER', tmp_path)
    return tmp_path


def change(folder, name: str, figure: str) -> None:
    """Change a stored figure."""
    path = folder / f'{name}.json'
    content = json.loads(path.read_text())
    content['statistics'][figure] *= 1 + 1e-4
    path.write_text(json.dumps(content))


def test_a_changed_figure_asks_for_the_number_to_be_raised(copied, capsys):
    change(copied, 'guided', 'score')
    problem = complaint('guided')
    assert 'score' in problem and 'raise RESULTS in igseg/__init__.py' in problem
    assert stored_maps.main([]) == 2 and 'raise RESULTS' in capsys.readouterr().err


def test_a_changed_map_asks_for_the_number_to_be_raised(copied):
    attributions, _ = stored('guided')
    attributions[0, 3, 3] += 1e-5 * np.abs(attributions).max()
    np.save(copied / 'guided.npy', attributions)
    assert 'guided: the map, by 1.0e-05 of its maximum' in complaint('guided')


def test_a_raised_number_asks_for_the_maps_to_be_stored_again(copied, monkeypatch):
    change(copied, 'guided', 'score')
    monkeypatch.setattr(igseg, 'RESULTS', igseg.RESULTS + 1)
    assert 'run python tests/results/stored_maps.py' in complaint('guided')
    assert stored_maps.main([]) == 0
    assert complaint('guided') == ''


# ------------------------------------------------------------------ results of an earlier version


@pytest.fixture
def earlier(tmp_path):
    """Results of the version before the first numbered version: a slice at 32x32."""
    return shutil.copytree(Path(__file__).parent / 'earlier_version', tmp_path / 'earlier')


def test_results_of_an_earlier_version_are_opened(earlier):
    view, statistics = load_view(earlier / 'slice')
    assert PROJECT not in statistics['versions'] and statistics['target'] == 'image'
    assert view.attributions.shape == (3, 32, 32)
    assert view.uncertainty is not None and view.uncertainty.shape == (32, 32)
    total = float(view.attributions.sum(dtype=np.float64))
    assert total == pytest.approx(statistics['attribution_sum'], rel=1e-5)


def test_results_of_an_earlier_version_are_drawn_again(earlier):
    redraw_figures(earlier / 'slice')
    files = image_files(earlier / 'slice')
    for name in FIGURES['all']:
        assert image_size(files[name])[0] > 30, name


def test_results_of_an_earlier_version_stand_on_the_page_and_are_computed_again(earlier):
    statistics = read_statistics(earlier / 'slice')
    assert table_row(statistics, earlier)['name'] == 'slice'
    naming = FolderNaming('slice', False, ('ig',))
    assert finished_statistics(earlier, naming, ['image'], key()) is None
