"""tools.benchmark on the smallest networks, and the committed results in docs/performance.md."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import python
from diracnet import define_diracnet
from tools.benchmark import __main__ as program
from tools.benchmark import contestants, cuda, depth, gpu, references
from tools.benchmark.made_data import random_batch, write_cifar
from tools.benchmark.processes import ROOT, Contestant, measure_in_child
from tools.benchmark.report import Report, spread, spread_in_milliseconds
from tools.benchmark.timing import alternate

SMALLEST = (10, 1, 'digits')


@pytest.mark.parametrize(
    'kind', ['DiracNet', 'textbook', 'plain', 'floor', '--recompute', '--dtype bfloat16']
)
def test_contestants_step(kind):
    torch.manual_seed(0)
    step = contestants.build(kind, SMALLEST, *random_batch('digits', 16))
    for _ in range(2):
        assert step() is None


@pytest.mark.parametrize('kind', ['folded', 'unfolded', 'textbook inference', 'folded ONNX'])
def test_contestants_infer(kind):
    step = contestants.build(kind, (18, 1, 'ImageNet'), *random_batch('ImageNet', 1))
    assert step() is None


def test_contestants_learn_the_same():
    """With equal parameters and settings, our step and the textbook's stay together."""
    inputs, targets = random_batch('digits', 16)
    f, ours = define_diracnet(*SMALLEST)
    copies = {
        key: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for key, tensor in ours.items()
    }
    params = references.with_deltas(copies)
    theirs = contestants.textbook_training_step(params)
    step = contestants.training_step(f, ours)  # its module shares the memory of most of `ours`
    for _ in range(3):
        theirs(inputs, targets)
        step(inputs, targets)
    for key in ('fc.weight', 'group2.block1.alpha', 'group0.block0.beta', 'bn.running_mean'):
        torch.testing.assert_close(ours[key], params[key], rtol=1e-4, atol=1e-6)


def test_contestant_is_a_process_with_a_peak():
    contestant = Contestant('DiracNet', SMALLEST, 64)
    samples = alternate({'step': contestant}, 3)
    assert len(samples['step']) == 3 and min(samples['step']) > 0
    # At least the activations that the backward pass needs: two floats for each of 7 convolutions.
    least = 64 * 4 * 2 * (3 * 16 * 64 + 2 * 32 * 16 + 2 * 64 * 4) / 2**20
    assert least < contestant.close() < 500


def test_memory_of_children(tmp_path, image_folder):
    bare = measure_in_child('torch_alone')
    assert bare > 50
    sums = json.dumps(write_cifar(tmp_path, images_per_file=200))
    assert measure_in_child('cifar_loading', tmp_path, sums) > bare
    sizes = measure_in_child('folder_loading', image_folder)
    assert len(sizes) == 12 and min(sizes) > 50


def test_first_step_ends_the_training(tmp_path):
    result = python('-m', 'tools.benchmark.children', 'first_step', tmp_path)
    assert result.status == 0, result.err
    assert list(tmp_path.rglob('run.json')) and not list(tmp_path.rglob('model.pt7'))


@pytest.mark.parametrize('power', [1, 1.5])
def test_cost_over_depth(power, tmp_path, monkeypatch):
    """Costs of depth ** power + 4: the fit of linear ones is exact, the others miss the goal."""

    def cost(key):
        kind, n_layers = key
        return (0.5 if kind == '--recompute' else 1) * (n_layers**power + 4)

    monkeypatch.setattr(
        depth,
        'Contestant',
        lambda kind, network, batch: SimpleNamespace(close=lambda: cost((kind, network[0]))),
    )
    monkeypatch.setattr(depth, 'alternate', lambda keys, n: {key: [cost(key)] * n for key in keys})
    report = depth.bench_depth(SimpleNamespace(rounds=3, out=tmp_path / 'depth'))
    assert (tmp_path / 'depth.png').is_file()
    *costs, time, recomputed_time, memory, recomputed_memory = report.rows
    assert [float(row[3]) for row in costs[1::2]] == [2] * 2 * len(depth.DEPTHS)
    for row in (time, recomputed_time, memory, recomputed_memory):
        assert goal_is_met(row) == (power == 1), row
    if power == 1:
        assert time[2:4] == ['1000.000 per layer +4000.0, R^2 1.0000', '1.000']
        assert recomputed_memory[2:4] == ['0.500 per layer +2.0, R^2 1.0000', '1.000']


# --- cuda, in small on the CPU ---------------------------------------------------------------


def lines_of(part, capsys):
    """What a part tells, run in this process."""
    gpu.main(part, 'cpu', '1')
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_failing_variant_stops_no_other(monkeypatch, capsys):
    def failing(network):
        raise RuntimeError('no memory')

    monkeypatch.setattr(gpu, 'make_plain', failing)
    told = lines_of(f'steps {gpu.SMALL[0]}', capsys)
    rows = {line['row'][1]: line['row'] for line in told if 'row' in line}
    assert list(rows) == ['DiracNet', 'float32', 'contiguous', 'textbook']
    for row in rows.values():
        assert float(row[3]) > 0 and float(row[5]) > 0 and row[7] == '-'
    [failure] = [line['failure'] for line in told if 'failure' in line]
    assert 'plain' in failure and 'no memory' in failure


