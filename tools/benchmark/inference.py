"""Benchmark of inference with images of 224 x 224."""

from tools.benchmark.report import RATIO_LEGEND, SPEED_COLUMNS, Report
from tools.benchmark.timing import compare_contestants

LEGEND = (
    '*folded* is a folded DiracNet, *unfolded* the same network before folding. *textbook* '
    'computes the formula layer by layer, in the default memory layout. *ResNet* is '
    "torchvision's of the same depth, with its batch norms folded. *int8* is the file that "
    'tools.export writes, here with random weights. A folded RepVGG is the network that a folded '
    f'DiracNet is. {RATIO_LEGEND}'
)
# The others are compared with the first of a group.
GROUPS = {
    'PyTorch': ('folded', 'unfolded', 'textbook inference', 'ResNet'),
    'PyTorch, bfloat16': ('folded bfloat16', 'folded', 'ResNet bfloat16'),
    'ONNX Runtime': ('folded ONNX', 'ResNet ONNX'),
    'ONNX Runtime, int8': ('folded int8', 'folded ONNX'),
}
GOALS = {  # at most this ratio
    'PyTorch': {'unfolded': 0.7, 'textbook inference': 0.7, 'ResNet': 1.0},
    'PyTorch, bfloat16': {'ResNet bfloat16': 1.0},
    'ONNX Runtime': {'ResNet ONNX': 1.0},
    'ONNX Runtime, int8': {'folded ONNX': 0.556},  # 1.8 times as fast
}


def bench_inference(args):
    report = Report('Inference', SPEED_COLUMNS, LEGEND)
    for depth in (18, 34):
        for batch in (1, 16):
            for group, kinds in GROUPS.items():
                compare_contestants(
                    report,
                    f'inference of {depth} layers, 224 x 224, batch {batch}, {group}, ms',
                    kinds,
                    (depth, 1, 'ImageNet'),
                    batch,
                    args.rounds * (8 if batch == 1 else 2),
                    GOALS[group],
                )
    return report
