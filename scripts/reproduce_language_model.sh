#!/usr/bin/env bash
# Measures everything on docs/language_model.md and gathers the figures in <output>/figures.
#
#   scripts/reproduce_language_model.sh --quick                  minutes; shows only that it works
#   scripts/reproduce_language_model.sh --data-dir DIR           at most two hours on two cores; DIR holds tiny_shakespeare
#
# Every study uses one core where it can, so the two texts are measured side by side. What is finished is not measured again.
# Other flags go to every study.
set -euo pipefail
cd "$(dirname "$0")/.."

output=results
flags=()
protocol=(--batch-sizes 8 16 32 64 128 256 --learning-rates 0.000316 0.001 0.00316 0.01 0.0316 --epochs 20 --evaluations-per-epoch 6)
while [ $# -gt 0 ]; do
  case "$1" in
    --output-dir) output="$2"; shift 2 ;;
    --quick) flags+=("$1"); protocol=(--batch-sizes 16 64 --learning-rates 0.00316 --epochs 2 --target "bits_per_token<4"); shift ;;
    *) flags+=("$1"); shift ;;
  esac
done

python=python
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}" ] && python=.venv/bin/python
mkdir -p "$output/figures"

measure() { # study, text, flags of the study
  local study="$1" text="$2" folder
  shift 2
  echo "== $study, $text"
  "$python" -m "experiments.$study" --dataset "$text" --output-dir "$output/$text" "$@" ${flags[@]+"${flags[@]}"}
  folder=$(ls -td "$output/$text/$study"/*/ | head -n 1)
  cp "$folder/figure.png" "$output/figures/${study}_$text.png"
}

text_studies() {
  measure critical_batch_size "$1" --model transformer --optimizer adamw --base-batch-size 16 "${protocol[@]}"
  measure language_model "$1"
}

text_studies generated >"$output/generated.log" 2>&1 &
first=$!
text_studies tiny_shakespeare >"$output/tiny_shakespeare.log" 2>&1 &
second=$!
status=0
wait "$first" || status=$?
wait "$second" || status=$?
cat "$output/generated.log" "$output/tiny_shakespeare.log"
echo "Figures: $output/figures"
exit "$status"
