"""The options of train.py: flags, defaults, what a resumed run may change, and which exclude each
other.

    python -m lab.training.options  # prints the table in docs/training.md
"""

import json
import math
from argparse import SUPPRESS

from diracnet import BN_MOMENTUM
from diracparams import BASE_WIDTHS, DATASETS, SHIFT
from lab.device import DTYPES
from lab.errors import OneLineParser, OptionError
from lab.files import path_argument
from lab.models.initialization import INITS
from lab.models.registry import CHAINS, MODELS, VERSION_1, form_of, initial_scales, own_options
from lab.models.resnet import BLOCKS
from lab.training.optimizers import OPTIMIZERS
from lab.training.option_types import (
    Switch,
    epoch_list,
    initial_bn,
    number,
    number_or_share,
    warmup,
)
from lab.training.recipes import FAST, changes_of, recipe_for

# Options that a resumed run may change; --epochs only with --schedule step.
CHANGEABLE_ON_RESUME = {
    *('save', 'resume', 'dataroot', 'imagenetpath', 'nthread', 'epochs', 'checkpoint_minutes'),
    *('report', 'tensorboard', 'device', 'cuda', 'gpu_id', 'ngpu', 'graph'),
}
# Options that a resumed run does not take from its checkpoint: it may be on another machine.
MACHINE_OPTIONS = {'device', 'cuda', 'gpu_id', 'ngpu'}
# Options that not all models have, and their defaults, by model.
MODEL_OPTIONS = {model: {**own_options(model), **initial_scales(model)} for model in MODELS}


COUNT = number(int, at_least=0)
POSITIVE = number(float, above=0)
FLAG = dict(action='store_true', default=False)


# --- the parser ------------------------------------------------------------------------------


def build_parser(description=None):
    """The parser of train.py. An option that recipes change, or that not all models have, has no
    default in it: see recipes.py, and the definitions of the models. Only train.py's own command
    line, which has a description, has --help."""
    parser = OneLineParser(
        prog='train.py',
        description=description,
        argument_default=SUPPRESS,
        add_help=description is not None,
    )
    add_network_options(parser.add_argument_group('network').add_argument)
    add_data_options(parser.add_argument_group('data').add_argument)
    add_training_options(parser.add_argument_group('training').add_argument)
    add_run_options(parser.add_argument_group('runs').add_argument)
    add_device_options(parser.add_argument_group('device').add_argument)
    return parser


# fmt: off
def add_network_options(add):
    add('--model', default='diracnet', choices=tuple(MODELS),
        help='diracnet: version 2; diracnet-v1: version 1; plain, plain-ncrelu: the same chains '
             'without the Dirac term; repvgg: the chain of RepVGG; resnet; resnet-dirac: a ResNet '
             'with Dirac weights; wrn: Wide ResNet')
    add('--depth', type=number(int, at_least=1),
        help='layers: 6n + 4, or 6n + 2 for resnet and resnet-dirac; on ImageNet 18 or 34, wrn 50')
    add('--width', type=POSITIVE, help='multiplies the channels')
    add('--dtype', choices=tuple(DTYPES),
        help='floating-point type: float, double, or mixed precision with bfloat16 or half (CUDA)')
    add('--widen_early', **FLAG,
        help='let the convolution before each max-pool increase the channels, not the one after '
             'it; a departure from the paper')
    add('--block', choices=BLOCKS,
        help="end of a resnet's blocks: batch norm before or after the addition, with or without "
             'ReLU')
    add('--dropout', type=number(float, at_least=0), metavar='P',
        help="probability of dropout between the convolutions of a wrn's blocks")
    add('--init', default=None, choices=tuple(INITS),
        help="initialization of all convolutions, instead of the model's own: Kaiming or Xavier "
             'normal, normal with std 0.01, orthogonal, delta-orthogonal (Xiao et al.), or, for '
             'plain-ncrelu, looks-linear (Balduzzi et al.)')
    add('--bn_init', type=initial_bn, metavar='INIT',
        help='initial weight and bias of all batch norms. paper: from U(0, 1), and 0; shifted: '
             f'1 and {SHIFT:g}, with --beta depth; or two numbers such as 1,0.5. shifted trains '
             'deeper chains')
    add('--alpha', type=number(float, above=0, words=('depth',)), metavar='A',
        help='initial scale of the identity in Dirac weights, or depth: 1 / sqrt(depth)')
    add('--beta', type=number(float, above=0, words=('depth',)), metavar='B',
        help='initial scale of the normalized weight in Dirac weights, or depth: 1 / sqrt(depth)')
    add('--bn_momentum', type=number(float, above=0, at_most=1, words=('cumulative',)),
        default=BN_MOMENTUM, metavar='M',
        help='weight of each batch in the running statistics, or cumulative: their mean over an '
             'epoch')
    add('--recalibrate_bn', **FLAG,
        help='before each test, compute the running statistics anew, as means over the training '
             'batches; for very deep networks, and with --evaluate for old checkpoints of them')


