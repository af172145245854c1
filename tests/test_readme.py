"""README and the pages of docs/ tell the truth about flags, tables, commands and files."""

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from test_house import ORDER, names

import integrated_gradients
from igseg.checks.verdict import FINDING_RULES, Thresholds
from igseg.method.choice import METHODS, form_of, options_text
from igseg.network.recognise import LEAVES_NO_TRACE
from igseg.statistics import COMPOUND, METRICS, NUMBER, STATISTICS, TEXT, TRUTH, WHOLE
from integrated_gradients import BASELINES, RULE_NAMES, TARGETS, build_parser

README = (ROOT / 'README_Integrated_Gradients.md').read_text(encoding='utf-8')
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
PAGES = {
    path.stem: path.read_text(encoding='utf-8') for path in sorted((ROOT / 'docs').glob('*.md'))
}
EVERY_PAGE = README + ''.join(PAGES.values())
ROWS = dict(re.findall(r'^\| `(--\w+)[^`]*` \| (.*?) \|', PAGES['flags'], re.MULTILINE))
# The headings of REFERENCE.md when it was a single page: the world may link to them.
OLD_ANCHORS = """
all-flags targets methods regions which-method baselines rules how-exact-a-map-is the-checks
the-verdict input-in-detail large-pictures any-network files exported-maps statistics from-python
many-images-and-what-can-go-wrong finished-images hostile-input what-was-measured-rules
what-was-measured-speed what-was-measured-reliability tests bibliography
"""
KINDS = {
    TEXT: 'text',
    WHOLE: 'whole number',
    NUMBER: 'number',
    TRUTH: 'yes or no',
    COMPOUND: 'nested',
}
UNITS = {'%': 'share'}  # stored from 0 to 1, shown as per cent


def test_readme_is_a_link_and_short():
    assert (ROOT / 'README.md').is_symlink()
    assert (ROOT / 'README.md').resolve() == ROOT / 'README_Integrated_Gradients.md'
    assert len(README.splitlines()) <= 355


def test_every_flag_stands_in_the_table_with_its_default():
    actions = {a.option_strings[0]: a for a in build_parser()._actions if a.dest != 'help'}
    assert ROWS.keys() == actions.keys()
    for flag, action in actions.items():
        if action.default is not None and action.default is not False:
            assert ROWS[flag] == f'`{action.default}`', flag


@pytest.mark.parametrize(
    'page, table',
    [
        ('targets_and_baselines', BASELINES),
        ('targets_and_baselines', {kind.form: kind for kind in TARGETS.values()}),
        ('method_and_accuracy', RULE_NAMES),
    ],
)
def test_every_entry_of_the_tables_is_explained(page, table):
    for name in table:
        assert f'`{name}`' in PAGES[page]


def test_every_check_stands_in_the_table_as_it_is_defined():
    plain = PAGES['checks_and_verdict'].replace('\\|', '|')
    for name, row in METRICS.items():
        cells = (name, row.meaning, row.range, row.better or '–', row.source)
        assert '| `{}` | {} | {} | {} | {} |'.format(*cells) in plain


def test_every_statistic_stands_in_the_table_as_it_is_defined():
    plain = PAGES['results'].replace('\\|', '|')
    missing = [
        line
        for key, row in STATISTICS.items()
        if key not in METRICS
        for line in [f'| `{key}` | {row.meaning} | {UNITS.get(row.unit, row.unit)} | '
                     f'{KINDS[row.kind]} |'.replace('|  |', '| |')]
        if line not in plain
    ]  # fmt: skip
    assert not missing, '\n'.join(missing)


@pytest.mark.parametrize('name', METHODS)
def test_every_method_stands_in_the_table_as_it_declares_itself(name):
    assert method_row(name) in PAGES['methods'].replace('\\|', '|')


