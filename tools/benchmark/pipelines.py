"""The input pipelines that the benchmarks compare: ours, and torchvision's in a DataLoader."""

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lab.data import datasets
from tools.benchmark.made_data import random_cifar

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def our_batches(n):
    """Training batches of n random images of CIFAR-10's size."""
    preprocessing = datasets.PREPROCESSING['CIFAR10']
    source = datasets.Data('CIFAR10', random_cifar(n), None, (), preprocessing, mirrored=True)
    return source.batches(True, batch_size=128, pad=4)


def per_sample_batches(n):
    """The same batches from torchvision's transforms of single PIL images, in two processes."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Pad(4, padding_mode='reflect'),
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        ]
    )
    return DataLoader(
        PerSample(*random_cifar(n), transform),
        batch_size=128,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )


class PerSample(Dataset):
    """Images in memory, transformed one by one."""

    def __init__(self, images, targets, transform):
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index].numpy())
        return self.transform(image), int(self.targets[index])


def torchvision_folder_batches(folder, part):
    """Batches of 64 from folder/train or folder/val as torchvision reads them, in two processes."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if part == 'train':
        crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(256), transforms.CenterCrop(224)]
    transform = transforms.Compose(
        [*crop, transforms.ToTensor(), transforms.Normalize(mean=MEAN, std=STD)]
    )
    return DataLoader(
        ImageFolder(folder / part, transform),
        batch_size=64,
        shuffle=part == 'train',
        num_workers=2,
        persistent_workers=True,
    )