def add_data_options(add):
    add('--dataset', default='CIFAR10', choices=tuple(DATASETS),
        help='data set; digits needs no download')
    add('--dataroot', type=path_argument, default='./data',
        help='folder with the data; missing data sets are downloaded to it')
    add('--imagenetpath', type=path_argument, default='~/ILSVRC2012',
        help='folder with train/ and val/ of ImageNet, if --dataroot is not given')
    add('--nthread', type=number(int, at_least=0, at_most=1024), default=4,
        help='processes that decode image files; small images need none')
    add('--form', choices=tuple(BASE_WIDTHS),
        help='for --dataset folder: imagenet (the default), the networks for large images, which '
             'are read from their files each time they are needed; or cifar, those for small '
             'images, which are read into memory')
    add('--image_size', type=number(int, at_least=8),
        help='size of image files after resizing and cropping, in pixels: at least 64, or 8 to 96 '
             'with --form cifar')
    add('--no_mirror', **FLAG,
        help='do not mirror training images at random, where left and right matter')
    add('--preprocess', default='meanstd', choices=('meanstd', 'zca'),
        help='small images: meanstd, or zca: contrast normalization and ZCA whitening')
    add('--randomcrop_pad', type=COUNT,
        help='pixels of reflection padding around a small image before its random crop')
    add('--cutout', type=COUNT, default=0, metavar='PIXELS',
        help='small images: set a random square of this many pixels to the mean in training '
             '(DeVries and Taylor 2017)')
    add('--per_class', type=COUNT, default=0, metavar='N',
        help='train on the first N images of each class; 0: on all')
    add('--holdout', type=number_or_share, default=0, metavar='N or N%',
        help='test on N training samples, or a share such as 20%%, instead of the test set, and '
             'train on the others; for choosing options, or if there is no test set. The last '
             'samples are held out; of image files, a random choice that is the same each time')


def add_training_options(add):
    add('--recipe', default='paper', choices=('paper', 'fast'),
        help="which defaults the other options have. paper: the paper's; fast: those for a short "
             f'training, with {", ".join(FAST[:-1])} and --form cifar')
    add('--epochs', type=number(int, at_least=1), help='number of epochs')
    add('--epoch_step', type=epoch_list, metavar='[E,...]',
        help='epochs, counted from 1, that begin with a lower learning rate; the defaults scale '
             'with --epochs')
    add('--pretrained', type=path_argument, default=None, metavar='NETWORK',
        help="start from the network in this run's folder, model.pt7 or state dict, folded or not, "
             'with a new classifier if the classes are others; or from the published diracnet18 '
             'or diracnet34')
    add('--freeze', default=None, metavar='PART',
        help='with --pretrained: keep the first parts of the network as they are, up to this one: '
             'stem, group0, group1, ...; layer1, ... in residual networks')
    add('--optim', default='sgd', choices=tuple(OPTIMIZERS), help='optimizer; sgd has momentum 0.9')
    add('--lr', type=number(float, at_least=0), help='learning rate')
    add('--schedule', choices=('step', 'cosine', 'linear'),
        help='how the learning rate falls: step, at each epoch of --epoch_step; or after each '
             'step, as half a cosine or a line that ends at 0 with the last one')
    add('--warmup', type=warmup, metavar='STEPS',
        help='ramp:STEPS, or ramp:5e for 5 epochs: how long the learning rate rises to --lr in '
             'equal parts; without ramp: steps with a hundredth of --lr')
    add('--lr_decay_ratio', type=POSITIVE,
        help='factor that multiplies the learning rate at each epoch of --epoch_step')
    add('--batch_size', '--batchSize', type=number(int, at_least=1),
        help='samples per step, of all processes together')
    add('--weight_decay', '--weightDecay', type=number(float, at_least=0),
        help='weight decay of tensors with more than one dimension; of all tensors in '
             f'{" and ".join(VERSION_1)}')
    add('--accumulate', type=number(int, at_least=1), default=1, metavar='N',
        help='compute a batch in N parts, for less memory; batch norm normalizes each part alone')
    add('--label_smoothing', type=number(float, at_least=0, at_most=1), metavar='E',
        help='in training, share of the target probability that all classes get in equal parts')
    add('--clip', type=POSITIVE, default=None, metavar='NORM',
        help='largest norm of all gradients together; longer ones are scaled to it')
    add('--ema', type=number(float, above=0, below=1), nargs='?', const=0.998, default=None,
        metavar='DECAY',
        help='also keep exponential moving averages of the parameters, with this decay per step '
             '(0.998 if not given), and test them with recalibrated statistics; with --evaluate: '
             'test these')
    add('--tta', choices=('none', 'flip'),
        help='test-time augmentation. flip: average the logits of an image and its mirror image')
    add('--seed', type=number(int, at_least=0, at_most=2**64 - 1), default=1,  # as torch
        help='seeds initialization, order, augmentation, dropout')
    add('--recompute', **FLAG,
        help=f'compute activations twice, to about halve the memory; for {" and ".join(CHAINS)}')
    add('--compile', **FLAG,
        help='compile the steps of full batches as a whole with torch.compile; needs CUDA, a '
             'C++ compiler, and a minute or more at the first step')


