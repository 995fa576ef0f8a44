"""Registers the kernels as the ops of ``fused_resnet_triton``, which csrc/torch/schema.cpp declares
and :mod:`fused_resnet.native` completes."""

from collections.abc import Callable
from typing import Any

import torch

from .bn_act import bn_act, bn_act_
from .bn_scale_shift import bn_scale_shift
from .eltwise_act import eltwise_act
from .launch import INTERPRETED

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    bn_act,
    bn_act_,
    bn_scale_shift,
    eltwise_act,
)

#: By op. Called on meta or fake tensors they allocate and record launches, see ``launch``.
IMPLEMENTATIONS = {f.__name__: f for f in _FUNCTIONS}

#: Ops that cannot be computed in float64.
NO_FLOAT64: frozenset[str] = frozenset()

#: The devices whose tensors they run on.
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)

_library = torch.library.Library("fused_resnet_triton", "IMPL")
for _name, _function in IMPLEMENTATIONS.items():
    for _device in DEVICES:
        _library.impl(_name, _function, _device.upper())
