"""The options of train.py, each declared once. options.py makes everything else from them."""

import diracparams
from diracnet import BN_MOMENTUM
from diracparams import DATASETS
from lab.device import DTYPES
from lab.files import path_argument
from lab.models.initialization import INITS
from lab.models.registry import CHAINS, MODELS, VERSION_1, initial_scales, own_options
from lab.models.resnet import BLOCKS
from lab.training.optimizers import OPTIMIZERS
from lab.training.option import Option
from lab.training.option_types import (
    amount,
    bn_scales,
    decay,
    dirac_scale,
    epoch_list,
    momentum,
    number,
    part,
    warmup,
)
from lab.training.run_options import DEVICE, MOST_PROCESSES, RUNS

FAST = ('FashionMNIST', 'digits', 'CIFAR10', 'folder')  # the data sets that have a fast recipe


def _models_with(name):
    return tuple(
        model for model in MODELS if name in {**own_options(model), **initial_scales(model)}
    )


NETWORK = (
    Option(
        'model',
        'diracnet: version 2; diracnet-v1: version 1; plain, plain-ncrelu: the same chains '
        'without the Dirac term; repvgg: the chain of RepVGG; resnet; resnet-dirac: a ResNet with '
        'Dirac weights; wrn: Wide ResNet',
        'diracnet',
        choices=tuple(MODELS),
    ),
    Option(
        'depth',
        'layers: 6n + 4, or 6n + 2 for resnet and resnet-dirac; on ImageNet 18 or 34, wrn 50',
        16,
        {
            'imagenet': 18,
            'resnet': 20,
            'resnet-dirac': 20,
            'resnet imagenet': 18,
            'resnet-dirac imagenet': 18,
            'wrn imagenet': 50,
        },
        number(int, 1),
    ),
    Option('width', 'multiplies the channels', 1, {'wrn imagenet': 2}, number(float, 0, True)),
    Option(
        'dtype',
        'floating-point type: float, double, or mixed precision with bfloat16 or half (CUDA)',
        'float',
        {
            'fast cifar bfloat16-instructions': 'bfloat16',
            'fast digits bfloat16-instructions': 'float',
        },
        choices=tuple(DTYPES),
    ),
    Option(
        'block',
        "end of a resnet's blocks: batch norm before or after the addition, with or without ReLU",
        own_options('resnet')['block'],
        choices=BLOCKS,
        models=_models_with('block'),
    ),
    Option(
        'dropout',
        "probability of dropout between the convolutions of a wrn's blocks",
        own_options('wrn')['dropout'],
        type=number(float, 0),
        metavar='P',
        models=_models_with('dropout'),
    ),
    Option(
        'init',
        "initialization of all convolutions, instead of the model's own: Kaiming or Xavier normal, "
        'normal with std 0.01, orthogonal, delta-orthogonal (Xiao et al.), or, for plain-ncrelu, '
        'looks-linear (Balduzzi et al.)',
        None,
        choices=tuple(INITS),
    ),
    Option(
        'bn_init',
        'initial weight and bias of all batch norms. paper: from U(0, 1), and 0; shifted: '
        f'1 and {diracparams.SHIFT:g}, with --beta depth; or two numbers such as 1,0.5. shifted '
        'trains deeper chains',
        'paper',
        {'fast': 'shifted'},
        type=bn_scales,
        metavar='INIT',
        models=_models_with('bn_init'),
    ),
    Option(
        'alpha',
        'initial scale of the identity in Dirac weights, or depth: 1 / sqrt(depth)',
        None,
        type=dirac_scale,
        metavar='A',
        models=_models_with('alpha'),
    ),
    Option(
        'beta',
        'initial scale of the normalized weight in Dirac weights, or depth: 1 / sqrt(depth)',
        None,
        type=dirac_scale,
        metavar='B',
        models=_models_with('beta'),
    ),
    Option(
        'bn_momentum',
        'weight of each batch in the running statistics, or cumulative: their mean over an epoch',
        BN_MOMENTUM,
        type=momentum,
        metavar='M',
    ),
    Option(
        'recalibrate_bn',
        'before each test, compute the running statistics anew, as means over the training '
        'batches; for very deep networks, and with --evaluate for old checkpoints of them',
        False,
        type=bool,
    ),
)