def add_run_options(add):
    add('--save', type=path_argument, metavar='DIR',
        help='folder of the run; train.py creates it '
             '(default logs/DATASET-MODEL-DEPTH-WIDTH-TIME)')
    add('--resume', type=path_argument, metavar='RUN',
        help='resume the run in this folder, or with this model.pt7, with its options; auto: the '
             'run in the --save folder, if there is one')
    add('--checkpoint_minutes', type=number(float, at_least=0), default=10, metavar='M',
        help='also save within an epoch, every M minutes')
    add('--evaluate', type=path_argument, metavar='CHECKPOINT',
        help="test a run's folder, model.pt7 or state dict, and exit")
    add('--report', **FLAG,
        help="at the end, write a page about the network to report.html in the run's folder")
    add('--tensorboard', **FLAG,
        help="also write each epoch's numbers for TensorBoard to the run's folder")


def add_device_options(add):
    add('--device',
        help='cpu, cuda, cuda:1, ...; also mps and xpu, which are untested (default cuda if '
             'available, else cpu)')
    add('--cuda', action='store_true', help='same as --device cuda')
    add('--gpu_id', help='number of the CUDA device to use')
    add('--ngpu', type=number(int, at_least=1, at_most=1024), default=1, metavar='N',
        help='processes on this machine that share each batch, each with a GPU (or all on the '
             'CPU); short for torchrun --nproc_per_node=N')
    add('--graph', '--no_graph', action=Switch, default=False,
        help='CUDA: replay the training steps as a CUDA graph, or do not; not with several '
             'processes, --dropout, or --bn_momentum cumulative')
    add('--sync_bn', **FLAG,
        help='compute batch statistics over all processes instead of within each')
# fmt: on


OPTIONS = {action.dest: action for action in build_parser()._actions}
# The defaults of the options that neither a recipe nor a model decides about.
DEFAULTS = {name: action.default for name, action in OPTIONS.items() if action.default != SUPPRESS}


# --- the options of a run --------------------------------------------------------------------


def parse(arguments, description=None):
    """The options that a command line gives. Raises OptionError."""
    parser = build_parser(description)
    for action in parser._actions:
        default = default_in_words(action.dest)
        if default:
            action.help += f' (default {default})'
        action.default = SUPPRESS  # so that only options that are given are in the result
    return vars(parser.parse_args(arguments))


def defaults_for(cli_options):
    """All options that have a default, for the data set, model, optimizer and recipe given."""
    chosen = {**DEFAULTS, **cli_options}
    model = chosen['model']
    values = {**DEFAULTS, **MODEL_OPTIONS[model], **recipe_for(chosen)}
    values.update({name: chosen[name] for name in ('dataset', 'model', 'optim', 'recipe')})
    return {name: values[name] for name in OPTIONS if name in values and model in models_with(name)}


def models_with(name):
    """The models that have an option."""
    return [model for model in MODELS if name in MODEL_OPTIONS[model]] or list(MODELS)


def default_in_words(name):
    """The defaults of an option and where they apply, such as '0.1, digits 0.2'; '' for none."""
    first = {**DEFAULTS, **MODEL_OPTIONS[models_with(name)[0]]}.get(name)
    return ', '.join(
        f'{row} {str(value).replace(" ", "")}'.strip()
        for row, value in {'': first, **changes_of(name)}.items()
        if value is not None and value is not False
    )


