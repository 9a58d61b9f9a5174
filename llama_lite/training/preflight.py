"""What a run needs and this machine lacks: refused before anything is done, with the command that fixes it."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.dashboards import DASHBOARDS
from ..errors import Problems
from ..formatting import size
from ..paths import first_there

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_packages(training: "TrainingArguments") -> None:
    """Raise Refusal for a dashboard that transformers does not know, whose package is not installed, or that does not
    start here; and for Liger kernels without GPU or package.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    problems = Problems()
    for name in training.report_to:
        packages = DASHBOARDS.get(name)
        problems.add_if(
            packages is None,
            f"--report_to {name}: no such dashboard. Choose among {', '.join(sorted(DASHBOARDS))}, and none.",
        )
        missing = packages and not any(importlib.util.find_spec(package) for package in packages)
        problems.add_if(
            missing,
            f"--report_to {name} needs a package that is not installed: pip install {(packages or [''])[0]}, or leave"
            " it out.",
        )
        if packages and not missing:
            try:
                INTEGRATION_TO_CALLBACK[name]()  # as Trainer will, after everything is prepared
            except Exception as error:  # what a dashboard's package raises is its own affair
                problems.add_if(
                    True,
                    f"--report_to {name} cannot start here: {' '.join(str(error).split())[:200]} Fix that, or leave it"
                    " out.",
                )
    liger = not training.use_liger_kernel or (
        training.device.type != "cpu" and importlib.util.find_spec("liger_kernel")
    )
    problems.add_if(
        not liger, "--use_liger_kernel needs a GPU and a package: pip install liger-kernel, or leave it out."
    )
    problems.end()


def check_token(publishes: bool) -> None:
    """Raise Refusal when something is to be pushed and nobody is logged in to the Hub."""
    from ..hub.client import token

    problems = Problems()
    problems.add_if(
        publishes and not token(),
        "--push_to_hub: nobody is logged in to the Hub here. Run `hf auth login`, or set HF_TOKEN.",
    )
    problems.end()


def check_folders(folders: dict[str, str | None], needed: dict[str, int] | None = None) -> None:
    """Raise Refusal for folders that cannot be written to, or whose disk has too few free bytes.

    folders: {argument: path}; needed: {argument: bytes that are added}. Folders on one disk are counted together.
    """
    problems, disks = Problems(), {}
    for name, path in folders.items():
        if not path:
            continue
        existing = first_there(Path(path).expanduser())
        problems.add_if(not existing.is_dir(), f"--{name} {path}: {existing} is a file, not a folder.")
        problems.add_if(
            existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK),
            f"--{name} {path}: this user may not write to {existing}.",
        )
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            try:
                tempfile.TemporaryFile(dir=existing).close()  # has no name, and leaves nothing
            except OSError as error:
                problems.append(f"--{name} {path}: nothing can be written to {existing} ({error.strerror}).")
        disks.setdefault(os.stat(existing).st_dev, []).append((name, existing))
    for disk_folders in disks.values():
        folder = disk_folders[0][1]
        total = sum((needed or {}).get(name, 0) for name, _ in disk_folders)
        free = shutil.disk_usage(folder).free
        problems.add_if(
            total > free,
            f"the disk of {folder} has {size(free)} free, and about {size(total)} are needed"
            f" ({', '.join(f'--{name}' for name, _ in disk_folders)}): make room, or name folders on a larger one.",
        )
    problems.end()
