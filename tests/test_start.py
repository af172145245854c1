"""What is imported, and when: nobody waits for a library that is not needed yet."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from igseg import program
from igseg.start import _Compiler

SLOW = ('torch', 'torchvision', 'segmentation_models_pytorch', 'timm', 'matplotlib', 'pandas',
        'scipy', 'skimage', 'sympy', 'jinja2', 'loky', 'tifffile', 'pyarrow', 'pydicom',
        'nibabel')  # fmt: skip

# Rooms that read pictures, draw, write, or are needed for the command line: without torch.
ROOMS = [
    *(f'igseg.{name}' for name in ('errors', 'program', 'setting', 'maps', 'explanation',
                                   'preprocessing', 'statistics')),
    *(f'igseg.{folder}.{path.stem}' for folder in ('data', 'results')
      for path in sorted((ROOT / 'igseg' / folder).glob('*.py')) if path.stem != '__init__'),
    *(f'igseg.{name}' for name in ('network.kinds', 'method.choice', 'method.rules',
                                   'checks.effort', 'checks.verdict', 'settings', 'analysis.job',
                                   'analysis.summary', 'command_line', 'start')),
]  # fmt: skip
THAT_DRAW = ('igseg.results.fonts', 'igseg.results.sheet', 'igseg.results.figures')


def run(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, input=''
    )


def slow_libraries(importtime: str) -> set[str]:
    """The slow libraries among the modules that `python -X importtime` names."""
    modules = re.findall(r'^import time:.*\| +([\w.]+)$', importtime, re.MULTILINE)
    assert 'argparse' in modules  # the text is what it is taken for
    return {module.partition('.')[0] for module in modules} & set(SLOW)


MODEL, IMAGE = ('--model_path', 'demo/demo_model.pth'), ('--image_path', 'demo/README.md')
USAGE = {
    'an unknown flag': ([*MODEL, '--steps', '5'], 'unrecognized arguments'),
    'no model': ([], '--model_path'),
    'an unknown choice': ([*MODEL, '--mode', 'both'], "'single', 'batch'"),
    'no number': ([*MODEL, *IMAGE, '--num_steps', 'many'], '"many" is not a whole number'),
    'a number out of range': ([*MODEL, *IMAGE, '--tolerance', '-1'], 'tolerance must be above 0'),
    'an unknown target': ([*MODEL, *IMAGE, '--target', 'lesion'], 'target "lesion"'),
    'an unknown baseline': ([*MODEL, *IMAGE, '--baseline', 'grey'], 'unknown baseline "grey"'),
    'an unknown method': ([*MODEL, *IMAGE, '--method', 'shap'], 'shap'),
    'an unknown device': ([*MODEL, *IMAGE, '--device', 'gpu'], 'unknown device "gpu"'),
    'flags that exclude each other': (
        [*MODEL, *IMAGE, '--crop', '0,0,9,9', '--tile', '64'], 'not allowed with argument --crop'),
    'no image': ([*MODEL], '--mode single needs --image_path'),
    'an image that is not there': ([*MODEL, '--image_path', 'no.png'], 'file not found: no.png'),
    'a model that is not there': (['--model_path', 'no.pth', *IMAGE], 'file not found: no.pth'),
    'a dataset that is not there': (
        [*MODEL, '--mode', 'batch', '--data_dir', 'no'], 'data folder not found: no'),
    'a factory that is not there': (
        [*MODEL, *IMAGE, '--model_factory', 'no.py:f'], 'model factory not found: no.py'),
    'an option that is none': (
        [*MODEL, *IMAGE, '--model_option', 'stride'], '"stride" is not of the form NAME=VALUE'),
}  # fmt: skip


ARGUMENTS = {error: arguments for error, (arguments, _) in USAGE.items()}


@pytest.fixture(scope='module')
def answers() -> dict[str, list]:
    """Of each error of usage the exit status, what is printed, and which slow libraries were
    imported until then: all in one process."""
    code = f"""
import contextlib, io, json, sys
from igseg.start import answer_first
answers = {{}}
for error, arguments in {ARGUMENTS!r}.items():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            answer_first(arguments)
        except SystemExit as stopped:
            status = stopped.code
        else:
            status = 'not answered'
    answers[error] = [status, said.getvalue(), sorted(set(sys.modules) & set({SLOW!r}))]
print(json.dumps(answers))
"""
    done = run('-c', code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize('error', USAGE)
def test_an_error_of_usage_is_one_sentence_before_any_slow_import(error, answers):
    status, said, imported = answers[error]
    assert (status, said.count('\n'), imported) == (2, 1, [])
    assert said.startswith('error: ') and USAGE[error][1] in said


def test_the_users_module_answers_an_error_of_usage_before_it_imports_torch():
    done = run('-X', 'importtime', 'integrated_gradients.py', '--model_path', 'no.pth')
    assert (done.returncode, done.stdout) == (2, '')
    assert '\nerror: model file not found: no.pth (check --model_path)\n' in done.stderr
    assert slow_libraries(done.stderr) == set()


@pytest.mark.parametrize('file', ['integrated_gradients.py', 'run_integrated_gradients.py'])
def test_help_imports_nothing_slow(file):
    done = run('-X', 'importtime', file, '--help')
    assert done.returncode == 0 and 'usage: ' in done.stdout
    assert slow_libraries(done.stderr) == set()


@pytest.mark.parametrize('script', ['integrated_gradients', 'run_integrated_gradients'])
def test_the_installed_scripts_begin_where_nothing_slow_is_imported(script):
    code = f'import sys, igseg.start; sys.argv[1:] = ["--help"]; igseg.start.{script}()'
    done = run('-X', 'importtime', '-c', code)
    assert done.returncode == 0 and 'usage: ' in done.stdout
    assert slow_libraries(done.stderr) == set()
    scripts = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    assert f'{script.replace("_", "-")} = "igseg.start:{script}"\n' in scripts


def test_the_runner_asks_before_anything_slow_is_imported(tmp_path):
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import run_integrated_gradients as runner
asked = []
def answer(question):
    asked.append([question, sorted(sys.modules)])
    if question.startswith('Interpolation'):
        raise EOFError  # the user leaves at the last question
    return ''
runner.input, sys.stdin = answer, type('Terminal', (), {{'isatty': lambda self: True}})()
status = runner.main([])
print('\\n' + json.dumps([status, asked]))
"""
    done = run('-c', code, cwd=tmp_path)
    status, asked = json.loads(done.stdout.splitlines()[-1])
    assert (status, len(asked)) == (130, 5), done.stderr
    assert [set(modules) & set(SLOW) for _, modules in asked] == [set()] * 5


