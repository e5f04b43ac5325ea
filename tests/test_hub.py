"""Upload to the hub, over HTTP against a small server on the loopback interface."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_mteb import write_json

from ref.hub import main, reason, result_folder
from ref.hub import upload as send
from ref.model.card import Score, add_scores, is_signed

ROOT = Path(__file__).parent.parent


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's interface that an upload uses: weights go to a store, the rest into the commit."""

    files: dict[str, bytes]
    blobs: dict[str, bytes]
    repositories: list[dict[str, Any]]
    sent: list[str]  # hashes that were uploaded to the store
    refuse: tuple[int, dict[str, str], bytes] | None  # status, header, content of every answer
    public: bool
    broken_store: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            self.send(*self.refuse)
        elif self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self.answer({"url": f"{self.address}/owner/name"})
        elif "/preupload/" in self.path:
            self.answer({"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [
                {**each, "authenticated": True, **({} if each["oid"] in self.blobs else {"actions": {
                    "upload": {"href": f"{self.address}/store/{each['oid']}"}}})}
                for each in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            self.answer({"commitUrl": f"{self.address}/owner/name/commit/1", "commitOid": "1"})
        else:
            self.answer({})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.broken_store:
            self.answer({"error": "disk full"}, 507)
            return
        self.blobs[hashlib.sha256(content).hexdigest()] = content
        self.sent.append(self.path.rpartition("/")[2])
        self.answer({})

    def do_GET(self) -> None:
        if self.refuse:
            self.send(*self.refuse)
        elif "/resolve/" in self.path:
            self.send(200, {}, self.files[self.path.partition("/resolve/main/")[2]])
        else:
            self.answer({"id": "owner/name", "siblings": [{"rfilename": name} for name in self.files], "sha": "0",
                         "private": not self.public})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, {}, json.dumps(value).encode())

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    state = type("State", (Hub,), {"files": {}, "blobs": {}, "repositories": [], "sent": [], "refuse": None,
                                    "public": False, "broken_store": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), state)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def upload(hub: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, "-m", "ref.hub", *arguments], cwd=ROOT, env=environment, check=False,
                          capture_output=True, text=True, timeout=300)


