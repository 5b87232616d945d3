"""The options of train.py about the run's folder, and about devices and processes."""

from lab.files import path_argument
from lab.training.option import Option
from lab.training.option_types import number

MOST_PROCESSES = 1024

RUNS = (
    Option(
        'save',
        'folder of the run; train.py creates it (default logs/DATASET-MODEL-DEPTH-WIDTH-TIME)',
        type=path_argument,
        metavar='DIR',
        free_on_resume=True,
    ),
    Option(
        'resume',
        'resume the run in this folder, or with this model.pt7, with its options; auto: the run in '
        'the --save folder, if there is one',
        type=path_argument,
        metavar='RUN',
        free_on_resume=True,
    ),
    Option(
        'checkpoint_minutes',
        'also save within an epoch, every M minutes',
        10,
        type=number(float, 0),
        metavar='M',
        free_on_resume=True,
    ),
    Option(
        'evaluate',
        "test a run's folder, model.pt7 or state dict, and exit",
        type=path_argument,
        metavar='CHECKPOINT',
    ),
    Option(
        'report',
        "at the end, write a page about the network to report.html in the run's folder",
        False,
        type=bool,
        free_on_resume=True,
    ),
    Option(
        'tensorboard',
        "also write each epoch's numbers for TensorBoard to the run's folder",
        False,
        type=bool,
        free_on_resume=True,
    ),
)
DEVICE = (
    Option(
        'device',
        'cpu, cuda, cuda:1, ... (default cuda if available, else cpu)',
        free_on_resume=True,
        bound_to_machine=True,
    ),
    Option('cuda', 'same as --device cuda', type=bool, free_on_resume=True, bound_to_machine=True),
    Option(
        'gpu_id', 'number of the CUDA device to use', free_on_resume=True, bound_to_machine=True
    ),
    Option(
        'ngpu',
        'processes on this machine that share each batch, each with a GPU (or all on the CPU); '
        'short for torchrun --nproc_per_node=N',
        1,
        type=number(int, 1, most=MOST_PROCESSES),
        metavar='N',
        free_on_resume=True,
        bound_to_machine=True,
    ),
    Option(
        'sync_bn',
        'compute batch statistics over all processes instead of within each',
        False,
        type=bool,
    ),
)
