"""pip install . installs the method and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT

INSTALLED = ('diracconv', 'diracify', 'diracnet')


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """The Python of a fresh virtual environment in which this checkout is installed.

    It has no packages but ours; torch is found through PYTHONPATH. A copy of the checkout is
    installed, so that no build/ is left here.
    """
    folder = tmp_path_factory.mktemp('install')
    checkout = folder / 'checkout'
    ignored = shutil.ignore_patterns('.*', '*.pyc', 'logs', 'data', 'build', '*.egg-info')
    shutil.copytree(ROOT, checkout, ignore=ignored, symlinks=True)
    run(sys.executable, '-m', 'venv', '--without-pip', folder / 'venv')
    interpreter = folder / 'venv' / 'bin' / 'python'
    # The wheel is built with the setuptools of the running Python: nothing is downloaded.
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
    offline = ('--no-deps', '--no-index')
    run(*pip, 'wheel', *offline, '--no-build-isolation', '-w', folder, checkout)
    [wheel] = folder.glob('*.whl')
    run(*pip, '--python', interpreter, 'install', *offline, wheel)
    return interpreter


def run(*command, **kwargs):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_only_the_method_is_installed(environment):
    [packages] = environment.parents[1].glob('lib/python*/site-packages')
    names = {path.name for path in packages.iterdir() if path.name != '__pycache__'}
    assert {name for name in names if not name.endswith('.dist-info')} == {
        f'{name}.py' for name in INSTALLED
    }
    for name in INSTALLED:
        assert (packages / f'{name}.py').read_bytes() == (ROOT / f'{name}.py').read_bytes()


def test_imports_outside_the_checkout(environment, tmp_path):
    code = f"""
import importlib.util
import diracconv, diracify, diracnet
print(diracnet.diracnet18().fc.out_features, diracconv.DiracConv2d(3, 4, 3).alpha.shape[0])
for module in (diracconv, diracify, diracnet):
    print(module.__file__)
for name in ('data', 'errors', 'lab', 'options', 'tools', 'train', 'hubconf', 'conftest'):
    spec = importlib.util.find_spec(name)
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    assert not any(str(place).startswith(({str(ROOT)!r}, {str(environment.parents[1])!r}))
                   for place in places), places
"""
    torch_path = Path(torch.__file__).parents[1]
    env = {**os.environ, 'PYTHONPATH': str(torch_path)}
    output = run(environment, '-c', code, cwd=tmp_path, env=env)
    first, *paths = output.splitlines()
    assert first == '1000 4'
    assert all(Path(path).is_relative_to(environment.parents[1]) for path in paths)
