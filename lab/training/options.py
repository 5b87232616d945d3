"""The options of train.py: its flags, what they are where they are not given, and the device that they ask for."""

import argparse
import json
import math
import os

import torch

from lab import distributed
from diracnet import DATASETS
from lab.errors import OneLineParser, OptionError
from lab.memory import keep_freed_memory
from lab.models.registry import BLOCKS, CHAINS, INITS, MODELS, OPTIONS

# Type of the parameters, and of the convolutions where it is another (autocast).
DTYPES = {
    'float': (torch.float32, None),
    'double': (torch.float64, None),
    'bfloat16': (torch.float32, torch.bfloat16),
    'half': (torch.float32, torch.float16),
}

# What an option is where the command line doesn't say. CIFAR's and ImageNet's values are the paper's; those of digits were chosen
# on a hold-out of its training samples (logs/reference/digits-holdout.txt); FashionMNIST's are CIFAR's in a shorter schedule, without crops.
CIFAR = {
    'depth': 16,
    'epochs': 200,
    'epoch_step': [60, 120, 160],
    'lr': 0.1,
    'lr_decay_ratio': 0.2,
    'weight_decay': 5e-4,
    'batch_size': 128,
    'randomcrop_pad': 4,
}
RECIPES = {
    'CIFAR10': CIFAR,
    'CIFAR100': CIFAR,
    'SVHN': CIFAR,
    'FashionMNIST': {**CIFAR, 'epochs': 60, 'epoch_step': [20, 40, 50], 'randomcrop_pad': 0},
    'digits': {
        **CIFAR,
        'epochs': 60,
        'epoch_step': [30, 45, 55],
        'lr': 0.2,
        'weight_decay': 5e-3,
        'batch_size': 64,
        'randomcrop_pad': 0,
    },
    'ImageNet': {
        **CIFAR,
        'depth': 18,
        'epochs': 100,
        'epoch_step': [30, 60, 90],
        'lr_decay_ratio': 0.1,
        'weight_decay': 1e-4,
        'batch_size': 256,
        'randomcrop_pad': 0,
    },
}
RECIPES['folder'] = RECIPES['ImageNet']
GENERAL = {
    'model': 'diracnet',
    'width': 1,
    'dataset': 'CIFAR10',
    'dataroot': './data',
    'imagenetpath': '~/ILSVRC2012',
    'image_size': 224,
    'preprocess': 'meanstd',
    'dtype': 'float',
    'nthread': 4,
    'seed': 1,
    'holdout': 0,
    'ngpu': 1,
    'recompute': False,
    'compile': False,
    'sync_bn': False,
    'checkpoint_minutes': 10,
    'init': None,
    'optim': 'sgd',
    'warmup': 0,
    'bn_momentum': 0.1,
    'tensorboard': False,
}
DEPTHS = {
    'resnet': (20, 18),
    'resnet-dirac': (20, 18),
    'wrn': (16, 50),
}  # on small images and on ImageNet, where they are not a DiracNet's
RATES = {'rmsprop': 1e-2, 'adadelta': 1.0, 'adagrad': 1e-1, 'adamw': 1e-3}  # --lr of --optim
# Where a resumed run may differ from the one that was stopped. (Another device, or number of them, computes the same but for rounding
# and the share of a batch whose statistics are taken.)
FREE_ON_RESUME = {
    'resume',
    'save',
    'dataroot',
    'imagenetpath',
    'nthread',
    'epochs',
    'device',
    'cuda',
    'gpu_id',
    'ngpu',
    'checkpoint_minutes',
    'tensorboard',
}

BOUND_TO_MACHINE = ('device', 'cuda', 'gpu_id', 'ngpu')  # not taken over from a checkpoint


def number(kind, least, exclusive=False):
    """An argparse type: int or float, finite, not below `least`."""

    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or value < least or (exclusive and value == least):
            raise argparse.ArgumentTypeError(
                f'{text} must be {"more than" if exclusive else "at least"} {least}'
            )
        return value

    parse.__name__ = {int: 'whole number', float: 'number'}[kind]
    return parse