def test_a_failing_part_stops_no_other(tmp_path, monkeypatch):
    parts = {'unknown': (60, None), 'image files': (0.05, None), 'data': (60, None)}
    monkeypatch.setattr(cuda, 'parts', lambda quick: parts)
    out = tmp_path / 'cuda'
    assert program.main(['cuda', '--device', 'cpu', '--quick', '--out', str(out)]) == 1
    content = json.loads(out.with_suffix('.json').read_text())
    measured, failed = content['rows']
    assert len(content['samples']['an epoch of batches, without training, ms']) == 3
    assert 0 < float(measured[3].split()[0]) < 1
    assert 'unknown: ' in failed[1] and 'image files: stopped' in failed[1]
    assert 'data' not in failed[1] and failed[1] in out.with_suffix('.md').read_text()


def test_ratios_and_shares(monkeypatch):
    medians = {'DiracNet': 4.0, 'plain': 2.0, 'CUDA graph': 1.0, 'textbook': 8.0}
    assert [gpu.ratio(name, medians) for name in medians] == [
        '1.000',
        '2.000',
        '4.000',
        '0.125 of CUDA graph',
    ]
    del medians['DiracNet']
    assert gpu.ratio('plain', medians) == ''
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H200')
    part = gpu.Part('cuda', True)
    assert gpu.peak_share(part, 98.94e12, 'CUDA graph', [200]) == '0.500'
    assert gpu.peak_share(part, 66.9e12, 'textbook', [2000]) == '0.500'
    # DiracNet-10-1 on 8 x 8 digits: its convolutions and its linear layer, forward and backward.
    widths = [(1, 16, 64), (16, 16, 64), (16, 16, 64), (16, 32, 16), (32, 32, 16), (32, 64, 4)]
    forward = sum(9 * a * b * pixels for a, b, pixels in [*widths, (64, 64, 4)]) + 64 * 10
    first = 9 * 16 * 64  # the images need no gradient
    counted = gpu.operations(gpu.make_diracnet, SMALLEST, *random_batch('digits', 4))
    assert counted == 2 * 4 * (3 * forward - first)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu(refused):
    refused(1, 'GPU', program.main, 'cuda')


# --- committed results -----------------------------------------------------------------------

PAGE = ROOT / 'docs' / 'performance.md'
RESULTS = sorted((ROOT / 'logs' / 'reference').glob('benchmark-*.json'))


def markdown_rows(text):
    """The rows of all tables in a Markdown text, without headers."""
    rows, previous = [], ''
    for line in text.splitlines():
        if line.startswith('|') and previous.startswith('|'):
            rows.append([cell.strip() for cell in line[1:-1].split('|')])
        previous = line
    return [row for row in rows if row[0] != '---']


def with_labels(rows):
    """The rows, with the first cell of a group also where only its first row has it."""
    label, filled = '', []
    for row in rows:
        label = row[0] or label
        filled.append((label, *row[1:]))
    return filled


def committed_rows():
    return [row for path in RESULTS for row in with_labels(json.loads(path.read_text())['rows'])]


def goal_is_met(row):
    """Whether the ratio of a row, the cell before the goal, meets the goal.

    None if the row has no goal that is a limit of the ratio.
    """
    for ratio, goal in pairwise(row):
        found = re.fullmatch(r'at (most|least) ([\d.]+)', goal)
        if found:
            value, limit = float(ratio.split()[0]), float(found[2])
            return value <= limit if found[1] == 'most' else value >= limit
    return None


def test_committed_tables_show_their_samples():
    assert len(RESULTS) == 7
    for path in RESULTS:
        content = json.loads(path.read_text())
        report = Report('', content['columns'])
        report.rows = content['rows']
        table = report.markdown().split('\n\n')[-1]
        assert path.with_suffix('.md').read_text().endswith(table), path
        for group in content['samples'].values():
            samples = list(group.values()) if isinstance(group, dict) else []
            for values in samples:
                if isinstance(values, list):
                    assert spread(values) in table or spread_in_milliseconds(values) in table


def test_performance_page_shows_committed_rows():
    """Each row of the page is a committed one, and says rightly whether it meets its goal."""
    shown = with_labels(markdown_rows(PAGE.read_text()))
    committed = committed_rows()
    assert len(shown) > 20
    for *row, met in shown:
        assert tuple(row) in committed, row
        if goal_is_met(row) is not None:
            assert met == ('yes' if goal_is_met(row) else 'no'), row
    for row in committed:
        if goal_is_met(row) is False:
            assert (*row, 'no') in shown, row


def test_commands_of_the_performance_page(tmp_path, monkeypatch):
    done = []
    for name in program.BENCHMARKS:
        monkeypatch.setitem(program.BENCHMARKS, name, lambda args: Report('', ['measurement']))
    monkeypatch.chdir(tmp_path)
    for line in PAGE.read_text().splitlines():
        if line.strip().startswith('python -m tools.benchmark'):
            command = shlex.split(line)
            program.main(command[3:])
            assert Path(command[-1]).with_suffix('.json').is_file()
            done.append(command[3])
    assert sorted(done) == sorted(program.BENCHMARKS)
