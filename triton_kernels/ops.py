"""Registers the kernels as the ops of ``fused_resnet_triton``, which csrc/torch/schema.cpp declares
and :mod:`fused_resnet.native` completes."""

from collections.abc import Callable
from typing import Any

import torch

from .bn_act import bn_act, bn_act_
from .bn_act_backward import bn_act_backward, bn_act_backward_
from .bn_act_backward_reduce import bn_act_backward_reduce
from .bn_act_gram import bn_act_gram
from .bn_act_maxpool import bn_act_maxpool
from .bn_act_maxpool_backward import bn_act_maxpool_backward
from .bn_act_maxpool_backward_reduce import bn_act_maxpool_backward_reduce
from .bn_act_maxpool_train import bn_act_maxpool_train
from .bn_finalize import bn_finalize
from .bn_scale_shift import bn_scale_shift
from .bn_stats import bn_stats
from .conv_bn_act import conv_bn_act
from .conv_bn_act_avgpool import conv_bn_act_avgpool
from .conv_bn_act_maxpool import conv_bn_act_maxpool
from .conv_chain import (
    bn_act_conv_bn_act,
    bn_act_conv_stats,
    bn_act_gram_backward,
    bn_backward_conv_dgrad,
    bn_backward_conv_wgrad,
)
from .conv_dgrad import conv_dgrad, conv_dgrad_
from .conv_wgrad import conv_wgrad
from .eltwise_act import eltwise_act
from .eltwise_act_backward import eltwise_act_backward
from .global_avg_pool import global_avg_pool
from .gram_gradients import gram_gradients
from .gram_moments import gram_moments
from .gram_stats import gram_stats
from .launch import INTERPRETED
from .relu_backward_conv_wgrad import relu_backward_conv_wgrad
from .relu_backward_reduce import relu_backward_reduce

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    bn_act,
    bn_act_,
    bn_act_backward,
    bn_act_backward_,
    bn_act_backward_reduce,
    bn_act_conv_bn_act,
    bn_act_conv_stats,
    bn_act_gram,
    bn_act_gram_backward,
    bn_act_maxpool,
    bn_act_maxpool_backward,
    bn_act_maxpool_backward_reduce,
    bn_act_maxpool_train,
    bn_backward_conv_dgrad,
    bn_backward_conv_wgrad,
    bn_finalize,
    bn_scale_shift,
    bn_stats,
    conv_bn_act,
    conv_bn_act_avgpool,
    conv_bn_act_maxpool,
    conv_dgrad,
    conv_dgrad_,
    conv_wgrad,
    eltwise_act,
    eltwise_act_backward,
    global_avg_pool,
    gram_gradients,
    gram_moments,
    gram_stats,
    relu_backward_conv_wgrad,
    relu_backward_reduce,
)

#: By op. Called on meta or fake tensors they allocate and record launches, see ``launch``.
IMPLEMENTATIONS = {f.__name__: f for f in _FUNCTIONS}

#: The devices whose tensors they run on.
DEVICES = ("cpu", "cuda") if INTERPRETED else ("cuda",)

_library = torch.library.Library("fused_resnet_triton", "IMPL")
for _name, _function in IMPLEMENTATIONS.items():
    for _device in DEVICES:
        _library.impl(_name, _function, _device.upper())
