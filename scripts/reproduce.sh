#!/usr/bin/env bash
# Runs every study of batch size and gathers the figures in <output>/figures.
#
#   scripts/reproduce.sh --quick                under 5 minutes on two cores, the embedded digits
#   scripts/reproduce.sh                        the embedded digits, whole
#   scripts/reproduce.sh --dataset mnist        MNIST, from --data-dir or JAXBATCH_DATA_DIR
#
# What is finished is not measured again: stop it, start it, as you like. Other flags go to every study: those that
# all have, as --quick, --data-dir and --overwrite.
set -euo pipefail
cd "$(dirname "$0")/.."

output=results
dataset=digits
flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    --output-dir) output="$2"; shift 2 ;;
    --dataset) dataset="$2"; shift 2 ;;
    *) flags+=("$1"); shift ;;
  esac
done

python=python
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}" ] && python=.venv/bin/python
mkdir -p "$output/figures"

for study in nose_game iteration_speed batch_shape gradient_smoothness learning_rate_grid convergence split_backward; do
  echo "== $study"
  touch "$output/.begun"
  extra=()
  [ "$study $dataset" = "split_backward mnist" ] && extra=(--batch-size 600 --num-groups 10 --seeds 5)
  "$python" -m "experiments.$study" --dataset "$dataset" --output-dir "$output" ${extra[@]+"${extra[@]}"} ${flags[@]+"${flags[@]}"}
  # The run folder that was just written holds the newest figures.
  newest=$(dirname "$(find "$output/$study" -name '*.png' -newer "$output/.begun" | head -n 1)")
  for figure in "$newest"/*.png; do
    name=$(basename "$figure" .png)
    cp "$figure" "$output/figures/${study}_${dataset}$([ "$name" = figure ] || echo "_$name").png"
  done
done
rm -f "$output/.begun"
echo "Figures: $output/figures"
