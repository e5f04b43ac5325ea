"""torch.compile, once per function."""

import subprocess
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for all token counts; raises where it is not a single graph.

    Elementwise results that backward needs (normalised states, silu(gate) * up) are computed again, not kept.
    """
    torch._dynamo.config.recompile_limit = 64  # with or without gradient, prefix, all tokens or the last ones
    torch._functorch.config.ban_recompute_materialized_backward = False
    return torch.compile(function, dynamic=True, fullgraph=True)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile cannot compile: for a CPU in C++, for CUDA with Triton's launchers in C."""
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except (RuntimeError, subprocess.CalledProcessError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        what = "--device cuda: needs a C compiler" if device.type == "cuda" else "--compile: needs a C++ compiler"
        raise ValueError(f"{what} and Python's headers ({reason:.200})") from None
