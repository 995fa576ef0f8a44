"""The layer that :func:`fused_resnet.freeze` makes of a convolution and its BatchNorm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import engines, measure, reference, tuning, vendor, winograd
from .autograd import batch_norm_act_of_torch
from .conditions import params_of
from .modules import geometry_of, pair_scale_shift
from .native import below_autograd
from .reference import accumulation_dtype
from .sites import facts_of, layout_of

_CONV_BN_ACT = torch.ops.fused_resnet.conv_bn_act.default
_WINOGRAD = torch.ops.fused_resnet.conv_bn_act_winograd.default

#: A layer is folded only where every folded weight is within this of its float64 value, relative to
#: the largest of its channel. Overflow, NaN and vanishing scales fall outside.
FOLD_BOUND = 2.0**-22

#: The engine of a layer that cuDNN's fused kernel runs.
CUDNN = "cudnn"


def untuned(device: torch.device, dtype: torch.dtype) -> str:
    """The engine of a layer that nothing was measured on."""
    if dtype == torch.int8:  # there is no other
        return "native"
    return engines.choose("conv_bn_act", device.type, dtype)


def _unrecorded(op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call an op, past what would ask for gradients where there are none."""
    if torch.is_grad_enabled():
        return op(*args)
    with below_autograd():
        return op(*args)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight * scale`` in the scale's type."""
    return weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)


def _fold(weight: Tensor, scale: Tensor) -> Tensor | None:
    """``weight * scale`` in the accumulation type, or None where it loses more than FOLD_BOUND."""
    folded = _scaled(weight, scale)
    if not torch.isfinite(folded).all():
        return None
    exact = _scaled(weight, scale.double())
    error = (folded.double() - exact).abs().amax((1, 2, 3))
    return folded if bool((error <= FOLD_BOUND * exact.abs().amax((1, 2, 3))).all()) else None


def pair_in_steps(conv: nn.Conv2d, bn: Any, x: Tensor, act: str, residual: Tensor | None) -> Tensor:
    """``act(bn(conv(x)) + residual)`` as eager torch computes it, in the type of x."""
    tensors = (None if t is None else t.detach().to(x.dtype) for t in params_of(conv, bn))
    weight, bias, gamma, beta, mean, var = tensors
    y = F.conv2d(x, weight, bias, *geometry_of(conv))  # type: ignore[arg-type]
    added = None if residual is None else residual.to(x.dtype)
    return batch_norm_act_of_torch(y, mean, var, gamma, beta, added, False, 0.0, bn.eps, act)


