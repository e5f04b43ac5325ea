"""What a checkpoint is (Architecture, read from its config.json) and what a run does (Options, the command line).

Every option of run_train.py is one field of `Options`, with its default and its help; `--preset` lays a named set of
values over the defaults, and what the command line says goes over both. The README says of each default
that shapes the result whether it is published, taken from the lineage, or our own choice.
"""

import argparse
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

import torch

MISTRAL = "mistralai/Mistral-7B-v0.1"
DTYPES = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32})
Kernels = Literal["eager", "blocked", "triton"]  # who computes pooling and loss; see loss.py


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError that names the file and the line if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Give a folder that holds it.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{where}: not valid JSON ({error}). Fetch or write the file again.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). Check its kind and its rights.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}. Expected is one JSON object {{…}}.")
    return value


def checked(value: Any, kind: type | tuple[type, ...], what: str, expected: str) -> Any:
    """`value` if it is of that kind (a bool is no number), else a ValueError: "`what` is …; expected is …"."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{what} is {value!r:.80}. Expected is {expected}. Correct it there.")
    return value


@dataclass(frozen=True)
class Architecture:
    """The numbers of config.json that the forward pass needs; defaults are Mistral-7B-v0.1."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    ffn_width: int = 14336
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    window_keys: int | None = 4096  # keys a query sees, itself included; None: all before it
    dtype: str = "bfloat16"  # of the stored tensors

    @classmethod
    def from_file(cls, path: Path) -> "Architecture":
        """Read a transformers config.json in either form (rope_theta, torch_dtype; or rope_parameters, dtype).

        Raises ValueError for another architecture, a scaled RoPE, a quantised checkpoint, or a number that
        is missing or of the wrong kind.
        """
        config = read_json(path)
        _refuse_other_models(config, path)

        def number(name: str, default: int | None = None) -> int:
            value: Any = default if config.get(name) is None else config[name]
            if checked(value, int, f"{path}: {name}", "a whole number of at least 1") < 1:
                raise ValueError(f"{path}: {name} is {value}. Expected is at least 1. Correct it there.")
            return int(value)

        heads, width = number("num_attention_heads"), number("hidden_size")
        window = config.get("sliding_window", 4096)  # where a key is absent, transformers' default counts; null is none
        arch = cls(
            vocab_size=number("vocab_size"), width=width, layers=number("num_hidden_layers"), heads=heads,
            kv_heads=number("num_key_value_heads", heads if "num_key_value_heads" in config else 8),
            head_width=number("head_dim", max(1, width // heads)), ffn_width=number("intermediate_size"),
            norm_eps=_positive(config.get("rms_norm_eps", 1e-6), f"{path}: rms_norm_eps"),
            rope_base=_rope_base(config, path),
            window_keys=None if window is None else number("sliding_window", 4096),
            dtype=_stored_dtype(config, path),
        )
        if arch.heads % arch.kv_heads or arch.head_width % 2:
            raise ValueError(
                f"{path}: {arch.heads} heads, {arch.kv_heads} key/value heads, head_dim {arch.head_width}. Expected "
                "are heads divisible by key/value heads and an even head_dim. Correct it there.")
        return arch

    def to_json(self) -> dict[str, Any]:
        """The same as a config.json that transformers 4 and 5 read, class MistralModel."""
        return {
            "architectures": ["MistralModel"], "model_type": "mistral", "hidden_act": "silu",
            "vocab_size": self.vocab_size, "hidden_size": self.width, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_width, "intermediate_size": self.ffn_width, "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base, "sliding_window": self.window_keys, "torch_dtype": self.dtype,
            "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        }


# The built-in model `tiny`: seconds on a CPU, with every mechanism of the large one.
TINY = Architecture(vocab_size=4096, width=128, layers=2, heads=4, kv_heads=2, head_width=32, ffn_width=352)


def _refuse_other_models(config: dict[str, Any], path: Path) -> None:
    names = checked(config.get("architectures") or ["MistralModel"], list, f"{path}: architectures", "a list of names")
    for name in names:
        if name not in ("MistralModel", "MistralForCausalLM"):
            raise ValueError(
                f"{path}: architecture {name!r}. Expected is MistralModel or MistralForCausalLM. "
                "Choose a Mistral checkpoint.")
    for key, accepted in (("model_type", "mistral"), ("hidden_act", "silu"), ("quantization_config", None)):
        if config.get(key, accepted) != accepted:
            raise ValueError(
                f"{path}: {key} is {config[key]!r:.80}. Expected is {accepted!r}. Choose a plain Mistral checkpoint.")


def _positive(value: Any, what: str) -> float:
    number = float(checked(value, (int, float), what, "a number above 0"))
    if not 0 < number < float("inf"):
        raise ValueError(f"{what} is {value!r}. Expected is a finite number above 0. Correct it there.")
    return number


def _rope_base(config: dict[str, Any], path: Path) -> float:
    """rope_theta, from the top level or from transformers 5's rope_parameters; scaled variants are refused."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = checked(given, dict, f"{path}: rope_parameters", "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: RoPE of type {kind!r:.80}. Expected is 'default'. "
                         "Choose a checkpoint without RoPE scaling.")
    return _positive(rope.get("rope_theta", config.get("rope_theta", 10000.0)), f"{path}: rope_theta")


def _stored_dtype(config: dict[str, Any], path: Path) -> str:
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{path}: dtype is {name!r:.80}. Expected is one of {', '.join(DTYPES)}. "
                         "Choose another checkpoint.")
    return name


def pick_kernels(name: Kernels | None, device: torch.device) -> Kernels:
    """Who computes pooling and loss: the one named, else triton on cuda, blocked on cpu. Never another in silence."""
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--kernels triton needs an NVIDIA GPU, or TRITON_INTERPRET=1 for its interpreter. "
                         "Use --kernels blocked.")
    return name or ("triton" if device.type == "cuda" else "blocked")


def pick_device(name: str | None = None) -> torch.device:
    """The device to run on: the one named, else cuda where there is one, else cpu; mps is refused."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{torch.cuda.current_device()}"  # of several processes each has its own
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: its attention is untested. Expected is cpu or cuda. "
                         "Use --device cpu.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no CUDA GPU. Use --device cpu, "
                         "or install a CUDA build of torch.")
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton starts its kernels
    return device


# ------------------------------------------------------------------------------------------------- options

PRESETS: dict[str, dict[str, Any]] = {
    # What the report and its closest lineage say, see the README's table: the defaults of `Options` themselves.
    "report": {},
    # What a small model with fresh weights wants: a larger rate and decay, smaller batches, a softer temperature.
    "small": {
        "queries": 64, "queries_symmetric": 64, "negatives": 4, "in_batch": "all", "temperature": 0.05,
        "teacher_temperature": 0.05, "learning_rate": 2e-3, "schedule": "cosine", "weight_decay": 0.3,
        "max_examples": 0, "max_text_tokens": 96, "epochs": 24, "chunk_tokens": 32768,
    },
}


def _option(default: Any, text: str, **more: Any) -> Any:
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text, **more})


