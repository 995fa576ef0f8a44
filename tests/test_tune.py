"""tune: what is taken, what is not, and what nobody notices. No clock runs: times are given."""

import copy
import functools
from types import SimpleNamespace

import given_times
import pytest
import torch
from models import basic, bottleneck, frozen_layers, images, on, runs_fused, small
from tolerances import judge
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet import engines, tune, tuning, use_tuning, vendor
from fused_resnet.tune import _check_moment
from fused_resnet.tuning import EAGER, fastest


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    return given_times.keep_in(monkeypatch, tmp_path)


@pytest.fixture
def prefer(monkeypatch):
    given_times.prefer(monkeypatch)
    return functools.partial(given_times.prefer, monkeypatch)


def block(train=False):
    return fused_resnet.fuse(bottleneck()).train(train)


def x24(batch=2, size=8):
    return images(0, batch, size, channels=24).contiguous(memory_format=torch.channels_last)


def gradients(model, x):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("samples", "taken"),
    [
        ({"a": [1.0] * 5, "b": [0.9] * 5}, "b"),
        ({"a": [1.0] * 5, "b": [0.98] * 5}, "a"),  # not worth it
        ({"a": [1.0] * 5, "b": [0.5, 0.5, 0.5, 1.1, 1.1]}, "a"),  # or it is noise
        ({"a": [1.0] * 5, "b": [0.5, 0.5, 0.5, 0.5, 1.1]}, "b"),
        ({"a": [1, 2, 3, 4, 5], "b": [0.9, 1.8, 2.7, 3.6, 4.5]}, "b"),  # within each round
        ({"a": [1.0] * 5, "b": [0.9] * 5, "c": [0.8] * 5}, "c"),
        ({"a": [1.0] * 5}, "a"),
    ],
)
def test_what_is_clearly_faster_is_taken(samples, taken):
    assert fastest(samples) == taken


@pytest.mark.parametrize("way", ["auto", "native", "vendor", EAGER])
def test_training_goes_the_fastest_way(prefer, way):
    prefer(way)
    model, x = block(train=True), x24().requires_grad_()
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    (choice,) = tune(model, x)
    assert (choice.op, choice.entry.way) == ("Bottleneck", way)
    expected = copy.deepcopy(model)
    expected.tuned = None
    if way == EAGER:
        expected = plain
    with engines.use_engine(way if way != EAGER else "auto"):
        wanted = gradients(expected, x)
    assert same(gradients(model, x), wanted)
    assert {e.engine for e in fused_resnet.report(model, engines=True)} == {way}
    # Another size was not measured.
    fresh = copy.deepcopy(plain)
    assert same(gradients(model, x24(3)), gradients(fused_resnet.fuse(fresh), x24(3)))


@pytest.mark.parametrize("way", ["native", "vendor", EAGER])
def test_inference_goes_the_fastest_way(prefer, way, monkeypatch):
    """Convolution by convolution."""
    prefer(way)
    model, x = block(), x24()
    assert {c.entry.way for c in tune(model, x)} == {way}
    assert {e.engine for e in fused_resnet.report(model, engines=True)} == {way}
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    untuned = fused_resnet.fuse(copy.deepcopy(plain))
    expected = plain if way == EAGER else untuned
    with torch.no_grad(), engines.use_engine("auto" if way == EAGER else way):
        wanted = expected(x)
    assert torch.equal(model.requires_grad_(False)(x), wanted)
    with torch.no_grad():
        assert torch.equal(model(x24(3)), untuned(x24(3)))
        with engines.use_engine("vendor"):  # a wish comes first
            asked = model(x)
        with engines.use_engine("vendor"):
            assert torch.equal(asked, untuned(x))


@pytest.mark.parametrize("train", [False, True])
def test_a_network_that_is_slower_fused_runs_as_torch_has_it(prefer, train):
    prefer(EAGER, "ResNet")
    model, x = small().train(train), images(0, 2, 33)
    plain = copy.deepcopy(model)
    tune(fused_resnet.fuse(model), x)
    assert {e.engine for e in fused_resnet.report(model, engines=True)} == {EAGER}
    with torch.set_grad_enabled(train):
        assert not runs_fused(model, x)
        assert runs_fused(model, images(0, 3, 33))
    model.load_state_dict(plain.state_dict())
    if train:
        model.zero_grad()
        model(x).sum().backward()
        plain(x).sum().backward()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    else:
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


