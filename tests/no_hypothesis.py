"""In hypothesis's place where it is not installed: a test that draws its inputs is skipped."""

from collections.abc import Callable
from typing import Any

import pytest


class _Anything:
    """What strategies are made of while a file is imported; nothing is drawn from it."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Anything":
        return self

    def __getattr__(self, name: str) -> "_Anything":
        return self


strategies = assume = _Anything()


def given(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason="no hypothesis: there is nothing to draw inputs with")


def settings(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda test: test
