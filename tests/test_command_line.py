"""The command line as a user runs it: single, batch, resuming, and every bad input."""

import contextlib
import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import (
    DEMO_DATA,
    DEMO_IMAGE,
    DEMO_MODEL,
    PATIENCE,
    PLAIN,
    PLAIN_BATCH,
    PLAIN_FLAGS,
    ROOT,
    SLOW_BATCH,
    image_size,
    noise_image,
    save_image,
    square_mask,
    wait_until,
)
from PIL import Image
from plain_network import WEIGHTS

import integrated_gradients
from igseg.analysis import job
from igseg.analysis.job import StopSignals
from igseg.network.loading import create_model
from integrated_gradients import batch_integrated_gradients_analysis, build_parser, main

FAST = [
    '--model_path',
    str(DEMO_MODEL),
    '--image_size',
    '128',
    '--num_steps',
    '2',
    '--device',
    'cpu',
]
SINGLE = [*FAST, '--image_path', str(DEMO_IMAGE)]
NO_FIGURES = ['--figures', 'none']
PLAIN_SINGLE = [*PLAIN_FLAGS, '--image_path', str(DEMO_IMAGE), *NO_FIGURES]
FILES = ('attribution.png', 'channels.png', 'attributions.npz', 'statistics.json',
         'image.png', 'overlay.png', 'uncertainty.png', 'thumbnail.png')  # fmt: skip
DOCUMENTED_KEYS = {
    'image', 'target', 'baseline', 'rule', 'steps', 'gradient_evaluations', 'precision',
    'seconds', 'peak_memory_bytes', 'score', 'baseline_score', 'completeness_gap', 'map_error',
    'attribution_mean', 'attribution_std', 'attribution_min', 'attribution_max',
    'attribution_ratio', 'attribution_in_prediction', 'attribution_in_background',
    'prediction_ratio', 'prediction_area', 'dice', 'iou', 'pixel_accuracy', 'channel_shares',
    'settings', 'versions', 'share_in_prediction', 'share_in_truth',
}  # fmt: skip


def run(*arguments, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / 'integrated_gradients.py'), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Grows by one with every image that is explained."""
    found = []
    explain = integrated_gradients.IntegratedGradients.explain_with
    monkeypatch.setattr(
        integrated_gradients.IntegratedGradients,
        'explain_with',
        lambda *a, **k: found.append(1) or explain(*a, **k),
    )
    return found


def strict_json(path):
    """JSON without NaN and Infinity, which Python's reader would let through."""

    def refuse(name):
        raise AssertionError(f'{path} holds {name}')

    return json.loads(path.read_text(), parse_constant=refuse)


