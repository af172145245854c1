"""How datasets lie in folders, annotations, and images that their masks do not fit."""

import json

import numpy as np
import pytest
from helpers import noise_image, save_image, square_mask, write_coco
from PIL import Image

from igseg.data.annotations import Categories, read_names
from igseg.data.layouts import LAYOUTS, DataSource, layouts_text
from igseg.data.pixels import LoadedImage
from igseg.data.samples import fitted_truth, list_samples, same_aspect, single_sample
from igseg.data.truth import IGNORED, TruthReading
from igseg.errors import InputError
from igseg.preprocessing import Preprocessing
from integrated_gradients import Settings, build_parser

ONE = TruthReading(numbers=2, one_class=True)
MASK = square_mask() * np.uint8(255)
SHAPE = [[15, 10, 30, 10, 30, 20, 15, 20]]


def lay(root, images: dict[str, object]):
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
    return {
        'images': [{'id': 1, 'file_name': folder + name, 'height': 40, 'width': 60}],
        'annotations': [{'id': 1, 'image_id': 1, 'category_id': 1, 'segmentation': SHAPE}],
        'categories': [{'id': 1, 'name': 'organ'}],
    }


OUTLINE = '0 ' + ' '.join(f'{x / 60:.6f} {y / 40:.6f}' for x, y in np.reshape(SHAPE, (-1, 2)))

WAYS = {
    'Roboflow': {'test/_annotations.coco.json': coco('a.jpg'), 'test/a.jpg': None},
    'CVAT': {'annotations/instances_default.json': coco('a.jpg'), 'images/a.jpg': None},
    'CVAT split': {
        'annotations/instances_train.json': coco('b.jpg'),
        'annotations/instances_test.json': coco('a.jpg'),
        'images/test/a.jpg': None, 'images/train/b.jpg': None,
    },
    'Label Studio': {'result.json': coco('a.jpg', 'images\\'), 'images/a.jpg': None},
    'YOLO': {'test/images/a.jpg': None, 'test/labels/a.txt': OUTLINE, 'data.yaml': 'names: [x]'},
    'YOLO type first': {'images/test/a.jpg': None, 'labels/test/a.txt': OUTLINE},
    'VOC': {'JPEGImages/a.jpg': None, 'JPEGImages/b.jpg': None, 'SegmentationClass/a.png': MASK},
    'VOC list': {
        'JPEGImages/a.jpg': None, 'JPEGImages/b.jpg': None, 'SegmentationClass/a.png': MASK,
        'SegmentationClass/b.png': MASK, 'ImageSets/Segmentation/val.txt': 'a\n',
    },
    'nnU-Net': {'imagesTs/a_0000.png': None, 'labelsTs/a.png': square_mask()},
    'CamVid': {'test/a.png': None, 'testannot/a.png': MASK, 'train/b.png': None},
    'type first': {'images/test/a.png': None, 'masks/test/a.png': MASK, 'images/train/b.png': None},
    'Pytorch-UNet': {'imgs/a.png': None, 'masks/a_mask.gif': MASK},
    'Capitals': {'Images/a.png': None, 'Masks/a.png': MASK, 'Images/.DS_Store': 'x',
                 'Images/._a.png': 'x'},
    'ISIC': {'a.jpg': None, 'a_segmentation.png': MASK, '._a.jpg': 'x', '.b.jpg': 'x'},
    **{f'ending {e}': {'a.jpg': None, f'a{e}.png': MASK}
       for e in ('_mask', '-mask', '.mask', '_label', '_gt', '_seg')},
}  # fmt: skip


@pytest.mark.parametrize('way', WAYS)
def test_layouts(tmp_path, way):
    lay(tmp_path, WAYS[way])
    (sample,) = list_samples(tmp_path)
    assert sample.image_path.stem in ('a', 'a_0000')
    assert np.array_equal(sample.truth(ONE) > 0, square_mask() > 0)
    alone = single_sample(sample.image_path)  # the same truth as in its dataset
    assert np.array_equal(alone.truth(ONE) > 0, square_mask() > 0)


