"""The ops that training is made of, each beside what eager torch does in its place."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Asked, Case, Work, on_engines
from bench.layers import Layer
from bench.ops import WINDOW, Op, Random, eager, op_cases, op_work, ours
from fused_resnet import engines
from fused_resnet.measure import EAGER, Runner, Variant
from fused_resnet.reference import accumulation_dtype
from fused_resnet.variants import LAYOUTS

EPS = 1e-5


def cases(asked: Asked) -> Iterator[Case]:
    """All of them."""
    return op_cases(WORKS, asked)


def _eager_backward(forward: Callable[..., Tensor]) -> list[Variant]:
    """Autograd's way back from ``forward`` of all tensors but the first, which is the gradient."""

    def prepare(order: torch.memory_format) -> Runner:
        def feed(tensors: tuple[Tensor, ...]) -> Any:
            laid_out = [
                t.detach().contiguous(memory_format=order) if t.dim() == 4 else t.detach()
                for t in tensors
            ]
            grad, *inputs = laid_out
            with torch.enable_grad():
                inputs = [t.requires_grad_() for t in inputs]
                return forward(*inputs), inputs, grad

        def run(fed: Any) -> tuple[Tensor, ...]:
            y, inputs, grad = fed
            return torch.autograd.grad(y, inputs, grad, retain_graph=True)

        return Runner(run, feed)

    return [
        Variant(f"eager {name}", EAGER, functools.partial(prepare, order))
        for name, order in LAYOUTS.items()
    ]


def _exact(forward: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    grad, *inputs = (t.double() for t in tensors)
    with torch.enable_grad():
        inputs = [t.requires_grad_() for t in inputs]
        return torch.autograd.grad(forward(*inputs), inputs, grad)


def _batch_norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS))


def _pooled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(_batch_norm_relu(x, weight, bias), 3, 2, 1)


