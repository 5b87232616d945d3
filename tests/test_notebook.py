"""diracnet-export.ipynb runs offline from top to bottom, its assertions can fail, and what is committed is what it gives."""

import re
from copy import deepcopy

import pytest

from conftest import ROOT

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')
pytest.importorskip('ipykernel')
pytest.importorskip('matplotlib')

NAME = 'diracnet-export.ipynb'
SHOWS = re.compile(r'\bprint\(|plt\.show\(|^draw_', re.MULTILINE)
MACHINE = re.compile(r'/(work|root|tmp|home|Users)\b|[A-Z]:\\|Traceback|Warning')


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """execute(notebook, ...): run a copy in the repository's root, without a network; cells by id afterwards."""
    # A proxy where nobody listens: offline wherever the tests run. An empty cache: nobody's downloads are found.
    for scheme in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(scheme, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv(
        'OMP_NUM_THREADS', '1'
    )  # the network is small; threads that wait for a busy machine take far longer
    monkeypatch.setenv('PYTHONDONTWRITEBYTECODE', '1')

    def execute(notebook, **options):
        copy = tmp_path / NAME
        nbformat.write(notebook, copy)
        notebook = nbformat.read(copy, as_version=4)
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


def blank():
    notebook = committed()
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = [], None
    return notebook


def text(cell):
    """What a cell printed."""
    return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


def pictures(cell):
    return [
        output.data['image/png'] for output in cell.outputs if 'image/png' in output.get('data', {})
    ]


def test_committed_with_its_outputs():
    notebook = committed()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == 'python3'
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(
        range(1, len(code) + 1)
    )  # one run, from top to bottom
    for cell in code:
        assert 'execution' not in cell.metadata  # times of a run
        if SHOWS.search(cell.source):
            assert cell.outputs, f'{cell.id} has no output'
        for output in cell.outputs:
            assert (
                output.output_type in ('stream', 'display_data') and output.get('name') != 'stderr'
            ), (cell.id, output)
    assert sum(len(pictures(cell)) for cell in code) >= 2
    for cell in notebook.cells:
        shown = cell.source + (text(cell) if cell.cell_type == 'code' else '')
        assert not MACHINE.search(shown), (cell.id, MACHINE.search(shown))


def test_runs_from_top_to_bottom_offline(execute):
    cells = execute(blank())  # raises at the first error in a cell
    for old in committed().cells:
        if old.cell_type == 'code':
            new = cells[old.id]
            assert len(pictures(new)) == len(pictures(old)), old.id
            if old.id != 'onnx' or 'not installed' not in text(new):
                assert text(new) == text(old), (
                    f'{old.id} prints something else than is committed: run it again'
                )
    assert 'can not be had' in text(cells['published'])


def cell(id, source):
    return nbformat.v4.new_code_cell(source, id=id)


def test_planted_faults_fail_its_assertions(execute):
    notebook = blank()
    cells = {cell.id: cell for cell in notebook.cells}
    last = notebook.cells.index(
        cells['filters']
    )  # what comes after needs time and is not asked for
    altered = deepcopy(notebook.cells[:last])
    where = [cell.id for cell in altered].index('compare')
    compare = cells['compare'].source
    altered[where + 1 : where + 1] = [
        cell(
            'hand',
            "key = 'group1.block2.conv.weight'\nwhole = folded[key]\nfolded[key] = whole * 1.01\n"
            + compare,
        ),
        cell(
            'bias',
            "folded[key] = whole\nwhole = folded['conv.bias']\nfolded['conv.bias'] = whole + 0.01\n"
            + compare,
        ),
        cell(
            'module-weight',
            "folded['conv.bias'] = whole\nmodule.features.group2.block5.conv.weight.mul_(1.01)\n"
            + compare,
        ),
        cell('repaired', 'module.load_state_dict(diracnet.fold(params))\n' + compare),
        cell(
            'block',
            cells['fold-block'].source.replace(
                'fold_batch_norm(w_hat', "fold_batch_norm(params[f'{name}.conv']"
            ),
        ),
        # Where the published file can be had, the last section draws it; here, a network of its shapes.
        cell('filters-defined', cells['filters'].source),
        cell('stand-in', 'diracnet.diracnet18 = lambda pretrained: diracnet.DiracNet(18)'),
        cell('published', cells['published'].source),
    ]
    notebook.cells = altered
    ran = execute(notebook, allow_errors=True)

    errors = {
        id: cell.outputs[-1]
        for id, cell in ran.items()
        if cell.cell_type == 'code' and cell.outputs and cell.outputs[-1].output_type == 'error'
    }
    assert set(errors) == {'hand', 'bias', 'module-weight', 'block'}, errors
    assert all(error.ename == 'AssertionError' for error in errors.values()), errors
    for id in ('hand', 'bias', 'module-weight'):
        assert 'of the largest logit' in errors[id].evalue
    assert (
        '11,511,784 parameters' in text(ran['published']) and len(pictures(ran['published'])) == 1
    )
