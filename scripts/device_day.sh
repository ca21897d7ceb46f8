#!/usr/bin/env bash
# For the day a GPU (or TPU) is at hand: what only a real device can tell, within 15 minutes in all, most wanted first.
#
#   scripts/device_day.sh                        all stages in turn: adabatch target sweep networks advise check split
#   scripts/device_day.sh split check            these stages; memory, train and speed have been measured and run only by name
#   scripts/device_day.sh --minutes 8            less time in all (default: 15)
#   scripts/device_day.sh --stage-seconds 60     less time for a stage's turn (default: 180)
#   scripts/device_day.sh --quick                tiny sizes, to see that the stages run (also on a CPU)
#   scripts/device_day.sh --output DIR           results, and the compiled programs (default: results/device_day)
#   scripts/device_day.sh --data-parts DIR       CIFAR-10 as scripts/carry_data.py has packed it; what is there is unpacked
#   scripts/device_day.sh --against FILE         what experiments.cross_check --save wrote on another machine
#
# A stage whose turn is over goes on where it stopped: in a further turn if there is time, or in the next call. What is done is not run
# again. The data sets come from JAXBATCH_DATA_DIR; a stage that lacks one says so. Times are taken one stage after another; run nothing
# beside them. Exit code: 0 all done, 1 a stage failed, 3 some are to go on.
set -uo pipefail
cd "$(dirname "$0")/.."

output=results/device_day minutes=15 stage_seconds=180 against='' quick='' data_parts=''
stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --output) output="$2"; shift 2 ;;
    --minutes) minutes="$2"; shift 2 ;;
    --stage-seconds) stage_seconds="$2"; shift 2 ;;
    --data-parts) data_parts="$2"; shift 2 ;;
    --against) against="$2"; shift 2 ;;
    --quick) quick=1; shift ;;
    -*) echo "device_day.sh: unknown flag $1; see the first lines of the script." >&2; exit 2 ;;
    *) stages+=("$1"); shift ;;
  esac
done
known=" adabatch target sweep networks advise check split memory train speed "
[ ${#stages[@]} -gt 0 ] || stages=(adabatch target sweep networks advise check split)
for stage in "${stages[@]}"; do
  case "$known" in
    *" $stage "*) ;;
    *) echo "device_day.sh: no stage $stage; there are$known." >&2; exit 2 ;;
  esac
done

python=python3
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}" ] && python=.venv/bin/python
mkdir -p "$output"
output=$(cd "$output" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$output/compiled}" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
export JAXBATCH_DATA_DIR="${JAXBATCH_DATA_DIR:-$output/data}"
[ -z "$data_parts" ] || "$python" scripts/carry_data.py unpack --parts-dir "$data_parts" --data-dir "$JAXBATCH_DATA_DIR" || exit 2

pick() { if [ -n "$quick" ]; then echo "$1"; else echo "$2"; fi; }
bench() { "$python" scripts/bench.py "$@"; }
study() { "$python" -m "experiments.$1" "${@:2}" --output-dir "$folder" ${quick:+--quick}; }
once() { # NAME COMMAND...: a step of a stage, which is not run again when it has succeeded
  [ -e "$folder/$1.done" ] || { echo "== $1"; "${@:2}" && touch "$folder/$1.done"; } || status=1
}
need() { [ -n "$quick" ] || [ -d "$JAXBATCH_DATA_DIR/$1" ] || { echo "$1 is not in $JAXBATCH_DATA_DIR"; exit 4; }; }

