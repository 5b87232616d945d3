"""Studies and logs that are refused in one line: what is in the file, the exit status, words that
the line has."""

import json
import os
from pathlib import Path

import pytest
from test_study import TINY

from lab.errors import UserError
from lab.runs.folder import log_lines
from lab.runs.log import read_log
from tools import plot
from tools.study.__main__ import main


def repeat(first, template):
    """YAML in which each line has nine aliases of the line before it."""
    names = 'abcdefghijkl'
    lines = [
        template.format(name=name, aliases=', '.join([f'*{before}'] * 9))
        for before, name in zip(names, names[1:])
    ]
    return '\n'.join([f'a: &a {first}', *lines])


LAUGHS = repeat('[ha, ha]', '{name}: &{name} [{aliases}]')
MERGES = repeat('{ha: 1}', '{name}: &{name} {{<<: [{aliases}]}}')
GRID = ', '.join(f'{name}: {[*range(1, 30)]}' for name in ('depth', 'warmup', 'epochs', 'holdout'))

# A change of the study TINY, (old, new), or a whole file.
STUDIES = [
    # what counted one training twice
    (('[1, 2]', '[1, 1]'), 1, 'seeds'),
    (('{model: resnet, depth: 8}', '{depth: 10, model: diracnet}'), 1, ['twice', '--depth 10']),
    (('{model: resnet, depth: 8}', '{model: diracnet, depth: 10, lr: 0.1}'), 1, 'twice'),
    (('{model: resnet, depth: 8}', '{model: diracnet, depth: "10"}'), 1, 'twice'),
    (('depth: 8', 'depth: [8, 8]'), 1, 'twice'),
    (('depth: 8', 'depth: 8, nthread: [0, 1]'), 1, ['same run', '--nthread 1']),
    (('depth: 8', 'depth: 8, warmup: [0, 1]'), 1, ['row of the table', '--warmup 1']),
    (('title: A try', 'title: A try\nkeep: [7]'), 1, ['keeps epoch 7']),
    (('title: A try', 'title:'), 1, ['title', 'empty']),
    (('depth: 8', 'lr: 1, depth: 8}\n  - {model: resnet-1, depth: 8'), 2, 'resnet-1'),
    (('depth: 8', 'depth: 8, seeds: [2, 2]'), 1, 'seeds'),
    # what was ignored
    (('title:', 'titel:'), 1, ['titel', 'title']),
    (('note:', 'notes:'), 1, ['notes', 'note']),
    (('seeds:', 'sedes: [3]\nseeds:'), 1, ['sedes', 'seeds']),
    (('lines:', 'line:'), 1, ['figure', 'line']),
    (('lines: model', 'lines: lr'), 1, ['figure', 'lr']),
    (('x: depth', 'x: epoch'), 1, 'figure'),
    (('x: depth, lines: model', 'signal: false'), 1, 'signal'),
    (('x: depth, lines: model', 'lines: model'), 1, 'figure'),
    (('depth: 8', 'dept: 8'), 2, ['dept', 'depth']),
    (('[model, depth]', '[model, dpeth]'), 1, ['dpeth', 'depth']),
    (('[model, depth]', '[model, test_acc]'), 1, 'test_acc'),
    (('[model, depth]', '[model, model]'), 1, 'table'),
    (('digits:', 'digit:'), 1, ['digit', 'digits']),
    (('depth: 8', 'depth: 8, seeds: [3]'), 1, 'seed 3'),
    (('depth: 8', 'depth: 8, depth: 14'), 1, 'depth'),
    (('lr: 0.1', 'lr: 0.1, lr: 0.2'), 1, 'lr'),
    (('lr: 0.1', 'lr: false'), 1, ['lr', 'False']),
    (('lr: 0.1', 'lr: []'), 2, 'lr'),
    (('depth: 8', 'depth: []'), 1, 'empty'),
    # options that a study sets itself
    (('width: 0.5', 'save: /tmp/mine'), 2, ['save', 'options']),
    (('width: 0.5', 'resume: auto'), 2, 'resume'),
    (('width: 0.5', 'evaluate: model.pt7'), 2, 'evaluate'),
    (('lr: 0.1', 'device: cpu'), 2, ['device', '--device']),
    (('depth: 8', 'depth: 8, seed: 3'), 2, ['seed', 'seeds']),
    (('lr: 0.1', 'dataset: CIFAR10'), 2, 'dataset'),
    # what could become another flag
    (('lr: 0.1', 'help: true'), 2, 'help'),
    (('lr: 0.1', 'lr: --help'), 1, '--help'),
    (('lr: 0.1', '"save=mine": true'), 2, 'save=mine'),
    (('lr: 0.1', 'dataroot: "a\\0b"'), 2, 'dataroot'),
    (('lr: 0.1', 'lr: {a: 1}'), 1, 'lr'),
    (('lr: 0.1', 'recompute: true, compile: true'), 2, ['--recompute', '--compile']),
    # other types
    (('seeds: [1, 2]', 'seeds: []'), 1, 'seeds'),
    (('seeds: [1, 2]', 'seeds: [one]'), 1, ['seeds', 'one']),
    (('seeds: [1, 2]', 'seeds: [true]'), 1, ['seeds', 'True']),
    (('seeds: [1, 2]', 'seeds: [18446744073709551616]'), 2, '18446744073709551616'),
    (('title: A try', 'title: [A, try]'), 1, 'title'),
    (('reported: 5.5', 'reported: [5.5]'), 1, 'reported'),
    (('title: A try', 'title: A try\nkeep: [0]'), 1, 'keep'),
    (('title: A try', 'title: !!python/object/apply:os.system [true]'), 1, 'python'),
    (('title: A try', 'title: 2020-13-45'), 1, 'month'),
    (('title: A try', 'title: !!timestamp x'), 1, 'tag'),
    (TINY.partition('runs:')[0] + 'runs: [abc, def]\ntable: [model]', 1, ['runs', 'object']),
    ('', 1, 'empty'),
    # what no memory could hold
    (LAUGHS, 1, 'characters'),
    (TINY + LAUGHS, 1, 'characters'),
    (TINY + MERGES, 1, 'characters'),
    ('a: &a [*a]', 1, 'characters'),
    ('[' * 20_000, 1, 'nested'),
    (TINY + '#' * 10**6, 1, 'characters'),
    (('{model: resnet, depth: 8}', f'{{{GRID}}}'), 1, 'runs'),
    (b'\x80\x81\xff' * 100, 1, 'byte'),
    (bytes(1000), 1, 'character'),
]