def test_a_wrong_flag_of_the_runner_is_told_before_its_first_question(tmp_path):
    done = run(str(ROOT / 'run_integrated_gradients.py'), '--num_step', '3', cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert '--num_step' in done.stderr


def test_importing_the_users_module_imports_torch_and_nothing_else_that_is_slow():
    code = (
        'import json, sys\nimport torch\nbefore = set(sys.modules)\nimport integrated_gradients\n'
        'print(json.dumps(sorted(set(sys.modules) - before)))'
    )
    modules = json.loads(run('-c', code).stdout)
    assert 'igseg.engine.engine' in modules
    assert {name.partition('.')[0] for name in modules} & {*SLOW} - {'torch'} == set()
    assert [name for name in modules if name.startswith(('torch._dynamo', 'torch._inductor'))] == []


def loaded_by(rooms: list[str], libraries: tuple[str, ...]) -> dict[str, list[str]]:
    """The libraries that each room brings into a fresh process, in which the rooms are imported
    one after the other."""
    script = (
        'import importlib, json, sys\n'
        'before, brought = set(), {}\n'
        f'for room in {rooms!r}:\n'
        '    importlib.import_module(room)\n'
        f'    now = {{name for name in {libraries!r} if name in sys.modules}}\n'
        '    brought[room], before = sorted(now - before), now\n'
        'print(json.dumps(brought))\n'
    )
    done = run('-c', script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rooms_that_read_draw_and_write_import_nothing_slow():
    rooms = [room for room in ROOMS if room not in THAT_DRAW]
    brought = loaded_by([*rooms, *THAT_DRAW], SLOW)
    drawing = {'matplotlib': {room for room in brought if 'matplotlib' in brought[room]}}
    assert drawing['matplotlib'] <= set(THAT_DRAW)
    assert {library for found in brought.values() for library in found} == {'matplotlib'}


def test_the_packages_that_are_checked_are_those_of_the_requirements():
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    named = [re.match(r'[\w-]+', line)[0] for line in lines if line and not line.startswith('#')]
    assert sorted(program.PACKAGES.values()) == sorted(named)


@pytest.mark.parametrize('file', ['integrated_gradients.py', 'run_integrated_gradients.py'])
def test_without_the_packages_one_sentence_names_the_command_that_installs_them(file):
    done = run('-S', file, '--help')  # without the folder of installed packages
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith('error: torch, ')
    assert done.stderr.endswith('are not installed (run: pip install -r requirements.txt)\n')


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(program, 'PACKAGES', {'torch': 'torch', 'no_such_module': 'no-such-module'})
    monkeypatch.setattr(sys, 'argv', ['integrated_gradients.py'])
    with pytest.raises(SystemExit) as stopped:
        program.check_packages()
    assert stopped.value.code == 2
    said = 'error: no-such-module is not installed (run: pip install -r requirements.txt)\n'
    assert capsys.readouterr().err == said


# ------------------------------------------------------------------ the compiler of PyTorch


COMPILER_LATER = {
    'compile': 'print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())',
    'export': 'print(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)) is None)',
    'deterministic': 'torch.use_deterministic_algorithms(True); import torchvision; '
    'print(torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.ones(1, 4)], 1).shape)',
    'a part of it': 'from torch._dynamo.exc import Unsupported; import torch._dynamo; '
    'assert torch._dynamo.exc.Unsupported is Unsupported; print(Unsupported)',
    'a setting': 'print(torch._dynamo.config.cache_size_limit)',
}


@pytest.mark.parametrize('use', COMPILER_LATER)
def test_the_compiler_is_imported_when_it_is_used(use):
    """A start of the program leaves it out, which saves a second."""
    code = (
        'import sys; from igseg.start import answer_first; '
        f'answer_first([*{MODEL}, "--image_path", "demo/README.md"]); '
        'import torch, segmentation_models_pytorch; '
        'assert not hasattr(sys.modules["torch._dynamo"], "__file__"); '
        f'{COMPILER_LATER[use]}; '
        'assert hasattr(sys.modules["torch._dynamo"], "__file__")'
    )
    done = run('-c', code)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_what_marks_functions_for_the_compiler_leaves_them_as_they_are():
    stand_in = _Compiler('torch._dynamo')
    assert stand_in.disable(run) is stand_in.disable(fn=run) is stand_in.disable(run, True) is run
    assert stand_in.disable(recursive=False)(run) is stand_in.disable()(run) is run


def test_a_whole_command_does_not_import_the_compiler(tmp_path):
    image = ('--image_path', 'demo/Dataset_no_preprocessing/test/colin27_axial_079.jpg')
    done = run('-X', 'importtime', 'integrated_gradients.py', *MODEL, *image, '--image_size', '64',
               '--num_steps', '4', '--target', 'image', '--output_dir', str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'timm' in slow_libraries(done.stderr) and 'torch._dynamo' not in done.stderr
