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

INSTALLED = ('diracconv', 'diracify', 'diracnet', 'diracparams')

# A user's program: arguments are the files that it writes.
PROJECT = """
import sys
import torch, torchvision
import diracnet
from diracconv import DiracConv2d
from diracify import diracify, fold

for name in ('diracconv', 'diracify', 'diracnet', 'diracparams'):
    assert sys.modules[name].__file__.startswith(sys.prefix)
assert diracnet.diracnet18().fc.out_features == 1000

torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=2)
model.layer1[0].conv1 = DiracConv2d(64, 64, 3, padding=1, bias=False)
diracify(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
images, targets = torch.randn(16, 3, 32, 32), torch.arange(16) % 2
losses = []
for _ in range(8):
    loss = torch.nn.functional.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
folded = fold(model.eval())
torch.onnx.export(folded, (images,), sys.argv[1])
assert not any(hasattr(module, 'running_var') for module in folded.modules())
torch.save([images, model(images).detach(), torch.tensor(losses)], sys.argv[2])
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
    """A torchvision model is diracified, trained, folded and exported."""
    onnxruntime = pytest.importorskip('onnxruntime')
    model, results = tmp_path / 'net.onnx', tmp_path / 'results.pt'
    with_torch = {**os.environ, 'PYTHONPATH': str(Path(torch.__file__).parents[1])}
    run(environment, '-c', PROJECT, model, results, cwd=tmp_path, env=with_torch)
    images, logits, losses = torch.load(results, weights_only=True)
    assert losses[-1] < losses[0] / 2
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    [exported] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert abs(exported - logits.numpy()).max() <= 1e-4 * logits.abs().max()


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
