"""ModelConfig: what config.json says about a checkpoint. TrainConfig: all options of a training run. Presets.

Every option of run_train.py is a field of `TrainConfig` with its default and help text; `--preset` changes some of the
defaults, and the command line overrides both (ref/training/arguments.py). docs/method.md says of each default whether
it is published, taken from the closest lineage, or our own choice.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ref.utils.device import DTYPES, Backend, Dtype
from ref.utils.files import check_type, read_json

MISTRAL = "mistralai/Mistral-7B-v0.1"


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that the forward pass needs; the defaults are Mistral-7B-v0.1.

    Llama has the same forward pass without a sliding window, if it has no biases and default RoPE.
    """

    model_type: str = "mistral"  # or "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096  # tokens that a token attends to, itself included; None: no window
    dtype: str = "bfloat16"  # of the stored tensors
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    max_positions: int = 32768  # declared in config.json; the forward pass has no limit

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read a transformers config.json in either form (rope_theta, torch_dtype; or rope_parameters, dtype).

        Raises ValueError for another architecture, biases, scaled RoPE, a quantised checkpoint, or a missing or invalid
        field.
        """
        values = read_json(path)
        model_type = _model_type(values, path)

        def integer(name: str, default: int | None = None) -> int:
            value: Any = default if values.get(name) is None else values[name]
            if check_type(value, int, f"{path}: {name!r}", "an integer >= 1") < 1:
                raise ValueError(f"{path}: {name!r} must be an integer >= 1 (got {value})")
            return int(value)

        num_heads, hidden_size = integer("num_attention_heads"), integer("hidden_size")
        kv_default = 8 if model_type == "mistral" and "num_key_value_heads" not in values else num_heads
        # an absent field has transformers' default, null means no window; Llama has none
        window = values.get("sliding_window", 4096) if model_type == "mistral" else None
        config = cls(
            model_type=model_type,
            vocab_size=integer("vocab_size"), hidden_size=hidden_size, num_layers=integer("num_hidden_layers"),
            num_heads=num_heads, num_kv_heads=integer("num_key_value_heads", kv_default),
            head_dim=integer("head_dim", max(1, hidden_size // num_heads)),
            intermediate_size=integer("intermediate_size"),
            norm_eps=_positive(values.get("rms_norm_eps", 1e-6), f"{path}: 'rms_norm_eps'"),
            rope_theta=_rope_theta(values, path),
            sliding_window=None if window is None else integer("sliding_window", 4096),
            dtype=_stored_dtype(values, path),
            bos_token_id=_token_id(values, "bos_token_id", path), eos_token_id=_token_id(values, "eos_token_id", path),
            max_positions=integer("max_position_embeddings", 32768),
        )
        if config.num_heads % config.num_kv_heads:
            raise ValueError(f"{path}: 'num_attention_heads' must be a multiple of 'num_key_value_heads' "
                             f"(got {config.num_heads} and {config.num_kv_heads})")
        if config.head_dim % 2:
            raise ValueError(f"{path}: 'head_dim' must be even (got {config.head_dim})")
        return config

    @property
    def num_parameters(self) -> int:
        """Weights of the transformer without a language-model head."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads  # of q and o, k and v
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size + 2)
        return self.hidden_size * (self.vocab_size + 1) + self.num_layers * layer

    def to_json(self) -> dict[str, Any]:
        """The same as a config.json that transformers 4 and 5 read, class MistralModel or LlamaModel."""
        values = {
            "architectures": [f"{self.model_type.capitalize()}Model"], "model_type": self.model_type,
            "hidden_act": "silu", "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size, "rms_norm_eps": self.norm_eps, "rope_theta": self.rope_theta,
            "torch_dtype": self.dtype, "max_position_embeddings": self.max_positions, "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id, "tie_word_embeddings": False,
            "initializer_range": 0.02,  # unused, but text-embeddings-inference does not start without it
        }
        return {**values, **({"sliding_window": self.sliding_window} if self.model_type == "mistral" else {})}


ARCHITECTURES = ("MistralModel", "MistralForCausalLM", "LlamaModel", "LlamaForCausalLM")
# What the forward pass computes: for each field of config.json its only supported value.
PLAIN_TRANSFORMER = {"hidden_act": "silu", "quantization_config": None, "attention_bias": False, "mlp_bias": False,
                     "partial_rotary_factor": 1.0, "is_causal": True, "use_bidirectional_attention": False,
                     "auto_map": None}

# The built-in model `tiny`: has every mechanism of the large one and trains in a minute on a CPU.
TINY = ModelConfig(vocab_size=4096, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
                   intermediate_size=352)


