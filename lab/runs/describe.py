"""What a run says: before it trains, after each epoch, and at the end of a test."""

import math

from lab.data.names import percent, rounded
from lab.distributed import say, world
from lab.errors import UserError, printable
from lab.runs.log import format_line
from lab.training.network import count_multiplications, count_parameters
from lab.training.recalibration import describe_lag


def describe_run(options, data, network, device, resumed):
    """What trains on what, in words. `network` is what network_arguments returns."""
    name = f'{options["model"]}-{options["depth"]}-{options["width"]:g}'
    test_images = 'held-out training' if options['holdout'] else 'test'
    processes = f', {world()} processes' if world() > 1 else ''
    multiplications = count_multiplications(network, data.preprocessing.image_size)
    work = ''
    if multiplications:
        work = f'{rounded(multiplications / 1e6)} million multiplications per image, '
    return '\n'.join(
        (
            *(data.notes if not resumed else ()),
            f'{name} on {printable(data.name)}, {len(data.train[1])} training and '
            f'{len(data.test[1])} {test_images} images, {device}{processes}, in '
            f'{printable(options["save"])}',
            f'{count_parameters(network):,} parameters, {work}{describe_rate(options)}',
            *([f'resuming after {resumed.position}'] if resumed else ()),
        )
    )


def describe_rate(options):
    falls = ', '.join(map(str, options['epoch_step']))
    if not falls:
        return f'learning rate {options["lr"]:g}, schedule {options["schedule"]}'
    factor = f'times {options["lr_decay_ratio"]:g}'
    return f'learning rate {options["lr"]:g}, {factor} when these epochs begin: {falls}'


def describe_epoch(stats, train_pass):
    """An epoch in words."""
    averages = (
        f', of the averages {percent(stats["ema_test_acc"])} %' if 'ema_test_acc' in stats else ''
    )
    memory = (
        f', {rounded(stats["train_peak_memory"] / 1e9, 2)} GB'
        if 'train_peak_memory' in stats
        else ''
    )
    top5 = f', top-5 {percent(stats["test_top5"])} %' if stats['num_classes'] > 5 else ''
    lag = describe_lag(stats, len(train_pass.batches))
    return (
        f'epoch {stats["epoch"]}/{stats["epochs"]}: train loss {rounded(stats["train_loss"], 4)}, '
        f'accuracy {percent(stats["train_acc"])} %; test loss {rounded(stats["test_loss"], 4)}, '
        f'accuracy {percent(stats["test_acc"])} %{top5}{averages}; '
        f'{rounded(stats["train_time"] + stats["test_time"], 1)} s, '
        f'{rounded(stats["train_images_per_second"])} images/s{memory}'
        + (f'\n{lag}' if lag else '')
    )


def print_evaluation(checkpoint, options, results, recalibrates, n):
    """Print the results of --evaluate, for n images. Raises UserError if the loss is not finite."""
    if not math.isfinite(results['test_loss']):
        raise UserError(
            f'{checkpoint.path} has a test loss of {results["test_loss"]}: its weights overflow'
        )
    stats = {
        'checkpoint': str(checkpoint.path),
        'dataset': options['dataset'],
        **{name: results[name] for name in ('test_loss', 'test_acc', 'test_top5')},
        'weights': checkpoint.weights,
        'recalibrate_bn': recalibrates,
        'tta': options['tta'],
        'holdout': options['holdout'],
        'n': n,
    }
    say(format_line(stats))
