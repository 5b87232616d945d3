"""tools.benchmark in small, its arithmetic, and the committed results in docs/performance.md."""

import json
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from tools.benchmark import __main__ as program
from tools.benchmark import contestants, cuda, parts
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
        ('data', {'ours'}),
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
        assert content['samples'][row[0]][row[1]]
    seconds = [row for row in content['rows'] if row[3]]  # the ratio
    assert all(float(row[3].split()[0]) < 1 for row in seconds) and (seconds or part == 'data')


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

    monkeypatch.setattr(cuda, 'run_tests', fail)
    monkeypatch.setattr(cuda, 'run_processes', lambda device, report: None)
    out = tmp_path / 'cuda'
    assert program.main(['cuda', '--device', 'cpu', '--quick', '--out', str(out)]) == 1
    *rows, failed = json.loads(out.with_suffix('.json').read_text())['rows']
    ratios = {variant: ratio for label, variant, _, ratio, *_ in rows if label.startswith('step')}
    assert ratios.pop('DiracNet') == '1.000' and all(float(ratio) > 0 for ratio in ratios.values())
    assert list(ratios) == ['plain', '--recompute', 'float32', 'contiguous', 'textbook']
    assert all(float(row[4]) > 0 for row in rows)
    assert 'tests: RuntimeError: no memory' in failed[1]


def test_no_part_begins_late(monkeypatch):
    monkeypatch.setattr(cuda, 'SECONDS', -1)
    report = cuda.bench_cuda(SimpleNamespace(device='cpu', quick=True))
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
