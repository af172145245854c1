"""COCO files, the names and boxes of YOLO: what their shapes mean and what is refused."""

import json

import numpy as np
import pytest
from helpers import DEMO_DATA, SHAPE, coco, lay, noise_image, save_image, square_mask, write_coco
from pycocotools import mask as coco_mask

from igseg.data.annotations import Categories, read_names
from igseg.data.samples import list_samples
from igseg.data.truth import IGNORED, TruthReading
from igseg.errors import InputError


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
    for number, image_shapes in shapes.items():
        name = f'scan{number}_jpg.rf.0a1b.jpg'
        save_image(tmp_path / 'valid' / name, noise_image())
        images.append({'id': number, 'file_name': name, 'height': 40, 'width': 60})
        for shape in image_shapes:
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
    'content, message',
    [
        ('{ not json', 'not a readable COCO file'),
        ('[1, 2]', 'not a readable COCO file'),
        ('{"images": [{"id": 1}]}', 'not a readable COCO file'),
        ('{"images": [{"id": 1, "file_name": "../../a.jpg", "height": 4, "width": 4}]}', 'outside'),
        ('{"images": []}', 'no images'),
    ],
)
def test_damaged_coco_files_are_refused(tmp_path, content, message):
    (tmp_path / '_annotations.coco.json').write_text(content)
    with pytest.raises(InputError, match=message):
        list_samples(tmp_path)


@pytest.mark.parametrize('shape', [[[1e9] * 6], {'size': [40, 60], 'counts': 'abc\n'}, 'x'])
def test_a_damaged_annotation_spoils_only_its_own_image(tmp_path, shape):
    images = [{'id': i, 'file_name': f'{i}.jpg', 'height': 40, 'width': 60} for i in (1, 2)]
    write_coco(tmp_path, [{'id': 7, 'image_id': 1, 'segmentation': shape}], images)
    first, second = list_samples(tmp_path)
    with pytest.raises(InputError, match='annotation 7'):
        first.truth()
    assert not second.truth().any()


def test_demo_annotations_hold_no_polygon_loss():
    content = json.loads((DEMO_DATA / 'test' / '_annotations.coco.json').read_text())
    for annotation in content['annotations']:
        assert coco_mask.area(annotation['segmentation']) == annotation['area']


ONE = TruthReading(numbers=2, one_class=True)


OUTLINE = '0 ' + ' '.join(f'{x / 60:.6f} {y / 40:.6f}' for x, y in np.reshape(SHAPE, (-1, 2)))


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
def test_a_degenerate_part_is_left_out_with_a_note(tmp_path, bad):
    whole = annotated(tmp_path, [[GOOD]]).values
    labels = annotated(tmp_path, [[GOOD, bad]])
    assert np.array_equal(labels.values, whole) and '1 part of annotations' in labels.notes[0]
    again = annotated(tmp_path, [[GOOD], [bad]]) if len(bad) < 6 else labels
    assert np.array_equal(again.values, whole)


@pytest.mark.parametrize('shapes', [[None], [[]], [[GOOD], []], [[[20, 20]]]])
def test_annotations_without_an_outline_mean_that_the_truth_is_unknown(tmp_path, shapes):
    labels = annotated(tmp_path, shapes)
    assert labels.values is None and 'unknown' in labels.notes[-1]


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
    label_of, notes = Categories(names, frozenset(used), parent).labels(reading, tmp_path)
    assert label_of == table
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
