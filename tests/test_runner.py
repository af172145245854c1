"""The prompting runner, answered through a pseudo-terminal."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
from helpers import DEMO_DATA, DEMO_IMAGE, DEMO_MODEL, PATIENCE, ROOT

import run_integrated_gradients as runner

FAST = ['--image_size', '128', '--device', 'cpu']
COMMAND = [sys.executable, str(ROOT / 'run_integrated_gradients.py'), *FAST, '--figures', 'png']
NAME = DEMO_IMAGE.stem


def converse(answers: list[tuple[str, str]], cwd) -> tuple[int, str]:
    """Run the runner on a terminal; wait for each prompt and type its answer."""
    master, slave = pty.openpty()
    process = subprocess.Popen(COMMAND, cwd=cwd, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen, waiting, deadline = '', list(answers), time.monotonic() + PATIENCE
    since = 0  # the prompt is looked for only in what came after the last answer
    while time.monotonic() < deadline:
        if waiting and waiting[0][0] in seen[since:]:
            since = len(seen)
            os.write(master, waiting.pop(0)[1].encode() + b'\n')
        if select.select([master], [], [], 0.2)[0]:
            try:
                seen += os.read(master, 4096).decode(errors='replace')
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(master)
    assert not waiting, f'never asked {waiting[0][0]!r}; saw: {seen}'
    return process.wait(timeout=PATIENCE), seen


def test_enter_everywhere_runs_the_demo(tmp_path):
    prompts = ['Run the bundled demo', '1 one image', 'Image [', 'Baseline', 'Interpolation steps']
    answers = [(prompt, '') for prompt in prompts]
    answers[-1] = ('Interpolation steps', '3')
    status, seen = converse(answers, tmp_path)
    assert status == 0, seen
    assert 'No model found (models_20250609_105424/best_model.pth' in seen
    results = tmp_path / 'integrated_gradients_results' / NAME
    assert (results / f'{NAME}_attribution.png').is_file()
    assert 'adaptive rule, 3 steps' in seen


def answering(answers: list[tuple[str, str]], monkeypatch) -> list[str]:
    """Have the runner, in this process, think that a user at a terminal gives these answers, each
    to a question that holds its first word; gives the questions that were asked."""
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        expected, given = answers.pop(0)
        assert expected in question
        return given

    monkeypatch.setattr('builtins.input', answer)
    monkeypatch.setattr('sys.stdin.isatty', lambda: True, raising=False)
    return asked


def test_a_batch_on_the_users_own_model_and_data(tmp_path, monkeypatch, capsys):
    model = tmp_path / 'models_20250609_105424' / 'best_model.pth'
    model.parent.mkdir()
    shutil.copy(DEMO_MODEL, model)
    data = tmp_path / 'Dataset_no_preprocessing' / 'test'
    data.mkdir(parents=True)
    for name in (NAME, 'colin27_axial_081'):
        shutil.copy(DEMO_DATA / 'test' / f'{name}.jpg', data)
    answers = [('Data folder', ''), ('1 one image', '7'), ('1 one image', '2'),
               ('How many', 'all'), ('Baseline', 'blur'), ('Interpolation steps', '2')]  # fmt: skip
    answering(answers, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert runner.main([*FAST, '--figures', 'none']) == 0 and not answers
    said = capsys.readouterr().out
    assert 'Model: models_20250609_105424/best_model.pth' in said and 'Please answer 1, 2' in said
    assert (tmp_path / 'integrated_gradients_results' / 'summary.csv').is_file()


def test_declining_the_demo_and_bad_answers_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answering([('Run the bundled demo', 'n')], monkeypatch)
    assert runner.main(FAST) == 2
    assert 'error: nothing to run' in capsys.readouterr().err
    prompts = ['Run the bundled', '1 one image', 'Image [', 'Baseline']
    answers = [*((prompt, '') for prompt in prompts), ('Interpolation steps', 'many')]
    answering(answers, monkeypatch)
    with pytest.raises(SystemExit) as ended:  # argparse's own way out
        runner.main(FAST)
    assert ended.value.code == 2
    assert '"many" is not a whole number' in capsys.readouterr().err


def test_unattended_without_a_terminal(tmp_path):
    done = subprocess.run(
        [*COMMAND, '--num_steps', '2'], cwd=tmp_path, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'Attribution ratio' in done.stdout
    assert (tmp_path / 'integrated_gradients_results' / NAME).is_dir()


def test_unattended_with_yes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('builtins.input', lambda question: pytest.fail(f'asked: {question}'))
    assert runner.main([*FAST, '--yes', '--num_steps', '2', '--figures', 'none']) == 0
    assert 'Attribution ratio' in capsys.readouterr().out
    assert (tmp_path / 'integrated_gradients_results' / NAME).is_dir()


def test_missing_data_is_told(tmp_path, monkeypatch, capsys):
    model = tmp_path / 'models_a' / 'best_model.pth'
    model.parent.mkdir()
    shutil.copy(DEMO_MODEL, model)
    monkeypatch.chdir(tmp_path)
    assert runner.main([*FAST, '--yes']) == 2
    assert 'data folder not found: Dataset_no_preprocessing' in capsys.readouterr().err


def test_newest_model_comes_first(tmp_path):
    for age, name in enumerate(('models_c', 'models_a', 'models_b')):
        path = tmp_path / name / 'best_model.pth'
        path.parent.mkdir()
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    found = [path.parent.name for path in runner.find_models(tmp_path)]
    assert found == ['models_c', 'models_a', 'models_b']


def test_help_names_the_documented_paths(capsys):
    with pytest.raises(SystemExit) as ended:
        runner.main(['--help'])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and 'models_*/best_model.pth' in said and '--yes' in said
