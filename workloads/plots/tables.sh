#!/bin/sh
# Prints a table of README.md from the records beside this file, and runs what they lack.
#
#     tables.sh main8k|main16k|shadowkv|ranks|budget|ablations [--device cuda|cpu ...]
set -eu
cd "$(dirname "$0")"
table=$1
shift

at_8k="--dtype float32 --tokens 8192 --json compare-8k.json"
at_16k="--dtype float32 --tokens 16384 --json compare-16k.json"
main=full,window:0.05,oracle:0.05,landmarks:0.05,landmarks:0.05:heads=shared,landmarks:0.05:rows=residual
main=$main,chunks:0.05,quest:0.05,shadowkv,shadowkv:0.15625,shadowkv:rank=80,shadowkv:rank=160

case $table in
main8k)
    aquifer eval compare $at_8k --samples 18 --methods $main --plot compare-8k.png "$@"
    ;;
main16k)
    for task in text2json:11 needles:11 table:10; do
        aquifer eval compare $at_16k --tasks ${task%:*} --samples ${task#*:} \
            --methods $main,oracle:0.05:heads=shared,landmarks:0.05:rows=exact "$@"
    done
    ;;
shadowkv)
    aquifer eval explain shadowkv $at_8k --samples 18 "$@"
    aquifer eval explain shadowkv:0.15625 $at_8k --samples 18 "$@"
    for task in text2json:11 needles:11 table:10; do
        aquifer eval explain shadowkv $at_16k --tasks ${task%:*} --samples ${task#*:} "$@"
    done
    for task in text2json:8 needles:4 table:8; do
        aquifer eval explain shadowkv:rank=10 $at_8k --tasks ${task%:*} --samples ${task#*:} "$@"
    done
    ;;
ranks)
    methods=full
    for rank in 5 10 20 40 80 160; do
        methods=$methods,shadowkv:rank=$rank,shadowkv:0.15625:rank=$rank
    done
    for task in text2json:8 needles:4 table:8; do
        aquifer eval compare $at_8k --tasks ${task%:*} --samples ${task#*:} --methods $methods "$@"
    done
    ;;
budget)
    methods=full,oracle:0.01,oracle:0.015,oracle:0.05
    for budget in 0.01 0.015 0.03 0.05 0.1 0.15; do methods=$methods,landmarks:$budget; done
    methods=$methods,chunks:0.05,chunks:0.1,chunks:0.15,chunks:0.05:chunk=7,chunks:0.05:rows=exact
    methods=$methods,shadowkv:outliers=0,shadowkv,shadowkv:0.05,shadowkv:0.15625,shadowkv:0.3125
    aquifer eval compare $at_8k --samples 16 --methods $methods --plot budget-8k.png "$@"
    ;;
ablations)
    methods=full,oracle:0.05:heads=shared,oracle:0.01:heads=shared
    for budget in 0.05 0.01; do
        for knob in "" :rows=residual :heads=shared :mean=off; do
            methods=$methods,landmarks:$budget$knob
        done
    done
    aquifer eval compare $at_8k --samples 16 \
        --methods $methods,landmarks:0.05:rows=exact,landmarks:0.05:softmax=rest "$@"
    ;;
*)
    echo "there is no table '$table'" >&2
    exit 2
    ;;
esac
