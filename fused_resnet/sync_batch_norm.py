"""BatchNorm over the batches of several processes, on any device."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import moments
from .moments import run, sum_over

M = TypeVar("M", bound=nn.Module)


def group_of(bn: nn.Module) -> Any:
    """The processes whose batches count as one in this module's next forward, or None."""
    if not isinstance(bn, nn.SyncBatchNorm | SyncBatchNorm) or not bn.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class SyncBatchNorm(nn.BatchNorm2d):
    """:class:`torch.nn.SyncBatchNorm` of images that also runs on the CPU, also without data.

    Statistics are combined by Chan's formula from every process's mean, squared deviations and
    count, so batches may differ in size. Inside a fused block it is fused with what surrounds it,
    as torch's own is. Its reference is BatchNorm2d in one process on all batches together, which
    is also what it is: DistributedDataParallel refuses torch's class on the CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in BatchNorm2d.
        process_group: whose batches count as one; default: all processes.

    Shape:
        input (N, C, H, W), output the same.

    Raises:
        ValueError: one value per channel, over all processes together.
        NotImplementedError: in a second derivative.
    """

    process_group: Any = None

    def __init__(self, num_features: int, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(num_features, *args, **kwargs)
        self.process_group = process_group

    @classmethod
    def convert_sync_batchnorm(cls, module: M, process_group: Any = None) -> M:
        """Make every BatchNorm2d and torch.nn.SyncBatchNorm in ``module`` one of this class.

        In place: the modules, their tensors and hooks stay the same. Call it before or after
        :func:`fused_resnet.fuse`. Returns ``module``.
        """
        for m in module.modules():
            if type(m) in (nn.BatchNorm2d, nn.SyncBatchNorm):
                m.__class__, m.process_group = cls, process_group
        return module

    def forward(self, input: Tensor) -> Tensor:
        group = group_of(self)
        self._check_input_dim(input)
        if group is None:
            return super().forward(input)
        running = (self.running_mean, self.running_var, *moments.count_batches(self))
        return _Normalise.apply(input, self.weight, self.bias, *running, self.eps, group)


class _Normalise(torch.autograd.Function):
    """``apply(x, weight, bias, running_mean, running_var, momentum, eps, group)``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: Any,
    ) -> Tensor:
        whole = moments.combine(moments.of_tensor(x, "auto"), group)
        if whole.values <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input size "
                f"{tuple(x.shape)} and {whole.values:g} values in all processes"
            )
        given = (whole.m2, whole.values, weight, bias, running_mean, running_var, momentum, eps)
        scale, shift, invstd = run("bn_finalize", "auto", whole.mean, *given)
        ctx.group, ctx.values = group, whole.values
        ctx.save_for_backward(x, scale, shift, whole.mean, invstd)
        return run("bn_act", "auto", x, scale, shift, None, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("SyncBatchNorm: a second derivative is not available")
        x, scale, shift, mean, invstd = ctx.saved_tensors
        reduced = (None, scale, shift, mean, invstd, "none")
        dbias, dweight = run("bn_act_backward_reduce", "auto", grads[0], x, *reduced)
        batch = (mean, invstd, *sum_over(ctx.group, dbias, dweight), ctx.values)
        dx = run("bn_act_backward", "auto", grads[0], x, None, scale, shift, *batch, "none")
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        return (
            dx, dweight if need_weight else None, dbias if need_bias else None,
            None, None, None, None, None,
        )  # fmt: skip
