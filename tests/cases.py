"""What the op tests are made of: backends, layouts, shapes from the kernels' own tile sizes, and
``verify``, which holds one op on one backend against eager torch and float64.

An op's eager twin is the chain of torch calls it replaces; run on float64 it is the truth, so that
fused_resnet/reference.py is judged like any other engine.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import simt_engine
import torch
from tolerances import judge
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import fused_resnet
from fused_resnet import engines

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
DTYPES = engines.DTYPES
HALF = (torch.bfloat16, torch.float16)
EPS = 1e-5

#: The engines under test. One that only passes on to another for an op is not listed for it.
ENGINES = {
    "reference": engines.ALL_OPS,
    "native": engines.ALL_OPS,
    "vendor": ("conv_bn_act", "conv_dgrad", "conv_wgrad"),
}


class Emulated(NamedTuple):
    """An engine whose kernels for a GPU are emulated on the CPU."""

    ops: Collection[str]
    most: int  #: `work` of the largest of a test's parameters that it is given: it is slow


EMULATED = {
    "simt": Emulated(frozenset(engines.ALL_OPS).intersection(simt_engine.REGISTERED), 1 << 18),
    "triton": Emulated(engines.ALL_OPS, 1 << 13),
}
# An engine of the tests' own: nobody else can ask for it.
engines.LIBRARIES["simt"] = engines.Library(simt_engine.NAMESPACE, {"cpu": EMULATED["simt"].ops})


class Backend(NamedTuple):
    device: str
    engine: str

    @property
    def emulated(self) -> bool:
        """Whether a GPU's kernels are emulated."""
        return self.device == "cpu" and self.engine in EMULATED

    def move(self, nest: Any) -> Any:
        """``nest`` with its tensors on the device, laid out as they are."""
        return of_tensors(lambda t: moved(t, self.device), nest)


def work(parameter: Any) -> int:
    """Elements of a shape, or of the largest of several; other cases say themselves: ``.work``."""
    if isinstance(parameter, (tuple, list)):
        if all(isinstance(n, int) for n in parameter):
            return math.prod(parameter)
        return max(map(work, parameter), default=0)
    return getattr(parameter, "work", 0)


def too_slow(parameters: dict[str, Any]) -> bool:
    """Whether a test with these parameters is left out; see tests/conftest.py.

    Large ones are. In Triton so is every type in every layout: it does not know where a tensor that
    is not dense was copied from, and has one address for both formats.
    """
    backend = parameters.get("backend")
    if not isinstance(backend, Backend) or not backend.emulated:
        return False
    if work([*parameters.values()]) > EMULATED[backend.engine].most:
        return True
    copied = parameters.get("layout", "channels_last") != "channels_last"
    other = parameters.get("dtype", torch.float32) != torch.float32
    return backend.engine == "triton" and copied and other


def interpreted_wrongly(parameters: dict[str, Any]) -> bool:
    """Triton's interpreter truncates what it stores as bfloat16, and multiplies it wrongly."""
    return parameters.get("backend") == ("cpu", "triton") and any(
        dtype == torch.bfloat16 for dtype in tree_leaves([*parameters.values()])
    )


def backends(op: str, isa: bool = False) -> list[Any]:
    """The backends that have ``op``, to parametrize with; ``isa`` marks the CPU's native one."""
    params = []
    for engine, ops in [*ENGINES.items(), *((name, e.ops) for name, e in EMULATED.items())]:
        for device in ("cpu", "cuda"):
            if op not in ops or engines.why_not(engine, op, device, torch.float32) is not None:
                continue
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if isa and (device, engine) == ("cpu", "native"):
                marks.append(pytest.mark.isa)
            name = f"{device}-{engine}"
            params.append(pytest.param(Backend(device, engine), id=name, marks=marks))
    return params


def over_backends(op: str, isa: bool = False, emulated: bool = True) -> pytest.MarkDecorator:
    """``emulated`` is False for what is no concern of a kernel, such as strides."""
    params = [p for p in backends(op, isa) if emulated or not p.values[0].emulated]
    return pytest.mark.parametrize("backend", params)


def _raw_backends(op: str) -> list[Any]:
    """The backends that have ``op`` as a dispatcher's op of their own, in-place form included."""
    raw = engines.LIBRARIES.keys() - {"vendor"}
    return [p for p in backends(op.removesuffix("_")) if p.values[0].engine in raw]


