#!/usr/bin/env bash
# For the day a GPU (or TPU) is at hand: what only a real device can tell, in stages of at most 8 minutes, most wanted first.
#
#   scripts/device_day.sh                        all stages
#   scripts/device_day.sh check memory           these stages
#   scripts/device_day.sh --quick                tiny sizes, to see that the stages run (also on a CPU)
#   scripts/device_day.sh --output DIR           results (default: results/device_day)
#   scripts/device_day.sh --against FILE         what experiments.cross_check --save wrote on another machine
#
# A finished stage is not run again: stop it, start it, as you like. MNIST comes from JAXBATCH_DATA_DIR; stages that need
# it are skipped where it is not there. Times are taken one stage after another; run nothing beside them.
set -uo pipefail
cd "$(dirname "$0")/.."

output=results/device_day
against=()
quick=
stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --output) output="$2"; shift 2 ;;
    --against) against=(--against "$2"); shift 2 ;;
    --quick) quick=1; shift ;;
    -*) echo "device_day.sh: unknown flag $1; see the first lines of the script." >&2; exit 2 ;;
    *) stages+=("$1"); shift ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(check memory networks sweep target train split speed adabatch)

python=python3
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}" ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=3
bench() { "$python" scripts/bench.py "$@"; }
pick() { if [ -n "$quick" ]; then echo "$1"; else echo "$2"; fi; }
has_mnist() { [ -d "${JAXBATCH_DATA_DIR:-/nowhere}/mnist" ]; }

check() {
  "$python" -c "
import jaxbatch as jb
checks = jb.check_backend()
for check in checks: print(f'{check.name}: error {check.error:.1e}, bound {check.bound:.1e}')
raise SystemExit(not all(check.passed for check in checks))"
  local precisions="float32 float64 bfloat16 default" # in another order than the default, which --quick would cut to float32
  "$python" -m experiments.cross_check --quick --precision $(pick float32 "$precisions") --only "$(pick dense '')" \
    --backend "$platform" --save "$folder/$platform.npz" ${against[@]+"${against[@]}"} --output-dir "$folder"
}
memory() { "$python" scripts/device_memory.py --output "$folder/memory.jsonl" ${quick:+--quick}; cat "$folder/memory.jsonl"; }
train() { bench train --rounds $(pick 2 10) --batch-sizes $(pick 60 "1 6 60 600 6000") --json "$folder/train.jsonl"; }
networks() {
  local sizes="--rounds $(pick 1 8) --num-steps $(pick 2 50) --models $(pick alexnet 'alexnet resnet20 vgg19_bn')"
  bench adabatch $sizes --json "$folder/float32.jsonl"
  bench adabatch $sizes --bfloat16 --json "$folder/bfloat16.jsonl"
}
split() { # is anything gained where small batches leave the device idle?
  for size in $(pick 64 "640 6000"); do
    bench split --batch-size "$size" --num-groups $(pick 4 10) --rounds $(pick 2 10) --json "$folder/$size.jsonl"
  done
}
speed() { # an iteration by batch size: where is the device busy?
  has_mnist || { echo "MNIST is not there"; return 0; }
  "$python" -m experiments.iteration_speed --dataset mnist --output-dir "$folder" ${quick:+--quick} \
    --batch-sizes $(pick "6 60" "1 6 60 600 2000 6000 20000") --rounds $(pick 2 4)
}
sweep() { bench sweep --rounds $(pick 1 3) $(pick "--rates 2 --seeds 1 --num-examples 600" "") --json "$folder/sweep.jsonl"; }
target() {
  has_mnist || { echo "MNIST is not there"; return 0; }
  bench target --accuracy $(pick 0.9 0.98) --json "$folder/target.jsonl"
}
adabatch() { # the 18 runs go on where the last call stopped: call the stage until it is done
  [ -d "${JAXBATCH_DATA_DIR:-/nowhere}/cifar-10-batches-bin" ] || [ -n "$quick" ] || { echo "CIFAR-10 is not there"; return 0; }
  for dataset in $(pick digits "cifar10 cifar100"); do
    for model in $(pick mlp "resnet20 alexnet vgg19_bn"); do
      "$python" -m experiments.adabatch --dataset "$dataset" --model "$model" --seeds 1 --output-dir "$folder" ${quick:+--quick}
    done
  done
}

platform=$("$python" -c "import jax; print(jax.default_backend())")
failed=0
for stage in "${stages[@]}"; do
  case " check memory train networks split speed sweep target adabatch " in
    *" $stage "*) ;;
    *) echo "device_day.sh: no stage $stage; there are check memory train networks split speed sweep target adabatch." >&2; exit 2 ;;
  esac
  folder="$output/$stage"
  [ -e "$folder/done" ] && continue
  mkdir -p "$folder"
  begun=$SECONDS
  # A shell of its own, so that a limit can end it.
  export -f bench pick has_mnist "$stage"
  export python quick folder platform
  if timeout 480 bash -c "$(declare -p against); $stage" > "$folder/log" 2>&1; then touch "$folder/done"; else failed=1; fi
  echo "$stage: $((SECONDS - begun)) s$([ -e "$folder/done" ] || echo ', FAILED')"
done
for stage in "${stages[@]}"; do
  printf '\n== %s\n' "$stage"
  tail -n 40 "$output/$stage/log"
done
exit $failed
