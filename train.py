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

import sys
from functools import partial

import torch

from lab import distributed
from lab.device import DTYPES, choose_device, set_up
from lab.distributed import say, world
from lab.errors import printable, run
from lab.runs.checkpoint import run_metadata
from lab.runs.describe import describe_epoch, describe_run, print_evaluation
from lab.runs.folder import RunFolder, write_report
from lab.runs.pretrained import start_from
from lab.runs.recorder import Recorder
from lab.runs.resume import find_start, find_to_evaluate
from lab.runs.signals import Stop
from lab.runs.state import State
from lab.training.broken_images import BrokenImages
from lab.training.inputs import load_data, make_batches
from lab.training.network import Averages, build_network, network_arguments
from lab.training.optimizers import clip_gradients, make_optimizer, set_rates
from lab.training.options import parse
from lab.training.passes import Meters, Pass
from lab.training.recalibration import recalibrate
from lab.training.step import loss_and_logits, make_step


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    cli_options = parse(arguments, __doc__)
    device = choose_device(cli_options)
    must_launch = cli_options.get('ngpu', 1) > distributed.local_world()
    with distributed.one_line_errors(), RunFolder(cli_options) as folder:
        distributed.start(device)
        if 'evaluate' in cli_options:
            checkpoint, options = find_to_evaluate(cli_options)
        else:
            if not must_launch:  # otherwise the launched processes lock it
                distributed.from_first(folder.lock)
            resumed, pretrained, options = find_start(cli_options)
            if resumed and resumed.epoch >= options['epochs']:
                return say(f'{resumed.path} has finished its {resumed.epoch} epochs: nothing to do')
            folder.choose_path(options, resumed)
        set_up(options, device)
        if must_launch:  # only now that all options are known to be right
            return distributed.launch(options['ngpu'], [__file__, *arguments])
        options['ngpu'] = world()
        if 'evaluate' in cli_options:
            return evaluate(checkpoint, options, device, 'recalibrate_bn' in cli_options)
        return train(options, resumed, pretrained, device, folder, arguments)


def train(options, resumed, pretrained, device, folder, arguments):
    """Train to the last epoch: a run that was stopped, a pretrained network, or a new one. Write
    checkpoints, log and command line to `folder`."""
    with Stop() as stop:
        # The data.
        data = load_data(options, resumed)
        network = network_arguments(options, data)
        train_batches = make_batches(data, options, device, train=True)
        test_batches = make_batches(data, options, device, train=False)
        broken = BrokenImages(stop.say, train_batches, test_batches)

        # The network and what trains it, new or from a checkpoint.
        module, norm = build_network(options, network, device, train_batches.size(0))
        if pretrained:
            stop.say(start_from(module, pretrained, data.classes, train_batches))
        optimizer = make_optimizer(module, options)
        scaler = torch.amp.GradScaler(device.type, enabled=options['dtype'] == 'half')
        averages, meters = Averages(module, options['ema']), Meters(len(data.classes))
        state = State(module, optimizer, scaler, averages, meters)
        if resumed:
            state.restore(resumed)
        model = distributed.share_gradients(module, device)
        step = make_step(model, options, scaler, train_batches.size(0), stop.say)

        # The folder.
        metadata = run_metadata(options, network, data)
        stop.listen()  # from here on, a signal stops the run after a step, with a checkpoint
        log = folder.open(arguments, device, module, options, resumed)
        recorder = Recorder(folder, stop, state, metadata, log)
        stop.say(describe_run(options, data, network, device, resumed))

        progress, first_epoch = (resumed.progress, resumed.epoch + 1) if resumed else (None, 1)
        for epoch in range(first_epoch, options['epochs'] + 1):
            module.train()
            label = f'epoch {epoch}/{options["epochs"]}'
            train_pass = Pass('train', train_batches, meters, epoch, label, stop.say, progress)
            with train_pass:
                for inputs, targets in train_batches:  # from where the pass starts
                    set_rates(options, optimizer, norm, train_pass)
                    loss, logits = step(inputs, targets, loss_weight(targets, train_pass))
                    clip_gradients(module, optimizer, scaler, options['clip'])
                    scaler.step(optimizer)
                    scaler.update()
                    averages.update(module)
                    train_pass.add(loss, logits, targets)
                    recorder.save_or_exit_if_due(train_pass)
            progress = None  # only the first epoch can start in the middle
            results = train_pass.stats()
            recorder.save_within_epoch(train_pass)  # a test that is interrupted is repeated
            for name, tested in (('test', module), *averages.tested):
                test_pass = Pass(name, test_batches, meters, epoch, say=stop.say)
                # Averages of running statistics do not fit the activations of averaged weights.
                recalibrates = options['recalibrate_bn'] or tested is not module
                batches = train_batches if recalibrates else None
                exit_if_stopped = partial(recorder.exit_if_stopped, train_pass)
                results |= test(tested, test_pass, options, broken, batches, exit_if_stopped)
            broken_stats = broken.stats(train_batches, test_batches)
            stats = recorder.record_epoch(train_pass, results, broken_stats)
            stop.say(describe_epoch(stats, train_pass))
            broken.check(train_batches)  # after saving: the run can resume once they are repaired
        folder.finish(stop)
    if options['report'] and distributed.rank() == 0:
        print(printable(str(write_report(folder.path, options['dataroot']))))


def test(module, test_pass, options, broken, train_batches=None, after_batch=lambda: None):
    """The results of a test, {NAME_loss, NAME_acc, NAME_top5, NAME_time}.

    Args:
        test_pass: a Pass over the test set; broken: BrokenImages.
        train_batches: training Batches, to compute the running statistics anew on first.
        after_batch: called after each batch.
    """
    if train_batches is not None:  # this counts in the test's time
        for _ in recalibrate(module, train_batches, test_pass.epoch, options):
            after_batch()
    distributed.share_statistics(module)
    module.eval()
    with test_pass, torch.inference_mode():
        for inputs, targets in test_pass.batches:
            loss, logits = loss_and_logits(module, inputs, targets, options)
            test_pass.add(loss, logits, targets)
            after_batch()
    broken.check(test_pass.batches)
    return test_pass.stats()


def evaluate(checkpoint, options, device, recalibrates):
    """Test a checkpoint, and print the results as one line of JSON. `recalibrates`: first compute
    the running statistics of batch norm anew, without changing the file."""
    dtype, _ = DTYPES[options['dtype']]
    module = checkpoint.module().to(device, dtype, memory_format=torch.channels_last)
    data = load_data(options, checkpoint, is_test=True)
    train_batches = make_batches(data, options, device, train=True) if recalibrates else None
    test_batches = make_batches(data, options, device, train=False)
    meters = Meters(len(data.classes))
    test_pass = Pass('test', test_batches, meters, checkpoint.epoch)
    results = test(module, test_pass, options, BrokenImages(), train_batches)
    print_evaluation(checkpoint, options, results, recalibrates, test_batches.n)


def loss_weight(targets, train_pass):
    """The factor for this process's loss: gradients are averaged over processes, whose shares of
    a batch may differ by one sample."""
    batch_size = train_pass.batches.size(train_pass.step)
    return len(targets) * world() / batch_size if world() > 1 else 1


if __name__ == '__main__':
    run(main, 'train.py')
