"""A tiny data folder for each of the 41 tasks of MTEB(eng, v2), in the layout that mteb's class of the task loads.

    write_task(folder / "STS12", "STS12")      one
    write_all(folder)                          all, for --data-dir

Invented texts about four topics: a bag of words scores above chance. The layouts are those of the hub's data sets:
several texts in one row (most clusterings, some pair sets), subsets as configurations or in the column `lang`, splits
of the judgements only, candidates to rerank, queries of several parts. Eleven tasks have a training split, as on the
hub (`TRAINED`).
"""

import itertools
import json
from pathlib import Path
from typing import Any

TOPICS = ("tea kettle water", "ship harbour sail", "violin string bow", "snow winter ice")
TRAINED = ("AmazonCounterfactualClassification", "Banking77Classification", "FiQA2018", "ImdbClassification",
           "MTOPDomainClassification", "MassiveIntentClassification", "MassiveScenarioClassification", "STS12",
           "STSBenchmark", "ToxicConversationsClassification", "TweetSentimentExtractionClassification")
CONFIGURATION = ("AmazonCounterfactualClassification", "MTOPDomainClassification")  # with an English configuration
LANGUAGE = {"MassiveIntentClassification": "en", "MassiveScenarioClassification": "en", "STS17": "en-en",
            "STS22.v2": "en"}  # all languages in one file, with a column `lang`
TEXT_LABELS = ("MassiveIntentClassification", "MassiveScenarioClassification")
ONE_ROW = ("SprintDuplicateQuestions", "TwitterSemEval2015")  # lists of texts in a single row
PATHS = ("ArXivHierarchicalClusteringP2P", "ArXivHierarchicalClusteringS2S")  # labels "a.b"; mteb samples 2,048 rows
FLAT = ("BiorxivClusteringP2P.v2",)  # clustering with one text per row
TITLED = ("CQADupstackGamingRetrieval", "CQADupstackUnixRetrieval", "SCIDOCS", "TRECCOVID", "Touche2020Retrieval.v3")
OFFSET = {"test": 0, "train": 10_000, "validation": 20_000, "other": 30_000}  # no text is in two splits


