"""Unit tests of the Dirac layers, the network definitions and their folding: python test.py (under a minute).

They run on every kind of device that is there. Everything slower or wider is in tests/ (python -m pytest).
"""

import copy
import inspect
import math
import pickle
import unittest
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from diracconv import DiracConv1d, DiracConv2d, DiracConv3d, dirac_weight
from diracnet import (
    DiracNet,
    Network,
    define_diracnet,
    diracnet18,
    diracnet34,
    fold,
    infer_architecture,
    recomputed_block,
)
from lab.models.plain import define_plain
from tools.benchmark.references import textbook, with_deltas

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
LAYERS = {1: DiracConv1d, 2: DiracConv2d, 3: DiracConv3d}


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
    """Give scales and batch norm other values than they start from, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in params.items():
        name = key.split('.')[-1]
        with torch.no_grad():
            if name in ('running_var', 'alpha', 'beta', 'weight') and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name in ('running_mean', 'bias'):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 2)
    return params


def random_layer(kind, *args, **kwargs):
    layer = LAYERS[kind](*args, **kwargs)
    nn.init.normal_(layer.alpha)
    nn.init.normal_(layer.beta)
    return layer


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
                    weight, alpha, beta = (
                        torch.randn(s, dtype=torch.double, device=device)
                        for s in (shape, shape[0], shape[0])
                    )
                    expected = formula(
                        weight.cpu().numpy(), alpha.cpu().numpy(), beta.cpu().numpy(), groups
                    )
                    np.testing.assert_allclose(
                        dirac_weight(weight, alpha, beta, groups).cpu().numpy(),
                        expected,
                        atol=1e-14,
                    )

    def test_delta_is_the_identity_of_a_real_convolution(self):
        for kind, conv in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
            for channels, groups in ((4, 1), (6, 3)):
                x = torch.randn(2, channels, *[5] * kind, dtype=torch.double)
                shape = (channels, channels // groups, *[3] * kind)
                identity = dirac_weight(
                    torch.randn(shape, dtype=torch.double),
                    torch.ones(channels, dtype=torch.double),
                    torch.zeros(channels, dtype=torch.double),
                    groups,
                )
                self.assertTrue(torch.equal(conv(x, identity, padding=1, groups=groups), x))
                self.assertTrue(
                    torch.equal(identity, nn.init.dirac_(torch.empty_like(identity), groups))
                )

    def test_gradients(self):
        for device in DEVICES:
            for shape, groups in [
                ((3, 3, 3, 3), 1),
                ((4, 2, 3), 1),
                ((2, 4, 3, 3), 1),
                ((4, 2, 2, 2), 2),
            ]:
                tensors = [
                    torch.randn(s, dtype=torch.double, device=device, requires_grad=True)
                    for s in (shape, shape[0], shape[0])
                ]
                self.assertTrue(gradcheck(lambda *t: dirac_weight(*t, groups), tensors))
                self.assertTrue(gradgradcheck(lambda *t: dirac_weight(*t, groups), tensors))

    def test_scale_of_the_weight_does_not_matter(self):
        weight, alpha, beta = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(4)
        torch.testing.assert_close(
            dirac_weight(weight * 1e3, alpha, beta), dirac_weight(weight, alpha, beta)
        )

    def test_memory_format_does_not_matter(self):
        weight, alpha, beta = torch.randn(6, 5, 3, 3), torch.randn(6), torch.randn(6)
        strided = torch.randn(5, 6, 3, 3).transpose(0, 1).copy_(weight)
        for other in (weight.to(memory_format=torch.channels_last), strided):
            torch.testing.assert_close(
                dirac_weight(other, alpha, beta), dirac_weight(weight, alpha, beta)
            )

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
    CASES = [  # dimensions, input size, arguments
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

    def test_computes_the_formula_and_folds(self):
        for device in DEVICES:
            for kind, size, args, kwargs in self.CASES:
                with self.subTest(kind=kind, args=args, kwargs=kwargs, device=device):
                    layer = random_layer(kind, *args, **kwargs, device=device, dtype=torch.double)
                    x = torch.randn(2, args[0], *[size] * kind, device=device, dtype=torch.double)
                    plain_class = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[kind]
                    plain = plain_class(*args, **kwargs, device=device, dtype=torch.double)
                    expected = formula(
                        *(
                            t.detach().cpu().numpy()
                            for t in (layer.weight, layer.alpha, layer.beta)
                        ),
                        layer.groups,
                    )
                    plain.load_state_dict(
                        {
                            'weight': torch.from_numpy(expected),
                            **({} if layer.bias is None else {'bias': layer.bias}),
                        }
                    )
                    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
                    folded = layer.fold()
                    self.assertIs(type(folded), plain_class)
                    self.assertEqual(repr(folded), repr(plain))
                    torch.testing.assert_close(folded(x), layer(x), rtol=1e-12, atol=1e-12)

    def test_takes_the_arguments_of_torch(self):
        for kind, conv in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
            self.assertTrue(issubclass(LAYERS[kind], conv))
            self.assertEqual(inspect.signature(LAYERS[kind]), inspect.signature(conv))

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
        for kind, size, args, kwargs in self.CASES:
            layer = random_layer(kind, *args, **kwargs, dtype=torch.double)
            names = [name for name, _ in layer.named_parameters()]
            self.assertEqual(
                sorted(names),
                sorted(['weight', 'alpha', 'beta'] + ['bias'] * (layer.bias is not None)),
            )
            x = torch.randn(1, args[0], *[size] * kind, dtype=torch.double, requires_grad=True)
            function = lambda x, *tensors: torch.func.functional_call(
                layer, dict(zip(names, tensors)), (x,)
            ).sum(0)  # noqa: B023
            self.assertTrue(gradcheck(function, (x, *layer.parameters()), fast_mode=True))

    def test_loads_the_originals_state_dicts(self):
        for kind in LAYERS:
            layer = random_layer(kind, 4, 6, 3)
            state = {**layer.state_dict(), 'delta': nn.init.dirac_(torch.empty_like(layer.weight))}
            other = nn.Sequential(LAYERS[kind](4, 6, 3))
            other.load_state_dict({f'0.{key}': tensor for key, tensor in state.items()})
            x = torch.randn(2, 4, *[5] * kind)
            self.assertTrue(torch.equal(other(x), layer(x)))
            self.assertNotIn('delta', layer.state_dict())
            state['delta'] = state['delta'].flip(0)
            with self.assertRaisesRegex(RuntimeError, 'delta is not the identity'):
                LAYERS[kind](4, 6, 3).load_state_dict(state)

    def test_repr(self):
        self.assertEqual(
            repr(DiracConv2d(4, 6, 3, padding=1, bias=False)),
            'DiracConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, alpha=1, beta=0.1)',
        )

    def test_low_precision(self):
        for device in DEVICES:
            for kind in LAYERS:
                for dtype, tolerance in (
                    (torch.half, 2e-3),
                    (torch.bfloat16, 2e-2),
                ):  # about two units in the last place
                    layer = random_layer(kind, 4, 4, 3).to(device)
                    low = copy.deepcopy(layer).to(dtype)
                    x = torch.randn(2, 4, *[5] * kind, device=device).to(dtype)
                    y = low(x)
                    self.assertIs(y.dtype, dtype)
                    self.assertLess(relative_error(y.float(), layer(x.float())), 2 * tolerance)
                    self.assertLess(relative_error(low.fold()(x), y), 2 * tolerance)
                    y.float().sum().backward()
                    self.assertTrue(low.weight.grad.isfinite().all())

    def test_autocast(self):
        layer = random_layer(2, 4, 4, 3)
        with torch.autocast('cpu', torch.bfloat16):
            self.assertIs(layer(torch.randn(2, 4, 5, 5)).dtype, torch.bfloat16)

    def test_meta_device(self):
        layer = DiracConv2d(4, 6, 3, padding=1, device='meta', dtype=torch.half)
        self.assertEqual(
            layer(torch.empty(2, 4, 8, 8, device='meta', dtype=torch.half)).shape, (2, 6, 8, 8)
        )
        self.assertTrue(layer.fold().weight.is_meta)
        self.assertIn('DiracConv2d(4, 6', repr(layer))
        layer.to_empty(device='cpu').reset_parameters()
        self.assertTrue((layer.alpha == 1).all() and layer.weight.isfinite().all())

    def test_copy_and_pickle(self):
        layer = random_layer(2, 4, 4, 3)
        x = torch.randn(2, 4, 5, 5)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            self.assertTrue(torch.equal(other(x), layer(x)))
            self.assertIsNot(other.weight, layer.weight)

    def test_trace_export_compile(self):
        for kind, size, args, kwargs in self.CASES[1:7:2]:
            layer = random_layer(kind, *args, **kwargs)
            x = torch.randn(2, args[0], *[size] * kind)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # torch announces that jit will go
                traced = torch.jit.trace(layer, x)
            exported = torch.export.export(layer, (x,)).module()
            # The whole tracing machinery without the C++ compiler, which takes too long here; tests/ uses that, too.
            compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
            for other in (traced, exported, compiled):
                torch.testing.assert_close(other(x), layer(x))
            compiled(x).sum().backward()
            gradient = layer.weight.grad.clone()
            layer.zero_grad()
            layer(x).sum().backward()
            torch.testing.assert_close(gradient, layer.weight.grad)


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

    def test_keys(self):
        f, params = define_diracnet(10, 1, 'CIFAR10')
        bn = ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var']
        expected = ['conv', *bn]
        for g in range(3):
            for b in range(2):
                expected += [f'group{g}.block{b}.{name}' for name in ('conv', 'alpha', 'beta', *bn)]
        self.assertEqual(list(params), [*expected, 'fc.weight', 'fc.bias'])
        for key, tensor in params.items():
            self.assertEqual(tensor.requires_grad, 'running' not in key, key)
            self.assertTrue(tensor.is_leaf)

    def test_initialization(self):
        torch.manual_seed(0)
        _, params = define_diracnet(34, 2, 'CIFAR10')
        for key, tensor in params.items():
            name = key.split('.')[-1]
            if name == 'conv' or key == 'fc.weight':
                fan_in = tensor[0].numel()
                # n draws estimate a standard deviation within 5 / sqrt(2n) but once in millions
                self.assertAlmostEqual(
                    tensor.std().item() * math.sqrt(fan_in / 2),
                    1,
                    delta=5 / math.sqrt(2 * tensor.numel()),
                )
            elif key.endswith('bn.weight'):
                self.assertTrue(0 <= tensor.min() and tensor.max() < 1 and tensor.std() > 0.15)
            else:
                expected = {
                    'alpha': 1,
                    'beta': 0.1,
                    'bias': 0,
                    'running_mean': 0,
                    'running_var': 1,
                }[name]
                self.assertTrue(torch.allclose(tensor, torch.tensor(float(expected))), key)

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
                params = {
                    key: tensor.detach().double() for key, tensor in randomized(params).items()
                }
                x = torch.randn(2, params['conv'].shape[1], size, size, dtype=torch.double)
                self.assertLess(
                    relative_error(f(x, params, False), textbook(x, with_deltas(params), False)),
                    1e-12,
                )

    def textbook_errors(self, depth, width, dataset, size, memory_format, dtype, device):
        """Relative errors of logits and gradients, in training, against the network as the formula reads."""
        f, params = define_diracnet(depth, width, dataset)
        params = {
            key: tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)
            for key, tensor in randomized(params).items()
        }
        other = with_deltas(
            {
                key: tensor.detach().clone().requires_grad_(tensor.requires_grad)
                for key, tensor in params.items()
            }
        )
        net = Network(f, params).to(memory_format=memory_format)
        x = torch.randn(8, params['conv'].shape[1], size, size, device=device, dtype=dtype)
        targets = torch.arange(8, device=device)
        logits, expected = net(x.contiguous(memory_format=memory_format)), textbook(x, other, True)
        for loss in (F.cross_entropy(logits, targets), F.cross_entropy(expected, targets)):
            loss.backward()
        learned = [key for key, tensor in net.params().items() if tensor.requires_grad]
        gradients, theirs = (
            torch.cat([tensors[key].grad.flatten() for key in learned])
            for tensors in (net.params(), other)
        )
        return relative_error(logits, expected), relative_error(gradients, theirs)

    def test_agrees_with_the_textbook(self):
        for device in DEVICES:
            for depth, width, dataset, size in [
                (16, 1, 'digits', 8),
                (22, 0.5, 'CIFAR10', 16),
                (18, 0.125, 'ImageNet', 64),
            ]:
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    with self.subTest(
                        depth=depth, dataset=dataset, memory_format=memory_format, device=device
                    ):
                        case = (depth, width, dataset, size, memory_format)
                        self.assertLess(
                            max(self.textbook_errors(*case, torch.double, device)), 1e-10
                        )
                        # In float32 a unit within rounding of zero may be on for the one and off for the other, which no tolerance
                        # for rounding covers: so a few networks, and the median.
                        errors = []
                        for seed in range(5):
                            torch.manual_seed(seed)
                            errors.append(self.textbook_errors(*case, torch.float, device))
                        for kind in zip(*errors):
                            self.assertLess(sorted(kind)[2], 1e-5)

    def test_recomputing(self):
        """Half of what is kept for the backward pass; the same logits, gradients and running statistics."""
        for device in DEVICES:
            for depth, width, dataset, size in [(16, 1, 'digits', 8), (18, 0.125, 'ImageNet', 64)]:
                f, params = define_diracnet(depth, width, dataset)
                x = torch.randn(8, params['conv'].shape[1], size, size, device=device)
                found = []
                for function in (f, partial(f, block=recomputed_block)):
                    net = Network(
                        function,
                        {
                            key: tensor.detach().clone().requires_grad_(tensor.requires_grad)
                            for key, tensor in randomized(params).items()
                        },
                    ).to(device)
                    kept = {}

                    def keep(tensor):
                        kept[tensor.untyped_storage().data_ptr()] = (
                            tensor.untyped_storage().nbytes()
                        )
                        return tensor

                    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                        logits = net(x)
                    F.cross_entropy(logits, torch.arange(8, device=device)).backward()
                    found.append(
                        [
                            logits,
                            *(t.grad if t.requires_grad else t for t in net.params().values()),
                            sum(kept.values()),
                        ]
                    )
                weights = sum(tensor.nbytes for tensor in params.values())
                self.assertLess(found[1].pop() - 2 * weights, 0.6 * (found[0].pop() - 2 * weights))
                for actual, expected in zip(found[1], found[0]):
                    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    def test_training_mode_updates_running_statistics(self):
        f, params = define_diracnet(10, 1, 'CIFAR10')
        x = torch.randn(8, 3, 16, 16)
        stem = F.conv2d(x, params['conv'], padding=1).detach()
        before = {key: tensor.detach().clone() for key, tensor in params.items()}
        f(x, params, True).sum().backward()
        # momentum 0.1 towards the batch's mean, and towards its unbiased variance
        torch.testing.assert_close(params['bn.running_mean'], 0.1 * stem.mean((0, 2, 3)))
        torch.testing.assert_close(
            params['bn.running_var'], 0.9 + 0.1 * stem.transpose(0, 1).flatten(1).var(1)
        )
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

    def test_network_module(self):
        f, params = define_diracnet(10, 1, 'digits')
        net = Network(f, randomized(params))
        self.assertEqual(set(net.state_dict()), set(params))
        self.assertEqual(
            {name for name, _ in net.named_parameters()},
            {k for k, t in params.items() if t.requires_grad},
        )
        x = torch.randn(4, 1, 8, 8)
        net.eval()
        expected = f(x, params, False)
        for other in (
            net,
            copy.deepcopy(net),
            pickle.loads(pickle.dumps(net)),
            torch.compile(net, backend='eager', fullgraph=True),
        ):
            self.assertTrue(torch.equal(other(x), expected))
        other = Network(*define_diracnet(10, 1, 'digits')).eval()
        other.load_state_dict(net.state_dict())
        self.assertTrue(torch.equal(other(x), expected))
        zeros = {key: torch.zeros_like(tensor) for key, tensor in net.state_dict().items()}
        self.assertFalse(torch.func.functional_call(net, zeros, (x,)).any())
        self.assertIs(net.double()(x.double()).dtype, torch.double)
        net.train()(x.double())
        self.assertFalse(
            torch.equal(net.params()['bn.running_mean'].float(), params['bn.running_mean'])
        )


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
                    params = {
                        key: tensor.detach().to(device)
                        for key, tensor in randomized(params).items()
                    }
                    x = torch.randn(2, params['conv'].shape[1], size, size, device=device)
                    expected = f(x, params, False)
                    net = DiracNet(depth, width, dataset, **kwargs).to(device)
                    net.load_state_dict(fold(params))
                    self.assertLess(relative_error(net(x), expected), 1e-5)
                    again = DiracNet.from_state_dict(fold(params)).to(device)
                    self.assertTrue(torch.equal(again(x), net(x)))

    def test_fold_is_exact_in_double(self):
        f, params = define_diracnet(28, 1, 'CIFAR10')
        params = {key: tensor.detach().double() for key, tensor in randomized(params).items()}
        x = torch.randn(2, 3, 32, 32, dtype=torch.double)
        self.assertLess(
            relative_error(DiracNet.from_state_dict(fold(params)).double()(x), f(x, params, False)),
            1e-12,
        )

    def test_fold_leaves_its_argument_alone(self):
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
        leaves = [
            (name, module) for name, module in net.named_modules() if not list(module.children())
        ]
        expected = ['features.conv', 'features.max_pool0']
        for g in range(4):
            expected += [f'features.max_pool{g}'] * (g > 0)
            expected += [
                f'features.group{g}.block{b}.{part}' for b in range(4) for part in ('relu', 'conv')
            ]
        expected += ['features.last_relu', 'features.avg_pool', 'fc']
        self.assertEqual([name for name, _ in leaves], expected)
        convs = [
            (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.bias is not None)
            for _, m in leaves
            if isinstance(m, nn.Conv2d)
        ]
        self.assertEqual(convs[0], (3, 64, (7, 7), (2, 2), (3, 3), True))
        channels = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
        self.assertEqual(
            convs[1:],
            [(i, o, (3, 3), (1, 1), (1, 1), True) for i, o in zip(channels, channels[1:])],
        )
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

    def test_layout_of(self):
        for args in [
            (16, 1, 'CIFAR10'),
            (34, 0.7, 'SVHN'),
            (28, 10, 'CIFAR100'),
            (18, 0.75, 'ImageNet'),
            (34, 1, 'ImageNet'),
        ]:
            f, params = define_diracnet(*args)
            for tensors in (params, fold(params)):
                self.assertEqual(infer_architecture(tensors).groups, f.args[0].groups)
                self.assertEqual(infer_architecture(tensors).depth, args[0])


if __name__ == '__main__':
    unittest.main()
