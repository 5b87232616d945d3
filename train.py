"""Train a DiracNet, or a network it is compared with, on CIFAR, ImageNet or another of the data sets.

    python train.py --dataset digits

trains DiracNet-16-1 on scikit-learn's 8 x 8 digits, nothing to download. See README.md for what to expect of each data set.

    python train.py --save ./logs/diracnets_$RANDOM$RANDOM --depth 34 --width 2
    python train.py --dataroot ~/ILSVRC2012/ --dataset ImageNet --depth 18 --save ./logs/diracnet_$RANDOM$RANDOM \\
                    --batchSize 256 --epoch_step [30,60,90] --epochs 100 --weightDecay 0.0001 --lr_decay_ratio 0.1
    python train.py --resume logs/RUN           # go on with a run that was stopped
    python train.py --evaluate logs/RUN         # test a checkpoint
"""
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import data
import diracnet
import images
from diracnet import Network
from errors import OptionError, UserError, run
from options import BOUND_TO_MACHINE, DTYPES, GENERAL, RECIPES, build_parser, choose_device, complete
from resnet import MODELS

# --- network and optimizer -------------------------------------------------------------------------------------------


def decayed(tensor):
    """Weight decay is for tensors of more than one dimension: with it, alpha and beta would collapse to zero."""
    return tensor.ndim > 1


def parameter_table(module, weight_decay):
    """Lines of name, shape and whether decayed, of every parameter; the last has their number."""
    named = list(module.named_parameters())
    wide = max(len(name) for name, _ in named)
    lines = [f'{name:{wide}}  {"x".join(map(str, tensor.shape)):>15}  {f"decay {weight_decay:g}" if decayed(tensor) else "-"}'
             for name, tensor in named]
    return [*lines, f'{sum(tensor.numel() for _, tensor in named):,} parameters']


def make_optimizer(module, options):
    groups = [{'params': [p for p in module.parameters() if decayed(p)], 'weight_decay': options['weight_decay']},
              {'params': [p for p in module.parameters() if not decayed(p)], 'weight_decay': 0.0}]
    return torch.optim.SGD(groups, lr=options['lr'], momentum=0.9, fused=True)


class Scaled:
    """An optimizer's step as torchnet's engine calls it, with the scaling of a loss in half precision (else none)."""

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler = optimizer, scaler
        self.zero_grad = optimizer.zero_grad

    def step(self, closure):
        closure()
        self.scaler.step(self.optimizer)
        self.scaler.update()


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


def learning_rate(options, epoch):
    """Of an epoch, counted from 1: a function of where one is. The optimizer goes on with its momentum at a step (the
    original made a new one, so that its momentum restarted)."""
    return options['lr'] * options['lr_decay_ratio'] ** sum(epoch >= step for step in options['epoch_step'])


# --- measuring -------------------------------------------------------------------------------------------------------


class Tally:
    """Loss and top-k accuracy over an epoch in torchnet's meters, fed in chunks: a GPU is not waited for at every step."""
    CHUNK = 20  # batches

    def __init__(self, num_classes):
        from torchnet.meter import AverageValueMeter, ClassErrorMeter
        self.topk = sorted({1, min(5, num_classes)})
        self.loss = AverageValueMeter()
        self.accuracy = ClassErrorMeter(topk=self.topk, accuracy=True)
        self.pending = []

    def reset(self):
        self.loss.reset()
        self.accuracy.reset()
        self.pending.clear()

    def add(self, loss, logits, targets):
        self.pending.append((loss.detach(), logits.detach(), targets))
        if len(self.pending) >= self.CHUNK:
            self.flush()

    def flush(self):
        for loss, logits, targets in self.pending:
            self.loss.add(loss.item() * len(targets), len(targets))
            self.accuracy.add(logits.float(), targets)
        self.pending.clear()

    def values(self):
        """Mean loss, and the percentages of top-1 and top-5 (or as many as there are classes)."""
        self.flush()
        return self.loss.value()[0], self.accuracy.value(self.topk[0]), self.accuracy.value(self.topk[-1])


