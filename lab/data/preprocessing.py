"""What turns an image into a network's input: normalization, or contrast normalization and ZCA whitening."""

import os
import sys
from dataclasses import asdict, dataclass, field
from hashlib import sha256

import torch

from lab.files import cache_path


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into a network's input; travels in checkpoints. mean and std are on 0..255, RGB.

    `whitening` is None, or the dict of tensors that `fit_whitening` gives; then mean and std are not used.
    """

    channels: int
    image_size: int  # pixels, height and width of the network's input
    resize: int  # shorter side before the center crop; for small images equal to image_size
    mean: tuple
    std: tuple
    whitening: dict = field(default=None, compare=False)

    def as_dict(self):
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, facts):
        return cls(**{**facts, 'mean': tuple(facts['mean']), 'std': tuple(facts['std'])})


def normalize(images, preprocessing, dtype=torch.float32):
    """uint8 (N, H, W, C) to the network's input: floats (N, C, H, W) in channels_last, on the same device.

    Floats are taken to be whitened already, and change only their shape.
    """
    n, height, width, channels = images.shape
    if images.is_floating_point():
        return images.to(dtype).permute(0, 3, 1, 2)
    if preprocessing.whitening:
        return whiten(images, preprocessing.whitening).to(dtype).permute(0, 3, 1, 2)
    # One pass over rows of width * channels: a broadcast along the last dimension is several times as fast as over channels.
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    scale = (1 / std).repeat(width).to(images.device, dtype)
    shift = (
        (-torch.tensor(preprocessing.mean, dtype=torch.float64) / std)
        .repeat(width)
        .to(images.device, dtype)
    )
    rows = images.reshape(n, height, width * channels)
    normalized = torch.empty(rows.shape, device=images.device, dtype=dtype)
    # On a CPU in pieces that stay in its cache; on a GPU at once.
    piece = n if images.is_cuda else max(1, 2**19 // (height * width * channels))
    for target, part in zip(normalized.split(piece), rows.split(piece)):
        torch.addcmul(shift, target.copy_(part), scale, out=target)
    return normalized.view(n, height, width, channels).permute(0, 3, 1, 2)


def contrast_normalized(images):
    """Global contrast normalization: uint8 (N, H, W, C) to floats (N, H W C), each image of mean 0 and variance 1."""
    flat = images.reshape(len(images), -1).float()
    flat = flat - flat.mean(1, keepdim=True)
    deviation = flat.square().mean(1, keepdim=True).sqrt()
    return flat / torch.where(deviation > 0, deviation, 1)  # an image of one color stays zero


def whiten(images, whitening):
    """Contrast normalization and ZCA: uint8 (N, H, W, C) to floats of the same shape."""
    mean, matrix = (whitening[name].to(images.device) for name in ('mean', 'matrix'))
    return torch.cat(
        [(contrast_normalized(part) - mean) @ matrix for part in images.split(5000)]
    ).view(images.shape)


FILTER_BIAS = 0.1  # added to every eigenvalue, as in the whitened CIFAR that Wide ResNets were first trained on


def fit_whitening(images):
    """ZCA after global contrast normalization, fitted to uint8 images (N, H, W, C).

    Returns:
        {'mean': (D,), 'matrix': (D, D)} for `images.whiten`, D = H W C: U diag((eigenvalue + 0.1) ** -1/2) U^T of their covariance.
    """
    flat = contrast_normalized(images)
    mean = flat.mean(0)
    flat -= mean
    eigenvalues, vectors = torch.linalg.eigh((flat.T @ flat / len(flat)).double())
    matrix = vectors * (eigenvalues.clamp(min=0) + FILTER_BIAS).rsqrt() @ vectors.T
    return {'mean': mean, 'matrix': matrix.float()}


def cached_whitening(images, root, name):
    """fit_whitening, kept beside the data under the SHA-256 of the images it was fitted to, with its own."""
    path = cache_path(root, f'zca-{name}-{sha256(images.numpy().tobytes()).hexdigest()[:16]}.pt')
    try:
        cached = torch.load(path, weights_only=True)
        if cached['sha256'] == _digest(cached):
            return {key: cached[key] for key in ('mean', 'matrix')}
    except FileNotFoundError:
        pass
    except Exception:  # noqa: BLE001  whatever torch finds wrong with a broken file
        cached = None
    if path.exists():
        print(f'{path} is broken; the whitening is computed again', file=sys.stderr)
    whitening = fit_whitening(images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
        torch.save({**whitening, 'sha256': _digest(whitening)}, temporary)
        os.replace(temporary, path)
    except OSError as error:
        print(f'the whitening could not be kept in {path} ({error.strerror})', file=sys.stderr)
    return whitening


def _digest(whitening):
    return sha256(
        b''.join(whitening[key].numpy().tobytes() for key in ('mean', 'matrix'))
    ).hexdigest()
