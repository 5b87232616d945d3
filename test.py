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

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, dirac_weight, textbook_dirac_weight
from diracnet import DiracNet, define_diracnet, diracnet18, fold
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
    return {key: tensor.detach().clone().to(*args) for key, tensor in params.items()}


def random_layer(kind, *args, **kwargs):
    layer = LAYERS[kind](*args, **kwargs)
    nn.init.normal_(layer.alpha)
    nn.init.normal_(layer.beta)
    return layer


def random_tensors(shape, device='cpu', requires_grad=False):
    """weight, alpha and beta in double precision."""
    kwargs = {'dtype': torch.double, 'device': device, 'requires_grad': requires_grad}
    return [torch.randn(s, **kwargs) for s in (shape, shape[0], shape[0])]


def count_learned(params):
    return sum(tensor.numel() for tensor in params.values() if tensor.requires_grad)


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
            ((4, 4, 1, 1), 2),
        ]:
            for device in DEVICES:
                for function in (dirac_weight, textbook_dirac_weight):
                    with self.subTest(shape=shape, groups=groups, device=device):
                        tensors = random_tensors(shape, device)
                        expected = formula(*(tensor.cpu().numpy() for tensor in tensors), groups)
                        actual = function(*tensors, groups).cpu().numpy()
                        np.testing.assert_allclose(actual, expected, atol=1e-14)

    def test_delta_is_the_identity_of_a_real_convolution(self):
        for kind, conv in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
            for channels, groups in ((4, 1), (6, 3)):
                x = torch.randn(2, channels, *[5] * kind, dtype=torch.double)
                weight = torch.randn(channels, channels // groups, *[3] * kind, dtype=torch.double)
                ones = torch.ones(channels, dtype=torch.double)
                identity = dirac_weight(weight, ones, 0 * ones, groups)
                self.assertTrue(torch.equal(conv(x, identity, padding=1, groups=groups), x))

    def test_gradients(self):
        for device in DEVICES:
            for shape, groups in [((4, 2, 3), 1), ((2, 4, 3, 3), 1), ((4, 2, 2, 2), 2)]:
                tensors = random_tensors(shape, device, requires_grad=True)
                checks = {'check_forward_ad': True, 'check_batched_grad': True}
                self.assertTrue(gradcheck(dirac_weight, (*tensors, groups), **checks))
                self.assertTrue(gradgradcheck(dirac_weight, (*tensors, groups)))

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
            (34, 2, 'CIFAR10', 1_854_378),
            (28, 10, 'CIFAR10', 36_450_090),
            (28, 10, 'CIFAR100', 36_507_780),
        ]:
            _, params = define_diracnet(depth, width, dataset)
            self.assertEqual(count_learned(params), expected)

    def test_keys(self):
        _, params = define_diracnet(10, 1, 'CIFAR10')
        bn = ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var']
        expected = ['conv', *bn]
        for block in [f'group{g}.block{b}' for g in range(3) for b in range(2)]:
            expected += [f'{block}.{name}' for name in ('conv', 'alpha', 'beta', *bn)]
        self.assertEqual(list(params), [*expected, 'fc.weight', 'fc.bias'])
        for key, tensor in params.items():
            self.assertEqual(tensor.requires_grad, 'running' not in key, key)

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
        ]:
            with self.subTest(depth=depth, dataset=dataset):
                f, params = define(depth, width, dataset)
                params = constants(randomized(params), torch.double)
                x = torch.randn(2, params['conv'].shape[1], size, size, dtype=torch.double)
                expected = textbook(x, with_deltas(params), False)
                self.assertLess(relative_error(f(x, params, False), expected), 1e-12)

    def test_training_mode_updates_running_statistics(self):
        f, params = define_diracnet(10, 1, 'CIFAR10')
        x, before = torch.randn(8, 3, 16, 16), constants(params)
        f(x, params, False)
        self.assertTrue(all(torch.equal(tensor, before[key]) for key, tensor in params.items()))
        f(x, params, True).sum().backward()
        # Momentum 0.1 towards the batch's mean, and towards its unbiased variance.
        stem = F.conv2d(x, before['conv'], padding=1)
        torch.testing.assert_close(params['bn.running_mean'], 0.1 * stem.mean((0, 2, 3)))
        variance = stem.transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(params['bn.running_var'], 0.9 + 0.1 * variance)
        for key, tensor in params.items():
            self.assertEqual(torch.equal(tensor, before[key]), 'running' not in key, key)
            self.assertEqual(tensor.grad is not None, 'running' not in key, key)

    def test_impossible_networks(self):
        for args, kwargs in [
            ((20, 1, 'CIFAR10'), {}),
            ((4, 1, 'digits'), {}),
            ((16.5, 1, 'CIFAR10'), {}),
            ((50, 1, 'ImageNet'), {}),
            ((16, 0.05, 'CIFAR10'), {}),
            ((16, math.nan, 'CIFAR10'), {}),
            ((16, 1, 'MNIST'), {}),
            ((16, 1, 'folder'), {}),
            ((16, 1, 'CIFAR10'), {'num_classes': 0}),
            ((16, 1, 'CIFAR10'), {'in_channels': -1}),
            ((16, 1, 'CIFAR10'), {'form': 'vgg'}),
        ]:
            for define in (define_diracnet, define_plain, DiracNet):
                with self.subTest(args=args, kwargs=kwargs), self.assertRaises(ValueError):
                    define(*args, **kwargs)