def epoch_list(text):
    try:
        steps = json.loads(text)
    except ValueError:
        steps = None
    if (
        not isinstance(steps, list)
        or not all(type(step) is int and step > 0 for step in steps)
        or steps != sorted(steps)
    ):
        raise argparse.ArgumentTypeError(
            f'{text} must be a JSON list of rising epochs, as [60,120,160]'
        )
    return steps


def momentum(text):
    """'cumulative', or a number in (0, 1]."""
    try:
        value = text if text == 'cumulative' else float(text)
    except ValueError:
        value = 0
    if value != 'cumulative' and not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f'{text} must be a number above 0 and at most 1, or cumulative'
        )
    return value


def build_parser(description):
    # Defaults stay None here: what was given is told apart from what a data set's recipe or a resumed run fills in.
    parser = OneLineParser(prog='train.py', description=description)
    network = parser.add_argument_group('network')
    network.add_argument(
        '--model',
        choices=MODELS,
        help='diracnet (default), its version 1 of 2017, plain and plain-ncrelu: the same '
        'chains without the Dirac term, resnet, resnet-dirac: with Dirac weights, wrn: Wide ResNet',
    )
    network.add_argument(
        '--depth',
        type=number(int, 1),
        help='6n + 4, ImageNet 18 or 34 (default 16, ImageNet 18); of a resnet 6n + 2 (20, '
        'ImageNet 18), of a wrn 6n + 4 (16, ImageNet 50)',
    )
    network.add_argument(
        '--width', type=number(float, 0, True), help='factor of the channels (default 1)'
    )
    network.add_argument(
        '--dtype',
        choices=DTYPES,
        help='floating point type: float (default), double, or mixed with bfloat16 or half (CUDA)',
    )
    network.add_argument(
        '--block',
        choices=BLOCKS,
        help="the end of a resnet's blocks: batch norm before or behind the addition, ReLU or none "
        '(default bn-add-relu)',
    )
    network.add_argument(
        '--dropout',
        type=number(float, 0),
        metavar='P',
        help="between the convolutions of a wrn's blocks (default 0)",
    )
    network.add_argument(
        '--init',
        choices=INITS,
        help='of the weights of convolutions: Kaiming or Xavier normal, normal (std 0.01), '
        "orthogonal, drawn anew (default the model's own: Kaiming, version 1 normal of std 0.1)",
    )
    network.add_argument(
        '--bn_momentum',
        type=momentum,
        metavar='M',
        help='share of a batch in the running statistics (default 0.1), or cumulative: '
        'their mean over each epoch',
    )
    sets = parser.add_argument_group('data')
    sets.add_argument(
        '--dataset', choices=DATASETS, help='default CIFAR10; digits needs no download'
    )
    sets.add_argument(
        '--dataroot', help='folder of the data, downloaded to there where possible (default ./data)'
    )
    sets.add_argument(
        '--imagenetpath',
        help='folder with train/ and val/ of ImageNet, where --dataroot is not given '
        '(default ~/ILSVRC2012)',
    )
    sets.add_argument(
        '--nthread',
        type=number(int, 0),
        help='processes that decode image files (default 4; small images need none)',
    )
    sets.add_argument(
        '--image_size', type=number(int, 64), help='pixels, of image files (default 224)'
    )
    sets.add_argument(
        '--preprocess',
        choices=('meanstd', 'zca'),
        help='of small images: mean and standard deviation (default), or '
        'contrast normalization and ZCA whitening',
    )
    sets.add_argument(
        '--randomcrop_pad',
        type=number(int, 0),
        help='reflection around a small image before its random crop, in '
        'pixels (default 4; FashionMNIST and digits 0)',
    )
    sets.add_argument(
        '--holdout',
        type=number(int, 0),
        metavar='N',
        help='test on the last N training samples instead of the test '
        'set, and train on the others (to select by)',
    )
    training = parser.add_argument_group('training')
    training.add_argument('--epochs', type=number(int, 1))
    training.add_argument(
        '--epoch_step',
        type=epoch_list,
        metavar='[E,...]',
        help='epochs, counted from 1, at whose beginning the learning rate falls',
    )
    training.add_argument(
        '--optim',
        choices=('sgd', 'nesterov', *RATES),
        help='sgd with momentum 0.9 (default), nesterov, ...',
    )
    training.add_argument(
        '--lr',
        type=number(float, 0),
        help='learning rate (default 0.1, digits 0.2; rmsprop 0.01, adadelta 1, adagrad 0.1, '
        'adamw 0.001)',
    )
    training.add_argument(
        '--warmup',
        type=number(int, 0),
        metavar='STEPS',
        help='first steps with a hundredth of --lr (default 0)',
    )
    training.add_argument(
        '--lr_decay_ratio', type=number(float, 0, True), help='factor of each fall'
    )
    training.add_argument('--batch_size', '--batchSize', type=number(int, 1))
    training.add_argument(
        '--weight_decay',
        '--weightDecay',
        type=number(float, 0),
        help='on tensors of more than one dimension, and on no others',
    )
    training.add_argument(
        '--seed', type=number(int, 0), help='of initialization, order and augmentation (default 1)'
    )
    training.add_argument(
        '--recompute',
        action='store_true',
        default=None,
        help='about half of the memory, for more time: activations are computed again',
    )
    training.add_argument(
        '--compile',
        action='store_true',
        default=None,
        help='torch.compile the block (needs a C++ compiler; takes about half a minute)',
    )
    runs = parser.add_argument_group('runs')
    runs.add_argument(
        '--save',
        metavar='DIR',
        help='folder of the run, made here (default logs/DATASET-MODEL-DEPTH-WIDTH-TIME)',
    )
    runs.add_argument(
        '--resume',
        metavar='RUN',
        help='go on with a stopped run, by its folder or model.pt7; its options hold. auto: with '
        "the one in --save's folder, if there is one",
    )
    runs.add_argument(
        '--checkpoint_minutes',
        type=number(float, 0),
        metavar='M',
        help='save within an epoch, too, every so many minutes (default 10)',
    )
    runs.add_argument(
        '--evaluate',
        metavar='CHECKPOINT',
        help="test a run's folder, model.pt7 or state dict, and exit",
    )
    runs.add_argument(
        '--tensorboard',
        action='store_true',
        default=None,
        help="write each epoch's numbers for TensorBoard, too, in the run's folder",
    )
    devices = parser.add_argument_group('device')
    devices.add_argument(
        '--device', help='cpu, cuda, cuda:1, ... (default cuda if there is one, else cpu)'
    )
    devices.add_argument(
        '--cuda', action='store_true', default=None, help='the same as --device cuda'
    )
    devices.add_argument('--gpu_id', help='the CUDA device to use, by its number')
    devices.add_argument(
        '--ngpu',
        type=number(int, 1),
        metavar='N',
        help='processes on this machine that share each batch, each with a GPU '
        '(or on the CPU): short for torchrun --nproc_per_node=N',
    )
    devices.add_argument(
        '--sync_bn',
        action='store_true',
        default=None,
        help='batch statistics of all processes together, not of each',
    )
    return parser


