#!/bin/bash
# Inside a job (configs/jobs/submit.sh starts it): install, run a script, and fail unless the run is finished, so that the job's next attempt goes on.
#
# A training run publishes every checkpoint with its training state, and begins at the newest on the Hub. After STOP_AFTER seconds, or when
# the job is asked to end, it saves, what waits is published, and the attempt fails. An evaluation has nothing to go on from: it begins again.
set -u
python -m pip install --quiet --root-user-action ignore -r requirements.txt || exit 1
script="$1" run=runs/job
shift
processes="$(nvidia-smi -L 2>/dev/null | grep -c .)" # GPUs
launch=(accelerate launch --config_file "$LAUNCH")
if [ "$processes" -gt 0 ]; then launch+=(--num_processes "$processes"); else launch=(accelerate launch --cpu --num_processes 1); fi
if [ "$script" = run_eval.py ]; then
  exec "${launch[@]}" "$script" "$@" --output_dir "$run"
fi

mkdir -p "$run"
export EXIT_STATUS_FILE="$PWD/.exit-status" # of rank 0; launchers turn every status into 1
trap 'touch "$run/stop"' TERM INT USR1
(sleep "$((STOP_AFTER > SECONDS ? STOP_AFTER - SECONDS : 0))" && touch "$run/stop") &
clock=$!
"${launch[@]}" "$script" "$@" --push_to_hub --output_dir "$run" &
job=$!
while kill -0 "$job" 2>/dev/null; do wait "$job"; done
kill "$clock" 2>/dev/null

status="$(cat "$EXIT_STATUS_FILE" 2>/dev/null || echo killed)"
echo "attempt ended: status $status (0 finished, 2 refused, 3 unhealthy, 75 interrupted)"
[ "$status" = 0 ] && exit 0
[ "$status" = 75 ] && python "$script" "$@" --push_to_hub --output_dir "$run" --publish_only &&
  grep -qs '"status": "finished"' "$run/status.json" && exit 0 # after the last step, where nothing but publishing was left
exit 1
