"""Fold a trained network, write it for inference, and check what was written.

    python -m tools.export logs/RUN diracnet.onnx                               # or several at once:
    python -m tools.export logs/RUN net.pth net.pt2 net.onnx net.int8.onnx      # half a minute for a DiracNet-16-1

The suffix says what is written:
    .pth        a dict: `state_dict` (of diracnet.DiracNet), and what rebuilds it: `network` (depth, width, dataset, num_classes,
                in_channels), `classes`, `preprocessing`. diracnet.DiracNet.from_state_dict makes the module
    .pt2        torch.export; the same facts as JSON, torch.export.load(..., extra_files={'metadata.json': ''})
    .onnx       ONNX: input `images`, normalized floats (any batch, C, H, W), output `logits`; the same facts in metadata_props
    .int8.onnx  quantized, calibrated on training images; see tools.quantize
Each file is loaded in a new process and compared with the unfolded network on test images. One whose logits are off by more than 1e-4
of the largest, or an int8 one that loses more than 0.5 points of top-1, is not put in place, and the exit status is 1.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lab.runs import checkpoint
from lab.data.batches import ImageFolder
from lab.data.preprocessing import Preprocessing, normalize
from lab.data import datasets as data
from lab.data import image_files as images
from lab.models.diracnet_v1 import DiracNetV1
from lab.errors import OneLineParser, OptionError, UserError, run
from tools import predict, quantize

SUFFIXES = ('.int8.onnx', '.onnx', '.pt2', '.pth')  # in the order they are tried
FLOAT_LIMIT, INT8_LIMIT = 1e-4, 0.5  # relative error of the logits; points of top-1
TEST_IMAGES, FILE_IMAGES, RANDOM_IMAGES = 10_000, 500, 64  # at most so many are compared
LATENCIES = (1, 64)  # images in a batch
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Study:
    """A checkpoint's two networks, float32 on the CPU, and the data set they are for; without it, `source` is None and `missing` says why."""

    found: checkpoint.Checkpoint
    folded: torch.nn.Module
    unfolded: torch.nn.Module
    name: str
    preprocessing: Preprocessing
    classes: list
    source: data.Data = None
    missing: str = ''

    @property
    def facts(self):
        """What travels in the files."""
        return {
            'network': {**(self.found.network or {}), 'dataset': self.name},
            'classes': self.classes,
            'preprocessing': self.preprocessing.as_dict(),
        }


def study(found, dataset=None, dataroot=None):
    """The Study of a checkpoint; `dataset` names its data set where it has no facts, `dataroot` the place of its files."""
    folded = found.fold().float()
    preprocessing = predict.preprocessing_of(found, dataset)
    predict.check_channels(found.path, folded.architecture.in_channels, preprocessing)
    recorded = (found.network or {}).get('dataset')
    name = recorded if found.preprocessing and recorded else dataset or 'ImageNet'
    about = Study(found, folded, found.module().float(), name, preprocessing, found.classes)
    try:
        about.source = data.load(
            name,
            dataroot or found.options.get('dataroot', './data'),
            download=False,
            image_size=preprocessing.image_size,
        )
    except UserError as error:
        about.missing = str(error)
        return about
    n_classes, n_outputs = len(about.source.classes), folded.architecture.num_classes
    if n_classes != n_outputs:
        raise UserError(
            f'{found.path} tells {n_outputs} classes apart, and the {name} that was found has {n_classes}: name another '
            'with --dataset or --dataroot'
        )
    return replace(about, classes=list(about.classes or about.source.classes))


def targets_of(part):
    return part.targets if isinstance(part, ImageFolder) else part[1]


def pictures(about, train, n, span=None):
    """At most n images, evenly over the training or test set (or its part from span[0] to before span[1]), without augmentation:
    normalized (n, C, H, W), and their classes (n,). Of image files, FILE_IMAGES at most."""
    part = about.source.train if train else about.source.test
    n = min(n, FILE_IMAGES) if isinstance(part, ImageFolder) else n
    begin, end = span or (0, len(targets_of(part)))
    chosen = np.linspace(begin, end - 1, min(n, end - begin)).astype(int)
    if isinstance(part, ImageFolder):
        pixels = np.stack(
            [
                images.prepare(
                    images.read_image(part.root / os.fsdecode(part.names[i])), about.preprocessing
                )
                for i in chosen
            ]
        )
    else:
        pixels = part[0].numpy()[chosen]
    targets = torch.as_tensor(np.asarray(targets_of(part))[chosen])
    return normalize(torch.from_numpy(pixels), about.preprocessing).contiguous(), targets


