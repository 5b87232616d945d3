"""The numbers of a run for TensorBoard."""

from lab.errors import UserError


def write_events(folder, stats):
    """Write loss, accuracies and times of an epoch to a run's folder.

    Raises:
        UserError: TensorBoard is not installed.
        OSError: the folder cannot be written to.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            '--tensorboard needs a package that is not installed: pip install tensorboard'
        ) from None
    # A new writer per epoch: purge_step hides what a killed run wrote after the epoch that it
    # resumes from.
    with SummaryWriter(str(folder), purge_step=stats['epoch']) as writer:
        for part in ('train', 'test'):
            for name in ('loss', 'acc', 'top5', 'time'):
                writer.add_scalar(f'{name}/{part}', stats[f'{part}_{name}'], stats['epoch'])
