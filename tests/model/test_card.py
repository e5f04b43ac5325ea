"""Model cards: the three snippets print one cosine, metadata that huggingface_hub reads, and edited cards."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_training_lines, edit_json
from huggingface_hub import ModelCard
from tiny_mteb import write_json, write_lines

import run_train
from ref import Embedder
from ref.model.card import Score, add_scores, base_of, model_card, write_model_cards

CONFIG = {"model_type": "mistral", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
WORDS = ["who", "bakes", "bread", "mira", "kneads", "dough", "at", "dawn", "tends", "goats"]
SCORES = {
    "STSBenchmark": Score("STS", "cosine_spearman", 78.4, "mteb/stsbenchmark-sts", "abc", "test", True),
    "IsleHome": Score("Retrieval", "ndcg_at_10", 76.6, "data/held_out/IsleHome", "local-1", "test", False)}


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapter/ and merged/ on a checkpoint whose card names base and licence."""
    folder = tmp_path_factory.mktemp("cards")
    write_json(folder / "config.json", CONFIG)
    write_lines(folder / "data.jsonl", draw_training_lines(WORDS, {"Jobs": "Find a person with the same job."}, 16))
    arguments = ["--data", str(folder / "data.jsonl"), "--steps", "2", "--batch-size", "4", "--eval-data", "none"]
    assert run_train.main([*arguments, "--model", str(folder / "config.json"), "--output", str(folder / "base")]) == 0
    base = folder / "base/model"
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/base\n---\n\nA base.\n")
    assert run_train.main([*arguments, "--model", str(base), "--merge", "--learning-rate", "0.1", "--output",
                           str(folder / "run")]) == 0
    return folder / "run"


def printed_by(snippet: str) -> float:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(snippet, {})
    return float(re.search(r"-?\d\.\d+", output.getvalue())[0])


@pytest.mark.parametrize("which", ["model", "adapter", "merged"])
def test_the_three_snippets_print_the_same_cosine(adapter_run, which, tmp_path):
    pytest.importorskip("sentence_transformers")
    run = adapter_run
    if which == "model":  # the fixture replaced its card
        run = shutil.copytree(adapter_run.parent / "base", tmp_path / "base")
        (run / "model/README.md").unlink()
        write_model_cards(run)
    card = (run / which / "README.md").read_text().replace("OWNER/NAME", str(run / which))
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 3 and all("Find a person" in snippet for snippet in snippets)
    embedder = Embedder.from_pretrained(run / which)
    query = embedder.encode(["Who bakes bread?"], instruction="Find a person with the same job.")
    truth = float((query @ embedder.encode(["Mira kneads dough at dawn."]).T)[0, 0])
    np.testing.assert_allclose([printed_by(snippet) for snippet in snippets], truth, atol=1e-4)


def test_the_snippets_are_of_the_main_task(adapter_run, tmp_path):
    """A template with a suffix is for this project alone."""
    run = shutil.copytree(adapter_run, tmp_path / "run")
    for usage, passage, count in (
            ({"instructions": ["Same?", "Same?"], "prompts": ["A", "A"]}, "dawn.'], instruction='Same?'", 3),
            ({"instructions": ["Same?", None], "prompts": ["A", ""]}, "dawn.'])", 3),
            ({"instructions": [None, None], "prompts": None}, "dawn.'])", 1)):
        edit_json(run / "run.json", {"usage": usage})
        text = model_card(run, run / "merged")
        assert passage in text and text.count("```python") == count
    assert "Other libraries do not append" in text


def test_an_adapter_of_an_adapter_is_for_this_project_alone(adapter_run, tmp_path):
    """sentence-transformers and transformers cannot load it; merged/ of the same run they can."""
    assert run_train.main(["--data", str(adapter_run.parent / "data.jsonl"), "--steps", "1", "--batch-size", "4",
                           "--eval-data", "none", "--model", str(adapter_run), "--merge", "--output",
                           str(tmp_path / "run")]) == 0
    cards = {name: (tmp_path / "run" / name / "README.md").read_text() for name in ("adapter", "merged")}
    assert {name: card.count("```python") for name, card in cards.items()} == {"adapter": 1, "merged": 3}
    assert "load no adapter of an adapter: use merged/" in cards["adapter"]
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="Unrecognized model"):
        transformers.AutoModel.from_pretrained(tmp_path / "run/adapter")
    edit_json(tmp_path / "run/adapter/adapter_config.json", {"base_model_name_or_path": "owner/adapter"})  # on the hub
    (tmp_path / "run/adapter/README.md").unlink()
    write_model_cards(tmp_path / "run")
    assert (tmp_path / "run/adapter/README.md").read_text().count("```python") == 1


