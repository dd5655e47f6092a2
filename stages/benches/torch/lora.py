"""One update of a low-rank adapter on cross-entropy, by PEFT. Ways: eager, compiled."""

import os

import peer
import torch
import torch.nn.functional as F
from peft import PeftModel


def prepare(task, way):
    model = peer.frozen(task["student"], task)
    model = PeftModel.from_pretrained(model, os.path.join(task["student"], "adapter"), is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task["learning_rate"], weight_decay=1e-2, fused=True)
    rows = [prompt + response for prompt, response in zip(task["prompts"], task["responses"])]
    ids = torch.tensor(rows, device=task["device"])
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)

    def loss():
        with peer.mixed(task):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().view(labels.numel(), -1), labels)

    if way == "compiled":
        loss = torch.compile(loss)

    def work(check):
        value = loss()
        peer.update(trained, optimizer, value)
        return labels.numel(), [value.item()]

    return work


peer.serve(prepare)
