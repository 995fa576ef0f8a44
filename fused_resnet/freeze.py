"""``freeze``: a copy of a model for serving, with constant weights laid out for the kernels."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .blocks import Fused, Group, Pair
from .calibrate import batches_of, to_int8
from .conditions import pair_obstacle, plain, uses_batch_statistics
from .convert import check_model, fuse, joined, unfuse
from .frozen_conv import FOLD_BOUND, FrozenConv, pair_in_steps, untuned
from .graphs import Graphs
from .measure import error_of, error_of_all, floating, within
from .reference import accumulation_dtype
from .winograd import TILES, amplification


class Frozen(nn.Module):
    """What :func:`freeze` returns: call it to run the model. It cannot be trained or retyped.

    Attributes:
        model: the frozen copy.
        errors: for ``"eager"`` (the source) and ``"frozen"``, the mean and the maximum error of the
            outputs on the example against the source in float64, relative to the largest output.
            In 8 bits also ``"calibration"``: those on the calibration batches against float32, and
            ``top5``, how many of the five likeliest classes are the same, from 0 to 1.
        layer_errors: the same of each layer that is folded or in Winograd's form, beside eager's
            convolution and BatchNorm, on the first image of what it is given; not of layers in 8
            bits.
        unfolded: layers that keep their BatchNorm's scale apart because folding would cost
            accuracy, and what it would cost.
        failed: by layer, the engines that could not run it on the example, and what they raised.
        graphs: where :meth:`use_graphs` was called, which shapes run as CUDA graphs.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.dtype, self.device = dtype, device
        self.errors: dict[str, dict[str, float]] = {}
        self.layer_errors: dict[str, dict[str, dict[str, float]]] = {}
        self.unfolded: dict[str, str] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.graphs: Graphs | None = None
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def prepare(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
                return x
            if x.dtype != self.dtype or x.device != self.device:
                raise RuntimeError(
                    f"frozen model: input must be {self.dtype} on {self.device}, got {x.dtype} on "
                    f"{x.device}; freeze the source again for another"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "frozen model: input must not require grad; it has no backward, its source has"
                )
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

        args, kwargs = tree_map(prepare, (args, kwargs))
        # The dtype was chosen when freezing: autocast has no say any more.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.graphs is not None:
                return self.graphs.run(self.model, args, kwargs)
            return self.model(*args, **kwargs)

    def use_graphs(self, on: bool = True) -> "Frozen":
        """Launch a call's kernels at once, as a CUDA graph, for each shape of inputs.

        A shape is captured at its first call, which takes some milliseconds and holds the memory of
        all that is between inputs and outputs, and replayed from then on where that is faster;
        ``graphs.ways`` tells. Replays do what the first call did: what changes the model afterwards
        (hooks, or tensors put in the place of its own; not ``load_state_dict`` of its layers) needs
        another ``use_graphs()``. Copies of the model keep the wish, and no graph; files neither.

        Returns:
            The model.

        Raises:
            RuntimeError: the model is not on a CUDA device.
        """
        if on and self.device.type != "cuda":
            raise RuntimeError(
                f"use_graphs: the model must be on a CUDA device, is on {self.device}"
            )
        self.graphs = Graphs() if on else None
        return self

    def train(self, mode: bool = True) -> "Frozen":
        if mode:
            raise RuntimeError(
                "frozen model: it cannot be trained; train its source and freeze again"
            )
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype or moved.device != self.device:
            raise RuntimeError(
                f"frozen model: it stays {self.dtype} on {self.device}, asked for {moved.dtype} on "
                f"{moved.device}; freeze the source again instead"
            )
        if self.graphs is not None:
            self.graphs = Graphs()
        return super()._apply(fn, recurse)


#: Makes a pair's layer: of its convolution, its BatchNorm, what follows them, the path it will have
#: and its dtype.
MakeLayer = Callable[[Any, Any, Pair, str, torch.dtype], FrozenConv]


def _freeze_block(m: Fused, path: str, make: MakeLayer, dtype: torch.dtype) -> None:
    pairs = [p for group in m.fused_groups() if not _static_obstacle(m, group) for p in group.pairs]
    for p in pairs:
        parent, _, name = p.conv.rpartition(".")
        bn_name = p.bn.rpartition(".")[2]
        owner = m.get(parent) if parent else m
        owner._modules[name] = make(m.get(p.conv), m.get(p.bn), p, joined(path, p.conv), dtype)
        owner._modules[bn_name] = nn.Identity()
    m.frozen_pairs = pairs or None


def frozen_copy(op: str, model: nn.Module, dtype: torch.dtype | None, make: MakeLayer) -> Frozen:
    """A copy in which each pair that can be fused is the layer ``make`` made of it; not tuned."""
    check_model(op, model)
    frozen_model = fuse(copy.deepcopy(model).eval())
    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in tensors if t.dtype.is_floating_point}
    convolutions = {m.weight.dtype for m in model.modules() if isinstance(m, nn.Conv2d)}
    if len(devices) > 1 or len(convolutions) > 1:
        raise RuntimeError(
            f"{op}: model must be on one device with convolutions of one dtype, got "
            f"{sorted(map(str, devices))} and {sorted(map(str, convolutions))}"
        )
    device = devices.pop() if devices else torch.device("cpu")
    own = convolutions.pop() if convolutions else torch.get_default_dtype()
    dtype = dtype or own
    with torch.no_grad():
        for path, m in list(frozen_model.named_modules()):
            if isinstance(m, Fused):
                _freeze_block(m, path, make, dtype)
        frozen_model.requires_grad_(False)
        for m in frozen_model.modules():
            if not isinstance(m, FrozenConv):
                m._apply(lambda t: _cast(t, dtype), recurse=False)
    return Frozen(frozen_model, dtype, device)


