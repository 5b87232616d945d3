"""Train a DiracNet, or a network to compare it with, on CIFAR, ImageNet or another data set.

    python train.py --dataset digits

trains DiracNet-16-1 on scikit-learn's 8 x 8 digits; nothing is downloaded. The paper's runs:

    python train.py --save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2
    python train.py --dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 \\
                    --save ./logs/diracnet_$RANDOM$RANDOM --batchSize 256 --epoch_step [30,60,90] \\
                    --epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1

Other uses:

    python train.py --resume logs/RUN                    # resume a run that was stopped
    python train.py --save logs/RUN --resume auto ...    # start it, or resume it
    python train.py --evaluate logs/RUN                  # test a checkpoint
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import math
import shlex
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from lab import cuda, distributed
from lab.data.preprocessing import Preprocessing
from lab.device import DTYPES, autocast, choose_device, set_up
from lab.distributed import say, world
from lab.errors import OptionError, UserError, printable, run
from lab.models.matching import load_params
from lab.runs import checkpoint
from lab.runs.folder import PARAMETERS, RunFolder, log_lines, write_report
from lab.runs.log import format_line
from lab.runs.pretrained import find_pretrained, start_from
from lab.runs.recorder import Recorder
from lab.runs.resume import (
    find_resumed,
    options_to_evaluate,
    options_to_train,
    restore,
    started_anew,
)
from lab.runs.signals import Stop
from lab.training.broken_images import BrokenImages
from lab.training.inputs import check_classes, load_data, make_batches
from lab.training.meters import Meters
from lab.training.network import (
    build_network,
    make_averages,
    network_arguments,
    prepare_step,
)
from lab.training.optimizers import (
    learning_rate,
    make_optimizer,
    parameter_table,
    set_learning_rate,
)
from lab.training.options import check_combination, parse
from lab.training.passes import Pass
from lab.training.recalibration import describe_lag, recalibrate
from lab.training.size import check_memory


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse(arguments, __doc__)
    device = choose_device(given)
    to_evaluate, pretrained = given.pop('evaluate', None), None
    if to_evaluate and 'resume' in given:
        raise OptionError('--evaluate and --resume exclude each other: one tests, the other trains')
    to_launch = given.get('ngpu', 1) > distributed.local_world()
    with distributed.one_line_errors(), RunFolder(given) as folder:
        distributed.start(device)
        if to_evaluate:
            found = distributed.from_first(lambda: checkpoint.load(to_evaluate))
            options = options_to_evaluate(found, given)
        else:
            if not to_launch:  # otherwise the launched processes lock it
                distributed.from_first(folder.lock)
            given = distributed.from_first(lambda: started_anew(given))
            found = distributed.from_first(lambda: find_resumed(given))
            if not found:
                pretrained = distributed.from_first(lambda: find_pretrained(given))
            options = options_to_train(found, given, pretrained)
        if not to_evaluate and found and found.epoch >= options['epochs']:
            return finished_already(found, options)
        check_combination(options)
        set_up(options, device)
        if to_launch:
            return distributed.launch(options['ngpu'], [__file__, *arguments])
        options['ngpu'] = world()
        if to_evaluate:
            if 'ema' in given:
                found = found.averaged()
            return evaluate(options, found, device, recalibrates='recalibrate_bn' in given)
        return train(options, found, pretrained, device, folder, arguments)


def train(options, resumed, pretrained, device, folder, arguments):
    """Train to the last epoch: a run that was stopped, a pretrained network, or a new one. Write
    checkpoints, log and command line to `folder`."""
    options.pop('resume', None)
    folder.settle(options, resumed)
    options['save'] = str(folder.path)
    with Stop() as stop:
        # The data.
        data = load_data(options)
        check_classes(data, resumed, options)
        if resumed and resumed.is_run:  # not that of images which were added meanwhile
            data = replace(data, preprocessing=Preprocessing.from_dict(resumed.preprocessing))
        network = network_arguments(options, data)
        size = check_memory(options, network, data, device)  # before anything large is allocated
        stop.say(size.describe(options['weight_decay']))
        for note in () if resumed else data.notes:
            stop.say(note)
        train_batches = make_batches(data, True, options, device)
        test_batches = make_batches(data, False, options, device)
        distributed.check_batches(train_batches.n, options['batch_size'])
        meters, broken = Meters(len(data.classes)), BrokenImages(stop.say)
        for batches in (train_batches, test_batches):  # in memory; others are found while training
            broken.report(batches)
            broken.check(batches)

        # The network and its optimizer, new or from a checkpoint.
        module, norm = build_network(options, network, device)
        if resumed:
            load_params(module, resumed.params, resumed.path)
        elif pretrained:
            stop.say(start_from(module, pretrained, data.classes, train_batches))
        dtype, autocast_dtype = DTYPES[options['dtype']]
        optimizer = make_optimizer(module, options)
        scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype is torch.float16)
        averages = make_averages(module, options)
        if resumed:
            restore(resumed, optimizer, scaler, averages, meters)
        model = distributed.share_gradients(module, device)

        # The folder.
        facts = {
            'options': options,
            'network': network,
            'classes': list(data.classes),
            'preprocessing': data.preprocessing.as_dict(),
        }
        log = log_lines(resumed)
        stop.listen()
        table = parameter_table(module, options['weight_decay'], options['model'])
        folder.open()
        folder.record_command(arguments, device)
        folder.write(PARAMETERS, '\n'.join(table) + '\n')
        folder.write_log(log)
        recorder = Recorder(folder, stop, facts, module, optimizer, scaler, averages, meters, log)
        stop.say(describe_run(options, data, train_batches, test_batches, device, folder))
        if resumed:
            stop.say(f'resuming after {resumed.position}')

        first_epoch = resumed.epoch + 1 if resumed else 1
        progress = resumed.progress if resumed else None
        for epoch in range(first_epoch, options['epochs'] + 1):
            finished = epoch - 1  # epochs

            module.train()
            label = f'epoch {epoch}/{options["epochs"]}'
            with Pass('train', label, train_batches, meters, epoch, progress, stop.say) as training:
                for inputs, targets in train_batches:
                    step = training.step
                    total_step = finished * len(train_batches) + step
                    rate = learning_rate(options, total_step, len(train_batches))
                    set_learning_rate(optimizer, rate)
                    prepare_step(options, norm, finished, step)
                    optimizer.zero_grad()
                    loss, logits = forward(model, inputs, targets, options)
                    weight = loss_weight(targets, train_batches.size(step))
                    scaler.scale(loss * weight).backward()
                    if options['clip']:
                        scaler.unscale_(optimizer)
                        torch.nn.utils.clip_grad_norm_(module.parameters(), options['clip'])
                    scaler.step(optimizer)
                    scaler.update()
                    if averages:
                        averages.update_parameters(module)
                    training.add(loss, logits, targets)
                    recorder.check_loss(epoch)
                    recorder.save_if_due(finished, training.progress)
            progress = None  # only the first epoch can start in the middle
            train_stats = training.finish()
            recorder.check_loss(epoch)

            test_stats = {}
            for name, tested in (('test', module), ('ema_test', averages and averages.module)):
                if tested is None:
                    continue
                test = Pass(name, 'test', test_batches, meters, epoch, say=stop.say)
                # Averaged weights have other activations than those at any step, so averages of
                # running statistics do not fit them.
                if options['recalibrate_bn'] or tested is not module:  # counts in the test's time
                    for _ in recalibrate(tested, train_batches, epoch, options):
                        recorder.save_if_due(finished, training.progress)
                distributed.share_statistics(tested)
                tested.eval()
                with test, torch.inference_mode():
                    for inputs, targets in test_batches:
                        test.add(*forward(tested, inputs, targets, options), targets)
                        recorder.save_if_due(finished, training.progress)
                if not test.counted():
                    recorder.save(finished, training.progress())
                    broken.report(test_batches)
                    broken.check(test_batches)
                test_stats.update(test.finish())
            stats = {
                **options,
                **train_stats,
                **test_stats,
                'epoch': epoch,
                'num_classes': len(data.classes),
                'n_parameters': size.parameters,
                'train_images_per_second': train_batches.n / train_stats['train_time'],
                **peak_memory(device),
                **broken.stats(train_batches, test_batches),
            }
            recorder.record_epoch(stats)
            stop.say(describe_epoch(stats, meters.topk[-1]))
            lag = describe_lag(stats, len(train_batches))
            if lag:
                stop.say(lag)
            broken.check(train_batches)  # after saving: the run can resume once the data are fixed
            broken.check(test_batches)
        folder.finish()
        curves = f'python -m tools.plot {shlex.quote(str(folder.path))} --out curves.png'
        stop.say(f'done: {printable(str(folder.path))}; to draw its curves: {curves}')
        if stop.lost_output:
            raise UserError(f'the output cannot be written ({stop.lost_output}); the run is done')
    if options['report'] and distributed.rank() == 0:
        print(printable(str(write_report(folder.path, options['dataroot']))))


def evaluate(options, found, device, recalibrates=False):
    """Test a checkpoint, and print the results as one line of JSON. `recalibrates`: first compute
    the running statistics of batch norm anew, without changing the file."""
    if recalibrates and found.folded:
        raise OptionError(f'--recalibrate_bn: {found.path} is folded, so it has no batch norm')
    dtype, _ = DTYPES[options['dtype']]
    module = found.module().to(device, dtype, memory_format=torch.channels_last)
    data = load_data(options)
    check_classes(data, found, options)
    if found.preprocessing:  # that of its training set, which may have been whitened
        data = replace(data, preprocessing=Preprocessing.from_dict(found.preprocessing))
    batches = make_batches(data, False, options, device)
    test = Pass('test', 'test', batches, Meters(len(data.classes)), epoch=0)
    broken = BrokenImages()
    if recalibrates:
        train_batches = make_batches(data, True, options, device)
        distributed.check_batches(train_batches.n, options['batch_size'])
        for _ in recalibrate(module, train_batches, found.epoch, options):
            pass
        distributed.share_statistics(module)
        broken.report(train_batches)
    with test, torch.inference_mode():
        for inputs, targets in batches:
            test.add(*forward(module, inputs, targets, options), targets)
    broken.report(batches)
    broken.check(batches)
    stats = test.finish()
    if not math.isfinite(stats['test_loss']):
        raise UserError(
            f'{found.path} has a test loss of {stats["test_loss"]}: its weights overflow'
        )
    stats = {
        'checkpoint': str(found.path),
        'dataset': options['dataset'],
        **{name: stats[name] for name in ('test_loss', 'test_acc', 'test_top5')},
        'weights': found.weights,
        'recalibrate_bn': recalibrates,
        'tta': options['tta'],
        'holdout': options['holdout'],
        'n': batches.n,
    }
    say(format_line(stats))


def forward(model, inputs, targets, options):
    """Mean loss and logits, (N, classes), of a batch."""
    dtype, autocast_dtype = DTYPES[options['dtype']]
    smoothing = options['label_smoothing'] if model.training else 0
    with autocast(inputs.device, autocast_dtype):
        logits = model(inputs.to(dtype))
        if options['tta'] == 'flip' and not model.training:
            logits = (logits + model(inputs.to(dtype).flip(3))) / 2
    return F.cross_entropy(logits.to(dtype), targets, label_smoothing=smoothing), logits


def loss_weight(targets, batch_size):
    """The factor for this process's loss: gradients are averaged over processes, whose shares of
    a batch may differ by one sample."""
    return len(targets) * world() / batch_size if world() > 1 else 1


def finished_already(found, options):
    if options.get('resume') != 'auto':
        raise OptionError(
            f'{found.path} has already trained {found.epoch} epochs; choose more with --epochs '
            f'(now {options["epochs"]})'
        )
    say(f'{found.path} has finished its {found.epoch} epochs: nothing left to do')


def peak_memory(device):
    """What an epoch's line of the log says about memory: the most that a GPU's tensors took."""
    return {'train_peak_memory': cuda.peak_memory(device)} if device.type == 'cuda' else {}


def describe_epoch(stats, k):
    averages = f', of the averages {stats["ema_test_acc"]:.2f} %' if 'ema_test_acc' in stats else ''
    memory = f', {stats["train_peak_memory"] / 1e9:.2f} GB' if 'train_peak_memory' in stats else ''
    return (
        f'epoch {stats["epoch"]}/{stats["epochs"]}: train loss {stats["train_loss"]:.4f}, '
        f'accuracy {stats["train_acc"]:.2f} %; test loss {stats["test_loss"]:.4f}, '
        f'accuracy {stats["test_acc"]:.2f} %, top-{k} {stats["test_top5"]:.2f} %{averages}; '
        f'{stats["train_time"] + stats["test_time"]:.1f} s, '
        f'{stats["train_images_per_second"]:,.0f} images/s{memory}'
    )


def describe_run(options, data, train_batches, test_batches, device, folder):
    name = f'{options["model"]}-{options["depth"]}-{options["width"]:g}'
    test_images = 'held-out training' if options['holdout'] else 'test'
    processes = f', {world()} processes' if world() > 1 else ''
    return (
        f'{name} on {printable(data.name)}, {train_batches.n} training and {test_batches.n} '
        f'{test_images} images, {device}{processes}, in {printable(str(folder.path))}\n'
        f'{describe_rate(options)}'
    )


def describe_rate(options):
    if options['schedule'] != 'step':
        return f'learning rate {options["lr"]:g}, schedule {options["schedule"]}'
    if not options['epoch_step']:
        return f'learning rate {options["lr"]:g} in all epochs'
    falls = ', '.join(map(str, options['epoch_step']))
    factor = f'times {options["lr_decay_ratio"]:g}'
    return f'learning rate {options["lr"]:g}, {factor} when these epochs begin: {falls}'


if __name__ == '__main__':
    run(main, 'train.py')
