"""Masks: what a value means is decided by the set of values and the number of classes."""

import json

import cv2
import numpy as np
import pytest
import torch
from helpers import PLAIN_FLAGS, noise_image, save_image, square_mask
from PIL import Image

import integrated_gradients
from igseg.data.masks import MaskFile, MaskSet, read_mask
from igseg.data.samples import list_samples, single_sample
from igseg.data.truth import IGNORED, TruthReading, read_label_map
from igseg.errors import EmptyTargetError, InputError
from igseg.method.targets import TargetContext, build_target, scores_of_labels
from igseg.network.description import NetworkDescription
from igseg.preprocessing import Preprocessing
from integrated_gradients import IntegratedGradients, Settings, explain_image

ONE = TruthReading(numbers=2, one_class=True)


def classes(count: int) -> TruthReading:
    """Of a network with so many exclusive classes."""
    return TruthReading(numbers=count)


def stripes(*values: int, side: int = 40) -> np.ndarray:
    """A mask with an area of each value."""
    mask = np.zeros((side, side), np.int32)
    for place, value in enumerate(values):
        mask[:, place * side // len(values) : (place + 1) * side // len(values)] = value
    return mask


def labels_of_values(tmp_path, values, reading) -> dict[int, int]:
    """The label of each value, read from a mask that holds all these values."""
    mask = stripes(*values)
    path = save_image(tmp_path / 'm.png', mask.astype(np.uint8 if max(values) < 256 else np.uint16))
    labels = read_mask(path, reading)
    return {value: int(labels[mask == value][0]) for value in values}


@pytest.mark.parametrize(
    ('values', 'reading', 'labels'),
    [
        ((0, 255), ONE, (0, 1)),
        ((0, 1), ONE, (0, 1)),
        ((0, 7), ONE, (0, 1)),
        ((0, 65535), ONE, (0, 1)),
        ((0, 255), classes(2), (0, 1)),
        ((0, 1, 255), ONE, (0, 1, IGNORED)),
        ((0, 1, 2, 5, 255), classes(7), (0, 1, 2, 5, IGNORED)),
        ((0, 2), classes(3), (0, 2)),  # only class 2
        ((0, 150), classes(151), (0, 150)),  # numbers above 127 are classes too
        ((0, 128, 255), classes(3), (0, 1, 2)),
        ((0, 85, 170, 255), classes(4), (0, 1, 2, 3)),
        ((0, 1, 2, 3), ONE, (0, 1, 2, 3)),  # all numbers above 0 are the only class; a note says so
        ((0, 255), TruthReading(), (0, 1)),
        ((0, 1, 255), TruthReading(), (0, 1, IGNORED)),
        ((0, 3, 9), TruthReading(), (0, 3, 9)),
        ((0, 255), TruthReading(numbers=2, background=1), (1, 0)),
        ((0, 1, 2), TruthReading(numbers=3, ignore_label=2), (0, 1, IGNORED)),
        ((0, 255), TruthReading(numbers=5, ignore_label=255), (0, IGNORED)),
    ],
)
def test_the_set_of_values_decides(tmp_path, values, reading, labels):
    assert labels_of_values(tmp_path, values, reading) == dict(zip(values, labels, strict=True))


@pytest.mark.parametrize(
    ('values', 'reading'),
    [
        ((0, 255), classes(5)),  # class, or only void?
        ((0, 128, 255), ONE),
        ((0, 128, 255), classes(4)),
        ((1, 2), ONE),  # which is the background?
        ((1, 2, 3), classes(3)),
        ((0, 1, 2, 4), classes(4)),  # BraTS: 4 stands for 3
        ((0, 100), classes(3)),
        ((0, 1, 2, 5), classes(3)),
        (tuple(range(0, 34, 3)), classes(19)),  # numbers of another scheme
        ((0, 64, 255), ONE),  # not softened edges: 64 fills an area
    ],
)
def test_what_could_mean_two_things_is_refused(tmp_path, values, reading):
    with pytest.raises(InputError, match=r'--label_map FILE') as caught:
        labels_of_values(tmp_path, values, reading)
    assert '\n' not in str(caught.value) and 'm.png' in str(caught.value)


def softened(tmp_path, form: str):
    big = cv2.resize(square_mask(80, 80) * np.uint8(255), (320, 320))
    Image.fromarray(cv2.GaussianBlur(big, (0, 0), 2)).save(tmp_path / f'm.{form}', quality=70)
    return tmp_path / f'm.{form}', big


@pytest.mark.parametrize('form', ['png', 'jpg', 'webp'])
@pytest.mark.parametrize('reading', [ONE, classes(2), TruthReading()])
def test_softened_and_jpeg_edges_are_no_classes(tmp_path, form, reading):
    path, big = softened(tmp_path, form)
    assert ((read_mask(path, reading) == 1) != (big > 127)).mean() < 0.005


def test_a_photograph_is_no_mask(tmp_path):
    path = save_image(tmp_path / 'photo.png', noise_image()[:, :, 0])
    with pytest.raises(InputError, match='--label_map'):
        read_mask(path, ONE)


def test_one_file_cannot_decide_alone(tmp_path):
    """{0, 255} is void where another mask of the split shows that 255 is no class."""
    both = [save_image(tmp_path / f'{k}.png', stripes(*values).astype(np.uint8))
            for k, values in enumerate([(0, 255), (0, 1, 255)])]  # fmt: skip
    masks = MaskSet(both)
    assert set(np.unique(MaskFile(both[0], masks).read(ONE).values)) == {IGNORED, 0}
    alone = MaskFile(both[0], MaskSet(both[:1])).read(ONE).values
    assert set(np.unique(alone)) == {0, 1}


def test_the_split_of_a_single_image_is_read_too(tmp_path):
    for k, values in enumerate([(0, 255), (0, 1, 255)]):
        save_image(tmp_path / 'images' / f'{k}.png', noise_image(40, 40))
        save_image(tmp_path / 'masks' / f'{k}.png', stripes(*values).astype(np.uint8))
    for mask in (None, tmp_path / 'masks' / '0.png'):
        sample = single_sample(tmp_path / 'images' / '0.png', mask)
        assert set(np.unique(sample.truth(ONE))) == {IGNORED, 0}


def colours(*values) -> np.ndarray:
    return np.stack([stripes(*(v[c] for v in values)) for c in range(3)], -1).astype(np.uint8)


def test_one_colour_on_black_is_one_class_and_several_are_not(tmp_path):
    red = save_image(tmp_path / 'red.png', colours((0, 0, 0), (200, 0, 0)))
    assert set(np.unique(read_mask(red, ONE))) == {0, 1}
    two = save_image(tmp_path / 'two.png', colours((0, 0, 0), (255, 0, 0), (0, 0, 255)))
    for reading in (ONE, classes(3), TruthReading()):
        with pytest.raises(InputError, match='several colours'):
            read_mask(two, reading)
    Image.fromarray(colours((0, 0, 0), (255, 0, 0), (0, 0, 255))).save(tmp_path / 'two.jpg')
    with pytest.raises(InputError, match='several colours'):
        read_mask(tmp_path / 'two.jpg', ONE)
    green = save_image(tmp_path / 'green.png', colours((0, 0, 0), (0, 200, 0)))
    masks = MaskSet([red, green])  # masks of a single, different colour
    with pytest.raises(InputError, match='several colours'):
        MaskFile(red, masks).read(ONE)


def test_a_jpeg_of_one_colour(tmp_path):
    mask = np.zeros((80, 80, 3), np.uint8)
    mask[20:60, 20:60] = (230, 20, 20)
    Image.fromarray(mask * np.uint8(1)).save(tmp_path / 'm.jpg', quality=80)
    labels = read_mask(tmp_path / 'm.jpg', ONE)
    assert (labels != (mask[..., 0] > 0)).mean() < 0.02


def label_map(tmp_path, text: str):
    path = tmp_path / 'map.txt'
    path.write_text(text, encoding='utf-8')
    return read_label_map(path)


def test_a_label_map_says_what_values_and_colours_are(tmp_path):
    lines = ['\ufeff// a remark', '# another', '2 = 0, background', '1 = 1, pet', '3 = ignore',
             '#00ff00 = 1', '255, 0, 0 = void', '0,0,0 = 0']  # fmt: skip
    mapping = label_map(tmp_path, '\n'.join(lines))
    assert mapping.names == {0: 'background', 1: 'pet'}
    reading = TruthReading(numbers=2, one_class=True, label_map=mapping)
    assert labels_of_values(tmp_path, (1, 2, 3), reading) == {1: 1, 2: 0, 3: IGNORED}
    path = save_image(tmp_path / 'c.png', colours((0, 0, 0), (0, 255, 0), (255, 0, 0)))
    assert [*np.unique(read_mask(path, reading))] == [IGNORED, 0, 1]
    with pytest.raises(InputError, match='holds 9, which'):
        labels_of_values(tmp_path, (1, 9), reading)
    path = save_image(tmp_path / 'c.png', colours((0, 0, 0), (9, 9, 200)))
    with pytest.raises(InputError, match='the colours 9,9,200'):
        read_mask(path, reading)


def test_a_palette_is_indices_unless_the_map_names_colours(tmp_path):
    picture = Image.fromarray(stripes(0, 1, 2).astype(np.uint8), 'P')
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    picture.save(tmp_path / 'p.png')
    assert [*np.unique(read_mask(tmp_path / 'p.png', classes(3)))] == [0, 1, 2]
    mapping = label_map(tmp_path, '0,0,0 = 0\n128,0,0 = 2\n0,128,0 = 1\n')
    labels = read_mask(tmp_path / 'p.png', TruthReading(numbers=3, label_map=mapping))
    assert [int(labels[0, x]) for x in (0, 20, 39)] == [0, 2, 1]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('// nothing', 'names no value'),
        ('1 : 2', 'line 1'),
        ('0 = 0\nred = 1', 'line 2'),
        ('300,0,0 = 1', 'line 1'),
        ('1 = -1', 'line 1'),
        ('1 = 1\n1 = 2', 'named twice'),
        ('1 = 1, a\n2 = 1, b', 'two names'),
        ('1 = 1, a\n2 = 2, a', 'the same name'),
    ],
)
def test_label_maps_that_make_no_sense(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        label_map(tmp_path, text)


def test_a_label_map_may_not_name_classes_that_the_network_lacks(tmp_path):
    mapping = label_map(tmp_path, '0 = 0\n5 = 3\n')
    with pytest.raises(InputError, match='names class 3, but the network tells apart 2 numbers'):
        labels_of_values(tmp_path, (0, 5), TruthReading(numbers=2, label_map=mapping))


def test_masks_in_transparency_arrays_and_inverted_palettes(tmp_path):
    mask = square_mask()
    alpha = np.dstack([np.full((*mask.shape, 3), 255, np.uint8), mask * np.uint8(255)])
    Image.fromarray(alpha).save(tmp_path / 'alpha.png')
    np.save(tmp_path / 'm.npy', mask.astype(np.int64) * 2)
    np.save(tmp_path / 'soft.npy', cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1))
    bits = Image.fromarray(1 - mask, 'P')
    bits.putpalette([255, 255, 255, 0, 0, 0] + [0] * 762)
    bits.save(tmp_path / 'bits.png')
    for name in ('alpha.png', 'bits.png'):
        assert (read_mask(tmp_path / name, ONE) == mask).all(), name
    assert (read_mask(tmp_path / 'm.npy', classes(3)) == 2 * mask).all()
    assert ((read_mask(tmp_path / 'soft.npy', ONE) == 1) != (mask == 1)).mean() < 0.05
    np.save(tmp_path / 'onehot.npy', np.zeros((4, 8, 9)))
    with pytest.raises(InputError, match='one number for each pixel'):
        read_mask(tmp_path / 'onehot.npy')


