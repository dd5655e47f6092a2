"""A batch of prompts continued by a fixed number of tokens. Ways: `generate` of transformers, and a loop of our own."""

import peer
import torch
from decode import Decoder


def prepare(task, way):
    model = peer.frozen(task["student"], task)
    ids = torch.tensor(task["prompts"], device=task["device"])
    sampling, length = task["line"]["sampling"], task["line"]["response"]
    greedy = sampling["temperature"] == 0
    if way == "generate":
        options = dict(do_sample=False)
        if not greedy:
            options = dict(do_sample=True, temperature=1.0, top_k=sampling["top_k"], top_p=sampling["top_p"])

        def write():
            mask = torch.ones_like(ids)
            written = model.generate(
                ids, attention_mask=mask, max_new_tokens=length, eos_token_id=None, pad_token_id=0, **options
            )
            return written[:, ids.shape[1] :]
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
