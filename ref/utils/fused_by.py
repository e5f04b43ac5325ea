"""A decorator that runs a fused autograd function in place of the plain form on the page."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Plain = TypeVar("Plain", bound=Callable[..., Tensor])


def fused_by(function: type[torch.autograd.Function]) -> Callable[[Plain], Plain]:
    """Decorator: calls run `function.apply`; the decorated plain form stays available as `.plain`."""
    def decorate(plain: Plain) -> Plain:
        @wraps(plain)
        def fused(*inputs: Any) -> Tensor:
            return function.apply(*inputs)
        fused.plain = plain  # type: ignore[attr-defined]
        return fused  # type: ignore[return-value]
    return decorate
