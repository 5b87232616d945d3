"""Unit tests of the Dirac layers, the network definitions and their folding, in under a minute:

    python test.py

They run on the CPU and on CUDA if it is available. Slower and wider tests: python -m pytest.
"""

import math
import unittest

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, dirac_weight
from diracnet import DiracNet, define_diracnet, diracnet18, diracnet34, fold, infer_architecture
from lab import cuda
from lab.models.plain import define_plain
from tools.benchmark.references import textbook, with_deltas

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
LAYERS = {1: DiracConv1d, 2: DiracConv2d, 3: DiracConv3d}  # by their number of dimensions
CASES = [  # dimensions, input size, arguments of the layer
    (1, 9, (4, 4, 3), {}),
    (1, 9, (4, 6, 3, 2, 1, 1, 2, False), {}),
    (2, 8, (4, 4, 3), {'padding': 'same'}),
    (2, 8, (4, 4, 3, 1, 'same'), {'padding_mode': 'reflect', 'dilation': 2}),
    (2, 8, (6, 3, (3, 5)), {'padding': (1, 2), 'stride': (1, 2), 'bias': False}),
    (2, 8, (4, 8, 3), {'groups': 4, 'padding': 1, 'padding_mode': 'circular'}),
    (2, 8, (4, 4, 4), {'padding': 'valid'}),
    (3, 5, (3, 5, 3), {'padding': 1, 'padding_mode': 'replicate'}),
    (3, 6, (4, 4, (1, 3, 3), 2), {'groups': 2}),
]


def setUpModule():
    if torch.cuda.is_available():
        cuda.set_up_for_equal_numbers()