def freeze(
    model: nn.Module,
    *,
    example: Any,
    dtype: torch.dtype | None = None,
    calibration: Iterable[Any] | None = None,
    winograd: bool = False,
) -> Frozen:
    """A copy of ``model`` for serving: constant weights packed for the kernels, tuned.

    The copy shares no storage with ``model`` and takes any batch and image size. It can be copied,
    pickled, saved, compiled and exported; it cannot be trained, retyped or moved.

    Args:
        model: a module in evaluation mode, fused or not. What :func:`fuse` can fuse is frozen; the
            rest is copied as it is.
        example: an input, or a tuple of inputs, as the model will see it: layers are tuned and
            errors measured on it.
        dtype: float32, bfloat16, float16 or float64 to convert to; default: the model's own. With
            int8, on CPUs, convolutions of four channels a group or more are computed in 8 bits:
            weights in int8, of a step for each output channel, activations in uint8, of a step for
            each. Inputs, outputs and all other layers are float32. Hooks see the bytes that go from
            layer to layer, and NaN becomes the least that there is.
        calibration: for int8, an iterable of inputs like those to come, such as a DataLoader: a
            tensor each, or a tuple or list that begins with what ``example`` consists of (labels
            behind that are left out). Held in memory until this returns. The steps of activations
            are 255ths of the largest range on it; what lies outside later is clipped.
        winograd: whether 3x3 convolutions with stride 1 may be computed in Winograd's form, in
            float32 on a CPU, where that is faster: with 2.25 or 4 times fewer multiplications, and
            with errors larger by what :func:`fused_resnet.winograd.amplification` says, 1.7 or 5
            times. ``layer_errors`` has them. What is not finite reaches all of the 2x2 or 4x4
            pixels that are computed together, infinities as NaN.

    Returns:
        A module with the same call signature; its ``errors`` tell how far its outputs and the
        source's lie from the source in float64 on the example. A layer is folded unless that costs
        accuracy: with the scale folded in, its error may be 1.5 times eager's in the mean and twice
        at most (:func:`fused_resnet.measure.within`).

    Raises:
        TypeError: ``model`` is not a module, ``dtype`` neither a floating point type nor int8, or
            ``calibration`` missing for int8, given for another, or not of inputs.
        ValueError: ``calibration`` is empty, or has values that are not finite.
        RuntimeError: ``model`` is in training mode, compiled, scripted or wrapped, or spread over
            several devices or dtypes; for int8, not on a CPU; ``winograd`` is asked for of another
            dtype or device than float32 on a CPU.
    """
    in_bytes = isinstance(dtype, torch.dtype) and dtype == torch.int8
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not in_bytes and not floating:
        raise TypeError(f"freeze: dtype must be a floating point torch.dtype, got {dtype!r}")
    if calibration is not None and not in_bytes:
        raise TypeError(f"freeze: calibration is for dtype torch.int8, got dtype {dtype}")
    if isinstance(model, nn.Module):
        training = [
            path or "the model"
            for path, m in model.named_modules()
            if m.training and (m is model or isinstance(m, nn.BatchNorm2d))
        ]
        if training:
            raise RuntimeError(
                f"freeze: model must be in evaluation mode, got {training[0]} in training mode; "
                "call model.eval() first"
            )
        for p in model.parameters() if in_bytes else ():
            if p.device.type != "cpu":
                raise RuntimeError(
                    f"freeze: dtype torch.int8 is for CPUs, got a model on {p.device}"
                )
    inputs = example if isinstance(example, tuple) else (example,)
    if in_bytes:
        dtype = torch.float32
        batches = batches_of(calibration, len(inputs))
    pairs: dict[str, tuple[Any, Any]] = {}

    def make(conv: Any, bn: Any, p: Pair, path: str, kind: torch.dtype) -> FrozenConv:
        pairs[path] = conv, bn
        layer = FrozenConv.of(conv, bn, kind)
        layer.winograd = winograd
        return layer

    frozen = frozen_copy("freeze", model, dtype, make)
    kind = torch.int8 if in_bytes else frozen.dtype
    if winograd and (kind, frozen.device.type) != (torch.float32, "cpu"):
        raise RuntimeError(
            f"freeze: winograd=True is for torch.float32 on cpu, got {kind} on {frozen.device}"
        )
    with torch.no_grad():
        served = tree_map(lambda t: _cast(t, frozen.dtype), inputs)
        # Before tuning: what bytes stand for must not depend on which engine was faster.
        calibrated = {}
        if in_bytes:
            given = tree_map(lambda t: _cast(t, frozen.dtype), batches)
            calibrated["calibration"] = to_int8(frozen, given)
        if frozen.device.type in ("cpu", "cuda"):
            tune_layers(frozen, served)
            _bound_errors(frozen, pairs, served)
        frozen.errors = _errors(model, frozen, inputs, served, frozen.dtype) | calibrated
    return frozen


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype.is_floating_point else t


