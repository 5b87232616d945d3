"""From pixels to a network's input: normalization, or contrast normalization and ZCA whitening."""

import io
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256

import torch

from lab.files import cache_path, write_atomically


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input. Checkpoints store it as a dict.

    `whitening` is None or what `fit_whitening` returns; with whitening, mean and std are unused.
    """

    channels: int
    image_size: int  # height and width of the network's input, in pixels
    resize: int  # the shorter side before the center crop; for small images equal to image_size
    mean: tuple  # one per channel (RGB), for pixels from 0 to 255
    std: tuple
    whitening: dict = field(default=None, compare=False)

    def as_dict(self):
        return {**asdict(self), 'mean': list(self.mean), 'std': list(self.std)}

    @classmethod
    def from_dict(cls, stored):
        return cls(**{**stored, 'mean': tuple(stored['mean']), 'std': tuple(stored['std'])})


def normalize(images, preprocessing, dtype=torch.float32):
    """uint8 images (N, H, W, C) to floats (N, C, H, W) in channels_last, on the same device.

    Images that are already floats have been whitened; only their layout changes.
    """
    if images.is_floating_point():
        return images.to(dtype).permute(0, 3, 1, 2)
    if preprocessing.whitening:
        return whiten(images, preprocessing.whitening).to(dtype).permute(0, 3, 1, 2)
    n, height, width, channels = images.shape
    scale, shift = _scale_and_shift(preprocessing, width, images.device, dtype)
    rows = images.reshape(n, height, width * channels)
    normalized = torch.empty(rows.shape, device=images.device, dtype=dtype)
    # A CPU works on pieces that fit its cache; a GPU on all images at once.
    piece = n if images.is_cuda else max(1, 2**19 // (height * width * channels))
    for target, part in zip(normalized.split(piece), rows.split(piece)):
        torch.addcmul(shift, target.copy_(part), scale, out=target)
    return normalized.view(n, height, width, channels).permute(0, 3, 1, 2)


@lru_cache
@torch.inference_mode(False)
def _scale_and_shift(preprocessing, width, device, dtype):
    """What normalizes a row of an image, two tensors (width * channels,), kept on the device: each
    copy to a GPU waits for it.

    A long last dimension is several times as fast as broadcasting over 3 channels.
    """
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    return tuple(row.repeat(width).to(device, dtype) for row in (1 / std, -mean / std))


def mean_and_std(images):
    """The mean and standard deviation of each channel of uint8 images (N, H, W, C), as tuples.

    Both are exact, from counts of the 256 values. A standard deviation is at least 1, so that
    images of one color can be divided by it.
    """
    values, means, stds = torch.arange(256, dtype=torch.float64), [], []
    for channel in images.unbind(3):
        counts = torch.bincount(channel.reshape(-1), minlength=256).double()
        mean = ((counts @ values) / counts.sum()).item()
        variance = ((counts @ values.square()) / counts.sum()).item() - mean**2
        means.append(mean)
        stds.append(max(variance, 1) ** 0.5)
    return tuple(means), tuple(stds)


def contrast_normalized(images):
    """uint8 images (N, H, W, C) to floats (N, H W C); each image gets mean 0 and variance 1."""
    flat = images.reshape(len(images), -1).float()
    flat = flat - flat.mean(1, keepdim=True)
    deviation = flat.square().mean(1, keepdim=True).sqrt()
    return flat / torch.where(deviation > 0, deviation, 1)  # an image of one color becomes 0


def whiten(images, whitening):
    """Contrast normalization, then ZCA: uint8 (N, H, W, C) to floats of the same shape."""
    mean = whitening['mean'].to(images.device)
    matrix = whitening['matrix'].to(images.device)
    parts = [(contrast_normalized(part) - mean) @ matrix for part in images.split(5000)]
    return torch.cat(parts).view(images.shape)


# Added to every eigenvalue, as in the whitened CIFAR that the first Wide ResNets were trained on.
FILTER_BIAS = 0.1


def fit_whitening(images):
    """Fit ZCA to uint8 images (N, H, W, C) after contrast normalization.

    Returns:
        {'mean': (D,), 'matrix': (D, D)} for `whiten`, with D = H W C. The matrix is
        U diag((eigenvalues + 0.1) ** -1/2) U^T, from the eigenvectors U of the covariance.
    """
    flat = contrast_normalized(images)
    mean = flat.mean(0)
    flat -= mean
    eigenvalues, vectors = torch.linalg.eigh((flat.T @ flat / len(flat)).double())
    matrix = vectors * (eigenvalues.clamp(min=0) + FILTER_BIAS).rsqrt() @ vectors.T
    return {'mean': mean, 'matrix': matrix.float()}


def cached_whitening(images, root):
    """`fit_whitening(images)`, cached next to the data in a file named by the images' SHA-256."""
    digest = sha256(images.numpy().tobytes()).hexdigest()
    path = cache_path(root, f'zca-{digest[:16]}.pt')
    whitening = _read_cache(path) if path.exists() else None
    if whitening is None:
        whitening = fit_whitening(images)
        content = io.BytesIO()
        torch.save(whitening, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())
        except OSError as error:
            print(f'cannot cache the whitening in {path} ({error.strerror})', file=sys.stderr)
    return whitening


def _read_cache(path):
    """The whitening stored in a file; None if the file is broken."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch does not look at the checksums
                return torch.load(path, weights_only=True)
    except Exception:  # zipfile and torch raise many types for broken files
        pass
    print(f'{path} is broken: fitting the whitening again', file=sys.stderr)
    return None