def complete(given, stored=None):
    """All options: those given, over those of the run that is resumed, over the data set's recipe."""
    dataset, model = (
        (given.get(name) or (stored or GENERAL)[name]) for name in ('dataset', 'model')
    )
    options = {**GENERAL, **RECIPES[dataset]}
    if model in DEPTHS:
        large = dataset in ('ImageNet', 'folder')
        options.update(
            OPTIONS[model], depth=DEPTHS[model][large], width=2 if large and model == 'wrn' else 1
        )
    options['lr'] = RATES.get(given.get('optim'), options['lr'])
    options.update(stored or {})
    for name in ('block', 'dropout'):
        if name in given and name not in OPTIONS.get(model, ()):
            raise OptionError(
                f'--{name} is not for --model {model}, but for {", ".join(other for other in OPTIONS if name in OPTIONS[other])}'
            )
    for name, value in given.items():
        if stored is not None and name not in FREE_ON_RESUME and stored.get(name, value) != value:
            raise OptionError(
                f'--{name} is {json.dumps(value)}, but the run to resume has {json.dumps(stored[name])}; leave the option '
                'out to go on with it, or start a new run'
            )
        options[name] = value
    if (
        options['dataset'] == 'ImageNet'
        and 'dataroot' not in given
        and (stored is None or 'imagenetpath' in given)
    ):
        options['dataroot'] = options['imagenetpath']
    return options


