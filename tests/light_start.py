"""Start a script as `python -m light_start SCRIPT …`, without torch's compiler.

torch's optimiser imports the compiler, only to keep it away from its own functions. On a CPU nothing is compiled, and
this import is a third of the time of a short training process, of which these tests start about a hundred.
"""

import runpy
import sys
from types import SimpleNamespace

import torch

if torch.__version__.startswith("2.13."):  # the names that this version uses; others start as usual
    torch._dynamo = SimpleNamespace(disable=lambda function, *_, **__: function, graph_break=lambda: None,
                                    trace_rules=SimpleNamespace(clear_lru_cache=lambda: None))
    sys.modules["torch._dynamo"] = torch._dynamo

if __name__ == "__main__":
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
