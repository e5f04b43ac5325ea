"""Upload the result of a run to the hub.

    python -m ref.hub RUN OWNER/NAME [--private] [--merged|--adapter] [--dry-run]

The exported folder goes there as it is (by default model/, else merged/, else adapter/), with OWNER/NAME in its model
card; a card that was edited there is kept. Files that the hub already has are not sent again, so the same command
continues an interrupted upload. The token is HF_TOKEN or that of `hf auth login`; the hub's address is HF_ENDPOINT.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ref.model.card import CARD_FILE, is_signed, name_card
from ref.model.checkpoint import ADAPTER_CONFIG, HUB_ID, INDEX
from ref.utils.files import check_type, read_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 with a message if the run is not complete or the hub refuses; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m ref.hub", description="Upload the result of a run to the hub.")
    parser.add_argument("run", type=Path, help="run folder of run_train.py")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub, created if it is missing")
    parser.add_argument("--private", action="store_true", help="create it as a private one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--merged", dest="which", action="store_const", const="merged", help="upload merged/")
    which.add_argument("--adapter", dest="which", action="store_const", const="adapter", help="upload adapter/")
    parser.add_argument("--dry-run", action="store_true", help="print what would be uploaded")
    given = parser.parse_args(arguments)
    try:
        folder = result_folder(given.run, given.which)
        if not re.fullmatch(HUB_ID, given.repository):
            raise ValueError(f"the repository must be OWNER/NAME (got {given.repository!r:.80})")
        files = upload_list(folder, given.repository)
        for file in files:
            print(f"{file.path_in_repo}  {file.upload_info.size:,} bytes")
        if given.dry_run:
            print(f"dry run: {len(files)} files of {folder} would go to {given.repository}")
            return 0
        print(f"uploaded: {upload(files, given.repository, folder.name, private=given.private)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, HTTPError) as error:
        print(f"error: {given.repository}: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues the upload", file=sys.stderr)
        return 130
    return 0


def reason(error: Exception) -> str:
    """What the server or the network says, in one line, and whether it is worth trying again."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # the client's, for a large file
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None)
    text = " ".join((f"{status} {said}" if said else str(error) or type(error).__name__).split())
    is_local = status is None and getattr(error, "filename", None) is not None
    if is_local or (status is not None and status < 500):
        return f"{text:.300}; check the token (HF_TOKEN) and its rights" if status in (401, 403) else f"{text:.300}"
    return f"{text:.300}; the same command continues the upload"


def result_folder(run: Path, which: str | None) -> Path:
    """The folder of a complete run to upload. Raises ValueError if there is none, or if others could not load it."""
    if not (run / "run.json").exists():
        raise ValueError(f"{run}: must be a run folder of run_train.py")
    facts = read_json(run / "run.json")
    if not facts.get("complete"):
        raise ValueError(f"{run}: the run is not complete; continue it: run_train.py --resume --output {run}")
    names = [which] if which else ["model", "merged", "adapter"]
    folder = next((run / name for name in names if (run / name).is_dir()), None)
    if folder is None:
        if (facts.get("options") or {}).get("train") == "all":
            raise ValueError(f"{run}: has no {which or 'model'}/; the result of --train all is model/ alone")
        raise ValueError(f"{run}: has no {' or '.join(f'{name}/' for name in names)}; merged/ is written by "
                         f"run_train.py --resume --output {run} --merge")
    path = folder / ADAPTER_CONFIG
    if path.exists():
        field = f"{path}: 'base_model_name_or_path'"
        base = check_type(read_json(path).get("base_model_name_or_path"), str, field, "the base's hub id")
        if not re.fullmatch(HUB_ID, base) or Path(base).exists():
            raise ValueError(f"{field} must be the base's hub id (got {base!r:.200}), or others cannot load it; write "
                             f"it there, or upload the merged model (run_train.py --resume --output {run} --merge)")
    return folder


def upload(files: Sequence[CommitOperationAdd], repository: str, result: str, *, private: bool) -> str:
    """Create the repository if it is missing, and commit the files; returns the commit's address.

    A model card there that is neither this one nor one that this project wrote is kept. Raises ValueError if the
    repository is public against `private`, or holds weights or an adapter that these files do not replace.
    """
    api = HfApi()
    api.create_repo(repository, private=private or None, exist_ok=True)  # None: an organisation's own default
    there = api.model_info(repository)
    if private and not there.private:
        raise ValueError(f"--private: {repository} exists and is public")
    names, ours = {file.rfilename for file in there.siblings or ()}, {file.path_in_repo: file for file in files}
    left = names - ours.keys()
    if stale := sorted(name for name in left if name.endswith(".safetensors") or name in (INDEX, ADAPTER_CONFIG)):
        raise ValueError(f"{repository}: holds {stale[0]} of another result, which would be loaded with this one; "
                         "delete it there, or give another name")
    if CARD_FILE in names & ours.keys():
        found = card_there(repository)
        if found != ours[CARD_FILE].path_or_fileobj and not is_signed(found.decode(errors="replace")):
            print(f"note: {CARD_FILE} of {repository} was edited there and is kept; delete it there to send this one")
            del ours[CARD_FILE]
    done = api.create_commit(repository, list(ours.values()), commit_message=f"Upload {result}/ of a run")
    return str(done.commit_url)


def card_there(repository: str) -> bytes:
    """The model card of a repository on the hub."""
    response = get_session().get(hf_hub_url(repository, CARD_FILE), headers=build_hf_headers())
    hf_raise_for_status(response)
    return bytes(response.content)


def upload_list(folder: Path, repository: str) -> list[CommitOperationAdd]:
    """All files of a folder; in the model card the repository's name replaces the placeholder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / CARD_FILE]
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    card = folder / CARD_FILE
    if card.exists():
        text = name_card(card.read_text(encoding="utf-8"), repository)
        operations.append(CommitOperationAdd(CARD_FILE, text.encode()))
    return operations


if __name__ == "__main__":
    sys.exit(main())
