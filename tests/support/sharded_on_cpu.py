"""Run a script with real FSDP2 on CPUs: accelerate would pass over it in silence (and the scripts refuse that), for it
counts only accelerators.

torchrun ... tests/support/sharded_on_cpu.py run_pretrain.py --config ...
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from llama_lite.machine import parallelism  # noqa: E402

check = parallelism.check_launch


def check_as_on_gpus(training, *shards) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    assert training.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    check(training, *shards)


for module in list(sys.modules.values()):  # in a fork, those that use it are loaded
    if getattr(module, "check_launch", None) is check:
        module.check_launch = check_as_on_gpus
sys.argv = [str(ROOT / sys.argv[1]), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