def test_the_data_of_the_runs_before_are_listed_too(adapter_run, tmp_path):
    """From a merged model and from an adapter; an earlier run.json may lack its own earlier data."""
    rows = {}
    for name, model in (("second", adapter_run / "merged"), ("third", tmp_path / "second/adapter")):
        write_lines(tmp_path / f"{name}.jsonl", draw_training_lines(WORDS, {"Jobs": f"Find {name}."}, 8))
        assert run_train.main(["--data", str(tmp_path / f"{name}.jsonl"), "--steps", "1", "--batch-size", "4",
                               "--eval-data", "none", "--model", str(model), "--output", str(tmp_path / name)]) == 0
        card = (tmp_path / name / "adapter/README.md").read_text()
        rows[name] = re.findall(r"^\| (\S+\.jsonl.*?) \| [\d,]+ \| ([0-9a-f]{64}) \|$", card, re.MULTILINE)
    before, second = " (run {}, before this one)".format, rows["second"]
    assert [row[0] for row in second] == [
        "data.jsonl" + before("base"), "data.jsonl" + before("run"), "second.jsonl"]
    assert rows["third"][:3] == [*second[:2], ("second.jsonl" + before("second"), second[2][1])]
    assert rows["third"][3][0] == "third.jsonl" and len({row[1] for row in rows["third"]}) == 3
    edit_json(tmp_path / "second/run.json", {"earlier_data": ...})
    assert "before this one" not in model_card(tmp_path / "second", tmp_path / "second/adapter")


def test_metadata_and_scores(adapter_run, tmp_path):
    """Only scores on the benchmark's own data are published as such; a later evaluation adds its own."""
    run = shutil.copytree(adapter_run, tmp_path / "run")
    for task, score in SCORES.items():
        assert add_scores(run, {task: score}) == []
    for which, library in (("adapter", "peft"), ("merged", "sentence-transformers")):
        card = ModelCard.load(run / which / "README.md")
        assert card.data.library_name == library
        assert (card.data.license, card.data.base_model) == ("apache-2.0", "someone/base")
        assert card.data.pipeline_tag == "sentence-similarity" and card.data.model_name == "run"
        (result,) = card.data.eval_results
        assert (result.dataset_name, result.dataset_type) == ("MTEB STSBenchmark", "mteb/stsbenchmark-sts")
        assert (result.metric_type, result.metric_value) == ("cosine_spearman", 78.4)
        assert "| STSBenchmark | cosine_spearman | 78.40 | abc |" in card.text
        assert "| IsleHome | ndcg_at_10 | 76.60 | local-1 |" in card.text
        assert "| data.jsonl | " in card.text and "learning_rate 0.1" in card.text


def test_a_score_names_the_part_of_a_data_set_in_several_languages(adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    add_scores(run, {"STS17": SCORES["STSBenchmark"]._replace(subset="en-en")})
    [result] = ModelCard.load(run / "merged/README.md").data.eval_results
    assert (result.dataset_name, result.dataset_config) == ("MTEB STS17 (en-en)", "en-en")


def test_a_score_on_other_data_does_not_replace_the_benchmarks(adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    official = SCORES["STSBenchmark"]
    add_scores(run, {"STSBenchmark": official})
    add_scores(run, {"STSBenchmark": official._replace(value=1.0, revision="local-9", is_official=False)})
    assert "| STSBenchmark | cosine_spearman | 78.40 | abc |" in (run / "merged/README.md").read_text()
    add_scores(run, {"STSBenchmark": official._replace(value=79.0)})
    assert "| STSBenchmark | cosine_spearman | 79.00 | abc |" in (run / "merged/README.md").read_text()


def test_a_prompt_is_one_cell_of_its_table(adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    edit_json(run / "merged/config_sentence_transformers.json", {"prompts": {"query": "good|bad <b>: "}})
    (run / "merged/README.md").unlink()
    write_model_cards(run)
    assert r'| `query` | "good\|bad &lt;b>: " |' in (run / "merged/README.md").read_text()


@pytest.mark.parametrize("content", ["---\nlicense: a: b\n---\n", "no metadata", "---\n- a\n---\n"])
def test_a_base_whose_card_says_nothing(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    assert base_of(str(tmp_path), tmp_path) == {"id": None, "license": None}
    assert base_of("owner/name", tmp_path) == {"id": "owner/name", "license": None}


def test_a_licence_of_its_own_keeps_name_and_link(adapter_run, tmp_path):
    """The hub wants both with `license: other`; a file of a repository on the hub is linked there."""
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n\nA base.")
    local, there = base_of(str(tmp_path), tmp_path), base_of("owner/name", tmp_path)
    assert (local["license_name"], local["license_link"]) == ("own", "LICENSE")
    assert there["license_link"] == "https://huggingface.co/owner/name/blob/main/LICENSE"
    run = shutil.copytree(adapter_run, tmp_path / "run")
    edit_json(run / "run.json", {"base": there})
    data = ModelCard(model_card(run, run / "merged")).data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", there["license_link"])
    edit_json(run / "run.json", {"base": {"id": "owner/name", "license": "mit"}})
    assert "license_" not in model_card(run, run / "merged")


def test_an_edited_card_is_left_alone(adapter_run, tmp_path):
    run = shutil.copytree(adapter_run, tmp_path / "run")
    path = run / "merged/README.md"
    path.write_text(path.read_text().replace("A text embedder", "My text embedder"))
    before = path.read_text()
    assert add_scores(run, SCORES) == [path]
    assert path.read_text() == before
    assert "STSBenchmark" in (run / "adapter/README.md").read_text()
