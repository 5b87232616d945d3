"""Studies: what they train, what they leave alone, and the table and figure that they make."""

import csv
import json
import re
import signal
import time
from pathlib import Path

import pytest

from conftest import read_log, start
from lab.runs.log import MEASURED, format_line
from tools.plot import draw_curves
from tools.study.__main__ import main
from tools.study.definition import read
from tools.study.figure import logs_by_row
from tools.study.heat_map import draw_heat_maps
from tools.study.runs import all_runs, expand, flags

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


def test_trains_once_tabulates_and_draws(tiny, tmp_path, call, refused):
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
    table = (out / 'table.md').read_text()
    command = f'`python -m tools.study {tiny} --out {out}`'
    for text in (
        command,
        'A sentence.\n\nAnother paragraph.',
        '| 5.5 |',
        f'| {sum(errors) / 2:.2f} |',
    ):
        assert text in table
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
    for old, new, words in (
        ('lr: 0.1', 'lr: 0.2', ('--lr', '0.1', '0.2')),
        ('width: 0.5', '', ('--width', '0.5', '1')),
        ('epochs: 2, epoch_step: [2]', 'epochs: 1, epoch_step: [2]', ('--epochs', '2', '1')),
        ('epochs: 2, epoch_step: [2]', 'epochs: 1', ('--epochs', '2', '1')),
        ('epochs: 2, epoch_step: [2]', 'epochs: 60', ('--epoch_step', '[2]', '60 epochs')),
    ):
        tiny.write_text(TINY.replace(old, new))
        refused(1, words, main, tiny, '--out', out)

    # Runs that the study has no longer are named, and are not in the table.
    tiny.write_text(TINY.replace('[1, 2]', '[1]').replace('  - {model: resnet, depth: 8}\n', ''))
    result = call(main, tiny, '--out', out, '--table')
    assert result.status == 0 and len(result.err.splitlines()) == 1
    assert all(run in result.err for run in ('diracnet-10/seed2', 'resnet-8/seed1'))
    with open(out / 'table.csv') as file:
        assert [(row['model'], row['n']) for row in csv.DictReader(file)] == [('diracnet', '1')]


def test_stops_and_resumes(tiny, tmp_path):
    tiny.write_text(TINY.replace('epochs: 2', 'epochs: 60'))
    out = tmp_path / 'out'
    process = start('-m', 'tools.study', tiny, '--out', out, '--seeds', '1')
    deadline = time.monotonic() + 60
    while not any(path.read_text() for path in out.glob('*/seed*/log.txt')):
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


def test_minutes(tiny, tmp_path, refused):
    tiny.write_text(TINY.replace('epochs: 2', 'epochs: 10000'))
    other_seed = tmp_path / 'out' / 'diracnet-10' / 'seed1'
    other_seed.mkdir(parents=True)
    (other_seed / 'log.txt').write_text(
        format_line({**dict.fromkeys(MEASURED, 1), 'train_time': 1}) + '\n'
    )
    arguments = (tiny, '--out', tmp_path / 'out', '--seeds', '2', '--minutes', '0.25')
    refused(1, 'finished', main, *arguments)
    # 10,000 epochs of a second each are too long to start; those of the ResNet have been stopped.
    [run] = (tmp_path / 'out').glob('*/seed2')
    assert run.parent.name == 'resnet-8' and (run / 'model.pt7').exists()
    assert 0 < len(read_log(run)) < 10000


def test_a_run_that_diverges_is_a_result(tiny, tmp_path, call, refused):
    text = TINY.replace('lr: 0.1', 'lr: 0.001, lr_decay_ratio: 1.0e+30').replace('[1, 2]', '[1]')
    tiny.write_text(text.replace('  - {model: resnet, depth: 8}\n', ''))
    result = call(main, tiny, '--out', tmp_path / 'out')
    assert result.status == 0
    assert '| diverged |' in result.out
    assert '| diracnet | 10 | 0 | 1 |' in result.out
    folder = tmp_path / 'out' / 'diracnet-10' / 'seed1'
    assert 'the loss is' in (folder / 'failed.txt').read_text()

    # No figure can be drawn.
    text = tiny.read_text()
    heat_map = 'x: model, y: depth, panels: model'
    for figure in ('x: epoch', 'x: seconds', 'signal: true', heat_map):
        tiny.write_text(text.replace('x: depth, lines: model', figure))
        result = call(main, tiny, '--out', tmp_path / 'out', '--table')
        assert result.status == 0 and len(result.err.splitlines()) == 1
    assert not list((tmp_path / 'out').glob('figure*'))
    tiny.write_text(text)

    # It is none of a study with another learning rate, also if it has no log.
    (folder / 'log.txt').unlink()
    tiny.write_text(tiny.read_text().replace('lr: 0.001', 'lr: 0.01'))
    refused(1, ['--lr', '0.001'], main, tiny, '--out', tmp_path / 'out', '--table')


