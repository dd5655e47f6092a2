#!/usr/bin/env bash
# Runs cargo with all that CUDA needs, on a machine with or without a GPU, a driver or a toolkit:
#
#     stages/lm/cuda/build.sh build --workspace --features cuda        # target/cuda/debug/pipeline
#
# The compiler is that of CUDA_HOME where it names a toolkit; else NVIDIA's wheels are installed once (290 MB, NVIDIA's licence:
# they are never committed). Libraries are shims (shim.c), so the program starts anywhere and runs on the CPU where there is no GPU.
#
# CUDA_COMPUTE_CAP    the GPU's compute capability without its dot; 90 (H100, H200) is built for those alone
# CUDA_BUILD_HOME     where compiler and shims are kept; ~/.cache/pipeline-cuda
# CARGO_TARGET_DIR    target/cuda: another folder than that of builds without CUDA, which else would be built again each time
# PYTHON              installs the wheels; python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
. stages/lm/cuda/toolkit.sh
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/cuda}
exec cargo "$@"
