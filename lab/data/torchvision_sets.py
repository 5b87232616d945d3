"""CIFAR10, CIFAR100 and SVHN, which torchvision reads, checks (MD5) and downloads.

torchvision and its copies of the images take as much memory as a whole training. So
`read_in_child` calls a reader in a child process, whose memory is freed when it ends.
"""

import multiprocessing

import numpy as np
import torch

from lab.data.messages import missing_data, one_line
from lab.errors import UserError

SVHN_CLASSES = tuple('0123456789')
MESSAGE_BYTES = 2**28  # a message through a pipe must be smaller than 2 GB


def read_cifar(name, root, download):
    """Read CIFAR10 or CIFAR100 from the files under `root`.

    Returns:
        Lists of two, for training and testing: uint8 arrays (N, H, W, C), and lists of N labels;
        and the class names.

    Raises:
        UserError: a file is missing or broken and was not downloaded.
    """
    from torchvision import datasets

    cifar = getattr(datasets, name)
    files = [*cifar.train_list, *cifar.test_list, (cifar.meta['filename'], cifar.meta['md5'])]
    train, test = _open_parts(
        cifar,
        ({'train': True}, {'train': False}),
        root,
        download,
        md5_sums={root / cifar.base_folder / file: md5 for file, md5 in files},
        wanted=f'the folder {cifar.base_folder} (from {cifar.filename})',
    )
    images = [np.ascontiguousarray(part.data) for part in (train, test)]
    return images, [train.targets, test.targets], tuple(train.classes)


def read_svhn(name, root, download):
    """Read SVHN. Arguments, results and errors are those of read_cifar."""
    from torchvision.datasets import SVHN

    files = SVHN.split_list
    train, test = _open_parts(
        SVHN,
        ({'split': 'train'}, {'split': 'test'}),
        root,
        download,
        md5_sums={root / file: md5 for _, file, md5 in files.values()},
        wanted=f'{files["train"][1]}, {files["test"][1]}',
    )
    # torchvision's SVHN is (N, C, H, W), unlike its CIFAR.
    images = [np.ascontiguousarray(part.data.transpose(0, 2, 3, 1)) for part in (train, test)]
    return images, [train.labels.tolist(), test.labels.tolist()], SVHN_CLASSES


def _open_parts(reader, parts, root, download, *, md5_sums, wanted):
    """An instance of `reader`, a torchvision class, for each of `parts`; downloads incomplete data.

    `md5_sums` ({path: sum}) and `wanted` (the files, in words) are for the error message.
    """
    try:
        try:
            return [reader(root, **part) for part in parts]
        except RuntimeError:  # a file is missing, or its MD5 sum is wrong
            if not download:
                raise
        root.mkdir(parents=True, exist_ok=True)
        return [reader(root, download=True, **part) for part in parts]
    except (OSError, RuntimeError, EOFError) as error:
        problem = f'{reader.__name__} is incomplete under {root}'
        broken = _broken_file(md5_sums)
        if broken:
            problem = f'{broken} is broken (its MD5 sum is wrong)'
        raise missing_data(
            f'{problem} and was not downloaded ({one_line(error)})', f'put {wanted} there'
        ) from None


def _broken_file(md5_sums):
    """The first of the files that exists but has another MD5 sum; None if there is none."""
    from torchvision.datasets.utils import check_integrity

    for path, md5 in md5_sums.items():
        if path.exists() and not check_integrity(path, md5):
            return path
    return None


def read_in_child(read, name, root, download):
    """Call `read(name, root, download)`, such as read_cifar, in a child process.

    The child is forked, so `read` may be any function. Where the system cannot fork, `read` runs in
    this process.

    Returns:
        (images, targets) for training, the same for testing, class names. Images are uint8
        (N, H, W, C), targets int64 (N,).

    Raises:
        UserError: `read` raised it, or the child process died.
    """
    if 'fork' in multiprocessing.get_all_start_methods():
        arrays, labels, classes = _receive_from_child(read, name, root, download)
    else:
        arrays, labels, classes = read(name, root, download)
    train, test = (
        (torch.from_numpy(array), torch.tensor(targets)) for array, targets in zip(arrays, labels)
    )
    return train, test, classes


def _receive_from_child(read, name, root, download):
    """What `read` returns, through a pipe."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context('fork').Process(
        target=_send, args=(sender, read, name, root, download), daemon=True
    )
    child.start()
    sender.close()  # so that receiving ends with EOFError when the child dies
    try:
        error, shapes, labels, classes = receiver.recv()
        if error:
            raise UserError(error)
        arrays = [np.empty(shape, np.uint8) for shape in shapes]
        for array in arrays:
            for piece in _pieces(array):
                receiver.recv_bytes_into(piece)
    except EOFError:
        raise UserError(
            f'the process that reads {name} under {root} died: it may need more memory'
        ) from None
    child.join()
    return arrays, labels, classes


def _send(sender, read, name, root, download):
    """The child process: send what `read` returns, or the message of its UserError."""
    try:
        arrays, labels, classes = read(name, root, download)
    except UserError as error:
        sender.send((str(error), None, None, None))
        return
    sender.send((None, [array.shape for array in arrays], labels, classes))
    for array in arrays:
        for piece in _pieces(array):
            sender.send_bytes(piece)


def _pieces(array):
    """The bytes of an array as memory views, each small enough for a message."""
    pieces = np.array_split(array, -(-array.nbytes // MESSAGE_BYTES))
    return [piece.data.cast('B') for piece in pieces]
