"""One round of PromptKD, in the order of the published program.

The student writes a response to every prompt (left-padded to the longest prompt allowed); a response that was cut off
ends with a forced end token. The text is right-padded to the full length. The teacher's soft prompt takes one step on
KL(prompted teacher || student) + w KL(prompted teacher || plain teacher); then the student takes one on
KL(student || prompted teacher), with the prompt as it now is.

Ways: `published` computes logits of all positions at the full width, and writes by `generate`. `tight` is what PyTorch
can do for the same numbers: it writes by the decoding loop, pads no further than the longest row, and applies the heads
to positions that predict a response token only.
"""

import peer
import torch
import torch.nn.functional as F
from decode import Decoder, generate


def prepare(task, way):
    line, device = task["line"], task["device"]
    end, widest, longest = task["end"], line["prompt"], line["response"]
    student, optimizer = peer.trained(task["student"], task)
    teacher = peer.frozen(task["teacher"], task)
    start = teacher.transformer.wte.weight[torch.tensor(task["prompt_ids"], device=device)]
    prompt = torch.nn.Parameter(start.float().clone())
    tuner = torch.optim.AdamW([prompt], lr=task["learning_rate"], weight_decay=1e-2, fused=True)
    sampling = line["sampling"]
    decoder = None
    if way == "tight":
        decoder = Decoder(student, len(task["prompts"]), widest + longest, peer.TYPES[task["dtype"]])

    def write():
        ids = torch.full((len(task["prompts"]), widest), end, device=device)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(task["prompts"]):
            ids[row, widest - len(text) :] = torch.tensor(text, device=device)
            mask[row, widest - len(text) :] = 1
        student.eval()
        with torch.inference_mode(), peer.mixed(task):
            if decoder:
                written = decoder.write(ids, longest, sampling, mask, end)
            else:
                written = generate(student, ids, longest, sampling, mask, end)
        responses = written.tolist()
        for response in responses:
            if end in response:
                del response[response.index(end) + 1 :]
            else:
                response[-1] = end
        return responses

    def lay_out(responses):
        """Inputs, mask and labels of prompt and response, right-padded; -100 where nothing is to be predicted."""
        rows = [prompt + response for prompt, response in zip(task["prompts"], responses)]
        width = max(map(len, rows)) if way == "tight" else widest + longest
        ids = torch.full((len(rows), width), end)
        labels = torch.full((len(rows), width - 1), -100)
        mask = torch.zeros(len(rows), width - 1, dtype=torch.long)
        for row, text in enumerate(rows):
            ids[row, : len(text)] = torch.tensor(text)
            first = len(task["prompts"][row]) - 1
            labels[row, first : len(text) - 1] = ids[row, first + 1 : len(text)]
            mask[row, : len(text) - 1] = 1
        return ids[:, :-1].to(device), mask.to(device), (labels != -100).to(device)

    def logits(model, text, with_prompt=False):
        """Logits of text positions; in the way `tight`, of those that predict a response token."""
        inputs, mask, predicts = text
        with peer.mixed(task):
            if with_prompt:
                embedded = model.transformer.wte(inputs)
                vectors = prompt.to(embedded.dtype).expand(len(inputs), -1, -1)
                embedded = torch.cat([vectors, embedded], 1)
                mask = torch.cat([mask.new_ones(len(inputs), len(prompt)), mask], 1)
                hidden = model.transformer(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
                hidden = hidden.last_hidden_state
            else:
                hidden = model.transformer(inputs, attention_mask=mask, use_cache=False).last_hidden_state
            if way == "tight":
                return model.lm_head(hidden[:, -inputs.shape[1] :][predicts])
            return model.lm_head(hidden)[:, -inputs.shape[1] :]

    def divergence(logits, target, text):
        """KL(softmax(logits) || softmax(target)), the mean over response tokens. The target is no function of weights."""
        inputs, mask, predicts = text
        log_s = F.log_softmax(logits, -1, dtype=torch.float32)
        log_t = F.log_softmax(target, -1, dtype=torch.float32)
        kl = (log_s.exp() * (log_s - log_t)).sum(-1)
        return kl.mean() if way == "tight" else (kl * predicts).sum() / predicts.sum()

    def work(check):
        responses = task["responses"] if check else write()
        text = lay_out(responses)
        tokens = sum(map(len, responses))

        with torch.no_grad():
            guide = logits(student, text)
            plain = logits(teacher, text)
        prompted = logits(teacher, text, with_prompt=True)
        guidance = divergence(prompted, guide, text)
        regulariser = divergence(prompted, plain, text)
        peer.update([prompt], tuner, guidance + task["regulariser"] * regulariser)
        del guide, plain, prompted

        student.train()
        with torch.no_grad():
            target = logits(teacher, text, with_prompt=True)
        loss = divergence(logits(student, text), target, text)
        peer.update(student.parameters(), optimizer, loss)
        return tokens, [guidance.item(), regulariser.item(), loss.item()] if check else []

    return work


peer.serve(prepare)
