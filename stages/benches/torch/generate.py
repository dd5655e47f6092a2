"""A batch of prompts continued by a fixed number of tokens. Ways: `generate` of transformers, and a loop of our own."""

import peer
import torch
from decode import Decoder, generate


def prepare(task, way):
    model = peer.frozen(task["student"], task)
    ids = torch.tensor(task["prompts"], device=task["device"])
    sampling, length = task["line"]["sampling"], task["line"]["response"]
    greedy = sampling["temperature"] == 0
    if way == "generate":

        def write():
            return generate(model, ids, length, sampling)
    else:
        decoder = Decoder(model, len(ids), ids.shape[1] + length)

        def write():
            return decoder.write(ids, length, sampling)

    @torch.inference_mode()
    def work(check):
        written = write()
        return written.numel(), written.flatten().tolist() if greedy else []

    return work


peer.serve(prepare)
