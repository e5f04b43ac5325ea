"""The command line of run_train.py: one flag for each field of TrainConfig, by its type and metadata."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from ref.config import LENGTHS, PRESETS, TrainConfig
from ref.training.model_source import ModelSource


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options that were given; those not given are absent. `train_config` adds preset and defaults.

    Raises ValueError for two lengths of the run.
    """
    parser = argparse.ArgumentParser(
        description="Train an LLM text embedder from soft labels. The defaults below are those of --preset paper; "
        "--preset changes some (docs/training.md).",
        argument_default=argparse.SUPPRESS)
    group: Any = parser
    for item in dataclasses.fields(TrainConfig):
        if "group" in item.metadata:
            group = parser.add_argument_group(item.metadata["group"])
        group.add_argument("--" + item.name.replace("_", "-"), **_argument(item))
    given = parser.parse_args(arguments)
    ends = [flag for flag in LENGTHS if getattr(given, flag, None) is not None]
    if len(ends) > 1:
        raise ValueError(f"{' and '.join(f'--{flag}' for flag in ends)} exclude each other; give one")
    return given


def train_config(given: argparse.Namespace, source: ModelSource) -> TrainConfig:
    """Defaults, overridden by the preset, overridden by the given options."""
    name = getattr(given, "preset", None) or source.default_preset()
    if name not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)} (got {name!r})")
    train = "lora" if source.config is None else "all"
    config = TrainConfig(**{**PRESETS[name], "train": train, **vars(given), "preset": name})
    if not getattr(given, "resume", False):
        _check_used(given, config, source)
    return config


def _check_used(given: argparse.Namespace, config: TrainConfig, source: ModelSource) -> None:
    """Raise ValueError for a given option that the run would not use."""
    for flag in vars(given):
        if config.train == "all" and (flag.startswith("lora_") or (flag == "merge" and given.merge)):
            raise ValueError(f"--{flag.replace('_', '-')} is for --train lora (this run has --train all)")
        if flag in ("examples_per", "max_example_tokens") and not config.max_examples:
            raise ValueError(f"--{flag.replace('_', '-')} is for --max-examples above 0 (got {getattr(given, flag)})")
        if flag == "false_negative_margin" and config.in_batch_negatives == "none":
            raise ValueError("--false-negative-margin is for in-batch negatives (this run has --in-batch-negatives "
                             "none)")
        if flag == "lowercase" and source.config is None:
            raise ValueError(f"--lowercase is for random initialisation ({source.name} has a tokenizer)")


def _argument(item: "dataclasses.Field[Any]") -> dict[str, Any]:
    """argparse's keywords for one field: type, choices, and the default in the help text."""
    default = getattr(TrainConfig(), item.name)
    shown = "" if default is None else f" (default: {' '.join(default) if isinstance(default, list) else default})"
    keywords: dict[str, Any] = {"help": (item.metadata["help"] + shown).replace("%", "%%")}
    kinds = [kind for kind in (get_args(item.type) or (item.type,)) if kind is not type(None)]
    if kinds[0] is bool:
        return {**keywords, "action": argparse.BooleanOptionalAction}
    if get_origin(item.type) is list:
        return {**keywords, "nargs": "+", "type": str, "action": "extend"}
    if get_origin(kinds[0]) is Literal:
        return {**keywords, "choices": get_args(kinds[0])}
    if isinstance(kinds[0], str):
        return {**keywords, "choices": kinds}
    words = {word: word for other in kinds[1:] for word in get_args(other)}
    words |= {"none": None} if type(None) in get_args(item.type) and kinds[0] is not str else {}
    return {**keywords, "type": _or_word(kinds[0], words) if words else kinds[0]}


def _or_word(kind: type, words: dict[str, Any]) -> Any:
    """A converter that also accepts some words."""
    def convert(text: str) -> Any:
        return words[text] if text in words else kind(text)
    convert.__name__ = kind.__name__
    return convert