class Progress:
    """tqdm's bar over the images of an epoch, with loss, accuracy, images/s and remaining time. Quiet where no one looks."""

    def __init__(self, label, n, tally):
        from tqdm import tqdm
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=n, desc=label, unit='img', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
        self.tally, self.shown = tally, 0.0

    def update(self, n):
        if not self.bar.disable and time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            loss, top1, _ = self.tally.values()
            self.bar.set_postfix_str(f'loss {loss:.3f}, acc {top1:.1f} %', refresh=False)
        self.bar.update(n)

    def close(self):
        self.bar.close()


def load_data(options):
    source = data.load(options['dataset'], options['dataroot'], image_size=options['image_size'])
    if options['holdout']:
        source = source.holdout(options['holdout'])
    return source.whitened(options['dataroot']) if options['preprocess'] == 'zca' else source


class Broken:
    """Keeps account of image files that could not be used: each is named once, and more than one in a hundred end the run."""
    SHARE = 0.01

    def __init__(self):
        self.named = set()

    def report(self, batches):
        """Of the pass that just ended: how many, and which were not named before. Prints those."""
        new = {path: message for path, message in batches.broken.items() if path not in self.named}
        for message in new.values():
            print(f'broken image: {message}')
        self.named.update(new)
        return len(batches.broken), sorted(new)

    def check(self, batches):
        """Raises UserError where too many were broken in the pass that just ended."""
        if len(batches.broken) > self.SHARE * batches.n:
            raise UserError(f'{len(batches.broken)} of {batches.n} image files could not be used, as {next(iter(batches.broken))}: mend the data and '
                            'go on with --resume')


# --- runs ------------------------------------------------------------------------------------------------------------


def run_folder(options, resumed):
    """The run's folder, not made yet. An existing run is never overwritten."""
    default = (f'logs/{options["dataset"]}-{options["model"]}-{options["depth"]}-{options["width"]:g}-'
               f'{datetime.now():%Y%m%d-%H%M%S}')
    folder = Path(options.get('save') or (resumed.path.parent if resumed and resumed.is_run else default)).expanduser()
    if not (resumed and resumed.is_run and folder.exists() and folder.samefile(resumed.path.parent)):
        for name in ('log.txt', checkpoint.FILE_NAME):
            if (folder / name).exists():
                raise OptionError(f'{folder} holds a run already; --resume {folder} goes on with it, another --save makes a new one')
    return folder


