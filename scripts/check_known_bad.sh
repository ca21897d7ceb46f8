#!/usr/bin/env bash
# The cross-check against a compiler that is known to be wrong: jaxlib 0.10.2 on CPU, in an environment of its own.
#
#   scripts/check_known_bad.sh [FOLDER]       minutes, most of them installation; FOLDER keeps the environment
#
# Wanted: without a flag the check fails and names the sum, and a study refuses to start; with the flag that cures it, it passes.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-$(mktemp -d)}
[ -n "${1:-}" ] || trap 'rm -rf "$folder"' EXIT
python=$folder/bin/python
if [ ! -x "$python" ]; then
  python3 -m venv "$folder"
  # Our own requirements leave this release out, so they are named here one by one.
  "$python" -m pip install --quiet jax==0.10.2 jaxlib==0.10.2 flax optax orbax-checkpoint scipy scikit-learn matplotlib tyro rich jaxtyping
fi
export PYTHONPATH=$PWD JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=0
output=$(mktemp -d)
cure="--xla_cpu_experimental_ynn_fusion_type=-reduce"

check() { "$python" -m experiments.cross_check --quick --only sum --precision float64,float32 --output-dir "$output" "$@"; }

code=0
told=$(XLA_FLAGS="" check) || code=$?
echo "$told" | grep WRONG
[ "$code" = 1 ] && grep -q "WRONG: sum of squares after a product" <<< "$told" || { echo "not caught (exit code $code)"; exit 1; }

code=0
told=$(XLA_FLAGS="" "$python" -m experiments.nose_game --quick --output-dir "$output" 2>&1) || code=$?
echo "$told" | tail -n 1
[ "$code" = 2 ] && grep -q "wrong numbers (sum of squares" <<< "$told" || { echo "a study started nevertheless (exit code $code)"; exit 1; }

XLA_FLAGS="$cure" check | tail -n 2
XLA_FLAGS="$cure" "$python" -c "import jaxbatch as jb; assert all(check.passed for check in jb.check_backend())"
echo "jaxlib 0.10.2: wrong without the flag and told so, right with it."
