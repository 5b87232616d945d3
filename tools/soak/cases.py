"""What the soak trains, and the means to disturb it."""

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lab.data.readers import read_digits
from lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DISK = 4_000_000  # bytes: a checkpoint has 0.6 million, and a run keeps three for a moment


@dataclass(frozen=True)
class Case:
    """A training, and what is done to it."""

    command: str  # what follows `python`; DATA is the folder of images
    kills_any: bool = False  # of its processes, not the first alone
    fills_disk: bool = False

    def start(self, folder, minutes):
        """A process that starts or resumes the run in a folder."""
        command = self.command.replace('DATA', str(folder.parent.parent / 'data'))
        flags = ['--save', str(folder), '--resume', 'auto', '--checkpoint_minutes', minutes]
        return subprocess.Popen(
            [sys.executable, *command.split(), *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train_undisturbed(self, folder):
        """Train to the end. Returns the seconds that it took. Raises UserError if it fails."""
        began = time.monotonic()
        process = self.start(folder, '10')
        _, err = process.communicate()
        if process.returncode != 0:
            raise UserError(f'{self.command} ended with status {process.returncode}: {err[-300:]}')
        return time.monotonic() - began


DIGITS = (
    'train.py --dataset digits --depth 10 --epochs 60 --epoch_step [30,50] --randomcrop_pad 1 '
    '--device cpu'
)
CASES = {
    'one': Case(DIGITS),
    'processes': Case(
        f'-m torch.distributed.run --standalone --nproc_per_node=2 {DIGITS}', kills_any=True
    ),
    'images': Case(
        'train.py --dataset folder --dataroot DATA --depth 18 --width 0.25 --image_size 64 '
        '--batch_size 20 --epochs 12 --epoch_step [8,11] --nthread 2 --device cpu',
        kills_any=True,
    ),
    'disk': Case(DIGITS, fills_disk=True),
}


def write_images(root, n=20):
    """Write n training and n test images of each digit as PNG files."""
    import cv2

    train, test, classes = read_digits('digits', root, download=False)
    for part, (images, targets) in (('train', train), ('val', test)):
        for number, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i, image in enumerate(images[targets == number][:n].numpy()):
                cv2.imwrite(str(folder / f'{i}.png'), cv2.resize(image, (72, 72)))


@contextlib.contextmanager
def small_disk(folder):
    """Mount a file system of DISK bytes. Raises UserError without the right to."""
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={DISK}', 'none', folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise UserError(f'a small disk cannot be mounted ({mounted.stderr.strip()}): run as root')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def family(pid):
    """The ids of a process and of all that it started, their own processes included (Linux)."""
    try:
        children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:  # it has ended
        return [pid]
    return [pid, *(member for child in children for member in family(int(child)))]
