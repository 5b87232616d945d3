"""Images made for the benchmarks, and pipelines that read them: ours and torchvision's."""

from functools import partial

import torch
from torch.utils.data import DataLoader, TensorDataset

from lab.data import datasets

CHANNELS_AND_SIZE = {'digits': (1, 8), 'CIFAR10': (3, 32), 'ImageNet': (3, 224)}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_batch(dataset, batch, device='cpu', layout=torch.contiguous_format):
    """Normalized images (N, C, H, W) of a data set's size, and targets (N,) of 10 classes."""
    channels, size = CHANNELS_AND_SIZE[dataset]
    inputs = torch.randn(batch, channels, size, size)
    return inputs.to(device, memory_format=layout), torch.arange(batch, device=device) % 10


def random_cifar(n):
    """uint8 images (N, 32, 32, 3) and targets (N,)."""
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8), torch.arange(n) % 10


def write_photographs(folder, n, size=(500, 375), quality=90):
    """Write n JPEGs of two classes to each of train/ and val/.

    They are crops of `size`, (width, height) in pixels, of scikit-learn's two photographs.
    """
    import cv2
    import numpy as np
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    width, height = size
    for part in ('train', 'val'):
        for label in ('0', '1'):
            (folder / part / label).mkdir(parents=True)
        for i in range(n):
            top, left = random.integers(0, 427 - height + 1), random.integers(0, 640 - width + 1)
            crop = photographs[i % 2][top : top + height, left : left + width]
            path = folder / part / str(i % 2) / f'{i:05}.jpg'
            bgr = crop[..., ::-1]  # OpenCV's order
            cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])


# --- pipelines -------------------------------------------------------------------------------


def our_batches(n, device='cpu'):
    """Training batches of n random images of CIFAR-10's size."""
    preprocessing = datasets.PREPROCESSING['CIFAR10']
    data = datasets.Data('CIFAR10', random_cifar(n), None, (), preprocessing, mirrored=True)
    return data.batches(True, batch_size=128, pad=4, device=device)


def torchvision_batches(n):
    """The same batches from torchvision's transforms of single PIL images, in two processes."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            torch.Tensor.numpy,
            transforms.ToPILImage(),
            transforms.Pad(4, padding_mode='reflect'),
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        ]
    )

    data = TensorDataset(*random_cifar(n))
    return in_two_processes(data, batch_size=128, collate_fn=partial(collate, transform))


def collate(transform, samples):
    """(N, C, H, W) and (N,) of pairs of image and target."""
    images, targets = zip(*samples)
    return torch.stack([transform(image) for image in images]), torch.stack(targets)


def our_folder_batches(folder, part):
    """Batches of 64 from folder/train or folder/val, decoded in two processes."""
    return datasets.load('folder', folder).batches(part == 'train', batch_size=64, workers=2)


def torchvision_folder_batches(folder, part):
    """The same as torchvision reads them."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if part == 'train':
        crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(256), transforms.CenterCrop(224)]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    images = ImageFolder(folder / part, transforms.Compose([*crop, *to_tensor]))
    return in_two_processes(images, batch_size=64, shuffle=part == 'train')


def in_two_processes(images, shuffle=True, **arguments):
    return DataLoader(images, shuffle=shuffle, num_workers=2, persistent_workers=True, **arguments)


def read(batches):
    for _ in batches:
        pass
