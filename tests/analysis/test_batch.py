"""A batch: what is read once for a run, and what an error of one image costs."""

import json
from pathlib import Path

import pytest
import torch
from helpers import csv_rows, noise_image, save_image

from igseg.analysis import batch as batch_module
from igseg.analysis import sample as sample_module
from igseg.analysis.study import SideFiles
from igseg.data.samples import list_samples
from igseg.errors import InputError
from igseg.preprocessing import Preprocessing
from integrated_gradients import IntegratedGradients, Settings, analyse_batch

SMALL = Settings(num_steps=2, target='image', image_size=32)


def explainer(channels: int = 1) -> IntegratedGradients:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, channels, 3, padding=1)
    return IntegratedGradients(network, 'cpu', Preprocessing(32), step_batch=1)


@pytest.fixture
def images(tmp_path) -> Path:
    for number in range(3):
        save_image(tmp_path / 'images' / f'{number}.png', noise_image(32, 32, number))
    return tmp_path / 'images'


def statistics_in(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob('*/*_statistics.json'))]


def test_an_unexpected_error_costs_one_image_and_leaves_its_traceback(
    images, tmp_path, monkeypatch
):
    fit = batch_module.statistics_of

    def broken(study, pending, *more, **known):
        if pending.sample.name == '1':
            raise KeyError('a fault of ours')
        return fit(study, pending, *more, **known)

    monkeypatch.setattr(batch_module, 'statistics_of', broken)
    out = tmp_path / 'out'
    result = analyse_batch(explainer(), list_samples(images), SMALL, out, figures='none')
    assert [one['image'] for one in result.images] == ['0', '2']
    (failed,) = csv_rows(out / 'failures.csv')
    assert failed['image'] == '1'
    assert 'Traceback' in failed['reason'] and "KeyError: 'a fault of ours'" in failed['reason']


def test_a_label_map_that_disappears_during_a_batch_was_read(images, tmp_path):
    for number in range(3):
        mask = (noise_image(32, 32, number)[..., 0] > 128) * 7
        save_image(tmp_path / 'masks' / f'{number}.png', mask.astype('uint8'))
    label_map = tmp_path / 'map.txt'
    label_map.write_text('0 = 0\n7 = 1, organ\n')
    settings = Settings(num_steps=2, target='truth', image_size=32, label_map=str(label_map))
    result = analyse_batch(
        explainer(), list_samples(tmp_path), settings, tmp_path / 'out', figures='none',
        before_image=lambda: label_map.unlink(missing_ok=True))  # fmt: skip
    assert len(result.images) == 3 and not result.failed
    assert all(one['dice'] is not None for one in result.images)


def test_statistics_and_resume_key_speak_of_the_same_baseline_file(images, tmp_path):
    """The file is read once: what it holds later is in no image's figures."""
    baseline = save_image(tmp_path / 'healthy.png', noise_image(32, 32, 9))
    settings = Settings(num_steps=2, target='image', image_size=32, baseline=str(baseline))
    started = []

    def change() -> None:
        started.append(1)
        if len(started) == 2:
            save_image(baseline, noise_image(32, 32, 10))

    samples = list_samples(images)
    analyse_batch(explainer(), samples, settings, tmp_path / 'a', change, figures='none')
    said = {one['settings']['baseline_sha256'] for one in statistics_in(tmp_path / 'a')}
    assert len(said) == 1
    save_image(baseline, noise_image(32, 32, 9))
    analyse_batch(explainer(), samples, settings, tmp_path / 'b', figures='none')
    figures = [[one['score'] - one['baseline_score'] for one in statistics_in(tmp_path / name)]
               for name in 'ab']  # fmt: skip
    assert figures[0] == figures[1]


def test_an_unexpected_error_while_writing_costs_one_image(images, tmp_path, monkeypatch, capsys):
    write = sample_module.write_image

    def broken(folder, described, figures):
        if described[0][0]['image'] == '1':
            raise KeyError('a fault of ours')
        return write(folder, described, figures)

    monkeypatch.setattr(sample_module, 'write_image', broken)
    monkeypatch.setattr(batch_module, 'writer_processes', lambda images, on_gpu: 0)
    out = tmp_path / 'out'
    result = analyse_batch(explainer(), list_samples(images), SMALL, out, figures='none')
    assert [one['image'] for one in result.images] == ['0', '2']
    (failed,) = csv_rows(out / 'failures.csv')
    assert failed['image'] == '1' and 'Traceback' in failed['reason']
    said = capsys.readouterr().err
    assert 'unexpected KeyError' in said and 'Traceback' not in said


def test_a_baseline_file_that_has_gone_is_told_in_one_sentence(tmp_path):
    baseline = save_image(tmp_path / 'healthy.png', noise_image(32, 32, 9))
    settings = Settings(baseline=str(baseline))
    baseline.unlink()
    with pytest.raises(InputError, match=r'the baseline .*healthy.png cannot be read'):
        SideFiles.of(settings)
