"""Curves of runs and graphs of networks."""

import json
from statistics import median

import pytest

from conftest import ROOT
from lab.runs.log import read_log
from tools import plot

SEEDS = [ROOT / 'logs' / 'reference' / f'digits-diracnet-16-1-seed{seed}' for seed in range(1, 6)]


@pytest.fixture
def original_run(tmp_path):
    """The folder of a run of the original code: its log has other lines too, and may hold lists."""
    lines = ['parsed options: {}']
    for epoch in range(1, 6):
        stats = {
            'train_loss': 2.0 / epoch,
            'train_acc': 50.0 + epoch,
            'test_loss': 2.1 / epoch,
            'test_acc': [40.0 + epoch],
            'epoch': epoch,
            'num_classes': 10,
            'n_parameters': 1,
            'train_time': 1.0,
            'test_time': 1.0,
        }
        lines.append('json_stats: ' + json.dumps(stats))
    lines.append('json_stats: {"trai')  # cut off
    folder = tmp_path / 'original'
    folder.mkdir()
    (folder / 'log.txt').write_text('\n'.join(lines))
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
    groups = plot.group_by_options(logs)
    assert groups == {
        'lr 0.1, epochs 2 (n = 2)': [logs['a'], logs['b']],
        'lr 0.2, epochs 2 (n = 1)': [logs['c']],
        'lr 0.1, epochs 3 (n = 1)': [logs['d']],
    }
    assert list(plot.group_by_options({'logs/a': logs['a']})) == ['a (n = 1)']


@pytest.fixture
def drawn(monkeypatch, tmp_path, call):
    """drawn(*arguments): what tools.plot draws, {label: its logs}."""

    def drawn(*arguments):
        curves, found = plot.curves, []
        monkeypatch.setattr(
            plot, 'curves', lambda groups, out: found.append(groups) or curves(groups, out)
        )
        assert call(plot.main, *arguments, '--out', tmp_path / 'curves.png').status == 0
        monkeypatch.setattr(plot, 'curves', curves)
        return found[0]

    return drawn


def test_median_of_the_reference_runs(drawn):
    """Runs that differ in their seed alone are one group; two groups stay two."""
    [(label, logs)] = drawn(*SEEDS, '--median').items()
    assert logs == [read_log(folder) for folder in SEEDS]
    assert SEEDS[0].name in label and 'n = 5' in label
    others = [SEEDS[0].with_name(f'digits-plain-100-1-seed{seed}') for seed in (1, 2, 3)]
    assert [len(logs) for logs in drawn(*SEEDS, *others, '--median').values()] == [5, 3]


def test_a_run_counts_once(drawn, tmp_path):
    (tmp_path / 'link').symlink_to(SEEDS[0])
    names = (SEEDS[0], SEEDS[0] / 'log.txt', f'{SEEDS[0]}/', tmp_path / 'link', SEEDS[1])
    [logs] = drawn(*names, '--median').values()
    assert len(logs) == 2
    assert list(drawn(*names)) == [str(SEEDS[0]), str(SEEDS[1])]


def test_a_copied_run_is_no_second_one(tmp_path, refused):
    copy = tmp_path / 'copy'
    copy.mkdir()
    (copy / 'log.txt').write_text((SEEDS[0] / 'log.txt').read_text())
    out = tmp_path / 'curves.png'
    refused(1, [SEEDS[0], copy], plot.main, SEEDS[0], copy, '--median', '--out', out)


@pytest.mark.parametrize('name', ['.png', '', 'a' * 300])
def test_names_of_the_figure(name, refused):
    refused(2, '--out', plot.main, SEEDS[0], '--out', name)


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
    figure = plot.draw_curves({'net': logs}, errors_only=True, x='seconds')
    [line] = figure.axes[0].lines
    assert list(line.get_xdata()) == [11, 32] and list(line.get_ydata()) == [1, 2]


def test_graph(digits_run, tmp_path, call):
    out = tmp_path / 'graph.svg'
    assert call(plot.main, digits_run, '--graph', '--out', out).status == 0
    svg = out.read_text()
    assert '<svg' in svg
    for text in ('images', 'logits', 'conv2d'):
        assert text in svg  # as a comment: letters are drawn as paths


def test_mistakes(tmp_path, refused):
    refused(1, 'nothing', plot.main, tmp_path / 'nothing', '--out', tmp_path / 'x.png')
    refused(2, '--out', plot.main, tmp_path)
    refused(2, 'x.pdf', plot.main, tmp_path, '--out', tmp_path / 'x.pdf')
    refused(2, '--graph', plot.main, tmp_path, tmp_path, '--graph', '--out', tmp_path / 'x.png')
