"""Label: `python run_label.py --pairs pairs.jsonl --corpus corpus.jsonl --retriever NAME`. From pairs to soft labels.

    query, its positives     ->  candidates by words and by vectors, fused      labelling/pipeline.py
    candidates, positives    ->  the teacher's scores                           (a reranker's, else the retriever's)
    scores                   ->  hard negatives below the query's own bar       ref/mining.py
                             ->  soft_labels.jsonl, which run_train.py takes

Beside it: soft_labels.json (teachers, scale, hashes, what the rule rejected, entropy of the labels) and a histogram,
soft_labels.png. Everything slow is kept in --cache by content: Ctrl-C and the same command again goes on, and another
rule costs seconds. Several GPUs: torchrun --nproc-per-node 8 run_label.py …
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from labelling.cache import Cache
from labelling.models import open_reranker, open_retriever
from labelling.pipeline import Lists, Pipeline, Scored, Search, cache_folder
from labelling.report import Tally, draw_histogram, rules_table
from labelling.sources import Corpus, Pairs, corpus_from_pairs
from ref.mining import RULES, Candidate, best_first, judge, sigmoid
from ref.runs import machine, now, remove, write_json
from ref.team import Team


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="From pairs and a corpus to soft labels with hard negatives.")
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="JSONL of query and pos (ids), or a folder in BEIR's layout")
    add("--corpus", type=Path, help="JSONL of id and text (default: corpus.jsonl in --pairs, if that is a folder; else "
        "all texts of pos and neg in --pairs)")
    add("--split", default="train", help="split of a BEIR folder: qrels/SPLIT.tsv (default: train)")
    add("--retriever", required=True, help="a run or checkpoint of ours, or any sentence-transformers model")
    add("--reranker", help="any CrossEncoder with one output (default: none, the cosine is the label)")
    add("--output", type=Path, default=Path("soft_labels.jsonl"), help="(default: soft_labels.jsonl)")
    add("--instruction", help="instruction for pairs that have no prompt")
    add("--lists", choices=get_args(Lists), default="fused", help="words: BM25; vectors: dense; fused: both (default)")
    add("--depth", type=int, default=100, help="passages of each list (default: 100)")
    add("--candidates", type=int, default=50, help="passages of the fused list that are scored (default: 50)")
    add("--stemmer", help="for BM25: a language, such as english (default: none)")
    add("--rule", choices=RULES, default="percentage", help="which candidates are negatives (default: percentage)")
    add("--value", type=float, help=f"of the rule (default: {', '.join(f'{k} {v}' for k, v in RULES.items())})")
    add("--negatives", type=int, default=7, help="of a query, at most (default: 7)")
    add("--label-temperature", type=float, help="for the reported entropy (default: 0.05 for cosines, 1 for logits)")
    add("--rules-report", action="store_true", help="print what each rule would keep, and write nothing")
    add("--cache", default="label_cache", help="folder of what was computed (default: label_cache)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    given = parser.parse_args(arguments)
    for name in ("depth", "candidates", "negatives"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} is {getattr(given, name)}. Expected is at least 1. Give another number.")
    if given.output.suffix != ".jsonl" or given.output.is_dir():
        raise ValueError(f"--output is {given.output}. Expected is a file that ends in .jsonl: a .json and a .png of "
                         "that name come beside it. Give another.")
    if given.output.resolve() in [path.resolve() for path in (given.pairs, given.corpus) if path is not None]:
        raise ValueError(f"--output is {given.output}, which is read. Expected is another file. Give one.")
    if given.label_temperature is not None and not given.label_temperature > 0:
        raise ValueError(f"--label-temperature is {given.label_temperature}. Expected is above 0. Give another.")
    given.value = RULES[given.rule] if given.value is None else given.value
    if not math.isfinite(given.value):
        raise ValueError(f"--value is {given.value}. Expected is a finite number. Give another.")
    if given.rule == "percentage" and not 0 < given.value <= 1:
        raise ValueError(f"--value is {given.value} for the rule percentage. Expected is a share above 0 and up to 1. "
                         "Give another.")
    return given


def prepare(given: argparse.Namespace, team: Team) -> Pipeline:
    """Check all input, open the teachers."""
    cache = Cache(cache_folder(given.cache))
    if given.corpus is None:
        given.corpus = given.pairs if given.pairs.is_dir() else corpus_from_pairs(given.pairs, cache.folder)
        print(f"corpus: {given.corpus}" + ("" if given.pairs.is_dir() else ", all texts of pos and neg in --pairs"))
    corpus = Corpus(given.corpus)
    pairs = Pairs(given.pairs, corpus, split=given.split)
    print(f"{len(pairs):,} queries, {len(corpus):,} passages", flush=True)
    retriever = open_retriever(given.retriever, given.device)
    reranker = open_reranker(given.reranker, given.device) if given.reranker else None
    if team.rank == 0:
        tell_what_changed(cache, {"retriever": retriever.key, "reranker": reranker and reranker.key,
                                  "corpus": corpus.sha256})
    search = Search(given.lists, given.depth, given.candidates, given.stemmer)
    return Pipeline(corpus, pairs, retriever, reranker, search=search, cache=cache, team=team, device=given.device,
                    instruction=given.instruction)


def tell_what_changed(cache: Cache, keys: dict[str, Any]) -> None:
    """Say if the cache was filled by another model or corpus: nothing of theirs is used, all is computed anew."""
    path = cache.folder / "last.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = {}
    for name, key in keys.items():
        if before.get(name) not in (None, key) and key is not None:
            print(f"cache: another {name} than last time; what depends on it is computed anew", flush=True)
    write_json(path, keys)


def bounded(scored: Scored, logits: bool) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
    """Positives and candidates on the scale that the rule sees: cosines as they are, logits through a sigmoid.

    And the query's positives on other lines, which have no score here.
    """
    scale = sigmoid if logits else float
    positives, candidates = ([Candidate(name, text, scale(score)) for name, text, score in some]
                             for some in (scored.positives, scored.candidates))
    return positives, candidates, [Candidate(name, text, math.nan) for name, text in scored.elsewhere]


def label(
    given: argparse.Namespace, pipeline: Pipeline, tallies: dict[str, Tally], temperature: float,
) -> Iterator[str]:
    """The lines of the output."""
    logits = pipeline.reranker is not None
    for scored in pipeline.scored():
        positives, candidates, elsewhere = bounded(scored, logits)
        fate = list(judge(scored.pair.query, positives, best_first(candidates), rule=given.rule, value=given.value,
                          negatives=given.negatives, elsewhere=elsewhere))
        negatives = [candidate for candidate, why in fate if why == "kept"]
        raw = {name: score for name, _, score in scored.candidates}
        positive_scores = [round(score, 6) for _, _, score in scored.positives]
        negative_scores = [round(raw[negative.id], 6) for negative in negatives]
        prompt = scored.pair.prompt or given.instruction
        tally = tallies.setdefault(scored.pair.task, Tally(temperature))
        tally.add(fate, positive_scores, negative_scores, [score for _, _, score in scored.candidates])
        yield json.dumps({
            "query": scored.pair.query, "pos": [text for _, text, _ in scored.positives],
            "neg": [negative.text for negative in negatives], "pos_scores": positive_scores,
            "neg_scores": negative_scores, **({"prompt": prompt} if prompt else {}), "type": scored.pair.kind,
            "task": scored.pair.task, "mining": {"candidates": len(fate), **Counter(why for _, why in fate)}},
            ensure_ascii=False)


def write(given: argparse.Namespace, pipeline: Pipeline) -> None:
    """Mine, write the output whole, then what is beside it."""
    scale = "cosine" if pipeline.reranker is None else "logit"
    temperature = given.label_temperature or {"cosine": 0.05, "logit": 1.0}[scale]
    tallies: dict[str, Tally] = {}
    digest, draft = hashlib.sha256(), given.output.with_name(f".{given.output.name}.draft")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("wb") as file:
            for line in label(given, pipeline, tallies, temperature):
                digest.update(data := line.encode() + b"\n")
                file.write(data)
        draft.replace(given.output)
    except BaseException:
        remove(draft)
        raise
    facts = {name: tally.as_json(given.negatives) for name, tally in tallies.items()}
    retriever, reranker = pipeline.retriever, pipeline.reranker
    write_json(given.output.with_suffix(".json"), {
        "date": now(), **machine(),
        "teacher": {"retriever": retriever.name, "retriever_files": retriever.key,
                    "reranker": reranker and reranker.name, "reranker_files": reranker and reranker.key},
        "scale": scale, "the_rule_sees": {"cosine": "the score", "logit": "its sigmoid"}[scale],
        "rule": {"name": given.rule, "value": given.value, "negatives": given.negatives},
        "search": vars(pipeline.search),
        "pairs": {"file": pipeline.pairs.path.name, "sha256": pipeline.pairs.sha256, "queries": len(pipeline.pairs)},
        "corpus": {"file": pipeline.corpus.path.name, "sha256": pipeline.corpus.sha256,
                   "passages": len(pipeline.corpus)},
        "output": {"file": given.output.name, "sha256": digest.hexdigest()}, "by_task": facts})
    for task, fact in facts.items():
        print(f"{task}: {fact['queries']:,} queries; the rule rejects {fact['rejected_share']:.0%} of the candidates; "
              f"{fact['queries_with_fewer_negatives']:,} queries have fewer than {given.negatives} negatives; entropy "
              f"of the labels {fact['label_entropy']:.2f} of {fact['entropy_of_flat_labels']:.2f} nats at temperature "
              f"{temperature}")
    why_not = draw_histogram(tallies, given.output.with_suffix(".png"), scale=scale)
    if why_not:
        print(why_not)
    print(f"blocks from the cache {pipeline.cache.found:,}, computed {pipeline.cache.computed:,}")
    bare = "" if given.instruction or pipeline.pairs.all_have_prompts else " --instruction '…'"
    print(f"done: {given.output}. Train on it: python run_train.py --data {given.output} --teacher-temperature "
          f"{temperature}{bare}")


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 130 after Ctrl-C; 2 for bad input, with a message."""
    team = None
    try:
        given = parse(arguments)
        team = Team()
        pipeline = prepare(given, team)
        pipeline.encode()
        pipeline.find()
        pipeline.score()
        if team.rank == 0 and given.rules_report:
            logits = pipeline.reranker is not None
            queries = ((scored.pair.query, *bounded(scored, logits)) for scored in pipeline.scored())
            print("\n".join(rules_table(queries, negatives=given.negatives)))
        elif team.rank == 0:
            write(given, pipeline)
        team.wait()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was computed is kept: the same command goes on", file=sys.stderr)
        return 130
    finally:
        if team is not None:
            team.close()


if __name__ == "__main__":
    sys.exit(main())