def sentence(number: int) -> str:
    """Sentences 0, 4, 8, ... are about one topic, 1, 5, 9, ... about the next."""
    return f"{TOPICS[number % 4]} and word{number} or word{number * 7 % 11}"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_card(folder: Path, configurations: dict[str, dict[str, str]]) -> None:
    """README.md that declares configuration -> split -> file."""
    lines = ["---", "configs:"]
    for name, files in configurations.items():
        splits = ", ".join(f"{{split: {split}, path: {file}}}" for split, file in files.items())
        lines += [f"- config_name: {name}", f"  data_files: [{splits}]"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def write_all(data_dir: Path) -> list[str]:
    """Write the folders of the 41 tasks; returns their names."""
    from ref.evaluation.tasks import benchmark_tasks

    names = list(benchmark_tasks())
    for name in names:
        write_task(data_dir / name, name)
    return names


def write_task(folder: Path, name: str, *, rows: int = 120, train: bool | None = None) -> None:
    """Write the data of the task `name`: about `rows` texts or pairs per split; `train`: with a training split."""
    from ref.evaluation.tasks import benchmark_tasks

    metadata = benchmark_tasks()[name].metadata
    kind = str(metadata.type)
    train = name in TRAINED if train is None else train
    if kind in ("Retrieval", "Reranking"):
        write_retrieval(folder, name, reranking=kind == "Reranking", train=train)
        return
    table = {"Classification": classification, "Clustering": clustering, "PairClassification": pairs, "STS": sts,
             "Summarization": summaries}[kind]
    splits = ["test", *(["train"] if train else []), *(["validation"] if name in CONFIGURATION else [])]
    for split in splits:
        made = table(name, rows, OFFSET[split])
        if name in LANGUAGE:
            foreign = table(name, 8, OFFSET["other"])
            made = [row | {"lang": LANGUAGE[name]} for row in made] + [row | {"lang": "de"} for row in foreign]
        write_lines(folder / f"{split}.jsonl", made)
    if name in CONFIGURATION:
        write_card(folder, {"en": {split: f"{split}.jsonl" for split in splits}})


def classification(name: str, rows: int, start: int) -> list[dict[str, Any]]:
    labels: list[Any] = [t.split()[0] for t in TOPICS] if name in TEXT_LABELS else [0, 1, 2, 3]
    if "Counterfactual" in name or "Toxic" in name or "Imdb" in name:
        labels = [0, 1, 0, 1]
    return [{"id": str(n), "text": sentence(n), "label": labels[n % 4], "label_text": str(labels[n % 4])}
            for n in range(start, start + rows)]


def clustering(name: str, rows: int, start: int) -> list[dict[str, Any]]:
    if name in PATHS:
        rows = 2_060
    texts = [sentence(n) for n in range(start, start + rows)]
    labels = [TOPICS[n % 4].split()[0] for n in range(start, start + rows)]
    if name in PATHS:
        labels = [f"{'warm' if label == 'tea' else 'cold'}.{label}" for label in labels]
    if name in FLAT:
        return [{"sentences": text, "labels": label} for text, label in zip(texts, labels, strict=True)]
    half = rows // 2
    return [{"sentences": list(some), "labels": list(of_some)} for some, of_some in (
        (texts[:half], labels[:half]), (texts[half:], labels[half:]))]


def pairs(name: str, rows: int, start: int) -> list[dict[str, Any]]:
    made = [{"sent1": sentence(n), "sent2": f"again {sentence(n + n % 2)}", "labels": 1 - n % 2}
            for n in range(start, start + rows)]
    return [{column: [row[column] for row in made] for column in made[0]}] if name in ONE_ROW else made


def sts(name: str, rows: int, start: int) -> list[dict[str, Any]]:
    """Scores decrease with the distance of the topics, from the maximum of the class's scale to its minimum."""
    low, high = (1, 4) if name == "STS22.v2" else (0, 5)
    return [{"id": str(n), "sentence1": sentence(n), "sentence2": f"again {sentence(n + n % 3)}",
             "score": float(high - (high - low) * (n % 3) / 2)} for n in range(start, start + rows)]


def summaries(name: str, rows: int, start: int) -> list[dict[str, Any]]:
    return [{"id": str(n), "text": sentence(n), "human_summaries": [sentence(n + 400), sentence(n + 800)],
             "machine_summaries": [sentence(n + 1200), sentence(n + 1201), TOPICS[n % 4]],
             "relevance": [3.0 + n % 2, 1.0, 5.0]} for n in range(start, start + 8)]


def write_retrieval(folder: Path, name: str, *, reranking: bool, train: bool) -> None:
    """Forty documents, eight queries per split; per query three relevant documents of two grades, one irrelevant."""
    parts = 2 if name == "MindSmallReranking" else 1  # the metric joins queries "3_0" and "3_1"
    numbers = {"test": range(8), **({"train": range(8, 16)} if train else {})}
    write_lines(folder / "corpus.jsonl", [
        {"_id": f"d{n}", "title": f"title{n}" if name in TITLED else "", "text": sentence(n)} for n in range(40)])
    write_lines(folder / "queries.jsonl", [
        {"_id": f"{q}_{part}" if parts > 1 else f"q{q}", "text": f"about {sentence(q)} {part}"}
        for q in itertools.chain(*numbers.values()) for part in range(parts)])
    for split, queries in numbers.items():
        judged = [(q, d, score) for q in queries for d, score in (
            (q, 2), (q + 16, 1), (q + 24, 1), (q + 1, 0))]
        write_lines(folder / ("qrels.jsonl" if len(numbers) == 1 else f"qrels-{split}.jsonl"), [
            {"query-id": f"{q}_{part}" if parts > 1 else f"q{q}", "corpus-id": f"d{d}", "score": score}
            for q, d, score in judged for part in range(parts)])
    if reranking:
        write_lines(folder / "top_ranked.jsonl", [
            {"query-id": f"{q}_{part}" if parts > 1 else f"q{q}", "corpus-ids": [f"d{d}" for d in range(q, q + 20)]}
            for q in numbers["test"] for part in range(parts)])
    if len(numbers) > 1:
        write_card(folder, {"default": {split: f"qrels-{split}.jsonl" for split in numbers},
                            "corpus": {"corpus": "corpus.jsonl"}, "queries": {"queries": "queries.jsonl"},
                            **({"top_ranked": {"test": "top_ranked.jsonl"}} if reranking else {})})
