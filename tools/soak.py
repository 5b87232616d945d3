"""Kill training runs at random, again and again, and see that they end as an undisturbed one does, to the bit.

    python -m tools.soak --kills 200 --jobs 2 --out logs/reference/soak.md         # a quarter of an hour on two cores

Each run trains a DiracNet-10-1 on digits with `--resume auto`, is killed at a random moment (mostly SIGKILL, some SIGTERM and SIGINT), and is
started again until it is done; then the next run begins. After some kills the newest checkpoint is cut or one of its bits is flipped.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import plot

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [
    'train.py',
    '--dataset',
    'digits',
    '--depth',
    '10',
    '--epochs',
    '60',
    '--epoch_step',
    '[30,50]',
    '--randomcrop_pad',
    '1',
    '--device',
    'cpu',
]
MINUTES = (
    '0',
    '0.005',
    '10',
)  # between checkpoints: every step, every 0.3 s, at ends of epochs alone
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]


def start(folder, minutes):
    return subprocess.Popen(
        [
            sys.executable,
            *COMMAND,
            '--save',
            str(folder),
            '--resume',
            'auto',
            '--checkpoint_minutes',
            minutes,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log_of(folder):
    """What log.txt says, but for times and what was not the same on all command lines."""
    path = folder / 'log.txt'
    lines = plot.read_log(path) if path.exists() and path.stat().st_size else []
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith('_time') and key not in ('save', 'checkpoint_minutes')
        }
        for line in lines
    ]


def different(left, right):
    """What is not the same, to the bit, in two finished runs: names of tensors, or of the log."""
    import torch

    contents = [torch.load(folder / 'model.pt7', weights_only=True) for folder in (left, right)]
    flat = [
        {
            **content['params'],
            **{
                f'momentum {i}': state['momentum_buffer']
                for i, state in content['optimizer']['state'].items()
            },
        }
        for content in contents
    ]
    found = [
        key
        for key in {**flat[0], **flat[1]}
        if key not in flat[0] or key not in flat[1] or not torch.equal(flat[0][key], flat[1][key])
    ]
    return found + (['log.txt'] if log_of(left) != log_of(right) else [])


def damage(path, chance):
    """Cut a file, or flip one bit of its tensors (a bit elsewhere may be of no consequence)."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
        kind = 'cut'
    else:
        import torch

        tensors = torch.load(path, weights_only=True)['params']
        place = content.find(
            max(tensors.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
        )
        content[place + chance.randrange(1000)] ^= 1 << chance.randrange(8)
        kind = 'bit flipped'
    path.write_bytes(content)
    return kind


def undisturbed(folder):
    """How long such a run takes."""
    began = time.monotonic()
    process = start(folder, '10')
    _, err = process.communicate()
    assert process.returncode == 0, err
    return time.monotonic() - began


def soak(kills, seed, work, reference, whole):
    """Runs until so many kills are done: counts, faults, and (lives, differences) of each run."""
    from lab.runs import checkpoint

    chance, counts, faults, runs = random.Random(seed), collections.Counter(), [], []
    work.mkdir()
    expected = log_of(reference)
    while counts['kills'] < kills:
        folder, lives, place = work / f'run{len(runs)}', 0, (0, 0)
        while True:
            lives += 1
            born = time.monotonic()
            process = start(folder, chance.choice(MINUTES))
            try:
                out, err = process.communicate(timeout=chance.uniform(0, 0.7 * whole))
            except subprocess.TimeoutExpired:
                number = chance.choice(SIGNALS)
                process.send_signal(number)
                out, err = process.communicate()
                counts['kills'] += 1
                counts[signal.Signals(number).name] += 1
                allowed = (
                    -number,
                    128 + number,
                )  # before its training, a process has Python's own handlers
                if process.returncode not in allowed:
                    faults.append(
                        f'run {len(runs)}, life {lives}: exit status {process.returncode} after {signal.Signals(number).name}: {err[-300:]}'
                    )
            else:
                if process.returncode != 0:
                    faults.append(
                        f'run {len(runs)}, life {lives}: exit status {process.returncode}: {err[-300:]}'
                    )
                if lives == 1:  # nobody disturbed it: how long that takes now
                    whole = time.monotonic() - born
                break
            counts['given way to the checkpoint before'] += 'is used, which' in err
            log = log_of(folder)
            if log != expected[: len(log)]:
                faults.append(
                    f'run {len(runs)}, life {lives}: log.txt is not the beginning of the undisturbed one'
                )
            if (folder / 'model.pt7').exists() or (folder / 'previous.pt7').exists():
                try:
                    found = checkpoint.load(folder)
                except checkpoint.UserError as error:
                    faults.append(f'run {len(runs)}, life {lives}: {error}')
                    continue
                now = found.epoch, found.progress['step'] if found.progress else 0
                counts[
                    'killed without progress since the kill before'
                    if now == place
                    else 'killed with progress'
                ] += 1
                if now < place:
                    faults.append(f'run {len(runs)}, life {lives}: at {now} after {place}')
                place = now
                # Not twice in a row: a newest checkpoint that is damaged already is not the one that was loaded.
                if (
                    chance.random() < 0.15
                    and found.path.name == 'model.pt7'
                    and all((folder / name).exists() for name in ('model.pt7', 'previous.pt7'))
                ):
                    counts[f'newest checkpoint {damage(folder / "model.pt7", chance)}'] += 1
                    found = checkpoint.load(folder)
                    place = found.epoch, found.progress['step'] if found.progress else 0
            else:
                counts['killed before a first checkpoint'] += 1
        wrong = different(reference, folder)
        runs.append((lives, wrong))
        faults += (
            [f'run {len(runs) - 1}: {", ".join(wrong[:5])} differ from the undisturbed run']
            if wrong
            else []
        )
        print(
            f'seed {seed}, run {len(runs)}: {lives} lives, {"the same to the bit" if not wrong else f"{len(wrong)} differences"}; {counts["kills"]} kills',
            flush=True,
        )
        shutil.rmtree(folder)
    return counts, faults, runs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0, help='of the moments, signals and damages')
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='of such at once, each with its part of the kills and a seed of its own',
    )
    parser.add_argument('--out', type=Path, help='Markdown file for the summary')
    args = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(args.jobs) as pool:
        reference = Path(work) / 'reference'
        whole = undisturbed(reference)
        futures = [
            pool.submit(
                soak,
                -(-args.kills // args.jobs),
                args.seed + job,
                Path(work) / str(job),
                reference,
                whole,
            )
            for job in range(args.jobs)
        ]
        parts = [future.result() for future in futures]
    counts = sum((part[0] for part in parts), collections.Counter())
    faults, runs = (sum((part[i] for part in parts), []) for i in (1, 2))
    seconds = time.monotonic() - began
    import torch

    lines = [
        '# Kills at random',
        '',
        f'`python -m tools.soak --kills {args.kills} --seed {args.seed} --jobs {args.jobs}`, torch {torch.__version__}, '
        f'{os.environ["OMP_NUM_THREADS"]} thread, {seconds / 60:.0f} minutes.',
        '',
        f'Each run: `python {" ".join(COMMAND)} --resume auto`, with `--checkpoint_minutes` {", ".join(MINUTES)} by chance in each life.',
        '',
        '| what | how often |',
        '| --- | --- |',
        *(f'| {name} | {n} |' for name, n in sorted(counts.items(), key=lambda item: -item[1])),
        f'| runs that came to their end | {len(runs)} |',
        f'| of them the same as the undisturbed one to the bit (parameters, running statistics, '
        f'momentum, log but for times) | {sum(not wrong for _, wrong in runs)} |',
        f'| most lives of a run | {max(lives for lives, _ in runs)} |',
        f'| faults | {len(faults)} |',
        '',
        *(f'- {fault}' for fault in faults),
    ]
    text = '\n'.join(lines).rstrip() + '\n'
    print(text)
    if args.out:
        args.out.write_text(text)
    sys.exit(bool(faults))


if __name__ == '__main__':
    main()
