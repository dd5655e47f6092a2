"""GPT-2 written out for decoding: keys and values in tensors that are made once, nothing of a module's overhead."""

import torch
import torch.nn.functional as F


class Decoder:
    """Writes with the weights of a `GPT2LMHeadModel`, `rows` rows of at most `length` positions.

    On the CPU attention sees the part of the cache that is filled. On a GPU it sees all of it under a mask, so that
    every token is the same graph, which is compiled and captured once.
    """

    def __init__(self, model, rows, length):
        self.transformer = model.transformer
        self.heads = model.config.n_head
        width = model.config.n_embd
        weight = model.transformer.wte.weight
        self.fixed = weight.device.type != "cpu"
        shape = (rows, self.heads, length, width // self.heads)
        self.cache = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.transformer.h]
        self.steps = torch.arange(length, device=weight.device)
        self.next = torch.compile(self.logits, mode="reduce-overhead") if self.fixed else self.logits

    def logits(self, ids, positions, end):
        """Logits after the last of `ids` (rows, T), which stand at `positions` (T,); the last of them is `end` - 1."""
        t = self.transformer
        rows, count = ids.shape
        x = F.embedding(ids, t.wte.weight) + F.embedding(positions, t.wpe.weight)
        mask = self.steps <= positions[:, None] if self.fixed else None
        for block, (keys, values) in zip(t.h, self.cache):
            h = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
            qkv = linear(h, block.attn.c_attn).view(rows, count, 3, self.heads, -1)
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            if self.fixed:
                keys.index_copy_(2, positions, k)
                values.index_copy_(2, positions, v)
                a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            else:
                keys[:, :, end - count : end] = k
                values[:, :, end - count : end] = v
                a = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=count > 1)
            x = x + linear(a.transpose(1, 2).reshape(rows, count, -1), block.attn.c_proj)
            h = F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias, block.ln_2.eps)
            x = x + linear(F.gelu(linear(h, block.mlp.c_fc), approximate="tanh"), block.mlp.c_proj)
        x = F.layer_norm(x[:, -1], x.shape[-1:], t.ln_f.weight, t.ln_f.bias, t.ln_f.eps)
        return F.linear(x, t.wte.weight)

    def write(self, ids, length, sampling):
        """Continues `ids` (rows, T) by `length` tokens: (rows, `length`)."""
        start = ids.shape[1]
        logits = self.logits(ids, self.steps[:start], start)
        written = ids.new_empty(len(ids), length)
        for t in range(length):
            written[:, t] = choose(logits.float(), sampling)
            if t + 1 < length:
                end = start + t + 1
                logits = self.next(written[:, t : t + 1], self.steps[end - 1 : end], end if not self.fixed else 0)
        return written


def linear(x, layer):
    """A layer of GPT-2, whose weight is (in, out)."""
    return torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight).view(*x.shape[:-1], -1)


def choose(logits, sampling):
    """The next token of every row. Top-p looks at what top-k left, so that nothing of the vocabulary's size is sorted."""
    if sampling["temperature"] == 0:
        return logits.argmax(-1)
    if sampling["top_k"] == 0 and sampling["top_p"] == 1:
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    likeliest, tokens = logits.topk(sampling["top_k"] or logits.shape[-1])
    probabilities = likeliest.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling["top_p"], 0)
    return tokens.gather(1, torch.multinomial(probabilities, 1)).squeeze(1)
