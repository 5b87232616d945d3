"""Fold a trained network and write it for inference.

    python -m tools.export logs/RUN diracnet.pth

The .pth is a dict: `state_dict` (of diracnet.DiracNet), and what rebuilds it: `network` (depth, width, dataset, num_classes,
in_channels), `classes`, `preprocessing`. diracnet.DiracNet.from_state_dict makes the module.
"""
from pathlib import Path

import checkpoint
from errors import OneLineParser, OptionError, UserError, run


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.export', description=__doc__)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help="a run's folder, its model.pt7 or a state dict")
    parser.add_argument('out', metavar='OUT.pth', type=Path)
    parser.add_argument('--force', action='store_true', help='replace OUT if it exists')
    args = parser.parse_args(arguments)
    if args.out.suffix != '.pth':
        raise OptionError(f'{args.out} must end in .pth')
    if args.out.exists() and not args.force:
        raise OptionError(f'{args.out} exists; --force replaces it')
    found = checkpoint.load(args.checkpoint)
    net = found.fold()
    content = {'state_dict': net.state_dict(), 'network': found.network, 'classes': found.classes,
               'preprocessing': found.preprocessing}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(args.out, content)
    except OSError as error:
        raise UserError(f'{args.out} can not be written ({error.strerror})') from None
    print(f'{args.out}: {sum(tensor.numel() for tensor in net.parameters()):,} parameters')


if __name__ == '__main__':
    run(main, 'tools.export')