def method_row(name: str) -> str:
    """The row of a method in the table of docs/methods.md."""
    kind = METHODS[name]
    declared = kind.declared
    promises = [f'sum: {declared.completeness or "n/a"}']
    promises += ['tolerance'] if declared.quadrature else []
    promises += [f'baseline: {declared.baseline}']
    options = options_text(kind).partition(' has ')[2]
    cells = (f'`{form_of(name)}`', kind.meaning, ', '.join(promises), options, kind.source)
    return f'| {" | ".join(cells)} |'


def test_every_finding_and_threshold_is_explained():
    page = PAGES['checks_and_verdict']
    part = page[page.index('| finding | when |') :]
    for rule in FINDING_RULES:
        assert rule.flag in part
    for name, limit in vars(Thresholds()).items():
        assert f'`{name}` ({limit:g})' in part


def test_what_leaves_no_trace_is_told_of_every_architecture():
    part = PAGES['input'].partition('### What leaves no trace in the weights')[2]
    told = re.findall(r'^\| `(\w+)` \| ([\w, ]+) \|$', part.partition('\n#')[0], re.MULTILINE)
    for architecture, options in LEAVES_NO_TRACE.items():
        known = {option for option, names in told if architecture in names.split(', ')}
        assert known == set(options), architecture


def commands() -> list[str]:
    blocks = re.findall(r'```bash\n(.*?)```', EVERY_PAGE, re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    return [line for line in lines if line.startswith('python integrated_gradients.py')]


@pytest.mark.parametrize('command', commands())
def test_the_commands_are_valid_and_name_files_that_exist(command):
    args = build_parser().parse_args(shlex.split(command)[2:])
    assert (ROOT / args.model_path).exists()
    assert (ROOT / (args.image_path or args.data_dir)).exists()


READ_BY_USERS = [ROOT / 'README_Integrated_Gradients.md', *sorted((ROOT / 'docs').glob('*.md'))]
DOCUMENTS = sorted({path.resolve() for path in [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'),
                    *(ROOT / 'demo').glob('*.md'), *(ROOT / 'benchmarks').rglob('*.md')]
                    if 'work' not in path.relative_to(ROOT).parts})  # fmt: skip


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.stem)
def test_linked_files_and_headings_exist(document):
    for target in links(document):
        file, _, place = target.partition('#')
        linked = (document.parent / file).resolve() if file else document
        assert linked.exists(), target
        assert not place or place in anchors(linked), target


def test_old_headings_of_the_reference_still_lead_somewhere():
    """Each has its line, and the line a link to the place where its text now stands."""
    text = (ROOT / 'REFERENCE.md').read_text(encoding='utf-8')
    lines = dict(re.findall(r'<a id="([\w-]+)"></a>\[[^]]+\]\(([^)#]+\.md#[\w-]+)\)', text))
    assert lines.keys() == set(OLD_ANCHORS.split())
    for target in lines.values():  # that the places exist is tested for every link
        assert target.startswith(('docs/', 'CONTRIBUTING.md')), target


def test_every_page_is_linked_from_the_readme_and_the_reference():
    pages = {ROOT / 'docs' / f'{stem}.md' for stem in PAGES}
    assert len(pages) == 10
    for document in (ROOT / 'README_Integrated_Gradients.md', ROOT / 'REFERENCE.md'):
        linked = {(document.parent / link.partition('#')[0]).resolve() for link in links(document)}
        assert pages <= linked, document.name


def test_pages_that_the_code_names_exist():
    """In comments, docstrings, help and the notebook."""
    files = [path for folder in ('igseg', 'tests', 'benchmarks', 'demo')
             for path in (ROOT / folder).rglob('*.py')]  # fmt: skip
    for path in [*files, *ROOT.glob('*.py'), *ROOT.glob('*.ipynb')]:
        for name in re.findall(r'docs/\w+\.md', path.read_text(encoding='utf-8')):
            assert (ROOT / name).is_file(), (path.name, name)