def over_raw_backends(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", _raw_backends(op))


def over_raw(*ops: str) -> pytest.MarkDecorator:
    """Over what each of the CPU's raw backends calls for ``ops``, as ``raw``.

    The emulator's library is loaded later, and has the glue of the native engine.
    """
    return pytest.mark.parametrize(
        "raw",
        [
            pytest.param(engines.implementation(op, backend.engine), id=f"{op}-{backend.engine}")
            for op in ops
            for (backend,) in (p.values for p in _raw_backends(op))
            if backend.device == "cpu" and backend.engine in engines.ENGINES
        ],
    )


over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
over_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def _constants(device: str) -> dict[str, list[int]]:
    """Every ``constexpr int kName = value`` of a device's kernels, in order of appearance."""
    found: dict[str, list[int]] = {}
    for path in sorted((ROOT / "csrc" / "kernels" / device).glob("*.[hc]*")):
        pattern = r"constexpr int(?:64_t)? (k\w+) = (\d+)(?: << (\d+))?;"
        for name, value, shift in re.findall(pattern, path.read_text()):
            found.setdefault(name, []).append(int(value) << int(shift or 0))
    return found


TILE = _constants("cpu")
CUDA_TILE = _constants("cuda")
LANES = {torch.float64: 8}  # of a vector; 16 for every other dtype, which is computed in float32
ROWS = sorted({*TILE["kRows"], *TILE["kWideRows"]})
PANELS = sorted({vecs * lanes for vecs in TILE["kMaxVecs"] for lanes in (8, 16)})


def _split_shapes() -> list[tuple[int, ...]]:
    """Shapes of which a block of the CUDA kernels does not reach a whole channel: rows of single
    channels and of vectors of them, single pixels, images of vectors."""
    threads, line, vectors, walk = (
        CUDA_TILE[name][0] for name in ("kThreads", "kLineElements", "kLineVectors", "kLongestWalk")
    )
    return [
        (1, line - 1, 1, threads // line * walk + 1),
        (2, 8 * vectors, 1, threads // vectors * walk // 2 + 1),
        (1, 2, 1, threads * walk + 1),
        (walk + 1, 2, 4, 4),
    ]


SPLIT_SHAPES = _split_shapes()


def around(*tiles: int) -> list[int]:
    """Just below, at and above each tile size and its double, and one."""
    near = {n + d for tile in tiles for n in (tile, 2 * tile) for d in (-1, 0, 1)}
    return sorted({1, *near} - {0})


# --- Layouts: the same values, laid out otherwise. ---


def channels_last(t: Tensor) -> Tensor:
    """With the strides of channels_last even where contiguous ones would do: C = 1, 1x1 images."""
    if t.dim() != 4:
        return t.contiguous()
    return torch.empty_like(t, memory_format=torch.channels_last).copy_(t)


def sliced(t: Tensor) -> Tensor:
    """Every second element of something larger, in the last dimension."""
    if t.dim() == 0:
        return t
    larger = t.new_full((*t.shape[:-1], 2 * t.size(-1) + 1), torch.nan)
    view = larger[..., 1::2]
    return view.copy_(t)


def sliced_channels(t: Tensor) -> Tensor:
    """Some channels of a wider channels_last tensor."""
    if t.dim() != 4:
        return sliced(t)
    wider = channels_last(t.new_full((t.size(0), t.size(1) + 3, *t.shape[2:]), torch.nan))
    return wider[:, 1 : 1 + t.size(1)].copy_(t)


def misaligned(t: Tensor) -> Tensor:
    """Dense, but one element past the beginning of its storage."""
    return t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape).copy_(t)


def negative(t: Tensor) -> Tensor:
    """Memory holds the negated values and the tensor carries torch's negative bit."""
    return torch._neg_view(t.neg())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": channels_last,
    "sliced": sliced,
    "sliced_channels": sliced_channels,
    "misaligned": misaligned,
    "negative": negative,
    "transposed": lambda t: t if t.dim() < 2 else t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand(t.shape),  # the first image in every place
}

# --- Inputs. ---


class Source:
    """Random tensors of one seed, rounded to one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * unit).to(self.dtype)

    def batch_norm(self, channels: int) -> dict[str, Tensor]:
        """Parameters and statistics; in float32 for half types, as under AMP."""
        dtype = torch.float32 if self.dtype in HALF else self.dtype
        vectors = {
            "mean": self.normal(channels),
            "var": self.uniform(0.25, 4, channels),
            "gamma": self.normal(channels),
            "beta": self.normal(channels),
        }
        return {name: v.to(dtype) for name, v in vectors.items()}


def torch_batch_norm(y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(y, mean, var, gamma, beta, training=False, eps=EPS)


def scale_shift(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    return fused_resnet.functional.bn_scale_shift(mean, var, gamma, beta, EPS)


def torch_act(y: Tensor, act: str) -> Tensor:
    return torch.relu(y) if act == "relu" else y


# --- Comparing. ---

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    return t.detach().resolve_neg().contiguous().view(_BITS[t.element_size()])


def assert_identical(a: Any, b: Any, what: str = "results") -> None:
    """Equal shapes, strides, dtypes and bits, of tensors or of nests of them."""
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype, f"{what} differ in dtype: {x.dtype}, {y.dtype}"
            assert x.shape == y.shape, f"{what} differ in shape: {x.shape}, {y.shape}"
            assert x.stride() == y.stride(), f"{what} differ in strides: {x.stride()}, {y.stride()}"
            assert torch.equal(bits(x), bits(y)), f"{what} differ in their bits"
        else:
            assert x == y, f"{what} differ: {x}, {y}"


def of_tensors(f: Callable[[Tensor], Any], nest: Any) -> Any:
    return tree_map(lambda t: f(t) if isinstance(t, Tensor) else t, nest)


def copied(nest: Any) -> Any:
    """Copies with the strides their originals have."""

    def copy(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)

    return of_tensors(lambda t: t.clone() if 0 in t.stride() else copy(t), nest)


def moved(t: Tensor, device: str) -> Tensor:
    """``t`` on ``device``, in a storage like its own: ``to`` would make it dense and aligned."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    there = whole.as_strided(t.shape, t.stride(), t.storage_offset())
    return torch._neg_view(there) if t.is_neg() else there


def placed(t: Tensor) -> tuple[Any, ...]:
    """Shape, dtype, and where each element lies.

    Without elements nothing lies anywhere, and the stride of a length of one says nothing of it
    either: torch's ops, devices and fake tensors disagree there (given (N, C, 1, 1) in
    channels_last, convolution and relu keep its strides, BatchNorm makes contiguous ones).
    """
    steps = [step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1]
    return t.shape, t.dtype, steps if t.numel() else None


def per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def shadow(nest: Any, device: str = "meta") -> Any:
    """On the meta device, where only shapes and strides exist, and fake kernels run."""
    return of_tensors(
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device), nest
    )


