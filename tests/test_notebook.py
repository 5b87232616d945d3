"""diracnet-export.ipynb: runs offline and prints what is committed."""

import re

import pytest

from conftest import ROOT

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('matplotlib')

NAME = 'diracnet-export.ipynb'
SHOWS_SOMETHING = re.compile(r'\bprint\(|plt\.show\(|^draw_', re.MULTILINE)
MACHINE_OR_ERROR = re.compile(r'/(work|root|tmp|home|Users)\b|[A-Z]:\\|Traceback|Warning')


def committed():
    return nbformat.read(ROOT / NAME, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(cell):
    """What a cell prints, without torch.hub's line about a download, which has a local path."""
    text = ''.join(output.text for output in cell.outputs if output.output_type == 'stream')
    return re.sub('^Downloading: .*\n', '', text, flags=re.MULTILINE)


def pictures(cell):
    return [
        output.data['image/png'] for output in cell.outputs if 'image/png' in output.get('data', {})
    ]


def test_committed_with_its_outputs():
    """From one run, top to bottom, and without paths of a machine."""
    notebook = committed()
    nbformat.validate(notebook)
    code = code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code if SHOWS_SOMETHING.search(cell.source))
    assert sum(len(pictures(cell)) for cell in code) >= 2
    for text in [cell.source for cell in notebook.cells] + [printed(cell) for cell in code]:
        assert not MACHINE_OR_ERROR.search(text), text


def test_runs_offline_and_prints_what_is_committed(tmp_path, monkeypatch):
    # No server listens at this proxy, and the cache has no downloads of earlier runs.
    for name in ('http_proxy', 'https_proxy', 'no_proxy'):
        monkeypatch.setenv(name, '' if name == 'no_proxy' else 'http://127.0.0.1:9')
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    # The network is small: on a busy machine several threads take far longer than one.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONDONTWRITEBYTECODE', '1')
    notebook = committed()
    place = {'metadata': {'path': str(ROOT)}}
    client = nbclient.NotebookClient(notebook, timeout=180, kernel_name='python3', resources=place)
    client.execute()  # raises at the first error in a cell, and replaces all outputs
    cells = {cell.id: cell for cell in notebook.cells}
    for old in code_cells(committed()):
        new = cells[old.id]
        assert len(pictures(new)) == len(pictures(old)), old.id
        if old.id == 'onnx' and 'not installed' in printed(new):
            continue
        assert printed(new) == printed(old), f'execute the notebook again: {old.id} has changed'
    assert printed(cells['published'])
    assert 'DiracNet-18' not in printed(cells['published'])
