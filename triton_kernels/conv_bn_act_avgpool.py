"""The mean over each image of ``act(conv2d(x, weight) * scale[c] + shift[c] + residual)``.

A tile of the product has pixels of one image and leaves their sums, of values rounded as if they
were stored; a small kernel adds those of an image up in order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.reference import accumulation_dtype, empty_image

from .conv_bn_act import checked
from .conv_launch import Operand, forward, image_tiles
from .conv_shapes import channels_last
from .launch import cdiv, launch
from .tiles import VECTOR, store


@triton.jit
def means_kernel(sums, out, channels, image_tiles, pixels, BLOCK: tl.constexpr):
    across = tl.cdiv(channels, BLOCK)
    image = (tl.program_id(0) // across).to(tl.int64)
    channel = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    total = tl.zeros([BLOCK], tl.float64)
    for tile in range(image_tiles):
        at = (image * image_tiles + tile) * channels + channel
        total += tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
    mean = (total / tl.cast(pixels, tl.float64)).to(sums.dtype.element_ty)
    store(out, image * channels + channel, mean, mask)


def conv_bn_act_avgpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Tensor:
    """See :func:`fused_resnet.reference.conv_bn_act_avgpool`."""
    op = "conv_bn_act_avgpool"
    geometry = (stride, padding, dilation, groups)
    shape, epilogue = checked(op, x, weight, scale, shift, residual, *geometry, act)
    tiles = image_tiles(shape, x.dtype)
    sums = torch.empty(
        (shape.batch * tiles, shape.out_channels),
        dtype=accumulation_dtype(x.dtype),
        device=x.device,
    )
    of_images = epilogue._replace(of_images=True)
    forward(shape, Operand(channels_last(x)), weight, sums, of_images)
    out = empty_image(x, (shape.batch, shape.out_channels, 1, 1), x, weight)
    launch(
        means_kernel,
        (shape.batch * cdiv(shape.out_channels, VECTOR),),
        reads=[sums],
        writes=[out],
        numbers=[shape.out_channels, tiles, shape.out_size[0] * shape.out_size[1]],
        finalizes=True,
        BLOCK=VECTOR,
        num_warps=4,
    )
    return out
