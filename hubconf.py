"""Entry points for torch.hub: torch.hub.load(REPOSITORY, 'diracnet18', pretrained=True)."""

from diracnet import diracnet as diracnet
from diracnet import diracnet18 as diracnet18
from diracnet import diracnet34 as diracnet34

dependencies = ['torch']
