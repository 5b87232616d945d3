"""The arguments of tools that fold a trained network."""

from lab.data.datasets import PREPROCESSING
from lab.files import path_argument
from lab.runs import checkpoint


def add_checkpoint(parser):
    """Add CHECKPOINT, --dataset and --ema to a parser."""
    parser.add_argument(
        'checkpoint',
        metavar='CHECKPOINT',
        type=path_argument,
        help='a run folder, its model.pt7 or a state dict',
    )
    parser.add_argument(
        '--dataset', choices=PREPROCESSING, help='the data set, if CHECKPOINT does not record it'
    )
    parser.add_argument('--ema', action='store_true', help="take train.py's moving averages")


def load_checkpoint(args):
    """The Checkpoint that these arguments choose. Raises UserError."""
    loaded = checkpoint.load(args.checkpoint)
    return loaded.averaged() if args.ema else loaded