def complete(cli_options, stored=None):
    """All options of a run.

    Args:
        cli_options: the options from the command line.
        stored: those of the run to resume, or None for a new run.

    Raises:
        OptionError: an option that the model does not have, or that differs from the run to resume.
    """
    chosen = {**(stored or {}), **cli_options}
    options = {**defaults_for(chosen), **chosen}
    check_model_has(cli_options, options['model'])
    if stored is not None:
        check_unchanged(cli_options, stored, stored.get('schedule', 'step'))
    reads_imagenetpath = stored is None or 'imagenetpath' in cli_options
    if options['dataset'] == 'ImageNet' and 'dataroot' not in cli_options and reads_imagenetpath:
        options['dataroot'] = options['imagenetpath']
    if options['width'] == int(options['width']):
        options['width'] = int(options['width'])  # so that logs and names say 2, not 2.0
    if stored is None and 'epoch_step' not in cli_options:
        options['epoch_step'] = scaled_falls(options)
    return options


def check_model_has(cli_options, model):
    for name in cli_options:
        models = models_with(name)
        if model not in models:
            raise OptionError(
                f'--{name} does not apply to --model {model}, only to {", ".join(models)}'
            )


def check_unchanged(cli_options, stored, schedule):
    """Raise OptionError if a given option differs from that of the run to resume. One that the run
    does not have may be added."""
    for name, value in cli_options.items():
        if stored.get(name, value) == value:
            continue
        if name in CHANGEABLE_ON_RESUME and (name != 'epochs' or schedule == 'step'):
            continue
        reason = f', as --schedule {schedule} ends with the last epoch' if name == 'epochs' else ''
        raise OptionError(
            f'--{name} is {json.dumps(value)}, but the run to resume has '
            f'{json.dumps(stored[name])}; leave the option out, or start a new run{reason}'
        )


def scaled_falls(options):
    """The default epochs at which the learning rate falls, scaled to --epochs; not the first."""
    if options['schedule'] != 'step':
        return []
    usual = defaults_for(options)
    falls = {-(-epoch * options['epochs'] // usual['epochs']) for epoch in usual['epoch_step']}
    return sorted(epoch for epoch in falls if epoch > 1)


def check_combination(options):
    """Raise OptionError for options that exclude each other, or that together are out of range."""
    dataset, form = options['dataset'], form_of(options)
    is_small = form == 'cifar'
    if dataset != 'folder' and form != DATASETS[dataset][0]:
        raise OptionError(f'--form {form} is impossible for {dataset}: only folder can choose')
    least, most = (8, 96) if is_small else (64, math.inf)
    if dataset in ('ImageNet', 'folder') and not least <= options['image_size'] <= most:
        raise OptionError(
            f'--image_size {options["image_size"]} is out of range for form {form}: at least '
            f'{least}, at most {most}'
        )
    if options['recipe'] == 'fast' and not (is_small and dataset in FAST):
        raise OptionError(
            f'--recipe fast exists for {", ".join(FAST[:-1])}, and folder with --form cifar'
        )
    if options['sync_bn'] and options['accumulate'] > 1:  # processes may have other parts
        raise OptionError('--sync_bn and --accumulate exclude each other')
    if options['freeze'] and not options['pretrained']:
        raise OptionError('--freeze needs --pretrained: new parameters have to be trained')
    if options['schedule'] != 'step' and options['epoch_step']:
        raise OptionError(f'--epoch_step excludes --schedule {options["schedule"]}: it needs step')
    excluded = {  # by --compile
        '--recompute': options['recompute'],  # torch.compile decides itself what to recompute
        '--bn_momentum cumulative': options['bn_momentum'] == 'cumulative',  # recompiles each step
        '--sync_bn': options['sync_bn'],  # a compiled graph cannot wait for other processes
    }
    for name, is_given in excluded.items():
        if options['compile'] and is_given:
            raise OptionError(f'{name} and --compile exclude each other')


def options_table():
    """The options as a Markdown table, for docs/training.md."""
    lines = ['| option | meaning | default |', '| --- | --- | --- |']
    for name, option in OPTIONS.items():
        flags = ', '.join(f'`{flag}`' for flag in option.option_strings)
        choices = f' ({", ".join(option.choices)})' if option.choices else ''
        text = option.help.replace('%%', '%')
        lines.append(f'| {flags} | {text}{choices} | {default_in_words(name)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(options_table())
