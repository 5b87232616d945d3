"""Fine-tuning: a training that starts from a network trained before (--pretrained)."""

import sys
from pathlib import Path

import torch

from diracconv import split_weight
from diracnet import BN_EPS
from diracparams import DATASETS
from lab.data.names import readable
from lab.errors import OptionError, UserError
from lab.models import registry
from lab.runs.checkpoint import load

FOLDER = 'https://s3.amazonaws.com/modelzoo-networks/'
PUBLISHED = {  # unfolded DiracNets of the paper's authors
    'diracnet18': f'{FOLDER}diracnet18-v2_checkpoint.pth',
    'diracnet34': f'{FOLDER}diracnet34-v2_checkpoint.pth',
}
ENOUGH = 2048  # images to calibrate batch norms on


def find_pretrained(cli_options):
    """The Checkpoint that --pretrained names; None without the option.

    Raises:
        UserError: it cannot be read or downloaded.
        OptionError: its model cannot be fine-tuned.
    """
    name = cli_options.get('pretrained')
    if name is None:
        return None
    pretrained = load(_download(name) if name in PUBLISHED else name)
    if not pretrained.folded:
        return pretrained
    if pretrained.network['model'] in registry.VERSION_1:
        raise OptionError(
            f'--pretrained {name} is a folded network of version 1, whose Dirac weights cannot be '
            'recovered: pass the unfolded one'
        )
    # Folded, all these chains are equal.
    pretrained.network['model'] = cli_options.get('model', 'diracnet')
    if pretrained.network['model'] not in registry.CHAINS:
        raise OptionError(
            f'--model {cli_options["model"]}: a folded network such as {name} becomes '
            f'{" or ".join(registry.CHAINS)}'
        )
    return pretrained


def _download(name):
    """The path of a published file, downloaded to torch.hub's cache if needed."""
    url = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / 'checkpoints' / url.rsplit('/', 1)[1]
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        raise UserError(
            f'{url} cannot be downloaded ({error}): get it another way, and save it as {path}'
        ) from None
    return path


def network_options(pretrained, cli_options):
    """The options of the pretrained network, for a training on the data set in `cli_options`.
    Raises OptionError if one contradicts them, or if the images do not fit the network."""
    network, dataset = pretrained.network, cli_options.get('dataset', 'CIFAR10')
    form, channels = registry.form_of({**cli_options, 'dataset': dataset}), DATASETS[dataset][1]
    if network['form'] != form:
        hint = f': add --form {network["form"]}' if dataset == 'folder' else ''
        raise OptionError(
            f'{pretrained.path} is a network of the form {network["form"]}, but --dataset '
            f'{dataset} has {form}{hint}'
        )
    if network['in_channels'] != channels:
        raise OptionError(
            f'{pretrained.path} needs images with {network["in_channels"]} channels, but those of '
            f'--dataset {dataset} have {channels}'
        )
    names = registry.network_option_names(network['model'])
    own = {name: network[name] for name in names if name in network}
    del own['dataset'], own['form']
    for name, value in own.items():
        if cli_options.get(name, value) != value:
            raise OptionError(f'--{name} is {cli_options[name]}, but {pretrained.path} has {value}')
    return own


@torch.no_grad()
def start_from(module, pretrained, classes, batches):
    """Give a new network the parameters of a pretrained one.

    The classifier stays new if its classes are others. A folded network gets back its Dirac weights
    and batch norms, see `_split` and `_calibrate`.

    Args:
        module: diracnet.Network of the same architecture.
        pretrained: the Checkpoint.
        classes: names of the classes of the training.
        batches: training Batches, to calibrate batch norms on.

    Returns:
        What happened, in words.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    params = _split(pretrained.params, own) if pretrained.folded else pretrained.params
    same = pretrained.network['num_classes'] == len(classes)
    if same and pretrained.classes:
        theirs, ours = (readable(list(c), len(classes)) for c in (pretrained.classes, classes))
        same = theirs == ours
    for key, tensor in own.items():
        if key in params and (same or not key.startswith('fc.')):
            tensor.copy_(params[key])
    if pretrained.folded:
        _calibrate(module, own, params, batches)
    classifier = 'its classifier' if same else f'a new classifier for {len(classes)} classes'
    kind = 'folded ' if pretrained.folded else ''
    return f'starting from the {kind}network in {pretrained.path}, with {classifier}'


def _split(folded, own):
    """The params that a folded state dict determines, with the biases of its convolutions under the
    names of the batch norms'."""
    params = {}
    for key, tensor in folded.items():
        name = key.removeprefix('features.')
        if name.startswith('fc.'):
            params[name] = tensor
        elif name.endswith('conv.bias'):
            params[f'{name.removesuffix("conv.bias")}bn.bias'] = tensor
        else:
            name = name.removesuffix('.weight')
            prefix = name.removesuffix('conv')
            if f'{prefix}alpha' in own:
                parts = split_weight(tensor)
                params.update(zip((name, f'{prefix}alpha', f'{prefix}beta'), parts))
            else:
                params[name] = tensor
    return params


def _calibrate(module, own, params, batches):
    """Set all batch norms so that they add the folded biases and nothing else, with the statistics
    of training images: the network computes what the folded one does, and can train."""
    done = 0  # images
    batches.epoch, batches.start = 1, 0

    def measure(x, mean, var, weight, bias, training, momentum, eps):
        share = len(x) / (done + len(x))
        variances, means = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        mean.lerp_(means.to(mean.dtype), share)
        var.lerp_(variances.to(var.dtype), share)
        return x + bias[:, None, None]

    for inputs, _ in batches:
        module.f(inputs.to(own['fc.weight'].dtype), module.params(), False, norm=measure)
        done += len(inputs)
        if done >= ENOUGH:
            break
    for key, tensor in own.items():
        if key.endswith('running_var'):
            name = key.removesuffix('running_var')
            own[f'{name}weight'].copy_((tensor + BN_EPS).sqrt())
            own[f'{name}bias'].add_(own[f'{name}running_mean'])