class TestFolding(unittest.TestCase):
    def test_fold_equals_the_unfolded(self):
        for device in DEVICES:
            for depth, width, dataset, size, kwargs in [
                (16, 1, 'CIFAR10', 32, {}),
                (34, 0.7, 'CIFAR100', 20, {}),
                (100, 1, 'digits', 8, {}),
                (10, 1, 'SVHN', 17, {'num_classes': 3, 'in_channels': 5}),
                (34, 2, 'folder', 32, {'form': 'cifar', 'num_classes': 10}),
                (18, 1, 'ImageNet', 96, {}),
                (34, 0.3, 'ImageNet', 75, {'num_classes': 12}),
                (16, 1, 'CIFAR10', 32, {'widen_early': True}),
                (18, 0.5, 'ImageNet', 64, {'widen_early': True}),
            ]:
                with self.subTest(depth=depth, width=width, dataset=dataset, device=device):
                    f, params = define_diracnet(depth, width, dataset, **kwargs)
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
        before = constants(params)
        x = torch.randn(2, 3, 32, 32, dtype=torch.double)
        folded = fold(params)
        net = DiracNet.from_state_dict(folded)
        self.assertLess(relative_error(net(x), f(x, params, False)), 1e-12)
        folded['fc.weight'].zero_()
        self.assertTrue(all(torch.equal(tensor, before[key]) for key, tensor in params.items()))

    def test_folded_diracnet18(self):
        """It has the layers, the names and the size of the published one."""
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
        self.assertEqual(convs[0].stride, (2, 2))
        self.assertEqual(
            [tuple(module.weight.shape) for module in (convs[0], *convs[-4:])],
            [(64, 3, 7, 7), (512, 256, 3, 3), *[(512, 512, 3, 3)] * 3],
        )
        self.assertEqual(net(torch.randn(1, 3, 224, 224)).shape, (1, 1000))

    def test_incomplete_params_make_no_network(self):
        _, params = define_diracnet(10, 1, 'digits')
        for change in (
            lambda p: p.clear(),
            lambda p: p.pop('conv'),
            lambda p: p.pop('group1.block0.conv'),
            lambda p: p.pop('group1.block0.alpha'),
            lambda p: p.pop('group0.block1.bn.bias'),
            lambda p: p.update({'group2.block0.conv': torch.zeros(64, 31, 3, 3)}),
            lambda p: p.update({'group2.block0.conv1x1': torch.zeros(64, 64, 1, 1)}),
        ):
            broken = dict(params)
            change(broken)
            with self.assertRaises(ValueError):
                DiracNet.from_state_dict(fold(broken))


if __name__ == '__main__':
    unittest.main()
