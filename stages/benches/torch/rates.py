"""What the machine can do by PyTorch: operations a second of a product of matrices, and on a GPU bytes a second.

    python rates.py DEVICE THREADS
"""

import json
import sys
import time

import torch


def best(work, on_gpu, repeats=4):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    device, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    on_gpu = device != "cpu"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (3072, torch.float32)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    operations = 2 * n**3 / best(lambda: torch.mm(a, b), on_gpu)
    bytes_a_second = 0.0
    if on_gpu:
        source = torch.zeros(1 << 30, dtype=torch.bfloat16, device=device)
        target = torch.empty_like(source)
        bytes_a_second = 2 * source.nbytes / best(lambda: target.copy_(source), on_gpu)
    print(json.dumps({"operations": operations, "bytes": bytes_a_second}))


main()
