"""Imports go one way, no two files import each other, and the method needs torch alone."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest

from conftest import ROOT

# A file may import from its own room and from the rooms before it.
ROOMS = (
    'diracconv',
    'diracparams',
    'diracnet',
    'diracfold',
    'diracify',
    'hubconf',
    'lab.errors',
    'lab.memory',
    'lab.files',
    'lab.cuda',
    'lab.distributed',
    'lab.models',
    'lab.data',
    'lab.device',
    'lab.training',
    'lab.runs',
    'lab.folded',
    'lab.onnx_models',
    'train',
    'tools',
)
STANDS_ALONE = ROOMS[: ROOMS.index('hubconf') + 1]
PACKAGES = ('lab', 'lab.data', 'lab.models', 'lab.runs', 'lab.training')  # empty __init__.py


def find_files():
    """The files of all rooms: dotted name to path."""
    paths = [ROOT / f'{room}.py' for room in (*STANDS_ALONE, 'train')]
    paths += [path for folder in ('lab', 'tools') for path in (ROOT / folder).rglob('*.py')]
    names = ('.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in paths)
    return {name.removesuffix('.__init__'): path for name, path in zip(names, paths)}


def imported_modules(path):
    """The dotted names of all modules that a file may import, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno} has a relative import'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def room_of(name):
    """The position of a file's room in ROOMS."""
    for position, room in enumerate(ROOMS):
        if name == room or name.startswith(f'{room}.'):
            return position
    raise AssertionError(f'{name} is in no room')


FILES = find_files()
IMPORTS = {
    name: (set(imported_modules(path)) & set(FILES)) - {name, *PACKAGES}
    for name, path in FILES.items()
    if name not in PACKAGES
}


def test_every_kind_of_import_is_found():
    assert {'diracconv', 'diracparams'} <= IMPORTS['diracnet']  # from diracparams import check
    assert 'diracnet' in IMPORTS['lab.models.registry']  # import diracnet
    assert 'lab.data.datasets' in IMPORTS['lab.folded']  # from lab.data import datasets
    assert all(FILES[name].read_text() == '' for name in PACKAGES)


def test_no_file_imports_upwards():
    pairs = [(name, other) for name, others in IMPORTS.items() for other in others]
    assert not [pair for pair in pairs if room_of(pair[1]) > room_of(pair[0])]


def test_no_files_import_each_other():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize('name', STANDS_ALONE)
def test_method_needs_torch_alone(name):
    packages = {module.split('.')[0] for module in imported_modules(FILES[name])}
    assert packages - {'torch'} - sys.stdlib_module_names <= set(STANDS_ALONE)
