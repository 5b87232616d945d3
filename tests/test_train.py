"""What a training reaches, what it writes and shows, and when it is refused or stops."""

import io
import json
import os
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import evaluate, python, read_log, same, train_digits, without_times
from diracnet import define_diracnet, fold
from lab.data import datasets
from lab.models import registry
from lab.runs import checkpoint
from lab.training import network
from lab.training.passes import Meters, ProgressBar
from test import relative_error
from tools import export

# --- what it reaches -------------------------------------------------------------------------

# A child's peak memory starts with that of its parent, so a small process starts it, not pytest.
PEAK = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(status)
"""


def test_digits_with_all_defaults(tmp_path):
    result = python('-c', PEAK, 'train.py', '--dataset', 'digits', '--save', tmp_path / 'run')
    assert result.status == 0, result.err
    assert result.err == ''  # no progress bar outside a terminal
    assert int(result.out) < 1.5e9
    last = read_log(tmp_path / 'run')[-1]
    assert last['test_acc'] >= 96  # the median is to be 97; seeds vary by about one percent
    assert (last['model'], last['depth'], last['width']) == ('diracnet', 16, 1)
    assert last['epoch'] == last['epochs'] == 60


def test_depth_needs_the_dirac_term(tmp_path):
    """The paper's claim in miniature: 64 layers without skip connections."""
    options = '--depth 64 --epochs 6 --epoch_step [5] --lr 0.1 --weight_decay 0.0005'
    accuracy = {}
    for model in ('diracnet', 'plain'):
        lines = train_digits(tmp_path / model, f'{options} --model {model}')
        accuracy[model] = lines[-1]['test_acc']
    assert accuracy['diracnet'] > 85 and accuracy['plain'] < 40, accuracy


@pytest.mark.parametrize(
    'model, options, folds',
    [
        ('diracnet', '--depth 10', True),
        ('plain', '--depth 10', True),
        ('diracnet-v1', '--depth 10', True),
        ('plain-ncrelu', '--depth 10', True),
        ('resnet', '--depth 8', False),
        ('resnet-dirac', '--depth 8 --block bn-add', False),
        ('wrn', '--depth 10 --dropout 0.3', False),
    ],
)
def test_models_train_resume_evaluate_and_fold(model, options, folds, tmp_path, call, refused):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    options = f'--model {model} {options} --epoch_step [4] --lr 0.1 --weight_decay 0.0005'
    lines = train_digits(whole, f'{options} --epochs 5')
    assert lines[-1]['test_acc'] > 80
    train_digits(cut, f'{options} --epochs 2')
    train.main(['--resume', str(cut), '--epochs', '5'])
    assert same(whole, cut)
    assert without_times(whole)[-1] == without_times(cut)[-1]
    assert evaluate(call, whole)['test_acc'] == lines[-1]['test_acc']
    if not folds:
        refused(1, f'--model {model}', export.main, whole, tmp_path / 'net.pth')
        return
    found = checkpoint.load(whole)
    inputs, _ = next(iter(datasets.load('digits', '.').batches(False, batch_size=360)))
    with torch.no_grad():
        actual, expected = found.fold()(inputs), found.module()(inputs)
    assert relative_error(actual, expected) <= 1e-5
    assert torch.equal(actual.argmax(1), expected.argmax(1))


def test_same_seed_same_run(tmp_path):
    for name, seed in (('a', 5), ('b', 5), ('c', 6)):
        train_digits(tmp_path / name, f'--depth 10 --epochs 1 --seed {seed}')
    assert same(tmp_path / 'a', tmp_path / 'b') and not same(tmp_path / 'a', tmp_path / 'c')


def test_holdout_never_sees_the_test_set(tmp_path):
    whole, part = datasets.load('digits', '.'), datasets.load('digits', '.').holdout(100)
    assert torch.equal(part.train[0], whole.train[0][:-100])
    assert torch.equal(part.test[0], whole.train[0][-100:])
    lines = train_digits(tmp_path / 'run', '--depth 10 --epochs 1 --holdout 100')
    assert lines[-1]['holdout'] == 100


# --- what it writes --------------------------------------------------------------------------