adabatch() { # the article's 100 epochs; (d) has one rate, which needs no choice; the rest of the protocol is scripts/reproduce_adabatch.sh
  need cifar-10-batches-bin
  for model in $(pick mlp "resnet20 alexnet"); do
    once "$model" study adabatch --dataset "$(pick digits cifar10)" --model "$model" --seeds 1 --rounds "$(pick 2 3)" --tuned-rates 0.0316
  done
}
target() { need mnist; once target bench target --dataset "$(pick digits mnist)" --accuracy "$(pick 0.3 0.98)" --json "$folder/target.jsonl"; }
sweep() { once sweep bench sweep --rounds $(pick 1 3) $(pick "--rates 2 --seeds 1 --num-examples 600" "") --json "$folder/sweep.jsonl"; }
networks() {
  for model in $(pick alexnet "alexnet resnet20 vgg19_bn"); do
    for dtype in $(pick float32 "float32 bfloat16"); do
      local flags="--rounds $(pick 1 8) --num-steps $(pick 2 50)"
      [ "$dtype" = float32 ] || flags="$flags --bfloat16"
      once "$model $dtype" bench adabatch --models "$model" $flags --json "$folder/${model}_$dtype.jsonl"
    done
  done
}
advise() { # the time of an update from B = 1 to 65,536, and the answer
  need mnist
  once updates bench updates --rounds "$(pick 2 10)" --batch-sizes $(pick "1 8" "1 4 16 64 256 1024 4096 16384 65536") --json "$folder/updates.jsonl"
  once advise study advise --dataset "$(pick digits mnist)"
}
check() {
  local platform
  platform=$("$python" -c "import jax; print(jax.default_backend())") || { status=1; return; }
  for precision in $(pick float32 "float64 bfloat16 default float32"); do
    once "$precision" "$python" -m experiments.cross_check --quick --precision "$precision" --only "$(pick dense '')" --output-dir "$folder" \
      --backend "$platform" --save "$folder/${platform}_$precision.npz" ${against:+--against "$against"}
  done
}
split() { # is anything gained where small batches leave the device idle, and is the price that of updating leaf by leaf?
  for size in $(pick 64 "640 6000"); do
    once "$size" bench split --batch-size "$size" --num-groups "$(pick 4 10)" --rounds "$(pick 2 10)" --json "$folder/$size.jsonl"
  done
}
memory() { once memory "$python" scripts/device_memory.py --output "$folder/memory.jsonl" ${quick:+--quick}; }
train() { once train bench train --rounds "$(pick 2 10)" --batch-sizes $(pick 60 "1 6 60 600 6000") --json "$folder/train.jsonl"; }
speed() { # an iteration by batch size: where is the device busy?
  need mnist
  once speed study iteration_speed --dataset "$(pick digits mnist)" --batch-sizes $(pick "6 60" "1 6 60 600 2000 6000 20000") --rounds "$(pick 2 4)"
}

end=$((SECONDS + 60 * minutes)) failed=0
waiting=("${stages[@]}")
export python quick against output
while [ ${#waiting[@]} -gt 0 ] && [ "$SECONDS" -lt "$end" ]; do
  again=()
  for stage in "${waiting[@]}"; do
    export folder="$output/$stage"
    [ -e "$folder/done" ] && continue
    seconds=$((end - SECONDS < stage_seconds ? end - SECONDS : stage_seconds))
    [ "$seconds" -gt 0 ] || { again+=("$stage"); continue; }
    mkdir -p "$folder"
    begun=$SECONDS
    # A shell of its own, so that its limit can end it with all that it has started.
    timeout -k 10 "$seconds" bash -c "$(declare -f pick bench study once need "$stage"); status=0; $stage; exit \$status" >> "$folder/log" 2>&1
    case $? in
      0) touch "$folder/done"; said="done" ;;
      4) said="$(tail -n 1 "$folder/log"); left out" ;;
      124 | 137) again+=("$stage"); said="goes on where it stopped" ;;
      *) failed=1; said="FAILED" ;;
    esac
    echo "$stage: $((SECONDS - begun)) s, $said"
  done
  waiting=(${again[@]+"${again[@]}"})
done
for stage in "${stages[@]}"; do
  [ -e "$output/$stage/log" ] && { printf '\n== %s\n' "$stage"; tail -n 40 "$output/$stage/log"; }
done
[ "$failed" = 0 ] || exit 1
[ ${#waiting[@]} = 0 ] || { printf '\nTo go on: %s\n' "${waiting[*]}"; exit 3; }
