"""The backward of a chain that is run by :data:`fused_resnet.engines.CHAIN_OPS`.

The gradient of each BatchNorm, ``dy = a g + b y + c``, is made as convolutions read it, and the
gradient behind each ReLU masked and reduced as it is written: of every step there are two passes.
"""

from typing import Any

from torch import Tensor

from .moments import run, sum_over
from .plan import Gradients, Kept, Step, is_pointwise
from .reference import memory_format
from .training_backward import _NOTHING, Backward

#: sum g and sum g * (y - mean) * invstd of a step's output y: gradients of its beta and gamma.
Sums = tuple[Tensor | None, Tensor | None]


class FusedBackward(Backward):
    """One backward of a chain."""

    __slots__ = ()

    def walk(
        self, x: Tensor, out: Tensor, argmax: Tensor | None, grad: Tensor, need_residual: bool
    ) -> tuple[Tensor | None, Tensor | None, list[Gradients]]:
        """See :meth:`Backward.walk`."""
        plan, n = self.plan, len(self.plan.steps) - 1
        if plan.pool is not None:
            return super().walk(x, out, argmax, grad, need_residual)
        grad = grad.contiguous(memory_format=memory_format(out))
        gradients: list[Gradients] = [_NOTHING] * len(self.params)
        s = None
        if self._begins_with_product(n):
            source = (*self.source(n, x)[:3], self.kept[n].center, self.source(n, x).act)
            g, sum_g, s = run("relu_backward_conv_wgrad", plan.engine, grad, out, *source)
        else:
            g, sum_g = self._behind_activation(out, grad, True)
        added, spread = g if plan.identity and self.need_x else None, 1
        if plan.shortcut is not None and (self.need_x or any(self.wanted[-1][:4])):
            added, gradients[-1] = self._branch(plan.shortcut, g, sum_g, x)
            if is_pointwise(plan.shortcut, self.params[-1].weight):
                spread = plan.shortcut.stride[0]
        dz: Tensor | None = g
        sums: Sums = (sum_g, None)
        for i in range(n, -1, -1):
            if dz is None:
                break
            step, more = plan.steps[i], (added, spread) if i == 0 else (None, 1)
            if self.kept[i].y is None:
                dz, sums, gradients[i] = self._product_step(i, step, dz, sum_g, x, *more, s)
                continue
            if i == n:
                sums = self._reduced(i, step, g)
            dz, sums, gradients[i] = self._step(i, step, dz, sums, x, *more)
        return (dz if self.need_x else None), (g if need_residual else None), gradients

    def _begins_with_product(self, n: int) -> bool:
        """Whether one op makes the gradient behind the last ReLU and what a product makes of it."""
        step = self.plan.steps[n]
        return (
            self.plan.act == "relu"
            and self.kept[n].y is None
            and self._needs_s(n, step)
            and step.stride == [1, 1]
            and is_pointwise(step, self.params[n].weight)
        )

    def _needs_s(self, i: int, step: Step) -> bool:
        return step.batch or self.wanted[i].weight or self.wanted[i].gamma

    def _branch(
        self, step: Step, g: Tensor, sum_g: Tensor, x: Tensor
    ) -> tuple[Tensor | None, Gradients]:
        """Through the shortcut: its gradient at the positions that it reads, see :meth:`_grid`."""
        i = len(self.plan.steps)
        if self.kept[i].y is None:
            dx, _, own = self._product_step(i, step, g, sum_g, x)
        else:
            dx, _, own = self._step(i, step, g, self._reduced(i, step, g), x)
        return dx, own

    def _grid(self, i: int, step: Step, g: Tensor, z: Tensor) -> tuple[Any, ...]:
        """Sizes and geometry by which g is taken to the input z of step ``i``.

        A shortcut of 1x1 makes no gradient of what it skips; the first step adds to all of it.
        """
        if i == len(self.plan.steps) and is_pointwise(step, self.params[i].weight):
            return list(g.shape[2:]), *step._replace(stride=[1, 1]).geometry
        return list(z.shape[2:]), *step.geometry

    def _reduced(self, i: int, step: Step, g: Tensor) -> Sums:
        k, wanted = self.kept[i], self.wanted[i]
        if not (step.batch or wanted.gamma or wanted.beta):
            return None, None
        given = (k.y, None, k.scale, k.shift, k.mean, k.invstd, "none")
        return run("bn_act_backward_reduce", self.plan.engine, g, *given)

    def _mask(self, i: int) -> tuple[Any, ...]:
        """Of the input of step ``i``: raw values, scale, shift, mean and invstd; x has none."""
        if i in (0, len(self.plan.steps)):
            return (None,) * 5
        k = self.kept[i - 1]
        return k.y, k.scale, k.shift, k.mean, k.invstd

    def _step(
        self,
        i: int,
        step: Step,
        g: Tensor,
        sums: Sums,
        x: Tensor,
        added: Tensor | None = None,
        spread: int = 1,
    ) -> tuple[Tensor | None, Sums, Gradients]:
        """Through a step whose raw output was kept, g being the gradient behind its ReLU.

        ``added``: what else comes to the step's input, at every ``spread``-th row and column.

        Returns:
            the gradient behind the ReLU before it, its sums, and the step's.
        """
        engine, k, wanted = self.plan.engine, self.kept[i], self.wanted[i]
        dbeta, dgamma = sums
        need_z = self.reaches(i)
        own: Gradients = (None, None, dgamma, dbeta)
        if not need_z and not wanted.weight:
            return None, (None, None), own
        y, a, b, c = None, k.scale, None, None
        if step.batch:
            a, b, c = self._coefficients(k, self.counts[i], dbeta, dgamma)  # type: ignore[arg-type]
            y = k.y
        weight, (z, scale, shift, act) = self.weight(i), self.source(i, x)
        if wanted.weight:
            source = (z, scale, shift, None, act, list(weight.shape[2:]))
            given = (g, y, a, b, c, *source, *step.geometry)
            own = (run("bn_backward_conv_wgrad", engine, *given), None, dgamma, dbeta)
        if not need_z:
            return None, (None, None), own
        given = (g, y, a, b, c, weight, added, *self._mask(i), *self._grid(i, step, g, z))
        dz, *before = run("bn_backward_conv_dgrad", engine, *given, spread)
        return dz, tuple(before), own

    def _coefficients(
        self, k: Kept, count: float, dbeta: Tensor, dgamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and c of ``dy = a g + b y + c``, of batch statistics."""
        a = k.scale
        sum_g, sum_gx = sum_over(self.plan.group, dbeta, dgamma)
        b = a * k.invstd * sum_gx * (-1 / count)
        return a, b, a * sum_g * (-1 / count) - b * k.mean

    def _product_step(
        self,
        i: int,
        step: Step,
        g: Tensor,
        sum_g: Tensor,
        x: Tensor,
        added: Tensor | None = None,
        spread: int = 1,
        s: Tensor | None = None,
    ) -> tuple[Tensor | None, Sums, Gradients]:
        """Through a step whose output was never made; see :meth:`_step`.

        ``s``: the gradient of its weight for g, where it is there already.
        """
        engine, k = self.plan.engine, self.kept[i]
        need_z = self.reaches(i)
        weight, (z, scale, shift, act) = self.weight(i), self.source(i, x)
        if s is None and self._needs_s(i, step):
            source = (z, scale, shift, k.center, act, list(weight.shape[2:]))
            nothing = (None, None, None, None)
            s = run("bn_backward_conv_wgrad", engine, g, *nothing, *source, *step.geometry)
        own, scaled, rest = self._of_product(i, step, g, sum_g, s, need_z)
        if not need_z:
            return None, (None, None), own
        if rest is None:
            given = (None, k.scale, None, None, weight, added, *self._mask(i))
            geometry = self._grid(i, step, g, z)
            dz, *before = run("bn_backward_conv_dgrad", engine, g, *given, *geometry, spread)
        else:
            given = (scaled, z, scale, shift, k.center, act, *rest, added, *self._mask(i)[3:])
            dz, *before = run("bn_act_gram_backward", engine, g, *given, step.stride[0])
        return dz, tuple(before), own