def _model_type(values: dict[str, Any], path: Path) -> str:
    """mistral or llama. Raises ValueError for any other architecture and for options that change the forward pass."""
    names = check_type(values.get("architectures") or [], list, f"{path}: 'architectures'", "a list")
    model_type = values.get("model_type") or ("llama" if names and str(names[0]).startswith("Llama") else "mistral")
    if model_type not in ("mistral", "llama"):
        raise ValueError(f"{path}: model_type {model_type!r:.80} is not supported (only 'mistral', 'llama')")
    classes = [name for name in ARCHITECTURES if name.lower().startswith(model_type)]
    for name in names:
        if name not in classes:
            raise ValueError(f"{path}: architecture {name!r:.80} is not supported (only {', '.join(classes)})")
    for key, supported in PLAIN_TRANSFORMER.items():
        if values.get(key) not in (None, supported):
            raise ValueError(f"{path}: {key} {values[key]!r:.80} is not supported (only {supported!r})")
    return str(model_type)


def _token_id(values: dict[str, Any], name: str, path: Path) -> int | None:
    """A token id, the first of a list, or None."""
    value = values.get(name)
    value = value[0] if isinstance(value, list) and value else value
    return None if value is None else int(check_type(value, int, f"{path}: {name!r}", "a token id"))


def _positive(value: Any, what: str) -> float:
    number = float(check_type(value, (int, float), what, "a number > 0"))
    if not 0 < number < float("inf"):
        raise ValueError(f"{what} must be a finite number > 0 (got {value!r})")
    return number


