"""tools.report: a page that stands alone and says what the run says."""

import base64
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

import train
from conftest import python
from diracnet import fold
from lab.models import registry
from lab.runs import checkpoint
from tools.report.__main__ import main


class Page(HTMLParser):
    """Texts of the cells and headings of a page, and its pictures."""

    def __init__(self, path):
        super().__init__()
        self.size = path.stat().st_size
        self.tags, self.addresses, self.texts, self.pictures = [], [], [], {}
        self.feed(path.read_text())
        self.facts = dict(re.findall(r'<tr><th>(.*?)</th><td>(.*?)</td>', path.read_text()))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ('src', 'href') if name in attributes]
        if tag == 'img':
            content = base64.b64decode(attributes['src'].removeprefix('data:image/png;base64,'))
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            self.pictures[attributes['alt']] = pixels

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def headings(self):
        return {text for text in self.texts if text in HEADINGS}


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


def make(call, tmp_path, network, *options):
    """The Page about a network, and what was printed."""
    out = tmp_path / 'new' / 'report.html'
    result = call(main, network, '--out', out, *options)
    assert result.status == 0, result
    page = Page(out)
    assert page.size < 3e6 and not {'script', 'link', 'iframe'} & set(page.tags)
    assert all(address.startswith('data:') for address in page.addresses)
    return page, result


def test_a_run(digits_run, tmp_path, call):
    page, result = make(call, tmp_path, digits_run)
    assert page.headings == HEADINGS - {'Images'} and result.err == ''
    evaluated = call(train.main, '--evaluate', digits_run).out
    accuracy = json.loads(evaluated.split('json_stats: ')[1])['test_acc']
    assert page.facts['test accuracy'] == f'{accuracy:.2f} % of 360 test images'
    assert page.facts['parameters'] == '173,114'
    assert 'train.py' in page.facts['command'] and page.facts['<code>--depth</code>'] == '16'
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
    found = checkpoint.load(digits_run)
    torch.save(fold(found.params), tmp_path / 'folded.pth')
    page, _ = make(call, tmp_path, tmp_path / 'folded.pth')
    absent = {'Scales of the Dirac weights', 'Signal over depth', 'Options', 'Images'}
    assert page.headings == HEADINGS - absent and 'command' not in page.facts


@pytest.mark.parametrize('model', [name for name in registry.MODELS if name != 'diracnet'])
def test_other_models(model, tmp_path, call):
    depth = {'resnet': 8, 'resnet-dirac': 8}.get(model, 10)
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
    assert width == (448 if model in registry.FOLDABLE else 224)  # with a map, or without


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
    assert 'from the log' in page.facts['test accuracy']


def test_a_folder_of_images_with_hostile_names(photographs, tmp_path, call):
    names = ['<script>alert(1)</script>'.replace('/', ' '), '$x_1$']
    random = np.random.default_rng(0)
    for part in ('train', 'val'):
        for name, photograph in zip(names, photographs):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                y, x = random.integers(0, 200, 2)
                cv2.imwrite(str(folder / f'{i}.png'), photograph[y : y + 90, x : x + 90])
    options = ('--dataset', 'folder', '--dataroot', tmp_path, '--image_size', 64, '--width', 0.25)
    result = call(
        train.main, *options, '--epochs', 1, '--batch_size', 4, '--save', tmp_path / 'run'
    )
    assert result.status == 0, result
    (tmp_path / 'val' / names[0] / 'broken.png').write_bytes(b'no image')
    page, result = make(call, tmp_path, tmp_path / 'run')
    assert page.facts['test accuracy'].endswith('of 8 test images')
    assert 'broken.png' in result.err


def test_train_writes_it(tmp_path, call, digits_run, refused):
    options = ('--dataset', 'digits', '--depth', 10, '--epochs', 1, '--per_class', 10)
    result = call(train.main, *options, '--report', '--save', tmp_path / 'run')
    assert result.status == 0, result
    assert Page(tmp_path / 'run' / 'report.html').headings == HEADINGS - {'Images'}
    (tmp_path / 'two').mkdir()
    (tmp_path / 'two' / 'report.html').mkdir()
    again = ('--save', tmp_path / 'two', '--report')
    refused(2, ['report.html'], train.main, *options, *again)


def test_what_cannot_be_written_or_read(digits_run, tmp_path):
    (tmp_path / 'file').write_text('')
    for network, out, word in (
        (digits_run, tmp_path / 'file' / 'report.html', 'file'),
        (tmp_path / 'none', tmp_path / 'report.html', 'none'),
    ):
        result = python('-m', 'tools.report', network, '--out', out)
        assert result.status == 1 and result.err.count('\n') == 1 and word in result.err
