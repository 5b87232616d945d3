"""Train a DiracNet, or a network it is compared with, on CIFAR, ImageNet or another of the data sets.

    python train.py --dataset digits

trains DiracNet-16-1 on scikit-learn's 8 x 8 digits, nothing to download. See README.md for what to expect of each data set.

    python train.py --save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2
    python train.py --dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 --save ./logs/diracnet_$RANDOM$RANDOM \\
                    --batchSize 256 --epoch_step [30,60,90] --epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1
    python train.py --save logs/RUN --resume auto ...   # begin it, or go on where it stopped
    python train.py --resume logs/RUN           # go on with a run that was stopped
    python train.py --evaluate logs/RUN         # test a checkpoint
"""

import signal

if __name__ == '__main__':
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until a training listens to it: no traceback from amid the imports

import json
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from lab.runs import checkpoint
from lab.data import datasets as data
import diracnet
from lab import distributed
from diracnet import Network
from lab.distributed import say, world
from lab.errors import OptionError, UserError, run
from lab.training.meters import Broken, Progress, Tally
from lab.training.options import (
    BOUND_TO_MACHINE,
    DTYPES,
    GENERAL,
    RECIPES,
    build_parser,
    choose_device,
    complete,
    set_up,
)
from lab.models.registry import CHAINS, VERSION_1, define
from lab.models.registry import OPTIONS as MODEL_OPTIONS
from lab.data.preprocessing import Preprocessing
from lab.runs.folder import LOG, RunFolder, find, resume_command
from lab.runs.signals import Stop

# --- network and optimizer -------------------------------------------------------------------------------------------


def decayed(tensor, model='diracnet'):
    """Weight decay is for tensors of more than one dimension: with it, alpha and beta would collapse to zero. (Version 1 had it on all.)"""
    return tensor.ndim > 1 or model in VERSION_1


def parameter_table(module, weight_decay, model='diracnet'):
    """Lines of name, shape and whether decayed, of every parameter; the last has their number."""
    named = list(module.named_parameters())
    wide = max(len(name) for name, _ in named)
    lines = [
        f'{name:{wide}}  {"x".join(map(str, tensor.shape)):>15}  {f"decay {weight_decay:g}" if decayed(tensor, model) else "-"}'
        for name, tensor in named
    ]
    return [*lines, f'{sum(tensor.numel() for _, tensor in named):,} parameters']


OPTIMIZERS = {  # the settings of torch-residual-networks' comparison, and AdamW
    'sgd': partial(torch.optim.SGD, momentum=0.9, fused=True),
    'nesterov': partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    'rmsprop': torch.optim.RMSprop,
    'adadelta': partial(torch.optim.Adadelta, rho=0.3),
    'adagrad': torch.optim.Adagrad,
    'adamw': torch.optim.AdamW,
}


def make_optimizer(module, options):
    model = options.get('model', 'diracnet')
    groups = [
        {
            'params': [p for p in module.parameters() if decayed(p, model)],
            'weight_decay': options['weight_decay'],
        },
        {'params': [p for p in module.parameters() if not decayed(p, model)], 'weight_decay': 0.0},
    ]
    return OPTIMIZERS[options.get('optim', 'sgd')](
        [group for group in groups if group['params']], lr=options['lr']
    )


class Scaled:
    """An optimizer's step as torchnet's engine calls it, with the scaling of a loss in half precision (else none)."""

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler = optimizer, scaler
        self.zero_grad = optimizer.zero_grad

    def step(self, closure):
        closure()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class BatchNorm:
    """F.batch_norm with another momentum, `momentum`, which may change from step to step."""

    def __init__(self, norm, momentum):
        self.norm, self.momentum = norm, momentum

    def __call__(self, x, mean, var, weight, bias, training, momentum, eps):
        return self.norm(x, mean, var, weight, bias, training, self.momentum, eps)


def choose_functions(options):
    """What `f` takes besides inputs and params: the function of a batch norm, and for a chain that of a block."""
    norm = distributed.sync_batch_norm if options['sync_bn'] else F.batch_norm
    if options['bn_momentum'] != diracnet.BN_MOMENTUM:
        norm = BatchNorm(norm, options['bn_momentum'])
    return {
        'norm': norm,
        **({'block': choose_block(options)} if options['model'] in CHAINS else {}),
    }


