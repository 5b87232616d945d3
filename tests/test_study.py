"""Studies: what they train, what they leave alone, and the table and figure that they make."""

import csv
import re
import signal
import time
from pathlib import Path

import pytest

from conftest import ROOT, read_log, start
from lab.errors import UserError
from lab.training.options import OPTIONS, complete
from tools.study.__main__ import main
from tools.study.definition import expand, read
from tools.study.heat_map import draw_heat_maps
from tools.study.runs import Run, all_runs, flags

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
note: |
  A sentence.

  Another paragraph.
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / 'tiny.yaml'
    path.write_text(TINY)
    return path


def test_trains_once_tabulates_and_draws(tiny, tmp_path, call):
    out = tmp_path / 'out'
    result = call(main, tiny, '--out', out, '--jobs', 2)
    assert result.status == 0, result.err
    logs = sorted(out.glob('*/seed*/log.txt'))
    assert len(logs) == 4
    assert all(len(read_log(path.parent)) == 2 for path in logs)
    times = {path: path.stat().st_mtime_ns for path in logs}

    with open(out / 'table.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['model'], row['depth'], row['n']) for row in rows] == [
        ('diracnet', '10', '2'),
        ('resnet', '8', '2'),
    ]
    last = [read_log(out / 'diracnet-10' / f'seed{seed}')[-1] for seed in (1, 2)]
    errors = sorted(100 - line['test_acc'] for line in last)
    assert float(rows[0]['error']) == pytest.approx(sum(errors) / 2)
    assert [float(rows[0]['least']), float(rows[0]['most'])] == errors
    assert int(rows[1]['parameters']) == read_log(out / 'resnet-8' / 'seed1')[-1]['n_parameters']

    table = (out / 'table.md').read_text()
    assert f'| diracnet | 10 | 2 | {sum(errors) / 2:.2f} |' in table
    assert 'A sentence.\n\nAnother paragraph.' in table
    assert '| 5.5 |' in table
    assert 'meanstd' in table
    assert result.out.strip() == table.strip()
    for suffix in ('png', 'svg'):
        assert (out / f'figure.{suffix}').stat().st_size > 5000

    # Again: only what is missing is trained.
    missing = out / 'resnet-8' / 'seed2'
    for name in ('log.txt', 'model.pt7', 'previous.pt7'):
        (missing / name).unlink()
    assert call(main, tiny, '--out', out).status == 0
    trained = [path for path in logs if path.stat().st_mtime_ns != times[path]]
    assert trained == [missing / 'log.txt']

    # The table has the runs of all seeds, also if one was asked for.
    table = (out / 'table.md').read_text()
    assert call(main, tiny, '--out', out, '--seeds', '2', '--table').status == 0
    assert (out / 'table.md').read_text() == table

    # Runs with other options than the study's are refused.
    tiny.write_text(TINY.replace('lr: 0.1', 'lr: 0.2'))
    result = call(main, tiny, '--out', out)
    assert result.status == 1
    assert all(text in result.err for text in ('--lr', '0.1', '0.2'))


def test_stops_and_resumes(tiny, tmp_path):
    tiny.write_text(TINY.replace('epochs: 2', 'epochs: 60'))
    out = tmp_path / 'out'
    process = start('-m', 'tools.study', tiny, '--out', out, '--seeds', '1')
    deadline = time.monotonic() + 60
    while not list(out.glob('*/seed*/model.pt7')):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'Traceback' not in err
    [folder] = [path.parent for path in out.glob('*/seed*/model.pt7')]
    n = len(read_log(folder))
    assert 0 < n < 60
    assert 'python train.py --resume' in (folder / 'output.txt').read_text()
    with pytest.raises(UserError, match=str(out)):  # a table needs a finished run
        main([str(tiny), '--out', str(out), '--seeds', '1', '--table'])


def test_a_run_that_diverges_is_a_result(tiny, tmp_path, call):
    text = TINY.replace('lr: 0.1', 'lr: 0.001, lr_decay_ratio: 1.0e+30').replace('[1, 2]', '[1]')
    tiny.write_text(text.replace('  - {model: resnet, depth: 8}\n', ''))
    result = call(main, tiny, '--out', tmp_path / 'out')
    assert result.status == 0
    assert '| diverged |' in result.out
    assert '| diracnet | 10 | 0 | 1 |' in result.out
    assert 'the loss is' in (tmp_path / 'out' / 'diracnet-10' / 'seed1' / 'failed.txt').read_text()