def test_lean_memory_stays_lean(prefer):
    prefer(EAGER)
    model = fused_resnet.fuse(block(train=True), memory="lean")
    (choice,) = tune(model, x24())
    assert choice.entry.seconds.keys() == {"auto", "native", "vendor"}


def test_networks_of_timm(prefer):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    prefer(EAGER, "ResNet")
    model, x = fused_resnet.fuse(timm.create_model("resnet18")).eval(), images(0, 2, 33)
    assert "ResNet" in {c.op for c in tune(model, x)}
    with torch.no_grad():
        assert not runs_fused(model, x)


def test_choices_are_printed(prefer, folder):
    prefer("vendor", "conv_bn_act")
    choices = tune(block(), x24())
    text = str(choices)
    assert text.count("\n") == len(choices)
    assert "conv_bn_act 2x24x8x8 * 8x24x1x1 " in text
    assert "conv_bn_act + residual 2x8x8x8 * 32x8x1x1 " in text
    assert "vendor     (vendor 500.000, native 1000.000, eager 1000.000 ms)" in text
    assert str(folder) in text


def test_a_wrong_way_is_not_taken(prefer, monkeypatch):
    prefer("vendor")
    right = vendor.conv_batch_norm_act
    monkeypatch.setattr(vendor, "conv_batch_norm_act", lambda *args: right(*args) * 1.001)
    choices = tune(block(), x24())
    assert {c.entry.way for c in choices} == {"native"}
    assert {c.entry.failed["vendor"] for c in choices} == {"its error is outside the rule"}


def test_a_wrong_gradient_is_not_taken(prefer, monkeypatch):
    prefer("vendor")
    right = vendor.conv_wgrad
    monkeypatch.setattr(vendor, "conv_wgrad", lambda *args: right(*args) * 1.01)
    right_too = vendor.conv_backward
    monkeypatch.setattr(vendor, "conv_backward", lambda *args: [1.01 * d for d in right_too(*args)])
    monkeypatch.setattr(engines, "runs_whole", lambda *args: False)
    (choice,) = tune(block(train=True), x24())
    assert choice.entry.way == "native"
    assert choice.entry.failed["vendor"] == "its error is outside the rule"


@pytest.mark.parametrize(
    ("spoiled", "times", "out"),
    [("gradients", 2, False), ("gradients", 3, True), ("outputs", 1, True)],
)
def test_chance_may_spoil_gradients_alone(prefer, monkeypatch, spoiled, times, out):
    """A ReLU that tips over on the example does not on its mirror images, too."""
    torch.use_deterministic_algorithms(False)
    right, calls = tuning.Attempt.once, []

    def planted(self):
        outputs, gradients = right(self)
        if self.way == "native":
            calls.append(self)
            factor = 1.01 if len(calls) <= times else 1
            if spoiled == "outputs":
                outputs = [t * factor for t in outputs]
            else:
                gradients = [None if t is None else t * factor for t in gradients]
        return outputs, gradients

    monkeypatch.setattr(tuning.Attempt, "once", planted)
    (choice,) = tune(block(train=True), x24())
    assert choice.entry.failed == ({"native": "its error is outside the rule"} if out else {})


def test_a_way_that_fails_is_not_taken(prefer, monkeypatch):
    def planted(*args):
        raise OSError("planted")

    prefer("vendor")
    monkeypatch.setattr(vendor, "conv_batch_norm_act", planted)
    assert {str(c.entry.failed) for c in tune(block(), x24())} == {"{'vendor': 'OSError: planted'}"}


