"""tools.benchmark in small, its arithmetic, and the committed results in docs/performance.md."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, python
from tools.benchmark import __main__ as program
from tools.benchmark import contestants, cuda, parts
from tools.benchmark.report import Report, ratio_of_medians

SMALLEST = parts.SMALLEST


def race_here(specifications, rounds):
    """`race` in this process; the n-th contestant takes n MB."""
    samples = {}
    for name, (kind, *arguments) in specifications.items():
        step = contestants.BUILDERS[kind](*arguments)
        samples[name] = [contestants.seconds(step) for _ in range(rounds + 1)]
    return samples, {name: number for number, name in enumerate(samples, 1)}


@pytest.mark.parametrize(
    'part, variants',
    [
        ('train', [*parts.USUAL, *parts.WITH_OPTIONS, 'ResNet step', 'textbook epoch']),
        ('compile', ['--compile', 'DiracNet']),
        ('inference', ['folded', 'unfolded', 'ResNet', 'folded int8', 'folded ONNX']),
        ('depth', ['DiracNet', '--recompute']),
        ('data', ['ours', 'torchvision']),
        ('start', parts.PROGRAMS),
    ],
)
def test_parts_in_small(part, variants, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, 'race', race_here)
    # What takes long, and runs in tests of its own.
    monkeypatch.setitem(contestants.BUILDERS, '--compile', contestants.BUILDERS['DiracNet'])
    monkeypatch.delitem(parts.INFERENCE, 'ONNX Runtime')
    monkeypatch.setattr(parts, 'PROGRAMS', dict.fromkeys(parts.PROGRAMS, ('-c', 'pass')))
    args = SimpleNamespace(quick=True, rounds=2, images=8, out=tmp_path / part)
    report = program.BENCHMARKS[part](args)
    report.write(args.out)
    content = json.loads(args.out.with_suffix('.json').read_text())
    assert {row[1] for row in content['rows']} >= set(variants)
    for row in content['rows']:
        assert f'| {" | ".join(row)} |\n' in args.out.with_suffix('.md').read_text()
        assert row[0] or float(row[3].split()[0]) > 0  # others are compared with the first
    assert content['samples'] and args.out.with_suffix('.png').exists() == (part == 'depth')


def test_race_measures_seconds_and_memory():
    samples, peaks = contestants.race({'step': ('DiracNet', SMALLEST, 64)}, 3)
    assert len(samples['step']) == 4 and min(samples['step']) > 0
    # At least the activations that the backward pass needs: two floats for each of 7 convolutions.
    least = 64 * 4 * 2 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4) / 2**20
    assert least < peaks['step'] < 500


def test_first_step_ends_the_training(tmp_path):
    result = python('-c', parts.FIRST_STEP, env={**os.environ, 'TMPDIR': str(tmp_path)})
    assert result.status == 0, result.err
    assert list(tmp_path.rglob('run.json')) and not list(tmp_path.rglob('model.pt7'))


def test_ratio_and_interval():
    second = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ratio_of_medians([2 * value for value in second], second) == (2, 2, 2)
    ratio, low, high = ratio_of_medians([2.0, 6.0, 6.0, 7.0, 8.0], second)
    assert ratio == 2 and 1.5 < low < 2 < high < 4
    report = Report('')
    report.compare('step, ms', {'a': second, 'b': [value / 2 for value in second]})
    report.compare('memory, MB', {'a': [300], 'b': [200]})
    assert report.rows == [
        ['step, ms', 'a', '3 (1.5 to 4.5)', ''],
        ['', 'b', '1.5 (0.75 to 2.25)', '2.000 (2.000 to 2.000)'],
        ['memory, MB', 'a', '300', ''],
        ['', 'b', '200', '1.500'],
    ]


# --- cuda, in small on the CPU ---------------------------------------------------------------


def test_a_failing_variant_stops_no_other(monkeypatch, capsys):
    build = cuda.on_a_batch

    def failing(*args, model='diracnet', **options):
        if model == 'plain':
            raise RuntimeError('no memory')
        return build(*args, **options)

    monkeypatch.setattr(cuda, 'on_a_batch', failing)
    cuda.main(f'steps {cuda.SMALL[0]}', 'cpu', '1')
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = {line['row'][1]: line['row'] for line in lines if 'row' in line}
    assert list(rows) == ['DiracNet', 'float32', 'contiguous', 'textbook']
    for row in rows.values():
        assert float(row[3]) > 0 and float(row[4]) > 0 and row[6] == '-'
    [failure] = [line['failure'] for line in lines if 'failure' in line]
    assert 'plain' in failure and 'no memory' in failure


def test_a_failing_part_stops_no_other(tmp_path, monkeypatch):
    limits = {'image files': (0.05, None), 'data': (60, None)}
    monkeypatch.setattr(cuda, 'parts', lambda quick: limits)
    out = tmp_path / 'cuda'
    assert program.main(['cuda', '--device', 'cpu', '--quick', '--out', str(out)]) == 1
    measured, failed = json.loads(out.with_suffix('.json').read_text())['rows']
    assert 0 < float(measured[3].split()[0]) < 1
    assert 'image files: stopped' in failed[1] and 'data' not in failed[1]
    assert failed[1] in out.with_suffix('.md').read_text()


def test_ratios_and_shares():
    medians = {'DiracNet': 4.0, 'plain': 2.0, 'CUDA graph': 1.0, 'textbook': 8.0}
    ratios = [cuda.ratio(name, medians) for name in medians]
    assert ratios == ['1.000', '2.000', '4.000', '0.125 of CUDA graph']
    assert cuda.ratio('plain', {'plain': 2.0}) == ''
    assert cuda.peak_share('NVIDIA H200', 'CUDA graph', 98.94e12, 200) == '0.500'
    assert cuda.peak_share('NVIDIA H200', 'textbook', 66.9e12, 2000) == '0.500'
    # DiracNet-10-1 on 8 x 8 digits: its convolutions and its linear layer, forward and backward.
    widths = [(1, 16, 64), (16, 16, 64), (16, 16, 64), (16, 32, 16), (32, 32, 16), (32, 64, 4)]
    forward = sum(9 * a * b * pixels for a, b, pixels in [*widths, (64, 64, 4)]) + 64 * 10
    first = 9 * 16 * 64  # the images need no gradient
    counted = cuda.operations(contestants.on_a_batch(SMALLEST, 4))
    assert counted == 2 * 4 * (3 * forward - first)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu(refused):
    refused(1, 'GPU', program.main, 'cuda')


def test_performance_page_shows_committed_rows():
    """Each row of the page is a committed one, without the column of an earlier form, `goal`."""
    committed = set()
    for path in (ROOT / 'logs' / 'reference').glob('benchmark-*.json'):
        content = json.loads(path.read_text())
        keep = [number for number, name in enumerate(content['columns']) if name != 'goal']
        committed.update(tuple(row[number] for number in keep) for row in content['rows'])
    rows = [
        tuple(cell.strip() for cell in line[1:-1].split('|'))
        for line in (ROOT / 'docs' / 'performance.md').read_text().splitlines()
        if line.startswith('|') and not line.startswith(('| measurement |', '| --- |'))
    ]
    assert len(rows) > 100 and set(rows) <= committed
