"""Tile sizes of the convolutions: data, and pure functions that pick."""

from typing import NamedTuple

import torch

from .launch import chosen


class Config(NamedTuple):
    """A tile of BLOCK_M x BLOCK_N results, summed up BLOCK_K terms at a time.

    ``descriptors``: a plain product's operands are loaded by the unit that sm_90 and later have for
    tiles, in warps of their own where no prologue is between them and the product.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    descriptors: bool = False

    @property
    def meta(self) -> dict[str, int]:
        """As a launch takes it."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


#: Of conv_gemm, whose rows are pixels, in half types: wide layers, narrow ones, narrow groups; and
#: one that none is given before a GPU has shown where it is faster.
GEMM_HALF = (
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 8, 3),
    Config(128, 16, 32, 4, 3),
    Config(128, 128, 64, 8, 3, descriptors=True),
)
#: The same of an operand made of two tensors, or of two products, which take registers.
GEMM_TWO = (Config(128, 64, 64, 8, 3), Config(128, 16, 32, 4, 3))
#: In float32 and float64: wide layers and narrow groups, and that one.
GEMM_WIDE = (
    Config(64, 64, 16, 8, 2),
    Config(128, 16, 16, 4, 2),
    Config(64, 64, 16, 8, 2, descriptors=True),
)
#: Of conv_wgrad, whose rows are output channels: the same cases, and before the last that of tiles
#: over several taps, whose places take registers.
WGRAD_HALF = (
    Config(128, 128, 64, 8, 3),
    Config(64, 64, 64, 4, 3),
    Config(64, 64, 32, 8, 3),
    Config(16, 64, 64, 4, 3),
)
WGRAD_WIDE = (Config(64, 64, 16, 8, 2), Config(16, 64, 16, 4, 2))
#: Of one that masks its gradient, which takes registers: wide layers, and narrow ones.
WGRAD_MASKED = (Config(128, 128, 32, 8, 3), Config(64, 64, 64, 8, 3))
#: Of bn_act_gram, whose tiles are square.
GRAM_HALF = (Config(64, 64, 32, 4, 3),)
GRAM_WIDE = (Config(64, 64, 16, 8, 2),)

#: Of conv_bn_act_maxpool, whose rows are the pixels that a tile of windows reads.
POOLED_HALF = (Config(256, 64, 16, 16, 2),)
POOLED_WIDE = (Config(128, 64, 16, 8, 2),)

#: Of conv_bn_act_avgpool, a tile of which is of one image, the last of a network: 7x7 pixels.
MEAN_HALF = (Config(64, 128, 64, 4, 3),)
MEAN_WIDE = (Config(64, 64, 16, 8, 2),)

#: Programs that fill any GPU with two on each of its processors, or nearly.
_PROGRAMS = 264
#: Results that all programs of a weight's gradient have at most, with those that are only parts of
#: one. A tile of 128 x 128 takes all registers of a processor: a second one waits, and its part is
#: written and read again for nothing.
_PARTIAL_RESULTS = _PROGRAMS // 2 * 128 * 128
#: Steps below which a range of pixels is not worth its partial result.
_LEAST_STEPS = 4
#: Rows of a Gram matrix that are summed up in the accumulation type.
_GRAM_ROWS = 1024


def _by_type(
    half: tuple[Config, ...], wide: tuple[Config, ...], dtype: torch.dtype
) -> tuple[Config, ...]:
    return half if dtype in (torch.float16, torch.bfloat16) else wide


def gemm(columns: int, dtype: torch.dtype, arch: int, tensors: int = 1) -> Config:
    """For so many output channels a group; ``tensors``: that are multiplied by weights."""
    configs = _by_type(GEMM_HALF, GEMM_WIDE, dtype)
    if configs is GEMM_WIDE:
        return chosen(configs, int(columns <= 16))
    if tensors > 1:
        return chosen(GEMM_TWO, int(columns <= 16))
    return chosen(configs, 2 if columns <= 16 else int(columns <= 64))


def wgrad(
    rows: int, columns: int, dtype: torch.dtype, arch: int, packed: bool, masked: bool
) -> Config:
    """For so many output channels, and taps times input channels, a group.

    ``packed``: a tile goes over several taps; ``masked``: the gradient is masked.
    """
    configs = _by_type(WGRAD_HALF, WGRAD_WIDE, dtype)
    narrow = min(rows, columns) <= 64
    if masked and configs is WGRAD_HALF:
        return chosen(WGRAD_MASKED, int(narrow))
    if rows <= 16:
        return chosen(configs, len(configs) - 1)
    if configs is WGRAD_WIDE:
        return chosen(configs, 0)
    return chosen(configs, 2 if packed else int(narrow))


def gram(channels: int, dtype: torch.dtype, arch: int) -> Config:
    """For a matrix of so many channels."""
    return chosen(_by_type(GRAM_HALF, GRAM_WIDE, dtype), 0)


def pooled(dtype: torch.dtype) -> Config:
    """For windows over a convolution's output."""
    return chosen(_by_type(POOLED_HALF, POOLED_WIDE, dtype), 0)


def mean(dtype: torch.dtype) -> Config:
    """For the sums of images."""
    return chosen(_by_type(MEAN_HALF, MEAN_WIDE, dtype), 0)


def ranges(tiles: int, steps: int, config: Config) -> tuple[int, int]:
    """Into how many ranges ``steps`` are cut for so many tiles, and how long each is.

    The same on every device, so that results are.
    """
    programs = min(_PROGRAMS, _PARTIAL_RESULTS // (config.m * config.n))
    count = max(1, min(programs // max(1, tiles), steps // _LEAST_STEPS))
    length = -(-steps // count)
    return max(1, -(-steps // max(1, length))), length


def gram_steps(tiles: int, rows: int, block: int) -> int:
    """How many blocks of rows a range has: fewer than it may where that makes too few programs."""
    wanted = -(-rows * tiles // (_PROGRAMS * block))
    return max(1, min(_GRAM_ROWS // block, wanted))
