"""How the program is started: printed commands are right from the checkout and when installed."""

import sys
from pathlib import Path

import pytest

import run_integrated_gradients as runner
from igseg import program
from igseg.settings import reproducing_command
from integrated_gradients import build_parser


@pytest.fixture(params=['checkout', 'script', 'wheel'])
def started(request, monkeypatch) -> str:
    """The program started as the file of the checkout, as a script that is installed from the
    checkout, and as one of a wheel."""
    files = {'checkout': '/work/integrated_gradients.py', 'script': '/bin/integrated-gradients',
             'wheel': '/bin/python'}  # fmt: skip
    monkeypatch.setattr(sys, 'argv', [files[request.param]])
    monkeypatch.setattr(program, 'is_checkout', lambda: request.param != 'wheel')
    return request.param


def test_a_command_that_explains_an_image_again_is_one_that_the_user_has(started):
    statistics = {'settings': {'model_path': 'a.pth'}, 'image_path': 'b.png'}
    said = reproducing_command(statistics, {})
    name = 'python integrated_gradients.py' if started == 'checkout' else 'integrated-gradients'
    assert said == f'{name} --model_path a.pth --image_path b.png'


def test_errors_and_help_name_the_command_that_the_user_has(started, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(['--mode', 'both'])
    name = 'integrated_gradients.py' if started == 'checkout' else 'integrated-gradients'
    assert capsys.readouterr().err.endswith(f'(see {name} --help)\n')
    assert build_parser().format_help().startswith(f'usage: {name} ')


def test_what_must_be_installed_is_named_as_the_user_can_install_it(started):
    command = program.install_command('medical')
    file, extra = 'pip install -r requirements-medical.txt', 'segmentation[medical]'
    assert command == file if started == 'checkout' else extra in command


def test_the_runners_help_names_the_commands_that_the_user_has(started, capsys):
    with pytest.raises(SystemExit):
        runner.main(['--help'])
    said = capsys.readouterr().out
    files = 'run_integrated_gradients.py' in said, 'of `integrated_gradients.py`' in said
    scripts = ' run-integrated-gradients' in said, 'of `integrated-gradients`' in said
    assert (files, scripts) == ((True,) * 2, (False,) * 2)[:: 1 if started == 'checkout' else -1]


def test_without_a_model_and_without_the_demo_one_sentence_says_where_it_is(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, 'DEMO_MODEL', Path('demo/demo_model.pth'))
    assert runner.main(['--yes']) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count('\n') == 1
    assert 'it lies in the folder demo/ of the project' in said.err
