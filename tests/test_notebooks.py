"""The notebooks run from top to bottom, offline, and print what they claim."""
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / 'docs' / 'notebooks'


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.ipynb')), ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=300, kernel_name='python3',
                   resources={'metadata': {'path': str(FOLDER)}}).execute()
    printed = ''.join(output.get('text', '') for cell in notebook.cells if cell.cell_type == 'code'
                      for output in cell.outputs)
    checks = [line for line in printed.splitlines() if line in ('True', 'False')]
    assert checks and all(line == 'True' for line in checks)