@pytest.mark.parametrize('document', READ_BY_USERS, ids=lambda path: path.stem)
def test_paragraphs_are_short(document):
    """Of what is read as text: no tables, no headings."""
    blocks = re.split(r'\n\n|\n(?=- |\d+\. )', prose(document))
    text = [block for block in blocks if not block.lstrip().startswith(('#', '|', '!', '    '))]
    assert text
    for block in text:
        assert len(block.split()) <= 80, block
        assert len(re.findall(r'[^\W\dA-Z]{2}[`)*]*[.?!](?=\s|$)', block)) <= 6, block


@pytest.mark.parametrize('name', PAGES)
def test_a_page_begins_with_what_it_tells(name):
    title, empty, first = PAGES[name].split('\n')[:3]
    assert title.startswith('# ') and not empty and re.match(r'[A-Z*]', first)
    assert '\n#' not in PAGES[name].partition('\n## ')[0]


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r'```.*?```', '', document.read_text(encoding='utf-8'), flags=re.DOTALL)


def links(document: Path) -> list[str]:
    """What a document links to, but for the web."""
    return re.findall(r'\]\((?!https?:)([^)]+)\)', prose(document))


def anchors(document: Path) -> set[str]:
    """The places of a document that can be linked to."""
    text = prose(document)
    headings = {anchor(line) for line in text.splitlines() if line.startswith('#')}
    return headings | set(re.findall(r'<a id="([\w-]+)"></a>', text))


def test_the_readme_gives_the_speed_that_was_measured():
    part = README[README.index('## Speed beside Captum') :].partition('\n## ')[0]
    rows = re.findall(r'^\| .* \|$', part, re.MULTILINE)
    assert len(rows) > 4
    assert all(row in PAGES['speed'] for row in rows)


def test_the_page_gives_what_a_person_was_measured_to_wait_for():
    rows = table(PAGES['speed'], '| | the script')
    files = ('demo', 'reference_256', 'reference_640', 'demo_10_images')
    assert len(rows) == len(files)
    for file, (_, *figures, _preparation) in zip(files, rows, strict=True):
        ((_, *seconds),) = measured(f'stopwatch_{file}.md', '| | Captum')
        assert figures == seconds, file


def test_the_readme_gives_the_shares_and_medians_of_methods_that_were_measured():
    planted: dict[str, list[int]] = {}
    for cells in measured('planted_methods.md', '| evidence |'):
        planted.setdefault(base(cells[3]), []).append(int(cells[5].rstrip('%')))
    slices = {
        base(row[0]): row for row in measured('compare_methods_demo.md', '| method | deletion')
    }
    rows = table(README, '| method | planted')
    assert len(rows) == len(planted) == len(slices) + 1
    for method, share, *figures in rows:
        known = planted[base(method)]
        assert share == f'{min(known)} to {max(known)} %', method
        if base(method) != 'edges':
            row = slices[base(method)]
            medians = [row[place].partition(' ')[0].replace('%', ' %') for place in (6, 5, 7, 1)]
            assert figures == medians, method


def test_the_readme_gives_the_verdicts_that_were_counted():
    counted = {'quick': [[0, 0], [0, 0]], 'full': [[0, 0], [0, 0]]}
    page = PAGES['checks_and_verdict']
    for line in re.findall(r'^\| .*, `(?:quick|full)` \| .*$', page, re.MULTILINE):
        name, good, *broken = cells_of(line)
        if 'reference' in name and 'quick' in name:
            continue  # of these few images, README gives those of `full` only
        for kind, cells in enumerate(([good], broken)):
            for cell in cells:
                bad, of = map(int, cell.split('/'))
                sums = counted['quick' if 'quick' in name else 'full'][kind]
                sums[0], sums[1] = sums[0] + bad, sums[1] + of
    for kind, (_, quick, full) in enumerate(table(README, '| maps | called bad')):
        assert quick == '{} of {}'.format(*counted['quick'][kind])
        assert full == '{} of {}'.format(*counted['full'][kind])


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip('|').split('|')]


