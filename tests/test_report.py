"""tools.report: a page that stands alone and says what the run says."""

import base64
import html
import json
import re

import cv2
import numpy as np
import pytest
import torch

import train
from diracnet import fold
from lab.models import registry
from lab.runs import checkpoint
from tools.report.__main__ import main, metadata

HEADINGS = {
    'Training',
    'Images',
    'Confusion',
    'Accuracy of each class',
    'Surest mistakes',
    'First filters',
    'Scales of the Dirac weights',
    'Signal over depth',
    'Options',
}


class Page:
    """Headings, metadata and pictures of a report, which needs nothing else."""

    def __init__(self, path):
        text = path.read_text()
        assert len(text) < 3e6 and not re.search('<(script|link|iframe)|href=|src="(?!data:)', text)
        self.headings = set(re.findall('<h2>(.*?)</h2>', text))
        self.metadata = dict(re.findall('<tr><th>(.*?)</th><td>(.*?)</td>', text))
        images = re.findall('<img src="data:image/png;base64,(.*?)" alt="(.*?)"', text)
        self.classes = [html.unescape(name) for name in re.findall('<tr><th title="(.*?)"', text)]
        self.pictures = {}
        for content, alt in images:
            png = np.frombuffer(base64.b64decode(content), np.uint8)
            self.pictures[alt] = cv2.imdecode(png, cv2.IMREAD_COLOR)


def make(call, tmp_path, network, *options):
    """The Page about a network, and what was printed."""
    out = tmp_path / 'new' / 'report.html'
    result = call(main, network, '--out', out, *options)
    assert result.status == 0, result
    return Page(out), result


def test_a_run(digits_run, tmp_path, call):
    page, result = make(call, tmp_path, digits_run)
    assert page.headings == HEADINGS - {'Images'} and result.err == ''
    evaluated = call(train.main, '--evaluate', digits_run).out
    accuracy = json.loads(evaluated.split('json_stats: ')[1])['test_acc']
    assert page.metadata['test accuracy'] == f'{accuracy:.2f} % of 360 test images'
    assert (
        page.metadata['parameters'] == '173,114' and page.metadata['<code>--depth</code>'] == '16'
    )
    assert 'train.py' in page.metadata['command'] and {'commit', 'versions'} <= page.metadata.keys()
    mistakes = [alt for alt in page.pictures if 'truly' in alt]
    assert 1 <= len(mistakes) <= min(12, round(360 * (1 - accuracy / 100)))
    shares = [float(re.search(r'\((.*) %\)', alt)[1]) for alt in mistakes]
    assert shares == sorted(shares, reverse=True)
    for alt in mistakes:
        predicted, true = re.fullmatch(r'(\d) \(.*\), truly (\d)', alt).groups()
        assert predicted != true
        assert page.pictures[alt].shape == (224, 448, 3)
    for alt in HEADINGS & set(page.pictures):  # no picture is empty
        assert page.pictures[alt].std() > 5


def test_files_without_a_run(digits_run, tmp_path, call):
    torch.save(fold(checkpoint.load(digits_run).params), tmp_path / 'folded.pth')
    page, _ = make(call, tmp_path, tmp_path / 'folded.pth', '--dataset', 'digits')
    absent = {'Scales of the Dirac weights', 'Signal over depth', 'Options', 'Images'}
    assert page.headings == HEADINGS - absent and 'command' not in page.metadata
    for options in ((), ('--dataset', 'SVHN')):  # which data set, or another one
        page, result = make(call, tmp_path, tmp_path / 'folded.pth', *options)
        assert 'Images' in page.headings and 'test accuracy' not in page.metadata
        assert '--dataset' in result.err


def test_a_bare_state_dict_of_small_images(image_folder, tmp_path, call):
    """Its images are normalized as the training images of their folder."""
    options = ('--dataset', 'folder', '--dataroot', image_folder)
    run = ('--form', 'cifar', '--depth', 10, '--epochs', 1, '--batch_size', 4)
    assert call(train.main, *options, *run, '--save', tmp_path / 'run').status == 0
    trained = checkpoint.load(tmp_path / 'run')
    torch.save(trained.params, tmp_path / 'bare.pth')
    pages = [make(call, tmp_path, tmp_path / name, *options)[0] for name in ('run', 'bare.pth')]
    accuracies = [page.metadata['test accuracy'] for page in pages]
    assert accuracies[0] == accuracies[1] and accuracies[0].endswith('of 6 test images')
    surest = [{alt for alt in page.pictures if 'truly' in alt} for page in pages]
    assert surest[0] == surest[1] != set()


