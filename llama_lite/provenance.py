"""Provenance of a run: code revision, packages, hardware, command. Nothing here changes a run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from model_card.private import redact

from .paths import ROOT

if TYPE_CHECKING:
    import torch

# variables that make libraries use fewer instructions than the processor has
INSTRUCTION_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
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


def code_revision(root: Path = ROOT) -> str | None:
    """Commit of this checkout, with `+changes` where its code differs from it; None outside a git checkout."""
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        code = ["--", "llama_lite", "model_card", ":(glob)*.py"]  # and not a user's own files in it
        status = subprocess.run([*git, "status", "--porcelain", *code], capture_output=True, text=True, timeout=10)
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


def cpu_generation() -> str | None:
    """Vendor, family, model and stepping of the processor: `AuthenticAMD 26/2/1`. Virtual machines often give one name
    to all generations. None where Linux does not say.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = dict(re.findall(r"^(vendor_id|cpu family|model|stepping)\s*: (.*)$", text, re.MULTILINE)[:4])
    numbers = "/".join(fields.get(name, "?") for name in ("cpu family", "model", "stepping"))
    return f"{fields['vendor_id']} {numbers}" if "vendor_id" in fields else None


def processor() -> str:
    """Name and generation of the processor, for a record of times."""
    return f"{cpu_name()} ({cpu_generation()})"


def cpu_libraries() -> dict[str, str]:
    """Versions of the libraries that torch computes with on a CPU, and the variables that limit their instructions."""
    import torch

    found = {
        name: match[1]
        for name, pattern in (("mkl", r"Math Kernel Library Version (\S+)"), ("onednn", r"MKL-DNN v(\S+)"))
        if (match := re.search(pattern, torch.__config__.show()))
    }
    return found | {name: os.environ[name] for name in INSTRUCTION_LIMITS if os.environ.get(name)}


def gpu_libraries() -> dict[str, str]:
    """Versions of the driver and of the libraries that torch computes with on a GPU."""
    import torch

    found = {"cudnn": str(torch.backends.cudnn.version())}
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    if match := re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+[.\d]*)", text):
        found["driver"] = match[1]
    names = [f"nvidia-{name}{suffix}" for name in ("cublas", "nccl") for suffix in ("", "-cu12", "-cu13")]
    return found | package_versions(names)


def hardware(device: torch.device | None = None) -> dict:
    """What can change the last bit of a result that a device computes: GPU, compute capability, driver and libraries;
    or CPU, its generation and instructions, threads and libraries; of another accelerator (Apple's mps) its kind and
    the system, which its libraries come with. device: by default the GPU, where there is one.
    """
    import torch

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "generation": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "libraries": gpu_libraries(),
        }
    if device.type != "cpu":
        system = {"system": f"{platform.system()} {platform.release()}"}
        return {"device": cpu_name(), "accelerator": device.type, "generation": platform.machine(), "libraries": system}
    capabilities = torch.cpu.get_capabilities()
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "generation": cpu_generation(),
        "instructions": " ".join(sorted(name for name, there in capabilities.items() if there is True)),
        "libraries": cpu_libraries(),
    }


def provenance(device: torch.device | None = None) -> dict:
    """The provenance record in `run.json`. device: what computes, as in `hardware`."""
    return {
        "command": redact([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "code_revision": code_revision(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "hardware": hardware(device),
        "cpus": os.cpu_count(),
    }