def test_a_run_that_train_refuses(tiny, tmp_path, refused):
    """What only the training finds ends the study, with the training's last line."""
    text = TINY.replace('depth: 8', 'depth: 9')
    tiny.write_text(text.replace('  - {model: diracnet, depth: 10, reported: 5.5}\n', ''))
    refused(1, ['--depth 9', 'depth 9'], main, tiny, '--out', tmp_path / 'out', '--seeds', '1')


# A change of TINY, (old, new), or a whole file; the exit status; a word of the line.
MALFORMED = [
    ('', 1, 'keys'),
    ('title: [', 1, 'title'),
    (b'\x80\x81\xff', 1, 'byte'),
    (('title: A try', 'title: !!python/object/apply:os.system [true]'), 1, 'python'),
    ('- title', 1, 'title'),
    (('title:', 'titel:'), 1, 'titel is none of its keys, which are title, seeds'),
    (('title: A try', '3: A try'), 1, '3 is none of its keys'),
    (('title: A try\n', ''), 1, 'no title'),
    (('title: A try', 'title: 3'), 1, 'a text'),
    (('dataset: digits', 'dataset: digits\nseeds: [3]'), 1, 'seeds is there twice'),
    (('lr: 0.1', 'lr: 0.1, epochs: 3'), 1, 'epochs is there twice'),
    (('seeds: [1, 2]', 'seeds: []'), 1, 'seeds is empty'),
    (('dataset: digits', 'dataset: digits\nkeep: [a]'), 1, 'keep'),
    (('seeds: [1, 2]', 'seeds: 1'), 1, 'seeds'),
    (('seeds: [1, 2]', 'seeds: [one]'), 2, 'one'),
    (('seeds: [1, 2]', 'seeds: [1, 1]'), 1, 'seeds [1, 1]'),
    (('dataset: digits', 'dataset: digitz'), 2, 'digitz'),
    (('  digits:', '  digitz:'), 2, 'digitz'),
    (TINY.partition('runs:')[0] + 'runs: [abc, def]\ntable: [model]', 1, 'abc'),
    # options of runs
    (('lr: 0.1', 'rate: 0.1'), 2, 'rate'),
    (('lr: 0.1', 'help: true'), 2, 'help'),
    (('lr: 0.1', 'recompute: true, compile: true'), 2, '--compile'),
    (('depth: 8', 'depth: 8, dropout: 0.1'), 2, '--dropout'),
    (('width: 0.5', 'save: /tmp/mine'), 2, 'save'),
    (('depth: 8', 'depth: 8, seeds: [3]'), 1, 'seeds'),
    (('depth: 8', 'depth: 8, seeds: 1'), 1, 'seeds of a run'),
    (('depth: 8', 'depth: 8, seeds: [[1]]'), 1, 'seeds of a run'),
    # runs that are none, or equal, or share a row of the table
    (('{model: resnet, depth: 8}', '{model: diracnet, depth: 10, lr: 0.1}'), 1, 'twice'),
    (('depth: 8', 'depth: 8, warmup: [0, 1]'), 1, 'twice'),
    # table and figure
    (('[model, depth]', '[model, dpeth]'), 1, 'dpeth'),
    (('[model, depth]', '[[model], depth]'), 1, 'table'),
    (('x: depth', 'x: lr'), 1, 'lr'),
    (('x: depth', 'x: [depth, model]'), 1, "['depth', 'model']"),
    (('x: depth, lines: model', 'x: seconds, y: depth, panels: model'), 1, 'seconds'),
    (('figure: {x: depth, lines: model}', 'figure:'), 1, 'figure'),
]