@pytest.mark.parametrize("must", [False, True])
def test_only_deterministic_ways_where_they_must_be(prefer, monkeypatch, must):
    prefer("vendor")
    right, calls = vendor.conv_batch_norm_act, iter(range(10**6))

    def planted(*args):
        y = right(*args)
        return y.nextafter(y + next(calls) % 2)

    monkeypatch.setattr(vendor, "conv_batch_norm_act", planted)
    torch.use_deterministic_algorithms(must)
    model, x = block(), x24()
    choices = tune(model, x)
    assert {c.entry.way for c in choices} == {"native" if must else "vendor"}
    assert all(("vendor" in c.entry.failed) == must for c in choices)
    # What was found without the flag is not for those who set it.
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_nothing_is_disturbed(prefer):
    """By measuring; then training goes on as if it had not been."""
    model, x = small().train(), images(0, 2, 33)
    model.layer3.append(nn.Dropout(0.5))
    fused_resnet.fuse(model)
    before = {name: (t, t._version, t.clone()) for name, t in model.named_buffers()}
    state = torch.get_rng_state()
    tune(model, x)
    for name, t in model.named_buffers():
        kept, version, value = before[name]
        assert t is kept
        assert t._version == version
        assert torch.equal(t, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_first_use_is_measured_where_tuning_is_on(prefer, folder, monkeypatch):
    timed, model, x = prefer(EAGER), block(train=True), x24()
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    model(x)
    with use_tuning(), use_tuning(False):
        model(x)
    assert not timed
    assert not folder.exists()
    model.load_state_dict(plain.state_dict())
    with use_tuning():
        assert same(gradients(model, x), gradients(plain, x))
        assert timed
        timed.clear()
        with monkeypatch.context() as held:
            held.setattr(tuning, "kept", None)  # nor asked for: it is known
            gradients(model, x)
    assert not timed
    assert runs_fused(model, x)  # it is off again, and this model was not tuned
    assert [*folder.glob("tuned-*.json")]


def test_environment_variable():
    assert [tuning._switch(text) for text in ("", "0", "1")] == [False, False, True]
    with pytest.raises(ValueError, match="FUSED_RESNET_TUNE must be 0 or 1, got 'yes'"):
        tuning._switch("yes")


def test_nothing_is_measured_while_tracing(prefer):
    timed, model, x = prefer(EAGER), block(), x24()
    with use_tuning(), torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.export.export(model, (x,))
        torch.export.export(model, (x,), strict=True)
        torch.fx.symbolic_trace(model)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
    assert not timed
    tune(model, x)  # what is measured is not for what is compiled: that traces the untuned choice
    assert timed
    torch._dynamo.reset()
    names = {str(n.target) for n in torch.export.export(model, (x,)).graph.nodes}
    assert any("fused_resnet.conv_bn_act" in name for name in names)


def test_nothing_is_measured_while_a_cuda_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = SimpleNamespace(is_cuda=True, numel=lambda: 1)
    site = SimpleNamespace(x=x, inputs=(torch.ones(1),), ways=["auto", EAGER])
    assert not tuning._measurable(site)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning._measurable(site)


@pytest.mark.parametrize("why", ["hook", "foreign", "sync", "forward", "gradient"])
def test_a_network_that_may_do_more_than_compute_is_not_run_to_be_timed(prefer, why):
    """Its parts still are."""

    class Foreign(nn.Identity):
        pass

    timed, model, calls = prefer("nothing"), small(), []
    if why == "hook":
        model.fc.register_forward_hook(lambda *args: calls.append(args))
    elif why == "foreign":
        model.avgpool = nn.Sequential(model.avgpool, Foreign())
    elif why == "sync":
        model.layer4 = nn.SyncBatchNorm.convert_sync_batchnorm(model.layer4)
    elif why == "gradient":
        model.fc.weight.register_hook(calls.append)
    else:
        forward = model.fc.forward
        model.fc.forward = lambda x: (calls.append(x), forward(x))[1]
    tune(fused_resnet.fuse(model), images(0, 2, 33))
    assert {op for op, _ in timed} == {"conv_bn_act"}
    assert len(calls) == (why in ("hook", "forward"))


def test_under_checkpointing(prefer):
    """Measuring is hidden from what counts the tensors kept."""
    timed, model, x = prefer(EAGER), block(train=True), x24().requires_grad_()
    with use_tuning():
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert timed
    assert x.grad is not None


def test_frozen_layers(prefer):
    timed = prefer("vendor")
    x = images(0, 2, 33)
    frozen = on(fused_resnet.freeze(small(), example=x), "native")
    expected = frozen(x)
    timed.clear()
    choices = tune(frozen, x)
    assert {m.engine for m in frozen_layers(frozen)} == {"vendor"}
    assert {(c.op, c.entry.way) for c in choices} == {
        ("frozen conv_bn_act", "vendor"),
        ("frozen conv_bn_act + residual", "vendor"),
    }
    report = fused_resnet.report(frozen, engines=True)
    assert {(e.engine, e.reason) for e in report} == {("vendor", None)}
    assert not torch.equal(frozen(x), expected)
    with torch.no_grad():
        source = small()
        judge([frozen(x)], [source(x)], [source.double()(x.double())])
    # Freezing again takes it from there, where tuning is on.
    timed.clear()
    with use_tuning():
        again = fused_resnet.freeze(small(), example=x)
    assert not timed
    assert {m.engine for m in frozen_layers(again)} == {"vendor"}


def test_what_is_known_is_not_measured_again(prefer, monkeypatch):
    timed, model, x = prefer("vendor"), block(), x24()
    first = tune(model, x)
    timed.clear()
    monkeypatch.setattr(tuning, "_tables", {})  # as in another process
    assert tune(block(), x) == first
    assert not timed


def test_a_way_that_is_none_here_is_not_taken(prefer, folder, monkeypatch):
    prefer(EAGER)
    model, x = block(train=True), x24()
    tune(model, x)
    (path,) = folder.glob("tuned-*.json")
    path.write_text(path.read_text().replace(f'"{EAGER}"', '"triton"'))
    monkeypatch.setattr(tuning, "_tables", {})
    assert runs_fused(model, x)


def test_report_of_what_was_not_tuned():
    model = nn.Sequential(bottleneck(), nn.Sequential(nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)))
    assert {e.engine for e in fused_resnet.report(model)} == {None}
    assert {e.engine for e in fused_resnet.report(model, engines=True)} == {EAGER}
    fused_resnet.fuse(model)
    with engines.use_engine("vendor"):
        *ours, other = fused_resnet.report(model, engines=True)
    assert {e.engine for e in ours} == {"vendor"}
    assert other.engine == EAGER
    assert str(fused_resnet.report(model, engines=True)).splitlines()[0].split()[1:] == [
        engines.choose("conv_bn_act", "cpu", torch.float32),
        "fused",
    ]