# The values for CIFAR and ImageNet are the paper's. Those for digits were chosen on held-out
# training samples (logs/reference/digits-holdout.txt); FashionMNIST has CIFAR's with fewer epochs
# and no crops.
DATA = (
    Option('dataset', 'data set; digits needs no download', 'CIFAR10', choices=tuple(DATASETS)),
    Option(
        'dataroot',
        'folder with the data; missing data sets are downloaded to it',
        './data',
        type=path_argument,
        free_on_resume=True,
    ),
    Option(
        'imagenetpath',
        'folder with train/ and val/ of ImageNet, if --dataroot is not given',
        '~/ILSVRC2012',
        type=path_argument,
        free_on_resume=True,
    ),
    Option(
        'nthread',
        'processes that decode image files; small images need none',
        4,
        type=number(int, 0, most=MOST_PROCESSES),
        free_on_resume=True,
    ),
    Option(
        'form',
        'for --dataset folder: imagenet (the default), the networks for large images, which are '
        'read from their files each time they are needed; or cifar, those for small images, which '
        'are read into memory',
        choices=tuple(diracparams.BASE_WIDTHS),
    ),
    Option(
        'image_size',
        'size of image files after resizing and cropping, in pixels: at least 64, or 8 to 96 with '
        '--form cifar',
        224,
        {'folder cifar': 32},
        type=number(int, 8),
    ),
    Option(
        'no_mirror',
        'do not mirror training images at random, where left and right matter',
        False,
        type=bool,
    ),
    Option(
        'preprocess',
        'small images: meanstd, or zca: contrast normalization and ZCA whitening',
        'meanstd',
        choices=('meanstd', 'zca'),
    ),
    Option(
        'randomcrop_pad',
        'pixels of reflection padding around a small image before its random crop',
        4,
        {'FashionMNIST': 0, 'digits': 0, 'imagenet': 0, 'fast FashionMNIST': 2, 'fast digits': 1},
        number(int, 0),
    ),
    Option(
        'cutout',
        'small images: set a random square of this many pixels to the mean in training '
        '(DeVries and Taylor 2017)',
        0,
        type=number(int, 0),
        metavar='PIXELS',
    ),
    Option(
        'per_class',
        'train on the first N images of each class; 0: on all',
        0,
        type=number(int, 0),
        metavar='N',
    ),
    Option(
        'holdout',
        'test on N training samples, or a share such as 20%, instead of the test set, and train on '
        'the others; for choosing options, or if there is no test set. The last samples are held '
        'out; of image files, a random choice that is the same each time',
        0,
        type=amount,
        metavar='N or N%',
    ),
)
TRAINING = (
    Option(
        'recipe',
        "which defaults the other options have. paper: the paper's; fast: those for a short "
        f'training, with {", ".join(FAST[:-1])} and --form cifar',
        'paper',
        choices=('paper', 'fast'),
    ),
    Option(
        'epochs',
        'number of epochs',
        200,
        {
            'FashionMNIST': 60,
            'digits': 60,
            'imagenet': 100,
            'fast cifar': 30,
            'fast digits': 100,
            'pretrained': 30,
        },
        number(int, 1),
        free_on_resume=True,
    ),
    Option(
        'epoch_step',
        'epochs, counted from 1, that begin with a lower learning rate; the defaults scale with '
        '--epochs',
        [60, 120, 160],
        {
            'FashionMNIST': [20, 40, 50],
            'digits': [30, 45, 55],
            'imagenet': [30, 60, 90],
            'fast cifar': [15, 23, 27],
            'fast digits': [50, 75, 90],
            'pretrained': [15, 23, 27],
        },
        epoch_list,
        metavar='[E,...]',
    ),
    Option(
        'pretrained',
        "start from the network in this run's folder, model.pt7 or state dict, folded or not, with "
        'a new classifier if the classes are others; or from the published diracnet18 or '
        'diracnet34',
        None,
        type=path_argument,
        metavar='NETWORK',
    ),
    Option(
        'freeze',
        'with --pretrained: keep the first parts of the network as they are, up to this one: stem, '
        'group0, group1, ...; layer1, ... in residual networks',
        None,
        type=part,
        metavar='PART',
    ),
    Option('optim', 'optimizer; sgd has momentum 0.9', 'sgd', choices=tuple(OPTIMIZERS)),
    Option(
        'lr',
        'learning rate',
        0.1,
        {
            'digits': 0.2,
            'fast cifar': 0.2,
            'fast cifar resnet': 0.1,
            'fast cifar wrn': 0.1,
            'fast digits': 0.1,
            'pretrained': 0.1,
            'rmsprop': 1e-2,
            'adadelta': 1.0,
            'adagrad': 1e-1,
            'adamw': 1e-3,
        },
        number(float, 0),
    ),
    Option(
        'schedule',
        'how the learning rate falls: step, at each epoch of --epoch_step; or after each step, as '
        'half a cosine or a line that ends at 0 with the last one',
        'step',
        {'fast': 'linear', 'pretrained': 'linear'},
        choices=('step', 'cosine', 'linear'),
    ),
    Option(
        'warmup',
        'ramp:STEPS: steps in which the learning rate rises to --lr in equal parts; without '
        'ramp: steps with a hundredth of --lr',
        0,
        {'fast cifar': 'ramp:200', 'fast digits': 'ramp:100'},
        type=warmup,
        metavar='STEPS',
    ),
    Option(
        'lr_decay_ratio',
        'factor that multiplies the learning rate at each epoch of --epoch_step',
        0.2,
        {'imagenet': 0.1},
        number(float, 0, True),
    ),
    Option(
        'batch_size',
        'samples per step, of all processes together',
        128,
        {'digits': 64, 'imagenet': 256, 'pretrained imagenet': 64},
        number(int, 1),
        aliases=('--batchSize',),
    ),
    Option(
        'weight_decay',
        'weight decay of tensors with more than one dimension; of all tensors in '
        f'{" and ".join(VERSION_1)}',
        5e-4,
        {'digits': 5e-3, 'imagenet': 1e-4},
        number(float, 0),
        aliases=('--weightDecay',),
    ),
    Option(
        'label_smoothing',
        'in training, share of the target probability that all classes get in equal parts',
        0,
        {'fast digits': 0.1},
        type=number(float, 0, most=1),
        metavar='E',
    ),
    Option(
        'clip',
        'largest norm of all gradients together; longer ones are scaled to it',
        None,
        type=number(float, 0, True),
        metavar='NORM',
    ),
    Option(
        'ema',
        'also keep exponential moving averages of the parameters, with this decay per step (0.998 '
        'if not given), and test them with recalibrated statistics; with --evaluate: test these',
        None,
        type=decay,
        alone=0.998,
        metavar='DECAY',
    ),
    Option(
        'tta',
        'test-time augmentation. flip: average the logits of an image and its mirror image',
        'none',
        {'fast cifar': 'flip', 'fast digits': 'none', 'fast no_mirror': 'none'},
        choices=('none', 'flip'),
    ),
    Option(
        'seed',
        'seeds initialization, order, augmentation, dropout',
        1,
        type=number(int, 0, most=2**64 - 1),  # torch takes no other
    ),
    Option(
        'recompute',
        f'compute activations twice, to about halve the memory; for {" and ".join(CHAINS)}',
        False,
        type=bool,
    ),
    Option(
        'compile',
        f'compile each block with torch.compile, for {" and ".join(CHAINS)}; needs a C++ compiler '
        'and about half a minute',
        False,
        type=bool,
    ),
)
GROUPS = {
    'network': NETWORK,
    'data': DATA,
    'training': TRAINING,
    'runs': RUNS,
    'device': DEVICE,
}
OPTIONS = {option.name: option for group in GROUPS.values() for option in group}
