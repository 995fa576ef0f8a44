"""bn_act_maxpool, and where in its window each maximum is: ``kh * kernel_w + kw``."""

from collections.abc import Sequence

from torch import Tensor

from . import bn_act_maxpool
from .pooling import Pooling


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
) -> tuple[Tensor, Tensor | None]:
    pool = Pooling(kernel_size, stride, padding, dilation)
    settings = (pool, ceil_mode, act)
    return bn_act_maxpool.run("bn_act_maxpool_train", x, scale, shift, *settings, with_argmax=True)
