"""What a checkpoint's files declare about its embeddings; all but causal last-token embedders are rejected by name.

    modules.json, N_Pooling/config.json    sentence-transformers: a transformer, last-token pooling, normalisation
    config.json beside an adapter          the model class that the adapter was trained with

config.json of a checkpoint itself is checked by ref.config.ModelConfig.
"""

from pathlib import Path

from ref.config import ModelConfig
from ref.utils.files import check_type, read_json, read_json_list

MODULES = ("Transformer", "Pooling", "Normalize")


def check_declared(folder: Path, *, is_adapter: bool) -> None:
    """Raise ValueError for a declared module, pooling or model class that this project would compute otherwise."""
    if is_adapter and (folder / "config.json").exists():
        ModelConfig.from_file(folder / "config.json")
    path = folder / "modules.json"
    if not path.exists():
        return
    for module in read_json_list(path):
        kind = str(check_type(module, dict, str(path), "a list of objects").get("type", "")).rpartition(".")[2]
        if kind not in MODULES:
            raise ValueError(f"{path}: module {kind!r:.60} is not supported (only {', '.join(MODULES)})")
        if kind == "Pooling":
            _check_pooling(folder / str(module.get("path", "")) / "config.json")


def _check_pooling(path: Path) -> None:
    if not path.exists():
        return
    values = read_json(path)
    modes = {key.removeprefix("pooling_mode_") for key, value in values.items()
             if key.startswith("pooling_mode_") and value is True}
    named = values.get("pooling_mode")  # the newer form: a name, or several joined by +
    modes |= set(named.split("+")) if isinstance(named, str) else set()
    if other := sorted(modes - {"lasttoken"}):
        raise ValueError(f"{path}: pooling {other[0]!r:.40} is not supported (only 'lasttoken')")
