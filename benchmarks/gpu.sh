#!/bin/bash
# Tokens a second, MFU and peak memory on the GPUs of this machine: the 124m and the 1.7B preset, beside transformers.Trainer as it comes.
#   benchmarks/gpu.sh > benchmarks/gpu.txt
# It has not been run: no machine with a GPU was at hand.
set -eu
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
text="$(mktemp -d)"
trap 'rm -rf "$text"' EXIT
python -c "from pathlib import Path; from benchmarks.kill import write_text; write_text(Path('$text/text.jsonl'), 8_000_000)"
data=(--dataset "$text/text.jsonl" --prepared_dir "$text/tokens" --tokenizer gpt2 --validation_tokens 100000 --allow_epochs)
steps=(--max_steps 40 --warmup_steps 5 --logging_steps 10 --eval_strategy no --save_steps 1000000 --tokens_per_step 524288 --sample_tokens 0)
python run_pretrain.py "${data[@]}" --prepare_only
run() {
  echo "== $*"
  accelerate launch --config_file "$1" run_pretrain.py "${data[@]}" "${steps[@]}" --output_dir "$text/run-$RANDOM" "${@:2}" | grep -E "^step|refused" || true
}
gpus="$(nvidia-smi -L | wc -l)"
for compiled in "" --compile_layers; do
  run configs/accelerate/one_gpu.yaml --model_config 124m --per_device_train_batch_size 32 $compiled
  run configs/accelerate/one_gpu.yaml --model_config 1.7b --per_device_train_batch_size 8 $compiled
done
run configs/accelerate/one_gpu.yaml --model_config 124m --per_device_train_batch_size 32 --use_liger_kernel
if [ "$gpus" -gt 1 ]; then
  sed "s/num_processes: 8/num_processes: $gpus/" configs/accelerate/fsdp2.yaml > "$text/fsdp2.yaml"
  run "$text/fsdp2.yaml" --model_config 1.7b --per_device_train_batch_size 8
fi
echo "== transformers.Trainer as it comes, 124m"
python - <<'PYTHON'
import time, torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from llama_lite.models.presets import load_model_config

class Pace(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        if state.global_step == 10:
            self.began = time.perf_counter()
        if state.global_step == 40:
            print(round(30 * 32 * 1024 / (time.perf_counter() - self.began)), "tokens a second,", torch.cuda.max_memory_allocated() / 2**30, "GiB")

model = AutoModelForCausalLM.from_config(load_model_config("124m"), dtype=torch.float32)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 50257, (32, 1024))] * 100
for bf16 in (False, True):
    arguments = TrainingArguments(output_dir="/tmp/plain", bf16=bf16, per_device_train_batch_size=32, max_steps=40, save_strategy="no")
    Trainer(model, arguments, train_dataset=rows, callbacks=[Pace()]).train()
PYTHON