# --- writing ---------------------------------------------------------------------------------------------------------


def suffix_of(path):
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def content(about, suffix):
    """The bytes of an exported file."""
    if suffix == '.pth':
        file = io.BytesIO()
        torch.save({'state_dict': about.folded.state_dict(), **about.facts}, file)
        return file.getvalue()
    shape = (
        about.preprocessing.channels,
        about.preprocessing.image_size,
        about.preprocessing.image_size,
    )
    if suffix == '.pt2':
        file = io.BytesIO()
        with quantize.quiet():
            program = torch.export.export(
                about.folded,
                (torch.zeros(2, *shape),),
                dynamic_shapes=({0: torch.export.Dim('batch')},),
            )
            torch.export.save(program, file, extra_files={'metadata.json': json.dumps(about.facts)})
        return file.getvalue()
    if suffix == '.onnx':
        return quantize.onnx_model(about.folded, shape, about.facts).SerializeToString()
    calibration, _ = pictures(about, True, quantize.CALIBRATION)
    return quantize.int8_onnx(about.folded, calibration, about.facts)


# --- comparing -------------------------------------------------------------------------------------------------------


def reload(path, suffix):
    """The function from images to logits that an exported file holds."""
    if suffix == '.pth':
        return checkpoint.load(path).fold()
    if suffix == '.pt2':
        with open(path, 'rb') as file:
            return torch.export.load(io.BytesIO(file.read())).module()
    return predict.OnnxNetwork(path)


@torch.inference_mode()
def measure(net, inputs, repeats=20):
    """Logits (N, classes), and the median milliseconds for a batch of each of LATENCIES images."""
    logits = torch.cat([net(part) for part in inputs.split(250)])
    times = []
    for n in LATENCIES:
        batch = inputs[torch.arange(n) % len(inputs)]
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()
            net(batch)
            spent.append(1000 * (time.perf_counter() - start))
        times.append(float(np.median(spent[1:])))
    return logits.numpy(), times


def measure_in_child(path, suffix, inputs_path, result_path):
    """What the new process does: see `compare`."""
    logits, times = measure(reload(path, suffix), torch.from_numpy(np.load(inputs_path)))
    np.savez(result_path, logits=logits, times=times)


