"""The command line: reading argv into a `Request`, and printing results.

Flags, their help and their defaults are the rows of `Request` and of `Settings`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from igseg.analysis.summary import BatchResult, median_lines, say_warnings
from igseg.checks.effort import evaluation_cost
from igseg.checks.verdict import parse_thresholds, statistics_text
from igseg.data.layouts import DataSource, layouts_text
from igseg.data.pixels import check_file
from igseg.data.samples import Sample, list_samples
from igseg.errors import InputError, attempt
from igseg.network.kinds import ARCHITECTURES, NetworkSource, parse_options
from igseg.program import MAIN, name_of
from igseg.results.export import EXPORTS, Output
from igseg.results.files import FIGURES
from igseg.setting import Setting, setting
from igseg.settings import ATTRIBUTION, CHECKING, MODEL, PREPROCESSING, Settings

NOTABLE_SLOWDOWN = 4.0  # of a reduced precision, from which on it is told

WHAT = 'what to explain'


@dataclass(frozen=True)
class Request:
    """What a command line asks for. Its rows are the flags that are not in `Settings`."""

    # fmt: off
    mode: str = setting('single', WHAT, '', choices=('single', 'batch'), default_text='single')
    image_path: Path | None = setting(None, WHAT, 'single: the image', default_text='')
    mask_path: Path | None = setting(None, WHAT, 'single: its ground-truth mask',
        default_text='the one beside it in its dataset')
    data_dir: Path = setting(Path('Dataset_no_preprocessing'), WHAT, 'batch: the dataset folder')
    split: str | None = setting(None, WHAT, 'batch: the subfolder of the dataset',
        default_text='test, else valid, val, the folder itself')
    images_dir: Path | None = setting(None, WHAT,
        'the folder of the images, for a dataset in no known layout', metavar='DIR',
        default_text='by looking')
    masks_dir: Path | None = setting(None, WHAT, 'the folder of their masks', metavar='DIR',
        default_text='by looking')
    mask_suffix: str | None = setting(None, WHAT,
        "what a mask's name has behind its image's name, for example _lesion", metavar='ENDING',
        default_text='none, or one of the usual ones')
    mask_prefix: str | None = setting(None, WHAT,
        "what a mask's name has before its image's name, for example seg_", metavar='START',
        default_text='none, or mask_')
    mask_name: str | None = setting(None, WHAT,
        "how masks are named if they do not hold the image's name; * stands for the part that "
        "stays, "
        "for example '*_training=*_manual1'", metavar='IMAGE=MASK',
        default_text='by --mask_suffix and --mask_prefix')
    num_samples: int | None = setting(10, WHAT, 'batch: how many images, evenly spaced',
        metavar='N|all')  # None: all
    output_dir: Path = setting(Path('integrated_gradients_results'), WHAT, '')
    figures: str = setting('all', WHAT,
        'what is drawn of each image; png: the two figures; all: also the pictures of the page; '
        'figures can be drawn later without computing anything again', choices=tuple(FIGURES))
    export: str | None = setting(None, WHAT,
        "also write each map in the geometry of its image: original resolution, float32, NaN "
        'outside the explained part; slices of a volume together', choices=tuple(EXPORTS),
        default_text='off')
    overwrite: bool = setting(False, WHAT, 'compute images again that are finished',
        default_text='off')
    model_path: Path | None = setting(None, MODEL,
        'checkpoint: .pth, .safetensors, or a folder of save_pretrained', required=True,
        default_text='')
    encoder: str | None = setting(None, MODEL, 'the name of the encoder in smp',
        default_text="the checkpoint's, else read off the weights")
    architecture: str | None = setting(None, MODEL, '', choices=ARCHITECTURES,
        default_text="the checkpoint's, else read off the weights")
    weights_key: str | None = setting(None, MODEL,
        'which of several networks in the checkpoint; factory: the weights that a '
        '--model_factory has loaded itself', metavar='KEY',
        default_text='the first that is no average')
    model_option: tuple[str, ...] | None = setting(None, MODEL,
        'settings of the architecture that leave no trace in the weights, for example '
        'encoder_output_stride=8; with --model_factory, its arguments', metavar='NAME=VALUE',
        default_text="the checkpoint's, else smp's")
    model_factory: str | None = setting(None, MODEL,
        'your code that builds the network, or package.module:function; it is called with the '
        'values of --model_option', metavar='FILE.py:FUNCTION', default_text='a network of smp')
    allow_unused: bool = setting(False, MODEL,
        'with --model_factory: the checkpoint may hold weights that its network lacks in parts '
        'that it has', default_text='off: such a checkpoint is refused')
    device: str = setting('auto', MODEL, 'auto, cuda, mps or cpu')
    # fmt: on
    settings: Settings = field(default_factory=Settings)

    def network(self, device: str | None = None) -> NetworkSource:
        """The network that the user names. device: in place of the device that the user names."""
        assert self.model_path is not None  # the flag is required
        options = parse_options(self.model_option or ())
        return NetworkSource(
            self.model_path, device or self.device, self.encoder, self.architecture,
            self.weights_key, options or None, self.model_factory, self.allow_unused,
        )  # fmt: skip

    @property
    def data(self) -> DataSource:
        """The dataset that the user names."""
        return DataSource(self.data_dir, self.split, self.images_dir, self.masks_dir,
                          self.mask_suffix, self.mask_prefix, self.mask_name)  # fmt: skip

    @property
    def output(self) -> Output:
        """Where results go. Raises InputError."""
        return Output(self.output_dir, self.figures, self.overwrite, self.export)

    def check(self) -> None:
        """Raise InputError for mistakes that can be told before anything is read: missing files,
        options that make no sense."""
        self.network().check()
        _ = self.output  # raises InputError
        if self.mode == 'batch':
            if not self.data.names_folders:
                self.data.checked_folder()
        elif self.image_path is None:
            raise InputError(
                '--mode single needs --image_path (or use --mode batch with --data_dir)'
            )
        else:
            check_file(self.image_path)


# --------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message} (see {self.prog} --help)\n')


def _whole_number(text: str) -> int:
    """An argument that is a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number of at least 1')
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == 'all' else _whole_number(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line, from the rows of `Request` and `Settings`."""
    parser = _Parser(
        prog=name_of(MAIN),
        description='Integrated Gradients for segmentation models: why did it draw this mask?',
        epilog=f'Datasets that are told apart by looking: {layouts_text()}. '
        'Exit status: 0 done, 1 some images of a batch failed or its summary could not be '
        'written, 2 bad input, 130 Ctrl-C, 143 SIGTERM.',
        allow_abbrev=False,  # --step 50 would silently mean --step_batch 50
    )
    rows = [row for row in (*fields(Request), *fields(Settings)) if 'setting' in row.metadata]
    for name in (WHAT, MODEL, PREPROCESSING, ATTRIBUTION, CHECKING):
        _add_flags(
            parser.add_argument_group(name),
            [row for row in rows if row.metadata['setting'].group == name],
        )
    return parser


def _add_flags(group: argparse._ArgumentGroup, rows: Sequence[Field[Any]]) -> None:
    """The flags of a group, in the order of their rows."""
    descriptions = {row.name: row.metadata['setting'] for row in rows}
    rivals = {description.instead_of for description in descriptions.values()}
    either = None
    for row in rows:
        if row.name in rivals:
            either = group.add_mutually_exclusive_group()
        rival = row.name in rivals or descriptions[row.name].instead_of
        (either if either and rival else group).add_argument(f'--{row.name}', **_flag_of(row))
        if row.name == 'target':
            group.add_argument('--each_object', action='store_true',
                               help='the same as --target each-object (default: off)')  # fmt: skip


READERS = {'int': int, 'float': float, 'Path': Path}


def _flag_of(row: Field[Any]) -> dict[str, Any]:
    """The arguments with which argparse adds a flag."""
    description: Setting = row.metadata['setting']
    flag: dict[str, Any] = {'help': description.help}
    if row.type == 'bool':
        return flag | {'action': 'store_true'}
    flag |= {'default': row.default, 'choices': description.choices, 'metavar': description.metavar}
    if description.required:
        flag['required'] = True
    if row.name in ('mean', 'std'):
        return flag | {'nargs': '+', 'type': float}
    if row.name in ('class_names', 'model_option'):
        return flag | {'nargs': '+'}
    if row.name in ('target', 'thresholds', 'method', 'method_option'):
        default = description.default_text if row.name in ('target', 'method') else None
        return flag | {'nargs': '+', 'default': default}
    if row.name == 'num_samples':
        return flag | {'type': _count_or_all}
    if description.least == 1:
        return flag | {'type': _whole_number}
    return flag | {'type': READERS.get(str(row.type).partition(' ')[0], str)}


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings that the parsed flags give. Raises InputError if they make no sense."""
    if args.each_object and args.target != 'predicted':
        raise InputError('--each_object goes without --target')
    values = {name: value for name, value in vars(args).items() if name in Settings.table()}
    values['target'] = 'each-object' if args.each_object else args.target
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    values['thresholds'] = parse_thresholds(args.thresholds or ())
    values['method_option'] = values['method_option'] or ()
    return Settings(**values)


def request_from(args: argparse.Namespace) -> Request:
    """The request of the parsed flags. Raises InputError if they make no sense."""
    rows = {row.name for row in fields(Request)} - {'settings'}
    values = {name: value for name, value in vars(args).items() if name in rows}
    return Request(**values, settings=settings_from(args))


def read_flags(argv: Sequence[str] | None = None) -> Request:
    """The request of a command line; its model, images and folders need not exist. Raises
    InputError; SystemExit for an unknown flag."""
    return request_from(build_parser().parse_args(argv))


def parse(argv: Sequence[str] | None = None) -> Request:
    """The request of a command line, whose model, images and folders exist. Raises InputError;
    SystemExit for an unknown flag."""
    request = read_flags(argv)
    request.check()
    return request


def answer(argv: Sequence[str] | None = None) -> None:
    """End the program if argv asks for help or holds an error of usage; else do nothing."""
    try:
        parse(argv)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


# --------------------------------------------------------------------------- what is printed


def say_cost(settings: Settings, device: str) -> None:
    """Before anything is computed, print what the checks will cost, if they are wanted, and that
    the processor has no instructions for the precision that the user names."""
    if settings.evaluate:
        print(evaluation_cost(settings.evaluate), file=sys.stderr)
    if settings.precision not in ('auto', 'float32'):
        from igseg.engine.preparation import slowdown  # with torch, which is slow to import
        from igseg.network.loading import resolve_device

        times = slowdown(settings.precision, resolve_device(device))
        if times > NOTABLE_SLOWDOWN:
            print(f'note: on this processor a convolution in {settings.precision} takes '
                  f'{times:.0f} times as long as in float32 (leave out --precision)',
                  file=sys.stderr)  # fmt: skip


def say_letters(output: Output, samples: Iterable[Sample]) -> None:
    """Print once how figures write names of images whose letters cannot be drawn here."""
    names = [sample.name for sample in samples if not sample.name.isascii()]
    if names and output.figures != 'none':
        from igseg.results.fonts import letters_note  # with matplotlib, which is slow to import

        if note := letters_note(names):
            print(f'note: {note}', file=sys.stderr)


def around(sample: Sample) -> list[Sample]:
    """The samples in the folder of a sample; if none can be listed, the sample itself."""
    samples, _ = attempt(partial(list_samples, sample.image_path.parent), InputError)
    return samples or [sample]


def say_result(by_target: Sequence[dict[str, Any]], output: Output, maps: Sequence[Path]) -> None:
    """Print the statistics of an image, and on stderr what the user must not miss."""
    for statistics in by_target:
        print(statistics_text(statistics))
        for finding in statistics['verdict']:
            print(f'  {finding["flag"]}: {finding["text"]}')
        print(f'Files in {output.folder / statistics["folder"]}')
        for path in maps:
            print(f'Map in {path}')
        say_warnings(statistics)


def say_summary(result: BatchResult, output: Output) -> int:
    """Print the summary of a batch, and on stderr what the user must not miss. Returns the exit
    status."""
    counts = result.summary
    print(
        f'{counts["images"]} images explained, {counts["skipped"]} skipped (empty target), '
        f'{counts["failed"]} failed'
    )
    for line in (*median_lines(result), *counts['findings']):
        print(f'  {line}')
    if counts['suspicion']:
        print(f'WARNING: {counts["suspicion"]}', file=sys.stderr)
    if result.unwritten:
        print(f'error: {result.unwritten}', file=sys.stderr)
    else:
        print(f'Open {output.folder / "index.html"}')
    return 1 if result.failed or result.unwritten else 0
