"""diracnet-export.ipynb: runs offline, prints what is committed, and its assertions can fail."""

import re
from copy import deepcopy

import pytest

from conftest import ROOT

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('matplotlib')

NAME = 'diracnet-export.ipynb'
SHOWS_SOMETHING = re.compile(r'\bprint\(|plt\.show\(|^draw_', re.MULTILINE)
MACHINE_OR_ERROR = re.compile(r'/(work|root|tmp|home|Users)\b|[A-Z]:\\|Traceback|Warning')


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute(notebook, ...): run a copy in the repository's root, offline; returns cells by id."""
    # No server listens at this proxy, and the cache has no downloads of earlier runs.
    for name in ('http_proxy', 'https_proxy', 'no_proxy'):
        monkeypatch.setenv(name, '' if name == 'no_proxy' else 'http://127.0.0.1:9')
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    # The network is small: on a busy machine several threads take far longer than one.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setenv('PYTHONDONTWRITEBYTECODE', '1')

    def execute(notebook, **options):
        path = tmp_path / NAME
        nbformat.write(notebook, path)
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(
            notebook,
            timeout=180,
            kernel_name='python3',
            record_timing=False,
            resources={'metadata': {'path': str(ROOT)}},
            **options,
        ).execute()
        return {cell.id: cell for cell in notebook.cells}

    return execute


def committed():
    return nbformat.read(ROOT / NAME, as_version=4)


def without_outputs():
    notebook = committed()
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def printed(cell):
    return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


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


def test_runs_offline_and_prints_what_is_committed(execute):
    cells = execute(without_outputs())  # raises at the first error in a cell
    for old in code_cells(committed()):
        new = cells[old.id]
        assert len(pictures(new)) == len(pictures(old)), old.id
        if old.id == 'onnx' and 'not installed' in printed(new):
            continue
        assert printed(new) == printed(old), f'execute the notebook again: {old.id} has changed'
    assert printed(cells['published'])
    assert 'DiracNet-18' not in printed(cells['published'])


def test_planted_faults_fail_its_assertions(execute):
    notebook = without_outputs()
    cells = {cell.id: cell for cell in notebook.cells}
    compare, fold_block = cells['compare'].source, cells['fold-block'].source
    raw_weight = fold_block.replace(
        'fold_batch_norm(w_hat', "fold_batch_norm(params[f'{name}.conv']"
    )
    assert raw_weight != fold_block
    spoiled_module = 'module.features.group2.block5.conv.weight.mul_(1.01)\n'
    sources = {
        'by-hand': "bias = folded['conv.bias']\nfolded['conv.bias'] = bias + 0.01\n" + compare,
        'spoiled': "folded['conv.bias'] = bias\n" + spoiled_module + compare,
        'repaired': 'module.load_state_dict(diracnet.fold(params))\n' + compare,
        'block': raw_weight,
        # The last section draws the published network. Here it draws another with its shapes.
        'filters-defined': cells['filters'].source,
        'stand-in': 'diracnet.diracnet18 = lambda pretrained: diracnet.DiracNet(18)',
        'published': cells['published'].source,
    }
    # The cells after `compare` take time and are not needed, except for those in `sources`.
    end = notebook.cells.index(cells['compare']) + 1
    added = [nbformat.v4.new_code_cell(source, id=id) for id, source in sources.items()]
    notebook.cells = deepcopy(notebook.cells[:end]) + added
    ran = execute(notebook, allow_errors=True)
    errors = {
        cell.id: output.ename
        for cell in code_cells(notebook)
        for output in ran[cell.id].outputs
        if output.output_type == 'error'
    }
    assert errors == dict.fromkeys(['by-hand', 'spoiled', 'block'], 'AssertionError')
    assert '11,511,784 parameters' in printed(ran['published'])
    assert len(pictures(ran['published'])) == 1
