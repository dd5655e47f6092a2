"""One update on half cross-entropy, half forward KL(teacher || student), on the tokens of the responses.

The head is applied to the positions that predict a response token, and to no others. Case `cached`: the teacher's hidden
states are made before, so that only its head is run. Ways: eager, compiled.
"""

import peer
import torch
import torch.nn.functional as F


def prepare(task, way):
    student, optimizer = peer.trained(task["student"], task)
    teacher = peer.frozen(task["teacher"], task)
    rows = [prompt + response for prompt, response in zip(task["prompts"], task["responses"])]
    ids = torch.tensor(rows, device=task["device"])
    inputs, first = ids[:, :-1].contiguous(), task["line"]["prompt"]
    labels = ids[:, first:].reshape(-1)

    def hidden(model):
        return model.transformer(inputs, use_cache=False).last_hidden_state[:, first - 1 :].flatten(0, 1)

    def taught():
        with torch.no_grad():
            return hidden(teacher)

    kept = taught() if task["line"]["case"] == "cached" else None

    def loss():
        with peer.mixed(task):
            logits = student.lm_head(hidden(student)).float()
            with torch.no_grad():
                target = teacher.lm_head(taught() if kept is None else kept).float().log_softmax(-1)
        log_probs = logits.log_softmax(-1)
        cross_entropy = F.nll_loss(log_probs, labels)
        forward_kl = F.kl_div(log_probs, target, log_target=True, reduction="sum") / len(labels)
        return 0.5 * cross_entropy + 0.5 * forward_kl

    if way == "compiled":
        loss = torch.compile(loss)

    def work(check):
        value = loss()
        peer.update(student.parameters(), optimizer, value)
        return labels.numel(), [value.item()]

    return work


peer.serve(prepare)
