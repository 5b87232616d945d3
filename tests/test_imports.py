"""Imports go one way, no two files import each other, and the method needs torch alone."""

import ast
import sys

import pytest

from conftest import ROOT

# A file may import from its own room and from the rooms before it.
ROOMS = (
    'diracconv',
    'diracparams',
    'diracnet',
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
STANDS_ALONE = ('diracconv', 'diracparams', 'diracnet', 'diracify', 'hubconf')


def find_files(root):
    """The files of all rooms: dotted name to path."""
    paths = [root / f'{room}.py' for room in ROOMS if '.' not in room]
    for folder in ('lab', 'tools'):
        paths += (root / folder).rglob('*.py')
    files = {}
    for path in paths:
        if path.exists():
            parts = path.relative_to(root).with_suffix('').parts
            files['.'.join(part for part in parts if part != '__init__')] = path
    return files


def find_names(path):
    """The dotted names that a file imports, also within functions: (module, name or None)."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno} has a relative import'
            names += [(node.module, alias.name) for alias in node.names]
    return names


def find_imports(files):
    """Which files each of these files imports."""
    imports = {}
    for name, path in files.items():
        found = set()
        for module, attribute in find_names(path):
            inner = f'{module}.{attribute}'  # `from lab import files` imports lab.files
            found.add(inner if inner in files else module)
        imports[name] = sorted(found & set(files) - {name})
    return imports


def room_of(name):
    """The position of a file's room in ROOMS; -1 for the package lab, whose file is empty."""
    for position, room in enumerate(ROOMS):
        if name == room or name.startswith(f'{room}.'):
            return position
    return -1


def upward_imports(imports):
    lines = []
    for name, imported_names in imports.items():
        higher = [imported for imported in imported_names if room_of(imported) > room_of(name)]
        lines += [f'{name} imports {imported}' for imported in higher]
    return lines


def find_circle(imports):
    """Files of which each imports the next, and the last one the first; [] if there are none."""
    finished = set()

    def search(name, path):
        if name in path:
            return path[path.index(name) :]
        if name not in finished:
            for imported in imports[name]:
                circle = search(imported, [*path, name])
                if circle:
                    return circle
            finished.add(name)
        return []

    for name in imports:
        circle = search(name, [])
        if circle:
            return circle
    return []


def foreign_imports(path):
    """The packages that a file imports, without torch and the standard library."""
    packages = {module.split('.')[0] for module, _ in find_names(path)}
    return packages - {'torch'} - sys.stdlib_module_names


FILES = find_files(ROOT)


def test_every_file_is_found_and_has_a_room():
    assert {'diracconv', 'diracnet', 'train', 'lab.runs.checkpoint', 'tools.plot'} <= set(FILES)
    packages = {'lab', 'lab.data', 'lab.models', 'lab.runs', 'lab.training'}  # empty __init__.py
    for name in set(FILES) - packages:
        assert room_of(name) >= 0, name
    for name in packages:
        assert FILES[name].read_text() == ''


def test_no_file_imports_upwards():
    assert upward_imports(find_imports(FILES)) == []


def test_no_files_import_each_other():
    assert find_circle(find_imports(FILES)) == []


@pytest.mark.parametrize('name', STANDS_ALONE)
def test_method_needs_torch_alone(name):
    assert foreign_imports(FILES[name]) <= set(STANDS_ALONE)
