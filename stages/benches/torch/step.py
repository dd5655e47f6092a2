"""One update on cross-entropy; every token of a row predicts the next. Ways: eager, compiled."""

import peer
import torch
import torch.nn.functional as F


def prepare(task, way):
    model, optimizer = peer.trained(task["student"], task)
    rows = [prompt + response for prompt, response in zip(task["prompts"], task["responses"])]
    ids = torch.tensor(rows, device=task["device"])
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)

    def loss():
        with peer.mixed(task):
            logits = model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().view(labels.numel(), -1), labels)

    if way == "compiled":
        loss = torch.compile(loss)

    def work(check):
        value = loss()
        peer.update(model.parameters(), optimizer, value)
        return labels.numel(), [value.item()]

    return work


peer.serve(prepare)
