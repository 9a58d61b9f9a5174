#!/bin/bash
# Run a script of this project on the machines of Hugging Face Jobs, from your own machine (`hf auth login` first; Jobs are paid by the minute,
# `hf jobs hardware` lists machines and prices):
#
#   python run_pretrain.py --config configs/pretrain/124m.yaml --dry_run --plan_price 5.0        # how long, and how much? price of a GPU and hour
#   python run_pretrain.py --config configs/pretrain/124m.yaml --prepare_only --push_to_hub --prepared_hub_id you/tokens
#   FLAVOR=h200 HOURS=6 ATTEMPTS=8 bash configs/jobs/submit.sh run_pretrain.py --config configs/pretrain/124m.yaml --prepared_hub_id you/tokens --hub_model_id you/model
#   FLAVOR=h200 HOURS=2 bash configs/jobs/submit.sh run_sft.py --config configs/sft/paper.yaml --model_name_or_path you/model --hub_model_id you/model-sft
#   FLAVOR=h200 HOURS=2 ATTEMPTS=1 bash configs/jobs/submit.sh run_eval.py --config configs/eval/trajectory.yaml --models "you/model@step-*" --push_to_hub
#
# The job clones PROJECT at COMMIT (default: this repository's origin and HEAD, which must be pushed), because a job has no files of yours.
# Its own files are gone when it ends: training goes on from the run's repository on the Hub, in the next attempt. LAUNCH is an accelerate
# config for several GPUs (configs/accelerate/ddp.yaml). The run is asked to save and publish 15 minutes before the time limit of HOURS.
set -eu
: "${1:?is the script: bash configs/jobs/submit.sh run_pretrain.py --config ... --hub_model_id you/model}"
: "${FLAVOR:?is the machine: FLAVOR=h200 (hf jobs hardware lists them)}"
HOURS="${HOURS:-6}"
PROJECT="${PROJECT:-$(git remote get-url origin)}"
COMMIT="${COMMIT:-$(git rev-parse HEAD)}"

# shellcheck disable=SC2016  # the job's shell replaces $PROJECT and $COMMIT
exec hf jobs run --detach --flavor "$FLAVOR" --timeout "${HOURS}h" --attempts "${ATTEMPTS:-8}" --secrets HF_TOKEN \
  --env "PROJECT=$PROJECT" --env "COMMIT=$COMMIT" --env "LAUNCH=${LAUNCH:-configs/accelerate/one_gpu.yaml}" --env "STOP_AFTER=$((HOURS * 3600 - 900))" \
  "${IMAGE:-python:3.11}" \
  bash -c 'git clone --quiet "$PROJECT" project && cd project && git checkout --quiet "$COMMIT" && exec bash configs/jobs/job.sh "$@"' job "$@"