def test_the_table_is_printed_by_help_readme_and_reference():
    told = ' '.join(build_parser().format_help().split())
    from helpers import ROOT

    rows = ''.join(f'| {layout.name} | {layout.form} |\n' for layout in LAYOUTS)  # in order
    for document in ('REFERENCE.md', 'README.md'):
        assert f'| dataset | how it lies |\n|---|---|\n{rows}\n' in (ROOT / document).read_text()
    for layout in LAYOUTS:
        assert layout.name in layouts_text()
        assert layout.name in told.replace('- ', '-')


def test_folders_by_flags(tmp_path):
    lay(tmp_path, {'scans/one.png': None, 'drawn/one_lesion.png': MASK})
    source = DataSource(tmp_path, None, tmp_path / 'scans', tmp_path / 'drawn', '_lesion.png')
    (sample,) = list_samples(tmp_path, source=source)
    assert sample.truth(ONE).any()
    assert single_sample(tmp_path / 'scans' / 'one.png', None, source).truth(ONE).any()
    lay(tmp_path, {'flat/two.png': None, 'flat/two_lesion.png': MASK})
    source = DataSource(tmp_path / 'flat', mask_suffix='_lesion')
    (sample,) = list_samples(tmp_path / 'flat', source=source)
    assert sample.name == 'two' and sample.truth(ONE).any()
    with pytest.raises(InputError, match='masks_dir is not there'):
        list_samples(tmp_path, source=DataSource(tmp_path, masks_dir=tmp_path / 'nowhere'))


def test_masks_that_are_missing_are_said_with_what_was_looked_for(tmp_path):
    lay(tmp_path, {'images/a.png': None, 'images/b.png': None, 'masks/a.png': MASK})
    a, b = list_samples(tmp_path)
    assert not a.notes  # it has a mask: of it nothing is missing
    assert 'no mask was found for 1 of 2 images' in b.notes[0] and '_segmentation' in b.notes[0]
    assert not single_sample(tmp_path / 'images' / 'a.png').notes
    assert single_sample(tmp_path / 'images' / 'b.png').notes == b.notes
    lay(tmp_path / 'bare', {'a.png': None})
    assert 'no masks were found' in list_samples(tmp_path / 'bare')[0].notes[0]


def test_a_single_image_named_from_within_its_folder(tmp_path, monkeypatch):
    lay(tmp_path, {'images/a.png': None, 'masks/a.png': MASK})
    monkeypatch.chdir(tmp_path / 'images')
    sample = single_sample('a.png')
    assert sample.truth(ONE).any() and str(sample.image_path) == 'a.png'
    with pytest.raises(InputError, match='masks_dir is not there'):
        single_sample('a.png', None, DataSource(tmp_path, masks_dir=tmp_path / 'nowhere'))


def test_the_folder_of_the_images_itself(tmp_path):
    lay(tmp_path, {'images/a.png': None, 'masks/a.png': MASK})
    assert list_samples(tmp_path / 'images')[0].truth(ONE).any()


def test_masks_are_never_explained_as_images(tmp_path):
    lay(tmp_path, {'a.png': None, 'a_mask.png': MASK, 'lost_mask.png': MASK})
    (sample,) = list_samples(tmp_path)
    assert sample.name == 'a' and any('named like masks' in note for note in sample.notes)


def test_channels_in_files_of_their_own(tmp_path):
    for k in range(2):
        lay(tmp_path, {f'imagesTs/a_000{k}.png': np.full((8, 9), 10 + k, np.uint8)})
    lay(tmp_path, {'labelsTs/a.png': np.eye(8, 9, dtype=np.uint8),
                   'dataset.json': {'labels': {'background': 0, 'liver': 1}}})  # fmt: skip
    (sample,) = list_samples(tmp_path)
    image = sample.image(2)
    assert image.shape == (8, 9, 2) and image[0, 0].tolist() == [10, 11]
    assert sample.names_of_classes() == {0: 'background', 1: 'liver'}
    with pytest.raises(InputError, match='the network takes 3'):
        sample.image(3)


