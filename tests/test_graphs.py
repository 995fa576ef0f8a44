"""CUDA graphs of frozen models: what is kept, for which calls; on a GPU, that they are right.

Without one a recording is a stand-in that calls again what it recorded, on the same memory.
"""

import contextlib
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import frozen_layers, images, small

import fused_resnet
from fused_resnet import graphs, measure, tuning


@pytest.fixture(scope="module")
def source():
    return small()


@pytest.fixture
def recordings(monkeypatch):
    """What is recorded, and how often it was replayed; graphs are taken to be faster."""
    made = []

    class Recording:
        def __init__(self, call):
            self.call, self.outputs, self.replays = call, call(), 0
            made.append(self)

        def replay(self):
            self.replays += 1
            self.outputs.copy_(self.call())

        @contextlib.contextmanager
        def in_turn(self):
            yield

    monkeypatch.setattr(graphs, "Recording", Recording)
    monkeypatch.setattr(graphs, "_possible", lambda leaves: all(t.numel() for t in leaves))
    monkeypatch.setattr(measure, "clock_in_sequence", lambda device: measure.clock("cpu"))
    monkeypatch.setattr(tuning, "fastest", lambda samples: list(samples)[-1])
    return made


def frozen_with_graphs(source):
    frozen = fused_resnet.freeze(source, example=images(0, 1, 33))
    frozen.graphs = graphs.Graphs()
    return frozen


def test_a_shape_is_recorded_once_and_replayed(source, recordings):
    frozen = frozen_with_graphs(source)
    for count, pixels in ((1, 33), (2, 33), (1, 40)):
        x = images(0, count, pixels)
        first = frozen(x)
        kept = first.clone()
        before = len(recordings), recordings[-1].replays
        other = frozen(images(1, count, pixels))
        assert (len(recordings), recordings[-1].replays) == (before[0], before[1] + 1)
        assert torch.equal(first, kept)  # a copy: the next call does not write there
        assert torch.equal(other, frozen.model(images(1, count, pixels)))
        assert torch.equal(first, frozen.model(x))
    assert len(recordings) == 3
    assert [*frozen.graphs.ways.values()] == ["graph"] * 3
    assert next(iter(frozen.graphs.ways)).startswith("1x3x33x33 of torch.float32 with strides")


def test_where_it_is_no_faster_kernels_are_launched(source, recordings, monkeypatch):
    monkeypatch.setattr(tuning, "fastest", lambda samples: next(iter(samples)))
    frozen, x = frozen_with_graphs(source), images(0, 1, 33)
    frozen(x)
    replays = recordings[0].replays
    assert torch.equal(frozen(x), frozen.model(x))
    assert len(recordings) == 1
    assert recordings[0].replays == replays
    assert [*frozen.graphs.ways.values()] == ["kernels"]


def test_what_cannot_be_captured_runs_and_says_why(source, recordings, monkeypatch):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "Recording", refuse)
    frozen, x = frozen_with_graphs(source), images(0, 1, 33)
    assert torch.equal(frozen(x), frozen.model(x))
    (why,) = frozen.graphs.ways.values()
    assert why == "cannot be captured: operation not permitted when stream is capturing"


def test_a_hook_inside_is_called(source, recordings):
    frozen, x = frozen_with_graphs(source), images(0, 1, 33)
    calls = []
    frozen.model.fc.register_forward_hook(lambda *args: calls.append(args))
    frozen(x)
    frozen(x)
    assert len(calls) == 2
    assert not recordings
    (why,) = frozen.graphs.ways.values()
    assert why == "fc has hooks, which a graph would not call"


def test_loaded_weights_are_those_that_run(source, recordings):
    """Of load_state_dict and of what moves tensors: a graph reads memory that may be gone."""
    frozen, x = frozen_with_graphs(source), images(0, 1, 33)
    before = frozen(x)
    state = {k: 2 * v if v.is_floating_point() else v for k, v in frozen.state_dict().items()}
    frozen.load_state_dict(state, assign=True)
    after = frozen(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, frozen.model(x))
    frozen._apply(torch.clone)
    assert torch.equal(frozen(x), after)
    assert len(recordings) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_record_for_themselves(source, recordings, copied):
    frozen, x = frozen_with_graphs(source), images(0, 1, 33)
    expected = frozen(x)
    other = copied(frozen)
    assert other.graphs is not frozen.graphs
    for layer in frozen_layers(frozen):
        layer.weight.zero_()
    assert torch.equal(other(x), expected)
    assert len(recordings) == 2


def test_no_more_shapes_than_there_is_memory_for(source, recordings, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    frozen = frozen_with_graphs(source)
    for pixels in (33, 34, 35, 33):
        x = images(0, 1, pixels)
        assert torch.equal(frozen(x), frozen.model(x))
    assert len(recordings) == 2


def test_threads_take_turns(source, recordings):
    frozen = frozen_with_graphs(source)
    inputs = [images(i, 1, 33) for i in range(8)]
    expected = [frozen.model(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for found, own in zip(pool.map(frozen, inputs), expected, strict=True):
                assert torch.equal(found, own)
    assert len(recordings) == 1


def test_engines_have_graphs_of_their_own(source, recordings):
    frozen, x = frozen_with_graphs(source), images(0, 1, 33)
    frozen(x)
    with fused_resnet.use_engine("reference"):
        frozen(x)
    assert len(recordings) == 2


def test_on_a_cpu(source):
    frozen = fused_resnet.freeze(source, example=images(0, 1, 33))
    with pytest.raises(RuntimeError, match=r"use_graphs: .* must be on a CUDA device, is on cpu"):
        frozen.use_graphs()
    assert frozen.use_graphs(False) is frozen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(source, dtype, monkeypatch):
    """A hundred replays, from several streams, and what cannot be captured."""
    monkeypatch.setattr(tuning, "fastest", lambda samples: list(samples)[-1])
    inputs = [images(i, 2, 33).to("cuda", dtype) for i in range(8)]
    model = copy.deepcopy(source).to("cuda")
    frozen = fused_resnet.freeze(model, example=inputs[0], dtype=dtype).use_graphs()
    expected = [frozen.model(x) for x in inputs]

    def served(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            result = frozen(inputs[i])
            torch.cuda.current_stream().synchronize()
            return result

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(13):
            for found, own in zip(pool.map(served, range(8)), expected, strict=True):
                assert torch.equal(found, own)
    assert [*frozen.graphs.ways.values()] == ["graph"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the caller's own
        output = frozen(inputs[0])
    graph.replay()
    assert torch.equal(output, expected[0])


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu(source):
    class Waiting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(source)

        def forward(self, x):
            return self.net(x) * x.sum().item()

    x = images(0, 1, 33).cuda()
    frozen = fused_resnet.freeze(Waiting().eval().cuda(), example=x).use_graphs()
    assert torch.equal(frozen(x), frozen.model(x))
    (why,) = frozen.graphs.ways.values()
    assert why.startswith("cannot be captured: ")
