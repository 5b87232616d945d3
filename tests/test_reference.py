"""The README's numbers are those of the committed runs."""

import json
import statistics

import pytest

import tools.study
from conftest import ROOT, read_log
from tools.study import all_runs, collect, write_tables

REFERENCE = ROOT / 'logs' / 'reference'
RUNS = {  # runs, seeds, least and most median accuracy that is claimed
    'digits-diracnet-16-1': (5, 97, 100),
    'digits-diracnet-100-1': (3, 90, 100),
    'digits-plain-100-1': (3, 0, 30),
    'fashion-diracnet-16-1-2epochs': (3, 87, 100),
}


@pytest.mark.parametrize('name', RUNS)
def test_reference_runs_stand_in_the_readme(name):
    n, least, most = RUNS[name]
    folders = [REFERENCE / f'{name}-seed{seed}' for seed in range(1, n + 1)]
    last = [read_log(folder)[-1] for folder in folders]
    assert [line['seed'] for line in last] == list(range(1, n + 1))
    for line, folder in zip(last, folders):
        assert line['epoch'] == line['epochs'] and line['holdout'] == 0
        command = json.loads((folder / 'run.json').read_text())[0]
        assert (
            command['commit']
            and 'dirty' not in command['commit']
            and f'--seed {line["seed"]}' in command['command']
        )
    accuracies = [line['test_acc'] for line in last]
    assert least <= statistics.median(accuracies) <= most
    rows = [row for row in (ROOT / 'README.md').read_text().splitlines() if f'`{name}-seed' in row]
    assert len(rows) == 1
    for number in (statistics.median(accuracies), min(accuracies), max(accuracies)):
        assert f'{number:.2f}' in rows[0], (number, rows[0])
    cells = [cell.strip() for cell in rows[0].split('|')]
    assert str(n) in cells


STUDIES = sorted(path.stem for path in (ROOT / 'studies').glob('*.yaml'))


@pytest.mark.parametrize('name', STUDIES)
def test_studies_stand_in_the_readme_as_their_logs_say(name, tmp_path):
    study = tools.study.read(ROOT / 'studies' / f'{name}.yaml')
    folder, readme = REFERENCE / f'study-{name}', (ROOT / 'README.md').read_text()
    if not (folder / 'table.csv').exists():  # not run to its end: no table, no claim
        assert f'`studies/{name}.yaml`:' not in readme
        return
    runs = all_runs(study, study['seeds'], study['dataset'], folder)
    for one in runs:
        assert one.is_done(), one.folder
        for start in json.loads((one.folder / 'run.json').read_text()):
            assert start['commit'] and 'dirty' not in start['commit']
            assert f'--seed {one.seed} ' in start['command'] and '--holdout' not in start['command']
    rows = collect(study, runs)
    write_tables(study, rows, study['dataset'], tmp_path)
    for table in ('table.csv', 'table.md'):
        assert (folder / table).read_text() == (tmp_path / table).read_text(), (
            f'make it anew: python -m tools.study studies/{name}.yaml --table'
        )
    assert all(row['n'] + row['diverged'] == len(study['seeds']) for row in rows)

    table = [
        line for line in (folder / 'table.md').read_text().splitlines() if line.startswith('|')
    ]
    assert len(table) == 2 + len(rows) and '\n'.join(table) in readme
    for row, line in zip(rows, table[2:]):
        for number in ('error', 'least', 'most', 'train_error'):
            assert row[number] is None or f' {row[number]:.2f} ' in line
    assert ' '.join(study['note'].split()) in ' '.join(readme.split())
    assert (folder / 'figure.png').stat().st_size > 10_000 and '</svg>' in (
        folder / 'figure.svg'
    ).read_text()