# ------------------------------------------------------------------ annotations


def annotated(tmp_path, shapes, **extra):
    image = {'id': 1, 'file_name': 'a.jpg', 'height': 40, 'width': 60}
    save_image(tmp_path / 'a.jpg', noise_image())
    write_coco(tmp_path, [
        {'id': k, 'image_id': 1, 'category_id': 1, 'segmentation': shape, **extra}
        for k, shape in enumerate(shapes)
    ], [image])  # fmt: skip
    (sample,) = list_samples(tmp_path)
    return sample.labels(ONE)


GOOD = [15, 10, 30, 10, 30, 20, 15, 20]


@pytest.mark.parametrize(
    'bad',
    [[20, 20], [20, 20, 20, 25], [5, 5, 5, 9, 5, 30], [float('nan')] * 6, [1e9] * 6, ['x'] * 6],
)
def test_a_degenerate_part_is_left_out_and_said(tmp_path, bad):
    whole = annotated(tmp_path, [[GOOD]]).values
    found = annotated(tmp_path, [[GOOD, bad]])
    assert np.array_equal(found.values, whole) and '1 part of annotations' in found.notes[0]
    again = annotated(tmp_path, [[GOOD], [bad]]) if len(bad) < 6 else found
    assert np.array_equal(again.values, whole)


@pytest.mark.parametrize('shapes', [[None], [[]], [[GOOD], []], [[[20, 20]]]])
def test_annotations_without_an_outline_mean_that_the_truth_is_unknown(tmp_path, shapes):
    found = annotated(tmp_path, shapes)
    assert found.values is None and 'unknown' in found.notes[-1]


def test_a_flat_list_is_one_polygon_and_crowds_count(tmp_path):
    whole = annotated(tmp_path, [[GOOD]]).values
    assert np.array_equal(annotated(tmp_path, [GOOD]).values, whole)
    runs = {'size': [40, 60], 'counts': [600, 40, 1760]}
    assert annotated(tmp_path, [runs], iscrowd=1).values.sum() == 40


@pytest.mark.parametrize(
    ('names', 'used', 'reading', 'table'),
    [
        ({0: 'all', 1: 'a', 2: 'b'}, {1, 2}, TruthReading(numbers=3), {1: 1, 2: 2}),
        ({0: 'liver', 1: 'tumour'}, {0, 1}, TruthReading(numbers=3), {0: 1, 1: 2}),
        ({0: 'liver', 1: 'tumour'}, {1}, TruthReading(numbers=3), {0: 1, 1: 2}),
        ({0: 'liver', 1: 'tumour'}, {0, 1}, TruthReading(), {0: 1, 1: 2}),
        ({0: 'liver', 1: 'tumour'}, {0}, TruthReading(numbers=2, background=None), {0: 0, 1: 1}),
        ({0: 'background', 1: 'a'}, {0, 1}, TruthReading(numbers=2), {0: 0, 1: 1}),
        ({7: 'a', 12: 'b'}, {7, 12}, TruthReading(numbers=3), {7: 1, 12: 2}),
        ({7: 'a', 12: 'b'}, {7, 12}, ONE, {7: 1, 12: 1}),
        ({1: 'a', 3: 'b'}, {1, 3}, TruthReading(numbers=4), {1: 1, 3: 3}),
        ({1: 'a', 2: 'b'}, {1}, TruthReading(numbers=3, background=2), {1: 0, 2: 1}),
        ({1: 'a', 2: 'b'}, {1}, TruthReading(numbers=3, ignore_label=2), {1: 1, 2: IGNORED}),
    ],
)
def test_categories_become_classes(tmp_path, names, used, reading, table):
    parent = names.get(0) == 'all'
    found, notes = Categories(names, frozenset(used), parent).labels(reading, tmp_path)
    assert found == table
    moved = any(k != v for k, v in table.items() if v != IGNORED) and not reading.one_class
    assert bool(notes) == moved


