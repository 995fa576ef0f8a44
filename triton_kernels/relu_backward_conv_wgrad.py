"""``relu_backward_conv_wgrad``: ``relu_backward_reduce`` on the way to a weight's gradient."""

from torch import Tensor

from fused_resnet.reference import accumulation_dtype, empty_image

from . import checks
from .conv_launch import Operand
from .conv_shapes import channels_last, conv_shape, for_writing
from .conv_wgrad import Mask, weight_gradient


def relu_backward_conv_wgrad(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused_resnet.reference_chain.relu_backward_conv_wgrad`."""
    op = "relu_backward_conv_wgrad"
    checks.check_dim(op, "grad", grad, 4)
    checks.check_dtype(op, "grad", grad)
    checks.check_act(op, act)
    checks.check_like(op, "out", out, grad, "grad")
    checks.check_sizes(op, "out", out, grad.shape)
    checks.check_dim(op, "x", x, 4)
    checks.check_like(op, "x", x, grad, "grad")
    if (scale is None) != (shift is None):
        checks.fail(op, "scale and shift must be given together, got one")
    vectors = [
        None if t is None else checks.channel_vector(op, name, t, x)
        for name, t in (("scale", scale), ("shift", shift), ("center", center))
    ]
    shape = conv_shape(op, x.shape, grad.size(1), [1, 1], [1, 1], [0, 0], [1, 1], 1)
    checks.check_sizes(op, "grad", grad, shape.out_sizes)
    wide = accumulation_dtype(grad.dtype)
    result = empty_image(grad, grad.shape, grad)
    g, sum_g = for_writing(result), grad.new_empty(grad.size(1), dtype=wide)
    z = Operand(channels_last(x), *vectors[:2], act, center=vectors[2])
    mask = Mask(channels_last(out), g, sum_g)
    dw = weight_gradient(shape, Operand(channels_last(grad)), z, mask)
    return result if g is result else result.copy_(g), sum_g, dw
