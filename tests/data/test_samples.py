"""Reading pictures, masks and dataset layouts; preprocessing."""

import json

import numpy as np
import pytest
import torch
from helpers import DEMO_DATA, noise_image, save_image, square_mask, write_coco
from PIL import Image
from pycocotools import mask as coco_mask

from igseg.data.masks import read_mask
from igseg.data.pixels import read_image
from igseg.data.samples import list_samples, safe_names, single_sample
from igseg.errors import InputError
from igseg.preprocessing import Preprocessing

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    'mode, suffix',
    [('RGB', 'png'), ('RGBA', 'png'), ('CMYK', 'tif'), ('RGB', 'webp'), ('P', 'gif')],
)
def test_colour_modes_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f'a.{suffix}'
    Image.fromarray(np.full((8, 9, 3), 204, np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (8, 9, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - 204).max() <= 2


@pytest.mark.parametrize('mode', ['L', 'P', 'LA'])
def test_grey_pictures_keep_their_levels(tmp_path, mode):
    Image.fromarray(GREY).convert(mode).save(tmp_path / 'a.png')
    assert (read_image(tmp_path / 'a.png') == GREY[:, :, None]).all()


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_sixteen_bit_grey_is_scaled_from_its_full_range(tmp_path, suffix):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f'a.{suffix}')
    assert (read_image(tmp_path / f'a.{suffix}') == GREY[:, :, None]).all()


def test_float_pictures(tmp_path):
    for scale in (1, 255):
        Image.fromarray((GREY / 255 * scale).astype(np.float32)).save(tmp_path / 'a.tif')
        assert (read_image(tmp_path / 'a.tif') == GREY[:, :, None]).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(noise_image(10, 20)).save(tmp_path / 'a.jpg', exif=exif)
    assert read_image(tmp_path / 'a.jpg').shape == (20, 10, 3)


def test_bad_pictures_are_told_in_one_sentence(tmp_path):
    whole = save_image(tmp_path / 'whole.png', noise_image()).read_bytes()
    cases = {
        'missing.jpg': (None, 'not found'),
        'empty.jpg': (b'', 'empty'),
        'text.jpg': (b'this is a letter, not a picture\n' * 20, 'not a picture'),
        'cut.png': (whole[: len(whole) // 2], 'damaged'),
        'flipped.png': (whole[:200] + bytes(200) + whole[400:], 'damaged'),
    }
    for name, (content, said) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value) and '\n' not in str(caught.value)


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize('high', [1, 127, 255])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA'])
def test_two_valued_masks(tmp_path, high, mode):
    mask = square_mask()
    Image.fromarray(mask * np.uint8(high)).convert(mode).save(tmp_path / 'm.png')
    assert ((read_mask(tmp_path / 'm.png') > 0) == (mask > 0)).all()


def test_bilevel_palette_sixteen_bit_and_jpeg_masks(tmp_path):
    mask = square_mask()
    Image.fromarray(mask.astype(bool)).save(tmp_path / 'bits.png')
    palette = Image.fromarray(mask * np.uint8(2), mode='P')
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 9] + [0] * 759)  # class 2 is nearly black
    palette.save(tmp_path / 'palette.png')
    Image.fromarray(mask.astype(np.uint16) * 65535).save(tmp_path / 'deep.png')
    Image.fromarray(mask * np.uint8(255)).save(tmp_path / 'lossy.jpg', quality=60)
    assert (read_mask(tmp_path / 'bits.png') == mask).all()
    assert (read_mask(tmp_path / 'palette.png') == 2 * mask).all()
    assert (read_mask(tmp_path / 'deep.png') == mask).all()
    assert (read_mask(tmp_path / 'lossy.jpg') != mask).mean() < 0.02


