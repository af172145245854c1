"""Rooms that read pictures and write results start without torch and other slow imports."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

WITHOUT_TORCH = [
    *(f'igseg.{name}' for name in ('errors', 'setting', 'maps', 'explanation', 'preprocessing',
                                   'statistics', 'checks.verdict')),
    *(f'igseg.{folder}.{path.stem}' for folder in ('data', 'results')
      for path in sorted((ROOT / 'igseg' / folder).glob('*.py')) if path.stem != '__init__'),
]  # fmt: skip

SLOW = ('scipy', 'skimage', 'pandas', 'jinja2', 'loky', 'tifffile')

WITH_MATPLOTLIB = ('igseg.results.sheet', 'igseg.results.figures')


def loaded_by(rooms: list[str], libraries: tuple[str, ...]) -> dict[str, list[str]]:
    """The libraries that each room brings into a fresh process, in which the rooms are imported
    one after the other."""
    script = (
        'import importlib, json, sys\n'
        'before, found = set(), {}\n'
        f'for room in {rooms!r}:\n'
        '    importlib.import_module(room)\n'
        f'    now = {{name for name in {libraries!r} if name in sys.modules}}\n'
        '    found[room], before = sorted(now - before), now\n'
        'print(json.dumps(found))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_these_rooms_import_no_torch_and_nothing_slow():
    rooms = [room for room in WITHOUT_TORCH if room not in WITH_MATPLOTLIB]
    found = loaded_by([*rooms, *WITH_MATPLOTLIB], ('torch', *SLOW))
    assert not any(found.values()), found


def test_only_what_draws_imports_matplotlib():
    rooms = [room for room in WITHOUT_TORCH if room not in WITH_MATPLOTLIB]
    found = loaded_by(rooms, ('matplotlib',))
    assert not any(found.values()), found