def choose_block(options):
    """The function of a block, for `diracnet.chain`."""
    if options['recompute']:
        return diracnet.recomputed_block
    if options['compile']:
        # Block by block: a network compiles in the time of one block of each shape, however deep it is.
        import torch._dynamo  # not imported with torch: it takes its time

        torch._dynamo.config.recompile_limit = 1000  # shapes of blocks, batches and modes
        return torch.compile(diracnet.block, dynamic=False)
    return diracnet.block


def learning_rate(options, epoch, step=0):
    """Of an epoch, counted from 1, and a step of the whole run, counted from 0: a function of where one is. The optimizer goes on with its
    momentum where the rate falls (the original made a new one, so that its momentum restarted)."""
    if step < options.get('warmup', 0):
        return options['lr'] / 100
    return options['lr'] * options['lr_decay_ratio'] ** sum(
        epoch >= step for step in options['epoch_step']
    )


def load_data(options):
    with distributed.first_on_this_machine():
        source = data.load(
            options['dataset'], options['dataroot'], image_size=options['image_size']
        )
        if options['holdout']:
            source = source.holdout(options['holdout'])
        return source.whitened(options['dataroot']) if options['preprocess'] == 'zca' else source


# --- runs ------------------------------------------------------------------------------------------------------------


class Training:
    """A training: what torchnet's engine calls, and what travels in a checkpoint."""

    def __init__(self, options, resumed, device, folder, stop):
        self.options, self.resumed, self.device, self.folder, self.stop = (
            options,
            resumed,
            device,
            folder,
            stop,
        )
        self.dtype, self.short = DTYPES[options['dtype']]
        self.source = source = load_data(options)
        if resumed:
            check_classes(source, resumed, options)
        self.batches = {
            mode: source.batches(
                mode,
                batch_size=options['batch_size'],
                device=device,
                seed=options['seed'],
                pad=options['randomcrop_pad'],
                workers=options['nthread'],
                shard=(distributed.rank(), world()),
            )
            for mode in (True, False)
        }
        distributed.check_batches(self.batches[True].n, options['batch_size'])

        torch.manual_seed(options['seed'])
        self.definition = {
            'depth': options['depth'],
            'width': options['width'],
            'dataset': options['dataset'],
            'num_classes': len(source.classes),
            'in_channels': source.preprocessing.channels,
            **{name: options[name] for name in MODEL_OPTIONS.get(options['model'], ())},
        }
        try:
            f, params = define(options['model'], init=options['init'], **self.definition)
        except ValueError as error:
            raise OptionError(str(error)) from None
        self.functions = choose_functions(options)
        self.module = Network(partial(f, **self.functions), params)
        self.module.to(device, self.dtype, memory_format=torch.channels_last)
        if resumed:
            checkpoint.load_params(self.module, resumed.params, resumed.path)
        self.optimizer = make_optimizer(self.module, options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.short is torch.float16)
        self.tally, self.broken = Tally(len(source.classes)), Broken(stop.say)
        if resumed and resumed.optimizer:
            try:
                self.optimizer.load_state_dict(resumed.optimizer)
                self.scaler.load_state_dict(resumed.scaler)
                if resumed.progress:
                    self.tally.load_state(resumed.progress['tally'])
            except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(
                    f'{resumed.path} is not a state that this run can go on from: {error}'
                ) from None
        if resumed and not all(tensor.isfinite().all() for tensor in resumed.params.values()):
            raise UserError(
                f'{resumed.path} has parameters that are not finite: there is nothing to go on from'
            )
        self.shared = distributed.share_gradients(self.module, device)

        self.n_parameters = sum(p.numel() for p in self.module.parameters())
        self.epoch = resumed.epoch if resumed else 0  # finished ones
        self.progress = resumed.progress if resumed else None  # of the one after them
        self.log = folder.read_log(resumed)

    def run(self):
        from torchnet.engine import Engine

        self.engine = Engine()
        self.engine.hooks.update(
            {
                name: getattr(self, name)
                for name in (
                    'on_start',
                    'on_start_epoch',
                    'on_forward',
                    'on_update',
                    'on_end_epoch',
                )
            }
        )
        self.next_save = time.monotonic() + 60 * self.options['checkpoint_minutes']
        try:
            self.engine.train(
                self.network,
                self.batches[True],
                self.options['epochs'],
                Scaled(self.optimizer, self.scaler),
            )
        finally:
            self.engine.hooks.clear()  # they refer to this training, which would outlive its end

    def network(self, sample):
        inputs, targets = sample
        training = self.module.training
        if training:
            self.place_randomness()
        with autocast(self.device, self.short):
            logits = (self.shared if training else self.module)(inputs.to(self.dtype))
        self.loss = loss = F.cross_entropy(logits.to(self.dtype), targets)
        if (
            training and world() > 1
        ):  # gradients are averaged over processes, whose shares of a batch may differ by one sample
            loss = loss * (len(targets) * world() / self.batches[True].size(self.step))
        return self.scaler.scale(loss), logits

    def place_randomness(self):
        """What follows from where we are in the training: dropout's random state, and the momentum of a cumulative mean."""
        if self.options.get('dropout'):
            place = (self.options['seed'], self.epoch, self.step, distributed.rank())
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        if self.options['bn_momentum'] == 'cumulative':
            self.functions['norm'].momentum = 1 / (1 + self.step)

    def set_learning_rate(self):
        rate = learning_rate(
            self.options, self.epoch + 1, self.epoch * len(self.batches[True]) + self.step
        )
        for group in self.optimizer.param_groups:
            group['lr'] = rate

    def start_pass(self, label, training, progress=None):
        self.module.train(training)
        batches = self.batches[training]
        batches.epoch, batches.start = self.epoch + 1, 0
        self.step, elapsed = 0, 0
        self.tally.reset()
        if progress:
            self.step = batches.start = progress['step']
            self.tally.load_state(progress['tally'])
            elapsed = progress['time']
        batches.broken_before = progress['broken'] if progress else {}
        self.bar = Progress(
            label, batches.n, self.tally, min(self.step * batches.batch_size, batches.n)
        )
        self.started = time.perf_counter() - elapsed

    def end_pass(self):
        self.bar.close()
        values = self.tally.values()
        return (*values, time.perf_counter() - self.started)

    def on_start(self, state):
        if state['train']:
            state['epoch'] = self.epoch

    def on_start_epoch(self, state):
        self.start_pass(f'epoch {self.epoch + 1}/{state["maxepoch"]}', True, self.progress)
        self.set_learning_rate()

    def on_forward(self, state):
        self.tally.add(self.loss, state['output'], state['sample'][1])
        self.bar.update(self.batches[state['train']].size(self.step))
        if not state['train']:
            self.step += 1
            self.check_stop()  # the test will be made again

    def on_update(self, state):
        self.step += 1
        self.stop.check_parent()
        if self.tally.broke:
            self.fail()
        self.check_stop()
        if self.options['warmup']:
            self.set_learning_rate()

    def check_stop(self):
        """Save if it is time to, or if a signal came, and then leave."""
        number, due = distributed.agree(self.stop.signal, int(time.monotonic() >= self.next_save))
        if number:
            self.stop.leaving()
        if number or due:
            if self.module.training:
                self.progress = self.measure_progress()
            self.save()
        if number:
            self.leave(number)

    def measure_progress(self):
        return {
            'step': self.step,
            'tally': self.tally.state(),
            'time': time.perf_counter() - self.started,
            'broken': distributed.union(self.batches[True].broken),
        }

    def fail(self):
        step, value = self.tally.broke
        stands = (
            f'the last good checkpoint is {self.folder.stands}'
            if self.folder.stands
            else 'there is no checkpoint yet'
        )
        raise UserError(
            f'the loss is {value} at step {step} of epoch {self.epoch + 1}: the run stops; {stands}; --resume goes on from there, a new '
            'run with a smaller --lr may do better'
        )

    def on_end_epoch(self, state):
        train_loss, train_acc, train_top5, train_time = self.end_pass()
        if self.tally.broke:
            self.fail()
        self.progress = {**self.measure_progress(), 'time': train_time}
        distributed.share_statistics(self.module)
        self.start_pass('test', False)
        with torch.inference_mode():
            self.engine.test(self.network, self.batches[False])
        test_loss, test_acc, test_top5, test_time = self.end_pass()
        n_broken, newly_broken = zip(
            *(self.broken.report(self.batches[mode]) for mode in (True, False))
        )
        stats = {
            **self.options,
            'train_loss': train_loss,
            'train_acc': train_acc,
            'train_top5': train_top5,
            'test_loss': test_loss,
            'test_acc': test_acc,
            'test_top5': test_top5,
            'epoch': state['epoch'],
            'num_classes': len(self.source.classes),
            'n_parameters': self.n_parameters,
            'train_time': train_time,
            'test_time': test_time,
        }
        if any(n_broken):
            stats.update(
                train_broken=n_broken[0],
                test_broken=n_broken[1],
                broken_images=sum(newly_broken, []),
            )
        self.log.append(f'json_stats: {json.dumps(stats)}')
        self.epoch, self.progress = state['epoch'], None
        self.write_log()
        if self.options['tensorboard']:
            self.folder.write_events(stats)
        self.save()
        self.stop.say(
            f'epoch {self.epoch}/{state["maxepoch"]}: train loss {train_loss:.4f}, accuracy {train_acc:.2f} %; test loss '
            f'{test_loss:.4f}, accuracy {test_acc:.2f} %, top-{self.tally.topk[-1]} {test_top5:.2f} %; {train_time + test_time:.1f} s'
        )
        for mode in (
            True,
            False,
        ):  # with everything saved: such a run goes on once its data are mended
            self.broken.check(self.batches[mode])

    def write_log(self):
        self.folder.write(LOG, ''.join(line + '\n' for line in self.log))

    def save(self):
        """Write a checkpoint of this moment; of all parameters finite, so that one can go on from it."""
        params = {
            key: tensor.detach().cpu().contiguous() for key, tensor in self.module.params().items()
        }
        if self.progress and self.tally.broke:
            self.fail()
        if not all(tensor.isfinite().all() for tensor in params.values()):
            self.tally.broke = self.step, 'finite, but not the parameters behind it'
            self.fail()
        content = {  # as checkpoint.py says
            'params': params,
            'epoch': self.epoch,
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'options': self.options,
            'network': {'model': self.options['model'], **self.definition},
            'classes': list(self.source.classes),
            'preprocessing': self.source.preprocessing.as_dict(),
            'log': self.log,
        }
        if self.progress:
            content['progress'] = self.progress
        self.folder.save(content, checkpoint.place(self.epoch, self.progress))
        self.next_save = time.monotonic() + 60 * self.options['checkpoint_minutes']

    def leave(self, number):
        self.bar.close()
        distributed.barrier()  # torchrun ends them all when the first is gone
        self.stop.say(
            f'stopped by {signal.Signals(number).name} at {checkpoint.place(self.epoch, self.progress)}; this goes on:\n'
            f'    {resume_command(self.options, self.folder)}'
        )
        raise SystemExit(128 + number)


