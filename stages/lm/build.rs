//! Compiles the CUDA kernels, `src/kernels/cuda/*.cu`, to PTX: `$OUT_DIR/NAME.ptx`. Without feature `cuda` there is nothing to do.
//!
//! The compiler is `NVCC`, else that of `CUDA_HOME`, else the one on the path. `CUDA_COMPUTE_CAP` is the oldest GPU to run
//! on, as in 90 for 9.0: the driver compiles PTX for the one it finds.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: &str = "src/kernels/cuda";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={KERNELS}");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".into());
    let folder = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for entry in fs::read_dir(KERNELS).expect("the folder of kernels is there") {
        let source = entry.expect("the folder of kernels can be read").path();
        if source.extension().is_some_and(|extension| extension == "cu") {
            compile(&source, &capability, &folder);
        }
    }
}

fn compile(source: &Path, capability: &str, folder: &Path) {
    let compiler = compiler();
    let name = source.with_extension("ptx");
    let status = Command::new(&compiler)
        .args(["-ptx", "-O3", "-std=c++17", &format!("-arch=compute_{capability}"), "-I", KERNELS, "-o"])
        .arg(folder.join(name.file_name().expect("a kernel has a file name")))
        .arg(source)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("`{}` cannot compile {}: {status}", compiler.display(), source.display()),
        Err(error) => panic!(
            "feature `cuda` needs NVIDIA's compiler, and `{}` does not start: {error}. \
             `stages/lm/cuda/build.sh build --features cuda` brings one along; NVCC or CUDA_HOME name another",
            compiler.display()
        ),
    }
}

fn compiler() -> PathBuf {
    if let Some(compiler) = env::var_os("NVCC") {
        return compiler.into();
    }
    let toolkit = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    toolkit.filter(|compiler| compiler.exists()).unwrap_or_else(|| "nvcc".into())
}
