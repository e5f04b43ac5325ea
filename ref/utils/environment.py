"""What a measured result depends on besides its options: commit, hardware, versions, time."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "triton", "mteb")


def environment_info() -> dict[str, Any]:
    """Commit, hardware and package versions, as written to run.json."""
    versions = {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}
    return {"commit": _commit(), "hardware": _hardware(), "versions": versions}


def package_version(package: str) -> str | None:
    """Version of an installed package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def utc_now() -> str:
    """The current time as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of this code; None outside a checkout."""
    try:
        call = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                              cwd=Path(__file__).parent, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return call.stdout.strip()


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