def test_class_labels_stay_and_empty_masks_are_empty(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (read_mask(save_image(tmp_path / 'm.png', labels)) == labels).all()
    assert not read_mask(save_image(tmp_path / 'e.png', labels * np.uint8(0))).any()


# ------------------------------------------------------------------ layouts


def test_the_demo_is_a_coco_export_with_negative_samples():
    for split, images, empty in (('train', 207, 33), ('test', 104, 16)):
        samples = list_samples(DEMO_DATA, split)
        truths = [sample.truth() for sample in samples]
        assert len(samples) == images
        assert sum(not truth.any() for truth in truths) == empty
        assert all(truth.shape == (320, 320) for truth in truths)
    assert list_samples(DEMO_DATA)[0].image_path.parent.name == 'test'


def test_coco_polygons_and_run_lengths_are_merged(tmp_path):
    mask = square_mask()
    packed = coco_mask.encode(np.asfortranarray(mask))
    packed['counts'] = packed['counts'].decode()
    column = np.zeros((40, 60), np.uint8)
    column[:, 50] = 1
    runs = {'size': [40, 60], 'counts': [40 * 50, 40, 40 * 9]}
    box = [40, 30, 45, 30, 45, 35, 40, 35]
    shapes = {1: [packed, runs], 2: [[box]], 3: []}
    images, annotations = [], []
    for number, own in shapes.items():
        name = f'scan{number}_jpg.rf.0a1b.jpg'
        save_image(tmp_path / 'valid' / name, noise_image())
        images.append({'id': number, 'file_name': name, 'height': 40, 'width': 60})
        for shape in own:
            annotations.append({'image_id': number, 'category_id': 1, 'segmentation': shape})
    write_coco(tmp_path / 'valid', annotations, images)
    first, second, third = list_samples(tmp_path)
    assert first.name == 'scan1_jpg.rf.0a1b'
    assert (first.truth() == (mask | column)).all()
    inside = np.zeros((40, 60), bool)
    inside[30:35, 40:45] = True
    assert (second.truth().astype(bool) == inside).all()
    assert third.truth().shape == (40, 60) and not third.truth().any()


@pytest.mark.parametrize(
    'content, said',
    [
        ('{ not json', 'not a readable COCO file'),
        ('[1, 2]', 'not a readable COCO file'),
        ('{"images": [{"id": 1}]}', 'not a readable COCO file'),
        ('{"images": [{"id": 1, "file_name": "../../a.jpg", "height": 4, "width": 4}]}', 'outside'),
        ('{"images": []}', 'no images'),
    ],
)
def test_damaged_coco_files_are_told(tmp_path, content, said):
    (tmp_path / '_annotations.coco.json').write_text(content)
    with pytest.raises(InputError, match=said):
        list_samples(tmp_path)


@pytest.mark.parametrize('shape', [[[1e9] * 6], {'size': [40, 60], 'counts': 'abc\n'}, 'x'])
def test_a_damaged_annotation_spoils_only_its_own_image(tmp_path, shape):
    images = [{'id': i, 'file_name': f'{i}.jpg', 'height': 40, 'width': 60} for i in (1, 2)]
    write_coco(tmp_path, [{'id': 7, 'image_id': 1, 'segmentation': shape}], images)
    first, second = list_samples(tmp_path)
    with pytest.raises(InputError, match='annotation 7'):
        first.truth()
    assert not second.truth().any()


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
def test_images_and_masks_in_folders_of_their_own(tmp_path, folder, ending):
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


# ------------------------------------------------------------------ preprocessing


def test_normalise_and_back():
    pixels = noise_image(32, 32)
    for preprocessing in (Preprocessing(32), Preprocessing(32, mean=(0,) * 3, std=(1,) * 3)):
        tensor = preprocessing.normalise(pixels)
        assert tensor.shape == (1, 3, 32, 32) and tensor.dtype == torch.float32
        assert preprocessing.to_pixels(tensor) == pytest.approx(pixels, abs=1e-3)
    assert preprocessing.normalise(pixels)[0, 1, 2, 3].item() == pytest.approx(
        pixels[2, 3, 1] / 255
    )


def test_letterbox_keeps_the_shape_and_pads_black():
    preprocessing = Preprocessing(64, 'letterbox')
    fitted = preprocessing.resize_image(np.full((50, 100, 3), 200, np.uint8))
    place = preprocessing.place((50, 100))
    assert (place.top, place.left, place.height, place.width) == (16, 0, 32, 64)
    assert (place.crop(fitted) == 200).all() and fitted.sum() == 200 * 3 * 32 * 64
    assert preprocessing.resize_mask(np.ones((50, 100), np.uint8)).sum() == 32 * 64


def test_stretch_fills_the_square():
    fitted = Preprocessing(64).resize_image(np.full((50, 100, 3), 200, np.uint8))
    assert fitted.shape == (64, 64, 3) and (fitted == 200).all()


@pytest.mark.parametrize('resize', ['stretch', 'letterbox'])
@pytest.mark.parametrize('size', [(50, 100), (300, 100), (7, 7)])
def test_pixel_coordinates_follow_the_resizing(resize, size):
    preprocessing = Preprocessing(96, resize)
    place = preprocessing.place(size)
    for x, y in ((0, 0), (size[1] - 1, size[0] - 1), (size[1] // 2, size[0] // 3)):
        mask = np.zeros(size, np.uint8)
        mask[y, x] = 1
        fitted = preprocessing.resize_mask(mask)
        column, row = place.to_model(x, y)
        assert place.top <= row < place.top + place.height
        if min(place.height / size[0], place.width / size[1]) >= 1:
            assert fitted[row, column] == 1


def test_demo_annotations_hold_no_polygon_loss():
    content = json.loads((DEMO_DATA / 'test' / '_annotations.coco.json').read_text())
    for annotation in content['annotations']:
        assert coco_mask.area(annotation['segmentation']) == annotation['area']
