"""Frozen models when copied, saved, loaded, moved and shared by threads."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import ENGINES, bottleneck, frozen_layers, images, on, small

import fused_resnet


@pytest.fixture(scope="module")
def source():
    return small()


@pytest.fixture(scope="module")
def frozen(source):
    return fused_resnet.freeze(source, example=images(0, 1, 33))


def storages(model):
    tensors = [*model.parameters(), *model.buffers(), *(m._packed for m in frozen_layers(model))]
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()}


def test_shares_nothing_and_changes_nothing():
    source = small()
    before = copy.deepcopy(source.state_dict())
    frozen = fused_resnet.freeze(source, example=images(0, 1, 33))
    assert not storages(frozen) & storages(source)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    assert all(p.requires_grad for p in source.parameters())
    assert type(source) is type(small())
    x = images(0, 1, 33)
    expected = frozen(x)
    with torch.no_grad():
        for t in (*source.parameters(), *source.buffers()):
            t.zero_()
    assert torch.equal(frozen(x), expected)


def saved(frozen):
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "deepcopy-of-pickle": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(frozen, duplicate):
    x = images(0, 2, 33)
    expected = on(frozen, "native")(x)
    again = duplicate(frozen)
    assert not storages(again) & storages(frozen)
    assert torch.equal(again(x), expected)
    assert again.errors == frozen.errors
    assert all(m._packed is not None for m in frozen_layers(frozen))


def test_saved_without_packed_weights(frozen):
    """They are derived, and belong to the processor."""
    frozen(images(0, 1, 33))
    packed = {m._packed.data_ptr() for m in frozen_layers(frozen) if m._packed is not None}
    assert packed
    assert not packed & {t.data_ptr() for t in frozen.state_dict().values()}
    plain = sum(t.numel() * t.element_size() for t in frozen.state_dict().values())
    assert len(pickle.dumps(frozen)) < 1.2 * plain


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_follows_a_loaded_state(frozen, source, engine, assign):
    other = small(1)
    target = on(fused_resnet.freeze(other, example=images(0, 1, 33)), engine)
    target(images(0, 1, 33))
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    x = images(0, 2, 33)
    assert torch.equal(target(x), on(frozen, engine)(x))


def test_state_of_a_plain_model_is_refused(frozen, source):
    before = copy.deepcopy(frozen.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(frozen).load_state_dict(source.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


KEEPING = {
    "same-dtype": lambda m: m.to(torch.float32),
    "same-device": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "cpu": lambda m: m.cpu(),
    "contiguous": lambda m: m.to(memory_format=torch.contiguous_format),
    "share": lambda m: m.share_memory(),
    "eval": lambda m: m.eval(),
    "train-false": lambda m: m.train(False),
    "no-grad": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("do", KEEPING.values(), ids=KEEPING)
def test_allowed(frozen, do, engine):
    x = images(0, 2, 33)
    again = on(copy.deepcopy(frozen), engine)
    expected = again(x)
    assert do(again) is again
    assert torch.equal(again(x), expected)


def test_packed_weights_follow_their_source():
    """Memory that to_empty hands out reads as NaN here."""
    x = images(0, 1, 9, channels=24)
    frozen = on(fused_resnet.freeze(bottleneck(), example=x), "native")
    state, expected = copy.deepcopy(frozen.state_dict()), frozen(x)
    frozen.to_empty(device="cpu")
    for layer in frozen_layers(frozen):
        layer.shift.zero_()
    assert frozen(x).isnan().all()
    frozen.load_state_dict(state)
    assert torch.equal(frozen(x), expected)


REFUSED = {
    "half": (lambda m: m.half(), "stays torch.float32 on cpu, asked for torch.float16"),
    "bfloat16": (lambda m: m.to(torch.bfloat16), "asked for torch.bfloat16"),
    "double": (lambda m: m.double(), "asked for torch.float64"),
    "meta": (lambda m: m.to("meta"), "on meta"),
    "train": (lambda m: m.train(), "cannot be trained"),
    "grad": (lambda m: m(images(0, 1, 33).requires_grad_()), "must not require grad"),
    "half-input": (lambda m: m(images(0, 1, 33).half()), "must be torch.float32 on cpu, got"),
    "double-input": (lambda m: m(images(0, 1, 33).double()), "got torch.float64 on cpu"),
    "meta-input": (lambda m: m(images(0, 1, 33).to("meta")), "got torch.float32 on meta"),
}


@pytest.mark.parametrize(("do", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(frozen, do, message):
    """A RuntimeError that says what was expected and got; nothing is changed."""
    before = copy.deepcopy(frozen.state_dict())
    x = images(0, 2, 33)
    expected = frozen(x)
    with pytest.raises(RuntimeError, match=message):
        do(frozen)
    assert not any(m.training for m in frozen.modules())
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert torch.equal(frozen(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engines", [("native",), ("vendor",), ENGINES], ids=str)
def test_threads(source, engines, dtype):
    """Eight threads call one model, starting before its weights are packed, each with a shape of
    its own, one of them with a batch that is taken in slices: bit by bit as one thread alone."""
    model = fused_resnet.freeze(source, example=images(0, 1, 33).to(dtype), dtype=dtype)
    for i, m in enumerate(frozen_layers(model)):
        m.engine = engines[i % len(engines)]
    x = [images(seed, 1 + seed % 3, 33 + 4 * seed).to(dtype) for seed in range(7)]
    x.append(images(7, 200, 33).to(dtype))
    expected = [copy.deepcopy(model)(t) for t in x]
    for m in frozen_layers(model):
        m.forget()
    wrong, start = [], threading.Barrier(len(x))

    def work(i):
        start.wait()
        for _ in range(2 if len(x[i]) > 8 else 12):
            if not torch.equal(model(x[i]), expected[i]):
                wrong.append(i)

    with ThreadPoolExecutor(len(x)) as pool:
        done = [pool.submit(work, i) for i in range(len(x))]
    assert [future.exception() for future in done] == [None] * len(x)
    assert not wrong
