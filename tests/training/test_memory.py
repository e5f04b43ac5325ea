"""--mini-batch-tokens auto: bytes per token against a count by hand, the number computed from them, free memory."""

import pytest
import torch
from conftest import bytes_kept

from ref.model.lora import apply_lora
from ref.model.packing import pack_sequences
from ref.model.pooling import embed
from ref.training import memory
from ref.training.grad_cache import GradientCache, PromptedTexts
from ref.training.memory import auto_mini_batch_tokens, bytes_per_token, free_bytes

CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(small_model):
    model = small_model()
    apply_lora(model, rank=4, alpha=8.0, dropout=0.1, target_modules=TARGETS)
    return model


def test_bytes_per_token_grow_with_the_depth_by_what_a_layer_keeps(small_model):
    """At least its inputs, q, k, v, attention output, gate, up and their product, in fp32; at most three times that."""
    found = {}
    for layers in (2, 3, 4):
        model = small_model(num_layers=layers)
        apply_lora(model, rank=4, alpha=8.0, dropout=0.0, target_modules=TARGETS)
        found[layers] = bytes_per_token(model, "chunked")
    config = model.config
    least = 4 * (2 * config.hidden_size + 2 * config.num_heads * config.head_dim
                 + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size)
    assert found[4] - found[3] == found[3] - found[2]
    assert least <= found[3] - found[2] <= 3 * least


def test_checkpointing_keeps_the_inputs_of_blocks_alone(model):
    plain = bytes_per_token(model, "chunked")
    model.gradient_checkpointing = True
    assert bytes_per_token(model, "chunked") < plain / 3


def test_measuring_changes_nothing(model):
    before, gradients = torch.get_rng_state(), [p.grad for p in model.parameters()]
    auto_mini_batch_tokens(model, "chunked")
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.grad for p in model.parameters()] == gradients == [None] * len(gradients)


@pytest.mark.parametrize(("free", "each", "tokens"), [
    (4e9, 1e6, 896), (4e9 + 1e8, 1e6, 1024), (24e9, 1.14e6, 5120), (1e8, 1e6, 256), (0, 1e6, 256)])
def test_a_quarter_of_a_cpus_free_memory_rounded_down(free, each, tokens, model, monkeypatch):
    """Gradients and moments of the adapters are subtracted; 256 tokens are the least, with advice."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "bytes_per_token", lambda *_: each)
    found, why = auto_mini_batch_tokens(model, "chunked")
    assert found == tokens
    assert f"{each / 1e6:.2f} MB per token, {free / 1e9:.1f} GB free" in why
    assert ("--gradient-checkpointing" in why) == (free < 1e9)


def test_free_memory_is_at_most_the_machines_and_shared_by_local_processes(monkeypatch):
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 8000)
    monkeypatch.setattr(memory, "_container_bytes", lambda: [3000])
    assert free_bytes(CPU) == 3000
    monkeypatch.setenv("WORLD_SIZE", "3")  # a launcher that does not say how many of them are here
    assert free_bytes(CPU) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(CPU) == 1500


def test_what_the_cgroups_of_a_container_leave(tmp_path):
    """Of all groups above the process; the cache of files is free, and a group without a limit says nothing."""
    (tmp_path / "cgroup").write_text("1:name=x:/other\n0::/slurm/job/step\n")
    for name, limit, used, cached in (("slurm/job", "9000", 5000, 2500), ("slurm", "20000", 19000, 9000),
                                      ("slurm/job/step", "max", 10, 5)):
        folder = tmp_path / "root" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 12\ninactive_file {cached}\n")
    assert memory._container_bytes(tmp_path / "root", tmp_path / "cgroup") == [6500, 10000]
    assert memory._container_bytes(tmp_path / "root", tmp_path / "none") == []


def test_what_the_cgroups_of_version_1_leave(tmp_path):
    """A container sees its own group as the root of the mount, under another path than the host's."""
    (tmp_path / "cgroup").write_text("4:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n")
    folder = tmp_path / "root/memory"
    folder.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "9000"), ("usage_in_bytes", "5000"), ("stat", "total_inactive_file 2500")):
        (folder / f"memory.{name}").write_text(f"{text}\n")
    assert memory._container_bytes(tmp_path / "root", tmp_path / "cgroup") == [6500]


@pytest.mark.parametrize(("prefix", "room"), [(0, 512), (700, 128)])
def test_copies_of_a_shared_prefix_count_as_tokens(prefix, room, model):
    """On a CPU the attention of each text keeps its own copy of the prefix's keys and values. A prefix longer than the
    mini-batch leaves a quarter of it.
    """
    each, texts = bytes_per_token(model, "chunked"), [[1, *range(5, 20), 2]] * 64
    cache = GradientCache(model, [PromptedTexts([7] * prefix, texts)], mini_batch_tokens=512, backend="chunked")
    assert not cache.fits
    larger = GradientCache(model, [PromptedTexts([7] * prefix, texts)], mini_batch_tokens=64 * 17 + 700)
    assert larger.fits == (prefix == 0)  # 64 texts and the prefix would fit without the copies
    shared = model.prefix_key_values(pack_sequences([[7] * prefix], device=CPU)) if prefix else None
    batches = [pack_sequences([texts[i] for i in indices], device=CPU, prefix_length=prefix)
               for indices in cache.groups[0].mini_batches]
    kept = [bytes_kept(lambda batch=batch: embed(model, batch, prefix=shared), model.parameters()) for batch in batches]
    assert 0.5 < max(kept) / (room * each) < 1.3


def test_free_memory_of_this_machine():
    assert 1e8 < free_bytes(CPU) < 1e14


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("mem_get_info"), (5, 9))[1])
    assert free_bytes(torch.device("cuda")) == 5 and calls == ["empty_cache", "mem_get_info"]
