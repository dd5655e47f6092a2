#!/usr/bin/env bash
# Tests the CUDA code, on the GPU if there is one, else on the software GPU, and says on which.
#
#     stages/lm/cuda/check.sh [cargo test arguments]      # by default all tests of lm that need a device
#
# The assembler also checks each kernel for the GPU it is built for: what it refuses would fail at the first launch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
. stages/lm/cuda/toolkit.sh
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/cuda}

for source in stages/lm/src/kernels/cuda/*.cu; do
    mkdir -p "$CARGO_TARGET_DIR/cubin"
    cubin=$CARGO_TARGET_DIR/cubin/$(basename "$source" .cu)
    if [ ! "$cubin" -nt "$source" ]; then
        nvcc -cubin -O3 -std=c++17 -arch="sm_$CUDA_COMPUTE_CAP" -Xptxas -v -o "$cubin" "$source" 2>"$cubin.log" ||
            { cat "$cubin.log" && exit 1; }
    fi
    grep -B1 -E '[1-9][0-9]* bytes spill' "$cubin.log" || true
done

if [ -e /dev/nvidia0 ]; then
    echo "on the GPU" >&2
else
    stages/lm/cuda/software/build.sh "$CARGO_TARGET_DIR/software"
    export CUDA_SHIM_PATH=$PWD/$CARGO_TARGET_DIR/software
    case $CARGO_TARGET_DIR in /*) CUDA_SHIM_PATH=$CARGO_TARGET_DIR/software ;; esac
    echo "on the software GPU, $CUDA_SHIM_PATH" >&2
fi
[ $# -gt 0 ] || set -- --lib --test it -- cuda
exec stages/lm/cuda/build.sh test --workspace --features cuda "$@"
