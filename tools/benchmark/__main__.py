"""Measure speed and memory against reference implementations.

    python -m tools.benchmark data --out logs/reference/benchmark-data

prints a table and writes OUT.md and, with all samples, OUT.json. Run it alone on the machine:
other programs disturb the numbers.

    data        input pipelines against torchvision's transforms in a DataLoader; their memory
    train       training steps and epochs against a textbook network, plain weights, bare
                convolutions and ResNets; peak memory
    inference   folded networks against unfolded ones and torchvision's ResNets, in PyTorch and
                ONNX Runtime
    depth       time and memory of a training step at several depths; also writes OUT.png
    start       time from the command to the first training step
    compile     cost and gain of --compile
    cuda        whether everything works on a CUDA GPU, and how fast; at most 8 minutes
"""

from pathlib import Path

from lab.errors import OneLineParser, OptionError, run
from tools.benchmark import parts
from tools.benchmark.cuda import bench_cuda

BENCHMARKS = {
    'data': parts.bench_data,
    'train': parts.bench_training,
    'compile': parts.bench_compile,
    'inference': parts.bench_inference,
    'depth': parts.bench_depth,
    'start': parts.bench_start,
    'cuda': bench_cuda,
}


def main(arguments=None):
    parser = OneLineParser(prog='-m tools.benchmark', description=__doc__)
    parser.add_argument('what', choices=BENCHMARKS)
    parser.add_argument(
        '--rounds', type=int, default=7, help='repetitions of each measurement (default 7)'
    )
    parser.add_argument(
        '--images', type=int, default=1024, help='JPEGs each in train/ and val/ (default 1024)'
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='for cuda (default cuda)')
    parser.add_argument(
        '--quick', action='store_true', help='least sizes and repetitions, to try the program'
    )
    parser.add_argument('--out', type=Path, metavar='OUT', help='write OUT.md and OUT.json')
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.images = 3, 32
    if args.rounds < 3 or args.images < 1:
        raise OptionError('--rounds must be at least 3, and --images at least 1')
    report = BENCHMARKS[args.what](args)
    print(report.markdown())
    if args.out:
        report.write(args.out)
    return 1 if report.failures else 0


if __name__ == '__main__':
    run(main, 'tools.benchmark')
