"""What a run will need and this machine lacks, said before anything is done, with the line that mends it."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import Problems
from ..formatting import size
from ..paths import first_there

DASHBOARDS = {  # --report_to: the packages, one of which it needs
    "tensorboard": ("tensorboard", "tensorboardX"),
    "comet_ml": ("comet_ml",),
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    **{
        name: (name,)
        for name in (
            "wandb",
            "trackio",
            "mlflow",
            "neptune",
            "codecarbon",
            "clearml",
            "dagshub",
            "dvclive",
            "swanlab",
            "kubeflow",
        )
    },
}


def check_packages(training) -> None:
    """Raise Refusal for a dashboard that transformers does not know, whose package is not installed, or that cannot
    begin here; and for kernels without theirs. `training`: TrainingArguments.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    problems = Problems()
    for name in training.report_to:
        packages = DASHBOARDS.get(name)
        problems.add_if(
            packages is None,
            f"--report_to {name}: no such dashboard; there are {', '.join(sorted(DASHBOARDS))}, and none.",
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
                    f"--report_to {name} cannot begin here: {' '.join(str(error).split())[:200]} Mend that, or leave it"
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
    """Raise Refusal for folders that cannot be written to, or whose disk lacks the bytes that they `needed` beside what
    they hold.

    folders: {argument: path}; needed: {argument: bytes}. Folders on one disk are counted together.
    """
    problems, disks = Problems(), {}
    for name, path in folders.items():
        if not path:
            continue
        there = first_there(Path(path).expanduser())
        problems.add_if(not there.is_dir(), f"--{name} {path}: {there} is a file, not a folder.")
        problems.add_if(
            there.is_dir() and not os.access(there, os.W_OK | os.X_OK),
            f"--{name} {path}: this user may not write to {there}.",
        )
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            try:
                tempfile.TemporaryFile(dir=there).close()  # has no name, and leaves nothing
            except OSError as error:
                problems.append(f"--{name} {path}: nothing can be written to {there} ({error.strerror}).")
        disks.setdefault(os.stat(there).st_dev, []).append((name, there))
    for held in disks.values():
        wanted, free = sum((needed or {}).get(name, 0) for name, _ in held), shutil.disk_usage(held[0][1]).free
        problems.add_if(
            wanted > free,
            f"the disk of {held[0][1]} has {size(free)} free, and about {size(wanted)} are needed"
            f" ({', '.join(f'--{name}' for name, _ in held)}): make room, or name folders on a larger one.",
        )
    problems.end()