@pytest.mark.parametrize('content, status, words', STUDIES, ids=range(len(STUDIES)))
def test_studies(content, status, words, tmp_path, refused):
    if isinstance(content, tuple):
        assert content[0] in TINY
        content = TINY.replace(*content, 1)
    path = tmp_path / 'tiny.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [words] if isinstance(words, str) else words
    result = refused(status, ['tiny.yaml', *words], main, path, '--out', tmp_path / 'out')
    assert len(result.err) < 1500
    assert not (tmp_path / 'out').exists()


def test_aliases_are_allowed(tmp_path, refused):
    """It is refused only because it has no finished runs."""
    text = TINY.replace('lr: 0.1', 'lr: &rate 0.1').replace('depth: 8', 'depth: 8, beta: *rate')
    (tmp_path / 'tiny.yaml').write_text(text.replace('model: resnet', 'model: resnet-dirac'))
    refused(1, 'finished', main, tmp_path / 'tiny.yaml', '--table', '--out', tmp_path / 'out')


def test_command_lines(tmp_path, refused):
    path = tmp_path / 'tiny.yaml'
    path.write_text(TINY)
    refused(2, ['--seeds', '1,1'], main, path, '--seeds', '1,1')
    refused(1, 'regular', main, tmp_path)
    os.mkfifo(tmp_path / 'fifo.yaml')
    refused(1, ['fifo.yaml', 'regular'], main, tmp_path / 'fifo.yaml')
    refused(1, 'out', main, path, '--out', path / 'out')


