"""tools.benchmark in small, its arithmetic, and the committed results in docs/performance.md."""

import json
import time
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from lab.data import datasets
from lab.errors import UserError
from tools.benchmark import __main__ as program
from tools.benchmark import contestants, cuda, images, parts
from tools.benchmark.report import Report, ratio_of_medians


def race_here(specifications, rounds):
    """`race` in this process, without its measurements: the n-th contestant takes n ms and n MB."""
    for kind, *arguments in specifications.values():
        contestants.BUILDERS[kind](*arguments)()
    numbers = {name: number for number, name in enumerate(specifications, 1)}
    return {name: [n] * (rounds + 1) for name, n in numbers.items()}, numbers


@pytest.mark.parametrize(
    'part, variants',
    [
        ('train', {*parts.USUAL, *parts.WITH_OPTIONS, 'ResNet step'}),
        ('inference', {'folded', 'unfolded', 'ResNet', 'folded int8', 'folded ONNX'}),
        ('depth', {'DiracNet', '--recompute'}),
        ('data', {'ours', 'torchvision', 'Pillow'}),
    ],
)
def test_parts_in_small(part, variants, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, 'race', race_here)
    out = tmp_path / part
    assert program.main([part, '--quick', '--out', str(out)]) == 0
    content = json.loads(out.with_suffix('.json').read_text())
    assert {row[1] for row in content['rows']} >= variants
    for row in content['rows']:
        assert f'| {" | ".join(row)} |\n' in out.with_suffix('.md').read_text()
        assert row[2] == '0' if 'difference' in row[0] else content['samples'][row[0]][row[1]]
    seconds = [row for row in content['rows'] if row[3]]  # the ratio; decoders are really measured
    assert seconds and (part == 'data' or all(float(row[3].split()[0]) < 1 for row in seconds))


def test_race_measures_time_and_memory():
    samples, peaks = contestants.race({'step': ('DiracNet', (10, 1, 'digits'), 64)}, 3)
    assert len(samples['step']) == 4 and 0.1 < min(samples['step']) < 10_000  # ms
    # At least the activations that the backward pass needs: two floats for each of 7 convolutions.
    least = 64 * 4 * 2 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4) / 2**20
    assert least < peaks['step'] < 500


def test_rows_ratio_and_interval():
    second = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ratio_of_medians([2 * value for value in second], second) == (2, 2, 2)
    ratio, low, high = ratio_of_medians([2.0, 6.0, 6.0, 7.0, 8.0], second)
    assert ratio == 2 and 1.5 < low < 2 < high < 4
    report = Report('', '')
    report.add('step', 'DiracNet', second, '2.000', 6, 1234.5)
    report.add('failed parts', 'none', '')
    assert report.rows == [
        ['step', 'DiracNet', '3 (1.5 to 4.5)', '2.000', '2000', '1234'],
        ['failed parts', 'none', '', '', '', ''],
    ]


# --- cuda, in small on the CPU ---------------------------------------------------------------


def test_a_failing_part_stops_no_other(monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError('no memory')

    out = tmp_path / 'cuda'
    tables = []  # as they are when digits are trained

    monkeypatch.setattr(cuda, 'run_tests', fail)
    monkeypatch.setattr(cuda, 'run_epochs', lambda *args: None)
    monkeypatch.setattr(
        cuda, 'run_processes', lambda *args: tables.append(out.with_suffix('.md').read_text())
    )
    assert program.main(['cuda', '--device', 'cpu', '--quick', '--out', str(out)]) == 1
    content = json.loads(out.with_suffix('.json').read_text())
    *rows, failed = content['rows']
    assert 'tests: RuntimeError: no memory' in failed[1]
    steps = [row for row in rows if row[0].startswith('step')]
    assert 'ResNet-8-0.25' in tables[0] and 'folded' not in tables[0]
    bfloat16 = ['DiracNet', 'plain', 'ResNet-8-0.25']
    assert [row[1] for row in steps] == [*bfloat16, 'DiracNet', 'plain']
    assert all(float(row[4]) > 0 for row in steps)
    for label, variant, _, ratio, *_ in steps:
        samples = content['samples'][label]
        if variant != 'DiracNet':
            first = samples[f'in turn with {variant}']
            expected = median(first) / median(samples[variant])
            assert float(ratio.split()[0]) == pytest.approx(expected, abs=1e-3)
    assert not any(row[0].startswith('goal') for row in rows)  # those of a GPU


def test_goals_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    report = Report('CUDA', '')
    for value in (3.9, 4.1):
        cuda.check(report, 'ms', value, 4)
    assert [row[1] for row in report.rows] == ['reached: 3.9', 'missed: 4.1']


def test_a_step_is_the_one_that_was_asked_for(monkeypatch):
    """One that falls back to ordinary steps is not measured as a graph."""
    monkeypatch.setattr(contestants, 'make_step', lambda *arguments: arguments[-1]('no capture'))
    with pytest.raises(UserError, match='no capture'):
        contestants.on_a_batch(*cuda.SMALL)


def test_a_program_is_stopped_in_time():
    lines = cuda.lines_of('-c', 'import time; print("begun", flush=True); time.sleep(60)')
    assert next(lines) == 'begun'
    with pytest.raises(UserError, match='stopped after .* begun'), cuda.limited(0.1):
        next(lines)


def test_a_failing_program():
    lines = cuda.lines_of('-c', 'print("begun"); raise SystemExit(3)')
    with pytest.raises(UserError, match='exit status 3: begun'):
        list(lines)


def test_utilization_between_epochs(monkeypatch, tmp_path):
    sampler = tmp_path / 'nvidia-smi'
    sampler.write_text(f'#!/bin/sh\necho 40\necho 60\ntouch {tmp_path}/begun\nexec sleep 60\n')
    sampler.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')

    def lines():
        yield 'DiracNet-34-2 on CIFAR10'
        yield f'epoch 1/{cuda.EPOCHS}: train loss 1'
        while not (tmp_path / 'begun').exists():
            time.sleep(0.01)
        yield f'epoch {cuda.EPOCHS}/{cuda.EPOCHS}: train loss 1'

    assert cuda.utilization_during(lines()) == ['40', '60']


def test_made_cifar10(monkeypatch, tmp_path):
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *arguments: True)
    images.write_cifar10(tmp_path, 50, 20)
    data = datasets.load('CIFAR10', tmp_path)
    assert data.train[0].shape == (50, 32, 32, 3) and data.test[0].shape == (20, 32, 32, 3)
    assert data.train[1].unique().tolist() == list(range(10)) == [int(c) for c in data.classes]


def test_no_part_begins_late(monkeypatch):
    monkeypatch.setattr(cuda, 'SECONDS', -1)
    report = cuda.bench_cuda(SimpleNamespace(device='cpu', quick=True, out=None))
    assert len(report.rows) == 1 and len(report.failures) == len(list(cuda.parts('cpu', True)))


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
