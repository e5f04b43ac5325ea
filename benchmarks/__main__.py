"""Measurements: `python -m benchmarks [B1 …] [--device cpu|cuda] [--quick]`, or `python -m benchmarks gpu`.

    B1, B2, B3, B4, B10    texts to vectors (encoding.py)        B5, B6    training steps (training.py)
    B7                     the loss (loss.py)                    B8        pooling (pooling.py)
    B9                     mining (mining.py)
    claims                 the report's claims as paired experiments, with options of their own (claims.py)
    gpu                    all that needs an NVIDIA GPU, part by part (gpu.py); without one a dry run

At the end plot.py draws the results. The studies have commands of their own: python -m benchmarks.world,
benchmarks.choose, benchmarks.mining_world, benchmarks.scaling, benchmarks.compile_kernels.
"""

import argparse
import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run what is named; 1 if something failed."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["claims"]:
        from benchmarks import claims

        return claims.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="B1 to B10, or gpu and its parts (default: all benchmarks)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, measures nothing")
    given = parser.parse_args(arguments)

    import torch

    cuda = torch.cuda.is_available() if given.device is None else given.device == "cuda"
    if not cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by the next lines
    from benchmarks import gpu, plot
    from benchmarks.measure import RESULTS, report

    if given.names[:1] == ["gpu"]:
        unknown = sorted(set(given.names[1:]) - gpu.PARTS.keys())
        if unknown:
            parser.error(f"{unknown[0]} is no part of gpu. Expected are some of {', '.join(gpu.PARTS)}.")
        return gpu.main(given.names[1:])
    unknown = sorted(set(given.names) - gpu.BENCHMARKS.keys())
    if unknown:
        parser.error(f"{unknown[0]} is unknown. Expected are some of {', '.join(gpu.BENCHMARKS)}, or gpu.")
    device = torch.device("cuda" if cuda else "cpu")
    every = [name for name in gpu.BENCHMARKS if cuda or name != "B8"]  # interpreted, a kernel's speed says nothing
    for name in given.names or every:
        result = gpu.BENCHMARKS[name](device, quick=given.quick)
        print(report(result, RESULTS / ("dry-run" if given.quick else device.type)), flush=True)
    print(plot.draw(RESULTS / ("dry-run" if given.quick else device.type)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
