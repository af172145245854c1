"""The README tells the truth about flags, commands and files."""

import json
import re
import shlex

import pytest
from conftest import ROOT

import integrated_gradients
from faithfulness import METRICS
from integrated_gradients import BASELINES, RULE_NAMES, TARGETS, build_parser
from verdict import RULES, Thresholds

TEXT = (ROOT / 'README_Integrated_Gradients.md').read_text(encoding='utf-8')
FLAGS = TEXT[TEXT.index('## All flags') : TEXT.index('## What is computed')]
ROWS = dict(re.findall(r'^\| `(--\w+)[^`]*` \| (.*?) \|', FLAGS, re.MULTILINE))


def test_readme_is_a_link():
    assert (ROOT / 'README.md').is_symlink()
    assert (ROOT / 'README.md').resolve() == ROOT / 'README_Integrated_Gradients.md'


def test_every_flag_stands_in_the_table_with_its_default():
    actions = {a.option_strings[0]: a for a in build_parser()._actions if a.dest != 'help'}
    assert ROWS.keys() == actions.keys()
    for flag, action in actions.items():
        if action.default is not None and action.default is not False:
            assert ROWS[flag] == f'`{action.default}`', flag


@pytest.mark.parametrize('table', [BASELINES, RULE_NAMES, {k.form: k for k in TARGETS.values()}])
def test_every_entry_of_the_tables_is_explained(table):
    for name in table:
        assert f'`{name}`' in TEXT


def test_every_metric_stands_in_the_table_as_it_is_defined():
    plain = TEXT.replace('\\|', '|')
    for name, metric in METRICS.items():
        row = (name, metric.definition, metric.range, metric.better or '–', metric.source)
        assert '| `{}` | {} | {} | {} | {} |'.format(*row) in plain


def test_every_finding_and_threshold_is_explained():
    part = TEXT[TEXT.index('| finding | when |') : TEXT.index('**The page.**')]
    for rule in RULES:
        assert rule.flag in part
    for name, limit in vars(Thresholds()).items():
        assert f'`{name}` ({limit:g})' in part


def commands() -> list[str]:
    blocks = re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line for line in lines if line.startswith('python integrated_gradients.py')]


@pytest.mark.parametrize('command', commands())
def test_the_commands_are_valid_and_name_files_that_exist(command):
    args = build_parser().parse_args(shlex.split(command)[2:])
    assert (ROOT / args.model_path).exists()
    assert (ROOT / (args.image_path or args.data_dir)).exists()


def test_linked_files_exist():
    for target in re.findall(r'\]\((?!http|#)([^)]+)\)', TEXT):
        assert (ROOT / target).exists(), target


def test_statistics_are_explained(tmp_path):
    single = shlex.split(commands()[0].replace('demo/', f'{ROOT}/demo/'))[2:]
    quick = ['--image_size', '128', '--num_steps', '1', '--device', 'cpu']
    arguments = [*single, *quick, '--output_dir', str(tmp_path)]
    assert integrated_gradients.main(arguments) == 0
    (path,) = tmp_path.glob('*/*_statistics.json')
    described = TEXT[TEXT.index('| statistic |') :].replace('`_', '`attribution_')
    aside = {'image', 'image_path', 'notes', 'settings', 'versions', 'resume_key'}
    for key in json.loads(path.read_text()).keys() - aside - METRICS.keys():
        assert f'`{key}`' in described, key
