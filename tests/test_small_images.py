"""--form cifar: small images in files, which train as those of CIFAR do."""

import json

import cv2
import numpy as np
import pytest
import torch
from data_helpers import epoch_of
from PIL import Image

import train
from conftest import read_log, same, without_times
from lab.data import datasets
from lab.data.batches import MemoryBatches
from lab.models import registry
from lab.runs import checkpoint


@pytest.fixture
def small_files(tmp_path, photographs):
    """A folder of 120 training and 30 test images of three classes, PNGs of 16 x 16."""
    root = tmp_path / 'tiny photos'
    random = np.random.default_rng(1)
    for part, n in (('train', 40), ('val', 10)):
        for c, label in enumerate(('dark', 'flower', 'temple')):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                top, left = random.integers(0, 380), random.integers(0, 590)
                crop = photographs[c % 2][top : top + 16, left : left + 16, ::-1] // (
                    3 if not c else 1
                )
                cv2.imwrite(str(root / part / label / f'{i:02}.png'), crop)
    return root


def run_small(root, save, *options):
    """A short training; later options replace earlier ones."""
    command = '--dataset folder --form cifar --image_size 16 --depth 10 --width 0.25 --epochs 2 '
    command += '--batch_size 16'
    return [*command.split(), '--dataroot', str(root), '--save', str(save), *map(str, options)]


def pixels_of(root, part):
    """All images (N, H, W, 3) and their classes, read by Pillow."""
    files = sorted((root / part).glob('*/*'))
    labels = sorted({file.parent.name for file in files})
    images = np.stack([np.asarray(Image.open(file).convert('RGB')) for file in files])
    return images, [labels.index(file.parent.name) for file in files]


def test_batches_are_those_of_the_same_images_in_memory(small_files):
    data = datasets.load('folder', small_files, form='cifar', image_size=16)
    assert data.name == 'tiny photos' and data.classes == ('dark', 'flower', 'temple')
    for part, (images, targets) in (('train', data.train), ('val', data.test)):
        expected, classes = pixels_of(small_files, part)
        assert np.array_equal(images, expected) and targets.tolist() == classes
    pixels = pixels_of(small_files, 'train')[0].reshape(-1, 3).astype(float)
    known = data.preprocessing
    assert np.allclose(known.mean, pixels.mean(0), rtol=1e-12)
    assert np.allclose(known.std, pixels.std(0), rtol=1e-9)

    files = data.batches(True, batch_size=16, seed=3, pad=4)
    choices = {'train': True, 'mirrored': True, 'device': 'cpu', 'seed': 3, 'shard': (0, 1)}
    memory = MemoryBatches(*data.train, known, 16, pad=4, **choices)
    for ours, theirs in zip(epoch_of(files, 5), epoch_of(memory, 5)):
        assert torch.equal(ours, theirs)


def test_images_of_other_sizes_and_colors(tmp_path):
    random = np.random.default_rng(0)
    colors = Image.fromarray(random.integers(0, 256, (60, 40, 3)).astype(np.uint8))
    for label in 'ab':
        (tmp_path / 'train' / label).mkdir(parents=True)
        colors.convert('L').save(tmp_path / 'train' / label / 'gray.png')
        colors.resize((300, 200)).save(tmp_path / 'train' / label / 'large.bmp')
        colors.resize((5, 9)).save(tmp_path / 'train' / label / 'tiny.gif')
    data = datasets.load('folder', tmp_path, form='cifar', image_size=20)
    images, targets = data.train
    assert images.shape == (6, 20, 20, 3) and targets.tolist() == [0] * 3 + [1] * 3
    assert (images[0] == images[0][..., :1]).all()
    whole = np.asarray(colors.resize((300, 200)))
    center = cv2.resize(whole, (30, 20), interpolation=cv2.INTER_AREA)[:, 5:25]
    assert np.array_equal(images[1], center)


@pytest.mark.parametrize('model', registry.MODELS)
def test_models(model, small_files, tmp_path):
    depth = 8 if model.startswith('resnet') else 10
    options = ('--model', model, '--depth', depth, '--epochs', 1)
    train.main(run_small(small_files, tmp_path / 'run', *options))
    network = checkpoint.load(tmp_path / 'run').network
    assert (network['form'], network['dataset']) == ('cifar', 'folder')
    assert (network['depth'], network['num_classes']) == (depth, 3)


