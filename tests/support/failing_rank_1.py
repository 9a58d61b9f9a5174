"""Run a script whose second rank alone fails in the validation loss after step 1.

torchrun ... tests/support/failing_rank_1.py run_pretrain.py --config ...   (FSDP2 where ACCELERATE_USE_FSDP is set)
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from llama_lite.distributed import RANK  # noqa: E402
from llama_lite.training import trainer, watchdog  # noqa: E402

watchdog.ALONE, watchdog.FIRST_WORD = 1.0, 60.0
compute_loss = trainer.PretrainTrainer.compute_loss


def failing(self, *args, **kwargs):
    if RANK == 1 and self.state.global_step == 1 and not self.model.training:
        raise RuntimeError("this rank alone")
    return compute_loss(self, *args, **kwargs)


trainer.PretrainTrainer.compute_loss = failing
script = sys.argv[1]
sys.argv = sys.argv[1:]
if os.environ.get("ACCELERATE_USE_FSDP"):
    sys.argv.insert(0, "sharded_on_cpu.py")
    script = "tests/support/sharded_on_cpu.py"
runpy.run_path(str(ROOT / script), run_name="__main__")
