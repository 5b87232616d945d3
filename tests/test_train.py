"""What a training reaches, what it writes, and the same from the same seed."""

import json
import shlex

import pytest
import torch

import train
from conftest import python, read_log, same, train_digits
from diracnet import define_diracnet, fold
from lab.data import datasets
from lab.runs import checkpoint

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


def test_trained_network_folds(digits_run):
    """Logits of all test images agree within 1e-5 of the largest; the predictions are the same."""
    found = checkpoint.load(digits_run)
    module, folded = found.module(), found.fold()
    inputs, _ = next(iter(datasets.load('digits', '.').batches(False, batch_size=360)))
    with torch.no_grad():
        expected, actual = module(inputs), folded(inputs)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(actual.argmax(1), expected.argmax(1))


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
        assert 0 <= line['test_acc'] <= line['test_top5'] <= 100

    [entry] = json.loads((digits_run / 'run.json').read_text())
    command = ['python', 'train.py', '--dataset', 'digits', '--epochs', '8', '--epoch_step', '[6]']
    assert entry['command'] == shlex.join([*command, '--save', str(digits_run)])
    assert entry['versions']['torch'] == torch.__version__.split('+')[0]

    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    assert set(content['params']) == set(define_diracnet(16, 1, 'digits')[1])
    assert content['epoch'] == 8 and content['classes'] == list('0123456789')
    assert content['network'] == {
        'model': 'diracnet',
        'depth': 16,
        'width': 1,
        'dataset': 'digits',
        'form': 'cifar',
        'num_classes': 10,
        'in_channels': 1,
    }


def test_evaluate_gives_the_numbers_in_the_log(digits_run, tmp_path, call):
    expected = read_log(digits_run)[-1]
    torch.save(fold(checkpoint.load(digits_run).params), tmp_path / 'folded.pth')
    for path, options in (
        (digits_run, ()),
        (digits_run / 'model.pt7', ()),
        (tmp_path / 'folded.pth', ('--dataset', 'digits')),
    ):
        result = call(train.main, '--evaluate', path, *options)
        stats = json.loads(result.out.removeprefix('json_stats: '))
        assert stats['test_acc'] == expected['test_acc'] and stats['n'] == 360
        assert stats['test_loss'] == pytest.approx(expected['test_loss'], rel=1e-4)


def test_same_seed_same_run(tmp_path):
    for name, seed in (('a', 5), ('b', 5), ('c', 6)):
        train_digits(tmp_path / name, f'--epochs 1 --seed {seed}')
    assert same(tmp_path / 'a', tmp_path / 'b') and not same(tmp_path / 'a', tmp_path / 'c')


def test_holdout_never_sees_the_test_set(tmp_path):
    whole, part = datasets.load('digits', '.'), datasets.load('digits', '.').holdout(100)
    assert torch.equal(part.train[0], whole.train[0][:-100])
    assert torch.equal(part.test[0], whole.train[0][-100:])
    lines = train_digits(tmp_path / 'run', '--depth 10 --epochs 1 --holdout 100')
    assert lines[-1]['holdout'] == 100


# --- the data sets, and the paper's commands -------------------------------------------------


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


def test_paper_commands_are_the_originals():
    cifar, imagenet = paper_commands()
    assert ' '.join(cifar) == '--save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2'
    expected = (
        '--dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 '
        '--save ./logs/diracnet_$RANDOM$RANDOM --batchSize 256 --epoch_step [30,60,90] '
        '--epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1'
    )
    assert ' '.join(imagenet) == expected


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
def test_cifar_command(name, cifar, tmp_path):
    root, folder = cifar(name), tmp_path / 'deep' / 'folder' / 'run'
    arguments = replaced(paper_commands()[0], save=folder)
    options = ['--dataset', name, '--dataroot', str(root), '--epochs', '2', '--batch_size', '10']
    train.main([*arguments, *options])
    last = read_log(folder)[-1]
    assert (last['depth'], last['width'], last['epoch']) == (34, 2, 2)
    assert (last['epoch_step'], last['lr_decay_ratio']) == ([2], 0.2)  # scaled to two epochs
    assert (last['weight_decay'], last['randomcrop_pad']) == (5e-4, 4)
    assert last['n_parameters'] == (1_854_378 if name == 'CIFAR10' else 1_854_378 + 90 * 129)
    assert checkpoint.load(folder).classes[-1] == f'class{last["num_classes"] - 1}'


def test_imagenet_command(image_folder, tmp_path):
    arguments = replaced(
        paper_commands()[1],
        dataroot=image_folder,
        save=tmp_path / 'run',
        batchSize=4,
        epochs=1,
    )
    train.main([*arguments, '--nthread', '2'])
    last = read_log(tmp_path / 'run')[-1]
    assert last['num_classes'] == 2 and last['depth'] == 18
    assert last['n_parameters'] == 11_523_368 - 998 * 513
    assert (last['epoch_step'], last['lr_decay_ratio']) == ([30, 60, 90], 0.1)
    assert (last['weight_decay'], last['batch_size']) == (1e-4, 4)
    assert checkpoint.load(tmp_path / 'run').classes == ['flower', 'temple']


def test_svhn(svhn, tmp_path):
    options = '--dataset SVHN --depth 10 --epochs 1'
    lines = train_digits(tmp_path / 'run', f'{options} --dataroot {svhn}')
    assert lines[-1]['num_classes'] == 10


def test_fashion_mnist(fashion_mnist, tmp_path):
    options = '--dataset FashionMNIST --depth 10 --epochs 1'
    train_digits(tmp_path / 'run', f'{options} --dataroot {fashion_mnist}')
    assert checkpoint.load(tmp_path / 'run').classes[9] == 'Ankle boot'
