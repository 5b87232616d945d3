"""tools.predict: from a run, from its exported file, and from bare state dicts."""

import json

import cv2
import numpy as np
import torch
from torchvision.models import ResNet18_Weights

from conftest import python
from diracnet import DiracNet
from lab.data.names import imagenet_names, readable
from tools import export, predict


def test_classifies_files(digits_run, digit_files, tmp_path, call):
    out, bare = tmp_path / 'new' / 'digits.pth', tmp_path / 'bare.pth'
    assert call(export.main, digits_run, out).status == 0
    torch.save(torch.load(out, weights_only=True)['state_dict'], bare)
    answers = []
    for path in (digits_run, digits_run / 'model.pt7', out, bare):
        options = ('--dataset', 'digits') if path == bare else ()
        result = call(predict.main, path, digit_files, '--json', *options)
        lines = [json.loads(line) for line in result.out.splitlines()]
        for line in lines:
            assert len(line['classes']) == len(line['probabilities']) == 5
            assert line['probabilities'] == sorted(line['probabilities'], reverse=True)
            assert sum(line['probabilities']) <= 1 + 1e-6
        answers.append([(line['image'], line['classes'][0]) for line in lines])
    assert len(answers[0]) == 40 and all(one == answers[0] for one in answers)
    # The test accuracy of the run is about 95 %.
    assert sum(image.endswith(f'-{label}.png') for image, label in answers[0]) >= 34


def test_text_output_and_enlarged_image(digits_run, digit_files, tmp_path):
    first = sorted(digit_files.iterdir())[0]
    image = cv2.resize(cv2.imread(str(first)), (80, 80), interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(tmp_path / 'large.png'), image)
    result = python('-m', 'tools.predict', digits_run, first, tmp_path / 'large.png', '--top', 2)
    assert result.status == 0, result.err
    small, large = result.out.splitlines()
    # Averaging over areas restores the pixels that were repeated.
    assert small.split(': ')[1] == large.split(': ')[1]
    assert small.split(': ')[1].startswith(first.stem[-1] + ' ') and small.count('%') == 2


def test_imagenet_form(photographs, tmp_path, call):
    net = DiracNet(18, 0.125, num_classes=1000)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    cv2.imwrite(str(tmp_path / 'photo.png'), photographs[0][:, :, ::-1])
    result = call(predict.main, tmp_path / 'net.pth', tmp_path / 'photo.png', '--json')
    line = json.loads(result.out)
    probabilities, names = line['probabilities'], line['classes']
    # By hand: the shorter side of 427 x 640 to 256, the longer truncated to 383, the center 224.
    image = cv2.resize(photographs[0], (383, 256), interpolation=cv2.INTER_CUBIC)[16:240, 79:303]
    pixels = (image / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    inputs = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]  # (1, 3, 224, 224)
    with torch.no_grad():
        expected, indices = net.eval()(inputs).softmax(1)[0].topk(5)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
    categories = ResNet18_Weights.DEFAULT.meta['categories']
    assert names == [categories[index] for index in indices]
    # Exports have the names, and WordNet's stand for them.
    assert call(export.main, tmp_path / 'net.pth', tmp_path / 'net.onnx').status == 0
    again = call(predict.main, tmp_path / 'net.onnx', tmp_path / 'photo.png', '--json')
    assert json.loads(again.out)['classes'] == names
    ids = list(imagenet_names())
    assert readable(ids, 1000) == categories and readable(ids[5:7], 2) == categories[5:7]
    assert readable([*ids[5:7], 'n00000001'], 3) == [*ids[5:7], 'n00000001']
    assert readable(['a', 'b'], 2) == ['a', 'b'] and readable(None, 10) is None
