"""Random forwards of convolutions, BatchNorms, ReLUs and sums: fuse, unfuse and freeze keep them.

In float64. Layers are used again, in any order, read by several, and written to in place.
"""

import copy
import linecache

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import frozen_layers, images, same
from tolerances import judge
from torch import nn

import fused_resnet

CHANNELS = 4
LINES_AT_MOST = 6
LAYERS = 2 * LINES_AT_MOST  # of each kind

#: A line of a forward: {u}, {v} are values made before, {i}, {j} layers, {y} is new.
LINES = (
    "{y} = self.bn{i}(self.conv{i}({u}))",
    "{y} = F.relu(self.bn{i}(self.conv{j}({u})))",
    "{y} = self.relu(self.bn{i}(self.conv{i}({u})) + {v})",
    "{y} = self.bn{i}(self.conv{i}(self.relu(self.bn{j}(self.conv{j}({u})))))\n{y} += {u}",
    "{y} = self.conv{i}({u})",
    "{y} = self.bn{i}({u})",
    "{y} = self.relu({u})",
    "{y} = F.relu({u}, inplace=True)",
    "{y} = {u} + {v}",
    "{y} = self.bn{i}(self.conv{i}({u})) + self.bn{j}(self.conv{j}({v}))",
    "{u} += {v}\n{y} = {u}",
    "{y} = {u}.add_({v}).relu_()",
)

lines = st.lists(
    st.tuples(
        st.sampled_from(LINES),
        *[st.integers(0, 3)] * 2,  # values, from the last one on
        *[st.sampled_from([0, 0, 0, 0, -1])] * 2,  # layers: of its own, or one used before
    ),
    min_size=2,
    max_size=LINES_AT_MOST,
)


def source(drawn, summed):
    """A class whose forward has these lines, and returns the last value or the sum of some."""
    values, body = ["y0"], ["y0 = x * 1"]
    for n, (text, u, v, i, j) in enumerate(drawn):
        y = f"y{len(values)}"
        u, v = (values[-1 - min(back, len(values) - 1)] for back in (u, v))
        i, j = (2 * n + i) % LAYERS, (2 * n + 1 + j) % LAYERS
        body += text.format(y=y, u=u, v=v, i=i, j=j).splitlines()
        values.append(y)
    body.append(f"return {' + '.join(values[-summed:])}")
    head = "class Net(Layers):\n    def forward(self, x):\n"
    return head + "".join(f"        {line}\n" for line in body)


class Layers(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        for i in range(LAYERS):
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3 - 2 * (i % 2), padding=1 - i % 2, bias=i > 1)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(CHANNELS))
        self.relu = nn.ReLU(inplace)


def written(text):
    """The class that a text defines, whose source can be read."""
    file = f"<forward {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope = {"Layers": Layers, "F": F}
    exec(compile(text, file, "exec"), scope)
    return scope["Net"]


def trains(plain, x):
    """Whether torch's autograd bears what is written to in place."""
    try:
        copy.deepcopy(plain)(x.clone().requires_grad_() * 1).pow(3).sum().backward()
    except RuntimeError:
        return False
    return True


def test_random_forwards():
    fused, left, trained = [], [], []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(drawn=lines, summed=st.integers(1, 3), inplace=st.booleans(), seed=st.integers(0, 9))
    def check(drawn, summed, inplace, seed):
        torch.manual_seed(seed)
        plain = written(source(drawn, summed))(inplace).double()
        x = images(seed, 2, 7, channels=CHANNELS).double()
        if trains(plain, x):
            trained.append(same(plain, x))
        plain(x)  # statistics of its own
        plain.eval()
        model = fused_resnet.fuse(copy.deepcopy(plain))
        report = fused_resnet.report(model)
        fused.append(sum(e.fused for e in report))
        left.append(len(report.unfused))
        frozen = fused_resnet.freeze(plain, example=x)
        assert len(frozen_layers(frozen)) == fused[-1]
        with torch.no_grad():
            expected = plain(x)
            for ours in (model(x), frozen(x)):
                judge([ours], [expected], [expected])
            assert torch.equal(fused_resnet.unfuse(model)(x), expected)
        assert type(model) is type(plain)

    check()
    # Of each kind there were some.
    assert sum(fused) > len(fused)
    assert sum(left) > 0
    assert 10 < len(trained) < len(fused)
