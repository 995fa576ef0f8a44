"""What counts as right, written once; no test has a tolerance of its own.

``judge`` is the rule for comparing with eager torch: both are measured against float64, relative to
the largest value there, and pooled over the seeds, because two equally good paths differ by 0.9 to
1.6 times in a single sample. ``within_rounding`` is the bound numerical analysis proves for one
sample and one element, where there is too little of eager torch to compare with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_FACTOR, MAX_FLOOR = 2.0, 1e-5
MEAN_FACTOR, MEAN_FLOOR = 1.5, 1e-6
CURVE_FACTOR, CURVE_FLOOR = 2.0, 1e-5

#: float64's floors are smaller: the truth is float64 itself there, so that eager's error reads
#: zero. Of the 29 bits float64 has more than float32, 25 are asked for.
FLOAT64_FLOOR = 2.0**-25

#: Half the distance from 1 to the next number of the type: what rounding once can be off by.
UNIT = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def classes(t: Tensor) -> Tensor:
    """0 where finite, 1 where NaN, 2 and 3 at plus and minus infinity."""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


def check_classes(ours: Tensor, truth: Tensor) -> Tensor:
    """Fail unless NaN and Inf are where ``truth``, rounded to our dtype, has them.

    Returns:
        where the finite rest is.
    """
    expected = classes(truth.to(ours.dtype))
    wrong = classes(ours) != expected
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} values are of another kind (0 finite, 1 NaN, "
        f"2 +Inf, 3 -Inf), first got {classes(ours)[wrong][0]}, expected {expected[wrong][0]}"
    )
    return expected == 0


def _errors(result: Tensor, truth: Tensor, where: Tensor) -> tuple[float, float]:
    """Maximum and mean of the error, relative to the largest value of the truth."""
    if not where.any():
        return 0.0, 0.0
    exact = truth.double()[where]
    error = (result.double()[where] - exact).abs() / (float(exact.abs().max()) or 1.0)
    return float(error.max()), float(error.mean())


def judge(
    ours: Sequence[Tensor],
    eager: Sequence[Tensor],
    truth: Sequence[Tensor],
    times: float = 1.0,
) -> None:
    """Fail unless our error is within the rule of eager torch's; one tensor of each per seed.

    Args:
        ours: results under test, all of one dtype.
        eager: what eager torch makes of the same inputs at the same dtype.
        truth: what it makes of them in float64.
        times: as much more what was asked for may lose: Winograd's form.
    """
    assert len(ours) == len(eager) == len(truth) > 0
    totals = [0.0] * 4
    for a, b, exact in zip(ours, eager, truth, strict=True):
        assert a.shape == b.shape == exact.shape, (a.shape, b.shape, exact.shape)
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        a, b, exact = a.detach().cpu(), b.detach().cpu(), exact.detach().cpu()
        where = check_classes(a, exact)
        # Where eager alone overflows, it has no error to compare with.
        found = (*_errors(a, exact, where), *_errors(b, exact, where & b.isfinite()))
        totals = [total + value for total, value in zip(totals, found, strict=True)]
    ours_max, ours_mean, eager_max, eager_mean = (total / len(ours) for total in totals)
    floor = FLOAT64_FLOOR if ours[0].dtype == torch.float64 else 1.0
    for name, factor, least, got, bar in (
        ("maximum", MAX_FACTOR, MAX_FLOOR * floor, ours_max, eager_max),
        ("mean", MEAN_FACTOR, MEAN_FLOOR * floor, ours_mean, eager_mean),
    ):
        assert got <= times * (factor * bar + least), (
            f"{name} error {got:.3g}, eager's {bar:.3g}: more than {factor} of it + {least:.3g}"
            + (f", {times:.3g} times" if times != 1 else "")
        )


def judge_curve(
    ours: Sequence[Sequence[float]],
    eager: Sequence[Sequence[float]],
    truth: Sequence[Sequence[float]],
) -> None:
    """Fail unless our losses keep to float64's as eager torch's do; one curve of each per seed.

    Training amplifies rounding: each run soon goes its own way, and how far it is from float64's at
    one step is chance. Summed over steps and seeds, the deviation says which run is less exact. The
    floor, of the losses themselves, is for runs in which nothing is amplified yet, and how the loss
    is rounded decides.
    """
    assert len(ours) == len(eager) == len(truth) > 0
    got = bar = floor = 0.0
    for a, b, exact in zip(ours, eager, truth, strict=True):
        for x, y, t in zip(a, b, exact, strict=True):
            got, bar, floor = got + abs(x - t), bar + abs(y - t), floor + abs(t)
    assert got <= CURVE_FACTOR * bar + CURVE_FLOOR * floor, (
        f"losses deviate by {got:.3g} in all, eager's by {bar:.3g}: more than {CURVE_FACTOR} of it "
        f"+ {CURVE_FLOOR * floor:.3g}"
    )


def within_rounding(ours: Tensor, truth: Tensor, magnitude: Tensor, steps: int) -> None:
    """Fail unless every element is as near as accumulating and rounding once allows.

    Args:
        ours: the result under test.
        truth: the same in float64.
        magnitude: the same sum in float64 with every term replaced by its absolute value.
        steps: how many roundings a term can go through before the last.
    """
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    where = check_classes(ours, truth)
    work = torch.float64 if ours.dtype == torch.float64 else torch.float32
    # In float64 the truth has gone through as many roundings as the result.
    accumulated = steps * UNIT[work] * (2 if work == torch.float64 else 1)
    bound = accumulated * magnitude + UNIT[ours.dtype] * (truth.abs() + accumulated * magnitude)
    bound += torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    excess = ((ours.double() - truth).abs() - bound).where(where, torch.zeros(()).double())
    assert (excess <= 0).all(), (
        f"{int((excess > 0).sum())} of {excess.numel()} values are off by more than rounding "
        f"explains, the worst by {float(excess.max()):.3g}"
    )