def table(text: str, start: str) -> list[list[str]]:
    """The rows of the table whose heading begins so."""
    lines = text[text.index(start) :].partition('\n\n')[0].splitlines()
    return [cells_of(line) for line in lines[2:]]


def measured(name: str, start: str) -> list[list[str]]:
    """The rows of a table in benchmarks/results."""
    return table((ROOT / 'benchmarks' / 'results' / name).read_text(encoding='utf-8'), start)


def base(method: str) -> str:
    """The name of a method in a table, without its layer and what is said of it."""
    return re.split(r'[: ]', method.strip('`').replace('`', ''))[0]


def test_what_is_imported_in_the_documents_can_be_imported():
    blocks = re.findall(r'```python\n(.*?)```', EVERY_PAGE, re.DOTALL)
    imports = [
        node
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
    ]
    ours = {node.module for node in imports} - set(sys.stdlib_module_names)
    assert ours == {'integrated_gradients'}  # users import from nowhere else
    for node in imports:
        for name in node.names:
            assert hasattr(importlib.import_module(str(node.module)), name.name), name.name


def test_what_is_added_by_one_row_stands_where_it_is_said():
    part = CONTRIBUTING[CONTRIBUTING.index('## What is added by one row') :]
    rows = re.findall(r'^\| (an? .*?) \| .* \| (.*) \|$', part, re.MULTILINE)
    assert len(rows) == 12
    for what, where in rows:
        places = re.findall(r'`(\w+)`[^`]*? in `([\w/]+\.py)`', where)
        assert places, what
        for name, file in places:
            module = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
            assert hasattr(module, name), (what, name, file)


def test_every_file_of_the_package_is_in_the_list_in_the_order_of_imports():
    part = CONTRIBUTING[CONTRIBUTING.index('| file | what it holds |') :].partition('\n\n')[0]
    listed = re.findall(r'^\| `([\w/]+)\.py`.*? \|', part, re.MULTILINE)
    order = [name.removeprefix('igseg.').replace('.', '/') for name in names(ORDER)]
    assert listed == [*order[-2:], *order[1:-2]]  # what users start is told first


def test_earlier_modules_are_where_it_is_said():
    part = CONTRIBUTING[CONTRIBUTING.index('| module | is now') :]
    modules, _, parts = part.partition('What left `integrated_gradients.py`')
    rows = re.findall(r'^\| (`.*?`) \| (.*) \|$', modules, re.MULTILINE)
    assert len(rows) == 40
    rows += re.findall(r'^\| (.*?) \| (`\w+/?\w+\.py`.*) \|$', parts, re.MULTILINE)
    assert len(rows) > 50
    for old, new in rows:
        files = re.findall(r'`([\w/]+\.(?:py|html|json\.gz))`', new)
        assert files, old
        assert all((ROOT / 'igseg' / file).is_file() for file in files), (old, files)


def test_what_published_examples_import_can_be_imported():
    part = CONTRIBUTING[CONTRIBUTING.index('| before | now |') :]
    imported = re.findall(r'^\| `from \w+ import (.*?)`', part, re.MULTILINE)
    assert len(imported) == 4
    for name in ', '.join(imported).split(', '):
        assert getattr(integrated_gradients, name) is not None, name


def anchor(heading: str) -> str:
    """The address of a heading, as it is made from its text."""
    return re.sub(r'[^\w -]', '', heading.lstrip('# ').lower()).strip().replace(' ', '-')


def test_the_statistics_file_holds_what_the_table_says(tmp_path):
    single = shlex.split(commands()[0].replace('demo/', f'{ROOT}/demo/'))[2:]
    quick = ['--image_size', '128', '--num_steps', '1', '--device', 'cpu', '--figures', 'none']
    arguments = [*single, *quick, '--output_dir', str(tmp_path)]
    assert integrated_gradients.main(arguments) == 0
    (path,) = tmp_path.glob('*/*_statistics.json')
    assert json.loads(path.read_text()).keys() == STATISTICS.keys()
