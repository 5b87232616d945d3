"""The data that the options describe."""

from contextlib import nullcontext
from dataclasses import replace

from lab import distributed
from lab.data import datasets
from lab.data.names import readable
from lab.distributed import world
from lab.errors import UserError, printable


def load_data(options):
    """The Data that the options describe. Raises UserError."""
    root = options['dataroot']
    # One process downloads or caches, and the others find the files. Image files have no need of
    # that: all processes read them at once.
    reads_files = options['dataset'] == 'folder' and options['preprocess'] != 'zca'
    with nullcontext() if reads_files else distributed.first_on_this_machine():
        source = datasets.load(
            options['dataset'], root, form=options.get('form'), image_size=options['image_size']
        ).tested_on(options['holdout'])
        if options['per_class']:
            source = source.per_class(options['per_class'])
        if options['preprocess'] == 'zca':
            source = source.whitened(root)
    return replace(source, mirrored=source.mirrored and not options['no_mirror'])


def make_batches(source, training, options, device):
    return source.batches(
        training,
        batch_size=options['batch_size'],
        device=device,
        seed=options['seed'],
        pad=options['randomcrop_pad'],
        cutout=options['cutout'],
        workers=options['nthread'],
        shard=(distributed.rank(), world()),
    )


def check_classes(source, found, options):
    """Raise UserError if a checkpoint has other classes than the data, or other small images."""
    if found and found.preprocessing and source.in_memory:
        stored, size = found.preprocessing['image_size'], source.preprocessing.image_size
        if stored != size:
            raise UserError(
                f'{found.path} has images of {stored} pixels, but {options["dataset"]} has {size}'
            )
    if not found or not found.classes:
        return
    theirs, ours = (readable(list(names), len(names)) for names in (found.classes, source.classes))
    if theirs != ours:
        difference = f'{len(theirs)} instead of {len(ours)}'
        if len(theirs) == len(ours):
            pairs = ((a, b) for a, b in zip(theirs, ours) if a != b)
            difference = '{} instead of {}'.format(*map(printable, next(pairs)))
        raise UserError(
            f'{found.path} has other classes than the data in {options["dataroot"]}: {difference}'
        )
