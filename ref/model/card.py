"""The model card of a run: README.md in the hub's format in model/, adapter/ and merged/.

Metadata for the hub's search, three ways to use the model, its prompts, options and data, and the scores of run_eval.py
as a table and, on the benchmark's own data, as `model-index`. Everything is read from the run: run.json, scores.json
and the exported folder. The model is called OWNER/NAME, which ref/hub.py replaces. A card that somebody edited is left
alone.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ref.model.checkpoint import ADAPTER_CONFIG
from ref.utils.files import atomic_write, read_json, write_json

CARD_FILE, SCORES_FILE = "README.md", "scores.json"
PLACEHOLDER = "OWNER/NAME"
RESULTS = ("model", "adapter", "merged")  # folders of a run
SIGNATURE = "<!-- written by this project; SHA-256 of the text above: {} -->\n"
SHOWN = ("train", "lora_rank", "lora_alpha", "learning_rate", "batch_size", "batch_size_symmetric", "num_negatives",
         "temperature", "teacher_temperature", "soft_label_weight", "contrastive_weight", "max_examples",
         "max_text_tokens", "seed", "dtype")


class Score(NamedTuple):
    """The main score of a task, as stored in scores.json under the task's name."""

    category: str
    metric: str
    value: float  # x 100
    dataset: str  # on the hub, or a local folder
    revision: str
    split: str
    is_official: bool  # a task of the benchmark on its own data
    subset: str = "default"  # of a data set in several languages


def run_folder(folder: Path) -> Path | None:
    """The run that a folder is, or whose result it is; None for any other folder."""
    runs = [folder, *([folder.parent] if folder.name in RESULTS else [])]
    return next((run for run in runs if (run / "run.json").is_file()), None)


def add_scores(run: Path, scores: Mapping[str, Score]) -> list[Path]:
    """Add scores by task to those of earlier evaluations of a run, and write its cards; returns the edited ones.

    A score on other data does not replace one on the benchmark's own; of two on the same data the later one counts.
    """
    path = run / SCORES_FILE
    stored = read_json(path) if path.exists() else {}
    for task, score in scores.items():
        before = stored.get(task, {})
        if score.is_official or not before.get("is_official") or before.get("revision") == score.revision:
            stored[task] = score._asdict()
    write_json(path, stored)
    return write_model_cards(run)


def write_model_cards(run: Path) -> list[Path]:
    """Write README.md into each result of a complete run; returns those left alone because somebody edited them."""
    edited = []
    for folder in (run / result for result in RESULTS if (run / result).is_dir()):
        path = folder / CARD_FILE
        if path.exists() and not is_unedited_card(path):
            edited.append(path)
            continue
        card = _signed(model_card(run, folder))
        atomic_write(path, partial(Path.write_text, data=card, encoding="utf-8"))
    return edited