def test_a_run_arrives_as_it_is_with_its_own_name_in_the_card(tiny_run, hub):
    done = upload(hub, str(tiny_run), "owner/name", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded: {hub.url}/owner/name/commit/1"
    created = hub.repositories[0]
    assert (created["name"], created["organization"]) == ("name", "owner")
    assert created.get("visibility") == "private" or created.get("private") is True  # by the version of the client
    folder = tiny_run / "model"
    local = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card, sent = local.pop("README.md").decode(), hub.files.pop("README.md").decode()
    named = card.replace("OWNER/NAME", "owner/name")
    assert sent.splitlines()[:-1] == named.splitlines()[:-1] and named != card and is_signed(sent)
    assert str(tiny_run) not in card
    assert hub.files == local
    before = len(hub.sent)
    assert before == len([name for name in local if name.endswith(".safetensors")]) == 1
    assert upload(hub, str(tiny_run), "owner/name").returncode == 0
    assert len(hub.sent) == before  # what the hub has is not sent again


def test_what_would_be_loaded_with_the_result_is_named(tiny_run, hub, monkeypatch):
    """Left by an earlier upload of another form; the repository's own files do not matter."""
    hub.files |= {"LICENSE": b"mine"}
    for name in ("adapter_config.json", "model.safetensors.index.json", "old.safetensors"):
        monkeypatch.setattr("ref.hub.HfApi", lambda name=name: SimpleNamespace(
            create_repo=lambda *_, **__: None, model_info=lambda _: SimpleNamespace(
                private=False, siblings=[SimpleNamespace(rfilename=file) for file in (name, "LICENSE")])))
        with pytest.raises(ValueError, match=f"owner/name: holds {name} of another result"):
            send([], "owner/name", "model", private=False)
    monkeypatch.undo()
    assert upload(hub, str(tiny_run), "owner/name").returncode == 0 and hub.files["LICENSE"] == b"mine"
    assert "private" not in hub.repositories[0] and "visibility" not in hub.repositories[0]  # the owner's own default


def test_a_card_that_was_edited_on_the_hub_is_kept(tiny_run, hub, tmp_path):
    """One that this project wrote is replaced; so is nothing by the same card."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert upload(hub, str(run), "owner/name").returncode == 0
    add_scores(run, {"STS12": Score("STS", "cosine_spearman", 70.0, "local", "local-1", "test", False)})
    done = upload(hub, str(run), "owner/name")
    assert "note:" not in done.stdout and b"| STS12 |" in hub.files["README.md"]
    hub.files["README.md"] = theirs = hub.files["README.md"].replace(b"A text embedder", b"My text embedder")
    hub.files["config.json"] = b"{}"
    done = upload(hub, str(run), "owner/name")
    note = "note: README.md of owner/name was edited there and is kept; delete it there to send this one\n"
    assert done.returncode == 0 and note in done.stdout
    assert hub.files["README.md"] == theirs and hub.files["config.json"] != b"{}"
    (run / "model/README.md").write_bytes(theirs)
    assert "note:" not in upload(hub, str(run), "owner/name").stdout


def test_a_dry_run_sends_nothing(tiny_run, hub):
    done = upload(hub, str(tiny_run), "owner/name", "--dry-run")
    assert done.returncode == 0 and "would go to owner/name" in done.stdout and "model.safetensors  " in done.stdout
    assert not hub.repositories and not hub.files


@pytest.mark.parametrize(("status", "headers", "content", "expected"), [
    (401, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Invalid username or password."}',
     "401 Invalid username or password.; check the token (HF_TOKEN) and its rights"),
    (403, {"X-Error-Message": "no rights"}, b"", "403 no rights; check the token (HF_TOKEN) and its rights"),
    (404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "no such owner"}', "404 no such owner"),
    (413, {}, b'{"error": "Payload\\n too large"}', "413 Payload too large"),
    (500, {}, b'{"error": "a bug"}', "500 a bug; the same command continues the upload")])
def test_a_refusal_is_one_line_with_the_reason_of_the_server(tiny_run, hub, status, headers, content, expected):
    """Only after the server's own faults, and the network's, it makes sense to try the same again."""
    hub.refuse = (status, headers, content)
    done = upload(hub, str(tiny_run), "owner/name")
    assert (done.returncode, done.stderr) == (2, f"error: owner/name: {expected}\n")


def test_a_refused_large_file_is_one_line_with_the_reason_of_the_server(tiny_run, hub):
    """The client raises its error from another."""
    hub.broken_store = True
    done = upload(hub, str(tiny_run), "owner/name")
    assert (done.returncode, done.stderr) == (
        2, "error: owner/name: 507 disk full; the same command continues the upload\n")
    assert not hub.files


def test_a_network_that_fails_is_tried_again_and_a_file_that_cannot_be_read_is_not():
    assert reason(ConnectionError("refused")) == "refused; the same command continues the upload"
    assert reason(PermissionError(13, "Permission denied", "model.safetensors")).endswith("'model.safetensors'")


def test_a_private_upload_into_a_public_repository_is_refused(tiny_run, hub):
    hub.public = True
    done = upload(hub, str(tiny_run), "owner/name", "--private")
    assert done.returncode == 2 and done.stderr == "error: --private: owner/name exists and is public\n"
    assert not hub.files


def test_what_cannot_be_uploaded(tiny_run, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert main([*arguments, "--dry-run"]) == 2
        return capsys.readouterr().err
    assert "the repository must be OWNER/NAME (got 'name')" in error(str(tiny_run), "name")
    assert "must be a run folder" in error(str(tmp_path), "owner/name")
    for which in ("merged", "adapter"):
        assert f"has no {which}/; the result of --train all is model/ alone\n" in error(
            str(tiny_run), "owner/name", f"--{which}")
    write_json(tmp_path / "run.json", {"complete": False})
    assert "the run is not complete; continue it" in error(str(tmp_path), "owner/name")
    write_json(tmp_path / "run.json", {"complete": True})
    assert "has no model/ or merged/ or adapter/" in error(str(tmp_path), "owner/name")
    message = f"has no merged/; merged/ is written by run_train.py --resume --output {tmp_path} --merge"
    assert message in error(str(tmp_path), "owner/name", "--merged")
    for base in ("/home/me/base", "../base", None):
        write_json(tmp_path / "adapter/adapter_config.json", {"base_model_name_or_path": base})
        assert "'base_model_name_or_path' must be the base's hub id (got" in error(str(tmp_path), "owner/name")
    write_json(tmp_path / "adapter/adapter_config.json", {"base_model_name_or_path": "owner/base"})
    assert result_folder(tmp_path, "adapter") == tmp_path / "adapter"
