"""What the PyTorch programs share: models, optimiser, the answers on standard output, memory."""

import json
import os
import sys
import time

import torch
from transformers import GPT2LMHeadModel
from transformers.utils import logging

logging.disable_progress_bar()
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def memory(field):
    """A field of the kernel's account of this process, in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


def frozen(folder, task):
    """A model that only computes, in the type that is computed in."""
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", dtype=TYPES[task["dtype"]])
    return model.to(task["device"]).eval().requires_grad_(False)


def trained(folder, task):
    """A model with f32 masters, and its optimiser."""
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    model = model.to(task["device"]).train()
    kept = [p for name, p in model.named_parameters() if name.endswith("bias") or ".ln_" in name]
    decayed = [p for name, p in model.named_parameters() if not (name.endswith("bias") or ".ln_" in name)]
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": kept, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=task["learning_rate"], fused=True)


def mixed(task):
    """Products in the type that is computed in; nothing to do in f32."""
    kind = "cpu" if task["device"] == "cpu" else "cuda"
    return torch.autocast(kind, TYPES[task["dtype"]], enabled=task["dtype"] != "f32")


def update(parameters, optimizer, loss):
    """Backward, clipping at norm 1, AdamW."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def serve(prepare):
    """Answers requests until the input ends.

    `prepare(task, way)` gives the work: a function of whether it is a check, to (tokens, checks).
    """
    out, sys.stdout = sys.stdout, sys.stderr

    def say(**answer):
        print(json.dumps(answer), file=out, flush=True)

    with open(sys.argv[1]) as file:
        task = json.load(file)
    way = sys.argv[2]
    torch.set_num_threads(task["threads"])
    on_gpu = task["device"] != "cpu"
    idle = memory("VmRSS")
    work = prepare(task, way)
    say(idle_kib=idle)
    for request in sys.stdin:
        if request.strip() == "end":
            device = torch.cuda.max_memory_allocated() // 1024 if on_gpu else None
            say(peak_kib=memory("VmHWM"), device_kib=device)
            # Worker processes of the compiler may hold the interpreter back.
            os._exit(0)
        start = time.perf_counter()
        tokens, checks = work(request.strip() == "check")
        if on_gpu:
            torch.cuda.synchronize()
        say(seconds=time.perf_counter() - start, tokens=tokens, checks=checks)