def train(options, arguments, resumed, device, folder):
    folder.settle(options, resumed, auto=options.pop('resume', None) == 'auto')
    options['save'] = str(folder.path)
    with Stop() as stop:
        training = Training(options, resumed, device, folder, stop)
        stop.say(
            '\n'.join(parameter_table(training.module, options['weight_decay'], options['model']))
        )
        folder.open()
        folder.record_command(arguments, device)
        training.write_log()
        n = {mode: batches.n for mode, batches in training.batches.items()}
        stop.say(
            f'{options["model"]}-{options["depth"]}-{options["width"]:g} on {options["dataset"]}, {n[True]} training and {n[False]} '
            f'{"held-out training" if options["holdout"] else "test"} images, {device}'
            f'{f", {world()} processes" if world() > 1 else ""}, in {folder.path}'
        )
        training.run()
        folder.finish()
        stop.say(f'done: {folder.path}')


def check_classes(source, found, options):
    if found.classes and list(source.classes) != list(found.classes):
        raise UserError(
            f'{found.path} was trained on other classes ({", ".join(found.classes[:3])}, ...) than are under '
            f'{options["dataroot"]} ({", ".join(source.classes[:3])}, ...)'
        )


def autocast(device, short):
    return torch.autocast(device.type, short, enabled=short is not None)


