"""The specification of the ops that training is made of, as :mod:`fused_resnet.reference` has those
of inference: plain torch, any dtype, half types computed in float32 and rounded once."""

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor

from .reference import (
    _act,
    _in_format_of,
    _per_channel,
    accumulation_dtype,
    bn_act,
    memory_format,
)

_PIXELS = (0, 2, 3)


def relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient relu's output ``out`` lets through: selected, and all of it where out is NaN."""
    return torch.where(out <= 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad)


def _masked(
    grad: Tensor, x: Tensor | None, out: Tensor | None, scale: Tensor, shift: Tensor, act: str
) -> Tensor:
    """The gradient behind the activation, in the accumulation dtype."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    if act == "none":
        return wide
    if out is None:
        if x is None:
            raise RuntimeError('out must be given with act "relu" and without x, got neither')
        out = bn_act(x, scale, shift, None, "none")
    return relu_backward(wide, out)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean and sum of squared deviations from it, in the accumulation dtype."""
    y = x.to(accumulation_dtype(x.dtype))
    mean = y.mean(_PIXELS)
    count = y.size(0) * y.size(2) * y.size(3)
    return mean, y.var(_PIXELS, correction=0) * count if y.numel() else torch.zeros_like(mean)


def bn_finalize(
    mean: Tensor,
    m2: Tensor,
    count: float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, shift and invstd of batch statistics; updates the running ones unless count is 0."""
    wide = mean.double()
    # Divided by a tensor: by a number, 0 / 0 would raise.
    values = torch.tensor(count, dtype=torch.float64, device=m2.device)
    invstd = (1 / torch.sqrt(m2.double() / values + eps)).to(mean.dtype)
    scale = invstd if weight is None else weight.to(mean.dtype) * invstd
    shift = -wide * scale.double()
    if bias is not None:
        shift = shift + bias.double()
    if running_mean is not None and running_var is not None and count > 0:
        unbiased = m2.double() / (values - 1)
        for running, value in ((running_mean, wide), (running_var, unbiased)):
            running.copy_((1 - momentum) * running.double() + momentum * value)
    return scale.clone(), shift.to(mean.dtype), invstd


def bn_act_backward_reduce(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor]:
    """``sum g`` and ``sum g * (x - mean) * invstd``, g being what relu let through of grad."""
    g = _masked(grad, x, out, scale, shift, act)
    centered = x.to(g.dtype) - _per_channel(mean, g)
    return g.sum(_PIXELS), (g * centered).sum(_PIXELS) * invstd


def _gradient_terms(
    scale: Tensor, invstd: Tensor, sum_g: Tensor, sum_gx: Tensor, count: float
) -> tuple[Tensor, Tensor]:
    """Slope and offset of BatchNorm's gradient ``scale g + slope (x - mean) + offset``."""
    share = -scale.double() / count
    return share * invstd.double() * sum_gx.double(), share * sum_g.double()


def _of_batch_norm(
    g: Tensor,
    x: Tensor | None,
    scale: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
) -> Tensor:
    """The gradient of BatchNorm's input x, g being that of its output; in g's dtype."""
    vectors = (mean, invstd, sum_g, sum_gx)
    if count == 0 and all(v is None for v in vectors):
        return g * _per_channel(scale, g)
    if x is None or not count > 0 or any(v is None for v in vectors):
        raise RuntimeError("x, mean, invstd, sum_g, sum_gx and count must be given together")
    terms = _gradient_terms(scale, invstd, sum_g, sum_gx, count)  # type: ignore[arg-type]
    slope, offset = (v.to(g.dtype) for v in terms)
    centered = x.to(g.dtype) - _per_channel(mean.to(g.dtype), g)  # type: ignore[union-attr]
    return g * _per_channel(scale, g) + centered * _per_channel(slope, g) + _per_channel(offset, g)


def bn_act_backward(
    grad: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    act: str,
) -> Tensor:
    """x's gradient, g being what relu let through of grad: of batch statistics
    ``scale * (g - sum_g / count - (x - mean) * (invstd * sum_gx / count))``, with what
    :func:`bn_act_backward_reduce` gives; of fixed ones, without sums and count, ``scale * g``."""
    g = _masked(grad, x, out, scale, shift, act)
    dx = _of_batch_norm(g, x, scale, mean, invstd, sum_g, sum_gx, count)
    return _in_format_of(dx.to(grad.dtype), grad if x is None else x)


def relu_backward_reduce(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """What relu lets through of grad, and its sum by channels in the accumulation dtype."""
    g = relu_backward(grad, out)
    return _in_format_of(g, grad), g.to(accumulation_dtype(g.dtype)).sum(_PIXELS)


def bn_act_gram(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, center: Tensor, act: str, stride: int
) -> tuple[Tensor, Tensor]:
    """In float64, ``sum zc zc^T`` and ``sum zc`` over the pixels a 1x1 convolution of ``stride``
    reads, for ``zc = z - center[c]`` and ``z = act(x * scale[c] + shift[c])`` in x's dtype."""
    z = x[:, :, ::stride, ::stride]
    if scale is not None and shift is not None:
        z = bn_act(z, scale, shift, None, act)
    else:
        z = _act(z, act)
    wide = z.to(accumulation_dtype(z.dtype))
    rows = (wide - _per_channel(center, wide)).double().movedim(1, -1).flatten(0, -2)
    return rows.T @ rows, rows.sum(0)


def gram_moments(gram: Tensor, sum: Tensor, center: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Of what :func:`bn_act_gram` makes of ``count`` positions, in center's dtype:
    ``gram - sum sum^T / count``, and ``[gram | sum]``."""
    covariance = gram - torch.outer(sum / count, sum)
    moments = torch.cat([gram, sum[:, None]], 1)
    return covariance.to(center.dtype).contiguous(), moments.to(center.dtype)


def gram_stats(
    weight: Tensor, product: Tensor, sum: Tensor, center: Tensor, count: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, mean about ``weight center``, and sum of squared deviations of ``y = weight z``.

    ``product``: of the matrix weight, [K, C], and the covariance that :func:`gram_moments` gives.
    """
    w = weight.double()
    about = w @ (sum / count)
    m2 = (w * product.double()).sum(1).clamp_min(0)  # rounding can go below zero; NaN stays
    mean = about + w @ center.double()
    return mean.to(center.dtype), about.to(center.dtype), m2.to(center.dtype)


def gram_gradients(
    weight: Tensor,
    s: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor | None,
    count: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient behind batch statistics of ``y = weight z``, short of matrix products.

    For ``dy = a g + b y + c`` and ``s = g z^T``, z centered and mean about that center: the
    gradient of gamma (``sum_gx``, unless given ``invstd (rowdot(weight, s) - mean sum_g)``),
    ``a s``, ``[b weight | c]`` and ``a weight``.
    """
    w = weight.double()
    if sum_gx is None:
        sum_gx = invstd.double() * ((w * s.double()).sum(1) - mean.double() * sum_g.double())
    b, offset = _gradient_terms(scale, invstd, sum_g, sum_gx, count)
    c = offset - b * mean.double()
    slopes = torch.cat([b[:, None] * w, c[:, None]], 1)
    scaled = scale[:, None] * weight.to(scale.dtype)
    scaled_s = (scale[:, None] * s).contiguous()
    dgamma, slopes = sum_gx.to(scale.dtype, copy=True).contiguous(), slopes.to(scale.dtype)
    return dgamma, scaled_s, slopes, scaled.to(weight.dtype).contiguous()


def bn_act_maxpool_train(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    act: str,
) -> tuple[Tensor, Tensor]:
    """:func:`bn_act_maxpool` and where in its window each maximum is: ``kh * kernel_w + kw``."""
    y = x.to(accumulation_dtype(x.dtype))
    y = _act(y * _per_channel(scale, y) + _per_channel(shift, y), act)
    k, s, p, d = (list(pair) for pair in (kernel_size, stride, padding, dilation))
    out, place = F.max_pool2d(y, k, s, p, d, ceil_mode=ceil_mode, return_indices=True)
    position = []
    for i, at in enumerate((place // x.size(3), place % x.size(3))):
        steps = torch.arange(out.size(2 + i), device=x.device) * stride[i] - padding[i]
        position.append((at - (steps.view(-1, 1) if i == 0 else steps)) // dilation[i])
    argmax = (position[0] * kernel_size[1] + position[1]).to(torch.uint8)
    return _in_format_of(out.to(x.dtype), x), _in_format_of(argmax, x)


def _places(
    argmax: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The pixel of x each pooled value comes from, counted through an image."""
    place = argmax.long()
    rows, columns = (torch.arange(argmax.size(d), device=x.device) for d in (2, 3))
    h = place // kernel_size[1] * dilation[0] + (rows * stride[0] - padding[0]).view(-1, 1)
    w = place % kernel_size[1] * dilation[1] + columns * stride[1] - padding[1]
    return h * x.size(3) + w


def bn_act_maxpool_backward_reduce(
    grad: Tensor,
    out: Tensor,
    argmax: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`bn_act_backward_reduce`, over the pooled positions and the x they come from."""
    g = grad.to(accumulation_dtype(grad.dtype))
    if act == "relu":
        g = relu_backward(g, out)
    places = _places(argmax, x, kernel_size, stride, padding, dilation)
    taken = x.to(g.dtype).flatten(2).gather(2, places.flatten(2)).view_as(g)
    return g.sum(_PIXELS), (g * (taken - _per_channel(mean, g))).sum(_PIXELS) * invstd


def bn_act_maxpool_backward(
    grad: Tensor,
    out: Tensor,
    argmax: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    sum_g: Tensor | None,
    sum_gx: Tensor | None,
    count: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    act: str,
) -> Tensor:
    """As :func:`bn_act_backward`, g being summed up over the windows whose maximum x is."""
    g = grad.to(accumulation_dtype(grad.dtype))
    if act == "relu":
        g = relu_backward(g, out)
    places = _places(argmax, x, kernel_size, stride, padding, dilation)
    spread = torch.zeros_like(x, dtype=g.dtype).flatten(2)
    spread = spread.scatter_add(2, places.flatten(2), g.flatten(2)).view(x.shape)
    dx = _of_batch_norm(spread, x, scale, mean, invstd, sum_g, sum_gx, count)
    return _in_format_of(dx.to(x.dtype), x)


def eltwise_act_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    out: Tensor | None,
    op: str,
    coeff: Sequence[float] | None,
    act: str,
) -> list[Tensor]:
    """The gradients of :func:`fused_resnet.reference.eltwise_act`'s inputs."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    g = wide if out is None or act == "none" else relu_backward(wide, out)
    terms = [t.to(g.dtype) for t in inputs]
    grads = [g] * len(terms)
    if coeff is not None:
        grads = [g * factor for factor in coeff]
    elif op == "prod":
        others = (terms[:i] + terms[i + 1 :] for i in range(len(terms)))
        grads = [functools.reduce(torch.mul, rest, g) for rest in others]
    elif op == "max":
        largest = list(itertools.accumulate(terms, torch.maximum))
        zero = torch.zeros_like(g)
        for i in range(len(terms) - 1, 0, -1):
            first, second = largest[i - 1], terms[i]
            share = torch.where(first == second, g / 2, g)
            grads[i] = torch.where(first > second, zero, share)
            g = torch.where(first < second, zero, share)
        grads[0] = g
    return [torch.empty_like(inputs[0]).copy_(t) for t in grads]


def conv_dgrad(
    grad: Tensor,
    weight: Tensor,
    added: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's input, plus ``added``."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    shape = (grad.size(0), weight.size(1) * groups, *input_size)
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
    dx = torch.nn.grad.conv2d_input(shape, weight.to(wide.dtype), wide, *settings)
    if added is not None:
        dx = dx + added.to(wide.dtype)
    return dx.to(grad.dtype).contiguous(memory_format=memory_format(grad, weight))


def conv_wgrad(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's weight, in the accumulation dtype, its input being
    ``act(x * scale + shift)``, ``act(x)`` without a scale, rounded to x's dtype."""
    z = _act(x, act) if scale is None or shift is None else bn_act(x, scale, shift, None, act)
    wide = accumulation_dtype(grad.dtype)
    shape = (grad.size(1), x.size(1) // groups, *kernel_size)
    settings = (tuple(stride), tuple(padding), tuple(dilation), groups)
    dw = torch.nn.grad.conv2d_weight(z.to(wide), shape, grad.to(wide), *settings)
    return dw.contiguous(memory_format=torch.channels_last)