def record_command(folder, arguments, device):
    """Append to run.json how this run was called, and on what: command, versions, commit, device, threads."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'], cwd=here, capture_output=True,
                                text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a checkout, or no git
    from importlib.metadata import version
    packages = ('torch', 'torchvision', 'torchnet', 'opencv-python', 'tqdm', 'numpy')
    entry = {'command': shlex.join(['python', 'train.py', *arguments]), 'time': datetime.now().isoformat(timespec='seconds'),
             'commit': commit, 'python': platform.python_version(), 'versions': {name: version(name) for name in packages},
             'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type} ({platform.machine()})',
             'threads': torch.get_num_threads()}
    path = folder / 'run.json'
    entries = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*entries, entry], indent=1) + '\n')


def read_log(folder, epoch):
    """The lines of log.txt up to an epoch."""
    path = folder / 'log.txt'
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if json.loads(line.removeprefix('json_stats: '))['epoch'] <= epoch]


def train(options, arguments, resumed, device):
    from torchnet.engine import Engine
    dtype, short = DTYPES[options['dtype']]
    folder = run_folder(options, resumed)
    source = load_data(options)
    if resumed:
        check_classes(source, resumed, options)
    batches = {mode: source.batches(mode, batch_size=options['batch_size'], device=device, seed=options['seed'],
                                    pad=options['randomcrop_pad'], workers=options['nthread']) for mode in (True, False)}

    torch.manual_seed(options['seed'])
    definition = {'depth': options['depth'], 'width': options['width'], 'dataset': options['dataset'],
                  'num_classes': len(source.classes), 'in_channels': source.preprocessing.channels}
    try:
        f, params = MODELS[options['model']](**definition)
    except ValueError as error:
        raise OptionError(str(error)) from None
    module = Network(partial(f, block=choose_block(options)), params)
    module.to(device, dtype, memory_format=torch.channels_last)
    if resumed:
        checkpoint.load_params(module, resumed.params, resumed.path)
    optimizer = make_optimizer(module, options)
    scaler = torch.amp.GradScaler(device.type, enabled=short is torch.float16)
    if resumed and resumed.optimizer:
        optimizer.load_state_dict(resumed.optimizer)
        scaler.load_state_dict(resumed.scaler)
    print('\n'.join(parameter_table(module, options['weight_decay'])))

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--save {folder} can not be made ({error.strerror})') from None
    log = read_log(resumed.path.parent, resumed.epoch) if resumed and resumed.is_run else []
    record_command(folder, arguments, device)
    (folder / 'log.txt').write_text(''.join(line + '\n' for line in log))
    print(f'{options["model"]}-{options["depth"]}-{options["width"]:g} on {options["dataset"]}, {batches[True].n} training and '
          f'{batches[False].n} {"held-out training" if options["holdout"] else "test"} images, {device}, in {folder}')

    engine, tally, broken = Engine(), Tally(len(source.classes)), Broken()
    n_parameters = sum(p.numel() for p in module.parameters())
    clock = {}

    def network(sample):
        inputs, targets = sample
        with autocast(device, short):
            logits = parallel(module, inputs.to(dtype), options['ngpu'])
        clock['loss'] = F.cross_entropy(logits.to(dtype), targets)
        return scaler.scale(clock['loss']), logits

    def on_start(state):
        if state['train']:
            state['epoch'] = resumed.epoch if resumed else 0

    def on_sample(state):
        clock['n'] = len(state['sample'][1])

    def on_start_epoch(state):
        epoch = state['epoch'] + 1
        batches[True].epoch = epoch
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(options, epoch)
        start_pass(f'epoch {epoch}/{state["maxepoch"]}', training=True)

    def start_pass(label, training):
        module.train(training)
        tally.reset()
        clock['progress'] = Progress(label, batches[training].n, tally)
        clock['start'] = time.perf_counter()

    def end_pass():
        clock['progress'].close()
        values = tally.values()
        return (*values, time.perf_counter() - clock['start'])

    def on_forward(state):
        tally.add(clock['loss'], state['output'], state['sample'][1])
        clock['progress'].update(clock['n'])

    def on_end_epoch(state):
        train_loss, train_acc, train_top5, train_time = end_pass()
        if not math.isfinite(train_loss):
            raise UserError(f'the loss is {train_loss} in epoch {state["epoch"]}: the run stops; the last good checkpoint is that of '
                            f'epoch {state["epoch"] - 1}; a smaller --lr may help')
        start_pass('test', training=False)
        with torch.inference_mode():
            engine.test(network, batches[False])
        test_loss, test_acc, test_top5, test_time = end_pass()
        n_broken, newly_broken = zip(*(broken.report(batches[mode]) for mode in (True, False)))
        stats = {**options, 'train_loss': train_loss, 'train_acc': train_acc, 'train_top5': train_top5, 'test_loss': test_loss,
                 'test_acc': test_acc, 'test_top5': test_top5, 'epoch': state['epoch'], 'num_classes': len(source.classes),
                 'n_parameters': n_parameters, 'train_time': train_time, 'test_time': test_time}
        if any(n_broken):
            stats.update(train_broken=n_broken[0], test_broken=n_broken[1], broken_images=sum(newly_broken, []))
        with open(folder / 'log.txt', 'a') as file:
            file.write(f'json_stats: {json.dumps(stats)}\n')
        checkpoint.save(folder / checkpoint.FILE_NAME, {
            'params': {key: tensor.detach().cpu().contiguous() for key, tensor in module.params().items()}, 'epoch': state['epoch'],
            'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(), 'options': options, 'network': {'model': options['model'], **definition},
            'classes': list(source.classes), 'preprocessing': source.preprocessing.as_dict()})
        print(f'epoch {state["epoch"]}/{state["maxepoch"]}: train loss {train_loss:.4f}, accuracy {train_acc:.2f} %; test loss '
              f'{test_loss:.4f}, accuracy {test_acc:.2f} %, top-{tally.topk[-1]} {test_top5:.2f} %; {train_time + test_time:.1f} s',
              flush=True)
        for mode in (True, False):  # with everything saved: such a run goes on once its data are mended
            broken.check(batches[mode])

    engine.hooks.update(on_start=on_start, on_start_epoch=on_start_epoch, on_sample=on_sample, on_forward=on_forward,
                        on_end_epoch=on_end_epoch)
    engine.train(network, batches[True], options['epochs'], Scaled(optimizer, scaler))
    print(f'done: {folder}')


def check_classes(source, found, options):
    if found.classes and list(source.classes) != list(found.classes):
        raise UserError(f'{found.path} was trained on other classes ({", ".join(found.classes[:3])}, ...) than are under '
                        f'{options["dataroot"]} ({", ".join(source.classes[:3])}, ...)')


def autocast(device, short):
    return torch.autocast(device.type, short, enabled=short is not None)


def parallel(module, inputs, ngpu):
    if ngpu == 1:
        return module(inputs)
    return torch.nn.parallel.data_parallel(module, inputs, list(range(ngpu)))


def evaluate(options, found, device):
    """Test a checkpoint on its data set's test images, and print what its log would say, as one JSON line."""
    dtype, short = DTYPES[options['dtype']]
    module = found.module().to(device, dtype, memory_format=torch.channels_last)
    source = load_data(options)
    check_classes(source, found, options)
    if found.preprocessing:  # of its own training set, where it was whitened
        source = replace(source, preprocessing=images.Preprocessing.from_dict(found.preprocessing))
    batches = source.batches(False, batch_size=options['batch_size'], device=device, workers=options['nthread'])
    tally = Tally(len(source.classes))
    progress = Progress('test', batches.n, tally)
    with torch.inference_mode(), autocast(device, short):
        for inputs, targets in batches:
            logits = module(inputs.to(dtype)).to(dtype)
            tally.add(F.cross_entropy(logits, targets), logits, targets)
            progress.update(len(targets))
    progress.close()
    broken = Broken()
    broken.report(batches)
    broken.check(batches)
    loss, top1, top5 = tally.values()
    print('json_stats: ' + json.dumps({'checkpoint': str(found.path), 'dataset': options['dataset'], 'test_loss': loss,
                                       'test_acc': top1, 'test_top5': top5, 'holdout': options['holdout'], 'n': batches.n}))


