//! The program: hands the stages' registry to the runner.

use std::process::ExitCode;

/// Training allocates the same sizes again and again, and this allocator keeps freed memory at hand.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pipelines that are compiled in, so that they run in any folder.
const SHIPPED: &[(&str, &str)] = &[
    ("dolly.yaml", include_str!("../pipelines/dolly.yaml")),
    ("methods.yaml", include_str!("../pipelines/methods.yaml")),
    ("methods/abkd.yaml", include_str!("../pipelines/methods/abkd.yaml")),
    ("methods/gkd.yaml", include_str!("../pipelines/methods/gkd.yaml")),
    ("methods/imitkd.yaml", include_str!("../pipelines/methods/imitkd.yaml")),
    ("methods/minillm.yaml", include_str!("../pipelines/methods/minillm.yaml")),
    ("methods/seqkd.yaml", include_str!("../pipelines/methods/seqkd.yaml")),
    ("promptkd.yaml", include_str!("../pipelines/promptkd.yaml")),
    ("response-priming.yaml", include_str!("../pipelines/response-priming.yaml")),
    ("smollm2.yaml", include_str!("../pipelines/smollm2.yaml")),
];

fn main() -> ExitCode {
    let extras = promptkd::Extras { score: stages::score::score, texts: stages::text::texts, gpus: stages::gpus };
    promptkd::main(stages::registry(), SHIPPED, &extras)
}
