"""The notebook, executed."""

import nbclient
import nbformat
from helpers import ROOT


def test_notebook_is_committed_without_outputs_and_runs_top_to_bottom(monkeypatch):
    notebook = nbformat.read(ROOT / 'integrated_gradients_interactive.ipynb', as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv('IMAGE_SIZE', '128')
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={'metadata': {'path': str(ROOT)}}
    )
    client.execute()
    pictures = sum('image/png' in out.get('data', {}) for cell in code for out in cell.outputs)
    assert pictures >= 4
    assert any(
        'application/vnd.jupyter.widget-view+json' in output.get('data', {})
        for output in code[-1].outputs
    )
