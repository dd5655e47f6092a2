# For other scripts to source: finds or installs NVIDIA's compiler, makes the shims, and exports what a build with CUDA needs.
# What can be set is said in build.sh.
cuda=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${CUDA_BUILD_HOME:-$HOME/.cache/pipeline-cuda}
mkdir -p "$home"
exec {cuda_lock}>"$home/lock"
flock "$cuda_lock"

# A toolkit to build with: the machine's own, or wheels. 13.0 is what driver 580 understands: later compilers write newer PTX.
case ${CUDA_HOME:-} in "$home"/*) unset CUDA_HOME ;; esac # set by this script, around it
if [ -z "${CUDA_HOME:-}" ] || ! "$CUDA_HOME/bin/nvcc" --version >/dev/null 2>&1; then
    if [ ! -e "$home/wheels/complete" ]; then
        "${PYTHON:-python3}" -m venv "$home/wheels"
        "$home/wheels/bin/pip" install --quiet nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
            nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
        touch "$home/wheels/complete"
    fi
    CUDA_HOME=$(echo "$home"/wheels/lib/python3*/site-packages/nvidia/cu13)
fi
version=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/\1 \2/p')
read -r major minor <<<"$version"

# A tree in the shape of a toolkit, whose libraries are the shims.
tree=$home/toolkit-$major.$minor
mkdir -p "$tree/lib64"
for part in bin include nvvm; do [ ! -e "$CUDA_HOME/$part" ] || ln -sfn "$CUDA_HOME/$part" "$tree/$part"; done
for folder in lib64 lib; do
    [ ! -e "$CUDA_HOME/$folder/libcudart_static.a" ] || ln -sfn "$CUDA_HOME/$folder/libcudart_static.a" "$tree/lib64/libcudart.a"
done

# The functions of a library are those that cudarc declares.
cargo fetch --locked --quiet --manifest-path "$cuda/../Cargo.toml"
cudarc=$(cargo metadata --locked --manifest-path "$cuda/../Cargo.toml" --format-version 1 --features cuda |
    "${PYTHON:-python3}" -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "cudarc": print(os.path.dirname(package["manifest_path"]))')
shim() { # name, folder of cudarc, file to open, code of a library that is missing
    local work=$tree/shims
    mkdir -p "$work"
    grep -oE '^ +(pub )?fn (cu|nvrtc|p?nccl)[A-Za-z0-9_]+\(' "$cudarc/src/$2/sys/mod.rs" |
        grep -oE '(cu|nvrtc|p?nccl)[A-Za-z0-9_]+' | grep -vx culib | sort -u | awk '{ printf "ENTRY(%s, %d)\n", $1, NR - 1 }' >"$work/$1.h"
    gcc -O2 -fPIC -DENTRIES="\"$work/$1.h\"" -DSONAME="\"$3\"" -DMISSING="$4" -c "$cuda/shim.c" -o "$work/$1.o"
    ar rcs "$tree/lib64/lib$1.a.new" "$work/$1.o"
    mv "$tree/lib64/lib$1.a.new" "$tree/lib64/lib$1.a"
}
stamp=$(cat "$cuda/shim.c" "$cuda/toolkit.sh" | sha256sum | cut -c1-16)-$(basename "$cudarc")
if [ "$(cat "$tree/shims/stamp" 2>/dev/null)" != "$stamp" ]; then
    shim cuda driver libcuda.so.1 100
    shim cublas cublas "libcublas.so.$major" 1
    shim cublasLt cublaslt "libcublasLt.so.$major" 1
    shim curand curand libcurand.so.10 203
    shim nvrtc nvrtc "libnvrtc.so.$major" 8
    shim nccl nccl libnccl.so.2 2
    echo "$stamp" >"$tree/shims/stamp"
fi
exec {cuda_lock}>&-

export CUDA_HOME=$tree CUDA_PATH=$tree CUDA_ROOT=$tree NVCC=$tree/bin/nvcc PATH=$tree/bin:$PATH
export CUDARC_CUDA_VERSION=$major"0"$minor"0" CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
