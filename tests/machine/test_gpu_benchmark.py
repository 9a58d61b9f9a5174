"""benchmarks/gpu.py works the first time on a machine that this project has not seen: every stage in small, on this
one.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
from helpers import ROOT

from benchmarks import gpu


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "files"
    gpu.pack(folder, tiny=True)
    return folder


@pytest.mark.parametrize("stage", [stage.__name__ for stage in gpu.STAGES])
def test_every_stage_measures_something(files, stage, tmp_path, monkeypatch):
    argv = ["--tiny", "--files", str(files), "--stage", stage, "--results", str(tmp_path)]
    if stage == "exact":  # the stage that starts processes: forks
        processes = SimpleNamespace(Popen=lambda command, stdout, **_: forking.start(command, Path(stdout.name)))
        monkeypatch.setattr(gpu, "subprocess", processes)
        gpu.exact(gpu.Stage(gpu.parser().parse_args(argv), stage))
    else:
        done = forking.run([sys.executable, str(ROOT / "benchmarks/gpu.py"), *argv], timeout=3600)
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / f"{stage}.json").read_text())
    for name in {"trainer", "plain", "compiled", "chosen", "bfloat16_residual", "profiled"} & found.keys():
        assert found[name]["tokens_per_second"] > 0
    if stage == "exact":
        assert found["killed_and_resumed"] == {"loss": 0.0, "weights": 0.0} and found["probe"]
    if stage == "save":
        assert found["large"]["seconds"].keys() == {"blocked", "named", "trainer_and_fsync"}


def test_a_stage_that_takes_too_long_is_stopped_and_the_next_one_runs(files, tmp_path, monkeypatch):
    assert sum(gpu.STAGES.values()) <= 560
    monkeypatch.setattr(gpu, "STAGES", {gpu.save: 0.001, gpu.machine: 3600})
    parser = gpu.parser()
    found = gpu.run_stages(parser.parse_args(["--tiny", "--files", str(files), "--results", str(tmp_path)]))
    assert found["save"]["ended"] == "stopped after 0.001 s" and "ended" not in found["machine"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
