"""Benchmarks: `python -m benchmarks [B1 …] [--device cpu|cuda] [--quick]`, or `python -m benchmarks gpu [PART …]`.

    B1, B2, B3, B4, B10    encoding texts (encoding.py)          B5, B6    training steps (training.py)
    B2-bf16, B10-bf16      the same in bf16, on a CPU too
    B7                     the loss (loss.py)                    B8        pooling (pooling.py)
    B9                     hard-negative mining (mining.py)
    B11, B12               encoding and training a small LLM, on a CPU only (small_llm.py)
    claims                 the paper's claims as paired experiments, with its own options (claims.py)
    gpu                    all parts that need an NVIDIA GPU (gpu.py); without one a dry run

Each benchmark compares ours with peers in one run: the same inputs, results checked, rounds in turn. It writes
benchmarks/results/DEVICE/NAME.json, and plot.py draws overview.svg from these files. The other studies are
`python -m benchmarks.world`, `.choose`, `.mining_world`, `.scaling` and `.compile_kernels`.
"""

import argparse
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks; returns 1 if one failed."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["claims"]:
        from benchmarks import claims

        return claims.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="B1 to B12, or gpu and its parts (default: all benchmarks)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if available)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to test the code: no valid measurement")
    given = parser.parse_args(arguments)

    import torch

    cuda = torch.cuda.is_available() if given.device is None else given.device == "cuda"
    if not cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when the next lines import it
    from benchmarks import gpu, plot
    from benchmarks.measure import RESULTS, write_result

    is_gpu = given.names[:1] == ["gpu"]
    names, known = (given.names[1:], list(gpu.PARTS)) if is_gpu else (given.names, list(gpu.BENCHMARKS))
    for name in names:
        if name not in known:
            more = "" if is_gpu else ", gpu, claims"
            parser.error(f"NAME must be one of {', '.join(known)}{more} (got {name!r:.40})")
    if is_gpu:
        return gpu.main(names)
    device = torch.device("cuda" if cuda else "cpu")
    folder = RESULTS / ("dry-run" if given.quick else device.type)
    # without a GPU the kernel of B8 is interpreted, which is not worth timing
    other_device = ("B11", "B12", "B2-bf16", "B10-bf16") if cuda else ("B8",)
    for name in names or [name for name in known if name not in other_device]:
        print(write_result(gpu.BENCHMARKS[name](device, quick=given.quick), folder), flush=True)
    print(plot.draw(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
