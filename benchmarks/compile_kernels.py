"""Compile every Triton kernel for an NVIDIA architecture without a GPU: `python -m benchmarks.compile_kernels 90`.

Prints JSON: kernel and dtype of the vectors -> registers, stack, local and shared bytes, as reported by the cuobjdump
that comes with Triton. A spill shows as stack or local > 0. Arguments are specialised as in a usual launch: pointers
and sizes divisible by 16. TRITON_INTERPRET must not be set.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ref.kernels import last_token_pool, soft_contrastive
from ref.loss.chunked import PASSAGES_PER_CHUNK

# Types of the arguments by name; other pointers are fp32, other scalars i32. VECTORS: the dtype of the vectors.
VECTORS = "vectors"
POINTERS = {"hidden_ptr": VECTORS, "weight_ptr": VECTORS, "last_ptr": "i64", "column_ptr": "i64", "text_ptr": "i32",
            "known_ptr": "i32", "num_masked_ptr": "i64"}
SCALARS = {"eps": "fp32", "temperature": "fp32"}
DIVISIBLE_BY_16 = ("count", "first", "width", "stride", "rows")


class Variant(NamedTuple):
    """A kernel as its launcher calls it."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    out: str = VECTORS  # type of out_ptr


def variants() -> dict[str, Variant]:
    """All kernels, with the constants and warps of their launchers."""
    fp32, pool, loss = triton.language.float32, last_token_pool, soft_contrastive
    row = {"CANDIDATES": 8, "BLOCK_P": PASSAGES_PER_CHUNK["cuda"]}
    found = {
        "loss update": Variant(loss._update, row, loss.ROW_WARPS),
        "loss gradient": Variant(loss._gradient, row, loss.ROW_WARPS),
        "pool backward weight": Variant(pool._backward_weight, {"ACC": fp32, "BLOCK_D": 128}, 4),
    }
    for width in (4096, 8192):
        sizes = {"ACC": fp32, "BLOCK_D": width}
        found[f"pool forward {width}"] = Variant(pool._forward, sizes, 8, out="fp32")
        found[f"pool backward rows {width}"] = Variant(pool._backward_rows, sizes, 8)
    return found


def signature(variant: Variant, vectors: str) -> dict[str, str]:
    """The type of each argument for vectors of the dtype `vectors`."""
    types = {}
    for parameter in variant.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = variant.out if name == "out_ptr" else POINTERS.get(name, "fp32")
            types[name] = "*" + (vectors if kind == VECTORS else kind)
        else:
            types[name] = SCALARS.get(name, "i32")
    return types


def compile_variant(variant: Variant, vectors: str, target: GPUTarget) -> dict[str, int]:
    """Compile one kernel; returns what it uses."""
    types = signature(variant, vectors)
    aligned: Any = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(types)
                    if name.endswith("_ptr") or name in DIVISIBLE_BY_16}
    source = ASTSource(variant.kernel, types, constexprs=variant.constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.num_warps})
    return {**resource_usage(compiled.asm["cubin"]), "shared": compiled.metadata.shared}


def resource_usage(cubin: bytes) -> dict[str, int]:
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
    """Compile all kernels for three dtypes and print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="compute capability without the dot: 80, 90, …")
    target = GPUTarget("cuda", parser.parse_args().capability, 32)
    table = {f"{name}, {vectors}": compile_variant(variant, vectors, target)
             for name, variant in variants().items() for vectors in ("bf16", "fp16", "fp32")}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