LOGGED = (
    'train_loss train_acc train_top5 train_time test_loss test_acc test_top5 test_time '
    'num_classes n_parameters depth width dataset lr seed batch_size weight_decay epoch_step '
    'lr_decay_ratio save'
)


def test_what_a_run_writes(digits_run):
    names = sorted(file.name for file in digits_run.iterdir())
    assert names == ['log.txt', 'model.pt7', 'parameters.txt', 'previous.pt7', 'run.json']

    log = read_log(digits_run)
    assert [line['epoch'] for line in log] == list(range(1, 9))
    for line in log:
        assert set(LOGGED.split()) <= set(line)
        assert line['num_classes'] == 10 and line['n_parameters'] == 173_114
        assert line['n_multiplications'] == 1_631_872
        assert 0 <= line['test_acc'] <= line['test_top5'] <= 100

    [entry] = json.loads((digits_run / 'run.json').read_text())
    command = ['python', 'train.py', '--dataset', 'digits', '--epochs', '8', '--epoch_step', '[6]']
    assert entry['command'] == shlex.join([*command, '--save', str(digits_run)])
    assert entry['versions']['torch'] == torch.__version__.split('+')[0]

    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    assert set(content['params']) == set(define_diracnet(16, 1, 'digits')[1])
    assert content['epoch'] == 8 and content['classes'] == list('0123456789')
    network = dict(depth=16, width=1, dataset='digits', form='cifar', num_classes=10, in_channels=1)
    assert content['network'] == {'model': 'diracnet', 'widen_early': False, **network}


def test_evaluate_gives_the_numbers_in_the_log(digits_run, tmp_path, call):
    expected = read_log(digits_run)[-1]
    torch.save(fold(checkpoint.load(digits_run).params), tmp_path / 'folded.pth')
    for arguments in (
        [digits_run],
        [digits_run / 'model.pt7'],
        [tmp_path / 'folded.pth', '--dataset', 'digits'],
    ):
        stats = evaluate(call, *arguments)
        assert stats['test_acc'] == expected['test_acc'] and stats['n'] == 360
        assert stats['test_loss'] == pytest.approx(expected['test_loss'], rel=1e-4)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / 'run'
    options = '--depth 10 --tensorboard --resume auto'
    train_digits(folder, f'{options} --epochs 2')
    log = train_digits(folder, f'{options} --epochs 3')
    events = EventAccumulator(str(folder)).Reload()
    for tag, key in (('loss/train', 'train_loss'), ('acc/test', 'test_acc')):
        expected = [(line['epoch'], pytest.approx(line[key])) for line in log]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected


# --- the paper's commands --------------------------------------------------------------------


def paper_commands():
    """The arguments of the two commands in train.py's help: CIFAR's and ImageNet's."""
    text = train.__doc__.replace('\\\n', ' ')
    lines = [line.split() for line in text.splitlines() if '$RANDOM' in line]
    assert [line[:2] for line in lines] == [['python', 'train.py']] * 2
    return [line[2:] for line in lines]


def replaced(arguments, **values):
    """Arguments with other values for the flags that are named."""
    arguments = list(arguments)
    for flag, value in values.items():
        arguments[arguments.index(f'--{flag}') + 1] = str(value)
    return arguments


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
def test_cifar_command(name, cifar, tmp_path):
    original = paper_commands()[0]
    assert ' '.join(original) == '--save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2'
    root, folder = cifar(name), tmp_path / 'deep' / 'folder' / 'run'
    arguments = replaced(original, save=folder)
    options = ['--dataset', name, '--dataroot', str(root), '--epochs', '2', '--batch_size', '10']
    train.main([*arguments, *options])
    last = read_log(folder)[-1]
    assert (last['depth'], last['width'], last['epoch']) == (34, 2, 2)
    assert (last['epoch_step'], last['lr_decay_ratio']) == ([2], 0.2)  # scaled to two epochs
    assert (last['weight_decay'], last['randomcrop_pad']) == (5e-4, 4)
    assert last['n_parameters'] == (1_854_378 if name == 'CIFAR10' else 1_854_378 + 90 * 129)
    assert checkpoint.load(folder).classes[-1] == f'class{last["num_classes"] - 1}'


