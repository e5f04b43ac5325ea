"""Compare options of run_train.py on a held-out part of the training files, so that no test set is looked at.

    python -m benchmarks.choose FILE… [--part N] [--output rows.jsonl] -- any options of run_train.py

Every N-th pair (query, first positive; both directions of a pair stay together) leaves the training files. Each file's
part is then scored by two figures, both on texts that the file's own lines bring:

    ndcg       nDCG@10 of the first positive among all passages of the part
    spearman   rank correlation between our cosines and the teacher's scores, over all (query, passage) of the part

The means over the files are printed and, with everything else, appended to --output.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import run_train
from ref.data import KINDS
from ref.embedder import Embedder

Line = dict[str, Any]


def is_held_out(row: Line, part: int) -> bool:
    """Whether a line belongs to the held-out part; a pair and its reverse always go together."""
    pair = "\n".join(sorted((row["query"], row["pos"][0])))
    return int.from_bytes(hashlib.sha256(pair.encode()).digest()[:8]) % part == 0


def split(files: Sequence[Path], part: int, folder: Path) -> dict[str, list[Line]]:
    """Write the training part of each file into `folder`; returns the lines that were left out, by file."""
    left_out = {}
    for path in files:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        left_out[path.stem] = [row for row in lines if is_held_out(row, part)]
        kept = [json.dumps(row) + "\n" for row in lines if not is_held_out(row, part)]
        (folder / path.name).write_text("".join(kept), encoding="utf-8")
    return left_out


def score(embedder: Embedder, rows: Sequence[Line]) -> dict[str, float]:
    """Both figures of one file's part."""
    instruction = rows[0]["prompt"]
    passages = list(dict.fromkeys(text for row in rows for text in (*row["pos"], *row["neg"])))
    number = {text: n for n, text in enumerate(passages)}
    query_QD = embedder.encode([row["query"] for row in rows], instruction=instruction)
    passage_PD = embedder.encode(passages, instruction=instruction if KINDS[rows[0]["type"]].both_sides else None)
    cosine_QP = query_QD @ passage_PD.T
    gains: list[float] = []
    ours: list[float] = []
    teacher: list[float] = []
    for row, cosine_P in zip(rows, cosine_QP, strict=True):
        rank = 1 + int((cosine_P > cosine_P[number[row["pos"][0]]]).sum())
        gains.append(float(1 / np.log2(rank + 1)) if rank <= 10 else 0.0)
        ours += [cosine_P[number[text]] for text in (*row["pos"], *row["neg"])]
        teacher += [*row["pos_scores"], *row["neg_scores"]]
    return {"ndcg": float(np.mean(gains)), "spearman": float(spearmanr(ours, teacher).statistic)}


def main() -> None:
    """Split, train, score, print one line, append one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSONL files with soft labels, all of them with scores")
    parser.add_argument("--part", type=int, default=12, help="one pair in so many is held out (default: 12)")
    parser.add_argument("--output", type=Path, help="JSONL file to append the row to")
    parser.add_argument("--name", default="", help="what to call the row")
    arguments, options = parser.parse_known_args()
    options = options[options[:1] == ["--"]:]
    with tempfile.TemporaryDirectory() as scratch:
        left_out = split(arguments.files, arguments.part, Path(scratch))
        data = [str(Path(scratch) / path.name) for path in arguments.files]
        run = Path(scratch) / "run"
        if run_train.main(["--data", *data, "--output", str(run), *options]):
            raise SystemExit("the run failed")
        embedder = Embedder.from_pretrained(run)
        scores = {name: score(embedder, rows) for name, rows in left_out.items()}
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    mean = {figure: float(np.mean([s[figure] for s in scores.values()])) for figure in ("ndcg", "spearman")}
    row = {"name": arguments.name, "options": options, "steps": last["step"] + 1, "elapsed_s": last["elapsed_s"],
           "mean": mean, "scores": scores}
    print(json.dumps(row))
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