def test_unfusing_and_copying(prefer):
    prefer(EAGER)
    model, x = block(train=True), x24()
    tune(model, x)
    assert not runs_fused(copy.deepcopy(model), x)
    fused_resnet.unfuse(model)
    assert "tuned" not in model.__dict__
    assert runs_fused(fused_resnet.fuse(model), x)


def test_bf16_by_autocast(prefer):
    prefer("native")
    model, x = fused_resnet.fuse(basic()).train(), x24()
    with torch.autocast("cpu", torch.bfloat16):
        (choice,) = tune(model, x)
    assert choice.entry.way == "native"
    assert not choice.entry.failed
    assert tune(model, x)[0].entry == choice.entry  # of float32, measured apart


@pytest.mark.parametrize(
    ("model", "example", "error", "words"),
    [
        (3, torch.ones(1), TypeError, "tune: model must be a torch.nn.Module, got int"),
        (nn.ReLU(), torch.ones(1), RuntimeError, r"must be fused or frozen; call fuse\(model\)"),
        (nn.ReLU(), 3, TypeError, "tune: example must hold a tensor, got int"),
    ],
)
def test_bad_arguments(model, example, error, words):
    with pytest.raises(error, match=words):
        tune(model, example)


def test_bad_moments(monkeypatch):
    model, x = block(), x24()
    with engines.use_engine("native"), pytest.raises(RuntimeError, match=r'"auto", got .native'):
        tune(model, x)
    with pytest.raises(RuntimeError, match=r"tune before .*compile, not after"):
        tune(torch.compile(model), x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="not while a CUDA graph is captured"):
        _check_moment(torch.device("cuda"))
