"""The data that the options describe."""

from lab import distributed
from lab.data import datasets
from lab.data.class_names import readable
from lab.data.image_folders import ImageFolder
from lab.distributed import world
from lab.errors import UserError


def load_data(options):
    with distributed.first_on_this_machine():
        root = options['dataroot']
        source = datasets.load(options['dataset'], root, image_size=options['image_size'])
        if options['holdout']:
            source = source.holdout(options['holdout'])
        if options['per_class']:
            source = source.per_class(options['per_class'])
        return source.whitened(root) if options['preprocess'] == 'zca' else source


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
    if found and found.preprocessing and not isinstance(source.train, ImageFolder):
        stored, size = found.preprocessing['image_size'], source.preprocessing.image_size
        if stored != size:
            raise UserError(
                f'{found.path} has images of {stored} pixels, but {options["dataset"]} has {size}'
            )
    theirs, ours = found and found.classes, list(source.classes)
    if theirs and readable(list(theirs), len(theirs)) != readable(ours, len(ours)):
        raise UserError(
            f'{found.path} has other classes ({", ".join(found.classes[:3])}, ...) than the data '
            f'in {options["dataroot"]} ({", ".join(source.classes[:3])}, ...)'
        )
