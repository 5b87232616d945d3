"""Benchmark of the input pipelines: their speed against torchvision's, and their memory."""

import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from lab.data import datasets
from tools.benchmark.children import cifar_batches
from tools.benchmark.made_data import write_cifar, write_photographs
from tools.benchmark.pipelines import our_batches, per_sample_batches, torchvision_folder_batches
from tools.benchmark.processes import measure_in_child
from tools.benchmark.report import Report, spread
from tools.benchmark.timing import alternate, ratio_of_medians

COLUMNS = ['measurement', 'ours', 'torchvision', 'ratio', 'goal']
LEGEND = (
    'Speeds are in images per second per core: median (quartiles) of whole passes. '
    'The ratio is our median divided by that of torchvision.'
)
SMALL_IMAGES = 12_800


def bench_data(args):
    report = Report('Input pipelines', COLUMNS, LEGEND)
    # train.py sets it for image files; here it holds for both pipelines.
    os.environ['THP_MEM_ALLOC_ENABLE'] = '1'
    torch.set_num_threads(1)
    compare_small_images(report, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_photographs(folder, args.images)
        compare_image_files(report, folder, args)
        measure_folder_memory(report, folder)
        measure_cifar_memory(report, folder / 'cifar')
        compare_small_files(report, folder, args)
    return report


def compare_small_images(report, rounds):
    # torchvision's pipeline keeps two cores busy with its workers; ours runs on one thread.
    cores = {'ours': 1, 'torchvision': 2}
    compare_passes(
        report,
        'small images, 32 x 32 x 3, batch 128, training',
        {
            'ours': our_batches(SMALL_IMAGES),
            'torchvision': per_sample_batches(SMALL_IMAGES),
        },
        SMALL_IMAGES,
        cores,
        'at least 25',
        rounds,
    )


def compare_image_files(report, folder, args):
    source = datasets.load('folder', folder)
    for part, use, goal in (('train', 'training', 2), ('val', 'evaluation', 1.3)):
        compare_passes(
            report,
            f'JPEG, 500 x 375 to 224, batch 64, {use}',
            {
                'ours': source.batches(part == 'train', batch_size=64, workers=2),
                'torchvision': torchvision_folder_batches(folder, part),
            },
            args.images,
            {'ours': 2, 'torchvision': 2},
            f'at least {goal}',
            args.rounds,
        )


def compare_passes(report, label, pipelines, n, cores, goal, rounds):
    """Compare the speed of whole passes over n images; `cores` are those that each may use."""
    passes = {name: partial(consume, batches) for name, batches in pipelines.items()}
    rates = {
        name: [n / seconds / cores[name] for seconds in samples]
        for name, samples in alternate(passes, rounds).items()
    }
    report.samples[label] = rates
    ours, theirs = rates['ours'], rates['torchvision']
    ratio = statistics.median(ours) / statistics.median(theirs)
    report.add(label, spread(ours), spread(theirs), f'{ratio:.1f}', goal)


def consume(batches):
    for _ in batches:
        pass


def measure_folder_memory(report, folder):
    sizes = measure_in_child('folder_loading', folder)
    report.samples['memory of the folder loader'] = sizes
    early, late = statistics.median(sizes[2:7]), statistics.median(sizes[7:])
    report.add(
        'memory of the folder loader, 2 workers, MB: median after epochs 3 to 7, 8 to 12',
        f'{early:.0f}, {late:.0f}',
        '',
        f'{late - early:+.0f} MB',
        'no growth',
    )


def compare_small_files(report, folder, args):
    """Small images in files, read into memory once, against as many in CIFAR's own files."""
    n = 30 * args.images  # 30,720 by default, and as many to test on
    write_photographs(folder / 'files', n, (32, 32), quality=75)
    read = partial(datasets.load, 'folder', folder / 'files', form='cifar')
    label = f'reading {2 * n:,} JPEGs of 32 x 32'
    rates = [2 * n / seconds for seconds in alternate({'read': read}, args.rounds)['read']]
    report.samples[label] = rates
    report.add(label, spread(rates), '', '', '3000 or more')

    sums = json.dumps(write_cifar(folder / 'as many', n // 5))
    batches = {
        'files': read().batches(True, batch_size=128, pad=4),
        'CIFAR': cifar_batches(folder / 'as many', sums),
    }
    passes = {name: partial(consume, own) for name, own in batches.items()}
    rates = {
        name: [n / seconds for seconds in samples]
        for name, samples in alternate(passes, 20 * args.rounds).items()
    }
    label = (
        "small images, 32 x 32 x 3, batch 128, from JPEGs; instead of torchvision: CIFAR's files"
    )
    report.samples[label] = rates
    ratio = '{:.3f} ({:.3f} to {:.3f})'.format(*ratio_of_medians(rates['files'], rates['CIFAR']))
    report.add(label, spread(rates['files']), spread(rates['CIFAR']), ratio, 'at least 0.98')


def measure_cifar_memory(report, root):
    sums = json.dumps(write_cifar(root))
    bare = measure_in_child('torch_alone')
    for label, child, goal in (
        ('CIFAR-10, two epochs of batches', ('cifar_loading', root, sums), 'under 250'),
        ('CIFAR-10, training DiracNet-16-1, batch 128', ('cifar_training', root, sums), ''),
        ('the same training on one random batch, without CIFAR-10', ('random_training',), ''),
    ):
        samples = [measure_in_child(*child) - bare for _ in range(3)]
        report.samples[label] = samples
        measurement = f'{label}: MB above a process that only imports torch ({bare:.0f} MB)'
        report.add(measurement, f'{statistics.median(samples):.0f}', '', '', goal)