def test_imagenet_command(image_folder, tmp_path):
    original = paper_commands()[1]
    assert ' '.join(original) == (
        '--dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 '
        '--save ./logs/diracnet_$RANDOM$RANDOM --batchSize 256 --epoch_step [30,60,90] '
        '--epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1'
    )
    values = dict(dataroot=image_folder, save=tmp_path / 'run', batchSize=4, epochs=1)
    train.main([*replaced(original, **values), '--nthread', '2'])
    last = read_log(tmp_path / 'run')[-1]
    assert last['num_classes'] == 2 and last['depth'] == 18
    assert last['n_parameters'] == 11_523_368 - 998 * 513
    assert (last['epoch_step'], last['lr_decay_ratio']) == ([30, 60, 90], 0.1)
    assert (last['weight_decay'], last['batch_size']) == (1e-4, 4)
    assert checkpoint.load(tmp_path / 'run').classes == ['flower', 'temple']


def test_other_data_sets(svhn, fashion_mnist, tmp_path):
    for dataset, root, last in (
        ('SVHN', svhn, '9'),
        ('FashionMNIST', fashion_mnist, 'Ankle boot'),
    ):
        options = f'--dataset {dataset} --dataroot {root} --depth 10 --width 0.5 --epochs 1'
        train_digits(tmp_path / 'run' / dataset, options)
        assert checkpoint.load(tmp_path / 'run' / dataset).classes[9] == last


# --- what it shows ---------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('columns', [60, 80, 120])
def test_bar_shows_loss_and_accuracy(columns, monkeypatch):
    meters, batches = Meters(10), SimpleNamespace(n=50_000, batch_size=128, start=0)
    meters.add(torch.tensor(0.1234), torch.eye(10), torch.arange(10).clamp(max=8))
    monkeypatch.setenv('COLUMNS', str(columns))
    monkeypatch.setenv('LINES', '20')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    bar = ProgressBar('epoch 120/200', batches, meters)
    bar.shown = 0
    bar.update(20_000)
    bar.bar.refresh()
    last = sys.stderr.getvalue().split('\r')[-1]
    bar.close()
    assert len(last) <= columns
    assert all(text in last for text in ('epoch 120/200', '40%', 'loss 0.123', 'acc 90.0 %'))
    assert len(last.split('|')[1]) >= 8


def test_lines_where_the_output_is_no_terminal(tmp_path, call, monkeypatch):
    """One at every interval, here at each step, in training, recalibration and test."""
    monkeypatch.setattr(ProgressBar, 'INTERVAL', 0)
    options = '--dataset digits --depth 10 --epochs 1 --recalibrate_bn'
    result = call(train.main, *options.split(), '--save', tmp_path / 'run')
    number, rest = r'[\d.]+', r'[\d,]+ images/s, \d\d:\d\d left'
    measured = rf'loss {number}, accuracy {number} %, '
    steps = re.findall(rf'^epoch 1/1: step (\d+) of 23, {measured}{rest}$', result.out, re.M)
    assert steps == [str(step) for step in range(1, 24)]
    assert re.search(rf'recalibrate: step 23 of 23, {rest}', result.out)
    assert re.search(rf'test: step 6 of 6, {measured}[\d,]+ images/s, 00:00 left', result.out)
    monkeypatch.undo()
    assert ' step ' not in call(train.main, *options.split(), '--save', tmp_path / 'silent').out


# --- when it stops ---------------------------------------------------------------------------


def test_loss_that_is_not_finite(tmp_path, refused):
    """The learning rate rises to 1e30 in the third epoch; the run stops with a good checkpoint."""
    folder = tmp_path / 'run'
    options = (
        '--dataset digits --depth 10 --lr 1e-3 --lr_decay_ratio 1e33 --epoch_step [3] --epochs 6 '
        '--checkpoint_minutes 0.001'
    )
    words = ['of epoch 3', folder / 'model.pt7', 'epoch 2']
    result = refused(1, words, train.main, *options.split(), '--save', folder)
    found = checkpoint.load(folder)
    assert found.position in result.err
    assert all(tensor.isfinite().all() for tensor in found.params.values())
    assert [line['epoch'] for line in read_log(folder)] == [1, 2]

    again = tmp_path / 'again'
    shutil.copytree(folder, again)  # it resumes to the same end
    refused(1, ['of epoch 3', again], train.main, '--resume', again)


