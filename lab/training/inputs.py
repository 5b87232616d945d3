"""The data that the options describe."""

from contextlib import nullcontext
from dataclasses import replace

from lab import distributed
from lab.data import datasets
from lab.data.names import readable
from lab.data.preprocessing import Preprocessing
from lab.distributed import world
from lab.errors import UserError, printable
from lab.models.registry import form_of


def load_data(options, checkpoint=None, is_test=False):
    """The Data that the options describe.

    Args:
        checkpoint: the run that goes on, the file to start from, or, if `is_test`, to test. A run
            and a test keep its preprocessing: images may have been added to a folder meanwhile.

    Raises:
        UserError: data are missing or broken, or the checkpoint has other classes.
    """
    root = options['dataroot']
    # One process downloads or caches, and the others find the files. Image files have no need of
    # that: all processes read them at once.
    reads_files = options['dataset'] == 'folder' and options['preprocess'] != 'zca'
    with nullcontext() if reads_files else distributed.first_on_this_machine():
        data = datasets.load(
            options['dataset'], root, form=options.get('form'), image_size=options['image_size']
        ).tested_on(options['holdout'])
        if options['per_class']:
            data = data.per_class(options['per_class'])
        if options['preprocess'] == 'zca':
            data = data.whitened(root)
    if checkpoint:
        check_classes(data, checkpoint, options)
        if checkpoint.preprocessing and (checkpoint.is_run or is_test):
            preprocessing = Preprocessing.from_dict(checkpoint.preprocessing)
            data = replace(data, preprocessing=preprocessing)
    return replace(data, mirrored=data.mirrored and not options['no_mirror'])


def make_batches(data, options, device, train):
    """Batches of the training or the test set. Raises OptionError."""
    batch_size = options['batch_size']
    if not train and device.type == 'cuda' and form_of(options) == 'cifar':
        batch_size = max(batch_size, 1000)  # fewer kernels to start
    batches = data.batches(
        train,
        batch_size=batch_size,
        device=device,
        seed=options['seed'],
        pad=options['randomcrop_pad'],
        cutout=options['cutout'],
        workers=options['nthread'],
        shard=(distributed.rank(), world()),
    )
    if train:
        distributed.check_batches(batches.n, batches.batch_size)
    return batches


def check_classes(data, checkpoint, options):
    """Raise UserError if a checkpoint has other classes than the data, or other small images."""
    if checkpoint.preprocessing and data.in_memory:
        stored, size = checkpoint.preprocessing['image_size'], data.preprocessing.image_size
        if stored != size:
            raise UserError(
                f'{checkpoint.path} has images of {stored} pixels, but {options["dataset"]} has '
                f'{size}'
            )
    n = checkpoint.network['num_classes']
    ours = readable(list(data.classes), len(data.classes))
    theirs = readable(list(checkpoint.classes), n) if checkpoint.classes else None
    if n != len(ours) or theirs not in (None, ours):
        difference = f'{n} instead of {len(ours)}'
        if n == len(ours):
            pairs = ((a, b) for a, b in zip(theirs, ours) if a != b)
            difference = '{} instead of {}'.format(*map(printable, next(pairs)))
        raise UserError(
            f'{checkpoint.path} has other classes than the data in {options["dataroot"]}: '
            f'{difference}'
        )
