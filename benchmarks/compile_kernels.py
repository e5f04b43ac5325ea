"""Compile every kernel for an NVIDIA architecture without a GPU: `python -m benchmarks.compile_kernels 90`.

Prints JSON: kernel and type of the vectors -> registers, stack bytes, local bytes, shared bytes, by the cuobjdump that
Triton brings. A spill shows as stack or local above 0. Compiled as a launch at the usual shapes does it: pointers and
sizes divisible by 16. TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ref.blocked import PASSAGES_PER_BLOCK
from ref.kernels import last_token_pool, soft_contrastive

POINTERS = {
    "hidden_ptr": "*bf16", "weight_ptr": "*bf16", "last_ptr": "*i64", "query_ptr": "*bf16", "passage_ptr": "*bf16",
    "column_ptr": "*i64", "text_ptr": "*i32", "known_ptr": "*i32", "masked_ptr": "*i64",
}
SCALARS = {"eps": "fp32", "temperature": "fp32"}
SIZES = ("queries", "passages", "count", "first", "width", "stride", "rows")


def signature(kernel: Any, out: str, vectors: str) -> dict[str, str]:
    """A type for each argument: pointers by name (else fp32; bf16 stands for `vectors`), scalars, constants."""
    types = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
        elif parameter.name.endswith("_ptr"):
            pointer = out if parameter.name == "out_ptr" else POINTERS.get(parameter.name, "*fp32")
            types[parameter.name] = pointer.replace("bf16", vectors)
        else:
            types[parameter.name] = SCALARS.get(parameter.name, "i32")
    return types


def variants() -> dict[str, tuple[Any, str, dict[str, Any], int]]:
    """Name -> kernel, type of its output, constants, warps: as the launchers choose them."""
    fp32, pool, loss = triton.language.float32, last_token_pool, soft_contrastive
    tile = {k: v for k, v in loss.TILE.items() if k.startswith("BLOCK")}
    row, warps = {"CANDIDATES": 8, "BLOCK_P": PASSAGES_PER_BLOCK["cuda"]}, loss.TILE["num_warps"]
    small = {**tile, "ACC": fp32, "UPCAST": False}
    found: dict[str, tuple[Any, str, dict[str, Any], int]] = {
        "loss forward, small": (loss._forward_small, "*fp32", small, warps),
        "loss backward query, small": (loss._backward_query_small, "*bf16", small, warps),
        "loss backward passage, small": (loss._backward_passage_small, "*bf16", small, warps),
        "loss reduce block": (loss._reduce_block, "*fp32", row, loss.ROW_WARPS),
        "loss gradient block": (loss._gradient_block, "*bf16", row, loss.ROW_WARPS),
        "pool backward weight": (pool._backward_weight, "*bf16", {"ACC": fp32, "BLOCK_D": 128}, 4),
    }
    for width in (4096, 8192):
        sizes = {"ACC": fp32, "BLOCK_D": width}
        found[f"pool forward {width}"] = (pool._forward, "*fp32", sizes, 8)
        found[f"pool backward rows {width}"] = (pool._backward_rows, "*bf16", sizes, 8)
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    names = {"REG": "registers", "STACK": "stack", "SHARED": "shared", "LOCAL": "local"}
    return {names[key]: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    """Compile, and print the table as JSON."""
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    report = {}
    for name, (kernel, out, constants, warps) in variants().items():
        for vectors in ("bf16", "fp16", "fp32"):
            types = signature(kernel, out, vectors)
            aligned: Any = {(n,): [["tt.divisibility", 16]] for n, argument in enumerate(types)
                            if argument.endswith("_ptr") or argument in SIZES}
            source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=target, options={"num_warps": warps})
            report[f"{name}, {vectors}"] = {**resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
