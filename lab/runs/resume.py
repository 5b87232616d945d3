"""What a run resumes from, with which options, and the command that resumes it."""

import shlex
from pathlib import Path

from diracnet import copy_tensors
from lab.distributed import launched_here, local_world, say, world
from lab.errors import OptionError, UserError, printable
from lab.runs import checkpoint
from lab.runs.folder import COMMANDS, read_commands
from lab.runs.pretrained import network_options
from lab.training.options import BOUND_TO_MACHINE, complete, defaults_for, parse


def started_anew(given):
    """The given options, or, if --resume names a run that was stopped before its first checkpoint,
    those that it was last started with."""
    folder = Path(given.get('resume', 'auto')).expanduser()
    if _has_checkpoint(folder):
        return given
    for entry in reversed(read_commands(folder / COMMANDS) or []):
        _, _, *arguments = shlex.split(entry['command'])
        begun = parse(arguments)
        if begun.pop('resume', 'auto') == 'auto':
            say(f'{printable(str(folder))} was stopped before its first checkpoint: it starts anew')
            begun = {name: value for name, value in begun.items() if name not in BOUND_TO_MACHINE}
            return {**begun, **given, 'save': str(folder), 'resume': 'auto'}
    return given


def _has_checkpoint(folder):
    return any((folder / name).exists() for name in (checkpoint.FILE_NAME, checkpoint.PREVIOUS))


def find_resumed(given):
    """The checkpoint that --resume asks for; None without --resume, or if auto finds none."""
    if 'resume' not in given:
        return None
    if given['resume'] != 'auto':
        return checkpoint.load(given['resume'])
    if 'save' not in given:
        raise OptionError('--resume auto looks for a run in the folder of --save: add --save')
    folder = Path(given['save']).expanduser()
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


def options_to_train(found, given, pretrained=None):
    """All options of a run: a new one if `found` is None, else one that resumes from it.

    From a file that is not a run of train.py, training starts with the given options, the file's
    tensors and a new optimizer.

    Raises:
        OptionError: a given option contradicts the run, its network, or the pretrained one.
        UserError: the file is folded.
    """
    if not found:
        network = network_options(pretrained, given) if pretrained else {}
        return complete({**network, **given})
    if found.is_run:
        found.network_options(given)  # raises OptionError for another network
        dropped = {*BOUND_TO_MACHINE, 'save'}
        if found.options.get('ngpu', 1) == 1:
            dropped.add('sync_bn')  # it has no effect in one process, so it may be added now
        stored = {name: value for name, value in found.options.items() if name not in dropped}
        with checkpoint.refusing(found.path):
            return complete(given, stored)
    if found.folded:
        raise UserError(f'{found.path} is folded: it can be tested (--evaluate) but not trained')
    say(
        f'{found.path} is not a run of train.py: training starts from its tensors at epoch '
        f'{found.epoch}, with a new optimizer'
    )
    return complete({**found.network_options(given), **given})


def options_to_evaluate(found, given):
    """All options for a test of a checkpoint. Raises OptionError."""
    found.network.update(found.network_options(given))
    stored = {name: value for name, value in found.options.items() if name not in BOUND_TO_MACHINE}
    with checkpoint.refusing(found.path):
        return complete(given, {**defaults_for(found.network), **found.network, **stored, **given})


def restore(resumed, optimizer, scaler, averages, meters):
    """Load the state of a run that was stopped. The optimizer keeps its own settings."""
    if not resumed.is_run:
        return
    with checkpoint.refusing(resumed.path):
        if averages:
            copy_tensors(resumed.ema, averages.module)
            averages.n_averaged.fill_(1)  # more than 0: there have been some
        optimizer.load_state_dict({**optimizer.state_dict(), 'state': resumed.optimizer['state']})
        scaler.load_state_dict(resumed.scaler)
        if resumed.progress:
            meters.load_state(resumed.progress['tally'])