# ------------------------------------------------------------------ pixels that do not count


class Bright(torch.nn.Module):
    """Foreground where the image is bright."""

    def forward(self, x):
        return 10 * x[:, :1] - 5


def bright_ig() -> IntegratedGradients:
    return IntegratedGradients(
        Bright(), 'cpu', Preprocessing(40, mean=(0.0,) * 3, std=(1.0,) * 3), 1
    )


def test_ignored_pixels_are_in_no_score_no_target_and_no_localisation():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :20] = 255
    truth = np.zeros((40, 40), np.uint8)
    truth[:, :10], truth[:, 10:30] = 1, 255  # where it is wrong, the truth does not count
    settings = Settings(image_size=40, num_steps=4, target=('truth', 'false-positive', 'predicted'))
    explanations = explain_image(bright_ig(), image, settings, truth)
    targets = [explanation.target for explanation, _ in explanations]
    assert targets == ['truth', 'predicted']  # no false positive
    explanation, true = explanations[0]
    assert explanation.region[:, :10].all() and not explanation.region[:, 10:].any()
    assert true[:, :10].all() and not true[:, 10:].any()
    assert (explanation.counted == (truth != 255)).all()
    predicted = explanations[1][0]
    assert predicted.predicted_mask[:, :20].all()
    assert predicted.region[:, :10].all() and not predicted.region[:, 10:].any()
    figures = integrated_gradients.explanation_statistics(explanations[1][0], true)
    assert figures['dice'] == figures['iou'] == figures['pixel_accuracy'] == 1
    assert figures['share_in_truth'] == pytest.approx(1)  # of what lies where the truth counts
    assert figures['share_in_prediction'] == pytest.approx(1)


