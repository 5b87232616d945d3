"""What a run resumes from, with which options, and the command that resumes it."""

import shlex
import sys
from pathlib import Path

from diracparams import DATASETS
from lab.distributed import from_first, launched_here, local_world, rank, say, world
from lab.errors import OptionError, UserError, printable
from lab.models import registry
from lab.runs import checkpoint
from lab.runs.folder import COMMANDS, read_commands
from lab.runs.pretrained import find_pretrained, network_options
from lab.training.options import (
    MACHINE_OPTIONS,
    check_combination,
    complete,
    defaults_for,
    parse,
)


def find_start(cli_options):
    """Where a training starts: the Checkpoint to resume, the pretrained one, None for each that is
    not asked for, and all options.

    Raises:
        OptionError: options that do not fit together or to the checkpoint.
        UserError: a checkpoint cannot be read.
    """
    cli_options = from_first(lambda: started_anew(cli_options))
    resumed = from_first(lambda: find_resumed(cli_options))
    pretrained = None if resumed else from_first(lambda: find_pretrained(cli_options))
    options = options_to_train(resumed, cli_options, pretrained)
    if resumed and resumed.epoch >= options['epochs'] and cli_options['resume'] != 'auto':
        raise OptionError(
            f'{resumed.path} has already trained {resumed.epoch} epochs; choose more with --epochs '
            f'(now {options["epochs"]})'
        )
    check_combination(options)
    return resumed, pretrained, options


def started_anew(cli_options):
    """`cli_options`, or, if --resume names a run that was stopped before its first checkpoint, the
    options that it was last started with."""
    folder = Path(cli_options.get('resume', 'auto')).expanduser()
    if _has_checkpoint(folder):
        return cli_options
    for entry in reversed(read_commands(folder / COMMANDS) or []):
        _, _, *arguments = shlex.split(entry['command'])
        begun = parse(arguments)
        if begun.pop('resume', 'auto') == 'auto':
            say(f'{printable(str(folder))} was stopped before its first checkpoint: it starts anew')
            begun = {name: value for name, value in begun.items() if name not in MACHINE_OPTIONS}
            return {**begun, **cli_options, 'save': str(folder), 'resume': 'auto'}
    return cli_options


def _has_checkpoint(folder):
    return any((folder / name).exists() for name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS))


def find_resumed(cli_options):
    """The checkpoint that --resume asks for; None without --resume, or if auto finds none."""
    if 'resume' not in cli_options:
        return None
    if cli_options['resume'] != 'auto':
        return checkpoint.load(cli_options['resume'])
    if 'save' not in cli_options:
        raise OptionError('--resume auto looks for a run in the folder of --save: add --save')
    folder = Path(cli_options['save']).expanduser()
    return checkpoint.load(folder) if _has_checkpoint(folder) else None


def resume_command(options, folder):
    """The command line that resumes a run on the devices that it had."""
    flags = ['--resume', str(folder.path)]
    for name in ('device', 'gpu_id'):
        if options.get(name) is not None:
            flags += [f'--{name}', str(options[name])]
    if options.get('cuda'):
        flags.append('--cuda')
    if world() == 1:
        return shlex.join(['python', 'train.py', *flags])
    if launched_here():
        return shlex.join(['python', 'train.py', *flags, '--ngpu', str(world())])
    nodes = world() // local_world()
    rendezvous = f'--nnodes={nodes} (and the same rendezvous) ' if nodes > 1 else ''
    command = shlex.join(['train.py', *flags])
    return f'torchrun {rendezvous}--nproc_per_node={local_world()} {command}'


def options_to_train(resumed, cli_options, pretrained):
    """All options of a run: a new one if `resumed` is None, else one that resumes from it.

    From a file that is not a run of train.py, training starts with `cli_options`, the file's
    tensors and a new optimizer.

    Raises:
        OptionError: an option contradicts the run, its network, or the pretrained one.
        UserError: the file is folded.
    """
    if not resumed:
        network = network_options(pretrained, cli_options) if pretrained else {}
        return complete({**network, **cli_options})
    network = resumed.network_options(cli_options)
    if resumed.is_run:
        dropped = {*MACHINE_OPTIONS, 'save'}
        if resumed.options.get('ngpu', 1) == 1:
            dropped.add('sync_bn')  # it has no effect in one process, so it may be added now
        stored = {name: value for name, value in resumed.options.items() if name not in dropped}
        with checkpoint.refusing(resumed.path):
            return complete(cli_options, stored)
    if resumed.folded:
        raise UserError(f'{resumed.path} is folded: it can be tested (--evaluate) but not trained')
    _name_data_sets(resumed, cli_options)
    say(
        f'{resumed.path} is not a run of train.py: training starts from its tensors at epoch '
        f'{resumed.epoch}, with a new optimizer'
    )
    return complete({**network, **cli_options})


def _name_data_sets(loaded, cli_options):
    """If several data sets fit a file that does not record its own, say on stderr which it is."""
    fitting = [name for name in DATASETS if not registry.misfit(loaded.network, name)]
    taken = cli_options.get('dataset', loaded.network['dataset'])
    if loaded.preprocessing or 'dataset' in cli_options or len(fitting) == 1 or rank():
        return
    text = f'{loaded.path} fits {", ".join(fitting)}: it is taken as {taken}; choose with --dataset'
    print(printable(text), file=sys.stderr)


def find_to_evaluate(cli_options):
    """The Checkpoint that --evaluate names, and all options for its test.

    Raises:
        OptionError: an option does not fit it.
        UserError: it cannot be read.
    """
    if 'resume' in cli_options:
        raise OptionError('--evaluate and --resume exclude each other: one tests, the other trains')
    tested = from_first(lambda: checkpoint.load(cli_options['evaluate']))
    if tested.folded and 'recalibrate_bn' in cli_options:
        raise OptionError(f'--recalibrate_bn: {tested.path} is folded, so it has no batch norm')
    own = {**tested.network, **tested.network_options(cli_options)}
    stored = {name: value for name, value in tested.options.items() if name not in MACHINE_OPTIONS}
    with checkpoint.refusing(tested.path):
        options = complete(cli_options, {**defaults_for(own), **own, **stored, **cli_options})
    check_combination(options)
    _name_data_sets(tested, cli_options)
    tested.network.update(own)
    return tested.averaged() if 'ema' in cli_options else tested, options