def measure_file(path, suffix, inputs):
    """`measure` of a file, loaded in a new process. UserError where it can't be loaded there."""
    with tempfile.TemporaryDirectory() as folder:
        inputs_path, result_path = Path(folder) / 'inputs.npy', Path(folder) / 'result.npz'
        np.save(inputs_path, inputs.numpy())
        command = (
            'import sys; from tools.export import measure_in_child; measure_in_child(*sys.argv[1:])'
        )
        child = subprocess.run(
            [
                sys.executable,
                '-c',
                command,
                str(Path(path).absolute()),
                suffix,
                inputs_path,
                result_path,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if child.returncode:
            reason = child.stderr.strip().splitlines()[-1:] or [f'exit status {child.returncode}']
            raise UserError(f'{path} was written, but a new process can not use it: {reason[0]}')
        with np.load(result_path) as result:
            return result['logits'], result['times'].tolist()


def relative_error(logits, reference):
    """The largest difference of a logit, over the largest logit of its image; of all images the largest. NaN counts as infinite."""
    error = np.abs(logits - reference).max(1) / np.maximum(
        np.abs(reference).max(1), np.finfo(np.float32).tiny
    )
    return float(np.nan_to_num(error, nan=np.inf).max())


def top1(logits, targets):
    return None if targets is None else 100 * float((logits.argmax(1) == targets.numpy()).mean())


def table_row(name, error, accuracy, before, size, times):
    percent = [f'{value:.2f} %' if value is not None else '-' for value in (accuracy, before)]
    return f'| {name} | {error} | {percent[0]} | {percent[1]} | {size:,} | {" | ".join(f"{ms:.2f}" for ms in times)} |'


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.export', description=__doc__)
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', help="a run's folder, its model.pt7 or a state dict"
    )
    parser.add_argument(
        'outs',
        metavar='OUT',
        type=Path,
        nargs='+',
        help='files to write, .pth, .pt2, .onnx or .int8.onnx',
    )
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    parser.add_argument(
        '--dataset', choices=data.PREPROCESSING, help='the data set, where CHECKPOINT does not say'
    )
    parser.add_argument(
        '--dataroot', help='where the data set is, if not where it was for the training'
    )
    args = parser.parse_args(arguments)
    for out in args.outs:
        if suffix_of(out) is None:
            raise OptionError(
                f'{out} must end in .pth, .pt2, .onnx or .int8.onnx: the suffix says what is written'
            )
        if out.exists() and not args.force:
            raise OptionError(f'{out} exists; --force replaces it')
    if any(out.name.endswith('.onnx') for out in args.outs):
        quantize.import_onnx()
    about = study(checkpoint.load(args.checkpoint), args.dataset, args.dataroot)
    for out in args.outs:
        if suffix_of(out) == '.int8.onnx' and about.source is None:
            raise UserError(
                f'{out} needs training images of {about.name} to calibrate: {about.missing}'
            )
        if suffix_of(out) == '.int8.onnx' and isinstance(about.folded, DiracNetV1):
            raise UserError(
                f'{out}: int8 is for version 2 of DiracNets and for plain networks, without NCReLU; .onnx is for all'
            )
        if suffix_of(out) != '.pth' and about.preprocessing.whitening:
            raise UserError(
                f'{out} can not hold the matrix of --preprocess zca in its metadata; export .pth'
            )
    if about.source is None:
        shape = (
            about.preprocessing.channels,
            about.preprocessing.image_size,
            about.preprocessing.image_size,
        )
        inputs, targets = (
            torch.randn(RANDOM_IMAGES, *shape, generator=torch.Generator().manual_seed(0)),
            None,
        )
        what = f'{len(inputs)} images of normal noise, as {about.name} was not found'
    else:
        inputs, targets = pictures(about, False, TEST_IMAGES)
        what = f'{len(inputs)} test images of {about.name}'
    reference, times = measure(about.unfolded, inputs)
    before = top1(reference, targets)
    print(
        f'{args.outs[0]}: {sum(tensor.numel() for tensor in about.folded.parameters()):,} parameters; compared on {what}\n'
    )
    print(
        '| file | largest relative error | top-1 | unfolded | bytes | '
        + ' | '.join(f'ms for {n} image{"s" * (n > 1)}' for n in LATENCIES)
        + ' |'
    )
    print('| --- | --- | --- | --- | --- | --- | --- |')
    print(
        table_row('(unfolded)', '', before, before, os.path.getsize(about.found.path), times),
        flush=True,
    )
    failures = []
    for out in args.outs:
        suffix = suffix_of(out)
        temporary = out.with_name(f'{out.name}.{os.getpid()}.tmp')
        try:
            written = content(about, suffix)
            out.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, 'wb') as file:
                file.write(written)
                file.flush()
                os.fsync(file.fileno())
            logits, times = measure_file(temporary, suffix, inputs)
            error, accuracy = relative_error(logits, reference), top1(logits, targets)
            print(table_row(out, f'{error:.1e}', accuracy, before, len(written), times), flush=True)
            if suffix == '.int8.onnx' and not before - accuracy <= INT8_LIMIT:
                failures.append(
                    f'{out} loses {before - accuracy:.2f} points of top-1, more than {INT8_LIMIT}'
                )
            elif suffix != '.int8.onnx' and not error <= FLOAT_LIMIT:
                failures.append(
                    f'{out} is off by {error:.1e} of the largest logit, more than {FLOAT_LIMIT}'
                )
            else:
                os.replace(temporary, out)
        except OSError as error:
            raise UserError(f'{out} can not be written ({error.strerror})') from None
        finally:
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                pass  # its folder is none
    if failures:
        raise UserError('; '.join(failures) + ': not put in place')


if __name__ == '__main__':
    run(main, 'tools.export')