@dataclass(frozen=True)
class Options:
    """All that a training run depends on; written to run.json. Rates, shares and temperatures have no unit."""

    data: list[str] = _option(["data/soft_labels.jsonl"], "JSONL files with soft labels", group="input")
    model: str | None = _option(None, "tiny, a folder, a hub id, or a config.json for fresh weights "
                                "(default: Mistral-7B-v0.1 where there is a GPU, else tiny)")
    preset: str | None = _option(None, "report or small (default: small for fresh weights, else report)")
    instruction: str | None = _option(None, "task instruction for lines without a prompt")
    held_out: str | None = _option(None, "folder of retrieval sets, scored before and after "
                                   "(default: held_out/ beside the first data file, if there is one)")
    output: str | None = _option(None, "run folder (default: runs/NAME)")
    resume: bool = _option(False, "go on with the run in --output from its last saved step")

    train: Literal["lora", "all"] | None = _option(
        None, "which weights learn (default: all for fresh weights, lora for a checkpoint)", group="model")
    lora_rank: int = _option(64, "rank of the adapter", least=1)
    lora_alpha: float = _option(32.0, "the adapter is scaled by alpha / rank", above=0)
    lora_dropout: float = _option(0.0, "dropout before the adapter", least=0, below=1)
    lora_targets: list[str] = _option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linear layers to adapt")
    lowercase: bool = _option(True, "the vocabulary trained for fresh weights ignores case")
    merge: bool = _option(False, "also write the merged model, for sentence-transformers and transformers")

    template: str = _option("report", "prompt template: report or bge-en-icl", group="text")
    max_text_tokens: int = _option(512, "tokens of a text", least=1)
    max_prompt_tokens: int = _option(2048, "tokens of examples, instruction and query together", least=4)
    max_example_tokens: int = _option(256, "tokens of an example's query, and of its response", least=1)
    max_examples: int = _option(5, "each batch draws 0 to this many examples", least=0)
    examples_per: Literal["batch", "query"] = _option("batch", "one draw of examples for the batch or for each query")

    queries: int = _option(512, "queries of a batch with in-batch negatives", group="batch", least=1)
    queries_symmetric: int = _option(256, "queries of a batch without in-batch negatives", least=1)
    negatives: int = _option(7, "hard negatives of a query, at most", least=0)
    in_batch: Literal["by-type", "all", "none"] = _option("by-type", "who sees the batch's other passages as negatives")
    order: Literal["mixed", "sts-first"] = _option("mixed", "order of the batches within an epoch")
    chunk_tokens: int = _option(16384, "tokens that pass with a graph at a time; 3 MB each for 7B", least=1)

    checkpointing: bool = _option(
        False, "keep only the blocks' inputs and compute the blocks again in backward: a third more work, for small "
        "cards; lower --chunk-tokens first")

    temperature: float = _option(0.02, "tau of the scores", group="loss", above=0)
    teacher_temperature: float = _option(
        0.05, "T of the soft labels: 0.05 suits cosines, 1 a reranker's logits", above=0)
    soft_weight: float = _option(1.0, "weight of the soft-label term", least=0)
    hard_weight: float = _option(1.0, "weight of the contrastive term; 0: soft labels alone", least=0)
    false_negative_margin: float | None = _option(
        0.1, "a passage closer than the positive by more than this is no negative; none: never masked")

    learning_rate: float = _option(1e-4, "peak rate of AdamW", group="optimiser", above=0)
    schedule: Literal["linear", "cosine"] = _option("linear", "decay to zero after the warm-up")
    warmup: float = _option(0.1, "share of the steps that warm up", least=0, below=1)
    weight_decay: float = _option(0.0, "decoupled weight decay", least=0)
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm", above=0)
    epochs: float = _option(1.0, "passes over the data", above=0)
    steps: int | None = _option(None, "steps instead of epochs", least=1)
    minutes: float | None = _option(None, "minutes of training instead of epochs", above=0)
    seed: int = _option(0, "same seed, same result (bit for bit on a CPU with as many threads)", least=0, below=2**31)
    save_every: int = _option(500, "steps between saved states", least=1)
    keep: int = _option(2, "saved states that stay", least=1)
    peer_timeout: float = _option(600.0, "seconds that a process waits for another before it gives up", above=0)
    device: str | None = _option(None, "cpu or cuda (default: cuda where there is one)")
    dtype: Literal["bfloat16", "float32"] | None = _option(
        None, "precision of the forward pass (default: bfloat16 on cuda, float32 on cpu)")
    kernels: Kernels | None = _option(
        None, "who computes pooling and loss: the plain pages, blocks in torch, or Triton "
        "(default: triton on cuda, blocked on cpu)")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, limits = getattr(self, item.name), item.metadata
            if value is None or isinstance(value, (str, bool, list)):
                continue
            least, above, below = limits.get("least"), limits.get("above"), limits.get("below")
            if not value < float("inf") or (least is not None and value < least) or (
                    above is not None and value <= above) or (below is not None and value >= below):
                raise ValueError(f"--{item.name.replace('_', '-')} is {value}. {_range(limits)} Give another value.")
        if self.max_text_tokens > self.max_prompt_tokens - 2:
            raise ValueError(f"--max-text-tokens is {self.max_text_tokens} and --max-prompt-tokens "
                             f"{self.max_prompt_tokens}: a text of that length, <s> and </s> do not fit. Expected is "
                             "a longer prompt, or a shorter text. Change one of them.")
        if self.soft_weight == self.hard_weight == 0:
            raise ValueError("--soft-weight and --hard-weight are both 0: nothing is learnt. Give one of them above 0.")
        if self.steps is not None and self.minutes is not None:
            raise ValueError("--steps and --minutes are both given. Expected is one end of the run. Leave one out.")