def files_below(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


# ------------------------------------------------------------------ the main jobs


def test_single_image_as_a_subprocess(tmp_path):
    done = run(*SINGLE, '--output_dir', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    name = DEMO_IMAGE.stem
    assert files_below(tmp_path / 'out') == {f'{name}/{name}_{ending}' for ending in FILES}
    statistics = strict_json(tmp_path / 'out' / name / f'{name}_statistics.json')
    assert statistics.keys() >= DOCUMENTED_KEYS
    assert statistics['settings']['mean'] == [0.5, 0.5, 0.5]  # from the checkpoint
    assert statistics['settings']['image_size'] == 128
    assert 0 < statistics['dice'] < 1  # the truth was found beside the image
    for text in ('Completeness gap', 'Attribution ratio', 'Prediction ratio', 'Dice, IoU'):
        assert text in done.stdout
    with np.load(tmp_path / 'out' / name / f'{name}_attributions.npz') as arrays:
        assert arrays['attributions'].shape == (3, 128, 128)
        assert arrays['attributions'].dtype == np.float32
        assert arrays['attributions'].sum() == pytest.approx(
            statistics['attribution_sum'], rel=1e-3
        )
        assert arrays['region'].sum() == statistics['target_area']


def test_a_batch_with_a_summary(tmp_path, capsys):
    assert main([*PLAIN_BATCH, '--num_samples', '3', '--output_dir', str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert 'images' in said.err and '3/3' in said.err  # the progress bar
    assert '3 images explained' in said.out
    summary = strict_json(tmp_path / 'summary.json')
    assert summary['summary']['images'] == len(summary['images']) == 3
    with (tmp_path / 'summary.csv').open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row['image'] for row in rows] == [entry['image'] for entry in summary['images']]
    gap = summary['images'][0]['completeness_gap']
    assert float(rows[0]['completeness_gap']) == pytest.approx(gap, rel=1e-12)
    assert image_size(tmp_path / 'summary.png')[0] > 1000
    for row in rows:
        for ending in FILES:
            assert (tmp_path / row['image'] / f'{row["image"]}_{ending}').is_file()


def test_batch_lists_skipped_and_failed_images_and_goes_on(tmp_path, capsys):
    data = tmp_path / 'data'
    for name in ('a', 'b', 'd'):
        save_image(data / f'{name}.png', noise_image())
    (data / 'c.jpg').write_text('not a picture')
    save_image(data / 'd_mask.png', square_mask() * np.uint8(255))
    plain = [*PLAIN_BATCH, '--data_dir', str(data), '--output_dir', str(tmp_path / 'out')]
    arguments = [*plain, *NO_FIGURES, '--target', 'predicted', '--threshold', '0.999999']
    assert main([*plain, '--figures', 'png', '--target', 'truth']) == 1
    summary = strict_json(tmp_path / 'out' / 'summary.json')
    assert [entry['image'] for entry in summary['images']] == ['d']
    assert {entry['image'] for entry in summary['failed']} == {'a', 'b', 'c'}
    failures = (tmp_path / 'out' / 'failures.csv').read_text().splitlines()
    assert failures[0] == 'image,reason' and len(failures) == 4
    assert 'c.jpg is not a picture' in capsys.readouterr().err
    assert main(arguments) == 1
    summary = strict_json(tmp_path / 'out' / 'summary.json')
    assert {entry['image'] for entry in summary['skipped']} == {'a', 'b', 'd'}
    assert 'preprocessing' in summary['summary']['suspicion']
    with (tmp_path / 'out' / 'summary.csv').open() as stream:
        statuses = {row['image']: row['status'] for row in csv.DictReader(stream)}
    assert statuses == {'a': 'skipped', 'b': 'skipped', 'c': 'failed', 'd': 'skipped'}
    assert list(statuses) == sorted(statuses)  # in the order of the dataset
    assert main([*arguments, '--on_empty', 'image']) == 1
    summary = strict_json(tmp_path / 'out' / 'summary.json')
    assert {entry['target'] for entry in summary['images']} == {'image'}
    assert any('whole image' in note for note in summary['images'][0]['notes'])


def test_the_documented_function(tmp_path):
    results = batch_integrated_gradients_analysis(
        data_dir=DEMO_DATA, output_dir=tmp_path, num_samples=2, baseline_type='blur', **PLAIN,
    )  # fmt: skip
    assert [entry['baseline'] for entry in results.images] == ['blur', 'blur']
    assert results.summary['median_completeness_gap'] > 0


def test_a_finished_image_is_not_computed_again_until_something_changes(tmp_path, computed):
    image = save_image(tmp_path / 'a.png', noise_image())
    model = tmp_path / 'm.safetensors'
    model.write_bytes(WEIGHTS.read_bytes())

    def times(*flags) -> int:
        computed.clear()
        arguments = ['--model_path', str(model), '--image_path', str(image), *NO_FIGURES]
        assert main([*PLAIN_FLAGS, *arguments, '--output_dir', str(tmp_path / 'out'), *flags]) == 0
        return len(computed)

    assert times() == 1
    assert times() == 0
    assert times('--step_batch', '2') == 0  # does not change the numbers
    assert times('--baseline', 'blur') == 1
    assert times('--baseline', 'blur') == 0
    assert times() == 1  # the folder held the other baseline's results
    save_image(image, noise_image(seed=1))
    assert times() == 1
    save_image(tmp_path / 'a_mask.png', square_mask())
    assert times() == 1
    state = safetensors.torch.load_file(model)
    state['2.bias'] += 1
    safetensors.torch.save_file(state, model)
    assert times() == 1
    assert times('--figures', 'png') == 0  # drawn from the maps
    (tmp_path / 'out' / 'a' / 'a_channels.png').unlink()
    assert times() == 0
    assert not (tmp_path / 'out' / 'a' / 'a_channels.png').exists()
    assert times('--figures', 'png') == 0
    assert (tmp_path / 'out' / 'a' / 'a_channels.png').exists()
    (tmp_path / 'out' / 'a' / 'a_attributions.npz').unlink()
    assert times() == 1
    assert times('--overwrite') == 1
    (tmp_path / 'out' / 'a' / 'a_statistics.json').write_text('{"half')
    assert times() == 1
    assert times() == 0


def test_several_targets_each_get_a_folder_and_are_finished_together(tmp_path, computed):
    batch = [*PLAIN_BATCH, '--num_samples', '1', '--output_dir', str(tmp_path), '--figures', 'png',
             '--target', 'image', 'pixel:99,120', 'object:999']  # fmt: skip

    def names():
        return {path.name for path in tmp_path.iterdir() if path.is_dir()}

    assert main(batch) == 0
    (first, second) = sorted(names())
    assert first.endswith('_image') and second.endswith('_pixel-99-120')
    statistics = strict_json(tmp_path / second / f'{second}_statistics.json')
    assert statistics['targets'] == ['image', 'pixel:99,120']
    assert 'left out: target object:999' in statistics['notes'][0]
    assert len(strict_json(tmp_path / 'summary.json')['images']) == 2
    assert len(computed) == 1 and main(batch) == 0 and len(computed) == 1
    (tmp_path / second / f'{second}_attributions.npz').unlink()
    assert main(batch) == 0 and len(computed) == 2


def test_each_object_is_explained(tmp_path):
    size = ['--image_size', '128', '--threshold', '0.2', '--min_object_area', '1']
    assert main([*SINGLE, *size, *NO_FIGURES, '--each_object', '--output_dir', str(tmp_path)]) == 0
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(folders) >= 2
    areas = [
        strict_json(tmp_path / name / f'{name}_statistics.json')['target_area'] for name in folders
    ]
    assert folders[0].endswith('_object-1') and areas == sorted(areas, reverse=True)


def test_evaluation_tells_its_cost_and_fills_the_metrics(tmp_path, capsys):
    truth = ['--target', 'truth', '--evaluate', 'quick', '--image_size', '64', *NO_FIGURES,
             '--output_dir', str(tmp_path)]  # fmt: skip
    assert main([*SINGLE, *truth]) == 0
    captured = capsys.readouterr()
    assert re.search(r'--evaluate quick: \d+ forward passes and \d+ gradient', captured.err)
    name = DEMO_IMAGE.stem
    statistics = strict_json(tmp_path / name / f'{name}_statistics.json')
    for metric in ('insertion_area', 'insertion_margin', 'infidelity', 'mass_in_truth'):
        assert statistics[metric] is not None
    assert statistics['recomputed_correlation'] > statistics['randomised_correlation']
    assert statistics['baseline_correlation'] is None  # only with full
    assert statistics['evaluation']['effort'] == 'quick'
    assert statistics['verdict']
    for finding in statistics['verdict']:
        assert finding['text'] in captured.out


def test_new_thresholds_judge_again_without_computing(tmp_path, computed):
    truth = ['--target', 'truth', '--output_dir', str(tmp_path)]
    name = DEMO_IMAGE.stem

    def flags() -> set[str]:
        statistics = strict_json(tmp_path / name / f'{name}_statistics.json')
        return {finding['flag'] for finding in statistics['verdict']}

    assert main([*PLAIN_SINGLE, *truth, '--thresholds', 'background_ratio=0', 'dice=0']) == 0
    assert not flags() & {'background focus', 'poor mask'}
    assert main([*PLAIN_SINGLE, *truth, '--thresholds', 'background_ratio=1e9', 'dice=1.1']) == 0
    assert flags() >= {'background focus', 'poor mask'}
    assert len(computed) == 1


def test_figures_are_redrawn_without_the_model(tmp_path):
    drawn = ['--figures', 'png', '--resize', 'letterbox']
    assert main([*PLAIN_SINGLE, '--output_dir', str(tmp_path), *drawn]) == 0
    folder = tmp_path / DEMO_IMAGE.stem
    figures = [folder / f'{folder.name}_{kind}.png' for kind in ('attribution', 'channels')]
    before = [np.asarray(Image.open(path)) for path in figures]
    for path in figures:
        path.unlink()
    integrated_gradients.redraw_figures(folder)
    for path, picture in zip(figures, before, strict=True):
        assert (np.asarray(Image.open(path)) == picture).all()


@pytest.mark.parametrize(
    ('number', 'status'),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_interrupted_batch_keeps_a_summary_and_says_how_to_go_on(tmp_path, number, status):
    process = subprocess.Popen(
        [sys.executable, 'integrated_gradients.py', *SLOW_BATCH, '--num_samples', 'all',
         '--output_dir', str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where the tests themselves run in the background, the shell lets them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_until(lambda: len(list(tmp_path.glob('*/[!.]*_statistics.json'))) >= 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, said
    assert 'Traceback' not in said and 'goes on where this one stopped' in said
    assert len(strict_json(tmp_path / 'summary.json')['images']) >= 2
    assert not [path for path in files_below(tmp_path) if '.tmp' in path]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_signal_that_python_drops_still_stops():
    """An exception raised while a destructor runs is only printed."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop, warnings.catch_warnings():
        warnings.simplefilter('ignore')

        class Unlucky:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGTERM)

        stop.check()
        Unlucky()  # is deleted at once
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    assert stop.exit_status == 143
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_signal_that_torchrun_passes_on_late_is_one_with_the_first(monkeypatch, ranks):
    """On a busy machine it took more than three seconds, and no summary was left."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'a')
    monkeypatch.setenv('WORLD_SIZE', str(ranks))
    now = 100.0
    monkeypatch.setattr(job.time, 'monotonic', lambda: now)
    with StopSignals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        now += 10
        with contextlib.nullcontext() if ranks == 2 else pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_background_job_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------ what users may combine


@pytest.mark.parametrize(
    'flags',
    [
        ['--baseline', 'random', '--baseline_draws', '2'],
        ['--baseline', 'mean', '--rule', 'gauss-legendre'],
        ['--baseline', 'white', '--rule', 'trapezoid', '--score', 'probability'],
        ['--target', 'truth', '--resize', 'letterbox'],
        ['--target', 'pixel:150,170', '--normalize', 'none'],
    ],
)
def test_flags(tmp_path, flags):
    assert main([*PLAIN_SINGLE, '--output_dir', str(tmp_path), *flags]) == 0
    (path,) = tmp_path.glob('*/*_statistics.json')
    statistics = strict_json(path)
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        found = statistics['settings'][flag.removeprefix('--')]
        assert str(found) == value


def test_mask_of_another_size_is_resized_and_noted(tmp_path, capsys):
    image = save_image(tmp_path / 'a.png', noise_image(40, 60))
    mask = save_image(tmp_path / 'm.png', square_mask(20, 30))
    arguments = ['--image_path', str(image), '--mask_path', str(mask), '--target', 'truth']
    assert main([*PLAIN_SINGLE, *arguments, '--output_dir', str(tmp_path / 'out')]) == 0
    assert 'the mask is 30×20, the image 60×40' in capsys.readouterr().err
    assert strict_json(tmp_path / 'out' / 'a' / 'a_statistics.json')['notes']


def test_image_size_is_rounded_up_and_said(tmp_path, capsys):
    small = ['--image_size', '50', '--target', 'image', *NO_FIGURES, '--output_dir', str(tmp_path)]
    assert main([*SINGLE, *small]) == 0
    assert 'image size 50: the network takes multiples of 32, using 64' in capsys.readouterr().err


def test_gap_above_the_tolerance_is_a_warning(tmp_path, capsys):
    assert main([*PLAIN_SINGLE, '--output_dir', str(tmp_path), '--gap_tolerance', '1e-9']) == 0
    assert 'WARNING: the completeness gap' in capsys.readouterr().err


# ------------------------------------------------------------------ bad input


def bad_inputs(tmp_path) -> dict[str, tuple[list[str], str]]:
    """Name -> flags and what the sentence must say."""
    text = tmp_path / 'text.jpg'
    text.write_text('a letter')
    empty = tmp_path / 'empty.png'
    empty.touch()
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes(DEMO_IMAGE.read_bytes()[:3000])
    whole = save_image(tmp_path / 'whole.png', noise_image())
    damaged = tmp_path / 'damaged.pth'
    damaged.write_bytes(DEMO_MODEL.read_bytes()[:5000])
    (tmp_path / 'nothing').mkdir()
    (tmp_path / 'file').touch()
    batch = ['--mode', 'batch']
    return {
        'missing image': (['--image_path', 'no.jpg'], 'no.jpg'),
        'empty image': (['--image_path', str(empty)], 'empty.png'),
        'cut image': (['--image_path', str(cut)], 'cut.jpg'),
        'text as image': (['--image_path', str(text)], 'text.jpg'),
        'unreadable mask': (['--mask_path', str(text)], 'text.jpg'),
        'missing mask': (['--mask_path', 'no.png'], 'no.png'),
        'missing model': (['--model_path', 'no.pth'], 'no.pth'),
        'damaged model': (['--model_path', str(damaged)], 'damaged.pth'),
        'wrong encoder': (['--encoder', 'resnet18'], 'does not fit'),
        'unknown encoder': (['--encoder', 'resnet19'], 'did you mean'),
        'unknown architecture': (['--architecture', 'unetx'], 'unetx'),
        'wrong architecture': (['--architecture', 'unet'], 'does not fit'),
        'no steps': (['--num_steps', '0'], '"0" is not a whole number'),
        'negative steps': (['--num_steps', '-5'], 'num_steps'),
        'steps in words': (['--num_steps', 'ten'], '"ten" is not a whole number'),
        'unknown device': (['--device', 'gpu'], 'unknown device "gpu"'),
        'unknown baseline': (['--baseline', 'grey'], 'unknown baseline "grey"'),
        'unreadable baseline': (['--baseline', str(text)], 'text.jpg'),
        'unknown target': (['--target', 'tumour'], 'unknown target "tumour"'),
        'pixel outside': (['--target', 'pixel:9999,0'], 'outside the image'),
        'no truth': (['--image_path', str(whole), '--target', 'truth'], '--mask_path'),
        'no predicted pixel': (['--threshold', '0.9999999'], '--target image'),
        'threshold': (['--threshold', '2'], 'threshold'),
        'output is a file': (['--output_dir', str(tmp_path / 'file')], 'file'),
        'output below a file': (['--output_dir', str(tmp_path / 'file' / 'x')], 'file'),
        'output in /proc': (['--output_dir', '/proc/results'], '/proc/results'),
        'no data folder': ([*batch, '--data_dir', 'nowhere'], 'nowhere'),
        'empty data folder': ([*batch, '--data_dir', str(tmp_path / 'nothing')], 'no images'),
        'no such split': ([*batch, '--data_dir', str(DEMO_DATA), '--split', 'dev'], 'test, train'),
        'no samples': ([*batch, '--num_samples', '0'], 'num_samples'),
        'unknown flag': (['--steps', '5'], '--steps'),
    }


def test_bad_input_is_one_sentence_with_status_2_and_writes_nothing(tmp_path, capsys, subtests):
    for name, (flags, said) in bad_inputs(tmp_path).items():
        with subtests.test(name):
            out = tmp_path / 'out'
            arguments = [*SINGLE, '--output_dir', str(out), *flags]
            try:
                status = main(arguments)
            except SystemExit as stop:  # argparse's own way out
                status = stop.code
            seen = capsys.readouterr()
            sentence = [line for line in seen.err.splitlines() if line.startswith('error: ')]
            assert status == 2
            assert len(sentence) == 1 and said in sentence[0]
            assert 'Traceback' not in seen.err and not seen.out
            assert not out.exists() or not files_below(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_an_absent_gpu_is_told(tmp_path, capsys):
    assert main([*SINGLE, '--device', 'cuda', '--output_dir', str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith('error: --device cuda: no CUDA GPU')
    assert 'Traceback' not in said


def test_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path):
    single = [*PLAIN_SINGLE, '--image_size', '128', '--output_dir', str(tmp_path)]
    assert main(single) == 0
    old = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(*single, '--baseline', 'blur', preexec_fn=small_files_only)
    assert done.returncode == 2
    assert 'error: cannot write' in done.stderr and 'Traceback' not in done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == old


def test_a_checkpoint_with_code_does_not_run_it(tmp_path, capsys):
    trapped = tmp_path / 'trapped'
    (tmp_path / 'evil.pth').write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(trapped))
    assert main([*SINGLE, '--model_path', str(tmp_path / 'evil.pth')]) == 2
    said = capsys.readouterr().err
    assert 'evil.pth' in said and 'Traceback' not in said
    assert not trapped.exists()


def test_help_groups_every_flag_and_gives_its_default():
    text = ' '.join(build_parser().format_help().split())
    for action in build_parser()._actions:
        if action.option_strings[0] != '-h':
            assert action.option_strings[0] in text
            assert action.required or 'default' in action.help or 'single:' in action.help
    for group in ('what to explain:', 'model:', 'preprocessing:', 'attribution:'):
        assert group in text


@pytest.mark.parametrize(
    'flags',
    [
        pytest.param([], marks=pytest.mark.long),  # at 640x640, the defaults
        ['--image_size', '96'],
    ],
)
def test_reference_architecture(tmp_path, flags):
    """U-Net++ with EfficientNet-B5, within 6 GB."""
    torch.manual_seed(0)
    network = create_model('unetplusplus', 'efficientnet-b5', 1)
    torch.save({'model_state_dict': network.state_dict()}, tmp_path / 'b5.pth')
    done = run('--model_path', tmp_path / 'b5.pth', '--image_path', DEMO_IMAGE, '--target', 'image',
               '--num_steps', '2', '--output_dir', tmp_path / 'out', '--device', 'cpu',
               *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / 'out').glob('*/*_statistics.json')
    statistics = strict_json(path)
    assert statistics['settings']['image_size'] == (int(flags[1]) if flags else 640)
    assert statistics['settings']['mean'] == pytest.approx([0.485, 0.456, 0.406])
    assert statistics['peak_memory_bytes'] < 6e9
    assert os.path.getsize(path.with_name(f'{DEMO_IMAGE.stem}_attribution.png')) > 1e5
