#!/usr/bin/env bash
# Builds the software GPU: libraries that do what CUDA's do, on the processor, and the kernels compiled for it.
#
#     stages/lm/cuda/software/build.sh FOLDER [KERNELS.cu ...]
#
# A program of build.sh runs on it with CUDA_SHIM_PATH=FOLDER. Kernels are src/kernels/cuda/*.cu and those of candle that work on
# tensors. SOFTWARE_GPU_CHECKS are the checks compiled into kernels: alignment, bounds of arrays and more; empty for none.
set -euo pipefail
shopt -s nullglob
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/../toolkit.sh"
out=$(mkdir -p "$1/kernels" && cd "$1" && pwd)
shift
candle=$(cargo metadata --locked --format-version 1 --features cuda --manifest-path "$here/../../Cargo.toml" |
    grep -oE '[^"]*/candle-kernels-[^"/]*/Cargo.toml' | head -1 | xargs dirname)
sources=("$@")
if [ ${#sources[@]} = 0 ]; then
    sources=("$here"/../../src/kernels/cuda/*.cu)
    for name in affine binary cast fill indexing reduce sort ternary unary; do sources+=("$candle/src/$name.cu"); done
fi

for i in "${!sources[@]}"; do sources[i]=$(realpath "${sources[i]}"); done

common=(-std=c++17 -fno-strict-aliasing -fPIC -pthread -fno-extern-tls-init -w
    -I "$here/include" -I "$CUDA_HOME/include" -I "$CUDA_HOME/include/cccl")
checks=${SOFTWARE_GPU_CHECKS-"-fsanitize=undefined -fno-sanitize=vptr,signed-integer-overflow -fno-sanitize-recover=all"}
stale() { # whether a file was made of other sources than these
    local made=$1
    shift
    stamp=$(cat "$@" "$here"/*.h "$here"/include/* "$0" | sha256sum)$checks
    [ ! -e "$made" ] || [ "$(cat "$made.stamp" 2>/dev/null)" != "$stamp" ]
}

library() { # name, sources
    local name=$1
    shift
    local stamp
    stale "$out/$name" "$@" || return 0
    g++ -O3 -march=native "${common[@]}" -Wall -shared -o "$out/$name.new" "$@" -ldl
    mv "$out/$name.new" "$out/$name"
    echo "$stamp" >"$out/$name.stamp"
}
kernels() { # file.cu: one library a file, because two files may use one name for different functions
    local name
    name=$(basename "$1" .cu)
    case $1 in "$candle"/*) name=candle-$name ;; esac
    local made=$out/kernels/$name.so
    local stamp
    stale "$made" "$1" "$(dirname "$1")"/*.cuh || return 0
    local flags=("${common[@]}" -include "$here/kernel.h" -I "$(dirname "$1")")
    local text
    text=$(g++ "${flags[@]}" -DSOFTWARE_LIST -x c++ -E -P "$1" | tr '\n' ' ')
    {
        echo "#include \"$1\""
        # Dynamic shared memory has the name that the kernel gives it; all names of a file are the same memory.
        echo 'extern "C" { alignas(1024) thread_local char software_dynamic[software::DYNAMIC_BYTES]; }'
        echo 'static char *software_shared() { return software_dynamic; }'
        local kernel='extern\s*"C"\s*__global__\s+(?:void\s+|__launch_bounds__\s*\([^)]*\)\s*)+\K\w+(?=\s*\()'
        { grep -oP "$kernel" <<<"$text" || true; } | sort -u | while read -r name; do
            echo "static software::Announce announce_$name({\"$name\","
            echo "    [](void **arguments) { return software::bind($name, arguments); }, software_shared});"
        done
    } >"$made.cpp"
    local aliases=()
    while read -r variable; do [ -z "$variable" ] || aliases+=("-Wl,--defsym=$variable=software_dynamic"); done < <(
        grep -oP 'extern\s*__shared__[^;]*?\K\w+(?=\s*\[\s*\]\s*;)' <<<"$text" | sort -u)
    g++ -O2 -march=native $checks "${flags[@]}" -shared "${aliases[@]}" -o "$made.new" "$made.cpp"
    mv "$made.new" "$made"
    echo "$stamp" >"$made.stamp"
}

# Two at a time.
library libcuda.so.1 "$here/driver.cpp" "$here/block.cpp" &
library libcublas.so.13 "$here/blas.cpp"
library libcurand.so.10 "$here/rand.cpp"
wait $!
running=()
for source in "${sources[@]}"; do
    kernels "$source" &
    running+=($!)
    if [ ${#running[@]} = 2 ]; then
        wait "${running[0]}"
        running=("${running[1]}")
    fi
done
for job in "${running[@]}"; do wait "$job"; done

# Kernels whose sources are gone.
for made in "$out"/kernels/*.so; do
    [ -e "$(sed -n '1s/#include "\(.*\)"/\1/p' "$made.cpp")" ] || rm -f "$made"*
done
