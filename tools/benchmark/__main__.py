"""Measure speed and memory, against reference implementations.

    python -m tools.benchmark train --out logs/reference/benchmark-train

prints a table and writes OUT.md and, with all samples, OUT.json. Run it alone on the machine:
other programs disturb the numbers.

    data        rates and memory of the input pipelines
    train       time and memory of training steps: against a textbook network, plain weights and
                ResNets; with --recompute and --dtype bfloat16
    inference   folded networks against unfolded ones and torchvision's ResNets, in PyTorch and
                ONNX Runtime, and in int8
    depth       time and memory of a training step at several depths
    cuda        whether everything works on a CUDA GPU, and how fast; at most 8 minutes
"""

from functools import partial
from pathlib import Path

from lab.errors import OneLineParser, OptionError, run
from tools.benchmark import parts
from tools.benchmark.cuda import bench_cuda

BENCHMARKS = {
    'data': parts.bench_data,
    'train': partial(parts.bench_steps, 'Training', parts.TRAINING),
    'inference': partial(parts.bench_steps, 'Inference', parts.INFERENCE),
    'depth': partial(parts.bench_steps, 'Cost over depth', parts.DEPTH),
    'cuda': bench_cuda,
}


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.benchmark', description=__doc__)
    parser.add_argument('what', choices=BENCHMARKS)
    parser.add_argument(
        '--rounds', type=int, default=7, help='repetitions of each measurement (default 7)'
    )
    parser.add_argument(
        '--device', choices=('cpu', 'cuda'), default='cuda', help='for cuda (default cuda)'
    )
    parser.add_argument(
        '--quick', action='store_true', help='least sizes and repetitions, to try the program'
    )
    parser.add_argument('--out', type=Path, metavar='OUT', help='write OUT.md and OUT.json')
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds = 3
    if args.rounds < 3:
        raise OptionError('--rounds must be at least 3')
    report = BENCHMARKS[args.what](args)
    print(report.markdown())
    if args.out:
        report.write(args.out)
    return 1 if report.failures else 0


if __name__ == '__main__':
    run(main, 'tools.benchmark')