@pytest.mark.parametrize('model', ['diracnet-v1', 'repvgg', 'resnet-dirac'])
def test_other_models(model, tmp_path, call):
    depth = 8 if 'resnet' in model else 10
    options = ('--dataset', 'digits', '--model', model, '--depth', depth, '--width', 0.5)
    call(train.main, *options, '--epochs', 1, '--per_class', 20, '--save', tmp_path / 'run')
    page, _ = make(call, tmp_path, tmp_path / 'run')
    expected = HEADINGS - {'Images'}
    if 'dirac' not in model:
        expected -= {'Scales of the Dirac weights'}
    if model not in registry.CHAINS + registry.VERSION_1:
        expected -= {'Signal over depth'}
    assert page.headings == expected
    [width] = {p.shape[1] for alt, p in page.pictures.items() if 'truly' in alt}
    assert width == (448 if model in registry.FOLDS else 224)  # with a map, or without


def test_without_the_data(digits_run, tmp_path, call):
    content = torch.load(digits_run / 'model.pt7', weights_only=True)
    content['network']['dataset'] = content['options']['dataset'] = 'FashionMNIST'
    content['preprocessing']['image_size'] = content['preprocessing']['resize'] = 28
    (tmp_path / 'run').mkdir()
    torch.save(content, tmp_path / 'run' / 'model.pt7')
    page, result = make(call, tmp_path, tmp_path / 'run', '--dataroot', tmp_path)
    assert 'Images' in page.headings and 'Confusion' not in page.headings
    assert {'Training', 'First filters', 'Scales of the Dirac weights'} <= page.headings
    assert str(tmp_path) in result.err
    assert 'from the log' in page.metadata['test accuracy']


def test_a_folder_of_images_with_hostile_names(photographs, tmp_path, call):
    names = ['$x_1$', '<script>alert(1)</script>'.replace('/', ' '), '飞机']
    random = np.random.default_rng(0)
    for part in ('train', 'val'):
        for name, photograph in zip(names, [*photographs, photographs[0]]):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                y, x = random.integers(0, 200, 2)
                cv2.imwrite(str(folder / f'{i}.png'), photograph[y : y + 90, x : x + 90])
    options = ('--dataset', 'folder', '--dataroot', tmp_path, '--image_size', 64, '--width', 0.25)
    options += ('--epochs', 1, '--batch_size', 4, '--save', tmp_path / 'run')
    assert call(train.main, *options).status == 0
    (tmp_path / 'val' / names[0] / 'broken.png').write_bytes(b'no image')
    result = call(main, tmp_path / 'run')
    page = Page(tmp_path / 'run' / 'report.html')
    assert page.metadata['test accuracy'].endswith('of 12 test images')
    assert page.classes[:3] == names and sorted(page.classes[3:]) == names  # confusion, accuracies
    assert len(result.err.splitlines()) == 1 and 'broken.png' in result.err  # none about glyphs


@pytest.mark.parametrize(
    'options, original, resumed',
    [
        (['--lr 0.1', '--resume RUN', '--resume RUN --epochs 9'], '--lr 0.1', 2),
        (['--lr 0.1 --resume auto', '--lr 0.1 --resume auto'], '--lr 0.1 --resume auto', 1),
        (['--lr 0.2', '--lr 0.1', '--resume RUN'], '--lr 0.1', 1),  # begun anew
        (['--lr 0.1'], '--lr 0.1', 0),
    ],
)
def test_the_command_of_a_resumed_run(options, original, resumed, digits_run):
    """The page has the command that began the run, and the last one."""
    starts = [{'command': f'python train.py {text}'} for text in options]
    rows = metadata(checkpoint.load(digits_run), starts, [], None)
    assert rows['command'] == f'python train.py {original}'
    assert rows.get('resumed', '0').startswith(str(resumed))
    assert resumed == 0 or options[-1] in rows['resumed']


def test_train_writes_it(tmp_path, call, refused):
    options = ('--dataset', 'digits', '--depth', 10, '--epochs', 1, '--per_class', 10, '--report')
    assert call(train.main, *options, '--save', tmp_path / 'run').status == 0
    assert Page(tmp_path / 'run' / 'report.html').headings == HEADINGS - {'Images'}
    (tmp_path / 'two' / 'report.html').mkdir(parents=True)
    refused(2, 'report.html', train.main, *options, '--save', tmp_path / 'two')


def test_what_cannot_be_written_or_read(digits_run, tmp_path, refused):
    (tmp_path / 'file').write_text('')
    out = tmp_path / 'file' / 'report.html'
    refused(1, out, main, digits_run, '--out', out)
    refused(2, '--out', main, 'digits')  # weights/ is no run's folder
    refused(1, tmp_path / 'none', main, tmp_path / 'none', '--out', tmp_path / 'report.html')
