"""The page: what it holds."""

from __future__ import annotations

import json
import re
import shlex
from urllib.parse import unquote

import pytest
from helpers import EVIL, PLAIN_BATCH, noise_image, save_image

from igseg.settings import reproducing_command
from igseg.statistics import counts_text, shown, span_text
from integrated_gradients import Settings, build_parser, main


def test_the_page_stands_alone(batch):
    text = (batch / 'index.html').read_text(encoding='utf-8')
    assert not re.search(r'(src|href)="?(https?:)?//', text)
    assert EVIL not in text
    linked = set(re.findall(r'src="([^"]+\.png)"', text))
    assert len(linked) == 3 + 1  # thumbnails and the summary
    assert all((batch / unquote(link)).is_file() for link in linked)


def test_the_page_holds_curves_profile_settings_and_versions(batch):
    text = (batch / 'index.html').read_text(encoding='utf-8')
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data) == 3
    for entry in data:
        assert len(entry['curves']) == 12 and entry['profile'] and entry['stages']
        assert len(entry['baselines']) in (0, 1, 3, 6)  # pairs of those that show the target
        assert entry['settings']['evaluate'] == 'full' and entry['versions']['torch']


def test_the_command_on_the_page_gives_the_same_settings(batch):
    text = (batch / 'index.html').read_text(encoding='utf-8')
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    words = shlex.split(data[0]['command'])
    assert words[:2] == ['python', 'integrated_gradients.py']
    args = build_parser().parse_args(words[2:])
    assert (args.target, args.num_steps, args.image_size) == (['truth'], 4, '64')
    assert (args.evaluate, args.thresholds) == ('full', ['dice=0.9'])
    assert args.image_path.is_file() and args.model_path.is_file()


@pytest.mark.parametrize(
    ('changed', 'words'),
    [
        ({}, []),
        ({'target': 'each-object'}, ['--each_object']),
        ({'target': 'object:1 object:2'}, ['--target', 'object:1', 'object:2']),
        ({'tolerance': 0.1}, ['--tolerance', '0.1']),
        ({'no_multiply': True}, ['--no_multiply']),
        ({'baseline': 'my image.png'}, ['--baseline', 'my image.png']),
    ],
)
def test_commands_say_what_differs_from_the_defaults(changed, words):
    defaults = Settings().record()
    statistics = {'image_path': 'a.png', 'settings': {**defaults, 'model_path': 'm', **changed}}
    command = shlex.split(reproducing_command(statistics, defaults))
    assert command[6:] == words
    build_parser().parse_args(command[2:])


def test_what_differs_between_images_is_counted():
    assert (
        counts_text(['zero', 'zero']) == 'zero' and counts_text(['a', 'b', 'b']) == 'b (2), a (1)'
    )
    assert counts_text(list('abcda')) == 'a (2), b (1), c (1), …'
    assert span_text([7]) == span_text([7, 7]) == '7' and span_text([9, 3, 5]) == '3 to 9'


def test_figures_as_text():
    assert shown('completeness_gap', 0.0123) == '1.23 %'
    assert shown('dice', 0.81234) == '0.812' and shown('dice', None) == 'n/a'


def test_methods_stand_side_by_side_with_their_checks(tmp_path):
    methods = ['ig', 'gradient', 'occlusion']
    for number in range(2):
        save_image(tmp_path / 'data' / f'a{number}.png', noise_image(40, 60, number))
    arguments = [*PLAIN_BATCH, '--data_dir', str(tmp_path / 'data'), '--output_dir',
                 str(tmp_path / 'results'), '--image_size', '64', '--evaluate', 'quick',
                 '--figures', 'png', '--method', *methods]  # fmt: skip
    assert main(arguments) == 0
    text = (tmp_path / 'results' / 'index.html').read_text(encoding='utf-8')
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert [entry['of'] for entry in data] == [f'image, {method}' for method in methods] * 2
    for entry in data:
        figure = unquote(entry['files']['methods'])
        assert figure.startswith(entry['name']) and (tmp_path / 'results' / figure).is_file()
        beside = entry['beside']
        assert [row[0] for row in beside['rows']] == methods
        gap, margin = (beside['headings'].index(name) for name in ('gap', 'deletion margin'))
        assert [row[gap] == 'n/a' for row in beside['rows']] == [False, True, True]
        assert all(row[margin] != '' for row in beside['rows'])
        assert all(len(row) == len(beside['headings']) for row in beside['rows'])


def test_one_method_has_nothing_beside_it(batch):
    text = (batch / 'index.html').read_text(encoding='utf-8')
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data) == 3
    for entry in data:
        assert entry['beside'] is None and 'methods' not in entry['files']
        assert entry['of'] == 'truth'
