"""Label: `python run_label.py --pairs pairs.jsonl --corpus corpus.jsonl --retriever NAME`. From pairs to soft labels.

    query, positives         ->  candidates by BM25 and dense search, fused     ref/mining/pipeline.py
    candidates, positives    ->  the teacher's scores                           a reranker's, else the retriever's
    scores                   ->  hard negatives below the query's threshold     ref/mining/rules.py
                             ->  soft_labels.jsonl for run_train.py             ref/mining/labels.py

Beside it: soft_labels.json (teachers, scale, hashes, decisions of the rule, entropy of the labels) and a histogram,
soft_labels.png. Slow results are cached by content in --cache: after Ctrl-C the same command continues, and a run with
another rule takes seconds. Several GPUs: torchrun --nproc-per-node 8 run_label.py …
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from ref.mining.labels import TEACHER_TEMPERATURE, LabelConfig, is_label_file, rule_table, write_labels
from ref.mining.pipeline import LabellingPipeline, Retrieval, RetrievalConfig
from ref.mining.rules import RULES
from ref.mining.sources import Corpus, Pairs, corpus_from_pairs
from ref.mining.statistics import plot_histogram
from ref.mining.teachers import load_reranker, load_retriever
from ref.model.checkpoint import resolve_checkpoint
from ref.utils.block_cache import BlockCache
from ref.utils.device import Dtype
from ref.utils.distributed import Distributed, RankFailure
from ref.utils.outputs import check_outside, claim_output
from ref.utils.progress import escape_unprintable

RANK_TIMEOUT = timedelta(minutes=10)  # how long the ranks wait for one without heartbeat


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ValueError for a value out of range."""
    parser = argparse.ArgumentParser(description="From pairs and a corpus to soft labels with hard negatives.")
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="JSONL of query and pos (ids), or a folder in BEIR's layout")
    add("--corpus", type=Path, help="JSONL of id and text (default: corpus.jsonl in --pairs, if that is a folder; else "
        "all texts of pos and neg in --pairs)")
    add("--split", help="split of a BEIR folder: qrels/SPLIT.tsv (default: train)")
    add("--retriever", required=True, help="a run or checkpoint of this project, or any sentence-transformers model")
    add("--reranker", help="any CrossEncoder with one output (default: none; the retriever's cosines are the scores)")
    add("--output", type=Path, default=Path("soft_labels.jsonl"), help="(default: soft_labels.jsonl)")
    add("--instruction", help="instruction for pairs without a prompt (default: none)")
    add("--retrieval", choices=get_args(Retrieval), default="hybrid", help="hybrid: both lists, fused (default)")
    add("--top-k", type=int, default=100, help="passages per list (default: 100)")
    add("--num-candidates", type=int, default=50, help="passages of the fused list that are scored (default: 50)")
    add("--stemmer", help="for BM25: a language, such as english (default: none)")
    add("--bm25-tokens", choices=("words", "subwords"), default="words", help="for BM25: words (default), or the "
        "retriever's own subwords, for languages without spaces between words")
    add("--rule", choices=RULES, help="which candidates are negatives (default: percentage)")
    defaults = ", ".join(f"{rule} {value}" for rule, value in RULES.items() if rule != "none")
    add("--value", type=float, help=f"of the rule (default: {defaults})")
    add("--num-negatives", type=int, default=7, help="hard negatives per query, at most (default: 7)")
    add("--teacher-temperature", type=float, help="for the reported entropy (default: 0.05 for cosines, 1 for logits)")
    add("--compare-rules", action="store_true", help="print what each rule would select; write no labels")
    add("--cache", type=Path, default=Path("label_cache"), help="folder of computed results (default: label_cache)")
    add("--device", help="cpu or cuda (default: cuda if available)")
    add("--dtype", choices=get_args(Dtype), default="auto", help="precision of the teachers (default: auto, bfloat16 "
        "where the processor is faster in it; sentence-transformers models as their library loads them)")
    given = parser.parse_args(arguments)
    for name in ("top_k", "num_candidates", "num_negatives"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1 (got {getattr(given, name)})")
    check_used(given)
    given.rule = given.rule or "percentage"
    if given.instruction in ("", "none"):  # as in run_train.py
        given.instruction = None
    if given.output.suffix != ".jsonl" or given.output.is_dir():
        raise ValueError(f"--output must be a file that ends in .jsonl (got {given.output})")
    return given


def check_used(given: argparse.Namespace) -> None:
    """Raise ValueError for an option that the run would not use."""
    for name, is_used, use in (
            ("split", given.pairs.is_dir(), "--pairs FOLDER"),
            ("stemmer", given.retrieval != "dense" and given.bm25_tokens == "words", "BM25 over words"),
            ("bm25_tokens", given.retrieval != "dense" or given.bm25_tokens == "words", "BM25"),
            ("rule", not given.compare_rules, "labels, which --compare-rules does not write"),
            ("value", given.rule != "none" and not given.compare_rules, "one --rule other than none"),
            ("teacher_temperature", not given.compare_rules, "labels, which --compare-rules does not write")):
        if getattr(given, name) is not None and not is_used:
            raise ValueError(f"--{name.replace('_', '-')} is for {use} (got {getattr(given, name)})")


def label_config(given: argparse.Namespace) -> LabelConfig:
    """Rule, number of negatives and temperature, with their defaults. Raises ValueError for a value out of range."""
    value = RULES[given.rule] if given.value is None else given.value
    default = TEACHER_TEMPERATURE["logit" if given.reranker else "cosine"]
    temperature = default if given.teacher_temperature is None else given.teacher_temperature
    return LabelConfig(given.rule, value, given.num_negatives, temperature)


def build_pipeline(given: argparse.Namespace, distributed: Distributed) -> LabellingPipeline:
    """Check pairs and corpus, and find the teachers."""
    check_outside(given.cache, model_folders(given), f"--cache {given.cache}")
    try:
        given.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--cache {given.cache}: cannot be created ({error.strerror})") from None
    log: Callable[[str], None] = partial(print, flush=True) if distributed.rank == 0 else lambda _: None
    cache, path = BlockCache(given.cache), given.corpus
    if path is None:
        path = given.pairs if given.pairs.is_dir() else corpus_from_pairs(given.pairs, cache.folder)
        log(f"corpus: {path}" + ("" if given.pairs.is_dir() else ", all texts of pos and neg in --pairs"))
    corpus = Corpus(path)
    pairs = Pairs(given.pairs, corpus, split=given.split or "train")
    skipped = f" ({len(corpus.empty):,} without text are skipped)" if corpus.empty else ""
    log(f"{len(pairs):,} queries, {len(corpus):,} passages{skipped}")
    retriever = load_retriever(given.retriever, given.device, given.dtype)
    reranker = load_reranker(given.reranker, given.device, given.dtype) if given.reranker else None
    log(f"retriever: {retriever.name}; {retriever.precision}")
    if not retriever.uses_instructions and (given.instruction or pairs.any_has_prompt):
        log(f"instructions are not used: {retriever.name} declares no prompt that contains one")
    if reranker:
        log(f"reranker: {reranker.name}; {reranker.precision}")
    config = RetrievalConfig(given.retrieval, given.top_k, given.num_candidates, given.stemmer,
                             given.bm25_tokens)
    return LabellingPipeline(corpus, pairs, retriever, reranker, config=config, cache=cache, distributed=distributed,
                             device=given.device, instruction=given.instruction)


def model_folders(given: argparse.Namespace) -> list[Path]:
    """The teachers that are folders."""
    return [resolve_checkpoint(name) for name in (given.retriever, given.reranker) if name and os.path.isdir(name)]


def claim_labels(given: argparse.Namespace) -> AbstractContextManager[Path]:
    """Hold --output and what is written beside it; labels of an earlier call may be replaced."""
    inputs = [path for path in (given.pairs, given.corpus, *model_folders(given)) if path is not None]
    companions = [given.output.with_suffix(suffix) for suffix in (".json", ".png")]
    return claim_output(given.output, inputs=inputs, companions=companions, is_ours=lambda: is_label_file(given.output))


def label(pipeline: LabellingPipeline, config: LabelConfig, output: Path) -> None:
    """Write the labels and what is beside them, and print a summary."""
    description, statistics = write_labels(pipeline, config, output)
    for task, facts in description["by_task"].items():
        print(f"{task}: {facts['queries']:,} queries; the rule rejects {facts['rejected_share']:.0%} of the candidates;"
              f" {facts['queries_with_fewer_negatives']:,} queries have fewer than {config.num_negatives} negatives; "
              f"entropy of the labels {facts['label_entropy']:.2f} of at most {facts['max_label_entropy']:.2f} nats at "
              f"temperature {config.teacher_temperature}")
    for task, count in description["queries_left_out"].items():
        print(f"{task}: {count:,} queries without negatives are left out: their type has no in-batch negatives, unless "
              "training is given --in-batch-negatives all")
    why_not = plot_histogram(statistics, output.with_suffix(".png"), scale=pipeline.scale)
    if why_not:
        print(why_not)
    print(f"blocks from the cache: {pipeline.cache.num_found:,}, computed: {pipeline.cache.num_computed:,}")
    instruction = "" if pipeline.instruction or pipeline.pairs.all_have_prompts else " --instruction '…'"
    print(f"done: {output}. Train on it: python run_train.py --data {output} "
          f"--teacher-temperature {config.teacher_temperature}{instruction}")


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; with a message 2 for bad input, 3 if GPU memory ran out, 4 if a rank failed, 130 after a signal."""
    distributed = None
    escape_unprintable()
    try:
        given = parse_args(arguments)
        config = label_config(given)
        distributed = Distributed()
        distributed.timeout = RANK_TIMEOUT
        writes = distributed.rank == 0 and not given.compare_rules
        with claim_labels(given) if writes else nullcontext():
            pipeline = build_pipeline(given, distributed)
            if distributed.rank == 0:
                pipeline.print_changes()
            pipeline.encode()
            pipeline.retrieve()
            if distributed.rank == 0 and (unmatched := pipeline.num_unmatched()):
                print(f"BM25 finds no passage for {unmatched:,} of {len(pipeline.pairs):,} queries"
                      + ("; for languages without spaces between words use --bm25-tokens subwords"
                         if given.bm25_tokens == "words" else ""), flush=True)
            pipeline.score()
            if writes:
                label(pipeline, config, given.output)
            elif distributed.rank == 0:
                print("\n".join(rule_table(pipeline, given.num_negatives)))
            distributed.barrier(while_alive=True)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the cache", file=sys.stderr)
        return 130
    except (torch.cuda.OutOfMemoryError, RankFailure) as error:
        print(f"error: {str(error).splitlines()[0]:.300}; the same command continues from the cache", file=sys.stderr)
        return 4 if isinstance(error, RankFailure) else 3
    finally:
        if distributed is not None:
            distributed.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing half-written stays
    sys.exit(main())
