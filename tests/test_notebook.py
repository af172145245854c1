"""The notebook, executed."""

import nbclient
import nbformat
from helpers import PATIENCE, ROOT

NOTEBOOK = ROOT / 'integrated_gradients_interactive.ipynb'


def test_notebook_is_committed_without_outputs_and_runs_top_to_bottom(monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv('IMAGE_SIZE', '128')
    client = nbclient.NotebookClient(
        notebook,
        timeout=PATIENCE,
        startup_timeout=PATIENCE,
        resources={'metadata': {'path': str(ROOT)}},
    )
    client.execute()
    pictures = sum('image/png' in out.get('data', {}) for cell in code for out in cell.outputs)
    assert pictures >= 4
    assert any(
        'application/vnd.jupyter.widget-view+json' in output.get('data', {})
        for output in code[-1].outputs
    )


def test_the_chooser_shows_methods_side_by_side(monkeypatch, capsys):
    """The last cell, with what it needs, and one choice made."""
    monkeypatch.setenv('IMAGE_SIZE', '64')
    monkeypatch.chdir(ROOT)
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    shown, names = [], {}
    exec(cells['cell-01'].replace('%matplotlib inline', ''), names)
    names['display'] = shown.append
    for cell in ('cell-03', 'cell-12'):
        exec(cells[cell], names)
    methods = ('ig', 'expected', 'gradcam:encoder.stage3')
    names['explore'](names['sample'].name, methods, 'mean', 'image', 2, False)
    assert [type(one).__name__ for one in shown] == ['interactive', 'Figure']
    assert len(shown[1].axes) == 1 + len(methods)
    said = capsys.readouterr().out
    assert all(f'({method}, target image' in said for method in methods)
    names['explore'](names['sample'].name, ('gradient',), 'mean', 'nonsense', 2, False)
    assert len(shown) == 2 and 'nonsense' in capsys.readouterr().out
