"""Modules with forwards of all kinds, for ``test_proved``: what they are written like matters."""

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 4
SCALE = 0.5


class Layers(nn.Module):
    """What the modules below are made of."""

    def __init__(self, shortcut=None, flag=True):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.flag, self.power, self.seen = flag, 0.5, []
        self.gamma = nn.Parameter(torch.full((1, CHANNELS, 1, 1), 0.7))
        self.shortcut = shortcut


def projection(*more):
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), *more)


class Plain(Layers):
    """In the style of torchvision's BasicBlock."""

    def forward(self, x):
        """A docstring."""
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


class Functional(Layers):
    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)).add(x if self.shortcut is None else self.shortcut(x))
        return torch.relu(y)


class OwnProjection(Layers):
    """Two convolutions of the same input, whose BatchNorms are added."""

    def forward(self, x):
        return (self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))).relu()


class PreActivation(Layers):
    def forward(self, x):
        y = self.conv1(self.relu(self.bn2(x)))
        return self.conv2(self.bn1(y).relu_()) + x


class TwoInputs(Layers):
    def forward(self, x, skip):
        y = self.bn1(self.conv1(x + 0.5 * skip))
        return {"y": self.bn2(self.conv2(torch.cat([y, skip], 1)[:, :4])), "size": y.flatten(1)}


class Helper(Layers):
    def forward(self, x):
        return self._tail(self.relu(self.bn1(self.conv1(x))), x)

    def _tail(self, y, x):
        y = self.bn2(self.conv2(y)) * self.gamma
        return y + x.mean((2, 3), keepdim=True)


class Flags(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        if self.flag and not self.training:
            y = y * self.power
        return self.bn2(self.conv2(y))


class Branch(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.relu(y) if x.sum() > 0 else y


class Loop(Layers):
    def forward(self, x):
        for _ in range(2):
            x = self.bn1(self.conv1(x))
        return x


class Twice(Layers):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv1(x))


class Remembers(Layers):
    def forward(self, x):
        self.last = x = self.bn1(self.conv1(x))
        return x


class Appends(Layers):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        self.seen.append(x)
        return x


class Random(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x + torch.rand(1, dtype=x.dtype)))


class Global(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x * SCALE))


class Inherits(Plain):
    def forward(self, x):
        return super().forward(x) * 2


class Statistics(Layers):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return x + self.bn1.running_mean.sum()


class OwnList(Layers):
    def forward(self, x):
        return self.bn1(self.conv1(x)) * len(self.seen)


class Options(Layers):
    def forward(self, x, scale=2):
        return self.bn1(self.conv1(x)) * scale


class NoGrad(Layers):
    @torch.no_grad()
    def forward(self, x):
        return self.bn1(self.conv1(x))


class OwnName(Layers):
    def forward(self, x):
        return self.run(self.bn1(self.conv1(x)))

    def run(self, x):
        return 2 * x


class Truth(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.shortcut(y) if self.shortcut else y


class Alias(Layers):
    def __init__(self):
        super().__init__()
        self.conv2 = self.conv1

    def forward(self, x):
        return self.bn1(self.conv2(x))


class ReadTwice(Layers):
    def forward(self, x):
        y = self.conv1(x)
        return self.bn1(y) + y


class WritesInput(Layers):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        x += y
        return x


class WritesBetween(Layers):
    def forward(self, x):
        y = self.conv1(x)
        x = x.mul_(2)
        return self.bn1(y) + x