def _range(limits: Any) -> str:
    words = [f"{word} {limits[key]}" for key, word in
             (("least", "at least"), ("above", "above"), ("below", "below")) if key in limits]
    return f"Expected is a finite number{' ' if words else ''}{' and '.join(words)}."


class OptionParser(argparse.ArgumentParser):
    """A parser with one flag for each field of `Options`; what was not given stays out of the namespace."""

    def __init__(self) -> None:
        super().__init__(description="Train an LLM text embedder from soft labels. The defaults below are those of "
                         "--preset report; --preset small, which fresh weights get, changes some (README, Presets).",
                         argument_default=argparse.SUPPRESS)
        group: Any = self
        for item in dataclasses.fields(Options):
            if "group" in item.metadata:
                group = self.add_argument_group(item.metadata["group"])
            group.add_argument("--" + item.name.replace("_", "-"), **_argument(item))

    @staticmethod
    def options(given: argparse.Namespace, *, fresh_weights: bool) -> Options:
        """Defaults, under the preset, under what the command line gave."""
        name = getattr(given, "preset", None) or ("small" if fresh_weights else "report")
        if name not in PRESETS:
            raise ValueError(f"--preset {name!r} is unknown. Expected is one of {', '.join(PRESETS)}. Choose one.")
        return Options(**{**PRESETS[name], "train": "all" if fresh_weights else "lora", **vars(given), "preset": name})


def _argument(item: "dataclasses.Field[Any]") -> dict[str, Any]:
    """argparse's words for one field: its type, its choices, its default in the help."""
    default = getattr(Options(), item.name)
    shown = "" if default is None else f" (default: {' '.join(default) if isinstance(default, list) else default})"
    words: dict[str, Any] = {"help": (item.metadata["help"] + shown).replace("%", "%%")}
    kinds = [k for k in (get_args(item.type) or (item.type,)) if k is not type(None)]
    if kinds[0] is bool:
        return {**words, "action": argparse.BooleanOptionalAction}
    if get_origin(item.type) is list:
        return {**words, "nargs": "+", "type": str}
    if get_origin(kinds[0]) is Literal:
        return {**words, "choices": get_args(kinds[0])}
    if isinstance(kinds[0], str):
        return {**words, "choices": kinds}
    return {**words, "type": _or_none(kinds[0]) if type(None) in get_args(item.type) else kinds[0]}


def _or_none(kind: type) -> Any:
    def convert(text: str) -> Any:
        return None if text == "none" else kind(text)
    convert.__name__ = kind.__name__
    return convert