def evaluate(options, found, device):
    """Test a checkpoint on its data set's test images, and print what its log would say, as one JSON line."""
    dtype, short = DTYPES[options['dtype']]
    module = found.module().to(device, dtype, memory_format=torch.channels_last)
    source = load_data(options)
    check_classes(source, found, options)
    if found.preprocessing:  # of its own training set, where it was whitened
        source = replace(source, preprocessing=Preprocessing.from_dict(found.preprocessing))
    batches = source.batches(
        False,
        batch_size=options['batch_size'],
        device=device,
        workers=options['nthread'],
        shard=(distributed.rank(), world()),
    )
    tally = Tally(len(source.classes))
    progress = Progress('test', batches.n, tally)
    with torch.inference_mode(), autocast(device, short), distributed.one_line_errors():
        for step, (inputs, targets) in enumerate(batches):
            logits = module(inputs.to(dtype)).to(dtype)
            tally.add(F.cross_entropy(logits, targets), logits, targets)
            progress.update(batches.size(step))
        tally.flush()
    progress.close()
    broken = Broken()
    broken.report(batches)
    broken.check(batches)
    loss, top1, top5 = tally.values()
    say(
        'json_stats: '
        + json.dumps(
            {
                'checkpoint': str(found.path),
                'dataset': options['dataset'],
                'test_loss': loss,
                'test_acc': top1,
                'test_top5': top5,
                'holdout': options['holdout'],
                'n': batches.n,
            }
        )
    )


