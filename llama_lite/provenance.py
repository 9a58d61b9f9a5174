"""Provenance of a run: code revision, packages, hardware, command. Nothing here changes a run."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from model_card.private import redact

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "tokenizers", "safetensors", "numpy")


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed version of each package; those that are absent are left out."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def code_revision() -> str | None:
    """Commit of this checkout, with `+changes` where files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def cpu_name() -> str:
    """The processor's name as Linux gives it, else the platform's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> dict:
    """What can change the last bit of a result: GPU and CUDA version, or CPU, threads and instruction set."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def provenance() -> dict:
    """The provenance record in `run.json`."""
    return {
        "command": redact([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "code_revision": code_revision(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "hardware": hardware(),
        "cpus": os.cpu_count(),
    }
