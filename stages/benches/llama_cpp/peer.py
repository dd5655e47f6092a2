"""llama.cpp's side: reads prompts and continues them greedily, all rows of a pass in one batch."""

import ctypes
import json
import os
import sys
import time

import llama_cpp as lib
import numpy as np


def memory(field):
    """A field of the kernel's account of this process, in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))


def say(**answer):
    print(json.dumps(answer), flush=True)


def main():
    with open(sys.argv[1]) as file:
        task = json.load(file)
    prompts, length, threads = task["prompts"], task["response"], task["threads"]
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    idle = memory("VmRSS")
    model = lib.llama_model_load_from_file(task["gguf"].encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx = len(prompts) * max(256, len(prompts[0]) + length)
    settings.n_seq_max = len(prompts)
    settings.n_threads = settings.n_threads_batch = threads
    context = lib.llama_init_from_model(model, settings)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    tokens = sum(map(len, prompts))
    batch = lib.llama_batch_init(tokens, 0, 1)

    def logits(rows, position):
        """Logits behind each row of new tokens, `[rows, V]`."""
        index = 0
        last = []
        for row, ids in enumerate(rows):
            for i, token in enumerate(ids):
                batch.token[index], batch.pos[index] = token, position + i
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
                batch.logits[index] = i + 1 == len(ids)
                index += 1
            last.append(index - 1)
        batch.n_tokens = index
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        row = ctypes.c_float * vocabulary
        places = [ctypes.cast(lib.llama_get_logits_ith(context, i), ctypes.POINTER(row)) for i in last]
        return [np.frombuffer(place.contents, np.float32) for place in places]

    def write():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        written = [[] for _ in prompts]
        position, new = 0, prompts
        for _ in range(length):
            new = [[int(row.argmax())] for row in logits(new, position)]
            position += len(prompts[0]) if position == 0 else 1
            for row, ids in zip(written, new):
                row += ids
        return written

    say(idle_kib=idle)
    for request in sys.stdin:
        if request.strip() == "end":
            say(peak_kib=memory("VmHWM"), device_kib=None)
            sys.stdout.flush()
            os._exit(0)
        start = time.perf_counter()
        written = write()
        seconds = time.perf_counter() - start
        say(seconds=seconds, tokens=len(prompts) * length, checks=[float(token) for row in written for token in row])


main()
