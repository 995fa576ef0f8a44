"""A variant on a GPU without the time it takes to launch its kernels one by one: inference, or a
training step, whose gradients lie where the capture put them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.measure import EAGER, PEER, Runner, Variant

#: Calls before the capture: by then everything is compiled, tuned and allocated.
WARM_UP = 3


def replayed(v: Variant, example: Tensor) -> Variant:
    """``v`` captured as a CUDA graph on ``example``, the copy of its input included."""

    def prepare() -> Runner:
        runner = v.prepare()
        static = runner.feed(example).clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                runner.run(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = runner.run(static)

        def run(x: Tensor) -> Any:
            static.copy_(x)
            graph.replay()
            return output

        # The next replay writes where this one did.
        return Runner(run, runner.feed, lambda y: runner.read(y).clone())

    kind = PEER if v.kind == EAGER else v.kind  # eager torch is what everyone has without it
    return replace(v, name=f"{v.name}, CUDA graph", kind=kind, prepare=prepare)