def test_a_file_that_is_not_a_study(tiny, tmp_path, refused):
    refused(1, 'nowhere.yaml', main, tmp_path / 'nowhere.yaml')
    tiny.write_text('title: [')
    refused(1, 'tiny.yaml', main, tiny)
    tiny.write_text('- title')
    refused(1, 'tiny.yaml', main, tiny)
    tiny.write_text('title: A try')
    refused(1, ['tiny.yaml', 'seeds'], main, tiny)
    for old, new, word in (
        ('seeds: [1, 2]', 'seeds: 1', 'seeds'),
        ('options: {width: 0.5}', 'options:', 'options'),
        ('x: depth', 'x: lr', 'figure'),
        ('figure: {x: depth, lines: model}', 'figure:', 'figure'),
        ('lines: model}', 'y: lr, panels: model}', 'figure'),
    ):
        tiny.write_text(TINY.replace(old, new))
        refused(1, ['tiny.yaml', word], main, tiny)


def test_options_that_train_refuses(tiny, tmp_path, refused):
    for old, new, word in (
        ('dataset: digits', 'dataset: digitz', 'digitz'),
        ('lr: 0.1', 'rate: 0.1', 'rate'),
        ('lr: 0.1', 'lr: fast', 'fast'),
        ('depth: 8', 'depth: 8, dropout: 0.1', '--dropout'),
    ):
        tiny.write_text(TINY.replace(old, new))
        refused(2, word, main, tiny, '--out', tmp_path / 'never')
    assert not (tmp_path / 'never').exists()  # before anything is trained

    text = TINY.replace('depth: 8', 'depth: 9')
    tiny.write_text(text.replace('  - {model: diracnet, depth: 10, reported: 5.5}\n', ''))
    words = ['--depth 9', 'depth 9 is impossible']
    refused(1, words, main, tiny, '--out', tmp_path / 'out', '--seeds', '1')


def test_options_have_the_types_of_train(tiny, tmp_path):
    tiny.write_text(TINY.replace('lr: 0.1', 'lr: 1e-1'))  # a text in YAML
    one = Run(read(tiny), {'model': 'resnet', 'depth': 8}, 1, 'digits', tmp_path)
    assert one.options['lr'] == 0.1


def test_lists_expand_to_runs():
    rows = expand({'model': ['diracnet', 'plain'], 'depth': [10, 16], 'epoch_step': [3, 5]})
    assert [(row['model'], row['depth']) for row in rows] == [
        ('diracnet', 10),
        ('diracnet', 16),
        ('plain', 10),
        ('plain', 16),
    ]
    assert all(row['epoch_step'] == [3, 5] for row in rows)
    assert flags({'sync_bn': True, 'recompute': False, 'lr': 0.1, 'epoch_step': [3, 5]}) == [
        '--sync_bn',
        '--lr',
        '0.1',
        '--epoch_step',
        '[3,5]',
    ]


def test_some_runs_have_fewer_seeds(tiny, tmp_path):
    tiny.write_text(TINY.replace('depth: 8}', 'depth: 8, seeds: [2]}'))
    runs = all_runs(read(tiny), [1, 2], 'digits', tmp_path)
    assert [(one.options['model'], one.seed) for one in runs] == [
        ('diracnet', 1),
        ('diracnet', 2),
        ('resnet', 2),
    ]
    assert all('seeds' not in one.row for one in runs)


def test_heat_maps(tiny, tmp_path):
    """A cell shows the error of its two options, in the panel of the third; gaps stay empty."""
    text = TINY.replace('x: depth, lines: model', 'x: depth, y: lr, panels: model')
    tiny.write_text(text.replace('table: [model, depth]', 'table: [model, depth, lr]'))
    rows = [
        {'model': model, 'depth': depth, 'lr': lr, 'error': 10 * depth + lr}
        for model in ('diracnet', 'resnet')
        for depth, lr in ((1, 0.1), (2, 0.1), (1, 0.2))
    ]
    rows[0]['error'] = None
    _, svg = draw_heat_maps(read(tiny), rows, tmp_path / 'map')
    texts = re.findall(r'<!-- ([\d.]+) -->', Path(svg).read_text())
    cells = [text for text in texts if float(text) >= 10]
    assert sorted(cells) == ['10.1', '10.2', '10.2', '20.1', '20.1']


def test_committed_studies_are_well_formed():
    for path in (ROOT / 'studies').glob('*.yaml'):
        study = read(path)
        for one in all_runs(study, [1], study.dataset, ROOT):
            assert set(one.options) <= set(OPTIONS), path
            complete(one.options)
