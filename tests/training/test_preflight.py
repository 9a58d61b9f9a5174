"""What a run needs and this machine lacks is said before anything is done, with what mends it."""

import os
import shutil
from types import SimpleNamespace

import pytest
from helpers import config_file, launch
from transformers.integrations import integration_utils

from llama_lite.errors import Refusal
from llama_lite.training import preflight


def test_a_dashboard_that_is_not_installed_is_named_with_its_package(settings, tmp_path):
    done = launch(
        "--config",
        str(config_file(tmp_path, settings, output_dir=str(tmp_path / "run"), report_to=["wandb", "nothing"])),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run" / "run.json").exists()
    assert "--report_to wandb needs a package that is not installed: pip install wandb, or leave it out" in done.stderr
    assert "--report_to nothing: no such dashboard. Choose among azure_ml, clearml" in done.stderr


def test_one_of_several_packages_is_enough(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: name == "tensorboardX")
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", object)  # which is not really here
    preflight.check_packages(SimpleNamespace(report_to=["tensorboard"], use_liger_kernel=False))
    with pytest.raises(Refusal, match="pip install mlflow"):
        preflight.check_packages(SimpleNamespace(report_to=["tensorboard", "mlflow"], use_liger_kernel=False))


def test_kernels_that_are_not_here_are_named_with_their_package():
    import torch

    for device in ("cpu", "cuda"):
        with pytest.raises(Refusal, match="--use_liger_kernel needs a GPU and a package: pip install liger-kernel"):
            preflight.check_packages(SimpleNamespace(report_to=[], use_liger_kernel=True, device=torch.device(device)))


def test_pushing_without_a_login_is_refused(monkeypatch):
    monkeypatch.setattr("llama_lite.hub.client.token", lambda: None)
    preflight.check_token(False)
    with pytest.raises(Refusal, match=r"nobody is logged in to the Hub here. Run `hf auth login`, or set HF_TOKEN"):
        preflight.check_token(True)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path
    )  # the tests' user may be root, who may write everywhere
    with pytest.raises(Refusal, match=f"--output_dir {tmp_path}/run: this user may not write to {tmp_path}"):
        preflight.check_folders({"output_dir": str(tmp_path / "run")})


def test_a_folder_that_is_a_file_and_a_disk_that_is_full(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=rf"--output_dir {tmp_path}/file/run: {tmp_path}/file is a file, not a folder"):
        preflight.check_folders({"output_dir": str(tmp_path / "file" / "run"), "prepared_dir": None})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    folders = {"output_dir": str(tmp_path / "a"), "prepared_dir": str(tmp_path / "b")}
    preflight.check_folders(folders, {"output_dir": 2**29, "prepared_dir": 2**29})
    with pytest.raises(
        Refusal, match=r"has 1.00 GiB free, and about 1.50 GiB are needed \(--output_dir, --prepared_dir\)"
    ):
        preflight.check_folders(folders, {"output_dir": 2**30, "prepared_dir": 2**29})


def test_a_dashboard_that_cannot_begin_is_refused_with_its_own_words(monkeypatch):
    """DagsHub's package alone is not enough: transformers' callback wants MLflow, too, and would say so after
    everything is prepared.
    """
    real = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name, *rest: object() if name == "dagshub" else real(name, *rest)
    )
    with pytest.raises(
        Refusal, match=r"--report_to dagshub cannot start here: .*pip install mlflow.* Fix that, or leave it out"
    ):
        preflight.check_packages(SimpleNamespace(report_to=["dagshub"], use_liger_kernel=False))