@pytest.mark.parametrize(
    'target, area',
    [('predicted', 3), ('class:1', 2), ('object:1', 2), ('object:2', 1), ('image', 8),
     ('pixel:0,0', 1)],
)  # fmt: skip
def test_a_target_of_the_prediction_holds_no_ignored_pixel(target, area):
    labels = torch.tensor([[1, 1, 0, 2], [1, 0, 0, 2]])
    logits = torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).float()
    truth = torch.tensor([[-1, 1, 0, -1], [0, 0, 0, 2]])
    masks = NetworkDescription().predicted(logits, 0.5)
    built = build_target(target, TargetContext(logits, masks, truth))
    assert int(built.region.sum()) == area
    with pytest.raises(EmptyTargetError, match='that counts in its ground truth'):
        build_target('predicted', TargetContext(logits, masks, torch.full((2, 4), -1)))


def test_the_ignore_label_of_several_classes():
    numbers = torch.tensor([[0, 1, 2, -1]])
    masks = torch.zeros(3, 1, 4, dtype=torch.bool)
    masks[2] = True
    network = NetworkDescription()
    assert not network.drawn(numbers, masks)[:, 0, 3].any()
    assert not network.drawn_objects(numbers, masks)[0, 3]
    scores = scores_of_labels(network, masks, numbers)
    assert scores.pixel_accuracy == pytest.approx(1 / 3)
    assert scores.scores[2]['iou'] == pytest.approx(1 / 3)
    nothing = torch.full((1, 4), -1)
    assert scores_of_labels(network, masks, nothing) is None


