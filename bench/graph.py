"""A variant on a GPU without the time it takes to launch its kernels one by one: inference, or a
training step, whose gradients lie where the capture put them."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from fused_resnet.graphs import Recording
from fused_resnet.measure import EAGER, PEER, Runner, Variant


def replayed(v: Variant, example: Tensor) -> Variant:
    """``v`` captured as a CUDA graph on ``example``, the copy of its input included."""

    def prepare() -> Runner:
        runner = v.prepare()
        static = runner.feed(example).clone()
        recording = Recording(lambda: runner.run(static))

        def run(x: Tensor) -> Any:
            static.copy_(x)
            recording.replay()
            return recording.outputs

        # The next replay writes where this one did.
        return Runner(run, runner.feed, lambda y: runner.read(y).clone())

    kind = PEER if v.kind == EAGER else v.kind  # eager torch is what everyone has without it
    return replace(v, name=f"{v.name}, CUDA graph", kind=kind, prepare=prepare)