def formula(weight, alpha, beta, groups=1):
    """W_hat = diag(alpha) I + diag(beta) W_norm in NumPy, entry by entry."""
    out, inside, *kernel = weight.shape
    result = np.zeros_like(weight)
    for i in range(out):
        norm = math.sqrt(float((weight[i] ** 2).sum()))
        if norm:
            result[i] = beta[i] * weight[i] / norm
        row = i % (out // groups)
        if row < inside:
            result[(i, row, *(size // 2 for size in kernel))] += alpha[i]
    return result


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def randomized(params, seed=0):
    """Give scales and batch norms other values than the initial ones, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in params.items():
        name = key.split('.')[-1]
        with torch.no_grad():
            if name in ('running_var', 'alpha', 'beta', 'weight') and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name in ('running_mean', 'bias'):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return params


def constants(params, *args):
    """Copies of params without gradients, on a device or in a type."""
    return {key: tensor.detach().to(*args) for key, tensor in params.items()}


def random_layer(kind, *args, **kwargs):
    layer = LAYERS[kind](*args, **kwargs)
    nn.init.normal_(layer.alpha)
    nn.init.normal_(layer.beta)
    return layer


def random_tensors(shape, device='cpu', requires_grad=False):
    """weight, alpha and beta in double precision."""
    kwargs = {'dtype': torch.double, 'device': device, 'requires_grad': requires_grad}
    return [torch.randn(s, **kwargs) for s in (shape, shape[0], shape[0])]


class TestDiracWeight(unittest.TestCase):
    def test_agrees_with_the_formula(self):
        for shape, groups in [
            ((5, 5, 3, 3), 1),
            ((7, 4, 3, 3), 1),
            ((4, 7, 3, 3), 1),
            ((6, 3, 5), 1),
            ((4, 5, 3, 1, 3), 1),
            ((3, 3, 2, 4), 1),
            ((6, 2, 3, 3), 3),
            ((8, 1, 3, 3), 8),
            ((4, 4, 1, 1), 2),
            ((6, 6, 3, 3), 2),
        ]:
            for device in DEVICES:
                with self.subTest(shape=shape, groups=groups, device=device):
                    tensors = random_tensors(shape, device)
                    expected = formula(*(tensor.cpu().numpy() for tensor in tensors), groups)
                    actual = dirac_weight(*tensors, groups).cpu().numpy()
                    np.testing.assert_allclose(actual, expected, atol=1e-14)

    def test_delta_is_the_identity_of_a_real_convolution(self):
        for kind, conv in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
            for channels, groups in ((4, 1), (6, 3)):
                x = torch.randn(2, channels, *[5] * kind, dtype=torch.double)
                weight = torch.randn(channels, channels // groups, *[3] * kind, dtype=torch.double)
                ones = torch.ones(channels, dtype=torch.double)
                identity = dirac_weight(weight, ones, 0 * ones, groups)
                self.assertTrue(torch.equal(conv(x, identity, padding=1, groups=groups), x))
                expected = nn.init.dirac_(torch.empty_like(identity), groups)
                self.assertTrue(torch.equal(identity, expected))

    def test_gradients(self):
        for device in DEVICES:
            for shape, groups in [
                ((3, 3, 3, 3), 1),
                ((4, 2, 3), 1),
                ((2, 4, 3, 3), 1),
                ((4, 2, 2, 2), 2),
            ]:
                tensors = random_tensors(shape, device, requires_grad=True)
                self.assertTrue(gradcheck(dirac_weight, (*tensors, groups)))
                self.assertTrue(gradgradcheck(dirac_weight, (*tensors, groups)))

    def test_scale_of_the_weight_does_not_matter(self):
        weight, alpha, beta = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(4)
        expected = dirac_weight(weight, alpha, beta)
        torch.testing.assert_close(dirac_weight(weight * 1e3, alpha, beta), expected)

    def test_zero_filter(self):
        for device in DEVICES:
            for dtype in (torch.half, torch.bfloat16, torch.float, torch.double):
                weight = torch.randn(4, 3, 3, 3, device=device).to(dtype)
                weight[1] = 0
                weight.requires_grad_()
                alpha, beta = (
                    torch.ones(4, dtype=dtype, device=device, requires_grad=True) for _ in range(2)
                )
                result = dirac_weight(weight, alpha, beta)
                result.float().square().sum().backward()
                for tensor in (result, weight.grad, alpha.grad, beta.grad):
                    self.assertTrue(tensor.isfinite().all())
                self.assertEqual(result[1].abs().sum(), 1)  # the delta alone


class TestLayers(unittest.TestCase):
    def test_computes_the_formula_and_folds(self):
        for device in DEVICES:
            for kind, size, args, kwargs in CASES:
                with self.subTest(kind=kind, args=args, kwargs=kwargs, device=device):
                    options = {**kwargs, 'device': device, 'dtype': torch.double}
                    layer = random_layer(kind, *args, **options)
                    plain_class = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[kind]
                    plain = plain_class(*args, **options)
                    tensors = (layer.weight, layer.alpha, layer.beta)
                    tensors = [tensor.detach().cpu().numpy() for tensor in tensors]
                    state = {'weight': torch.from_numpy(formula(*tensors, layer.groups))}
                    if layer.bias is not None:
                        state['bias'] = layer.bias
                    plain.load_state_dict(state)

                    x = torch.randn(2, args[0], *[size] * kind, device=device, dtype=torch.double)
                    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
                    folded = layer.fold()
                    self.assertIs(type(folded), plain_class)
                    self.assertEqual(repr(folded), repr(plain))
                    torch.testing.assert_close(folded(x), layer(x), rtol=1e-12, atol=1e-12)

    def test_starts_near_the_identity(self):
        torch.manual_seed(0)
        layer = DiracConv2d(8, 8, 3, padding=1, bias=False)
        self.assertTrue((layer.alpha == 1).all() and torch.allclose(layer.beta, torch.tensor(0.1)))
        x = torch.randn(2, 8, 6, 6)
        self.assertLess((layer(x) - x).norm() / x.norm(), 0.2)
        nn.init.zeros_(layer.alpha)
        layer.reset_parameters()
        self.assertTrue((layer.alpha == 1).all())

    def test_gradients(self):
        for kind, size, args, kwargs in CASES:
            layer = random_layer(kind, *args, **kwargs, dtype=torch.double)
            names = [name for name, _ in layer.named_parameters()]
            expected = {'weight', 'alpha', 'beta', *(['bias'] if layer.bias is not None else [])}
            self.assertEqual(set(names), expected)

            def function(x, *tensors, layer=layer, names=names):
                return torch.func.functional_call(layer, dict(zip(names, tensors)), (x,)).sum(0)

            x = torch.randn(1, args[0], *[size] * kind, dtype=torch.double, requires_grad=True)
            self.assertTrue(gradcheck(function, (x, *layer.parameters()), fast_mode=True))


class TestDefinitions(unittest.TestCase):
    def test_parameter_counts(self):
        for depth, width, dataset, expected in [
            (18, 1, 'ImageNet', 11_523_368),
            (34, 1, 'ImageNet', 21_638_952),
            (16, 1, 'CIFAR10', 173_402),
            (34, 1, 'CIFAR10', 466_394),
            (34, 2, 'CIFAR10', 1_854_378),
            (28, 5, 'CIFAR10', 9_124_250),
            (28, 10, 'CIFAR10', 36_450_090),
            (28, 10, 'CIFAR100', 36_507_780),
        ]:
            _, params = define_diracnet(depth, width, dataset)
            self.assertEqual(sum(t.numel() for t in params.values() if t.requires_grad), expected)

    def test_form(self):
        """The form of CIFAR's networks for a folder of small images, whole and folded."""
        form = {'form': 'cifar', 'num_classes': 10}
        f, params = define_diracnet(34, 2, 'folder', **form)
        self.assertEqual(sum(t.numel() for t in params.values() if t.requires_grad), 1_854_378)
        params = randomized(params)
        x = torch.randn(2, 3, 32, 32)
        folded = DiracNet(34, 2, 'folder', **form).eval()
        folded.load_state_dict(fold(params))
        with torch.no_grad():
            self.assertLess(relative_error(folded(x), f(x, params, False)), 1e-4)
        with self.assertRaisesRegex(ValueError, 'vgg'):
            define_diracnet(34, 2, 'CIFAR10', form='vgg')

    def test_keys(self):
        f, params = define_diracnet(10, 1, 'CIFAR10')
        bn = ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var']
        expected = ['conv', *bn]
        for block in [f'group{g}.block{b}' for g in range(3) for b in range(2)]:
            expected += [f'{block}.{name}' for name in ('conv', 'alpha', 'beta', *bn)]
        self.assertEqual(list(params), [*expected, 'fc.weight', 'fc.bias'])
        for key, tensor in params.items():
            self.assertEqual(tensor.requires_grad, 'running' not in key, key)
            self.assertTrue(tensor.is_leaf)

    def test_initialization(self):
        torch.manual_seed(0)
        _, params = define_diracnet(34, 2, 'CIFAR10')
        values = {'alpha': 1, 'beta': 0.1, 'bias': 0, 'running_mean': 0, 'running_var': 1}
        for key, tensor in params.items():
            name = key.split('.')[-1]
            if name == 'conv' or key == 'fc.weight':
                ratio = tensor.std().item() * math.sqrt(tensor[0].numel() / 2)
                # n draws estimate a standard deviation within 5 / sqrt(2n), but once in millions.
                self.assertAlmostEqual(ratio, 1, delta=5 / math.sqrt(2 * tensor.numel()))
            elif key.endswith('bn.weight'):
                self.assertTrue(tensor.min() >= 0 and tensor.max() < 1 and tensor.std() > 0.15)
            else:
                self.assertTrue(torch.allclose(tensor, torch.tensor(float(values[name]))), key)

    def test_computes_what_the_paper_writes(self):
        for define, depth, width, dataset, size in [
            (define_diracnet, 10, 1, 'CIFAR10', 32),
            (define_diracnet, 22, 0.5, 'digits', 8),
            (define_plain, 16, 1, 'CIFAR100', 24),
            (define_diracnet, 18, 0.125, 'ImageNet', 64),
            (define_diracnet, 34, 0.125, 'ImageNet', 64),
            (define_plain, 18, 0.125, 'ImageNet', 64),
        ]:
            with self.subTest(depth=depth, dataset=dataset):
                f, params = define(depth, width, dataset)
                params = constants(randomized(params), torch.double)
                x = torch.randn(2, params['conv'].shape[1], size, size, dtype=torch.double)
                expected = textbook(x, with_deltas(params), False)
                self.assertLess(relative_error(f(x, params, False), expected), 1e-12)

    def test_training_mode_updates_running_statistics(self):
        f, params = define_diracnet(10, 1, 'CIFAR10')
        x = torch.randn(8, 3, 16, 16)
        stem = F.conv2d(x, params['conv'], padding=1).detach()
        before = {key: tensor.detach().clone() for key, tensor in params.items()}
        f(x, params, True).sum().backward()
        # Momentum 0.1 towards the batch's mean, and towards its unbiased variance.
        torch.testing.assert_close(params['bn.running_mean'], 0.1 * stem.mean((0, 2, 3)))
        variance = stem.transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(params['bn.running_var'], 0.9 + 0.1 * variance)
        for key, tensor in params.items():
            self.assertEqual(torch.equal(tensor, before[key]), 'running' not in key, key)
            self.assertEqual(tensor.grad is not None, 'running' not in key, key)
        frozen = {key: tensor.detach().clone() for key, tensor in params.items()}
        f(x, params, False)
        self.assertTrue(all(torch.equal(tensor, frozen[key]) for key, tensor in params.items()))

    def test_hundreds_of_layers(self):
        f, params = define_diracnet(304, 0.25, 'digits')
        self.assertEqual(sum(key.endswith('.conv') for key in params), 300)
        logits = f(torch.randn(2, 1, 8, 8), params, True)
        self.assertTrue(logits.isfinite().all() and logits.shape == (2, 10))

    def test_keyword_arguments(self):
        f, params = define_diracnet(16, 1.5, 'CIFAR10', num_classes=7, in_channels=2)
        self.assertEqual(f(torch.randn(2, 2, 32, 32), params, False).shape, (2, 7))
        self.assertEqual(params['group2.block0.conv'].shape, (96, 48, 3, 3))

    def test_impossible_networks(self):
        for args, kwargs, message in [
            ((20, 1, 'CIFAR10'), {}, r'depth 20 .* 6n \+ 4'),
            ((4, 1, 'digits'), {}, r'6n \+ 4'),
            ((-2, 1, 'SVHN'), {}, r'6n \+ 4'),
            ((50, 1, 'ImageNet'), {}, 'depth 50 .* 18 or 34'),
            ((16, 0, 'CIFAR10'), {}, 'width 0'),
            ((16, 0.05, 'CIFAR10'), {}, 'width 0.05'),
            ((16, math.nan, 'CIFAR10'), {}, 'width nan'),
            ((16, 1, 'MNIST'), {}, 'MNIST.*digits, FashionMNIST, CIFAR10'),
            ((16.5, 1, 'CIFAR10'), {}, 'depth 16.5'),
            ((16, 1, 'CIFAR10'), {'num_classes': 0}, 'num_classes 0'),
            ((16, 1, 'CIFAR10'), {'in_channels': -1}, 'in_channels -1'),
        ]:
            for define in (define_diracnet, define_plain, DiracNet):
                with self.assertRaisesRegex(ValueError, message):
                    define(*args, **kwargs)


class TestFolding(unittest.TestCase):
    def test_fold_equals_the_unfolded(self):
        for device in DEVICES:
            for define, depth, width, dataset, size, kwargs in [
                (define_diracnet, 16, 1, 'CIFAR10', 32, {}),
                (define_diracnet, 34, 0.7, 'CIFAR100', 20, {}),
                (define_diracnet, 100, 1, 'digits', 8, {}),
                (define_plain, 22, 1, 'digits', 9, {}),
                (define_diracnet, 10, 1, 'SVHN', 17, {'num_classes': 3, 'in_channels': 5}),
                (define_diracnet, 18, 1, 'ImageNet', 96, {}),
                (define_diracnet, 34, 0.3, 'ImageNet', 75, {'num_classes': 12}),
            ]:
                with self.subTest(depth=depth, width=width, dataset=dataset, device=device):
                    f, params = define(depth, width, dataset, **kwargs)
                    params = constants(randomized(params), device)
                    x = torch.randn(2, params['conv'].shape[1], size, size, device=device)
                    net = DiracNet(depth, width, dataset, **kwargs).to(device)
                    net.load_state_dict(fold(params))
                    self.assertLess(relative_error(net(x), f(x, params, False)), 1e-5)
                    again = DiracNet.from_state_dict(fold(params)).to(device)
                    self.assertTrue(torch.equal(again(x), net(x)))

    def test_fold_is_exact_in_double(self):
        f, params = define_diracnet(28, 1, 'CIFAR10')
        params = constants(randomized(params), torch.double)
        x = torch.randn(2, 3, 32, 32, dtype=torch.double)
        folded = DiracNet.from_state_dict(fold(params)).double()
        self.assertLess(relative_error(folded(x), f(x, params, False)), 1e-12)

    def test_fold_does_not_change_its_argument(self):
        _, params = define_diracnet(10, 1, 'digits')
        before = {key: tensor.detach().clone() for key, tensor in params.items()}
        folded = fold(params)
        folded['fc.weight'].zero_()
        for key, tensor in params.items():
            self.assertTrue(torch.equal(tensor, before[key]))
        self.assertFalse(any(tensor.requires_grad for tensor in folded.values()))

    def test_folded_diracnet18(self):
        net = diracnet18()
        self.assertEqual(sum(tensor.numel() for tensor in net.parameters()), 11_511_784)
        names = [name for name, module in net.named_modules() if not list(module.children())]
        expected = ['features.conv', 'features.max_pool0']
        for g in range(4):
            expected += [f'features.max_pool{g}'] * (g > 0)
            for b in range(4):
                block = f'features.group{g}.block{b}'
                expected += [f'{block}.relu', f'{block}.conv']
        self.assertEqual(names, [*expected, 'features.last_relu', 'features.avg_pool', 'fc'])

        convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
        shapes = [
            (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.bias is not None)
            for m in convs
        ]
        self.assertEqual(shapes[0], (3, 64, (7, 7), (2, 2), (3, 3), True))
        channels = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
        expected = [(i, o, (3, 3), (1, 1), (1, 1), True) for i, o in zip(channels, channels[1:])]
        self.assertEqual(shapes[1:], expected)
        self.assertEqual(net(torch.randn(1, 3, 224, 224)).shape, (1, 1000))
        self.assertEqual(set(net.state_dict()), set(fold(define_diracnet(18, 1, 'ImageNet')[1])))

    def test_folded_diracnet34(self):
        net = diracnet34(num_classes=5, in_channels=1)
        self.assertEqual(net(torch.randn(1, 1, 64, 64)).shape, (1, 5))
        self.assertEqual([len(getattr(net.features, f'group{g}')) for g in range(4)], [6, 8, 12, 6])

    def test_refuses_other_networks(self):
        _, params = define_diracnet(10, 1, 'digits')
        for change in (
            lambda p: p.pop('conv'),
            lambda p: p.pop('group1.block0.conv'),
            lambda p: p.update({'group2.block0.conv': torch.zeros(64, 31, 3, 3)}),
            lambda p: p.pop('group0.block1.bn.bias'),
            lambda p: p.clear(),
        ):
            broken = dict(params)
            change(broken)
            with self.assertRaisesRegex(ValueError, 'not the parameters of a DiracNet'):
                fold(broken)

    def test_infer_architecture(self):
        small = [(16, 1, 'CIFAR10'), (34, 0.7, 'SVHN'), (28, 10, 'CIFAR100')]
        for args in [*small, (18, 0.75, 'ImageNet'), (34, 1, 'ImageNet')]:
            f, params = define_diracnet(*args)
            for tensors in (params, fold(params)):
                self.assertEqual(infer_architecture(tensors).groups, f.args[0].groups)
                self.assertEqual(infer_architecture(tensors).depth, args[0])


if __name__ == '__main__':
    unittest.main()
