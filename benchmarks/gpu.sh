#!/usr/bin/env bash
# The commands of benchmarks/README.md for a GPU, run on this one.
#
#   benchmarks/gpu.sh                      everything
#   benchmarks/gpu.sh restore throughput   some sections: the functions below
#
# Adds one line of JSON per benchmark to $RESULTS (gpu.jsonl), which `aquifer bench plot` draws. A benchmark
# that fails, or takes longer than $LIMIT_SECONDS (600), is named at the end, and the others run all the same.
# $AQUIFER names the program, $WEIGHTS a folder for 16 GB of random weights. In /dev/shm they are read faster,
# but 128 GiB of host memory do not hold them beside the 16 contexts of `throughput`.
set -uo pipefail

AQUIFER=${AQUIFER:-aquifer}
RESULTS=${RESULTS:-gpu.jsonl}
LIMIT_SECONDS=${LIMIT_SECONDS:-600}
model=(--geometry llama-3.1-8b ${WEIGHTS:+--weights "$WEIGHTS"})
codec=(--codec aqua:2:int8)
long=(--tokens 131072 --budget 0.032)
failed=()

bench() {
  echo "+ aquifer bench $*"
  timeout "$LIMIT_SECONDS" $AQUIFER bench "$@" "${model[@]}" --json "$RESULTS" || failed+=("$*")
}

restore() {
  bench restore --tokens 32768 --repeat 5 "${codec[@]}" --peer raw-copy --peer hf-dynamic
  bench restore --tokens 32768 --requests 16 --repeat 2 "${codec[@]}" --peer raw-copy
  bench restore --tokens 32768 --repeat 5 --codec aqua:2
}

store() { bench store --tokens 32768 --repeat 6 "${codec[@]}"; }

redis() { bench redis --tokens 32768 --repeat 3 "${codec[@]}"; }

longdoc() {
  bench longdoc --path recompute --path gpu --path ram-codec --path redis-codec "${codec[@]}"
  bench longdoc --documents 4 --path ram-raw --path redis-raw "${codec[@]}"
}

prefill() { bench prefill --tokens 131072 --repeat 1 --peer hf-dynamic; }

decode() {
  bench decode --tokens 1024 --repeat 3 --peer hf-static-graph
  bench decode --tokens 1024 --batch 16 --repeat 3 "${codec[@]}"
  bench decode --tokens 32768 --repeat 2 "${codec[@]}"
  bench decode --tokens 32768 --batch 16 --repeat 2 "${codec[@]}"
}

modes() {
  bench decode "${long[@]}" --repeat 2 --new-tokens 24 "${codec[@]}" --mode resident --mode selective \
    --mode streamed --mode verified --rows trace --rows misses --accept 0.85
}

offloaded() {
  bench decode "${long[@]}" --repeat 1 --new-tokens 6 "${codec[@]}" --mode selective --rows trace \
    --peer hf-offloaded
}

throughput() {
  bench throughput --tokens 131072 --contexts 6 --repeat 1 --mode resident --gpu-kv-bytes 110000000000 "${codec[@]}"
  bench throughput "${long[@]}" --contexts 16 --repeat 1 --mode selective --new-tokens 32 --rows trace \
    --rows misses --gpu-kv-bytes 110000000000 "${codec[@]}"
}

kernels() { bench kernels --tokens 131072; }

sections=(restore store redis longdoc prefill decode modes offloaded throughput kernels)
(($#)) || set -- "${sections[@]}"
for section in "$@"; do
  if ! printf '%s\n' "${sections[@]}" | grep -qxF -- "$section"; then
    echo "no section $section; there are ${sections[*]}" >&2
    exit 2
  fi
done
for section in "$@"; do
  "$section"
done
if ((${#failed[@]})); then
  printf 'failed: aquifer bench %s\n' "${failed[@]}" >&2
  exit 1
fi
