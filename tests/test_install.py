"""pip install . installs the method and nothing else, and another project can use it."""

import inspect
import os
import shutil
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest
import torch

from conftest import ROOT

INSTALLED = ('diracconv', 'diracfold', 'diracify', 'diracnet', 'diracparams')

PROJECT = """
import sys
import torch, torchvision
import diracnet
from diracconv import DiracConv2d
from diracify import diracify, fold

for name in ('diracconv', 'diracfold', 'diracify', 'diracnet', 'diracparams'):
    assert sys.modules[name].__file__.startswith(sys.prefix)
assert diracnet.diracnet18().fc.out_features == 1000

model = diracify(torchvision.models.resnet18())
assert isinstance(model.layer1[0].conv1, DiracConv2d)
folded, images = fold(model.eval()), torch.randn(2, 3, 32, 32)
torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
"""


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


def test_only_the_method_is_installed(environment):
    [packages] = environment.parents[1].glob('lib/python*/site-packages')
    names = {path.name for path in packages.iterdir() if path.name != '__pycache__'}
    assert {name for name in names if not name.endswith('.dist-info')} == {
        f'{name}.py' for name in INSTALLED
    }
    for name in INSTALLED:
        assert (packages / f'{name}.py').read_bytes() == (ROOT / f'{name}.py').read_bytes()


def test_another_project(environment, tmp_path):
    with_torch = {**os.environ, 'PYTHONPATH': str(Path(torch.__file__).parents[1])}
    run(environment, '-c', PROJECT, cwd=tmp_path, env=with_torch)


@pytest.mark.parametrize('name', INSTALLED)
def test_type_hints(name):
    """Public functions and methods have a hint for each argument and for what they return."""
    module = import_module(name)
    mine = [value for value in vars(module).values() if getattr(value, '__module__', '') == name]
    functions = [value for value in mine if inspect.isfunction(value)]
    for kind in filter(inspect.isclass, mine):
        functions += filter(inspect.isfunction, vars(kind).values())
    public = [function for function in functions if not function.__name__.startswith('_')]
    assert public
    for function in public:
        parameters = inspect.signature(function).parameters
        named = {key for key in parameters if parameters[key].kind != inspect.Parameter.VAR_KEYWORD}
        assert {*named, 'return'} - {'self', 'cls'} <= set(typing.get_type_hints(function)), (
            function
        )