def _static_obstacle(m: Fused, group: Group) -> bool:
    modules = [m.modules_of(p) for p in group.pairs]
    return any(
        pair_obstacle(*pair, m.norms) or uses_batch_statistics(pair[1]) for pair in modules
    ) or any(plain(other, (kind,)) for other, kind in group.skipped)


def _layers(frozen: Frozen) -> dict[str, FrozenConv]:
    """Those that there are several engines for."""
    return {path: m for path, m in frozen.model.named_modules() if type(m) is FrozenConv}


def tune_layers(frozen: Frozen, inputs: Any) -> None:
    """Time the engines of every distinct layer on the inputs it gets when the example is run."""
    seen: dict[Any, FrozenConv] = {}

    def before(m: Any, args: tuple[Any, ...]) -> None:
        x, *after = args
        epilogue = [t if isinstance(t, str) else t is not None for t in after]
        key = (x.shape, m.weight.shape, str(m.geometry), str(epilogue))
        if key not in seen:
            m.tune(*args)
            seen[key] = m
        m.engine, m.failed = seen[key].engine, seen[key].failed
        m.forget()

    layers = _layers(frozen)
    hooks = [m.register_forward_pre_hook(before) for m in layers.values()]
    frozen(*inputs)
    for hook in hooks:
        hook.remove()
    frozen.failed = {path: m.failed for path, m in layers.items() if m.failed}


def _bound_errors(frozen: Frozen, pairs: dict[str, tuple[Any, Any]], inputs: Any) -> None:
    """Unfold each layer whose error on the inputs is outside the rule for being folded.

    And take one out of Winograd's form whose error is outside the rule for that.
    """
    layers = _layers(frozen)
    apart = frozen.dtype == accumulation_dtype(frozen.dtype)  # in half types no layer is folded
    hooks = []
    for path, layer in layers.items():
        if apart and not layer.folded:
            frozen.unfolded[path] = f"folded weights would be off by more than {FOLD_BOUND:.1e}"
        if layer.folded or layer.engine in TILES:
            hooks.append(layer.register_forward_pre_hook(_judge(frozen, path, *pairs[path])))
    frozen(*inputs)
    for hook in hooks:
        hook.remove()


def _judge(frozen: Frozen, path: str, conv: Any, bn: Any) -> Callable[..., None]:
    def before(layer: Any, args: tuple[Any, ...]) -> None:
        x, act, residual = (*args, "none", None)[:3]
        tuned = layer.engine
        if not (layer.folded or tuned in TILES) or not x.numel():
            return
        given = x[:1], act, None if residual is None else residual[:1]
        truth = pair_in_steps(conv, bn, given[0].double(), *given[1:])
        eager = error_of(pair_in_steps(conv, bn, *given), truth)
        if tuned in TILES:  # what folding costs is asked apart
            layer.engine = untuned(x.device, x.dtype)
        own = error_of(layer.forward(*given), truth)
        if layer.folded and not within(own, eager) and math.isfinite(eager.max):
            frozen.unfolded[path] = f"folded, its error is {own.max:.1e}, eager's {eager.max:.1e}"
            layer.unfold(conv, bn)
            own = error_of(layer.forward(*given), truth)
        if tuned in TILES:
            direct, layer.engine = layer.engine, tuned
            found = error_of(layer.forward(*given), truth)
            if within(found, eager, amplification(TILES[tuned])):
                own = found
            else:
                layer.engine = direct
                frozen.failed[path] = layer.failed = {
                    **layer.failed,
                    tuned: f"its error is {found.max:.1e}, eager's {eager.max:.1e}",
                }
            layer.forget()
        frozen.layer_errors[path] = {"eager": eager._asdict(), "frozen": own._asdict()}

    return before


def _errors(
    source: nn.Module, frozen: Frozen, inputs: Any, served: Any, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    own = unfuse(copy.deepcopy(source))
    exact = tree_map(lambda t: _cast(t, torch.float64), inputs)
    truth = floating(copy.deepcopy(own).double()(*exact))
    eager = own.to(dtype)
    result = {}
    for name, m in (("eager", eager), ("frozen", frozen)):
        outputs = floating(m(*served))
        result[name] = error_of_all(outputs, truth)._asdict()
    return result