def choose_device(given):
    """The torch device that --device, --cuda, --gpu_id and --ngpu ask for. Raises OptionError if it isn't there."""
    if given.get('dataset') in ('ImageNet', 'folder'):
        # Large tensors in huge pages (Linux; torch reads it at its first allocation, which is below): else the page faults of a batch of
        # 224 x 224 images take several times as long as its normalization. Small images gain nothing, and memory would grow.
        os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
    there = torch.cuda.device_count()
    name = given.get('device') or (
        'cuda' if given.get('cuda') or given.get('gpu_id') or there else 'cpu'
    )
    processes = given.get('ngpu', distributed.local_world())
    if distributed.under_torchrun() and processes != distributed.local_world():
        raise OptionError(
            f'--ngpu {processes}, but torchrun has started {distributed.local_world()} processes on this machine; leave out '
            'one of them'
        )
    if name == 'cuda' and given.get('gpu_id') is not None:
        name = f'cuda:{given["gpu_id"]}'
    if name.startswith('cuda:') and processes > 1:
        raise OptionError(
            f'{name} is one device, and there are {processes} processes, each with its own; CUDA_VISIBLE_DEVICES chooses some'
        )
    try:
        device = torch.device(name)
        if device.type == 'cuda' and processes > 1:
            device = torch.device('cuda', distributed.local_rank())
        if device.type == 'cuda' and max(device.index or 0, processes - 1) >= there:
            raise OptionError(
                f'{name if processes == 1 else f"--ngpu {processes}"} is not on this machine, which has {there} CUDA devices; '
                '--device cpu works everywhere'
            )
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise OptionError(
            f'--device {name} is no device that can be used here; --device cpu works everywhere'
        ) from None
    for flag in ('cuda', 'gpu_id'):
        if given.get(flag) is not None and device.type != 'cuda':
            raise OptionError(f'--{flag} contradicts --device {name}; give one of them')
    return device


def set_up(options, device):
    """Torch's settings for these options. Raises OptionError for what excludes each other."""
    if options['dtype'] == 'half' and device.type != 'cuda':
        raise OptionError(
            f'--dtype half is for CUDA, and the device is {device}; bfloat16 works there, too'
        )
    if options['recompute'] and options['compile']:
        raise OptionError(
            '--recompute and --compile exclude each other: a compiled block decides itself what to compute again'
        )
    for name in ('recompute', 'compile'):
        if options[name] and options['model'] not in CHAINS:
            raise OptionError(
                f'--{name} is for {" and ".join(CHAINS)}, not for --model {options["model"]}'
            )
    if options['compile'] and options['bn_momentum'] == 'cumulative':
        raise OptionError(
            '--bn_momentum cumulative and --compile exclude each other: the block would be compiled again at every step'
        )
    if options['sync_bn'] and options['compile']:
        raise OptionError(
            '--sync_bn and --compile exclude each other: a compiled block can not wait for other processes'
        )
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision('high')  # TF32
        torch.backends.cudnn.allow_tf32 = True
    elif not options['recompute']:  # where memory is short, malloc had better return it
        keep_freed_memory()
