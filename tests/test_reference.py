"""The README's numbers are those of the committed runs."""
import json
import statistics

import pytest

from conftest import ROOT, read_log

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
        assert command['commit'] and 'dirty' not in command['commit'] and f'--seed {line["seed"]}' in command['command']
    accuracies = [line['test_acc'] for line in last]
    assert least <= statistics.median(accuracies) <= most
    rows = [row for row in (ROOT / 'README.md').read_text().splitlines() if f'`{name}-seed' in row]
    assert len(rows) == 1
    for number in (statistics.median(accuracies), min(accuracies), max(accuracies)):
        assert f'{number:.2f}' in rows[0], (number, rows[0])
    cells = [cell.strip() for cell in rows[0].split('|')]
    assert str(n) in cells