@pytest.mark.parametrize(
    'options',
    [
        ['--holdout', '20%', '--per_class', '20', '--cutout', '4', '--preprocess', 'zca'],
        ['--recipe', 'fast', '--dtype', 'float', '--warmup', '0'],
    ],
)
def test_stopped_run_resumes_to_the_bit(options, small_files, tmp_path, stop_at):
    command = run_small(small_files, tmp_path / 'whole', *options)
    train.main(command)
    stop_at(6)
    with pytest.raises(SystemExit):
        train.main([*command, '--save', str(tmp_path / 'cut')])
    train.main(['--resume', str(tmp_path / 'cut')])
    assert same(tmp_path / 'whole', tmp_path / 'cut')
    assert without_times(tmp_path / 'whole') == without_times(tmp_path / 'cut')


def test_resumes_with_the_statistics_that_it_had(small_files, tmp_path):
    """Although images were added meanwhile."""
    train.main(run_small(small_files, tmp_path / 'run'))
    before = checkpoint.load(tmp_path / 'run').preprocessing
    Image.new('RGB', (16, 16), 'white').save(small_files / 'train' / 'dark' / 'white.png')
    train.main(['--resume', str(tmp_path / 'run'), '--epochs', '3'])
    assert checkpoint.load(tmp_path / 'run').preprocessing == before


def test_programs_that_read_the_run(small_files, tmp_path, call, monkeypatch):
    from tools import export, predict

    monkeypatch.chdir(tmp_path)
    command = run_small('tiny photos', 'unused', '--epochs', 8, '--width', 1)
    at = command.index('--save')
    result = call(train.main, *command[:at], *command[at + 2 :])
    assert result.status == 0 and 'on tiny photos, 120 training and 30 test' in result.out
    [run] = (tmp_path / 'logs').iterdir()
    assert run.name.startswith('tiny photos-diracnet-10-1-')
    stats = read_log(run)[-1]
    assert stats['train_images_per_second'] > 0

    # What is predicted for the files is what was tested in memory.
    out = call(predict.main, run, small_files / 'val', '--json').out.splitlines()
    lines = [json.loads(line) for line in out]
    right = [line['classes'][0] == line['image'].split('/')[-2] for line in lines]
    assert len(right) == 30 and 100 * np.mean(right) == pytest.approx(stats['test_acc'])
    result = call(export.main, run, 'net.pth')
    assert result.status == 0 and '30 test images' in result.out
    content = torch.load('net.pth', weights_only=True)
    assert content['network']['form'] == 'cifar' and content['preprocessing']['image_size'] == 16


# --- broken files -----------------------------------------------------------------------------


def test_broken_files_are_left_out_named_and_counted(small_files, tmp_path, call):
    folder = small_files / 'train' / 'flower'
    for i in range(100):
        (folder / f'copy{i}.png').write_bytes((folder / '00.png').read_bytes())
    bad = folder / '05.png'
    bad.write_bytes(bad.read_bytes()[:50])
    dangling = folder / 'dangling.png'
    dangling.symlink_to('nowhere')
    (folder / 'link.png').symlink_to('01.png')
    result = call(train.main, *run_small(small_files, tmp_path / 'run'))
    assert result.status == 0
    assert [result.out.count(f'{file} ') for file in (bad, dangling)] == [1, 1]
    assert '220 training' in result.out
    first, second = read_log(tmp_path / 'run')
    assert (first['train_broken'], first['broken_images']) == (2, [str(bad), str(dangling)])
    assert (second['train_broken'], second['broken_images']) == (2, [])


def test_many_broken_files_end_the_run_before_it_trains(small_files, tmp_path, refused):
    bad = small_files / 'val' / 'flower' / '05.png'
    bad.write_text('not an image')
    words = ['1 of 30', bad, 'start again']
    result = refused(1, words, train.main, *run_small(small_files, tmp_path / 'run'))
    assert f'broken image: {bad} is not an image' in result.out
    for file in bad.parent.iterdir():
        file.write_text('not an image')
    words = [small_files / 'val', 'flower']
    refused(1, words, train.main, *run_small(small_files, tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_images_that_do_not_fit_into_memory(small_files, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(datasets, 'total_memory', lambda: 10**5)  # 150 x 16 x 16 x 3 bytes are more
    words = ['150 images', '0.0 GB', '16 x 16']
    refused(1, words, train.main, *run_small(small_files, tmp_path / 'run'))