class _Statistics:
    """Of a batch, by the ops of one engine."""

    def __init__(self, stats: Any, finalize: Any, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.mean, m2 = stats(x)
        self.count = float(x.numel() // x.size(1))
        scale, shift, self.invstd = finalize(
            self.mean, m2, self.count, weight, bias, None, None, 0.0, EPS
        )
        self.affine = scale, shift


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, and a BatchNorm's weight and bias."""
    random = Random(dtype, device)
    *_, weight, bias = random.batch_norm(shape[1])
    return random.normal(*shape).to(dtype), weight, bias


def _bn_act_train(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    tensors = _inputs(shape, dtype, device)
    several = eager(_batch_norm_relu)
    names = ("bn_stats", "bn_finalize", "bn_act")
    for engine, (stats, finalize, apply) in on_engines(device, dtype, *names).items():

        def call(x, weight, bias, stats=stats, finalize=finalize, apply=apply):
            s = _Statistics(stats, finalize, x, weight, bias)
            return apply(x, *s.affine, None, "relu")

        several += ours({engine: call})
    x = tensors[0]
    truth = _batch_norm_relu(*(t.double() for t in tensors))
    return op_work(several, truth, tensors, 6 * x.numel(), 2 * x.numel())


def _bn_act_backward(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    x, weight, bias = _inputs(shape, dtype, device)
    grad = x.flip(0, 1)
    several = _eager_backward(_batch_norm_relu)
    names = ("bn_stats", "bn_finalize", "bn_act_backward_reduce", "bn_act_backward")
    for engine, (stats, finalize, reduce, apply) in on_engines(device, dtype, *names).items():
        s = _Statistics(stats, finalize, x, weight, bias)

        def call(grad, x, weight, bias, s=s, reduce=reduce, apply=apply):
            sums = reduce(grad, x, None, *s.affine, s.mean, s.invstd, "relu")
            dx = apply(grad, x, None, *s.affine, s.mean, s.invstd, *sums, s.count, "relu")
            return dx, sums[1], sums[0]

        several += ours({engine: call})
    tensors = (grad, x, weight, bias)
    truth = _exact(_batch_norm_relu, *tensors)
    return op_work(several, truth, tensors, 10 * x.numel(), 4 * x.numel())


def _relu_backward_reduce(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    out, *_ = _inputs(shape, dtype, device)
    grad = out.flip(0, 1)
    wide = accumulation_dtype(dtype)

    def unfused(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.ops.aten.threshold_backward(grad, out, 0)
        return g, g.sum((0, 2, 3), dtype=torch.promote_types(wide, g.dtype))

    several = eager(unfused)
    for engine, (op,) in on_engines(device, dtype, "relu_backward_reduce").items():
        several += ours({engine: op})
    truth = unfused(grad.double(), out.double())
    return op_work(several, truth, (grad, out), 2 * out.numel(), 2 * out.numel())


def _bn_act_maxpool_train(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    tensors = _inputs(shape, dtype, device)
    several = eager(_pooled)
    names = ("bn_stats", "bn_finalize", "bn_act_maxpool_train")
    for engine, (stats, finalize, pool) in on_engines(device, dtype, *names).items():

        def call(x, weight, bias, stats=stats, finalize=finalize, pool=pool):
            s = _Statistics(stats, finalize, x, weight, bias)
            return pool(x, *s.affine, *WINDOW, "relu")[0]

        several += ours({engine: call})
    x = tensors[0]
    truth = _pooled(*(t.double() for t in tensors))
    return op_work(several, truth, tensors, 6 * x.numel(), 2 * x.numel())


def _bn_act_maxpool_backward(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    x, weight, bias = _inputs(shape, dtype, device)
    with torch.no_grad():
        grad = _pooled(x, weight, bias).flip(0, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    several = _eager_backward(_pooled)
    names = ("bn_stats", "bn_finalize", "bn_act_maxpool_train")
    names += ("bn_act_maxpool_backward_reduce", "bn_act_maxpool_backward")
    for engine, (stats, finalize, pool, reduce, apply) in on_engines(device, dtype, *names).items():
        s = _Statistics(stats, finalize, x, weight, bias)
        made = pool(x, *s.affine, *WINDOW, "relu")

        def call(grad, x, weight, bias, s=s, made=made, reduce=reduce, apply=apply):
            after = (*WINDOW[:4], "relu")
            sums = reduce(grad, *made, x, s.mean, s.invstd, *after)
            batch = (s.affine[0], s.mean, s.invstd, *sums, s.count)
            return apply(grad, *made, x, *batch, *after), sums[1], sums[0]

        several += ours({engine: call})
    tensors = (grad, x, weight, bias)
    truth = _exact(_pooled, *tensors)
    # Of x only what was pooled counts for the sums.
    return op_work(several, truth, tensors, 10 * x.numel(), 2 * grad.numel() + x.numel())


def _eltwise_act_backward(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Work:
    grad, *_ = _inputs(shape, dtype, device)
    inputs = [grad.flip(0), grad.flip(1)]
    out = torch.relu(inputs[0] + inputs[1])
    several = eager(lambda grad, out: torch.ops.aten.threshold_backward(grad, out, 0))
    for engine, (op,) in on_engines(device, dtype, "eltwise_act_backward").items():

        def call(grad, out, op=op):
            return op(grad, [out, out], out, "sum", None, "relu")[0]

        several += ours({engine: call})
    truth = torch.ops.aten.threshold_backward(grad.double(), out.double(), 0)
    return op_work(several, truth, (grad, out), out.numel(), 2 * out.numel())


def _gradient(which: int) -> Callable[..., Work]:
    """Of a convolution's input, 0, or of its weight, 1, from the gradient of its output."""
    op_name = ("conv_dgrad", "conv_wgrad")[which]

    def make(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> Work:
        random = Random(dtype, device)
        x = random.activations(batch, layer.in_channels, layer.height, layer.width)
        w = random.weight(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)
        grad = random.normal(batch, *layer.made).to(dtype)
        geometry = (list(layer.stride), list(layer.padding), [1, 1])
        wanted = [i == which for i in range(3)]

        def unfused(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
            rest = (None, *geometry, False, [0, 0], layer.groups, wanted)
            return torch.ops.aten.convolution_backward(grad, x, w, *rest)[which]

        def with_engine(engine: str) -> Callable[..., Tensor]:
            op = engines.implementation(op_name, engine)
            if which == 0:
                size = [layer.height, layer.width]
                return lambda grad, x, w: op(grad, w, None, size, *geometry, layer.groups)
            rest = (None, None, "none", list(layer.kernel), *geometry, layer.groups)
            return lambda grad, x, w: op(grad, x, *rest)

        tensors = (grad, x, w)
        read = batch * layer.y + (layer.weights, batch * layer.read)[which]
        fused = {e: with_engine(e) for e in ("vendor", *on_engines(device, dtype, op_name))}
        truth = unfused(*(t.double() for t in tensors))
        several = [*eager(unfused), *ours(fused)]
        return op_work(several, truth, tensors, batch * layer.flops, read)

    return make


WORKS = {
    "bn_act_train": Op("outputs", _bn_act_train),
    "bn_act_backward": Op("outputs", _bn_act_backward),
    "relu_backward_reduce": Op("blocks' outputs", _relu_backward_reduce),
    "bn_act_maxpool_train": Op("the stem's", _bn_act_maxpool_train),
    "bn_act_maxpool_backward": Op("the stem's", _bn_act_maxpool_backward),
    "eltwise_act_backward": Op("blocks' outputs", _eltwise_act_backward),
    "conv_dgrad": Op("layers but the first", _gradient(0)),
    "conv_wgrad": Op("layers", _gradient(1)),
}
