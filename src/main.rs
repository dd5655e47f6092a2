//! The program: hands the stages' registry to the runner.

use std::process::ExitCode;

/// Training allocates the same sizes again and again, and this allocator keeps freed memory at hand.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Pipelines that are compiled in, so that they run in any folder.
const SHIPPED: &[(&str, &str)] = &[
    ("arithmetic.yaml", include_str!("../pipelines/arithmetic.yaml")),
    ("methods.yaml", include_str!("../pipelines/methods.yaml")),
    ("methods/abkd.yaml", include_str!("../pipelines/methods/abkd.yaml")),
    ("methods/cross-tokenizer.yaml", include_str!("../pipelines/methods/cross-tokenizer.yaml")),
    ("methods/distillm-2.yaml", include_str!("../pipelines/methods/distillm-2.yaml")),
    ("methods/distillm.yaml", include_str!("../pipelines/methods/distillm.yaml")),
    ("methods/gkd.yaml", include_str!("../pipelines/methods/gkd.yaml")),
    ("methods/imitkd.yaml", include_str!("../pipelines/methods/imitkd.yaml")),
    ("methods/minillm.yaml", include_str!("../pipelines/methods/minillm.yaml")),
    ("methods/multi-teacher.yaml", include_str!("../pipelines/methods/multi-teacher.yaml")),
    ("methods/seqkd.yaml", include_str!("../pipelines/methods/seqkd.yaml")),
    ("paper/cpu-gpt2.yaml", include_str!("../pipelines/paper/cpu-gpt2.yaml")),
    ("paper/cpu-llama.yaml", include_str!("../pipelines/paper/cpu-llama.yaml")),
    ("paper/cpu-opt.yaml", include_str!("../pipelines/paper/cpu-opt.yaml")),
    ("paper/cpu.yaml", include_str!("../pipelines/paper/cpu.yaml")),
    ("paper/gpt2-base.yaml", include_str!("../pipelines/paper/gpt2-base.yaml")),
    ("paper/gpt2-large.yaml", include_str!("../pipelines/paper/gpt2-large.yaml")),
    ("paper/gpt2-medium.yaml", include_str!("../pipelines/paper/gpt2-medium.yaml")),
    ("paper/gpt2.yaml", include_str!("../pipelines/paper/gpt2.yaml")),
    ("paper/llama-7b.yaml", include_str!("../pipelines/paper/llama-7b.yaml")),
    ("paper/opt-1.3b.yaml", include_str!("../pipelines/paper/opt-1.3b.yaml")),
    ("paper/opt-2.7b.yaml", include_str!("../pipelines/paper/opt-2.7b.yaml")),
    ("paper/opt-6.7b.yaml", include_str!("../pipelines/paper/opt-6.7b.yaml")),
    ("paper/opt.yaml", include_str!("../pipelines/paper/opt.yaml")),
    ("paper/published.yaml", include_str!("../pipelines/paper/published.yaml")),
    ("promptkd.yaml", include_str!("../pipelines/promptkd.yaml")),
    ("response-priming.yaml", include_str!("../pipelines/response-priming.yaml")),
    ("smollm2.yaml", include_str!("../pipelines/smollm2.yaml")),
];

fn main() -> ExitCode {
    let extras = promptkd::Extras { score: stages::score::score, texts: stages::text::texts, gpus: stages::gpus };
    promptkd::main(stages::registry(), SHIPPED, &extras)
}
