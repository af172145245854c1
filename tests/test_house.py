"""The house: which module may import which, and how large they are.

A module that is new gets its place in ORDER: below (after) all that it imports.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

# From the ground to the roof; each module imports only what stands before it.
ORDER = """
igseg
igseg: errors program setting maps explanation preprocessing statistics
igseg.data: medical pixels truth masks annotations layouts samples
igseg.network: kinds identity outputs description score facts checkpoint recognise factory loading
igseg.engine: private_torch trace geometry rewrites crops graph preparation memory engine sampler
igseg.method: choice rules targets baselines paths integral walk method layers methods
igseg.checks: effort subject curves checks verdict
igseg.results: regions view fonts sheet figures files finished export page
igseg: settings
igseg.analysis: references image tiles study truth describe sample job summary batch
igseg: command_line start
integrated_gradients run_integrated_gradients
"""
FOLDERS = ('data', 'network', 'engine', 'method', 'checks', 'results', 'analysis')
PICTURES, GRADIENTS = ('data',), ('network', 'engine', 'method')  # the two wings

MODULE_LINES, BODY_LINES, FILES, CHAIN = 700, 50, 10, 14
LONG_BODIES: set[str] = set()


def names(text: str) -> list[str]:
    """Full names from lines of `folder: name name`."""
    listed = []
    for line in text.strip().splitlines():
        folder, colon, rooms = line.rpartition(':')
        listed += [f'{folder}.{room}' if colon else room for room in rooms.split()]
    return listed


def modules() -> dict[str, Path]:
    """Every module by its name, but the folders' own `__init__.py`, which hold no code."""
    files = [p for p in (ROOT / 'igseg').rglob('*.py') if p.parent.name not in FOLDERS
             or p.name != '__init__.py']  # fmt: skip
    files += [ROOT / 'integrated_gradients.py', ROOT / 'run_integrated_gradients.py']
    named = {'.'.join(p.relative_to(ROOT).with_suffix('').parts): p for p in files}
    return {name.removesuffix('.__init__'): path for name, path in named.items()}


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in MODULES.items()}


@cache
def imports(module: str) -> frozenset[str]:
    """What a module imports when it runs, at its top or inside a function. What stands under
    `if TYPE_CHECKING` is for type checkers only: data classes may name each other there."""
    found, left = set(), [TREES[module]]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test):
            left += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{module} imports relatively in line {node.lineno}'
            inner = {f'{node.module}.{name.name}' for name in node.names} & MODULES.keys()
            found |= inner if len(inner) == len(node.names) else inner | {node.module}
        left += ast.iter_child_nodes(node)
    return frozenset(found)


def folder(module: str) -> str:
    """The folder of the package in which a module lies; empty at the top, and for libraries."""
    return module.split('.')[1] if re.fullmatch(r'igseg\.\w+\.\w+', module) else ''


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f'{module}.{node.name}', node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def test_every_module_has_its_place():
    assert sorted(names(ORDER)) == sorted(MODULES), 'ORDER and the files differ'


@pytest.mark.parametrize('module', names(ORDER))
def test_a_module_imports_only_what_stands_before_it(module):
    before = names(ORDER)[: names(ORDER).index(module)]
    assert sorted(imports(module) & MODULES.keys() - set(before)) == []


def test_pictures_and_gradients_do_not_know_each_other():
    wings = {**dict.fromkeys(PICTURES, GRADIENTS), **dict.fromkeys(GRADIENTS, PICTURES)}
    met = [(one, other) for one in MODULES for other in imports(one)
           if folder(other) in wings.get(folder(one), ())]  # fmt: skip
    assert met == []


def test_nothing_in_the_package_imports_the_users_module():
    """Started as a script it would exist twice, and child processes would pickle other classes."""
    users = {'integrated_gradients', 'run_integrated_gradients'}
    assert [one for one in MODULES if one not in users and imports(one) & users] == []


def test_modules_are_short():
    lines = {name: path.read_text(encoding='utf-8').count('\n') for name, path in MODULES.items()}
    assert {name for name, count in lines.items() if count > MODULE_LINES} == set()


def test_functions_are_short():
    """Counted from the first statement after the docstring to the end of the last one."""
    long = set()
    for name, function in functions():
        body = function.body[1:] if ast.get_docstring(function) else function.body
        if body and body[-1].end_lineno - body[0].lineno + 1 > BODY_LINES:
            long.add(name)
    assert long == LONG_BODIES


@pytest.mark.parametrize('name', ['', *FOLDERS])
def test_a_folder_holds_few_files(name):
    files = [p for p in (ROOT / 'igseg' / name).glob('*.py') if p.name != '__init__.py']
    assert 0 < len(files) <= FILES


@pytest.mark.parametrize('name', FOLDERS)
def test_a_folder_says_what_it_is_and_what_it_may_import(name):
    text = (ROOT / 'igseg' / name / '__init__.py').read_text(encoding='utf-8')
    (docstring,) = ast.parse(text).body
    said = ast.get_docstring(ast.Module([docstring], []))
    assert 3 <= said.count('\n') + 1 <= 4
    may = re.search(r'May import (.+)\.$', said.replace('\n', ' '))
    allowed = set(re.findall(r'`(\w+)/`', may[1]))
    used = {folder(other) for one in MODULES if folder(one) == name for other in imports(one)}
    assert used - {name, ''} <= allowed


def test_chains_of_imports_are_short():
    @cache
    def height(module: str) -> int:
        return 1 + max((height(one) for one in imports(module) & MODULES.keys()), default=0)

    assert max(height(module) for module in MODULES) <= CHAIN
