"""Integrated Gradients without flags: finds your model and your data, asks, and runs.

    python run_integrated_gradients.py            asks; Enter takes the answer in brackets
    python run_integrated_gradients.py --yes      asks nothing (also without a terminal)

The model is the newest `models_*/best_model.pth`, the data `Dataset_no_preprocessing/`, both in
the current folder; results go to `integrated_gradients_results/`. Without a model, the bundled demo
is offered. Any flag of `integrated_gradients.py` may be added, and wins over the answers.
"""

from __future__ import annotations

if __name__ == '__main__':
    from igseg.program import check_packages

    check_packages()

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igseg.command_line import parse, read_flags
from igseg.data.samples import Sample, list_samples
from igseg.errors import InputError
from igseg.method.choice import BASELINES
from igseg.program import FILES, MAIN, RUNNER, name_of, uses_scripts

DOCUMENTED_MODEL = Path('models_20250609_105424/best_model.pth')
DATA_DIR = Path('Dataset_no_preprocessing')
DEMO = Path(__file__).resolve().parent / 'demo'
DEMO_MODEL = DEMO / 'demo_model.pth'
DEMO_IMAGE = 'colin27_axial_079'  # a slice through the middle of the structure


@dataclass(frozen=True)
class Source:
    """What is analysed: a checkpoint, a dataset folder, and the image that is offered."""

    model: Path
    data_dir: Path
    first: str | None = None


def find_models(folder: Path = Path()) -> list[Path]:
    """The checkpoints `models_*/best_model.pth` of a folder, newest first."""
    paths = folder.glob('models_*/best_model.pth')
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def ask(question: str, default: str, interactive: bool, choices: Sequence[str] = ()) -> str:
    """The user's answer. The default if the answer is empty, or if nobody can be asked."""
    if not interactive:
        return default
    while True:
        answer = input(f'{question} [{default}]: ').strip() or default
        if not choices or answer in choices:
            return answer
        print(f'Please answer {", ".join(choices)}.')


def choose_source(interactive: bool) -> Source:
    """The user's model and data; if there is no model, the demo. Raises InputError if the demo is
    missing too, or not wanted."""
    models = find_models()
    if not models and not DEMO_MODEL.is_file():
        raise InputError(
            f'no model found ({DOCUMENTED_MODEL} or another models_*/best_model.pth), and the demo '
            "is not part of the installed program: it lies in the folder demo/ of the project's "
            f'checkout, where `python {FILES[RUNNER]}` runs it'
        )
    if not models:
        print(f'No model found ({DOCUMENTED_MODEL} or another models_*/best_model.pth).')
        if ask('Run the bundled demo? y/n', 'y', interactive, ('y', 'n')) == 'n':
            raise InputError(
                'nothing to run: put a checkpoint at models_NAME/best_model.pth, or use '
                f'{name_of(MAIN)} --model_path'
            )
        return Source(DEMO_MODEL, DEMO / 'Dataset_no_preprocessing', DEMO_IMAGE)
    others = f' (newest of {len(models)})' if len(models) > 1 else ''
    print(f'Model: {models[0]}{others}')
    return Source(models[0], Path(ask('Data folder', str(DATA_DIR), interactive)))


def first_image(samples: list[Sample], wanted: str | None) -> Path:
    """The image that is offered: the wanted image, else the first image whose mask is not empty."""
    for sample in samples:
        if sample.name == wanted:
            return sample.image_path
    for sample in samples if wanted is None else ():
        with contextlib.suppress(InputError):  # reported when the image is explained
            truth = sample.truth()
            if truth is not None and (truth > 0).any():
                return sample.image_path
    return samples[0].image_path


def command(source: Source, interactive: bool) -> list[str]:
    """The answers as arguments of integrated_gradients.py."""
    samples = list_samples(source.data_dir)
    print(f'Data: {len(samples)} images in {samples[0].image_path.parent}')
    mode = ask('1 one image, 2 a batch of images', '1', interactive, ('1', '2'))
    if mode == '1':
        image = ask('Image', str(first_image(samples, source.first)), interactive)
        what = ['--mode', 'single', '--image_path', image]
    else:
        count = ask('How many images (a number, or all)', str(min(10, len(samples))), interactive)
        what = ['--mode', 'batch', '--data_dir', str(source.data_dir), '--num_samples', count]
    baseline = ask(f'Baseline ({", ".join(BASELINES)}, or an image file)', 'zero', interactive)
    steps = ask('Interpolation steps', '50', interactive)
    model = ['--model_path', str(source.model)]
    return [*model, *what, '--baseline', baseline, '--num_steps', steps]


def description() -> str:
    """The text of `--help`: the docstring of this file, with commands as the user types them."""
    text = str(__doc__)
    for script in (RUNNER, MAIN) if uses_scripts() else ():
        text = text.replace(f'python {FILES[script]}', script).replace(FILES[script], script)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, then run integrated_gradients.py. Returns its exit status."""
    parser = argparse.ArgumentParser(
        description=description(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--yes', action='store_true', help='take every default, ask nothing')
    args, flags = parser.parse_known_args(argv)
    interactive = sys.stdin.isatty() and not args.yes
    try:
        read_flags(['--model_path', '.', *flags])  # reports an error in them before any question
        arguments = [*command(choose_source(interactive), interactive), *flags]
        parse(arguments)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print('\ninterrupted: nothing was started', file=sys.stderr)
        return 130
    sys.stdout.flush()
    import integrated_gradients  # imports torch, which takes seconds

    return integrated_gradients.main(arguments)


if __name__ == '__main__':
    sys.exit(main())
