"""The numbers in docs/results.md and the tables of the studies are those of the committed runs."""

import json
import statistics

import pytest

from conftest import ROOT, read_log
from tools.study.definition import read
from tools.study.runs import all_runs
from tools.study.table import collect, write_tables

REFERENCE = ROOT / 'logs' / 'reference'
RESULTS = ROOT / 'docs' / 'results.md'
RUNS = {  # number of runs, lowest and highest median accuracy
    'digits-diracnet-16-1': (5, 97, 100),
    'digits-diracnet-100-1': (3, 90, 100),
    'digits-plain-100-1': (3, 0, 30),
    'fashion-diracnet-16-1-2epochs': (3, 87, 100),
}
STUDIES = sorted(path.stem for path in (ROOT / 'studies').glob('*.yaml'))


def table_rows(path, word):
    """The cells of each row of a page's tables that has this word."""
    rows = [line for line in path.read_text().splitlines() if line.startswith('|') and word in line]
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]


def commands(folder):
    """How a run was started, each time."""
    return json.loads((folder / 'run.json').read_text())


@pytest.mark.parametrize('name', RUNS)
def test_reference_runs(name):
    n, lowest, highest = RUNS[name]
    folders = [REFERENCE / f'{name}-seed{seed}' for seed in range(1, n + 1)]
    last = [read_log(folder)[-1] for folder in folders]
    assert [line['seed'] for line in last] == list(range(1, n + 1))
    for line, folder in zip(last, folders):
        assert line['epoch'] == line['epochs']
        assert line['holdout'] == 0
        command = commands(folder)[0]
        assert command['commit']
        assert 'dirty' not in command['commit']
        assert f'--seed {line["seed"]}' in command['command']
    accuracies = [line['test_acc'] for line in last]
    median = statistics.median(accuracies)
    assert lowest <= median <= highest

    expected = [str(n), *(f'{x:.2f}' for x in (median, min(accuracies), max(accuracies)))]
    [row] = table_rows(RESULTS, f'`{name}-seed')
    assert row[-4:] == expected


@pytest.mark.parametrize('name', STUDIES)
def test_studies(name, tmp_path):
    study, folder = read(ROOT / 'studies' / f'{name}.yaml'), REFERENCE / f'study-{name}'
    files = ('table.md', 'figure.png') if study.figure else ('table.md',)
    links = [f'study-{name}/{file}' in RESULTS.read_text() for file in files]
    if not (folder / 'table.csv').exists():  # not run to its end: no table and no link
        assert not any(links)
        return
    assert all(links)
    runs = all_runs(study, study.seeds, study.dataset, folder)
    for one in runs:
        assert one.is_done(), one.folder
        for start in commands(one.folder):
            assert start['commit']
            assert 'dirty' not in start['commit']
            assert f'--seed {one.seed} ' in start['command']
            assert ('--holdout' in start['command']) == name.endswith('-holdout')
    rows = collect(study, runs)
    command = f'python -m tools.study studies/{name}.yaml'
    write_tables(study, rows, study.dataset, tmp_path, command)
    for table in ('table.csv', 'table.md'):
        made = (tmp_path / table).read_text()
        assert (folder / table).read_text() == made, f'make it again: {command} --table'
    assert all(row['n'] + row['diverged'] == len(row['seeds'].split()) for row in rows)
    if study.figure:
        assert (folder / 'figure.png').stat().st_size > 10_000
        assert '</svg>' in (folder / 'figure.svg').read_text()
