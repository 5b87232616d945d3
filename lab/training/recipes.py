"""Recipes: the defaults that depend on the data set, the network, and how it is trained.

The values for CIFAR and ImageNet are the paper's. Those for digits were chosen on held-out training
samples (logs/reference/digits-holdout.txt); FashionMNIST has CIFAR's with fewer epochs and no
crops. An option that no recipe changes has its default in options.py.
"""

from lab.device import has_bfloat16
from lab.models.registry import form_of

CIFAR = dict(
    depth=16,
    width=1,
    dtype='float',
    image_size=224,  # of image files
    randomcrop_pad=4,
    epochs=200,
    epoch_step=[60, 120, 160],
    lr=0.1,
    schedule='step',
    warmup=0,
    lr_decay_ratio=0.2,
    batch_size=128,
    weight_decay=5e-4,
    label_smoothing=0,
    tta='none',
)

# What others change of it, laid over it in this order. A row applies to the runs that have all its
# words: a data set, a form of network (cifar or imagenet), a model, an optimizer, --recipe fast,
# --pretrained, --no_mirror, or bfloat16-instructions, if the machine has them.
CHANGES = {
    'FashionMNIST': dict(epochs=60, epoch_step=[20, 40, 50], randomcrop_pad=0),
    'digits': dict(
        epochs=60,
        epoch_step=[30, 45, 55],
        lr=0.2,
        batch_size=64,
        weight_decay=5e-3,
        randomcrop_pad=0,
    ),
    'imagenet': dict(
        depth=18,
        epochs=100,
        epoch_step=[30, 60, 90],
        lr_decay_ratio=0.1,
        batch_size=256,
        weight_decay=1e-4,
        randomcrop_pad=0,
    ),
    'folder cifar': dict(image_size=32),
    'resnet cifar': dict(depth=20),
    'resnet-dirac cifar': dict(depth=20),
    'wrn imagenet': dict(depth=50, width=2),
    'fast': dict(
        epochs=30,
        epoch_step=[15, 23, 27],
        lr=0.2,
        schedule='linear',
        warmup='ramp:200',
        bn_init='shifted',
        tta='flip',
    ),
    'fast bfloat16-instructions': dict(dtype='bfloat16'),
    'fast resnet': dict(lr=0.1),
    'fast wrn': dict(lr=0.1),
    'fast FashionMNIST': dict(randomcrop_pad=2),
    'fast digits': dict(
        epochs=100,
        epoch_step=[50, 75, 90],
        lr=0.1,
        warmup='ramp:100',
        label_smoothing=0.1,
        randomcrop_pad=1,
        dtype='float',
        tta='none',
    ),
    'fast no_mirror': dict(tta='none'),
    'pretrained': dict(epochs=30, epoch_step=[15, 23, 27], lr=0.1, schedule='linear'),
    'pretrained imagenet': dict(batch_size=64),
    'rmsprop': dict(lr=0.01),
    'adadelta': dict(lr=1.0),
    'adagrad': dict(lr=0.1),
    'adamw': dict(lr=0.001),
}
FAST = ('FashionMNIST', 'digits', 'CIFAR10', 'folder')  # the data sets of --recipe fast


def recipe_for(options):
    """The recipe for the dataset, form, model, optim, recipe, pretrained and no_mirror in
    `options`."""
    words = {form_of(options), *(options[name] for name in ('dataset', 'model', 'optim', 'recipe'))}
    words.update(name for name in ('pretrained', 'no_mirror') if options.get(name))
    if has_bfloat16():
        words.add('bfloat16-instructions')
    recipe = dict(CIFAR)
    for row, changes in CHANGES.items():
        if set(row.split()) <= words:
            recipe.update(changes)
    return recipe


def changes_of(name):
    """The values of an option that recipes change, by the row that has it; '' for CIFAR."""
    return {
        row: changes[name] for row, changes in {'': CIFAR, **CHANGES}.items() if name in changes
    }