@pytest.mark.parametrize('model', registry.MODELS)
def test_parameters_of_deep_networks_are_counted_without_making_them(model):
    depth = 122 if model in ('resnet', 'resnet-dirac') else 124
    arguments = dict(model=model, depth=depth, width=0.25, dataset='digits')
    _, params = registry.define(**arguments)
    learned = (tensor.numel() for tensor in params.values() if tensor.requires_grad)
    assert network.count_parameters(arguments) == sum(learned)
    if model == 'diracnet':
        assert network.count_parameters({**arguments, 'depth': 10_000, 'width': 1}) == 162_686_010


@pytest.mark.parametrize('depth', [34, 1000])
def test_multiplications(depth):
    """Those of a count by hand."""
    n = (depth - 4) // 3 - 1  # 3 x 3 convolutions of a group after its first
    groups = 9 * (
        (3 * 32 + 32 * 32 * (n + 1)) * 32**2
        + (32 * 64 + 64 * 64 * n) * 16**2
        + (64 * 128 + 128 * 128 * n) * 8**2
    )
    cifar = dict(model='diracnet', depth=depth, width=2, dataset='CIFAR10', in_channels=3)
    assert network.count_multiplications(cifar, 32) == groups + 128 * 10
    imagenet = {**cifar, 'depth': 18, 'width': 1, 'dataset': 'ImageNet'}
    groups = 64 * 64 * 4 * 56**2
    groups += sum((c // 2 * c + c * c * 3) * (7 * 512 // c) ** 2 for c in (128, 256, 512))
    stem = 7 * 7 * 3 * 64 * 112**2
    assert network.count_multiplications(imagenet, 224) == stem + 9 * groups + 512 * 1000


def test_a_block_that_reads_values_has_unknown_multiplications(monkeypatch):
    def define(depth, width, dataset, **choices):
        f, params = registry.define_diracnet(depth, width, dataset, **choices)
        return lambda inputs, params, mode: f(inputs / float(inputs.max()), params, mode), params

    monkeypatch.setitem(registry.MODELS, 'plain', define)
    plain = dict(model='plain', depth=10, width=1, dataset='digits', in_channels=1)
    assert network.count_multiplications(plain, 8) is None


@pytest.mark.parametrize('dtype, size', [('float', 4), ('double', 8)])
def test_network_that_is_too_large(dtype, size, tmp_path, refused, monkeypatch):
    """Parameters, gradients and momenta must fit the memory."""
    n = 173_114
    monkeypatch.setattr(network, 'total_memory', lambda: 3 * n * size - 1)
    options = ('--dataset', 'digits', '--device', 'cpu', '--epochs', 1, '--dtype', dtype, '--save')
    refused(2, f'{n:,} parameters', train.main, *options, tmp_path / 'run')
    monkeypatch.setattr(network, 'total_memory', lambda: 3 * n * size)
    train.main([*map(str, options), str(tmp_path / 'run')])


@pytest.mark.parametrize('flag, value', [('--depth', 6 * 10**15 + 4), ('--width', '1e15')])
@pytest.mark.parametrize('model', ['diracnet', 'diracnet-v1', 'repvgg', 'wrn'])
def test_absurd_sizes(model, flag, value, tmp_path, refused, deadline):
    options = ('--dataset', 'digits', '--model', model, flag, value, '--save', tmp_path / 'run')
    refused(2, '', train.main, *options)


def test_memory_that_runs_out(tmp_path):
    """A limit on the process, which the check does not know: 500 MB more than after the imports."""
    pytest.importorskip('resource')
    script = """
import resource, sys
import train
from lab.errors import run
pages = int(open('/proc/self/statm').read().split()[0])
limit = pages * resource.getpagesize() + 500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run(lambda: train.main(sys.argv[1:]), 'train.py')
"""
    options = '--dataset digits --device cpu --depth 10 --width 8 --batch_size 1400 --save'
    one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}
    result = python('-c', script, *options.split(), tmp_path / 'run', env=one_thread)
    assert result.status == 1 and '--batch_size' in result.err
    assert result.err.count('\n') == 1, result.err