def options_of_test(found, given):
    if found.network is None:
        raise UserError(f'{found.path} holds no network that is known here')
    found.network.update(found.network_options(given))
    stored = {name: value for name, value in found.options.items() if name not in BOUND_TO_MACHINE}
    return complete(
        given, {**GENERAL, **RECIPES[found.network['dataset']], **found.network, **stored, **given}
    )


def options_of_resumed(found, given):
    """Those of a run that goes on; or, from a file that is no run of this program, those given, with its tensors and a new optimizer."""
    if found.is_run:
        found.network_options(given)  # says of another network what is different
        # Of one process --sync_bn changes nothing: such a run may go on in several.
        free = (
            *BOUND_TO_MACHINE,
            'save',
            *(['sync_bn'] if found.options.get('ngpu', 1) == 1 else []),
        )
        return complete(
            given, {name: value for name, value in found.options.items() if name not in free}
        )
    if found.folded or found.network is None:
        raise UserError(
            f'{found.path} is {"folded: it can be tested (--evaluate)" if found.folded else "no network that is known here"}, '
            'but not trained on'
        )
    found.optimizer = None
    say(
        f'{found.path} is no run of train.py: training goes on from its tensors at epoch {found.epoch}, with a new optimizer'
    )
    return complete({**found.network_options(given), **given})


def whole(number):
    return int(number) if number == int(number) else number


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    given = {
        name: value
        for name, value in vars(build_parser(__doc__).parse_args(arguments)).items()
        if value is not None
    }
    device = choose_device(given)
    with distributed.one_line_errors():
        distributed.start(device)
        tested, launching = (
            given.pop('evaluate', None),
            given.get('ngpu', 1) > distributed.local_world(),
        )
        folder = RunFolder(given)
        try:
            if tested or launching:
                found = distributed.from_first(
                    lambda: checkpoint.load(tested) if tested else find(given)
                )
            else:
                found = distributed.from_first(lambda: folder.lock() or find(given))
            options = (
                options_of_test(found, given)
                if tested
                else options_of_resumed(found, given)
                if found
                else complete(given)
            )
            options['width'] = whole(options['width'])
            if not tested and found and found.epoch >= options['epochs']:
                if given['resume'] != 'auto':
                    raise OptionError(
                        f'{found.path} has {found.epoch} epochs already, and --epochs {options["epochs"]} asks for no more'
                    )
                return say(
                    f'{found.path} has all its {found.epoch} epochs: there is nothing left to do'
                )
            set_up(options, device)
            if launching:
                return distributed.launch(options['ngpu'], [__file__, *arguments])
            options['ngpu'] = world()
            if tested:
                evaluate(options, found, device)
            else:
                train(options, arguments, found, device, folder)
        finally:
            folder.close()


if __name__ == '__main__':
    run(main, 'train.py')
