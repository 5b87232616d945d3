"""Benchmark of inference with images of 224 x 224."""

from tools.benchmark.report import RATIO_LEGEND, SPEED_COLUMNS, Report
from tools.benchmark.timing import compare_contestants

LEGEND = (
    '*folded* is a folded DiracNet, *unfolded* the same network before folding. *textbook* '
    'computes the formula layer by layer, in the default memory layout. *ResNet* is '
    "torchvision's of the same depth, with its batch norms folded. "
    f'{RATIO_LEGEND}'
)
KINDS = {
    'PyTorch': ('folded', 'unfolded', 'textbook inference', 'ResNet'),
    'ONNX Runtime': ('folded ONNX', 'ResNet ONNX'),
}
GOALS = {
    18: {'unfolded': 0.7, 'textbook inference': 0.7, 'ResNet': 1.0, 'ResNet ONNX': 1.0},
    34: {'ResNet': 0.95, 'ResNet ONNX': 0.95},
}


def bench_inference(args):
    report = Report('Inference', SPEED_COLUMNS, LEGEND)
    for depth, goals in GOALS.items():
        for batch in (1, 16):
            for runtime, kinds in KINDS.items():
                compare_contestants(
                    report,
                    f'inference of {depth} layers, 224 x 224, batch {batch}, {runtime}, ms',
                    kinds,
                    (depth, 1, 'ImageNet'),
                    batch,
                    args.rounds * (8 if batch == 1 else 2),
                    goals,
                )
    return report