class FrozenConv(nn.Module):
    """A convolution and its BatchNorm with constant weights: ``act(conv(x) * scale + shift + r)``.

    In float32 and float64 the scale is folded into the weight; in half types, where rounding folded
    weights costs accuracy and the epilogue's multiplication costs nothing, it stays beside it. Only
    cuDNN's fused kernel, which has no scale, is given a folded weight of a half type, on layers
    whose error keeps to the rule with it. Where ``winograd`` allows it, engines include Winograd's
    forms of a 3x3 convolution. What is packed, folded or transformed for an engine is derived: it
    is made again after copying, loading and moving, and never saved.
    """

    #: How often any layer's tensors may have moved.
    changes = 0

    weight: Tensor
    scale: Tensor | None
    shift: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor,
        geometry: tuple[list[int], list[int], list[int], int],
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.geometry = geometry
        self.engine = untuned(weight.device, weight.dtype)
        self.failed: dict[str, str] = {}
        self.winograd = False
        self._packed: Tensor | None = None
        self._folded: tuple[Tensor, Tensor] | None = None
        self._transformed: dict[str, Tensor] = {}

    @classmethod
    def of(cls, conv: nn.Conv2d, bn: nn.Module, dtype: torch.dtype) -> "FrozenConv":
        """What a convolution and its BatchNorm are now, in ``dtype``."""
        live_scale, live_shift = pair_scale_shift(conv, bn)
        scale = live_scale.to(accumulation_dtype(dtype))
        weight = conv.weight.detach().to(dtype)
        folded = _fold(weight, scale) if dtype == scale.dtype else None
        weight = (weight if folded is None else folded).clone(memory_format=torch.channels_last)
        kept = scale if folded is None else None
        return cls(weight, kept, live_shift.to(scale.dtype), geometry_of(conv))

    def unfold(self, conv: nn.Conv2d, bn: nn.Module) -> None:
        """Take the scale out of the weight again: of the modules that this layer was made of."""
        scale, _ = pair_scale_shift(conv, bn)
        self.weight = conv.weight.detach().to(
            self.weight, memory_format=torch.channels_last, copy=True
        )
        self.scale = scale.to(self.shift.dtype)
        self.forget()

    @classmethod
    def empty(cls, conv: nn.Conv2d, folded: bool, dtype: torch.dtype) -> "FrozenConv":
        """One whose tensors are yet to be loaded: on the meta device."""
        weight = torch.empty(
            conv.weight.shape, dtype=dtype, device="meta", memory_format=torch.channels_last
        )
        shift = weight.new_empty(conv.out_channels, dtype=accumulation_dtype(dtype))
        scale = None if folded else torch.empty_like(shift)
        return cls(weight, scale, shift, geometry_of(conv))

    @property
    def folded(self) -> bool:
        """Whether BatchNorm's scale is inside the weight."""
        return self.scale is None

    def forward(self, x: Tensor, act: str = "none", residual: Tensor | None = None) -> Tensor:
        own = self._buffers  # past nn.Module.__getattr__, which is slow
        args: Any = (x, own["weight"], own["scale"], own["shift"], residual, *self.geometry, act)
        compiling = torch.compiler.is_compiling()
        if self.engine != "native" and (x.is_cuda or not compiling):
            if self.engine in winograd.TILES:
                return self._by_winograd(x, act, residual)
            if self.engine == CUDNN and (given := self._for_cudnn(x, act, residual)) is not None:
                return _unrecorded(vendor.conv_bn_act_cudnn, *given)
            engine = "vendor" if self.engine == CUDNN else self.engine
            return _unrecorded(engines.implementation("conv_bn_act", engine), *args)
        # Compiled and exported programs carry plain weights only.
        if compiling:
            return torch.ops.fused_resnet.conv_bn_act(*args)
        if self._packed is None and not x.is_cuda:
            self._packed = torch.ops.fused_resnet.conv_pack(self.weight, self.geometry[3])
        return _unrecorded(_CONV_BN_ACT, *args, self._packed)

    def _by_winograd(self, x: Tensor, act: str, residual: Tensor | None) -> Tensor:
        tile, packed = winograd.TILES[self.engine], self._transformed.get(self.engine)
        if packed is None:
            packed = torch.ops.fused_resnet.conv_winograd_pack(self.weight, tile)
            self._transformed[self.engine] = packed
        args: Any = (x, self.weight, self.scale, self.shift, residual, self.geometry[1], tile, act)
        return _unrecorded(_WINOGRAD, *args, packed)

    def can_run(self, engine: str) -> bool:
        """Whether this layer can be on an engine, of those that :func:`freeze` chooses from."""
        device, dtype = self.weight.device.type, self.weight.dtype
        if engine in winograd.TILES:
            return self.winograd and winograd.suits(self.weight, self.geometry)
        if engine == CUDNN:
            return device == "cuda"
        known = engine in engines.LIBRARIES
        return known and engines.why_not(engine, "conv_bn_act", device, dtype) is None

    def candidates(self, x: Tensor, act: str, residual: Tensor | None) -> list[str]:
        """The engines that can run this layer on ``x``, the untuned choice first."""
        first = untuned(x.device, x.dtype)
        # Triton's kernels run on a CPU too, interpreted.
        of_device = ("native", "triton", "vendor") if x.is_cuda else ("native", "vendor")
        names = (*of_device, *winograd.TILES)
        others = [name for name in names if name != first and self.can_run(name)]
        return [first, *others, *([CUDNN] if self._cudnn_serves(x, act, residual) else [])]

    def _for_cudnn(self, x: Tensor, act: str, residual: Tensor | None) -> tuple[Any, ...] | None:
        """What cuDNN's fused kernel is called with for this layer, or None where it must not be."""
        if self._folded is None:
            weight, shift = self.weight, self.shift
            if self.scale is not None:
                weight = _scaled(weight, self.scale).to(x.dtype)
            self._folded = weight, shift.to(weight.dtype)
        weight, shift = self._folded
        given = (x, weight, None, shift, residual, *self.geometry[:3], act)
        if vendor.cudnn_why_not(*given, vendor.must_be_deterministic()) is not None:
            return None
        return x, weight, shift, residual, *self.geometry

    def _cudnn_serves(self, x: Tensor, act: str, residual: Tensor | None) -> bool:
        """Whether cuDNN's fused kernel takes this layer and, tried here, keeps NaN and the rule.

        The rule for errors, with the convolution, BatchNorm and addition of eager torch beside it,
        on the first image.
        """
        x = x[:1].clone(memory_format=torch.preserve_format)
        residual = None if residual is None else residual[:1]
        given = self._for_cudnn(x, act, residual)
        if given is None:
            return False
        args: Any = (x, self.weight, self.scale, self.shift, residual, *self.geometry, act)
        try:
            fused = vendor.conv_bn_act_cudnn(*given)
            exact: Any = [t.double() if isinstance(t, Tensor) else t for t in args]
            truth, eager = reference.conv_bn_act(*exact), self._in_steps(x, act, residual)
            error, bar = (measure.error_of(y, truth) for y in (fused, eager))
            x[0, 0] = torch.nan
            fused, plain = vendor.conv_bn_act_cudnn(*given), vendor.conv_bn_act(*args)
        except RuntimeError:  # cuDNN has no kernel for it
            return False
        return measure.within(error, bar) and torch.equal(fused.isnan(), plain.isnan())

    def _in_steps(self, x: Tensor, act: str, residual: Tensor | None) -> Tensor:
        """As eager torch computes, which rounds after each step."""
        y = F.conv2d(x, self.weight, None, *self.geometry)
        scale = torch.ones_like(self.shift) if self.scale is None else self.scale
        scale, shift = (v.view(1, -1, 1, 1) for v in (scale, self.shift))
        y = (y.to(scale.dtype) * scale + shift).to(x.dtype)
        y = y if residual is None else y + residual
        return F.relu(y) if act == "relu" else y

    def tune(self, x: Tensor, act: str = "none", residual: Tensor | None = None) -> None:
        """Move this layer to the engine that is fastest on ``x``, and keeps to the rule for errors.

        It stays on the untuned one unless another is clearly faster. ``failed`` tells which are
        out, and why. What :func:`fused_resnet.use_tuning` keeps is not measured again.
        """

        def call(way: str, modules: Sequence[Any], inputs: Sequence[Any]) -> Tensor:
            (layer,), (given, added) = modules, inputs
            if way == tuning.EAGER:  # what others' errors are compared with
                return layer._in_steps(given, act, added)
            layer.engine = way
            return layer.forward(given, act, added)  # past freeze's hook

        own = (self.weight.shape, layout_of(self.weight), str(self.geometry), self.folded)
        op = "frozen conv_bn_act" + (", winograd" if self.winograd else "")
        facts = facts_of(op, x, (own,), act, residual is not None)
        ways = self.candidates(x, act, residual)
        times = {way: winograd.amplification(tile) for way, tile in winograd.TILES.items()}
        site = tuning.Site(facts, (self,), (x, residual), ways, call, times)
        entry = tuning.kept(site) if tuning.is_on() else tuning.race(site)
        self.engine, self.failed = ways[0], {}
        if entry is not None:
            self.engine, self.failed = entry.way, entry.failed

    def forget(self) -> None:
        """Drop what is derived from the weight; the next call makes it again."""
        self._packed = self._folded = None
        self._transformed = {}
        FrozenConv.changes += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None, "_folded": None, "_transformed": {}}

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel = self.weight.shape
        stride, padding, dilation, groups = self.geometry
        return (
            f"{in_channels * groups}, {out_channels}, kernel_size={tuple(kernel)}, "
            f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, "
            f"folded={self.folded}, engine={self.engine!r}"
        )