def test_categories_that_fit_no_class_are_refused(tmp_path):
    with pytest.raises(InputError, match='--label_map'):
        Categories({7: 'a', 9: 'b'}, frozenset({7})).labels(TruthReading(numbers=5), tmp_path)
    with pytest.raises(InputError, match='--label_map'):
        Categories({0: 'a', 1: 'b'}, frozenset({0, 1})).labels(TruthReading(numbers=2), tmp_path)


def test_what_a_coco_file_may_hold(tmp_path):
    content = coco('sub\\a.jpg')
    content['images'][0]['id'] = '1'
    content['annotations'].append(
        {'id': 9, 'image_id': 77, 'category_id': 1, 'segmentation': SHAPE}
    )
    path = tmp_path / 'd' / '_annotations.coco.json'
    lay(tmp_path, {'elsewhere/a.jpg': None, 'd/x.txt': ''})
    path.write_text('\ufeff' + json.dumps(content), encoding='utf-8')
    (tmp_path / 'd' / 'sub').mkdir()
    (tmp_path / 'd' / 'sub' / 'a.jpg').symlink_to(tmp_path / 'elsewhere' / 'a.jpg')
    (sample,) = list_samples(tmp_path / 'd')
    assert sample.truth(ONE).any() and sample.image().shape == (40, 60, 3)
    assert '1 annotation in' in sample.notes[0] and 'match no image' in sample.notes[0]
    assert sample.names_of_classes(ONE) == {1: 'organ'}


@pytest.mark.parametrize(
    'name', ['../a.jpg', '/etc/a.jpg', '..\\a.jpg', 'C:\\a.jpg', 'a/../../b', '']
)
def test_the_name_of_an_image_may_not_leave_the_folder(tmp_path, name):
    (tmp_path / '_annotations.coco.json').write_text(json.dumps(coco(name)))
    with pytest.raises(InputError, match='outside its own folder'):
        list_samples(tmp_path)


def test_the_names_of_yolo_and_its_boxes(tmp_path):
    (tmp_path / 'data.yaml').write_text('names:\n  0: liver\n  1: tumour\n')
    assert read_names(tmp_path / 'data.yaml') == {0: 'liver', 1: 'tumour'}
    lay(tmp_path, {'test/images/a.jpg': None, 'test/labels/a.txt': f'1 {OUTLINE[2:]}\n'})
    (sample,) = list_samples(tmp_path)
    assert set(np.unique(sample.truth(TruthReading(numbers=3)))) == {0, 2}
    assert sample.names_of_classes(TruthReading(numbers=3)) == {1: 'liver', 2: 'tumour'}
    lay(tmp_path, {'test/labels/a.txt': '0 0.5 0.5 0.2 0.2'})
    assert list_samples(tmp_path)[0].truth(TruthReading(numbers=3)) is None


# ------------------------------------------------------------------ masks over images