@pytest.mark.parametrize('content, status, word', MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_studies(content, status, word, tiny, tmp_path, refused):
    """Nothing is trained, and the line names the file."""
    if isinstance(content, tuple):
        assert content[0] in TINY
        content = TINY.replace(*content, 1)
    tiny.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(status, ['tiny.yaml', word], main, tiny, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_mistakes_in_the_command_line(tiny, tmp_path, refused):
    refused(1, 'nowhere.yaml', main, tmp_path / 'nowhere.yaml')
    refused(2, 'digitz', main, tiny, '--dataset', 'digitz', '--out', tmp_path / 'out')
    refused(2, '--seeds', main, tiny, '--seeds', '1,')
    refused(2, '--jobs', main, tiny, '--jobs', '0')
    refused(1, 'out', main, tiny, '--out', tiny / 'out')  # below a file
    (tmp_path / 'link').symlink_to('nowhere')
    refused(1, ['link', 'nowhere'], main, tiny, '--out', tmp_path / 'link')
    assert not (tmp_path / 'nowhere').exists()
    refused(1, 'finished', main, tiny, '--out', tmp_path / 'out', '--table')


def test_lists_expand_to_runs():
    rows = expand({'model': ['diracnet', 'plain'], 'depth': [10, 16], 'epoch_step': [3, 5]})
    values = [(row['model'], row['depth']) for row in rows]
    assert values == [('diracnet', 10), ('diracnet', 16), ('plain', 10), ('plain', 16)]
    assert all(row['epoch_step'] == [3, 5] for row in rows)
    arguments = flags({'sync_bn': True, 'recompute': False, 'lr': 0.1, 'epoch_step': [3, 5]})
    assert arguments == ['--sync_bn', '--lr', '0.1', '--epoch_step', '[3,5]']


def test_runs_have_the_options_and_seeds_of_their_study(tiny, tmp_path):
    text = TINY.replace('lr: 0.1', 'lr: 1e-1')  # a text in YAML
    tiny.write_text(text.replace('depth: 8}', 'depth: 8, seeds: [2]}'))
    runs = all_runs(read(tiny), [1, 2], 'digits', tmp_path)
    seeds = [(one.options['model'], one.seed) for one in runs]
    assert seeds == [('diracnet', 1), ('diracnet', 2), ('resnet', 2)]
    assert all(one.options['lr'] == 0.1 and 'seeds' not in one.row for one in runs)


def test_kept_epochs_do_not_change_the_schedule(tiny, tmp_path):
    tiny.write_text(TINY.replace('epochs: 2, epoch_step: [2]', 'epochs: 10') + 'keep: [1]')
    one, *_ = all_runs(read(tiny), [1], 'digits', tmp_path)
    command = one.command(None)
    assert command[command.index('--epochs') + 1] == '1'
    falls = json.loads(command[command.index('--epoch_step') + 1])
    assert falls == one.all_options['epoch_step'] and len(falls) > 1


@pytest.mark.parametrize('x', ['epoch', 'seconds'])
def test_lines_distinguish_curves(x, tiny, tmp_path):
    """Each row has a curve; those of the same line have one style, and one entry in the legend."""
    text = TINY.replace('depth: 10', 'depth: [10, 16]').replace('seeds: [1, 2]', 'seeds: [1]')
    tiny.write_text(text.replace('x: depth', f'x: {x}'))
    study = read(tiny)
    runs = all_runs(study, [1], 'digits', tmp_path)
    for one in runs:
        one.folder.mkdir(parents=True)
        stats = {name: 50.0 for name in MEASURED} | {'epoch': 1, 'train_time': 9}
        (one.folder / 'log.txt').write_text(format_line(stats))
    figure = draw_curves(logs_by_row(study, runs), errors_only=True, x=x)
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors[0] == colors[1] != colors[2] and len(colors) == 3
    assert [text.get_text() for text in figure.legends[0].texts] == ['diracnet', 'resnet']


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
    _, svg = draw_heat_maps(read(tiny), [{**row, 'error': 0.0} for row in rows], tmp_path / 'map')
    assert Path(svg).read_text().count('<!-- 0.0 -->') == 6
