"""Samples of a dataset, the sample of a single image, and names that are safe and unique."""

import numpy as np
import pytest
from helpers import DEMO_DATA, noise_image, save_image, square_mask

from igseg.data.samples import list_samples, safe_names, single_sample
from igseg.errors import InputError


def test_the_demo_is_a_coco_export_with_negative_samples():
    for split, images, empty in (('train', 207, 33), ('test', 104, 16)):
        samples = list_samples(DEMO_DATA, split)
        truths = [sample.truth() for sample in samples]
        assert len(samples) == images
        assert sum(not truth.any() for truth in truths) == empty
        assert all(truth.shape == (320, 320) for truth in truths)
    assert list_samples(DEMO_DATA)[0].image_path.parent.name == 'test'


def test_masks_beside_the_images(tmp_path):
    save_image(tmp_path / 'test' / 'b.jpg', noise_image())
    save_image(tmp_path / 'test' / 'b_mask.png', square_mask() * np.uint8(255))
    save_image(tmp_path / 'test' / 'a.jpg', noise_image())
    first, second = list_samples(tmp_path)
    assert (first.name, second.name) == ('a', 'b')
    assert first.truth() is None
    assert (second.truth() == square_mask()).all()


@pytest.mark.parametrize('folder', ['masks', 'labels'])
@pytest.mark.parametrize('ending', ['', '_mask'])
def test_images_and_masks_in_separate_folders(tmp_path, folder, ending):
    save_image(tmp_path / 'val' / 'images' / 'a.tif', noise_image())
    save_image(tmp_path / 'val' / folder / f'a{ending}.png', square_mask())
    (sample,) = list_samples(tmp_path)
    assert (sample.truth() == square_mask()).all()


def test_images_alone_in_the_folder_itself(tmp_path):
    save_image(tmp_path / 'x.png', noise_image())
    (tmp_path / 'notes.txt').write_text('hello')
    (sample,) = list_samples(tmp_path)
    assert sample.truth() is None and sample.image().shape == (40, 60, 3)


def test_bad_data_folders(tmp_path):
    with pytest.raises(InputError, match='not found'):
        list_samples(tmp_path / 'nowhere')
    with pytest.raises(InputError, match='no images'):
        list_samples(tmp_path)
    (tmp_path / 'train').mkdir()
    with pytest.raises(InputError, match='folders there: train'):
        list_samples(tmp_path, 'test')


def test_single_image_finds_the_truth_its_dataset_has(tmp_path):
    path = DEMO_DATA / 'test' / 'colin27_axial_079.jpg'
    assert single_sample(path).truth().any()
    image = save_image(tmp_path / 'images' / 'a.jpg', noise_image())
    assert single_sample(image).truth() is None
    save_image(tmp_path / 'masks' / 'a.png', square_mask())
    assert (single_sample(image).truth() == square_mask()).all()
    other = save_image(tmp_path / 'other.png', np.ones((4, 4), np.uint8))
    assert single_sample(image, other).truth().shape == (4, 4)


def test_names_are_safe_and_unique(tmp_path):
    paths = [tmp_path / n for n in ('a b.jpg', 'a?b.png', 'ok.jpg', '..jpg', 'ü' * 150 + '.png',
                                    'OK.png', '<img src=x>.jpg')]  # fmt: skip
    names = safe_names(paths)
    assert len({name.lower() for name in names}) == len(names)
    assert names[0].startswith('a_b_') and names[1].startswith('a_b_')
    assert all(len(name) <= 110 and not set(name) & set('/\\<>:"|?* ') for name in names)
    assert all(name.strip('.') for name in names)
