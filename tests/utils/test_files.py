"""JSON and JSONL readers, type checks, atomic writes, hashes."""

import gzip
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import save_file

from ref.utils import files
from ref.utils.files import (
    MAX_TEXT_CHARS,
    atomic_write,
    check_text,
    check_type,
    hash_file,
    hash_files,
    read_json,
    read_jsonl,
    remove_drafts,
    remove_path,
    write_json,
)

BROKEN = [
    (b"", "invalid JSON (Expecting value, column 1)"), (b"[1]", "must be a JSON object (got list)"),
    (b"null", "must be a JSON object (got NoneType)"), (b"\xff{}", "not UTF-8 (byte 0)"),
    (b'{"a": 1,}', "invalid JSON ("), (b"[" * 100_000, "invalid JSON (maximum recursion depth"),
    (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON (Exceeds"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_broken_json_names_the_file(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: ") as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_syntax_error_names_the_line_of_a_json_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(ValueError, match=rf"^{path}: invalid JSON \(Expecting ':' delimiter, line 2 column 6\)$"):
        read_json(path)


@pytest.mark.parametrize("read", [read_json, lambda path: list(read_jsonl(path))])
def test_a_missing_file_and_a_folder(read, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'no'}: file does not exist$"):
        read(tmp_path / "no")
    with pytest.raises(ValueError, match=f"^{tmp_path}: (cannot be read .Is a directory|must be a file)"):
        read(tmp_path)


def test_lines_with_place_offset_and_bytes(tmp_path):
    """Blank lines are skipped and counted; other line ends and a missing last one are fine."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": "\xc3\xa9"}\r\n{"a": 3}')
    lines = list(read_jsonl(path))
    assert [line.value["a"] for line in lines] == [1, "é", 3]
    assert [line.where for line in lines] == [f"{path}:{n}" for n in (1, 4, 5)]
    content = path.read_bytes()
    assert all(content[line.offset :].startswith(line.raw) for line in lines)


@pytest.mark.parametrize("line", ["{", "3", '{"a": 1} {"b": 2}', '["a"]'])
def test_a_broken_line_names_file_and_line(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
    lines = read_jsonl(path)
    assert next(lines).value == {"a": 1}
    with pytest.raises(ValueError, match=f"^{path}:3: "):
        next(lines)


@pytest.mark.parametrize(("value", "kind", "good"), [
    (3, int, True), (True, int, False), (3.0, int, False), (3, (int, float), True), (True, bool, True),
    ("3", int, False), (None, str, False), ([], list, True)])
def test_check_type(value, kind, good):
    if good:
        assert check_type(value, kind, "x.json: 'a'", "a thing") is value
    else:
        with pytest.raises(ValueError, match=r"^x\.json: 'a' must be a thing \(got ") as caught:
            check_type(value, kind, "x.json: 'a'", "a thing")
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("value", "message"), [
    (3, "'a' must be a non-empty string (got 3)"), ("", "'a' must be a non-empty string (got '')"),
    (" \n", "'a' must be a non-empty string (got ' \\n')"), ("x\ud800", "'a' has an unpaired surrogate at character 1"),
    ("x" * (MAX_TEXT_CHARS + 1), "'a' must have at most 1,000,000 characters (got 1,000,001)")])
def test_check_text(value, message):
    assert check_text(" a text ", "'a'") == " a text "
    with pytest.raises(ValueError, match="^'a' ") as caught:
        check_text(value, "'a'")
    assert str(caught.value) == message


@pytest.mark.parametrize("old", ["nothing", "file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_atomic_write_replaces_what_is_there(old, new, tmp_path):
    path = tmp_path / "target"
    if old == "folder":
        path.mkdir()
        (path / "old").touch()
    elif old == "file":
        path.write_text("old")

    def write(draft):
        assert draft.parent == path.parent and not draft.exists()
        if new == "file":
            draft.write_text("new")
        else:
            draft.mkdir()
            (draft / "new").touch()
    if (old, new) == ("file", "folder"):
        with pytest.raises(OSError, match="Not a directory"):  # os.replace: never needed
            atomic_write(path, write)
        return
    atomic_write(path, write)
    assert os.listdir(tmp_path) == ["target"]
    assert path.read_text() == "new" if new == "file" else os.listdir(path) == ["new"]


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "target"
    path.write_text("old")

    def write(draft):
        draft.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_write_json_can_be_read(tmp_path):
    write_json(tmp_path / "x.json", {"a": "é", "b": [1]})
    assert read_json(tmp_path / "x.json") == {"a": "é", "b": [1]} and "é" in (tmp_path / "x.json").read_text()


def test_remove_path(tmp_path):
    """A link is removed, not what it points to; nothing is no error."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    (tmp_path / "link").symlink_to("folder")
    for name in ("link", "nothing"):
        remove_path(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder/file").exists()
    remove_path(tmp_path / "folder")
    assert not os.listdir(tmp_path)


def test_hashes_depend_on_names_and_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    first = hash_files(tmp_path, [tmp_path / "b", tmp_path / "a"])
    assert first == hash_files(tmp_path, [tmp_path / "a", tmp_path / "b"])
    assert hash_file(tmp_path / "a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    (tmp_path / "b").rename(tmp_path / "c")
    assert hash_files(tmp_path, [tmp_path / "a", tmp_path / "c"]) != first
    (tmp_path / "c").rename(tmp_path / "b")
    assert hash_files(tmp_path, [tmp_path / "a", tmp_path / "b"]) == first
    (tmp_path / "b").write_text("a")
    assert hash_files(tmp_path, [tmp_path / "a", tmp_path / "b"]) != first


def test_a_bom_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    lines = list(read_jsonl(tmp_path / "x.jsonl"))
    assert [line.value for line in lines] == [{"a": 1}, {"a": 2}] and [line.offset for line in lines] == [0, 12]
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_pipes_and_compressed_files_are_rejected_at_once(tmp_path):
    """A pipe that nobody writes to would block for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: must be a file, which is read more than once .*save the data to a"):
        next(read_jsonl(tmp_path / "pipe"))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}'))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz: is compressed; unpack it first: gunzip -k .*x\.jsonl\.gz$"):
        next(read_jsonl(tmp_path / "x.jsonl.gz"))


def test_hidden_files_of_the_user_beside_an_output_stay(tmp_path):
    """Drafts and replaced files bear the process's number."""
    names = [".x.old", ".x.draft", ".x.y.draft", ".x.12.backup", ".gone.12.old"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for name in (".x.12.old", ".x.12.draft"):
        (tmp_path / name).write_text("left by a kill")
    atomic_write(tmp_path / "x", lambda draft: draft.write_text("1"))
    atomic_write(tmp_path / "x", lambda draft: draft.write_text("2"))
    remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "x"}
    assert (tmp_path / ".x.old").read_text() == "mine" and (tmp_path / "x").read_text() == "2"


@contextmanager
def full_disk():
    """No file of this process may grow beyond 4,096 bytes, as on a full disk: nothing is printed inside."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [
    lambda draft: draft.write_bytes(bytes(9000)),
    lambda draft: save_file({"x": np.zeros(9000)}, draft),
    lambda draft: (draft.mkdir(), (draft / "a").write_bytes(b"1"), (draft / "b").write_bytes(bytes(9000))),
], ids=["bytes", "safetensors", "folder"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    one_line = r"file: cannot be written \(.*large.*\); what was written before is"
    with full_disk(), pytest.raises(ValueError, match=one_line):
        atomic_write(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_is_utf_8_in_any_locale(tmp_path):
    code = ("import pathlib, runpy, sys; "
            "runpy.run_path(sys.argv[1])['write_json'](pathlib.Path(sys.argv[2]), {'task': 'caf\\u00e9'})")
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code, files.__file__, str(tmp_path / "run.json")], check=True,
                   env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert read_json(tmp_path / "run.json") == {"task": "caf\u00e9"}
