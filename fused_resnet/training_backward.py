"""The backward of :class:`fused_resnet.training.Chain`: from the chain's end to its input."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import engines, vendor
from .moments import AS_PRODUCT, by_columns, by_transpose, count_of, run, sum_over
from .plan import Gradients, Kept, Params, Plan, Source, Step, convolve
from .reference import memory_format, suggests_channels_last

_NOTHING: Gradients = (None, None, None, None)


class Backward(NamedTuple):
    """One backward of a chain."""

    plan: Plan
    params: list[Params]
    kept: list[Kept]
    counts: list[float]
    need_x: bool
    wanted: list[Any]  #: Params of bools

    def reaches(self, i: int) -> bool:
        """Whether the input of step ``i`` needs a gradient, or anything before it."""
        before = self.wanted[:i] if i < len(self.plan.steps) else []
        return self.need_x or any(any(w[:4]) for w in before)

    def weight(self, i: int) -> Tensor:
        """Of step ``i``, in the activations' type."""
        cast = self.kept[i].weight
        return self.params[i].weight if cast is None else cast

    def source(self, i: int, x: Tensor) -> Source:
        """What the input of step ``i`` is made of."""
        if i in (0, len(self.plan.steps)):
            return Source(x)
        k = self.kept[i - 1]
        return Source(k.y, k.scale, k.shift, "relu")  # type: ignore[arg-type]

    def _input(self, i: int, x: Tensor) -> Tensor:
        """The input of step ``i``, made again."""
        y, scale, shift, act = self.source(i, x)
        return y if scale is None else run("bn_act", self.plan.engine, y, scale, shift, None, act)

    def through(
        self,
        step: Step,
        dy: Tensor,
        weight: Tensor,
        source: Source,
        need_weight: bool,
        need_z: bool,
        added: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a convolution's input, in place added to ``added``, and of its weight.

        ``source``: what its input is made of.
        """
        if need_weight and need_z:
            chosen = {self._chosen(op, step, dy, weight) for op in ("conv_dgrad", "conv_wgrad")}
            if chosen == {"vendor"}:
                return vendor.conv_backward(dy, weight, added, *source, *step.geometry)
        dw = self.wgrad(step, dy, weight, *source) if need_weight else None
        return self.dgrad(step, dy, weight, source.x, added) if need_z else None, dw

    def dgrad(
        self, step: Step, g: Tensor, weight: Tensor, x: Tensor, added: Tensor | None = None
    ) -> Tensor:
        """The gradient of x, the input of a step's convolution, in place added to ``added``."""
        op = "conv_dgrad" if added is None else "conv_dgrad_"
        dx = self._convolution(op, step, weight, g, weight, added, list(x.shape[2:]))
        return dx if added is None else added

    def wgrad(self, step: Step, g: Tensor, weight: Tensor, *z: Any) -> Tensor:
        """The gradient of a step's weight; ``z``: x, scale, shift and act of its input."""
        return self._convolution("conv_wgrad", step, weight, g, *z, list(weight.shape[2:]))

    def _convolution(self, op: str, step: Step, weight: Tensor, g: Tensor, *args: Any) -> Any:
        engine = self._chosen(op.removesuffix("_"), step, g, weight)
        return engines.implementation(op, engine)(g, *args, *step.geometry)

    def _chosen(self, op: str, step: Step, g: Tensor, weight: Tensor) -> str:
        suited = engines.suits(op, suggests_channels_last(g), weight.shape, step.groups)
        return engines.choose(op, g.device.type, g.dtype, self.plan.engine, suited)

    def walk(
        self, x: Tensor, out: Tensor, argmax: Tensor | None, grad: Tensor, need_residual: bool
    ) -> tuple[Tensor | None, Tensor | None, list[Gradients]]:
        """Gradients of x, of the residual, and of the steps and the shortcut."""
        plan, n = self.plan, len(self.plan.steps) - 1
        # What an average pooling hands back is contiguous: everything behind it would be, too.
        grad = grad.contiguous(memory_format=memory_format(out))
        gradients: list[Gradients] = [_NOTHING] * len(self.params)
        apart = need_residual or plan.identity or plan.shortcut is not None
        g, sum_g = self._behind_activation(out, grad, apart or self.kept[n].y is None)
        if plan.pool is not None:
            dz, gradients[n] = self._pooled(x, out, argmax, grad)
        elif self.kept[n].y is None:
            z = self._input(n, x)
            dz, gradients[n] = self._linear(n, plan.steps[n], g, sum_g, z, self.reaches(n), n > 0)
        elif apart:
            dz, gradients[n] = self._raw(n, plan.steps[n], g, None, "none", x, False)
        else:
            dz, gradients[n] = self._raw(n, plan.steps[n], grad, out, plan.act, x, False)
        for i in range(n - 1, -1, -1):
            if dz is None:
                break
            added = None
            if plan.identity and i == 0:
                added = g.clone() if g is grad else g
            dz, gradients[i] = self._raw(i, plan.steps[i], dz, None, "relu", x, True, added)
        dx = dz if self.need_x else None
        if plan.identity and n == 0 and dx is not None:
            dx = dx.add_(g)
        if plan.shortcut is not None and (self.need_x or any(self.wanted[-1][:4])):
            dx, gradients[-1] = self._shortcut(g, sum_g, x, dx)
        return dx, (g if need_residual else None), gradients

    def _behind_activation(self, out: Tensor, grad: Tensor, needed: bool) -> tuple[Any, Any]:
        """The gradient that has passed the last activation, and its sum per channel."""
        if not needed:
            return grad, None
        if self.plan.act == "relu":
            return run("relu_backward_reduce", self.plan.engine, grad, out)
        return grad, grad.sum((0, 2, 3), dtype=self.kept[0].scale.dtype)

    def _of_batch(
        self, i: int, step: Step, dbeta: Tensor | None, dgamma: Tensor | None
    ) -> tuple[Any, ...]:
        """mean, invstd, sum_g, sum_gx and count, as bn_act_backward takes them."""
        if not step.batch:
            return (None, None, None, None, 0.0)
        k = self.kept[i]
        sums = sum_over(self.plan.group, dbeta, dgamma)  # type: ignore[arg-type]
        return (k.mean, k.invstd, *sums, self.counts[i])

    def _raw(
        self,
        i: int,
        step: Step,
        g: Tensor,
        out: Tensor | None,
        act: str,
        x: Tensor,
        own_g: bool,
        added: Tensor | None = None,
    ) -> tuple[Tensor | None, Gradients]:
        """Through a step whose raw output was kept.

        ``own_g``: g may be overwritten; ``added``: takes the gradient of the step's input.
        """
        engine, k, wanted = self.plan.engine, self.kept[i], self.wanted[i]
        need_z = self.reaches(i)
        dbeta = dgamma = None
        if step.batch or wanted.gamma or wanted.beta:
            sums = (k.y, out, k.scale, k.shift, k.mean, k.invstd, act)
            dbeta, dgamma = run("bn_act_backward_reduce", engine, g, *sums)
        if not need_z and not wanted.weight and not wanted.bias:
            return None, (None, None, dgamma, dbeta)
        given = (k.y, out, k.scale, k.shift, *self._of_batch(i, step, dbeta, dgamma), act)
        if own_g:
            run("bn_act_backward_", engine, g, *given)
            dy = g
        else:
            dy = run("bn_act_backward", engine, g, *given)
        dbias = dy.sum((0, 2, 3), dtype=k.scale.dtype) if wanted.bias else None
        read = (self.weight(i), self.source(i, x))
        dz, dweight = self.through(step, dy, *read, wanted.weight, need_z, added)
        return dz, (dweight, dbias, dgamma, dbeta)

    def _linear(
        self,
        i: int,
        step: Step,
        g: Tensor,
        sum_g: Tensor,
        z: Tensor,
        need_z: bool,
        own_z: bool,
        added: Tensor | None = None,
    ) -> tuple[Tensor | None, Gradients]:
        """Through a convolution whose output was never made.

        ``own_z``: z may be overwritten; ``added``: takes the gradient of the step's input.
        """
        k, wanted, weight = self.kept[i], self.wanted[i], self.weight(i)
        centred = z
        if k.center is not None:
            less = (torch.ones_like(k.center), -k.center, None, "none")
            if own_z:
                run("bn_act_", self.plan.engine, z, *less)
            else:
                centred = run("bn_act", self.plan.engine, z, *less)
        need_s = step.batch or wanted.weight or wanted.gamma
        s = self.wgrad(step, g, weight, centred, None, None, "none") if need_s else None
        gradients, scaled, rest = self._of_product(i, step, g, sum_g, s, need_z)
        dz = self.dgrad(step, g, scaled, z, added) if need_z else None
        if rest is not None:
            back, offset = rest[0][:, :, None, None], rest[1]
            dz = run("conv_bn_act", self.plan.engine, centred, back, None, offset, dz, *AS_PRODUCT)
        return dz, gradients

    def _of_product(
        self, i: int, step: Step, g: Tensor, sum_g: Tensor, s: Tensor | None, need_z: bool
    ) -> tuple[Gradients, Tensor, tuple[Tensor, Tensor] | None]:
        """Gradients of a step whose output was never made, ``s`` being that of its weight for g.

        Returns:
            beside them the weight that takes g to its part of z's gradient; and the matrix and the
            vector of what z, centred, adds to its own, if it does and that is needed.
        """
        k, wanted, weight = self.kept[i], self.wanted[i], self.weight(i)
        dtype, engine = k.scale.dtype, self.plan.engine
        if not step.batch:
            dgamma = dweight = None
            if wanted.gamma:
                products = weight.to(dtype) * s  # type: ignore
                dgamma = k.invstd * (products.sum((1, 2, 3)) - k.mean * sum_g)
            if wanted.weight:
                dweight = k.scale.view(-1, 1, 1, 1) * s  # type: ignore
            scaled = (k.scale.view(-1, 1, 1, 1) * weight).to(weight.dtype)
            return (dweight, None, dgamma, sum_g), scaled, None
        w = weight.flatten(1)
        given = (w, s.flatten(1), k.scale, k.mean, k.invstd)  # type: ignore[union-attr]
        count = self.counts[i]
        dgamma, *parts = run("gram_gradients", engine, *given, sum_g, None, count)
        if self.plan.group is not None:
            sums = sum_over(self.plan.group, sum_g, dgamma)
            _, *parts = run("gram_gradients", engine, *given, *sums, count)
        scaled_s, slopes, scaled = parts
        dweight = None
        if wanted.weight:
            dweight = by_transpose(slopes, k.moments, engine, scaled_s)  # type: ignore[arg-type]
            if self.plan.group is not None:  # dy sums to zero over all processes, not over one
                total = k.moments[:, -1]  # type: ignore[index]
                of_y = slopes[:, :-1] @ total + slopes[:, -1] * count_of(g)
                dweight = dweight.addr(k.scale * sum_g + of_y, k.center)  # type: ignore[arg-type]
            dweight = dweight.as_strided(weight.shape, weight.stride())  # 1x1: any layout is alike
        gradients = (dweight, None, dgamma, sum_g)
        scaled = scaled[:, :, None, None]
        if not need_z:
            return gradients, scaled, None
        rest = by_columns(w.to(dtype), slopes, engine)
        return gradients, scaled, (rest[:-1].to(weight.dtype), rest[-1])

    def _pooled(
        self, x: Tensor, out: Tensor, argmax: Tensor | None, grad: Tensor
    ) -> tuple[Tensor | None, Gradients]:
        """Through a chain of one step that ends in a max pooling."""
        plan, k, wanted, step = self.plan, self.kept[0], self.wanted[0], self.plan.steps[0]
        geometry = plan.pool[:4]  # type: ignore[index]
        given = (out, argmax, k.y)
        dbeta, dgamma = run(
            "bn_act_maxpool_backward_reduce", plan.engine, grad, *given, k.mean, k.invstd,
            *geometry, plan.act,
        )  # fmt: skip
        if not self.need_x and not wanted.weight and not wanted.bias:
            return None, (None, None, dgamma, dbeta)
        batch = self._of_batch(0, step, dbeta, dgamma)
        dy = run(
            "bn_act_maxpool_backward", plan.engine, grad, *given, k.scale, *batch, *geometry,
            plan.act,
        )  # fmt: skip
        dbias = dy.sum((0, 2, 3), dtype=k.scale.dtype) if wanted.bias else None
        read = (self.weight(0), self.source(0, x))
        dx, dweight = self.through(step, dy, *read, wanted.weight, self.need_x, None)
        return dx, (dweight, dbias, dgamma, dbeta)

    def _shortcut(
        self, g: Tensor, sum_g: Tensor, x: Tensor, dx: Tensor | None
    ) -> tuple[Tensor | None, Gradients]:
        """Through the shortcut's convolution; its gradient of x is added to ``dx``."""
        i = len(self.plan.steps)
        k, step, stride = self.kept[i], self.plan.shortcut, self.plan.shortcut.stride  # type: ignore
        if k.y is not None or k.center is None or stride == [1, 1]:
            if k.y is not None:
                return self._raw(i, step, g, None, "none", x, False, dx)  # type: ignore
            return self._linear(i, step, g, sum_g, x, self.need_x, False, dx)  # type: ignore
        # Only every stride-th position takes part.
        part = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)
        dense = step._replace(stride=[1, 1])  # type: ignore
        d, gradients = self._linear(i, dense, g, sum_g, part, self.need_x, True)
        if d is None:
            return dx, gradients
        dx = torch.zeros_like(x) if dx is None else dx
        dx[:, :, :: stride[0], :: stride[1]].add_(d)
        return dx, gradients


