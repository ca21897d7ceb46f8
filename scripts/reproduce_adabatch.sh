#!/usr/bin/env bash
# AdaBatch whole: 3 networks × 2 data sets × 3 arms, the tuned baseline beside them, and the figures.
#
#   scripts/reproduce_adabatch.sh                 100 epochs in bfloat16, meant for one GPU; CIFAR from JAXBATCH_DATA_DIR
#   scripts/reproduce_adabatch.sh --small         2,500 examples, 10 epochs, 3 seeds in float32: hours of two CPU cores
#   scripts/reproduce_adabatch.sh --quick         digits and SimpleCNN only: that everything works, minutes
#
# Every run goes on from its last epoch: stop it, start it, as you like. --output-dir DIR (results); --only "cifar10 resnet20"
# takes one network on one data set; other flags go to experiments.adabatch.
set -euo pipefail
cd "$(dirname "$0")/.."

output=results
pairs=()
for dataset in cifar10 cifar100; do
  for model in alexnet resnet20 vgg19_bn; do pairs+=("$dataset $model"); done
done
flags=(--dtype bfloat16 --seeds 1)
others=()
while [ $# -gt 0 ]; do
  case "$1" in
    --output-dir) output="$2"; shift 2 ;;
    --only) pairs=("$2"); shift 2 ;;
    --small) flags=(--small); shift ;;
    --quick) flags=(--quick); pairs=("digits simple_cnn"); shift ;;
    *) others+=("$1"); shift ;;
  esac
done

python=python
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}" ] && python=.venv/bin/python

datasets=()
for pair in "${pairs[@]}"; do
  read -r dataset model <<< "$pair"
  echo "== $model on $dataset"
  started=$SECONDS
  "$python" -m experiments.adabatch --dataset "$dataset" --model "$model" --output-dir "$output" "${flags[@]}" ${others[@]+"${others[@]}"}
  echo "== $((SECONDS - started)) seconds"
  [[ " ${datasets[*]-} " == *" $dataset "* ]] || datasets+=("$dataset")
done
for dataset in "${datasets[@]}"; do
  "$python" -m experiments.adabatch_figures --dataset "$dataset" --output-dir "$output"
done
