"""How datasets lie in folders, how masks are named, and images that their masks do not fit."""

import numpy as np
import pytest
from helpers import SHAPE, coco, lay, noise_image, square_mask
from PIL import Image

from igseg.data.layouts import LAYOUTS, DataSource, layouts_text
from igseg.data.pixels import LoadedImage
from igseg.data.samples import fitted_truth, list_samples, same_aspect, single_sample
from igseg.data.truth import TruthReading
from igseg.errors import InputError
from integrated_gradients import build_parser

ONE = TruthReading(numbers=2, one_class=True)


MASK = square_mask() * np.uint8(255)


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


def test_the_table_is_printed_by_help_readme_and_docs():
    told = ' '.join(build_parser().format_help().split())
    from helpers import ROOT

    rows = ''.join(f'| {layout.name} | {layout.form} |\n' for layout in LAYOUTS)  # in order
    for document in ('docs/input.md', 'README.md'):
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


def test_a_note_on_missing_masks_says_which_names_were_looked_for(tmp_path):
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


def test_channels_in_separate_files(tmp_path):
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


def test_a_note_tells_of_square_images_that_were_turned():
    image = LoadedImage(np.zeros((40, 40, 3), np.uint8), orientation=6)
    truth, notes = fitted_truth(image, np.zeros((40, 40), np.uint8))
    assert truth is not None and 'EXIF' in notes[0]


# ------------------------------------------------------------------ how masks are named


def test_usual_prefixes_are_found(tmp_path):
    lay(tmp_path, {'images/001.png': None, 'masks/mask_001.png': MASK})
    (sample,) = list_samples(tmp_path)
    assert sample.truth(ONE).any()
    lay(tmp_path / 'flat', {'001.png': None, 'mask_001.png': MASK, 'mask_002.png': MASK})
    (sample,) = list_samples(tmp_path / 'flat')
    assert sample.name == '001' and sample.truth(ONE).any()
    assert 'named like masks' in sample.notes[0]
    lay(tmp_path / 'faces', {'mask_1.png': None, 'mask_2.png': None})  # names of images
    assert [face.name for face in list_samples(tmp_path / 'faces')] == ['mask_1', 'mask_2']


@pytest.mark.parametrize(
    'image, mask, names',
    [
        ('001', 'seg-001', {'mask_prefix': 'seg-'}),
        ('001', 'gt_001_v2', {'mask_prefix': 'gt_', 'mask_suffix': '_v2.png'}),
        ('21_training', '21_manual1', {'mask_name': '*_training=*_manual1'}),
        ('21_training', '21_manual1', {'mask_name': '*_training.tif=*_manual1.gif'}),
        ('001', 'seg-001', {'mask_name': '*=seg-*'}),
    ],
)
def test_names_of_masks_by_flags(tmp_path, image, mask, names):
    lay(tmp_path, {f'images/{image}.png': None, f'masks/{mask}.png': MASK})
    source = DataSource(tmp_path, **names)
    (sample,) = list_samples(tmp_path, source=source)
    assert sample.truth(ONE).any() and sample.mask_flags == names
    alone = single_sample(tmp_path / 'images' / f'{image}.png', None, source)
    assert alone.truth(ONE).any() and alone.mask_flags == names
    lay(tmp_path / 'flat', {f'{image}.png': None, f'{mask}.png': MASK})
    (sample,) = list_samples(tmp_path / 'flat', source=DataSource(tmp_path / 'flat', **names))
    assert sample.name == image and sample.truth(ONE).any()
    source = DataSource(tmp_path, None, tmp_path / 'images', tmp_path / 'masks', **names)
    assert single_sample(tmp_path / 'images' / f'{image}.png', None, source).truth(ONE).any()


@pytest.mark.parametrize(
    'names, error',
    [
        ({'mask_name': '*_training'}, 'not of the form IMAGE=MASK'),
        ({'mask_name': 'a=b'}, 'not of the form IMAGE=MASK'),
        ({'mask_name': '*=*', 'mask_suffix': '_x'}, 'goes without'),
    ],
)
def test_names_that_make_no_sense_are_refused(tmp_path, names, error):
    lay(tmp_path, {'images/a.png': None, 'masks/a.png': MASK})
    with pytest.raises(InputError, match=error):
        list_samples(tmp_path, source=DataSource(tmp_path, **names))


def test_a_note_tells_that_an_image_is_outside_of_the_named_folder(tmp_path):
    lay(tmp_path, {'a/one.png': None, 'b/two.png': None, 'm/one.png': MASK})
    source = DataSource(tmp_path, None, tmp_path / 'a', tmp_path / 'm')
    sample = single_sample(tmp_path / 'b' / 'two.png', None, source)
    assert sample.read_truth is None and 'is not among the images in' in sample.notes[0]
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


def test_a_note_tells_that_only_some_masks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr('igseg.data.masks.MOST_SCANNED', 2)
    lay(tmp_path, {f'images/{n}.png': None for n in 'abc'})
    lay(tmp_path, {f'masks/{n}.png': MASK for n in 'abc'})
    assert '3 masks mean is decided by 2 of them' in list_samples(tmp_path)[0].notes[0]