def composite_backward(
    plan: Plan, x: Tensor, out: Tensor, params: list[Params], grad: Tensor, need: Any
) -> list[Tensor | None]:
    """The same gradients as differentiable functions of everything, for double backward.

    Recomputes the chain from its input in plain torch, batch statistics included.
    """
    if plan.group is not None:
        raise NotImplementedError("SyncBatchNorm: a second derivative is not available")
    flat = [t for p in params for t in p]
    with torch.enable_grad():
        y = _before_activation(plan, x, params)
        if plan.pool is not None:
            y = torch.relu(y) if plan.act == "relu" else y
            size, stride, padding, dilation, ceil_mode = plan.pool
            y = F.max_pool2d(y, size, stride, padding, dilation, ceil_mode)
            g = grad
        else:
            # Past a ReLU, the gradient is where its output is not zero, whatever was added.
            g = torch.where(out.detach() <= 0, 0, grad) if plan.act == "relu" else grad
        asked = [
            t for t, wanted in zip((x, None, *flat), need, strict=True) if wanted and t is not None
        ]
        found = iter(torch.autograd.grad(y, asked, g, create_graph=True, allow_unused=True))
        result = [
            next(found) if w and t is not None else None
            for t, w in zip((x, None, *flat), need, strict=True)
        ]
    if need[1]:
        result[1] = g
    if plan.identity and need[0]:
        result[0] = result[0] + g  # type: ignore[operator]
    return result


def _before_activation(plan: Plan, x: Tensor, params: list[Params]) -> Tensor:
    def step(z: Tensor, s: Step, p: Params) -> Tensor:
        y = convolve(z, p, s, p.weight.to(z.dtype))
        if s.batch:
            return F.batch_norm(y, None, None, p.gamma, p.beta, True, 0.0, s.eps)
        return F.batch_norm(y, p.running_mean, p.running_var, p.gamma, p.beta, False, 0.0, s.eps)

    y = x
    for i, (s, p) in enumerate(zip(plan.steps, params, strict=False)):
        y = step(torch.relu(y) if i else y, s, p)
    return y if plan.shortcut is None else y + step(x, plan.shortcut, params[-1])
