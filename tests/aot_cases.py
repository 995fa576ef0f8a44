"""What tests/aot.py compiles: each op called on meta tensors, in every form that makes another
kernel."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = (torch.channels_last, torch.contiguous_format)


class Case(NamedTuple):
    op: str
    args: tuple[Any, ...]
    wide: bool = False  # every access of global memory is of 16 bytes


def image(*shape: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def vector(n: int, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.empty(n, dtype=wide, device="meta")


CASES: list[Case] = []


def add(op: str, *args: Any, wide: bool = False) -> None:
    CASES.append(Case(op, args, wide))


for dtype, layout in itertools.product(DTYPES, LAYOUTS):
    last = layout == torch.channels_last
    x = image(32, 64, 56, 56, dtype=dtype, layout=layout)
    c = vector(64, dtype)
    add("bn_act", x, c, c, x, "relu", wide=last)
    add("bn_act_", x, c, c, None, "none", wide=last)
    # Channels that divide by 8 and not by 16, pixels that divide by nothing.
    ragged = image(3, 24, 7, 7, dtype=dtype, layout=layout)
    add("bn_act", ragged, *[vector(24, dtype)] * 2, None, "relu", wide=last)

for dtype in DTYPES:
    x = image(32, 64, 56, 56, dtype=dtype, layout=torch.channels_last)
    for op, coeff in (("sum", None), ("sum", [1.0, 0.5]), ("prod", None), ("max", None)):
        add("eltwise_act", [x, x], op, coeff, "relu", wide=True)
    stored = torch.empty(64, dtype=dtype, device="meta")
    add("bn_scale_shift", *[stored] * 4, 1e-5)
    add("bn_scale_shift", stored, stored, None, None, 1e-5)
