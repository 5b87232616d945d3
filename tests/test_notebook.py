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
    for scheme in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(scheme, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
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


def new_cell(id, source):
    return nbformat.v4.new_code_cell(source, id=id)


def test_planted_faults_fail_its_assertions(execute):
    notebook = without_outputs()
    cells = {cell.id: cell for cell in notebook.cells}
    compare = cells['compare'].source
    raw_weight = cells['fold-block'].source.replace(
        'fold_batch_norm(w_hat', "fold_batch_norm(params[f'{name}.conv']"
    )
    assert raw_weight != cells['fold-block'].source
    spoil_weight = "key = 'group1.block2.conv.weight'\nwhole = folded[key]\n"
    spoil_weight += 'folded[key] = whole * 1.01\n'
    spoil_bias = "folded[key] = whole\nwhole = folded['conv.bias']\n"
    spoil_bias += "folded['conv.bias'] = whole + 0.01\n"
    spoil_module = "folded['conv.bias'] = whole\n"
    spoil_module += 'module.features.group2.block5.conv.weight.mul_(1.01)\n'
    repair = 'module.load_state_dict(diracnet.fold(params))\n'
    faults = [
        new_cell('hand', spoil_weight + compare),
        new_cell('bias', spoil_bias + compare),
        new_cell('module-weight', spoil_module + compare),
        new_cell('repaired', repair + compare),
        new_cell('block', raw_weight),
        # The last section draws the published network. Here it draws another with its shapes.
        new_cell('filters-defined', cells['filters'].source),
        new_cell('stand-in', 'diracnet.diracnet18 = lambda pretrained: diracnet.DiracNet(18)'),
        new_cell('published', cells['published'].source),
    ]
    # The cells after `compare` take time and are not needed, except for those in `faults`.
    end = notebook.cells.index(cells['compare']) + 1
    notebook.cells = deepcopy(notebook.cells[:end]) + faults
    ran = execute(notebook, allow_errors=True)

    errors = {
        cell.id: cell.outputs[-1]
        for cell in ran.values()
        if cell.cell_type == 'code' and cell.outputs and cell.outputs[-1].output_type == 'error'
    }
    assert set(errors) == {'hand', 'bias', 'module-weight', 'block'}, errors
    assert all(error.ename == 'AssertionError' for error in errors.values()), errors
    for id in ('hand', 'bias', 'module-weight'):
        assert 'of the largest logit' in errors[id].evalue
    assert '11,511,784 parameters' in printed(ran['published'])
    assert len(pictures(ran['published'])) == 1
