"""What is made from the table of options: the parser with its help, the defaults of a run, the
check of a resumed run, and the table in docs/training.md.

    python -m lab.training.options  # prints that table
"""

import json
import math

from diracparams import DATASETS
from lab.device import has_bfloat16
from lab.errors import OneLineParser, OptionError
from lab.models.registry import CHAINS, form_of
from lab.training.option import UNSET
from lab.training.option_table import FAST, GROUPS, OPTIONS
from lab.training.option_types import LARGEST

FREE_ON_RESUME = {name for name, option in OPTIONS.items() if option.free_on_resume}
BOUND_TO_MACHINE = {name for name, option in OPTIONS.items() if option.bound_to_machine}


def build_parser(description):
    """The parser of train.py. Options that are not given are None in its result."""
    parser = OneLineParser(prog='train.py', description=description)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            default = option.describe_default()
            text = f'{option.help} (default {default})' if default else option.help
            keywords = {'help': text.replace('%', '%%')}
            if option.type is bool:
                keywords.update(action='store_true', default=None)
            else:
                keywords.update(type=option.type, choices=option.choices, metavar=option.metavar)
            if option.alone is not None:
                keywords.update(nargs='?', const=option.alone)
            group.add_argument(f'--{option.name}', *option.aliases, **keywords)
    return parser


def parse(arguments, description=None):
    """The options that a command line gives. Raises OptionError."""
    found = vars(build_parser(description).parse_args(arguments))
    return {name: value for name, value in found.items() if value is not None}


def defaults_for(given):
    """All options that have a default, for the data set, model, optimizer and recipe in `given`."""
    dataset, model, optimizer, recipe = (
        given.get(name, OPTIONS[name].default) for name in ('dataset', 'model', 'optim', 'recipe')
    )
    form = form_of({**given, 'dataset': dataset})
    facts = {dataset, form, model, optimizer, recipe}
    facts.update(name for name in ('pretrained', 'no_mirror') if given.get(name))
    if has_bfloat16():
        facts.add('bfloat16-instructions')
    defaults = {}
    for name, option in OPTIONS.items():
        value = option.default_for(facts)
        if value is not UNSET and (option.models is None or model in option.models):
            defaults[name] = value
    return {**defaults, 'dataset': dataset, 'model': model, 'optim': optimizer, 'recipe': recipe}


def complete(given, stored=None):
    """All options of a run.

    Args:
        given: the options from the command line.
        stored: those of the run to resume, or None for a new run.

    Raises:
        OptionError: an option that the model does not have, or that differs from the run to resume.
    """
    stored_or_given = {**(stored or {}), **given}
    options = {**defaults_for(stored_or_given), **(stored or {})}
    for name, value in given.items():
        models = OPTIONS[name].models
        if models is not None and options['model'] not in models:
            raise OptionError(
                f'--{name} does not apply to --model {options["model"]}, only to '
                f'{", ".join(models)}'
            )
        differs = stored is not None and stored.get(name, value) != value
        is_free = name in FREE_ON_RESUME and (name != 'epochs' or options['schedule'] == 'step')
        if differs and not is_free:
            reason = ''
            if name == 'epochs':
                reason = f', as --schedule {options["schedule"]} ends with the last epoch'
            raise OptionError(
                f'--{name} is {json.dumps(value)}, but the run to resume has '
                f'{json.dumps(stored[name])}; leave the option out, or start a new run{reason}'
            )
        options[name] = value
    reads_imagenetpath = stored is None or 'imagenetpath' in given
    if options['dataset'] == 'ImageNet' and 'dataroot' not in given and reads_imagenetpath:
        options['dataroot'] = options['imagenetpath']
    if options['recipe'] == 'fast' and (
        options['dataset'] not in FAST or form_of(options) != 'cifar'
    ):
        raise OptionError(
            f'--recipe fast exists for {", ".join(FAST[:-1])}, and folder with --form cifar'
        )
    if options['width'] == int(options['width']):
        options['width'] = int(options['width'])  # so that logs and names say 2, not 2.0
    if stored is None and 'epoch_step' not in given:
        options['epoch_step'] = scaled_falls(options)
    return options


def scaled_falls(options):
    """The default epochs at which the learning rate falls, scaled to --epochs; not the first."""
    if options['schedule'] != 'step':
        return []
    usual = defaults_for(options)
    falls = {-(-epoch * options['epochs'] // usual['epochs']) for epoch in usual['epoch_step']}
    return sorted(epoch for epoch in falls if epoch > 1)


def check_combination(options):
    """Raise OptionError for options that exclude each other, or that together are out of range."""
    if options['schedule'] != 'step' and options['epoch_step']:
        raise OptionError(
            f'--epoch_step and --schedule {options["schedule"]} exclude each other: the learning '
            'rate falls at chosen epochs only with --schedule step'
        )
    try:
        last = options['lr'] * options['lr_decay_ratio'] ** len(options['epoch_step'])
    except OverflowError:
        last = math.inf
    if last > LARGEST:
        raise OptionError(
            f'--lr {options["lr"]:g} and --lr_decay_ratio {options["lr_decay_ratio"]:g}: after all '
            f'epochs of --epoch_step, the learning rate would be {last:g}; the most is {LARGEST:g}'
        )
    own_form = DATASETS[options['dataset']][0]
    if options['dataset'] != 'folder' and form_of(options) != own_form:
        raise OptionError(
            f'--form {options["form"]} is impossible for {options["dataset"]}, whose form is '
            f'{own_form}: only --dataset folder can choose'
        )
    least, most = (8, 96) if form_of(options) == 'cifar' else (64, math.inf)
    if own_form == 'imagenet' and not least <= options['image_size'] <= most:
        possible = f'{least} to {most}' if form_of(options) == 'cifar' else f'{least} or more'
        raise OptionError(
            f'--image_size {options["image_size"]} is out of range for form {form_of(options)}: '
            f'choose {possible}'
        )
    if options['freeze'] and not options['pretrained']:
        raise OptionError('--freeze needs --pretrained: new parameters have to be trained')
    if options['recompute'] and options['compile']:
        raise OptionError(
            '--recompute and --compile exclude each other: a compiled block decides for itself '
            'what to recompute'
        )
    for name in ('recompute', 'compile'):
        if options[name] and options['model'] not in CHAINS:
            raise OptionError(
                f'--{name} applies to {" and ".join(CHAINS)}, not to --model {options["model"]}'
            )
    if options['compile'] and options['bn_momentum'] == 'cumulative':
        raise OptionError(
            '--bn_momentum cumulative and --compile exclude each other: the block would be '
            'compiled at every step'
        )
    if options['sync_bn'] and options['compile']:
        raise OptionError(
            '--sync_bn and --compile exclude each other: a compiled block cannot wait for other '
            'processes'
        )


def options_table():
    """The options as a Markdown table, for docs/training.md."""
    lines = ['| option | meaning | default |', '| --- | --- | --- |']
    for option in OPTIONS.values():
        flags = ', '.join(f'`{flag}`' for flag in (f'--{option.name}', *option.aliases))
        choices = f' ({", ".join(option.choices)})' if option.choices else ''
        lines.append(f'| {flags} | {option.help}{choices} | {option.describe_default()} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(options_table())
