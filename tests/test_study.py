"""Studies and plots: what they run, what they leave alone, and what they say."""

import csv
import json
import signal
import time

import pytest

from conftest import ROOT, read_log, start
from lab.errors import UserError
from tools import plot, study

TINY = """
title: A try
dataset: digits
seeds: [1, 2]
options: {width: 0.5}
recipes:
  digits: {epochs: 2, epoch_step: [2], lr: 0.1, batch_size: 200}
runs:
  - {model: diracnet, depth: 10, reported: 5.5}
  - {model: resnet, depth: 8}
table: [model, depth]
figure: {x: depth, lines: model}
note: A sentence.
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / 'tiny.yaml').write_text(TINY)
    return tmp_path / 'tiny.yaml'


def test_runs_once_tabulates_and_draws(tiny, tmp_path, call):
    out = tmp_path / 'out'
    result = call(study.main, tiny, '--out', out, '--jobs', 2)
    assert result.status == 0, result.err
    logs = sorted(out.glob('*/seed*/log.txt'))
    assert len(logs) == 4 and all(len(read_log(path.parent)) == 2 for path in logs)
    times = {path: path.stat().st_mtime_ns for path in logs}
    with open(out / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['depth'], row['n']) for row in rows] == [
        ('diracnet', '10', '2'),
        ('resnet', '8', '2'),
    ]
    errors = sorted(
        100 - read_log(out / 'diracnet-10' / f'seed{seed}')[-1]['test_acc'] for seed in (1, 2)
    )
    assert (
        float(rows[0]['error']) == pytest.approx(sum(errors) / 2)
        and float(rows[0]['least']) == errors[0]
        and float(rows[0]['most']) == errors[1]
    )
    assert int(rows[1]['parameters']) == read_log(out / 'resnet-8' / 'seed1')[-1]['n_parameters']
    table = (out / 'table.md').read_text()
    assert (
        f'| diracnet | 10 | 2 | {sum(errors) / 2:.2f} |' in table
        and 'A sentence.' in table
        and '5.5' in table
        and 'preprocessing meanstd' in table
    )
    assert result.out.strip() == table.strip()
    for suffix in ('png', 'svg'):
        assert (out / f'figure.{suffix}').stat().st_size > 5000
    # Again: nothing is trained; what is missing is.
    (out / 'resnet-8' / 'seed2' / 'log.txt').unlink()
    for name in ('model.pt7', 'previous.pt7'):
        (out / 'resnet-8' / 'seed2' / name).unlink()
    assert call(study.main, tiny, '--out', out).status == 0
    assert [path for path in logs if path.stat().st_mtime_ns != times[path]] == [
        out / 'resnet-8' / 'seed2' / 'log.txt'
    ]
    # The table of a single seed's runs has the others', too.
    table = (out / 'table.md').read_text()
    assert (
        call(study.main, tiny, '--out', out, '--seeds', '2', '--table').status == 0
        and (out / 'table.md').read_text() == table
    )
    # Runs of other options than the study's are not taken for its own.
    tiny.write_text(TINY.replace('lr: 0.1', 'lr: 0.2'))
    result = call(study.main, tiny, '--out', out)
    assert (
        result.status == 1 and '--lr' in result.err and '0.1' in result.err and '0.2' in result.err
    )


def test_stops_and_goes_on(tiny, tmp_path):
    tiny.write_text(TINY.replace('epochs: 2', 'epochs: 60'))
    out = tmp_path / 'out'
    process = start('-m', 'tools.study', tiny, '--out', out, '--seeds', '1')
    deadline = time.monotonic() + 60
    while not list(out.glob('*/seed*/model.pt7')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and 'Traceback' not in err and 'the same command goes on' in err
    )
    [folder] = [path.parent for path in out.glob('*/seed*/model.pt7')]
    n = len(read_log(folder))
    assert 0 < n < 60 and 'python train.py --resume' in (folder / 'output.txt').read_text()
    with pytest.raises(
        UserError, match='no finished runs'
    ):  # a table is of what has come to its end
        study.main([str(tiny), '--out', str(out), '--seeds', '1', '--table'])


def test_a_run_that_diverges_is_a_result(tiny, tmp_path, call):
    tiny.write_text(
        TINY.replace(
            'epochs: 2, epoch_step: [2], lr: 0.1',
            'epochs: 2, epoch_step: [2], lr: 0.001, lr_decay_ratio: 1.0e+40',
        )
        .replace('[1, 2]', '[1]')
        .replace('  - {model: resnet, depth: 8}\n', '')
    )
    result = call(study.main, tiny, '--out', tmp_path / 'out')
    assert (
        result.status == 0
        and '| diverged |' in result.out
        and '| diracnet | 10 | 0 | 1 |' in result.out
    )
    assert 'the loss is' in (tmp_path / 'out' / 'diracnet-10' / 'seed1' / 'failed.txt').read_text()


def test_mistakes(tiny, tmp_path, refused):
    refused(1, 'nowhere.yaml', study.main, tmp_path / 'nowhere.yaml')
    tiny.write_text('title: [')
    refused(1, 'tiny.yaml', study.main, tiny)
    tiny.write_text('title: A try')
    refused(1, ['tiny.yaml', 'seeds'], study.main, tiny)
    tiny.write_text(TINY.replace('depth: 8', 'depth: 9'))
    tiny.write_text(
        tiny.read_text().replace('  - {model: diracnet, depth: 10, reported: 5.5}\n', '')
    )
    refused(
        1,
        ['--depth 9', 'depth 9 is impossible'],
        study.main,
        tiny,
        '--out',
        tmp_path / 'out',
        '--seeds',
        '1',
    )
    for wrong, words in (
        (('seeds: [1, 2]', 'seeds: 1'), 'seeds'),
        (('options: {width: 0.5}', 'options:'), 'options'),
        (('x: depth', 'x: lr'), 'figure'),
    ):
        tiny.write_text(TINY.replace(*wrong))
        refused(1, ['tiny.yaml', words], study.main, tiny)
    for wrong, words in (
        (('dataset: digits', 'dataset: digitz'), 'digitz'),
        (('lr: 0.1', 'rate: 0.1'), '--rate'),
        (('lr: 0.1', 'lr: fast'), 'fast'),
        (('depth: 8', 'depth: 8, dropout: 0.1'), '--dropout'),
    ):
        tiny.write_text(TINY.replace(*wrong))
        refused(2, words, study.main, tiny, '--out', tmp_path / 'never')
    assert not (tmp_path / 'never').exists()  # before anything is trained
    tiny.write_text(TINY.replace('lr: 0.1', 'lr: 1e-1'))  # to YAML a text
    found = study.read(tiny)
    assert (
        study.Run(found, {'model': 'resnet', 'depth': 8}, 1, 'digits', tmp_path).options['lr']
        == 0.1
    )
    refused(1, 'nothing', plot.main, tmp_path / 'nothing', '--out', tmp_path / 'x.png')
    refused(2, '--out', plot.main, tmp_path)
    refused(2, 'x.pdf', plot.main, tmp_path, '--out', tmp_path / 'x.pdf')
    refused(2, '--graph', plot.main, tmp_path, tmp_path, '--graph', '--out', tmp_path / 'x.png')


def test_committed_studies_are_well_formed():
    from lab.training.options import build_parser, complete

    known = vars(build_parser(None).parse_args([]))
    for path in (ROOT / 'studies').glob('*.yaml'):
        found = study.read(path)
        for options in found['runs']:
            for row in study.expand(options):
                one = study.Run(found, row, 1, found['dataset'], ROOT)
                assert set(one.options) <= set(known), path
                complete(dict(one.options))


def test_curves_and_graph(digits_run, tmp_path, call):
    # The original's log has other lines, too, and may hold lists.
    original = tmp_path / 'original' / 'log.txt'
    original.parent.mkdir()
    original.write_text(
        'parsed options: {}\n'
        + ''.join(
            'json_stats: '
            + json.dumps(
                {
                    'train_loss': 2.0 / e,
                    'train_acc': 50.0 + e,
                    'test_loss': 2.1 / e,
                    'test_acc': [40.0 + e],
                    'epoch': e,
                    'num_classes': 10,
                    'n_parameters': 1,
                    'train_time': 1.0,
                    'test_time': 1.0,
                }
            )
            + '\n'
            for e in range(1, 6)
        )
        + 'json_stats: {"trai'
    )
    assert [line['test_acc'] for line in plot.read_log(original)] == [41.0, 42.0, 43.0, 44.0, 45.0]
    for options in ((), ('--median',)):
        result = call(
            plot.main, digits_run, original.parent, '--out', tmp_path / 'curves.png', *options
        )
        assert result.status == 0, result.err
        assert (tmp_path / 'curves.png').read_bytes()[:4] == b'\x89PNG' and '<svg' in (
            tmp_path / 'curves.svg'
        ).read_text()
    svg = (tmp_path / 'curves.svg').read_text()
    assert call(plot.main, digits_run, '--graph', '--out', tmp_path / 'graph.svg').status == 0
    assert (tmp_path / 'graph.svg').read_text() != svg