# --- logs ------------------------------------------------------------------------------------

LINE = {
    'epoch': 1,
    'train_loss': 0.5,
    'train_acc': 80.0,
    'test_loss': 0.6,
    'test_acc': 70.0,
    'n_parameters': 10,
}


def line_with(**changes):
    return 'json_stats: ' + json.dumps({**LINE, **changes})


def line_without(name):
    return 'json_stats: ' + json.dumps({key: LINE[key] for key in LINE if key != name})


GOOD = line_with()
LOGS = [
    ('json_stats: [1, 2]', 'dict'),
    (f'{GOOD}\njson_stats: [1, 2]', 'line 2'),
    ('json_stats: 5', 'dict'),
    (f'json_stats: {"[" * 50_000}', 'json_stats'),
    (line_with(test_acc=float('nan')), ['test_acc', 'nan']),
    (line_with(train_loss=float('inf')), ['train_loss', 'inf']),
    (f'{GOOD}\n{line_with(test_loss="low")}', ['line 2', 'test_loss', 'low']),
    (line_with(test_acc=170), ['test_acc', '170']),
    (line_with(test_acc=[]), 'test_acc'),
    (line_with(test_acc=[[1]]), 'test_acc'),
    (line_with(train_loss=None), 'train_loss'),
    (line_with(train_loss=10**400), 'train_loss'),
    (line_with(epoch=-1), 'epoch'),
    (line_with(epoch='one'), 'epoch'),
    (line_with(epoch=True), 'epoch'),
    (line_with(n_parameters='many'), 'n_parameters'),
    (line_with(train_time='long'), 'train_time'),
    (line_without('train_acc'), 'train_acc'),
    (line_without('epoch'), 'epoch'),
    ('', 'json_stats'),
    (b'json_stats: \xff\xfe', 'text'),
    (Path('/bin/true').read_bytes(), 'text'),
]


@pytest.mark.parametrize('content, words', LOGS, ids=range(len(LOGS)))
def test_logs(content, words, tmp_path, refused):
    path = tmp_path / 'log.txt'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [words] if isinstance(words, str) else words
    out = ('--out', tmp_path / 'curves.png')
    for options in ((), ('--median',)):
        refused(1, ['log.txt', *words], plot.main, tmp_path, *out, *options)
    assert [file.name for file in tmp_path.iterdir()] == ['log.txt']


def test_truncated_line(tmp_path):
    (tmp_path / 'log.txt').write_text(f'{GOOD}\n{GOOD[:40]}')
    assert read_log(tmp_path) == [LINE]


def test_log_that_is_not_a_file(tmp_path, refused):
    os.mkfifo(tmp_path / 'log.txt')
    refused(1, 'regular', plot.main, tmp_path, '--out', tmp_path / 'curves.png')


def test_log_of_a_resumed_run(tmp_path):
    """A checkpoint of the original code resumes with the log next to it."""

    class Resumed:
        is_run, log, epoch, path = True, None, 1, tmp_path / 'model.pt7'

    lines = ['options', GOOD, line_with(epoch=2)]
    (tmp_path / 'log.txt').write_text('\n'.join(lines))
    assert log_lines(Resumed) == lines[:2]
    (tmp_path / 'log.txt').write_text('json_stats: [1, 2]')
    with pytest.raises(UserError, match='log.txt'):
        log_lines(Resumed)


@pytest.mark.parametrize('out', ['', '.', '/', 'x.pdf'])
def test_names_of_figures(out, tmp_path, refused):
    (tmp_path / 'log.txt').write_text(GOOD)
    refused(2, '--out', plot.main, tmp_path, '--out', out)


@pytest.mark.parametrize('name', ['_run', '$x_$', '$\\frac$', 'a\nb', 'a\x1b[31m'])
def test_names_of_runs(name, tmp_path, call):
    """Labels are written as they are, on one line."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'log.txt').write_text(GOOD)
    result = call(plot.main, folder, '--out', tmp_path / 'curves.png', '--median')
    assert result.status == 0, result.err
