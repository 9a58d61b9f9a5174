"""benchmarks/gpu.py works the first time on a machine that this project has not seen: every stage in small, on this
one.
"""

import json
import subprocess
import sys

from helpers import ROOT

from benchmarks import gpu


def test_every_stage_measures_something(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--files", str(tmp_path / "files")]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "results")], capture_output=True, text=True, cwd=ROOT, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results/gpu.json").read_text())
    assert found.keys() == {stage.__name__ for stage in gpu.STAGES} and sum(gpu.STAGES.values()) <= 560
    logs = {name: (tmp_path / f"results/{name}.log").read_text()[-2000:] for name in found}
    assert not [(name, logs[name]) for name, figures in found.items() if "ended" in figures]
    for name in ("trainer", "plain", "compiled", "chosen", "bfloat16_residual"):
        stage = "residual" if name == "bfloat16_residual" else name
        assert found[stage][name]["tokens_per_second"] > 0
    assert found["exact"]["killed_and_resumed"] == {"loss": 0.0, "weights": 0.0} and found["exact"]["probe"]
    assert found["save"]["large"]["seconds"].keys() == {"blocked", "trainer_and_fsync"}
