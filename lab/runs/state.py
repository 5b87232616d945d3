"""What training changes, and a checkpoint restores."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from diracnet import Network
from diracparams import copy_tensors
from lab.runs.checkpoint import refusing
from lab.training.network import Averages
from lab.training.passes import Meters


@dataclass
class State:
    module: Network
    optimizer: Optimizer
    scaler: torch.amp.GradScaler  # of the loss; it does nothing unless --dtype half
    averages: Averages
    meters: Meters  # of the current pass

    def content(self):
        """What a checkpoint has of it; the meters belong to the progress of a pass."""
        content = {
            'params': stored_params(self.module),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
        }
        for _, averaged in self.averages.tested:
            content['ema'] = stored_params(averaged)
        return content

    def restore(self, checkpoint):
        """Go back to a checkpoint. From a file that is not a run, only the params are taken; the
        optimizer keeps its own settings. Raises UserError if the state does not fit."""
        with refusing(checkpoint.path):
            copy_tensors(checkpoint.params, self.module)
            if not checkpoint.is_run:
                return
            for _, averaged in self.averages.tested:
                copy_tensors(checkpoint.ema, averaged)
                self.averages.model.n_averaged.fill_(1)  # more than 0: there have been some
            settings = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**settings, 'state': checkpoint.optimizer['state']})
            self.scaler.load_state_dict(checkpoint.scaler)
            if checkpoint.progress:
                self.meters.load_state(checkpoint.progress['tally'])


def stored_params(module):
    """The params of a diracnet.Network as a checkpoint has them."""
    return {key: tensor.detach().cpu().contiguous() for key, tensor in module.params().items()}
