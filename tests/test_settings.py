"""Settings travel whole: one field makes flag, help, check, record and resume key."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers import noise_image, save_image
from plain_network import FACTORY, WEIGHTS

import integrated_gradients
from igseg.analysis.study import Study
from igseg.checks.verdict import Thresholds
from igseg.data.samples import Sample
from igseg.errors import EmptyTargetError, InputError, attempt
from igseg.preprocessing import IMAGENET_MEAN, Preprocessing
from igseg.results.finished import resume_key
from igseg.settings import OF_AN_EXPLANATION, arguments_of
from integrated_gradients import (
    IntegratedGradients,
    Settings,
    Target,
    analyse_sample,
    build_parser,
    input_preprocessing,
    main,
    settings_from,
)


def test_every_setting_is_a_flag_with_its_default_and_its_meaning():
    actions = {action.dest: action for action in build_parser()._actions}
    for field in fields(Settings):
        known = Settings.table()[field.name]
        assert known.meaning in actions[field.name].help.replace('%%', '%')
        assert actions[field.name].choices == known.choices
    args = build_parser().parse_args(['--model_path', 'm'])
    assert settings_from(args) == Settings()


CHANGED = {
    'step_batch': 2, 'output_kind': 'multilabel', 'background_class': 'none',
    'outputs': 'logits', 'output_map': '0', 'class_names': ('organ', 'vessel'),
    'channel_order': 'bgr',
    'min_object_area': 5, 'image_size': (64, 96), 'resize': 'letterbox', 'normalize': 'none',
    'mean': (0.5, 0.5, 0.25), 'std': (0.5, 0.25, 0.5), 'pixel_range': '0-255',
    'target': ('image', 'pixel:1,2'), 'score': 'probability', 'threshold': 0.25,
    'on_empty': 'image', 'baseline': 'blur', 'baseline_draws': 2, 'seed': 3, 'num_steps': 9,
    'tolerance': 0.5, 'max_steps': 17, 'rule': 'trapezoid', 'precision': 'bfloat16',
    'precision_tolerance': 0.5, 'gap_tolerance': 0.5, 'evaluate': 'quick',
    'thresholds': Thresholds(dice=0.9), 'window': '-160:240', 'frame': 2, 'slice': '1:5',
    'method': ('smooth', 'ig'), 'method_option': ('samples=3', 'noise=0.2'), 'no_multiply': True,
    'segments': 'xrai', 'reference_dir': 'others',
    'crop': (1, 2, 3, 4), 'tile': (64, 96), 'overlap': 8, 'max_pixels': 10,
    'label_map': 'map.txt', 'ignore_label': -1,
}  # fmt: skip


@pytest.mark.parametrize('name', CHANGED)
def test_a_setting_arrives_by_its_flag_and_decides_the_resume_key(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'map.txt').write_text('0 = 0\n7 = 1\n')
    value = CHANGED[name]
    words = {name: list(map(str, CHANGED[name])) for name in ('mean', 'std', 'class_names')}
    words |= {'image_size': ['64x96']}
    words |= {'target': list(CHANGED['target']), 'thresholds': ['dice=0.9']}
    words |= {'crop': ['1,2,3,4'], 'tile': ['64x96']}
    words |= {'method': list(CHANGED['method']), 'no_multiply': []}
    words |= {'method_option': [*CHANGED['method_option'], '--method', 'smooth']}
    own = ['--window=-160:240'] if name == 'window' else [
        f'--{name}', *words.get(name, [str(value)])]  # fmt: skip
    beside = ['--tile', '64'] if name == 'overlap' else []  # which goes with it only
    argv = ['--model_path', 'm', *beside]
    plain = settings_from(build_parser().parse_args(argv))
    settings = settings_from(build_parser().parse_args([*argv, *own]))
    also = {'method': ('smooth',)} if name == 'method_option' else {}
    assert settings == replace(plain, **{name: value}, **also)
    image = noise_image()
    keys = [resume_key(one.record(), image, None) for one in (plain, settings)]
    cost_only = name in ('step_batch', 'thresholds')
    assert (keys[0] == keys[1]) == cost_only
    json.dumps(settings.record(), allow_nan=False)


@pytest.mark.parametrize('name', CHANGED)
def test_settings_find_the_way_back_to_the_flags(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'map.txt').write_text('0 = 0\n7 = 1\n')
    beside = {'overlap': {'tile': 64}, 'method_option': {'method': 'smooth'}}.get(name, {})
    beside |= {'no_multiply': {'method': 'ig'}}.get(name, {})
    settings = Settings(**{**beside, name: CHANGED[name]})
    used = json.loads(json.dumps(settings.record()))  # as a statistics file holds them
    words = arguments_of(used, Settings().record())
    again = settings_from(build_parser().parse_args(['--model_path', 'm', *words]))
    assert again == settings


def test_all_settings_are_tried_above():
    assert CHANGED.keys() == Settings.table().keys()


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        ({'num_steps': 0}, 'num_steps must be a whole number of at least 1'),
        ({'num_steps': 2.5}, 'num_steps must be a whole number'),
        ({'image_size': 10**6}, 'image_size must be at most 16384'),
        ({'threshold': 1.0}, 'threshold must lie between 0 and 1'),
        ({'tolerance': 0}, 'tolerance must be above 0'),
        ({'tolerance': float('nan')}, 'tolerance must be above 0'),
        ({'rule': 'simpson'}, 'unknown rule "simpson"'),
        ({'target': ''}, 'no target is given'),
        ({'target': 'nonsense'}, 'unknown target "nonsense"'),
        ({'target': 'pixel'}, 'not of the form pixel:X,Y'),
        ({'target': ('image', 'each-object:3')}, 'not of the form each-object'),
        ({'evaluate': 'all'}, 'unknown evaluate "all"'),
        ({'rule': 'gauss-kronrod', 'num_steps': 50}, '3, 7, 15, 31, 63 steps'),
        ({'mean': ()}, 'mean must be numbers'),
        ({'image_size': '64x'}, 'image_size must be a whole number of at least 1, or HEIGHTxWIDTH'),
        ({'image_size': (64, 64, 3)}, 'image_size must be a whole number'),
        ({'image_size': 64.5}, 'image_size must be a whole number'),
        ({'background_class': 'last'}, 'background_class must be a class, from 0, or none'),
        ({'background_class': -1}, 'background_class must be a class'),
        ({'class_names': ('a', 'a')}, 'class_names must be different names'),
        ({'score': None}, 'unknown score "None"'),
        ({'rule': None}, 'unknown rule'),
        ({'threshold': None}, 'threshold must lie between'),
        ({'threshold': '0.5'}, 'threshold must lie between'),
        ({'tolerance': float('inf')}, 'tolerance must be above 0'),
        ({'num_steps': True}, 'num_steps must be a whole number'),
        ({'num_steps': 10**20}, 'num_steps must be at most 100000'),
        ({'seed': -1}, 'seed must be a whole number of at least 0'),
        ({'seed': 'x'}, 'seed must be a whole number'),
        ({'target': 5}, 'target must be text'),
        ({'target': 'pixel:1'}, 'not of the form pixel:X,Y'),
        ({'target': 'object:0'}, 'not of the form object:K'),
        ({'target': 'class:-1'}, 'not of the form class:K'),
        ({'baseline': 'nonsense'}, 'unknown baseline "nonsense"'),
        ({'thresholds': {'dice': 1}}, 'of class Thresholds'),
        ({'mean': 0.5}, 'mean must be numbers'),
        ({'std': (1.0, 0.0, 1.0)}, 'std must be numbers above 0'),
        ({'mean': (float('nan'),) * 3}, 'mean must be numbers'),
        ({'window': '5'}, 'neither LOW:HIGH'),
        ({'window': '5:1'}, 'neither LOW:HIGH'),
        ({'window': 'nan:1'}, 'neither LOW:HIGH'),
        ({'slice': '3:1'}, 'not of the form AXIS:INDEX'),
        ({'crop': (0, 0, 0, 5)}, 'crop must be X,Y,WIDTH,HEIGHT'),
        ({'crop': 'all'}, 'crop must be X,Y,WIDTH,HEIGHT'),
        ({'ignore_label': 'x'}, 'ignore_label must be a whole number'),
        ({'method': 'nonsense'}, 'unknown method "nonsense" .choose from ig'),
        ({'method': 'ig:encoder'}, 'not of the form ig'),
        ({'method': ('ig', 'ig')}, 'must name different methods'),
        ({'method': ()}, 'must name different methods'),
        ({'method': 5}, 'method must be text'),
        ({'method_option': ('samples=3',)}, 'unknown option "samples" .ig has no options'),
        ({'method': 'smooth', 'method_option': ('samples',)}, 'lacks its =VALUE'),
        (
            {'method': 'smooth', 'method_option': ('samples=0',)},
            'at least 1 .smooth has samples=8',
        ),
        ({'method': 'smooth', 'method_option': ('noise=x',)}, 'noise is no number: "x"'),
        ({'method': 'smooth', 'method_option': {'kind': 'best'}}, 'unknown kind "best"'),
        ({'method_option': 5}, 'method_option must be NAME=VALUE'),
        ({'no_multiply': 'no'}, 'no_multiply must be True or False'),
        ({'no_multiply': True, 'method': 'gradient'}, '--no_multiply goes with ig, '),
        ({'tolerance': 0.1, 'method': 'gradient'}, '--tolerance goes with methods whose error'),
        ({'precision': 'bfloat16', 'method': 'gradient'}, '--precision goes with methods'),
        ({'label_map': 'no such file'}, 'label map file not found'),
    ],
)
def test_values_that_make_no_sense(wrong, said):
    with pytest.raises(InputError, match=said):
        Settings(**wrong)


def test_numbers_of_numpy_become_pythons_own():
    found = Settings(num_steps=np.int64(5), threshold=np.float32(0.5), seed=np.int64(3))
    assert [type(getattr(found, n)) for n in ('num_steps', 'threshold', 'seed')] == [
        int, float, int,
    ]  # fmt: skip
    json.dumps(found.record())


def test_targets_may_be_given_as_text():
    assert Settings(target='image truth').target == ('image', 'truth')
    assert Settings(target='image truth').record()['target'] == 'image truth'
    assert not Settings().question.several_targets
    each = Settings(target='each-object').question
    assert each.several_targets and each.possible_first_targets == ('object:1', 'image')


def test_flags_must_be_written_in_full(capsys):
    with pytest.raises(SystemExit) as ended:
        main(['--model_path', 'm', '--image_path', 'a.png', '--step', '50'])
    assert ended.value.code == 2
    assert 'unrecognized arguments: --step 50' in capsys.readouterr().err


def test_an_option_that_explains_nothing_is_refused():
    ig = IntegratedGradients(torch.nn.Conv2d(3, 1, 1), 'cpu')
    x = torch.ones(3, 8, 8)
    for name in ('image_size', 'evaluate', 'steps', 'segments', 'gap_tolerance'):
        with pytest.raises(TypeError, match=name):
            ig.explain(x, 'image', **{name: None})
    assert {'image_size', 'evaluate', 'thresholds'}.isdisjoint(OF_AN_EXPLANATION)


def test_the_order_of_precedence_of_preprocessing():
    """Flag, stored with the checkpoint, default."""
    net = torch.nn.Conv2d(3, 1, 1)

    def used(**settings) -> Preprocessing:
        return input_preprocessing(net, Settings(**settings))

    assert used() == Preprocessing()
    net.preprocessing = Preprocessing(96, 'letterbox', (0.5,) * 3, (0.25,) * 3)
    assert used() == net.preprocessing
    assert used(resize='stretch', image_size=64).resize == 'stretch'
    assert used(mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)
    assert used(mean=(0.1, 0.2, 0.3)).std == (0.25,) * 3
    assert used(normalize='imagenet').mean == IMAGENET_MEAN


def test_pixels_from_0_to_255():
    net = torch.nn.Conv2d(3, 1, 1)
    pixels = noise_image(32, 32)
    plain = input_preprocessing(net, Settings(pixel_range='0-255', image_size=32))
    torch.testing.assert_close(plain.normalise(pixels)[0, 0], torch.tensor(pixels[..., 0]).float())
    settings = Settings(pixel_range='0-255', image_size=32, mean=(120.0,) * 3, std=(60.0,) * 3)
    expected = (torch.tensor(pixels[..., 1]).float() - 120) / 60
    found = input_preprocessing(net, settings).normalise(pixels)[0, 1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ targets


def blobs() -> IntegratedGradients:
    """A network that predicts where red is bright."""
    conv = torch.nn.Conv2d(3, 1, 1)
    torch.nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0] = 1
    torch.nn.init.constant_(conv.bias, -0.5)
    return IntegratedGradients(conv, 'cpu')


def test_each_object_is_a_target_that_expands_itself():
    x = torch.zeros(3, 16, 16)
    x[0, 1:5, 1:5], x[0, 8:10, 8:10] = 1, 1
    found = blobs().explain_targets(x, ['each-object', 'image'], num_steps=2)
    assert [one.target for one in found] == ['object:1', 'object:2', 'image']
    assert [int(one.region.sum()) for one in found] == [16, 4, 256]
    with pytest.raises(InputError, match='has 0 objects'):
        blobs().explain_targets(torch.zeros(3, 16, 16), ['each-object'], num_steps=2)


def test_the_whole_image_stands_in_where_all_are_empty():
    x = torch.zeros(3, 16, 16)
    with pytest.raises(EmptyTargetError):
        blobs().explain(x, num_steps=2)
    found = blobs().explain(x, num_steps=2, on_empty='image')
    assert found.target == 'image'
    assert found.cost.forward_passes == 3  # the prediction, and both ends of the path


def test_a_target_carries_its_class():
    net = torch.nn.Conv2d(3, 3, 1)
    x = torch.rand(3, 16, 16)
    ig = IntegratedGradients(net, 'cpu')
    labels = net(x[None]).argmax(dim=1)[0]
    label = int(labels[0, 0])
    found = ig.explain(x, f'class:{label}', num_steps=2)
    assert found.objective.label == label
    assert torch.equal(found.predicted_mask, labels == label)
    named = Target(f'class:{label}', found.objective.weights)  # a name alone says nothing
    assert torch.equal(ig.explain(x, named, num_steps=2).predicted_mask, labels != 0)


# ------------------------------------------------------------------ finished images, errors


def test_new_thresholds_are_recorded_also_where_they_change_no_verdict(tmp_path):
    model = integrated_gradients.load_model(WEIGHTS, 'cpu', model_factory=FACTORY)
    settings = Settings(target='image', num_steps=2, image_size=32)
    ig = IntegratedGradients(
        model, 'cpu', integrated_gradients.input_preprocessing(model, settings)
    )
    sample = Sample('a', save_image(tmp_path / 'a.png', noise_image()))
    (first,) = analyse_sample(ig, sample, settings, tmp_path / 'out', figures='none')
    changed = replace(settings, thresholds=Thresholds(padding_excess=7.0))  # nothing is padded
    (again,) = analyse_sample(ig, sample, changed, tmp_path / 'out', figures='none')
    assert again['verdict'] == first['verdict'] and again['seconds'] == first['seconds']
    path = tmp_path / 'out' / 'a' / 'a_statistics.json'
    assert json.loads(path.read_text())['settings']['thresholds']['padding_excess'] == 7.0


def test_a_baseline_file_counts_by_its_content(tmp_path):
    model = integrated_gradients.load_model(WEIGHTS, 'cpu', model_factory=FACTORY)
    ig = IntegratedGradients(model, 'cpu')
    path = save_image(tmp_path / 'healthy.png', noise_image())
    settings = Settings(baseline=str(path))
    records = [Study.of(ig, settings).record]
    save_image(path, noise_image(seed=1))
    records.append(Study.of(ig, settings).record)
    assert records[0]['baseline_sha256'] != records[1]['baseline_sha256']
    assert 'baseline_sha256' not in Study.of(ig, Settings()).record


@pytest.mark.parametrize('damage', [
    lambda s: s.pop('targets'), lambda s: s.pop('dice'), lambda s: s.update(targets=[]),
    lambda s: s.update(dice='good'), lambda s: s.update(settings=None),
    lambda s: s.update(folder='../../x'), lambda s: s.update(score=float('nan')),
])  # fmt: skip
def test_damaged_statistics_are_computed_again(tmp_path, damage):
    model = integrated_gradients.load_model(WEIGHTS, 'cpu', model_factory=FACTORY)
    settings = Settings(target='image', num_steps=2, image_size=32)
    fit = integrated_gradients.input_preprocessing(model, settings)
    ig = IntegratedGradients(model, 'cpu', fit)
    sample = Sample('a', save_image(tmp_path / 'a.png', noise_image()))
    (first,) = analyse_sample(ig, sample, settings, str(tmp_path / 'out'), figures='none')
    path = tmp_path / 'out' / 'a' / 'a_statistics.json'
    damaged = dict(first)
    damage(damaged)
    path.write_text(json.dumps(damaged))
    (again,) = analyse_sample(ig, sample, settings, tmp_path / 'out', figures='none')
    assert again['score'] == first['score'] and again['seconds'] != first['seconds']
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_an_attempt_that_fails_keeps_nothing_alive():
    kept = []

    def work():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        raise InputError('too bad')

    gc.disable()
    try:
        assert attempt(work, InputError) == (None, 'too bad')
        assert kept[0]() is None
    finally:
        gc.enable()
    assert attempt(lambda: 3, InputError) == (3, None)
    with pytest.raises(KeyError):
        attempt(lambda: {}[1], InputError)
