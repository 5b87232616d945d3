"""Curves of runs and graphs of networks."""

import json
from statistics import median

import pytest

from conftest import ROOT
from lab.runs.log import read_log
from tools import plot

SEEDS = [ROOT / 'logs' / 'reference' / f'digits-diracnet-16-1-seed{seed}' for seed in range(1, 6)]
LINE = {'epoch': 1, 'train_loss': 0.5, 'train_acc': 80.0, 'test_loss': 0.6, 'test_acc': 70.0}
GOOD = f'json_stats: {json.dumps(LINE)}'


@pytest.fixture
def original_run(tmp_path):
    """The folder of a run of the original code: its log has other lines too, may hold lists, and
    may end within a line."""
    lines = [{**LINE, 'test_acc': [40.0 + epoch], 'epoch': epoch} for epoch in range(1, 6)]
    texts = ['parsed options: {}', *(f'json_stats: {json.dumps(line)}' for line in lines)]
    folder = tmp_path / 'original'
    folder.mkdir()
    (folder / 'log.txt').write_text('\n'.join([*texts, 'json_stats: {"trai']))
    return folder


def test_logs_of_the_original_code(original_run):
    log = read_log(original_run / 'log.txt')
    assert [line['test_acc'] for line in log] == [41.0, 42.0, 43.0, 44.0, 45.0]


@pytest.mark.parametrize('options', [(), ('--median',)])
def test_curves(digits_run, original_run, tmp_path, call, options):
    out = tmp_path / 'curves.png'
    result = call(plot.main, digits_run, original_run, '--out', out, *options)
    assert result.status == 0, result.err
    assert result.out.split() == [str(out), str(out.with_suffix('.svg'))]
    assert out.read_bytes()[:4] == b'\x89PNG'
    assert '<svg' in out.with_suffix('.svg').read_text()


def test_runs_are_grouped_by_the_options_in_which_they_differ():
    line = {'model': 'diracnet', 'lr': 0.1, 'epochs': 2, 'epoch': 2, 'test_acc': 90.0}
    logs = {
        'a': [{**line, 'seed': 1, 'save': 'a', 'device': 'cpu'}],
        'b': [{**line, 'seed': 2, 'save': 'b', 'test_acc': 80.0, 'epoch': 1}],
        'c': [{**line, 'seed': 1, 'lr': 0.2}],
        'd': [{**line, 'seed': 1, 'epochs': 3}],
    }
    assert plot.group_by_options(logs) == {
        'lr 0.1, epochs 2 (n = 2)': [logs['a'], logs['b']],
        'lr 0.2, epochs 2 (n = 1)': [logs['c']],
        'lr 0.1, epochs 3 (n = 1)': [logs['d']],
    }
    assert list(plot.group_by_options({'logs/a': logs['a']})) == ['a (n = 1)']


def test_epochs_are_aligned():
    """A log may begin later than others, or have an epoch again."""
    logs = [
        [{'epoch': epoch, 'x': x} for epoch, x in log]
        for log in ([(1, 5), (2, 6), (3, 7)], [(2, 8), (3, 0), (3, 9)])
    ]
    values = plot.by_epoch(logs, lambda line: line['x'])
    assert values == {1: [5], 2: [6, 8], 3: [7, 9]}
    assert list(map(median, values.values())) == [5, 7, 8]


def test_seconds_are_those_of_the_run():
    """They count from its beginning, and an epoch that was repeated counts once."""
    logs = [
        [
            {'epoch': epoch, 'train_time': seconds, 'test_time': 1, 'test_acc': 100 - epoch}
            for epoch, seconds in log
        ]
        for log in ([(1, 9), (2, 19)], [(1, 11), (2, 99), (2, 23)], [(1, 10), (2, 20)])
    ]
    figure = plot.draw_curves([('net', logs)], errors_only=True, x='seconds')
    [line] = figure.axes[0].lines
    assert list(line.get_xdata()) == [11, 32] and list(line.get_ydata()) == [1, 2]


def test_graph(digits_run, tmp_path, call):
    out = tmp_path / 'graph.svg'
    assert call(plot.main, digits_run, '--graph', '--out', out).status == 0
    svg = out.read_text()
    for text in ('images', 'logits', 'Dirac conv2d'):
        assert text in svg  # as a comment: letters are drawn as paths


@pytest.mark.parametrize('name', ['_run', '$x_$', 'a\nb', '\U00012000\U00012001'])
def test_labels_are_written_as_they_are(name, tmp_path, call):
    """Cuneiform, for which matplotlib has no font, costs one line."""
    (tmp_path / name).mkdir()
    (tmp_path / name / 'log.txt').write_text(GOOD)
    result = call(plot.main, tmp_path / name, '--out', tmp_path / 'curves.png', '--median')
    assert result.status == 0, result.err
    assert len(result.err.splitlines()) == (name > '\U00010000')


@pytest.mark.parametrize(
    'content, word',
    [
        (b'', 'json_stats'),
        (b'json_stats: \xff\xfe', 'text'),
        (b'json_stats: [1, 2]', 'line 1'),
        (GOOD.replace('train_acc', 'train_error').encode(), 'train_acc'),
    ],
)
def test_logs_that_are_none(content, word, tmp_path, refused):
    (tmp_path / 'log.txt').write_bytes(content)
    refused(1, ['log.txt', word], plot.main, tmp_path, '--out', tmp_path / 'curves.png')
    assert [file.name for file in tmp_path.iterdir()] == ['log.txt']


def test_mistakes_in_the_command_line(tmp_path, refused):
    refused(1, 'nothing', plot.main, tmp_path / 'nothing', '--out', tmp_path / 'x.png')
    refused(2, '--out', plot.main, tmp_path)
    for name in ('', '.', 'x.pdf', 'a' * 300):
        refused(2, '--out', plot.main, SEEDS[0], '--out', name)
    refused(2, '--graph', plot.main, tmp_path, tmp_path, '--graph', '--out', tmp_path / 'x.png')
