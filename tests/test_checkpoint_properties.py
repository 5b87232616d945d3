"""Whatever is done to a checkpoint: it is refused in one line, or its network is exactly right.

HYPOTHESIS_PROFILE=full tries 2,000 examples.
"""

from hypothesis_profiles import places  # noqa: I001
import copy
import warnings
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diracnet import Network
from lab.errors import LONGEST, UserError, one_line
from lab.models import registry
from lab.runs import checkpoint
from lab.runs.resume import options_to_evaluate, options_to_train, restore
from lab.training.meters import Meters
from lab.training.optimizers import make_optimizer
from test import constants, randomized, relative_error

FIXTURES = Path(__file__).parent / 'fixtures'
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.bool, torch.complex64),
)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}


# --- sound files -----------------------------------------------------------------------------


def stored_run(name):
    return torch.load(FIXTURES / name / 'model.pt7', weights_only=True)


def parameters(model, depth, width):
    return constants(randomized(registry.define(model, depth, width, 'digits')[1]))


def export_of(model):
    params = parameters(model, 10, 0.125)
    run = stored_run('diracnet-10-interrupted')
    return {
        'state_dict': dict(registry.fold(model, params)),
        'network': {**run['network'], 'model': model, 'width': 0.125},
        'classes': run['classes'],
        'preprocessing': run['preprocessing'],
    }


def published(params):
    """The layout of the original's published files."""
    statistics = {key: tensor for key, tensor in params.items() if 'running' in key}
    others = {key: tensor for key, tensor in params.items() if key not in statistics}
    return {'params': others, 'stats': {**statistics, 'eye4_4_3_3': torch.zeros(4, 4, 3, 3)}}


SOUND = {
    'interrupted run': lambda: stored_run('diracnet-10-interrupted'),
    'finished run of a resnet': lambda: stored_run('resnet-8'),
    'export': lambda: export_of('diracnet'),
    'export of version 1': lambda: export_of('diracnet-v1'),
    'export of repvgg': lambda: export_of('repvgg'),
    'published': lambda: published(parameters('diracnet', 10, 0.125)),
    **{f'bare {m}': partial(parameters, m, 10, 0.125) for m in ('plain', 'diracnet-v1', 'repvgg')},
    'bare wrn': lambda: {'state_dict': parameters('wrn', 10, 0.25), 'epoch': 3, 'arch': 'wrn'},
    'bare resnet-dirac': lambda: parameters('resnet-dirac', 8, 0.25),
}
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
sound = cache(lambda kind: SOUND[kind]())


def tensors_of(content):
    """The dict of tensors in the content of a sound file."""
    for name in ('params', 'state_dict'):
        if name in content:
            return {**content[name], **content.get('stats', {})}
    return content


@cache
def expected_logits(kind, network):
    """The logits of the tensors of a sound file in this network, a tuple of items."""
    tensors = constants(tensors_of(sound(kind)), torch.float64)
    network = dict(network)
    with torch.no_grad():
        if kind.startswith('export'):
            return registry.folded_module(network['model'], tensors)(IMAGES.double())
        f, _ = registry.define(**network)
        return f(IMAGES.double(), tensors, False)


# --- what is done to them --------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.floats(),
    st.sampled_from([60004, 2**40, 2**64, 10**400, -(2**70), 1e30, True]),
)
TENSORS = st.builds(torch.zeros, st.sampled_from([(), (7,), (0,), (7, 7, 3, 3), (3, 1, 2)]))
VALUES = st.recursive(
    st.one_of(
        *(st.none(), NUMBERS, st.text(max_size=10), st.binary(max_size=4), TENSORS),
        st.sampled_from(['\x1b[31m\n', 'plain', 'resnet', 'repvgg', 'ImageNet', 'bn-add', 'half']),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
SHAPES = {
    'flat': lambda t: t.flatten(),
    'one more dimension': lambda t: t.unsqueeze(0),
    'one more at the end': lambda t: t.unsqueeze(-1),
    'transposed': lambda t: t.transpose(0, -1) if t.ndim else t[None],
    'cut': lambda t: t[1:] if t.ndim else t[None],
    'doubled': lambda t: torch.cat([t, t]) if t.ndim else t[None],
    'scalar': lambda t: t.sum(),
    'expanded': lambda t: t.new_ones(()).expand(t.shape),
    'huge': lambda t: t.new_ones(()).expand(10**6, 10**6),
}


def quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


KINDS = {
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
    'sparse': lambda t: t.to_sparse(),
    'meta': lambda t: t.to('meta'),
    'quantized': quantized,
    'parameter': torch.nn.Parameter,
}
NUMBERS_IN = {
    name: lambda t, value=value: t.masked_fill(torch.arange(t.numel()).view(t.shape) == 0, value)
    for name, value in {'nan': torch.nan, 'inf': torch.inf, '-inf': -torch.inf}.items()
}


def at(content, path):
    for key in path:
        content = content[key]
    return content


class Changed:
    """A sound file, and what was done to its content."""

    def __init__(self, kind):
        self.kind, self.content, self.steps = kind, copy.deepcopy(sound(kind)), []

    def __repr__(self):
        return f'{self.kind}: {"; ".join(self.steps)}'

    def drop(self, path):
        *path, key = path
        parent = at(self.content, path)
        if isinstance(parent, dict):
            del parent[key]
        else:  # the other places stay
            parent[key] = None
        self.steps.append(f'drop {path} {key}')

    def put(self, path, value, how):
        *path, key = path
        at(self.content, path)[key] = value
        self.steps.append(f'{path} {key} = {how}')

    def rename(self, path, name):
        *path, key = path
        parent = at(self.content, path)
        parent[name] = parent.pop(key)
        self.steps.append(f'rename {path} {key} {name}')

    def retype(self, dtype):
        for *path, key in self.paths(torch.Tensor):
            group = at(self.content, path)
            group[key] = group[key].to(dtype)
        self.steps.append(f'all {dtype}')

    def paths(self, kind):
        return [path for path in places(self.content) if isinstance(at(self.content, path), kind)]


@st.composite
def changed_files(draw):
    runs = [kind for kind in SOUND if 'run' in kind]  # they have most to check
    changed = Changed(draw(st.sampled_from([*SOUND, *runs, *runs, *runs])))
    retyped = draw(st.integers(0, 7)) == 0
    if retyped:
        changed.retype(draw(st.sampled_from(DTYPES)))
    for _ in range(draw(st.integers(0 if retyped else 1, 3))):
        tensors = changed.paths(torch.Tensor)
        if tensors and draw(st.booleans()):
            chosen = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=4, unique=True))
            if draw(st.integers(0, 9)) == 0:
                chosen = tensors[:: draw(st.integers(1, 3))]
            change_some(draw, changed, chosen)
        else:
            change_fact(draw, changed)
    return changed


