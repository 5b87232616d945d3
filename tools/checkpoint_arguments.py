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
    add_dataset(parser, 'CHECKPOINT')
    parser.add_argument('--ema', action='store_true', help="take train.py's moving averages")


def add_dataset(parser, checkpoint):
    """Add --dataset, for a checkpoint that the help calls so."""
    parser.add_argument(
        '--dataset', choices=PREPROCESSING, help=f'the data set, if {checkpoint} does not record it'
    )


def load_checkpoint(args):
    """The Checkpoint that these arguments choose. Raises UserError."""
    loaded = checkpoint.load(args.checkpoint)
    return loaded.averaged() if args.ema else loaded
