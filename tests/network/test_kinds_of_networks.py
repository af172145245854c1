"""Networks with other channels, outputs and sizes than a single logit map of a square RGB image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers import noise_image, relative_error, save_image, square_mask
from PIL import Image

from igseg.analysis.summary import read_table
from igseg.errors import InputError
from igseg.network.facts import NetworkFacts
from igseg.network.kinds import EXCLUSIVE, FOREGROUND, MULTILABEL
from igseg.network.outputs import LogitsOf, probability_kind
from igseg.results.figures import attribution_figure, channels_figure
from integrated_gradients import (
    IntegratedGradients,
    Preprocessing,
    Settings,
    analyse_image,
    explain_image,
    input_preprocessing,
    load_model,
    main,
    plain_map,
    read_image,
    statistics_text,
    view_of,
)

OPTIONS = {'encoder_depth': 3, 'decoder_channels': (16, 8, 4)}


def checkpoint(folder, channels=3, classes=1, **settings):
    """A small untrained U-Net, and the flags for it."""
    torch.manual_seed(0)
    net = smp.Unet('resnet18', encoder_weights=None, in_channels=channels, classes=classes,
                   **OPTIONS)  # fmt: skip
    stored = {'architecture': 'unet', 'encoder': 'resnet18', 'options': OPTIONS, **settings}
    torch.save({'state_dict': net.state_dict(), 'settings': stored}, folder / 'm.pth')
    return ['--model_path', str(folder / 'm.pth'), '--device', 'cpu', '--num_steps', '2',
            '--step_batch', '1', '--output_dir', str(folder / 'out')]  # fmt: skip


def statistics_in(folder) -> dict:
    (path,) = folder.glob('*/*_statistics.json')
    return json.loads(path.read_text())


class Bands(torch.nn.Module):
    """Label k is the k-th channel, shifted and scaled: (N, C, H, W) -> (N, K, H, W)."""

    def __init__(self, weights, biases):
        super().__init__()
        self.c = torch.nn.Conv2d(len(weights[0]), len(weights), 1)
        with torch.no_grad():
            self.c.weight.copy_(torch.tensor(weights)[:, :, None, None])
            self.c.bias.copy_(torch.tensor(biases))

    def forward(self, x):
        return self.c(x)


# ------------------------------------------------------------------ channels


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_any_number_of_channels_from_end_to_end(tmp_path, channels):
    flags = checkpoint(tmp_path, channels)
    values = np.random.default_rng(0).integers(0, 65536, (40, 50, channels), dtype=np.uint16)
    np.save(tmp_path / 'a.npy', values)
    arguments = [*flags, '--image_path', str(tmp_path / 'a.npy'), '--image_size', '64',
                 '--target', 'image', '--evaluate', 'quick']  # fmt: skip
    assert main(arguments) == 0
    statistics = statistics_in(tmp_path / 'out')
    assert len(statistics['channel_shares']) == channels
    assert sum(statistics['channel_shares']) == pytest.approx(1)
    assert not {'red', 'green', 'blue'} & set(statistics['channel_names'])
    assert len(statistics['channel_names']) == channels
    assert statistics['settings']['mean'] == [0.0] * channels  # none is usual for these
    assert statistics['completeness_gap'] is not None
    with np.load(tmp_path / 'out' / 'a' / 'a_attributions.npz') as arrays:
        assert arrays['attributions'].shape == (channels, 64, 64)
        figure = channels_figure(view_of(dict(arrays)), statistics)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert len(titles) == (1 if channels == 1 else channels + 1)
    assert not any('Red' in title for title in titles)


def test_grey_networks_see_grey_pictures(tmp_path, capsys):
    flags = checkpoint(tmp_path, 1)
    save_image(tmp_path / 'a.png', noise_image())
    arguments = [*flags, '--image_path', str(tmp_path / 'a.png'), '--image_size', '64',
                 '--target', 'image', '--mean', '0.5', '--std', '0.25']  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert 'one channel: pictures are read as grey' in printed.err
    assert 'Red' not in printed.out and 'channel' not in printed.out
    assert statistics_in(tmp_path / 'out')['settings']['mean'] == [0.5]
    expected = np.asarray(Image.fromarray(noise_image()).convert('L'))[:, :, None]
    assert np.array_equal(read_image(tmp_path / 'a.png', 1), expected)


def test_a_wrong_number_of_channels_is_refused(tmp_path, capsys):
    flags = checkpoint(tmp_path, 4)
    picture = save_image(tmp_path / 'a.png', noise_image())
    assert main([*flags, '--image_path', str(picture)]) == 2
    assert 'picture of 3 channels, but the network takes 4' in capsys.readouterr().err
    np.save(tmp_path / 'b.npy', np.zeros((20, 30, 5), np.uint8))
    assert main([*flags, '--image_path', str(tmp_path / 'b.npy')]) == 2
    assert 'shape (20, 30, 5), but the network takes 4 channels' in capsys.readouterr().err
    assert main([*flags, '--image_path', str(picture), '--mean', '0.5', '--std', '0.5']) == 2
    assert 'the network takes 4 channels, but mean has 1 numbers' in capsys.readouterr().err
    ig = IntegratedGradients(load_model(tmp_path / 'm.pth', 'cpu'), 'cpu')
    with pytest.raises(InputError, match='image has 3 channels, but the network takes 4'):
        explain_image(ig, noise_image(), Settings())


def test_a_module_that_does_not_say_its_channels_takes_those_of_the_image():
    class Reversed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = torch.nn.Conv2d(7, 1, 1), torch.nn.Conv2d(5, 7, 1)

        def forward(self, x):
            return self.last(self.first(x))

    ig = IntegratedGradients(Reversed(), 'cpu', step_batch=1)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 5), dtype=np.uint8)
    ((statistics, arrays),) = analyse_image(
        ig, 'a', image, None, Settings(num_steps=2, target='image')
    )
    assert len(statistics['channel_shares']) == len(statistics['channel_names']) == 5
    assert arrays['attributions'].shape[0] == 5


def test_bgr_is_what_the_network_gets():
    pixels = np.arange(4 * 4 * 3, dtype=np.float32).reshape(4, 4, 3)
    rgb, bgr = Preprocessing(4), Preprocessing(4, channel_order='bgr')
    swapped = rgb.normalise(pixels[..., ::-1].copy())
    assert torch.equal(bgr.normalise(pixels), swapped)
    assert np.allclose(bgr.to_pixels(swapped), pixels, atol=1e-4)
    assert bgr.channel_names == ('blue', 'green', 'red')
    # The network sees blue only: so does the map, and its share is called so.
    net = Bands([[1.0, 0.0, 0.0]], [0.0])
    net.preprocessing = Preprocessing(32, channel_order='bgr')
    ig = IntegratedGradients(net, 'cpu', step_batch=1)
    settings = Settings(num_steps=2, target='image')
    ((statistics, _),) = analyse_image(ig, 'a', noise_image(), None, settings)
    assert dict(zip(statistics['channel_names'], statistics['channel_shares'], strict=True)) == {
        'blue': 1.0, 'green': 0.0, 'red': 0.0}  # fmt: skip
    assert 'Blue / green / red share    100.0 %' in statistics_text(statistics)


def test_channel_shares_of_a_batch_are_by_name(tmp_path):
    flags = checkpoint(tmp_path, 3, channel_order='bgr', image_size=64)
    save_image(tmp_path / 'data' / 'a.png', noise_image())
    arguments = ['--mode', 'batch', *flags, '--data_dir', str(tmp_path / 'data'), '--target',
                 'image', '--figures', 'none']  # fmt: skip
    assert main(arguments) == 0
    statistics = statistics_in(tmp_path / 'out')
    assert statistics['channel_names'] == ['blue', 'green', 'red']
    row = read_table(tmp_path / 'out' / 'summary.csv').iloc[0]
    assert row['share_blue'] == pytest.approx(statistics['channel_shares'][0])


# ------------------------------------------------------------------ outputs


SQUARES = torch.full((3, 64, 64), -1.0)


SQUARES[:, 8:56, 8:56] = 0.5  # label 0: 48 x 48


SQUARES[:, 24:40, 24:40] = 3.0  # and label 1 inside it: 16 x 16


INSIDE = Bands([[4.0, 0, 0], [8.0, 0, 0], [0.0, 0, 0]], [0.0, -8.0, -9.0])


def areas(targets, **options) -> dict[str, int]:
    ig = IntegratedGradients(INSIDE, 'cpu', step_batch=1)
    explanations = ig.explain_targets(
        SQUARES, targets, torch.full_like(SQUARES, -1.0), 2, **options
    )
    return {explanation.target: int(explanation.region.sum()) for explanation in explanations}


def test_independent_labels_overlap():
    targets = ['predicted', 'class:0', 'class:1', 'object:1', 'object:2', 'image']
    assert areas(targets, output_kind='multilabel') == {
        'predicted': 48**2, 'class:0': 48**2, 'class:1': 16**2, 'object:1': 48**2,
        'object:2': 16**2, 'image': 64**2}  # fmt: skip
    assert areas(['class:0'])['class:0'] < 64**2 - 16**2 + 1  # exclusive: none where 1 wins
    ig = IntegratedGradients(INSIDE, 'cpu', step_batch=1)
    with pytest.raises(InputError, match='2 objects'):
        ig.explain(SQUARES, 'object:3', output_kind='multilabel')


def test_truth_of_independent_labels_and_scores_of_each():
    ig = IntegratedGradients(INSIDE, 'cpu', Preprocessing(64, mean=(0.0,) * 3, std=(1.0,) * 3), 1)
    truth = np.zeros((64, 64), np.uint8)
    truth[8:56, 8:56] = 1
    explanation = ig.explain(SQUARES, 'truth', num_steps=2, truth=truth, output_kind='multilabel')
    assert int(explanation.region.sum()) == 48**2 and explanation.label_scores.background is None
    label_scores = explanation.label_scores
    assert label_scores.scores[0] == {'dice': 1.0, 'iou': 1.0, 'accuracy': 1.0}
    assert label_scores.scores[1] == {'dice': 0.0, 'iou': 0.0, 'accuracy': None}
    assert 2 not in label_scores.scores
    assert label_scores.pixel_accuracy == pytest.approx(1 - 16**2 / 3 / 64**2)


def test_another_background_class():
    exclusive = areas(['predicted'])['predicted']
    last = areas(['predicted'], background_class=1)['predicted']
    none = areas(['predicted'], background_class='none')['predicted']
    assert (exclusive, last, none) == (16**2, 64**2 - 16**2, 64**2)
    with pytest.raises(InputError, match='background class 7: the network has 3 classes'):
        areas(['predicted'], background_class=7)


def test_two_classes_swapped_show():
    """Every pixel of class 1 is taken for class 2: in the right place, of the wrong class."""
    net = Bands([[0.0] * 3, [0.0] * 3, [1.0] * 3], [0.0, -5.0, 0.0])
    net.preprocessing = Preprocessing(64)
    image, truth = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    image[16:48, 16:48], truth[16:48, 16:48] = 255, 1
    ig = IntegratedGradients(net, 'cpu', step_batch=1)
    settings = Settings(num_steps=2, class_names=('none', 'liver', 'kidney'))
    ((statistics, _),) = analyse_image(ig, 'a', image, truth, settings)
    assert statistics['dice'] == 1 and statistics['pixel_accuracy'] == 0.75
    assert (
        statistics['class_dice'] == 0
        and statistics['class_iou'] == 0
        and statistics['class_accuracy'] == 0
    )
    assert statistics['class_scores']['none'] == {'dice': 1.0, 'iou': 1.0, 'accuracy': 1.0}
    assert statistics['class_scores']['kidney'] == {'dice': 0.0, 'iou': 0.0, 'accuracy': None}
    assert 'liver 0' in statistics_text(statistics)
    names = analyse_image(ig, 'a', image, truth, Settings(num_steps=2), False, {1: 'liver'})
    assert list(names[0][0]['class_scores']) == ['0', 'liver', '2']
    with pytest.raises(InputError, match='class_names gives 2 names, but the network has 3'):
        analyse_image(ig, 'a', image, truth, Settings(num_steps=2, class_names=('a', 'b')))


def test_objects_of_different_classes_do_not_join():
    net = Bands([[0.0] * 3, [1.0, 0, 0], [0.0, 1.0, 0]], [0.5, 0.0, 0.0])
    x = torch.zeros(3, 16, 16)
    x[0, :, :6], x[1, :, 6:10] = 9.0, 9.0  # side by side
    ig = IntegratedGradients(net, 'cpu', step_batch=1)
    explanations = ig.explain_targets(x, ['each-object'], num_steps=2)
    regions = {explanation.target: int(explanation.region.sum()) for explanation in explanations}
    assert list(regions.items()) == [('object:1', 96), ('object:2', 64)]
    assert [explanation.objective.label for explanation in explanations] == [1, 2]
    assert [int(explanation.predicted_mask.sum()) for explanation in explanations] == [96, 64]


def test_speckles_are_no_thousand_folders():
    x = torch.zeros(3, 64, 64)
    x[:, ::2, ::2] = 1.0
    x[:, :8, :8] = 1.0
    ig = IntegratedGradients(Bands([[1.0] * 3], [-1.5]), 'cpu', step_batch=1)
    with pytest.raises(InputError, match=r'1,0\d\d objects, more than 250 \(leave out small ones'):
        ig.explain_targets(x, ['each-object'], num_steps=2)
    (only,) = ig.explain_targets(x, ['each-object'], num_steps=2, min_object_area=5)
    assert int(only.region.sum()) >= 64


def test_a_note_names_numbers_without_a_class():
    ig = IntegratedGradients(INSIDE, 'cpu', step_batch=1)
    truth = np.zeros((64, 64), np.uint8)
    truth[0, 0] = 9
    explanation = ig.explain(SQUARES, 'predicted', num_steps=2, truth=truth)
    assert 'holds 9, for which the network has no class (0 to 2)' in explanation.notes[0]
    assert not ig.explain(SQUARES, 'predicted', num_steps=2, truth=truth * 0).notes


@pytest.mark.parametrize(
    ('stored', 'message'),
    [
        ({'output_kind': 'multi-label'}, "output_kind 'multi-label' makes no sense"),
        ({'background_class': 'last'}, "background_class 'last' makes no sense"),
        ({'background_class': 7}, "background_class '7' makes no sense"),
        ({'class_names': ['a']}, 'class_names "[\'a\']" makes no sense'),
    ],
)
def test_stored_settings_that_make_no_sense_are_left_out_with_a_note(tmp_path, stored, message):
    checkpoint(tmp_path, classes=3, **stored)
    description = load_model(tmp_path / 'm.pth', 'cpu').network_description
    assert any(message in note for note in description.notes)
    assert (description.output_kind, description.background, description.class_names) == (
        EXCLUSIVE,
        0,
        (),
    )


def test_what_is_stored_of_the_outputs_is_used(tmp_path):
    checkpoint(tmp_path, classes=2, output_kind='multilabel', class_names=['a', 'b'])
    description = load_model(tmp_path / 'm.pth', 'cpu').network_description
    assert (description.output_kind, description.class_names, description.notes) == (
        MULTILABEL,
        ('a', 'b'),
        (),
    )
    checkpoint(tmp_path, pixel_range='0-255', mean=[51.0, 102.0, 153.0], std=[255.0] * 3)
    fit = load_model(tmp_path / 'm.pth', 'cpu').preprocessing
    assert fit.mean == pytest.approx((0.2, 0.4, 0.6)) and fit.std == (1.0, 1.0, 1.0)


def test_mean_and_std_go_together_and_fit_the_range(tmp_path):
    checkpoint(tmp_path)
    model = load_model(tmp_path / 'm.pth', 'cpu')
    with pytest.raises(InputError, match='go together'):
        input_preprocessing(model, Settings(mean=(0.5,) * 3))
    high = Settings(mean=(123.0, 117.0, 104.0), std=(58.0, 57.0, 57.0))
    with pytest.raises(InputError, match='cannot be of pixels from 0 to 1'):
        input_preprocessing(model, high)


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('decoder_interpolaton', 'unet has no option "decoder_interpolaton"; did you mean '
         'decoder_interpolation'),
        ('foo', 'unet has no option "foo"'),
        ('classes', '"classes" is read off the weights'),
    ],
)  # fmt: skip
def test_options_that_smp_would_ignore_are_refused(tmp_path, option, message):
    checkpoint(tmp_path)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / 'm.pth', 'cpu', model_options={option: 3})


# ------------------------------------------------------------------ probabilities


class Activated(torch.nn.Module):
    def __init__(self, network, activation):
        super().__init__()
        self.network, self.activation = network, activation

    def forward(self, x):
        return self.activation(self.network(x))


ONE = Bands([[0.5, 0.2, -0.3]], [0.1])


SEVERAL = Bands([[0.5, 0.2, -0.3], [-0.2, 0.1, 0.4], [0.1, 0.1, 0.1]], [0.1, 0.0, -0.1])


@pytest.mark.parametrize(
    ('network', 'activation', 'kind'),
    [
        (ONE, torch.sigmoid, FOREGROUND),
        (SEVERAL, torch.nn.Softmax(dim=1), EXCLUSIVE),
        (SEVERAL, torch.sigmoid, MULTILABEL),
        (ONE, torch.nn.Identity(), None),
        (ONE, torch.tanh, None),
        (ONE, lambda v: v * 0 + 0.5, None),  # constant outputs show nothing
    ],
)
def test_probabilities_are_recognised_and_explained_as_logits(network, activation, kind):
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    net = Activated(network, activation)
    assert probability_kind(net, x) == kind
    if kind is None:
        return
    ig = IntegratedGradients(net, 'cpu', step_batch=1)
    explanation = ig.explain(x[0], 'pixel:3,4', torch.zeros_like(x), num_steps=2)
    as_logits = IntegratedGradients(network, 'cpu', step_batch=1)
    expected = as_logits.explain(
        x[0], 'pixel:3,4', torch.zeros_like(x), num_steps=2,
        output_kind=None if kind == FOREGROUND else kind)  # fmt: skip
    assert torch.equal(explanation.predicted_mask, expected.predicted_mask)
    torch.testing.assert_close(explanation.prediction, expected.prediction, rtol=1e-4, atol=1e-6)
    assert kind in explanation.notes[0] and not expected.notes
    if kind != EXCLUSIVE:  # log(p) differs from the logit by what the softmax divides by
        assert explanation.score == pytest.approx(expected.score, rel=1e-4)
        assert relative_error(explanation.attributions, expected.attributions) < 1e-3
    chance = ig.explain(x[0], 'pixel:3,4', torch.zeros_like(x), 2, score='probability')
    label = int(network(x)[0, :, 4, 3].argmax())
    assert chance.score == pytest.approx(float(net(x)[0, label, 4, 3].detach()), rel=1e-4)
    assert chance.map_error is None or chance.map_error < 1


def test_what_the_user_says_of_the_outputs_wins():
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    ig = IntegratedGradients(Activated(ONE, torch.sigmoid), 'cpu', step_batch=1)
    taken = ig.explain(x, 'image', outputs='logits', num_steps=2)
    assert 0 < taken.score < 1 and not taken.notes
    assert ig.explain(x, 'image', num_steps=2).notes  # and back
    with pytest.raises(InputError, match='the network gives values beyond 0-1'):
        IntegratedGradients(ONE, 'cpu').explain(x, 'image', outputs='probabilities')


def test_logits_of_probabilities_by_hand():
    chances = torch.tensor([[[[0.25]], [[0.75]]]])
    net = torch.nn.Identity()
    assert LogitsOf(net, EXCLUSIVE)(chances).softmax(dim=1).flatten().tolist() == pytest.approx(
        [0.25, 0.75])  # fmt: skip
    probabilities = LogitsOf(net, MULTILABEL)(chances).sigmoid().flatten().tolist()
    assert probabilities == pytest.approx([0.25, 0.75])
    assert bool(torch.isfinite(LogitsOf(net, EXCLUSIVE)(torch.zeros(1, 2, 1, 1))).all())


# ------------------------------------------------------------------ sizes


def test_oblong_inputs(tmp_path):
    flags = checkpoint(tmp_path)
    save_image(tmp_path / 'a.png', noise_image(50, 100))
    save_image(tmp_path / 'a_mask.png', 255 * square_mask(50, 100))
    arguments = [*flags, '--image_path', str(tmp_path / 'a.png'), '--image_size', '60x120',
                 '--target', 'truth', '--resize', 'letterbox']  # fmt: skip
    assert main(arguments) == 0
    statistics = statistics_in(tmp_path / 'out')
    assert statistics['settings']['image_size'] == [64, 128]  # multiples of 32
    with np.load(tmp_path / 'out' / 'a' / 'a_attributions.npz') as arrays:
        assert arrays['attributions'].shape == (3, 64, 128)
        assert arrays['content'].tolist() == [0, 0, 64, 128]
    model = load_model(tmp_path / 'm.pth', 'cpu')
    fit = input_preprocessing(model, Settings(image_size='60x120'))
    ig = IntegratedGradients(model, 'cpu', fit, 1)
    x = fit.normalise(fit.resize_image(noise_image(50, 100)))
    assert x.shape == (1, 3, 64, 128)
    explanation = ig.explain(x, 'image', num_steps=4, rule='midpoint')
    reference = plain_map(model, x, fit.normalise(np.zeros((64, 128, 3))), explanation.objective, 4)
    assert relative_error(explanation.attributions, torch.from_numpy(reference)) < 1e-4


def test_oblong_size_is_stored(tmp_path):
    checkpoint(tmp_path, image_size=(64, 96))
    assert load_model(tmp_path / 'm.pth', 'cpu').preprocessing.image_size == (64, 96)
    checkpoint(tmp_path, image_size=(64, 64))
    assert load_model(tmp_path / 'm.pth', 'cpu').preprocessing.image_size == 64


# ------------------------------------------------------------------ devices without float64


class WithoutFloat64(torch.Tensor):
    """A tensor of a device that has no float64, as MPS: so is whatever is computed from it, until
    it comes to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, WithoutFloat64) and result.dtype == torch.float64:
            raise TypeError('this device has no float64')
        return result


def test_the_whole_path_runs_without_float64_on_the_device(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = smp.Unet('mobilenet_v2', encoder_weights=None, classes=3, **OPTIONS)
    for module in net.modules():  # what a subclass wraps must not be changed in place
        if hasattr(module, 'inplace'):
            module.inplace = False
    net.preprocessing = Preprocessing(32)
    ig = IntegratedGradients(net, 'cpu', step_batch=1)
    with pytest.raises(TypeError, match='no float64'):
        torch.zeros(2).as_subclass(WithoutFloat64).double()
    on_device = NetworkFacts.checked
    monkeypatch.setattr(
        NetworkFacts, 'checked',
        lambda self, tensor: on_device(self, tensor).as_subclass(WithoutFloat64))  # fmt: skip
    settings = Settings(
        tolerance=0.5, max_steps=5, target='predicted class:1 truth', evaluate='quick',
        min_object_area=2, precision='bfloat16')  # fmt: skip
    truth = square_mask() * 2
    described = analyse_image(ig, 'a', noise_image(), truth, settings)
    gaps = [statistics['completeness_gap'] for statistics, _ in described]
    assert gaps and None not in gaps
    for statistics, arrays in described:
        assert attribution_figure(view_of(arrays), statistics)