def model_card(run: Path, folder: Path) -> str:
    """The card of one exported folder of a run."""
    facts, path = read_json(run / "run.json"), run / SCORES_FILE
    if "usage" not in facts:
        raise ValueError(f"{run / 'run.json'}: has no 'usage', which cards show; the run is of an earlier version")
    scores = {task: Score(**values) for task, values in (read_json(path) if path.exists() else {}).items()}
    base, name = facts.get("base") or {}, run.resolve().name
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    snippets = usage(folder, facts, on_adapter=is_adapter and facts.get("base_is_adapter", False))
    data = ModelCardData(
        base_model=base.get("id"), license=base.get("license"), license_name=base.get("license_name"),
        license_link=base.get("license_link"), pipeline_tag="sentence-similarity", model_name=name,
        library_name="peft" if is_adapter else "sentence-transformers",
        tags=["sentence-transformers", "feature-extraction", "text-embeddings", "mteb", "arxiv:2506.07438"],
        eval_results=[EvalResult(
            task_type=score.category, dataset_type=score.dataset, dataset_config=score.subset,
            dataset_name=f"MTEB {task}" + f" ({score.subset})" * (score.subset != "default"), dataset_split=score.split,
            dataset_revision=score.revision, metric_type=score.metric, metric_value=score.value)
            for task, score in scores.items() if score.is_official] or None)
    sections = [
        f"# {name}\n\nA text embedder, trained by a reference implementation of LG-ANNA-Embedding "
        "(arXiv 2506.07438) from soft labels.",
        "## Usage\n\n" + snippets, "## Prompts\n\n" + _prompt_table(folder),
        "## Training\n\n" + _training(facts), *(["## Scores\n\n" + _score_table(scores)] if scores else [])]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def base_of(name: str, folder: Path) -> dict[str, Any]:
    """The base model's hub id and licence, where known, from its own card; `name`: a hub id or the folder.

    A licence outside the hub's list is `other`, with a name and a link, which in a card may be a file beside it.
    """
    card = folder / "README.md"
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.exists() else ModelCardData()
    except Exception:  # any error in somebody else's card: nothing is known
        data = ModelCardData()
    found = {"id": data.base_model if os.path.isdir(name) else name, "license": data.license}
    other = {field: value for field in ("license_name", "license_link") if (value := getattr(data, field, None))}
    if not os.path.isdir(name) and "://" not in (link := str(other.get("license_link", "://"))):
        other["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return found | other


def usage(folder: Path, facts: Mapping[str, Any], *, on_adapter: bool) -> str:
    """Three snippets that print the same cosine of a query and a passage of the main task; only this project's for an
    adapter of an adapter, and for a template with a suffix.
    """
    query, passage = "Who bakes bread?", "Mira kneads dough at dawn."
    ours = ["" if text is None else f", instruction={text!r}" for text in facts["usage"]["instructions"]]
    limit = read_json(folder / "sentence_bert_config.json")["max_seq_length"]
    own = f"""With this project:

```python
from ref import Embedder
embedder = Embedder.from_pretrained({PLACEHOLDER!r})
print(embedder.encode([{query!r}]{ours[0]}) @ embedder.encode([{passage!r}]{ours[1]}).T)
```"""
    if on_adapter:
        return f"{own}\n\nsentence-transformers and transformers load no adapter of an adapter: use merged/ (--merge)."
    if facts["usage"]["prompts"] is None:
        return f"{own}\n\nOther libraries do not append what this template puts behind a text."
    return _usage_of_libraries(query, passage, facts["usage"]["prompts"], limit) + own


def _usage_of_libraries(query: str, passage: str, before: Sequence[str], limit: int) -> str:
    """The snippets for sentence-transformers and transformers; `before`: the prompts of query and passage."""
    texts = [before[0] + query, before[1] + passage]
    return f"""With sentence-transformers:

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({PLACEHOLDER!r})
queries, passages = model.encode([{query!r}], prompt={before[0]!r}), model.encode([{passage!r}], prompt={before[1]!r})
print(model.similarity(queries, passages))
```

With transformers:

```python
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({PLACEHOLDER!r}, padding_side="right")
model = AutoModel.from_pretrained({PLACEHOLDER!r})
texts = {texts!r}
batch = tokenizer(texts, padding=True, truncation=True, max_length={limit}, return_tensors="pt")
with torch.inference_mode():
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
vectors = hidden[torch.arange(len(texts)), batch["attention_mask"].sum(1) - 1]  # the end token's
print(torch.cosine_similarity(vectors[:1], vectors[1:]))
```

"""


def _prompts(folder: Path) -> dict[str, str]:
    """The exported prompts by name."""
    prompts: dict[str, str] = read_json(folder / "config_sentence_transformers.json")["prompts"]
    return prompts


def _prompt_table(folder: Path) -> str:
    cells = {name: json.dumps(text, ensure_ascii=False).replace("|", r"\|").replace("<", "&lt;")
             for name, text in _prompts(folder).items()}
    rows = [f"| `{name}` | {text} |" for name, text in cells.items()]
    if not rows:
        return "None: training had no instruction, or its template puts markers behind a text too."
    return "\n".join([
        "In sentence-transformers `encode_query` and `encode_document` use those named `query` and `document`, "
        "`prompt_name` any.\n", "| name | prompt |", "|---|---|", *rows])


def _training(facts: dict[str, Any]) -> str:
    options = ", ".join(f"{name} {facts['options'].get(name)}" for name in SHOWN
                        if not (name.startswith("lora") and facts["options"].get("train") == "all"))
    steps = facts.get("result_step")
    files = [*facts.get("earlier_data", ()), *facts["data"]]
    rows = [f"| {file['file']}{f' (run {run}, before this one)' if (run := file.get('run')) else ''} | "
            f"{file['bytes']:,} | {file['sha256']} |" for file in files]
    return "\n".join([
        f"{facts['num_lines']:,} lines, {facts['num_lines_with_labels']:,} with soft labels"
        f"{'' if steps is None else f'; {steps:,} steps'}. Options: {options}. "
        f"Commit {facts['commit']}, torch {facts['versions']['torch']}.\n",
        "| data | bytes | SHA-256 |", "|---|---|---|", *rows])


def _score_table(scores: Mapping[str, Score]) -> str:
    return "\n".join([
        "mteb's main scores x 100; a revision that begins with `local-` is not the benchmark's own data.\n",
        "| task | metric | score | revision of the data |", "|---|---|---|---|",
        *(f"| {task} | {score.metric} | {score.value:.2f} | {score.revision} |"
          for task, score in sorted(scores.items()))])


def _signed(text: str) -> str:
    return text + SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest())


def _body(text: str) -> str:
    return text.rpartition(SIGNATURE.partition(";")[0])[0]


def is_signed(text: str) -> bool:
    """Whether a text is a card as this project wrote it, and nobody has edited it since."""
    return bool(text) and text == _signed(_body(text))


def is_unedited_card(path: Path) -> bool:
    """Whether a file is a card as `write_model_cards` left it."""
    return path.name == CARD_FILE and is_signed(path.read_text(encoding="utf-8", errors="replace"))


def name_card(text: str, repository: str) -> str:
    """A card with the name of its repository on the hub, signed again if nobody has edited it."""
    named = text.replace(PLACEHOLDER, repository)
    return _signed(_body(named)) if is_signed(text) else named
