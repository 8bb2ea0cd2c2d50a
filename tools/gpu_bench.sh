#!/usr/bin/env bash
# Every figure that needs a GPU, full size, one GPU: `tools/gpu_bench.sh [FOLDER]`; twelve minutes at most on an H100.
#   PYTHON=python3        which Python; it has the package and its requirements (default: .venv/bin/python if it is there)
#   SECONDS_IN_ALL=720    what has not begun by then is left out, what runs is stopped
#   DRY=1                 tiny sizes on the CPU, to try the script; it takes as long as it takes
# Each piece has its own limit and writes one JSON file: the machine, a row for each measurement (see
# `llava_reward_nb.bench.row_of`) and the longest kernels. Started again, the script does what is missing. At the end it
# prints targets, measurements, and whether they are met (`tools/gpu_report.py FOLDER` prints them again).
set -u
cd "$(dirname "$0")/.." || exit 2
dry=${DRY:-}; out=${1:-gpu_bench${dry:+_dry}}; mkdir -p "$out" || exit 2
slack=${dry:+6}; slack=${slack:-1} # a dry run may take its time: compilers are slow
limit=${SECONDS_IN_ALL:-$((720*slack))}; begin=$(date +%s); failed=0
python=${PYTHON:-python3}; [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import llava_reward_nb' || { echo "$python lacks requirements: $python -m pip install -e '.[quantize]'"; exit 2; }

if [ -n "$dry" ]; then
  where=(--size tiny --device cpu --repeats 1 --threads 1); batch=2; big=3; base=float32; eight=int8; device=cpu
else
  where=(--size full --device cuda); batch=16; big=32; base=bfloat16; eight=fp8; device=cuda
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || { echo "no CUDA GPU; DRY=1 $0 tries the script on a CPU"; exit 2; }
fi

# results of another version, or of another machine, are not mixed with these
about="$(git rev-parse HEAD 2>/dev/null || echo 'no git'), $("$python" -c "import sys, torch
print(torch.__version__, torch.cuda.get_device_name() if sys.argv[1]=='cuda' else 'cpu')" $device)"
if [ -e "$out/about.txt" ] && [ "$(cat "$out/about.txt")" != "$about" ]; then
  echo "$out holds results of $(cat "$out/about.txt"); this is $about: name another folder"; exit 2
fi
echo "$about" > "$out/about.txt"

piece() { # NAME, SECONDS, command
  name=$1; most=$(($2*slack)); shift 2
  left=$((limit-$(date +%s)+begin)); [ "$left" -lt "$most" ] && most=$left
  if [ -e "$out/$name.json" ]; then echo "== $name: there already"; return; fi
  if [ "$most" -lt 20 ]; then echo "== $name: left out, ${left} s left"; failed=1; return; fi
  echo "== $name, at most $most s"
  timeout -k 5 "$most" "$@" && return
  code=$?; failed=1
  [ $code -ge 124 ] && echo "== $name was stopped" || echo "== $name failed"
}
command='from llava_reward_nb.bench import llava_reward_bench; llava_reward_bench.main(name="llava_reward_bench")'
bench() { # NAME, SECONDS, options
  name=$1; most=$2; shift 2
  piece "$name" "$most" "$python" -c "$command" "${where[@]}" --out "$out/$name.json" "$@"
}
torchao() { "$python" -c 'import torchao' 2>/dev/null || { echo "== $1: left out, torchao is not installed"; false; }; }
stepbench() { "$python" -c 'import llava_reward_nb.stepbench' 2>/dev/null || { echo "== $1: left out, this version cannot measure it"; false; }; }

# in the order of what they tell
bench square   150 --precision $base --batch $batch --against reference-like
bench mixed    150 --precision $base --batch $batch --image-size mixed --against reference-like
stepbench step && piece step 180 "$python" tools/gpu_report.py "$out" --step $device
bench four     100 --precision $base --batch $batch --perspectives 4
bench compiled 120 --precision $base --batch $batch --compiled
torchao fp8 && bench fp8 90 --precision $eight --batch $batch --drift 100
bench compiled_mixed 120 --precision $base --batch $batch --image-size mixed --compiled
bench crops4    90 --precision $base --batch $big --crops 4 --against reference-like
bench unmerged  90 --precision $base --batch $batch --unmerged
piece qlora     60 "$python" tools/gpu_report.py "$out" --qlora $device
torchao int8 && bench int8 90 --precision int8-dynamic --batch $batch

"$python" tools/gpu_report.py "$out" | tee "$out/report.txt"
echo "== $(($(date +%s)-begin)) s; written to $out"
exit $failed