def _rope_theta(values: dict[str, Any], path: Path) -> float:
    """rope_theta, at the top level or in transformers 5's rope_parameters; scaled variants are rejected."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = check_type(values.get(name) or {}, dict, f"{path}: {name!r}", "an object") or rope
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{path}: {name}: rope_type {kind!r:.80} is not supported (only 'default')")
    theta = next((each["rope_theta"] for each in (rope, values) if each.get("rope_theta") is not None), 10000.0)
    return _positive(theta, f"{path}: 'rope_theta'")


def _stored_dtype(values: dict[str, Any], path: Path) -> str:
    name = values.get("dtype", values.get("torch_dtype")) or "float32"
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{path}: 'dtype' must be one of {', '.join(DTYPES)} (got {name!r:.80})")
    return name


# ---- training ----------------------------------------------------------------------------------------------

LENGTHS = ("epochs", "steps", "minutes")  # options that set the length of a run; one of them

PRESETS: dict[str, dict[str, Any]] = {
    # The paper and its closest lineage: the defaults of TrainConfig.
    "paper": {},
    # For randomly initialised models of about a million parameters; how it was chosen: benchmarks/RECORDS.md.
    "small": {
        "batch_size": 64, "batch_size_symmetric": 64, "num_negatives": 4, "in_batch_negatives": "all",
        "temperature": 0.05, "teacher_temperature": 0.05, "learning_rate": 2e-3, "lr_scheduler": "cosine",
        "weight_decay": 0.3, "max_examples": 0, "max_text_tokens": 96, "epochs": 24, "mini_batch_tokens": 32768,
    },
    # For pretrained models below a billion parameters, such as SmolLM2-135M, and an hour on a laptop; compared on a
    # held-out part of the training data: benchmarks/RECORDS.md.
    "small-pretrained": {
        "lora_rank": 16, "lora_alpha": 32.0, "batch_size": 32, "batch_size_symmetric": 32, "num_negatives": 2,
        "in_batch_negatives": "all", "temperature": 0.02, "teacher_temperature": 0.05, "learning_rate": 2e-3,
        "lr_scheduler": "cosine", "max_examples": 0, "max_text_tokens": 256,
    },
}


def _option(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text, and limits that __post_init__ checks: least (>=), above (>), below (<)."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """All options that a training run depends on; written to run.json."""

    data: list[str] = _option(["data/soft_labels.jsonl"], "JSONL files with soft labels", group="input")
    model: str | None = _option(None, "tiny, a folder, a hub id, or a config.json for random initialisation "
                                "(default: Mistral-7B-v0.1 on a GPU, else tiny)")
    preset: str | None = _option(None, "paper, small or small-pretrained (default: small for random initialisation, "
                                 "small-pretrained for a checkpoint below one billion parameters, else paper)")
    instruction: str | None = _option(None, "task instruction for lines without a prompt; none: no instruction")
    eval_data: str | None = _option(None, "folder of retrieval sets, scored before and after training; "
                                    "none: no scoring (default: held_out/ beside the first data file, if it has some)")
    eval_steps: int | None = _option(None, "steps between scorings of these sets during training (default: none)",
                                     least=1)
    keep_best: bool = _option(False, "the result is the state with the best held-out score, not the last one; with "
                              "--eval-steps")
    output: str | None = _option(None, "run folder (default: runs/MODEL-TIME)")
    resume: bool = _option(False, "continue the run in --output from its last saved state; with a larger --steps, "
                           "--epochs or --minutes extend a complete run")

    train: Literal["lora", "all"] | None = _option(
        None, "trainable parameters (default: all for random initialisation, lora for a checkpoint)", group="model")
    lora_rank: int = _option(64, "rank of the adapter", least=1)
    lora_alpha: float = _option(32.0, "the adapter is scaled by alpha / rank", above=0)
    lora_dropout: float = _option(0.0, "dropout before the adapter", least=0, below=1)
    lora_target_modules: list[str] = _option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linear layers to adapt")
    lowercase: bool = _option(True, "the vocabulary trained for random initialisation ignores case")
    merge: bool = _option(False, "also write the merged model, for sentence-transformers and transformers")

    template: str = _option("paper", "prompt template, a key of TEMPLATES in ref/text/prompts.py", group="text")
    max_text_tokens: int = _option(512, "tokens of a text", least=1)
    max_prompt_tokens: int = _option(2048, "tokens of examples, instruction and query together", least=4)
    max_example_tokens: int = _option(256, "tokens of an in-context example's query, and of its response", least=1)
    max_examples: int = _option(5, "in-context examples: each batch, or each query, draws 0 to this many", least=0)
    examples_per: Literal["batch", "query"] = _option(
        "batch", "draw in-context examples once per batch or for each query")

    batch_size: int = _option(512, "queries per step, for tasks with in-batch negatives", group="batch", least=1)
    batch_size_symmetric: int = _option(256, "queries per step, for tasks without in-batch negatives", least=1)
    num_negatives: int = _option(7, "hard negatives per query, at most", least=0)
    in_batch_negatives: Literal["by-type", "all", "none"] = _option(
        "by-type", "tasks whose queries use the other passages of the batch as negatives")
    mini_batch_tokens: int | Literal["auto"] = _option(
        "auto", "tokens per forward and backward pass; auto: as many as there is memory for", least=1)
    gradient_checkpointing: bool = _option(
        False, "keep only the inputs of blocks and recompute the rest in backward: a third to a half more computation, "
        "for GPUs with little memory; lower --mini-batch-tokens first")
    compile: bool = _option(
        False, "compile the blocks on a CPU too, as always on cuda: faster steps in bfloat16, after a minute of "
        "compiling; needs a C++ compiler")

    temperature: float = _option(0.02, "temperature of the scores", group="loss", above=0)
    teacher_temperature: float = _option(
        0.05, "temperature of the soft labels: 0.05 suits cosines, 1 a reranker's logits", above=0)
    soft_label_weight: float = _option(1.0, "weight of the soft-label term", least=0)
    contrastive_weight: float = _option(1.0, "weight of the contrastive term; 0: soft labels alone", least=0)
    false_negative_margin: float | None = _option(
        0.1, "in-batch passages more similar than the positive by more than this are masked; none: no masking")

    learning_rate: float = _option(1e-4, "peak learning rate of AdamW", group="optimiser", above=0)
    lr_scheduler: Literal["linear", "cosine"] = _option("linear", "decay to zero after the warm-up")
    warmup_ratio: float = _option(0.1, "share of the steps for linear warm-up", least=0, below=1)
    weight_decay: float = _option(0.0, "decoupled weight decay", least=0)
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm", above=0)
    epochs: float = _option(1.0, "passes over the data", above=0)
    steps: int | None = _option(None, "steps instead of epochs", least=1)
    minutes: float | None = _option(None, "minutes of training instead of epochs", above=0)
    seed: int = _option(0, "random seed; equal seeds give equal results (bit for bit on a CPU with equal threads)",
                        least=0, below=2**31)
    save_steps: int = _option(500, "steps between saved states", least=1)
    save_total_limit: int = _option(2, "saved states to keep", least=1)
    distributed_timeout: float = _option(600.0, "seconds that a rank waits for another", above=0, below=1e9)
    device: str | None = _option(None, "cpu or cuda (default: cuda if available)")
    dtype: Dtype = _option("auto", "precision of the forward pass; auto: bfloat16 on a GPU that has it and on a CPU "
                           "that is faster in it, but float32 there for --train all and for several processes")
    backend: Backend | None = _option(
        None, "implementation of pooling and loss (default: triton on cuda, chunked on cpu)")

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range and for options that exclude each other."""
        for item in dataclasses.fields(self):
            value, limits = getattr(self, item.name), item.metadata
            if value is None or isinstance(value, (str, bool, list)):
                continue
            least, above, below = limits.get("least"), limits.get("above"), limits.get("below")
            if not value < float("inf") or (least is not None and value < least) or (
                    above is not None and value <= above) or (below is not None and value >= below):
                raise ValueError(f"--{item.name.replace('_', '-')} must be {_range(limits)} (got {value})")
        if self.max_text_tokens > self.max_prompt_tokens - 2:
            raise ValueError("--max-prompt-tokens must be at least --max-text-tokens + 2 "
                             f"(got {self.max_prompt_tokens} and {self.max_text_tokens})")
        if self.soft_label_weight == self.contrastive_weight == 0:
            raise ValueError("--soft-label-weight and --contrastive-weight are both 0; one must be > 0")
        if self.keep_best and self.eval_steps is None:
            raise ValueError("--keep-best needs --eval-steps, which says how often the held-out sets are scored")
        if self.steps is not None and self.minutes is not None:
            raise ValueError("--steps and --minutes exclude each other; give one")


def _range(limits: Any) -> str:
    bounds = [f"{sign} {limits[key]}" for key, sign in (("least", ">="), ("above", ">"), ("below", "<"))
              if key in limits]
    return f"a finite number{' ' if bounds else ''}{' and '.join(bounds)}"