def test_an_image_whose_truth_does_not_count_anywhere_has_no_scores():
    truth = np.full((40, 40), 255, np.uint8)
    settings = Settings(image_size=40, num_steps=2, target='image', ignore_label=255)
    explanation, true = explain_image(
        bright_ig(), np.zeros((40, 40, 3), np.uint8), settings, truth
    )[0]
    figures = integrated_gradients.explanation_statistics(explanation, true)
    assert figures['dice'] is None and figures['pixel_accuracy'] is None


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    status = integrated_gradients.main([
        *PLAIN_FLAGS, '--figures', 'none', '--output_dir', str(tmp_path / 'out'), *arguments,
    ])  # fmt: skip
    files = sorted((tmp_path / 'out').glob('*/*_statistics.json'))
    return status, [json.loads(path.read_text()) for path in files]


def test_the_label_map_on_the_command_line(tmp_path, capsys):
    image = save_image(tmp_path / 'a.png', noise_image(40, 40))
    mask = save_image(tmp_path / 'trimap.png', stripes(2, 3, 1).astype(np.uint8))
    single = ['--image_path', str(image), '--mask_path', str(mask), '--target', 'truth']
    assert run(tmp_path, *single)[0] == 0
    assert 'the truth covers the whole image' in capsys.readouterr().err
    path = tmp_path / 'map.txt'
    path.write_text('1 = 1\n2 = 0\n3 = ignore\n')
    status, (first,) = run(tmp_path, *single, '--label_map', str(path))
    assert status == 0 and first['settings']['label_map_sha256']
    assert first['target_area'] == pytest.approx(32 * 32 / 3, rel=0.1)
    path.write_text('1 = 0\n2 = 1\n3 = ignore\n')  # other content: computed again
    _, (second,) = run(tmp_path, *single, '--label_map', str(path))
    assert second['resume_key'] != first['resume_key']


def test_a_mask_of_another_shape_gives_no_scores_and_is_refused_as_a_target(tmp_path, capsys):
    image = save_image(tmp_path / 'a.png', noise_image(40, 60))
    mask = save_image(tmp_path / 'm.png', square_mask(60, 40) * np.uint8(255))
    single = ['--image_path', str(image), '--mask_path', str(mask)]
    status, (statistics,) = run(tmp_path, *single, '--target', 'image')
    assert status == 0 and statistics['dice'] is None
    assert any('of another shape' in note for note in statistics['notes'])
    assert run(tmp_path, *single, '--target', 'truth')[0] == 2
    assert 'target "truth"' in capsys.readouterr().err


def test_the_ignore_label_on_the_command_line(tmp_path):
    image = save_image(tmp_path / 'a.png', noise_image(40, 40))
    mask = save_image(tmp_path / 'm.png', stripes(0, 1, 7).astype(np.uint8))
    single = ['--image_path', str(image), '--mask_path', str(mask), '--target', 'truth']
    areas = [run(tmp_path, *single, *flags)[1][0]['target_area']
             for flags in ([], ['--ignore_label', '7'])]  # fmt: skip
    assert areas[1] == pytest.approx(areas[0] / 2, rel=0.1)


def test_a_mask_that_cannot_be_read_costs_one_image(tmp_path):
    for k in range(3):
        save_image(tmp_path / 'd' / 'images' / f'{k}.png', noise_image(40, 40, k))
        save_image(tmp_path / 'd' / 'masks' / f'{k}.png', square_mask(40, 40) * np.uint8(255))
    (tmp_path / 'd' / 'masks' / '1.png').write_bytes(b'no picture')
    status, done = run(tmp_path, '--mode', 'batch', '--data_dir', str(tmp_path / 'd'),
                       '--target', 'truth')  # fmt: skip
    assert status == 1 and [statistics['image'] for statistics in done] == ['0', '2']
    assert [sample.truth(ONE).max() for sample in list_samples(tmp_path / 'd')[::2]] == [1, 1]


# ------------------------------------------------------------------ values of every mode


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
