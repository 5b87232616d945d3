"""Train the runs of a study, several at a time."""

import os
import shlex
import signal
import subprocess
import sys
import time
from statistics import median

from tqdm import tqdm

from lab.errors import UserError
from lab.files import make_folder
from lab.runs.folder import OUTPUT
from lab.runs.log import LOG, read_lines, seconds
from tools.study.runs import FAILED, ROOT

BAR = '{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} epochs, {remaining}{postfix}'
DIVERGED = 'the loss is'  # train.py's last line if the loss or a parameter is not finite


def execute(runs, jobs, device, minutes):
    """Train what is not done yet, `jobs` runs at a time, with one progress bar over all epochs.

    After `minutes`, trainings are stopped; they can be resumed. A run is not started if its own log
    or that of another seed says that it would not end in time.

    Raises:
        UserError: a training failed for a reason other than divergence.
    """
    deadline = time.monotonic() + 60 * minutes
    waiting = [one for one in runs if not one.is_done()]
    active = {}  # process: its run
    n_epochs = sum(one.n_epochs for one in runs)
    with tqdm(total=n_epochs, dynamic_ncols=True, bar_format=BAR, disable=None) as bar:
        try:
            while (waiting or active) and time.monotonic() < deadline:
                while waiting and len(active) < jobs:
                    one = waiting.pop(0)
                    if remaining(one) < deadline - time.monotonic():
                        active[start(one, device, jobs)] = one
                time.sleep(1)
                show_progress(bar, runs, active)
                for process in [process for process in active if process.poll() is not None]:
                    one = active.pop(process)
                    record_end(one, process.returncode, device)
                    if not one.is_done():
                        waiting.insert(0, one)
        except (KeyboardInterrupt, SystemExit):
            print('\nstopped; the same command resumes', file=sys.stderr)
            raise
        finally:
            stop(active)


def remaining(one):
    """The seconds that a run still takes, judged by the epochs of all its seeds; 0 if there are
    none yet."""
    logs = map(read_lines, one.folder.parent.glob(f'seed*/{LOG}'))
    times = [seconds(stats) for log in logs for _, stats in log if stats is not None]
    return (one.n_epochs - len(one.log())) * median(times) if times else 0


def start(one, device, jobs):
    """The process that trains a run to its next stop; it prints to a file in the run's folder."""
    try:
        make_folder(one.folder)
    except OSError as error:
        raise UserError(f'{one.folder} cannot be created ({error.strerror})') from None
    one.keep_checkpoint()  # in case an earlier process was killed just before doing so
    threads = {'OMP_NUM_THREADS': str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    environment = {**threads, **os.environ}
    with open(one.folder / OUTPUT, 'a') as output:
        return subprocess.Popen(
            one.command(device), cwd=ROOT, stdout=output, stderr=output, env=environment
        )


def show_progress(bar, runs, active):
    bar.n = sum(one.n_epochs if one.failed else len(one.log()) for one in runs)
    names = [f'{one.folder.parent.name}/{one.folder.name}' for one in active.values()]
    bar.set_postfix_str(', '.join(names), refresh=False)
    bar.refresh()


def record_end(one, status, device):
    """Keep the checkpoint of a run whose process has ended, or record that the run diverged."""
    if status == 0:
        one.keep_checkpoint()
        return
    lines = (one.folder / OUTPUT).read_text(errors='replace').splitlines()
    last = next((line for line in reversed(lines) if line.strip()), '')
    if DIVERGED not in last:
        command = shlex.join(one.command(device)[1:])
        raise UserError(f'{command} ended with status {status}: {last}')
    (one.folder / FAILED).write_text(last + '\n')


def stop(active):
    """End trainings with SIGTERM: they save first, and can be resumed."""
    for process in active:
        process.send_signal(signal.SIGTERM)
    for process in active:
        process.wait()
