"""Outputs: nothing of the user's is overwritten, two processes never write the same, nothing empty is left."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ref.utils.outputs import claim_output


def never() -> bool:
    return False


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def test_a_new_folder_is_created_and_removed_again_if_it_stays_empty(tmp_path):
    output = tmp_path / "a" / "run"
    with claim_output(output, inputs=[], is_ours=never) as folder:
        assert folder == output and list(folder.iterdir()) == []
    assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    for companions in (None, []):
        deep = tmp_path / "b/c/d/e"
        with pytest.raises(KeyError), claim_output(deep, inputs=[], is_ours=never, companions=companions):
            raise KeyError
        assert list(snapshot(tmp_path)) == ["b"]  # which was there
    with claim_output(deep, inputs=[], is_ours=never):
        (tmp_path / "b/c/mine").touch()
    assert list(snapshot(tmp_path)) == ["b", "b/c", "b/c/mine"]
    shutil.rmtree(tmp_path / "b")
    with claim_output(output, inputs=[], is_ours=never):
        (output / "x").touch()
    assert [path.name for path in output.iterdir()] == ["x"]


def test_an_empty_folder_of_the_user_is_taken_and_never_removed(tmp_path):
    with pytest.raises(KeyError), claim_output(tmp_path, inputs=[], is_ours=never):
        raise KeyError
    assert tmp_path.is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "model/config.json", ".hidden"])
def test_a_folder_with_anything_else_in_it_is_rejected_untouched(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="exists and was not written by this command; give a new name$"):
        claim_output(tmp_path, inputs=[], is_ours=never).__enter__()
    assert snapshot(tmp_path) == before
    with claim_output(tmp_path, inputs=[], is_ours=lambda: True):
        pass
    assert snapshot(tmp_path) == before


def test_a_file_with_the_name_of_the_lock_is_not_deleted(tmp_path):
    """A lock file is empty; one that a killed process left is used again."""
    (tmp_path / ".out.jsonl.lock").write_text("mine")
    with pytest.raises(ValueError, match=r"\.out\.jsonl\.lock exists and was not written by this command"):
        claim_output(tmp_path / "out.jsonl", inputs=[], companions=[], is_ours=never).__enter__()
    assert (tmp_path / ".out.jsonl.lock").read_text() == "mine"
    (tmp_path / ".out.jsonl.lock").write_text("")
    with claim_output(tmp_path / "out.jsonl", inputs=[], companions=[], is_ours=never):
        pass


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.png"])
def test_a_file_and_its_companions_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "other.txt").write_text("does not matter")
    companions = [tmp_path / "out.json", tmp_path / "out.png"]
    with pytest.raises(ValueError, match=f"{name} exists and was not written by this command"):
        claim_output(tmp_path / "out.jsonl", inputs=[], companions=companions, is_ours=never).__enter__()
    assert len(snapshot(tmp_path)) == 2
    (tmp_path / name).unlink()
    with claim_output(tmp_path / "out.jsonl", inputs=[], companions=companions, is_ours=never):
        pass
    assert len(snapshot(tmp_path)) == 1  # no lock file is left


def test_outputs_are_compared_with_inputs_through_links_and_folders(tmp_path):
    (tmp_path / "beir").mkdir()
    (tmp_path / "in.json").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.json")
    for output, companions, source in (
        ("in.jsonl", ["in.json"], "in.json"), ("link.jsonl", [], "in.json"), ("beir/queries.jsonl", [], "beir"),
        ("beir", None, "beir"), ("beir/a/b", None, "beir"),
    ):
        with pytest.raises(ValueError, match=r"must not be an input or lie in one \(got .*" + source):
            claim_output(tmp_path / output, inputs=[tmp_path / source], is_ours=lambda: True,
                         companions=None if companions is None else [tmp_path / n for n in companions]).__enter__()
    assert len(snapshot(tmp_path)) == 3


def test_default_names_get_a_number(tmp_path):
    names = []
    for _ in range(3):
        with claim_output(tmp_path / "run", inputs=[], is_ours=never, numbered=True) as folder:
            (folder / "x").touch()
            names.append(folder.name)
    assert names == ["run", "run-2", "run-3"]


@pytest.mark.parametrize("companions", [None, []])
def test_a_second_process_gets_one_line_and_the_first_is_not_disturbed(tmp_path, companions):
    """Also after the first was killed: the system releases its lock."""
    output = tmp_path / "out"
    code = f"""if True:
        import sys
        from pathlib import Path
        from ref.utils.outputs import claim_output
        with claim_output(Path({str(output)!r}), inputs=[], is_ours=lambda: False, companions={companions!r}):
            print("held", flush=True)
            sys.stdin.readline()
        """
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is writing it"):
        claim_output(output, inputs=[], is_ours=never, companions=companions).__enter__()
    process.kill()
    process.wait()
    with claim_output(output, inputs=[], is_ours=never, companions=companions):
        pass


def test_network_file_systems(tmp_path, monkeypatch, capsys):
    """NFS locks a file only if it is open for writing; some file systems have no locks, which is said."""
    def nfs(descriptor, operation):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_folder and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
    monkeypatch.setattr(fcntl, "flock", nfs)
    for companions in (None, []):
        with claim_output(tmp_path / f"nfs-{companions}", inputs=[], is_ours=never, companions=companions):
            assert capsys.readouterr().err == ""

    def without_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with claim_output(tmp_path / "out", inputs=[], is_ours=never):
        assert capsys.readouterr().err == (
            f"{tmp_path / 'out'}: cannot be locked (No locks available); start no other process with this output\n")


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=r"^--output .*: cannot be written \("):
            claim_output(output, inputs=[], is_ours=never).__enter__()