def on_imagined_gpu(f: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What ``f`` makes of tensors on CUDA, but for their values; no GPU is needed.

    It raises where ``f`` joins them with tensors of its own on the CPU.
    """
    with FakeTensorMode():
        return f(**shadow(given, "cuda"))


def at_threads(count: int, f: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return f(*args, **kwargs)
    finally:
        torch.set_num_threads(before)


def verify(
    backend: Backend,
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: Callable[[int], dict[str, Any]],
    imagined: bool = True,
) -> None:
    """Hold ``ours`` on ``backend`` against ``eager``.

    Values by the rule of tolerances.py; output laid out as eager's on the CPU, since on CUDA that
    depends on whose kernel torch takes; inputs as they were; the same bits from a second run and,
    of our own kernels, with one thread, or with emulated ones in another order, of which every seed
    has its own.

    Args:
        ours, eager: take what ``inputs`` returns as keyword arguments, and return a tensor or
            several.
        inputs: of a seed.
        imagined: whether both also run as on a GPU; autograd asks the device itself, and cannot.
    """
    results: list[list[Sequence[Tensor]]] = []
    for seed in SEEDS:
        made = inputs(seed)
        given = backend.move(made)
        before = of_tensors(lambda t: (t.clone(), t.stride()), given)
        with fused_resnet.use_engine(backend.engine):
            with simt_engine.scheduled(seed) if backend.engine == "simt" else nullcontext():
                result = ours(**given)
            # Emulated kernels are slow: of one seed. Interpreted ones know one order.
            if not backend.emulated or (backend.engine == "simt" and seed == SEEDS[0]):
                assert_identical(ours(**given), result, "two runs")
            if backend == ("cpu", "native"):
                assert_identical(at_threads(1, ours, **given), result, "one thread and two")
            if imagined and backend == ("cpu", "reference") and seed == SEEDS[0]:
                for t in tree_leaves([on_imagined_gpu(f, made) for f in (ours, eager)]):
                    assert t.device.type == "cuda"
        expected = eager(**given)
        assert_identical(of_tensors(lambda t: (t.clone(), t.stride()), given), before, "inputs")
        truth = eager(**of_tensors(Tensor.double, made))
        outputs = list(zip(*map(tree_leaves, (result, expected, truth)), strict=True))
        for output, theirs, exact in outputs:
            assert placed(output) == placed(exact.to(theirs.dtype))
        results.append(outputs)
    for samples in zip(*results, strict=True):
        judge(*zip(*samples, strict=True))


@functools.cache
def isas() -> tuple[str, ...]:
    """The instruction sets this processor can run, the best last."""
    from fused_resnet import _C

    has = set(_C.cpu_features())
    wanted = {
        "generic": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    wanted["avx512vnni"] = wanted["avx512"] | {"avx512vnni"}
    wanted["avx512bf16"] = wanted["avx512vnni"] | {"avx512bf16"}
    return tuple(name for name, features in wanted.items() if features <= has)
