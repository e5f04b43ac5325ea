"""What a checkpoint's files declare about its embeddings; all but causal last-token embedders are rejected by name.

    modules.json, N_Pooling/config.json    sentence-transformers: a transformer, last-token pooling, normalisation
    sentence_bert_config.json and others   sentence-transformers and transformers: options that change the tokens
    llm2vec_config.json                    LLM2Vec: bidirectional attention
    config.json beside an adapter          the model that the adapter was trained with
    adapter_config.json                    its class, in 'auto_mapping'

config.json of a checkpoint itself is checked by ref.config.ModelConfig.
"""

from pathlib import Path

from ref.config import ARCHITECTURES, ModelConfig
from ref.model.checkpoint import ADAPTER_CONFIG
from ref.utils.files import check_type, read_json, read_json_list

MODULES = ("Transformer", "Pooling", "Normalize")
# file -> its fields with the values that this project computes; others are rejected by name
PLAIN: dict[str, dict[str, tuple[object, ...]]] = {
    "tokenizer_config.json": {"truncation_side": ("right", None)},
    "sentence_bert_config.json": {"do_lower_case": (False, None)},
    "config_sentence_transformers.json": {
        "default_prompt_name": (None,), "truncate_dim": (None,)},  # a prompt on every text; shorter vectors
}


def check_declared(folder: Path, *, is_adapter: bool) -> None:
    """Raise ValueError for a declared module, pooling or model class that this project would compute otherwise."""
    if is_adapter:
        if (folder / "config.json").exists():
            ModelConfig.from_file(folder / "config.json")
        mapping = read_json(folder / ADAPTER_CONFIG).get("auto_mapping") or {}
        kind = mapping.get("base_model_class") if isinstance(mapping, dict) else mapping
        if kind not in (None, *ARCHITECTURES):
            raise ValueError(f"{folder / ADAPTER_CONFIG}: 'auto_mapping' names the class {kind!r:.60}, which is not "
                             f"supported (only {', '.join(ARCHITECTURES)})")
    if (folder / "llm2vec_config.json").exists():
        raise ValueError(f"{folder / 'llm2vec_config.json'}: LLM2Vec's bidirectional models are not supported")
    for name, fields in PLAIN.items():
        values = read_json(folder / name) if (folder / name).exists() else {}
        for field, plain in fields.items():
            if values.get(field, plain[0]) not in plain:
                raise ValueError(f"{folder / name}: {field} {values[field]!r:.60} is not supported (only {plain[0]!r})")
    path = folder / "modules.json"
    if not path.exists():
        return
    modules = [(str(check_type(module, dict, str(path), "a list of objects").get("type", "")),
                str(module.get("path", ""))) for module in read_json_list(path)]
    for kind, _ in modules:
        if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in MODULES:
            raise ValueError(f"{path}: module {kind!r:.60} is not supported (only sentence_transformers' "
                             f"{', '.join(MODULES)})")
    for kind, place in modules:
        if kind.endswith(".Pooling"):
            _check_pooling(folder / place / "config.json")


def _check_pooling(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: file does not exist, but modules.json names its folder")
    values = read_json(path)
    modes = {key.removeprefix("pooling_mode_") for key, value in values.items()
             if key.startswith("pooling_mode_") and value is True}
    named = values.get("pooling_mode") or []  # the newer form: a name, several joined by +, or a list
    listed = named.split("+") if isinstance(named, str) else named if isinstance(named, list) else [named]
    modes |= set(map(str, listed))
    if other := sorted((modes or {"mean, the default,"}) - {"lasttoken"}):
        raise ValueError(f"{path}: pooling {other[0]!r:.40} is not supported (only 'lasttoken')")
