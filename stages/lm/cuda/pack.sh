#!/usr/bin/env bash
# Packs what was built with CUDA, for a machine with a GPU and neither a toolkit nor a compiler: target/cuda/pipeline.tar.xz.
#
#     stages/lm/cuda/pack.sh [EXECUTABLE ...]      # more to take along, such as benches and tests in target/cuda/debug/deps
#
# There, with the NVIDIA driver 580 or later and PyTorch for CUDA 13, whose libraries serve the program too:
#
#     tar -xf pipeline.tar.xz
#     site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
#     export CUDA_SHIM_PATH=$site/nvidia/cu13/lib:$site/nvidia/nccl/lib
#     ./pipeline run promptkd.yaml --device cuda:0
#
# A CUDA 13 toolkit in its usual place is found without CUDA_SHIM_PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
target=${CARGO_TARGET_DIR:-target/cuda}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for executable in "$target/debug/pipeline" "$@"; do
    strip -o "$folder/$(basename "$executable")" "$executable"
done
tar -C "$folder" -c . | xz -T0 -6 >"$target/pipeline.tar.xz"
du -bh "$target/pipeline.tar.xz"
