"""Compare options of run_train.py on a held-out part of the training files, so that no test set influences the choice.

    python -m benchmarks.choose FILE… [--part N] [--output rows.jsonl] -- OPTIONS of run_train.py

One in N pairs (query, first positive; both directions of a pair together) is removed from the training files. The
held-out part of each file is then evaluated on its own texts by two metrics:

    ndcg       nDCG@10 of the first positive among all passages of the part
    spearman   rank correlation of our cosines with the teacher's scores, over all pairs (query, passage) of the part

The means over the files are printed and, with everything else, appended to --output.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import run_train
from ref.embedder import Embedder
from ref.task_types import TASK_TYPES
from ref.utils.files import read_jsonl

Line = dict[str, Any]


def is_held_out(line: Line, part: int) -> bool:
    """Whether a line belongs to the held-out part, decided by a hash that is equal for a pair and its reverse."""
    pair = "\n".join(sorted((line["query"], line["pos"][0])))
    return int.from_bytes(hashlib.sha256(pair.encode()).digest()[:8]) % part == 0


def split(files: Sequence[Path], part: int, folder: Path) -> dict[str, list[Line]]:
    """Write the training part of each file into `folder`; returns the held-out lines by file."""
    held_out = {}
    for path in files:
        lines = [line.value for line in read_jsonl(path)]
        held_out[path.stem] = [line for line in lines if is_held_out(line, part)]
        kept = [json.dumps(line) + "\n" for line in lines if not is_held_out(line, part)]
        (folder / path.name).write_text("".join(kept), encoding="utf-8")
    return held_out


def evaluate(embedder: Embedder, lines: Sequence[Line]) -> dict[str, float]:
    """Both metrics on the held-out part of one file."""
    instruction = lines[0]["prompt"]
    instruct_passages = TASK_TYPES[lines[0]["type"]].instruct_passages
    passages = list(dict.fromkeys(text for line in lines for text in (*line["pos"], *line["neg"])))
    column = {text: n for n, text in enumerate(passages)}
    query_QD = embedder.encode([line["query"] for line in lines], instruction=instruction)
    passage_PD = embedder.encode(passages, instruction=instruction if instruct_passages else None)
    ndcg: list[float] = []
    ours: list[float] = []
    teacher: list[float] = []
    for line, cosine_P in zip(lines, query_QD @ passage_PD.T, strict=True):
        rank = 1 + int((cosine_P > cosine_P[column[line["pos"][0]]]).sum())
        ndcg.append(float(1 / np.log2(rank + 1)) if rank <= 10 else 0.0)
        ours += [cosine_P[column[text]] for text in (*line["pos"], *line["neg"])]
        teacher += [*line["pos_scores"], *line["neg_scores"]]
    return {"ndcg": float(np.mean(ndcg)), "spearman": float(spearmanr(ours, teacher).statistic)}


def main() -> None:
    """Split, train, evaluate, print one line, append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSONL files with soft labels on all lines")
    parser.add_argument("--part", type=int, default=12, help="one pair in so many is held out (default: 12)")
    parser.add_argument("--output", type=Path, help="JSONL file to append the row to")
    parser.add_argument("--name", default="", help="name of the row")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given, options = parser.parse_args(words[:end]), words[end + 1:]
    with tempfile.TemporaryDirectory() as scratch:
        held_out = split(given.files, given.part, Path(scratch))
        data = [str(Path(scratch) / path.name) for path in given.files]
        run = Path(scratch) / "run"
        if run_train.main(["--data", *data, "--output", str(run), *options]):
            raise SystemExit("run_train.py failed")
        embedder = Embedder.from_pretrained(run)
        scores = {name: evaluate(embedder, lines) for name, lines in held_out.items()}
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    mean = {metric: float(np.mean([s[metric] for s in scores.values()])) for metric in ("ndcg", "spearman")}
    row = {"name": given.name, "options": options, "steps": last["step"] + 1, "elapsed_s": last["elapsed_s"],
           "mean": mean, "scores": scores}
    print(json.dumps(row))
    if given.output:
        with given.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