def test_a_mask_is_turned_where_the_exif_tag_says_so(tmp_path):
    raw = noise_image(40, 60)
    for orientation in (5, 6, 7, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(raw).save(tmp_path / 'a.png', exif=exif)
        image = single_sample(tmp_path / 'a.png').load()
        mask = raw[:, :, 0].astype(np.uint8)  # the stored pixels stand for a mask
        truth, notes = fitted_truth(image, mask)
        assert np.array_equal(truth, image.pixels[:, :, 0]) and 'EXIF' in notes[0]
        assert fitted_truth(image, truth) == (truth, ()) or not fitted_truth(image, truth)[1]


def test_masks_of_another_shape_are_refused():
    image = LoadedImage(np.zeros((40, 60, 3), np.uint8))
    for shape in ((60, 40), (40, 40), (40, 63)):
        truth, notes = fitted_truth(image, np.zeros(shape, np.uint8))
        assert truth is None and 'another shape' in notes[0]
    for shape in ((40, 60), (20, 30), (200, 300)):
        assert fitted_truth(image, np.zeros(shape, np.uint8))[0] is not None
    assert same_aspect((480, 641), (240, 320))


def test_square_images_that_were_turned_are_said():
    image = LoadedImage(np.zeros((40, 40, 3), np.uint8), orientation=6)
    truth, notes = fitted_truth(image, np.zeros((40, 40), np.uint8))
    assert truth is not None and 'EXIF' in notes[0]


# ------------------------------------------------------------------ normalisation of each image


@pytest.mark.parametrize('kind', ['minmax', 'zscore'])
def test_images_are_normalised_with_their_own_numbers(kind):
    image = noise_image(32, 48).astype(np.float32) / 2 + 30
    fit = Preprocessing(64, 'letterbox', (0.0,) * 3, (1.0,) * 3, of_each=kind).of_image(image)
    x = fit.normalise(fit.resize_image(image))
    inside = fit.place((32, 48)).content((64, 64))
    values = x[0].numpy()[:, inside]
    ends = (values.min(), values.max()) if kind == 'minmax' else (values.mean(), values.std())
    assert ends == pytest.approx((0, 1), abs=1e-4)
    constant = fit.normalise(np.full((64, 64, 3), 50, np.float32))  # a baseline of one shade
    assert np.isfinite(constant.numpy()).all()
    assert fit.to_pixels(x)[inside] == pytest.approx(fit.resize_image(image)[inside], abs=1e-2)
    flat = Preprocessing(32, mean=(0.0,), std=(1.0,), of_each=kind).of_image(np.full((9, 9, 1), 7))
    assert flat.std == (1.0,)


def test_the_normalisation_of_each_image_goes_alone():
    from torch import nn

    from integrated_gradients import input_preprocessing

    net = nn.Conv2d(3, 1, 1)
    assert input_preprocessing(net, Settings(normalize='zscore')).of_each == 'zscore'
    for other in ({'mean': (0.5,) * 3, 'std': (0.5,) * 3}, {'pixel_range': '0-255'}):
        with pytest.raises(InputError, match='numbers from each image'):
            input_preprocessing(net, Settings(normalize='zscore', **other))


# ------------------------------------------------------------------ how masks are named


def test_usual_prefixes_are_found(tmp_path):
    lay(tmp_path, {'images/001.png': None, 'masks/mask_001.png': MASK})
    (sample,) = list_samples(tmp_path)
    assert sample.truth(ONE).any()
    lay(tmp_path / 'flat', {'001.png': None, 'mask_001.png': MASK, 'mask_002.png': MASK})
    (sample,) = list_samples(tmp_path / 'flat')
    assert sample.name == '001' and sample.truth(ONE).any()
    assert 'named like masks' in sample.notes[0]
    lay(tmp_path / 'faces', {'mask_1.png': None, 'mask_2.png': None})  # images that are called so
    assert [one.name for one in list_samples(tmp_path / 'faces')] == ['mask_1', 'mask_2']


@pytest.mark.parametrize(
    'image, mask, said',
    [
        ('001', 'seg-001', {'mask_prefix': 'seg-'}),
        ('001', 'gt_001_v2', {'mask_prefix': 'gt_', 'mask_suffix': '_v2.png'}),
        ('21_training', '21_manual1', {'mask_name': '*_training=*_manual1'}),
        ('21_training', '21_manual1', {'mask_name': '*_training.tif=*_manual1.gif'}),
        ('001', 'seg-001', {'mask_name': '*=seg-*'}),
    ],
)
def test_names_of_masks_by_flags(tmp_path, image, mask, said):
    lay(tmp_path, {f'images/{image}.png': None, f'masks/{mask}.png': MASK})
    source = DataSource(tmp_path, **said)
    (sample,) = list_samples(tmp_path, source=source)
    assert sample.truth(ONE).any() and sample.mask_flags == said
    alone = single_sample(tmp_path / 'images' / f'{image}.png', None, source)
    assert alone.truth(ONE).any() and alone.mask_flags == said
    lay(tmp_path / 'flat', {f'{image}.png': None, f'{mask}.png': MASK})
    (sample,) = list_samples(tmp_path / 'flat', source=DataSource(tmp_path / 'flat', **said))
    assert sample.name == image and sample.truth(ONE).any()
    source = DataSource(tmp_path, None, tmp_path / 'images', tmp_path / 'masks', **said)
    assert single_sample(tmp_path / 'images' / f'{image}.png', None, source).truth(ONE).any()


@pytest.mark.parametrize(
    'said, error',
    [
        ({'mask_name': '*_training'}, 'not of the form IMAGE=MASK'),
        ({'mask_name': 'a=b'}, 'not of the form IMAGE=MASK'),
        ({'mask_name': '*=*', 'mask_suffix': '_x'}, 'goes without'),
    ],
)
def test_names_that_make_no_sense_are_refused(tmp_path, said, error):
    lay(tmp_path, {'images/a.png': None, 'masks/a.png': MASK})
    with pytest.raises(InputError, match=error):
        list_samples(tmp_path, source=DataSource(tmp_path, **said))


def test_an_image_outside_of_the_folder_that_was_named_is_said(tmp_path):
    lay(tmp_path, {'a/one.png': None, 'b/two.png': None, 'm/one.png': MASK})
    source = DataSource(tmp_path, None, tmp_path / 'a', tmp_path / 'm')
    found = single_sample(tmp_path / 'b' / 'two.png', None, source)
    assert found.read_truth is None and 'is not among the images in' in found.notes[0]
    assert not single_sample(tmp_path / 'b' / 'two.png').notes


def test_names_of_classes_of_a_roboflow_semantic_export(tmp_path):
    names = 'Pixel Value, Class\n0, background\n1, liver\n'
    masked = {'test/a.jpg': None, 'test/a_mask.png': square_mask()}
    lay(tmp_path, {**masked, 'test/_classes.csv': names})
    (sample,) = list_samples(tmp_path)
    assert sample.names_of_classes() == {0: 'background', 1: 'liver'}
    for damaged in ('\x00,"', 'x,y\n,\n1\n99999999999,z\n', ''):
        lay(tmp_path, {'test/_classes.csv': damaged})
        assert list_samples(tmp_path)[0].names_of_classes() == {}


def test_masks_of_which_only_some_are_looked_at_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr('igseg.data.masks.MOST_SCANNED', 2)
    lay(tmp_path, {f'images/{n}.png': None for n in 'abc'})
    lay(tmp_path, {f'masks/{n}.png': MASK for n in 'abc'})
    assert '3 masks mean is decided by 2 of them' in list_samples(tmp_path)[0].notes[0]


# ------------------------------------------------------------------ numbers out of proportion


@pytest.mark.parametrize(
    'label, names, classes',
    [
        ('9999' + OUTLINE[1:], 'names: [a]', {1: 'a'}),  # as many classes as that: not quadratic
        (OUTLINE, 'names: {99999999999: a}', {}),
        (OUTLINE, 'names: {-4: a}', {}),
    ],
)
def test_yolo_numbers_that_would_take_all_memory_or_time(tmp_path, label, names, classes):
    lay(tmp_path, {'images/a.png': None, 'labels/a.txt': label, 'data.yaml': names})
    (sample,) = list_samples(tmp_path)
    assert sample.truth().max() > 0 and sample.names_of_classes() == classes


@pytest.mark.parametrize('number', ['66222', '40000' + OUTLINE[1:]])
def test_a_yolo_class_that_no_dataset_has_is_refused(tmp_path, number):
    lay(tmp_path, {'images/a.png': None, 'labels/a.txt': number})
    with pytest.raises(InputError, match='no class and outline'):
        list_samples(tmp_path)[0].truth()


def test_a_coco_category_of_a_large_number_fits_a_label(tmp_path):
    content = coco('a.jpg')
    content['annotations'][0]['category_id'] = content['categories'][0]['id'] = 10**9
    lay(tmp_path, {'test/_annotations.coco.json': content, 'test/a.jpg': None})
    (sample,) = list_samples(tmp_path)
    assert sample.truth().max() == sample.truth(ONE).max() == 1
