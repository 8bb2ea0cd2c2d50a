#!/usr/bin/env bash
# The full-size benchmark of scoring on one GPU, as JSON files: `tools/gpu_bench.sh [FOLDER]`; eight minutes at most.
#   PYTHON=python3        which Python; it has the package and its requirements
#   SECONDS_IN_ALL=470    what has not begun by then is left out, what runs is stopped
#   DRY=1                 tiny sizes on the CPU, to try the script
# Each file holds the machine, a row for each measurement (see `llava_reward_nb.bench.row_of`) and the longest kernels.
set -u
cd "$(dirname "$0")/.."
out=${1:-gpu_bench}; mkdir -p "$out"
limit=${SECONDS_IN_ALL:-470}; begin=$(date +%s); failed=0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=5 PYTORCH_ALLOC_CONF=expandable_segments:True
where=(--size full --device cuda); batch=16; big=32; base=bfloat16; eight=fp8
if [ -n "${DRY:-}" ]; then where=(--size tiny --device cpu --repeats 1 --threads 1); batch=2; big=3; base=float32; eight=int8; fi

command='from llava_reward_nb.bench import llava_reward_bench; llava_reward_bench.main(name="llava_reward_bench")'
torchao() { "${PYTHON:-python3}" -c 'import torchao' 2>/dev/null || { echo "== $1: left out, torchao is not installed"; false; }; }

bench() { # NAME, options
  name=$1; shift
  left=$((limit-$(date +%s)+begin))
  if [ "$left" -lt 20 ]; then echo "== $name: left out, $left s left"; return; fi
  echo "== $name"
  timeout -k 5 "$left" "${PYTHON:-python3}" -c "$command" "${where[@]}" --out "$out/$name.json" "$@" || { echo "== $name failed or was stopped"; failed=1; }
}

# in the order of what they tell; a later one is missing when time is short
bench square   --precision $base --batch $batch --against reference-like
bench mixed    --precision $base --batch $batch --image-size mixed --against reference-like
bench compiled --precision $base --batch $batch --image-size mixed --compiled
bench four     --precision $base --batch $((batch/2)) --perspectives 4
torchao fp8 && bench fp8      --precision $eight --batch $batch --drift 100
bench unmerged --precision $base --batch $batch --unmerged
bench crops4   --precision $base --batch $big --crops 4 --against reference-like
torchao int8 && bench int8     --precision int8-dynamic --batch $batch
echo "== $(($(date +%s)-begin)) s; written to $out"
exit $failed