def start_from(found, given, arguments):
    """Train on from the tensors of a file that is no run of this program: with its epoch, if it has one, and a new optimizer."""
    if found.folded or found.network is None:
        raise UserError(f'{found.path} is {"folded: it can be tested (--evaluate)" if found.folded else "no network that is known here"}, '
                        'but not trained on')
    found.optimizer = None
    options = complete({**found.network_options(given), **given})
    options['width'] = whole(options['width'])
    if found.epoch >= options['epochs']:
        raise OptionError(f'{found.path} has {found.epoch} epochs already; a larger --epochs extends the training')
    print(f'{found.path} is no run of train.py: training goes on from its tensors at epoch {found.epoch}, with a new optimizer')
    train(options, arguments, found, choose_device(options))


def whole(number):
    return int(number) if number == int(number) else number


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    given = {name: value for name, value in vars(build_parser(__doc__).parse_args(arguments)).items() if value is not None}
    if 'evaluate' in given:
        found = checkpoint.load(given.pop('evaluate'))
        if found.network is None:
            raise UserError(f'{found.path} holds no network that is known here')
        found.network.update(found.network_options(given))
        stored = {name: value for name, value in found.options.items() if name not in BOUND_TO_MACHINE}
        options = complete(given, {**GENERAL, **RECIPES[found.network['dataset']], **found.network, **stored, **given})
        return evaluate(options, found, choose_device(options))
    resumed = checkpoint.load(given['resume']) if 'resume' in given else None
    if resumed and not resumed.is_run:
        return start_from(resumed, given, arguments)
    options = complete(given, resumed and {name: value for name, value in resumed.options.items()
                                         if name not in (*BOUND_TO_MACHINE, 'resume', 'save')})
    options['width'] = whole(options['width'])
    if resumed and resumed.epoch >= options['epochs']:
        raise OptionError(f'{resumed.path} has all its {resumed.epoch} epochs; a larger --epochs extends the run')
    train(options, arguments, resumed, choose_device(options))


if __name__ == '__main__':
    run(main, 'train.py')