def change_some(draw, changed, chosen):
    """Drop, rename or change some tensors."""
    how = draw(st.sampled_from(['drop', 'rename', 'change', 'change']))
    for path in chosen:
        tensor = at(changed.content, path)
        if how == 'drop':
            changed.drop(path)
        elif how == 'rename' and isinstance(at(changed.content, path[:-1]), dict):
            name = path[-1]
            names = [f'{name}2', f'module.{name}', f'features.{name}', f'eye{name}', 'fc.bias']
            changed.rename(path, draw(st.sampled_from(names)))
        elif is_plain(tensor):
            change_tensor(draw, changed, path, tensor.detach())


def is_plain(tensor):
    """Whether a tensor can still be changed in every way, in a short time."""
    is_dense = tensor.is_cpu and tensor.layout is torch.strided
    return is_dense and tensor.dtype in TOLERANCE and tensor.numel() < 10**5


def change_tensor(draw, changed, path, tensor):
    """Another type, shape or number in a tensor; a finite number only as a negative variance."""
    if str(path[-1]).endswith('running_var') and draw(st.booleans()):
        changed.put(path, -1 - tensor.abs(), 'negative')
    else:
        choices = draw(st.sampled_from([KINDS, SHAPES, NUMBERS_IN]))
        how = draw(st.sampled_from(sorted(choices)))
        changed.put(path, choices[how](tensor), how)


def change_fact(draw, changed):
    """Drop, rename or replace a value that is not a tensor."""
    found = [path for path in changed.paths(object) if path]
    found = [path for path in found if not isinstance(at(changed.content, path), torch.Tensor)]
    if not found:
        return
    leaves = [p for p in found if not isinstance(at(changed.content, p), (dict, list))]
    shallow = [p for p in found if len(p) <= 2]
    path = draw(st.sampled_from(draw(st.sampled_from([leaves, leaves, shallow])) or found))
    parent = at(changed.content, path[:-1])
    how = draw(st.sampled_from(['drop', 'rename', 'replace', 'replace']))
    if how == 'drop':
        changed.drop(path)
    elif how == 'rename' and isinstance(parent, dict):
        names = [*parent, f'{path[-1]}s', 'depth', 'state_dict']
        changed.rename(path, draw(st.sampled_from(names)))
    else:
        value = draw(VALUES)
        changed.put(path, value, repr(value)[:200])


# --- the property ----------------------------------------------------------------------------


def is_one_line(error, path):
    line = one_line(str(error))
    return line.isprintable() and len(line) < 10 * LONGEST and str(path) in line


@pytest.mark.parametrize('kind', SOUND)
def test_sound_files_are_right(kind, tmp_path):
    path = tmp_path / 'sound.pt7'
    torch.save(sound(kind), path)
    check_accepted(kind, sound(kind), checkpoint.load(path))


@given(changed_files())
def test_changed_files(tmp_path_factory, changed):
    path = tmp_path_factory.getbasetemp() / 'changed.pt7'
    torch.save(changed.content, path)
    try:
        found = checkpoint.load(path)
    except UserError as error:
        assert is_one_line(error, path)
        return
    check_accepted(changed.kind, changed.content, found)


def check_accepted(kind, content, found):
    """The logits are those of the tensors of the sound file, in the network that the changed file
    says; its training goes on from the state in the file."""
    stated = content.get('network') or found.network
    stated = {'form': found.network['form'], **stated}  # older files do not say it
    network = tuple((name, stated[name]) for name in found.network)
    expected = expected_logits(kind, network)
    tolerance = TOLERANCE[found.dtype]
    modules = [found.module()]
    if found.network['model'] in registry.FOLDABLE:
        modules.append(found.fold())
    with torch.no_grad():
        for module in modules:
            logits = module.double()(IMAGES.double())
            assert relative_error(logits, expected) <= tolerance
    options_to_evaluate(found, {})
    if found.is_run:
        check_resumes(content, found)


def check_resumes(content, found):
    options = options_to_train(found, {})
    module = Network(*registry.define(**found.network)).to(found.dtype)
    optimizer = make_optimizer(module, options)
    settings = optimizer.state_dict()['param_groups']
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    restore(found, optimizer, scaler, None, Meters(10))
    state = optimizer.state_dict()
    assert state['param_groups'] == settings
    for number, stored in content['optimizer']['state'].items():
        for name, tensor in stored.items():
            assert torch.equal(state['state'][number][name], tensor.to(found.dtype))
