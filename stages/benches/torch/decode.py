"""The two ways to write text: `generate` of transformers, and GPT-2 written out for decoding.

The latter has keys and values in tensors that are made once, and nothing of a module's overhead.
"""

import torch
import torch.nn.functional as F


class Decoder:
    """Writes with the weights of a `GPT2LMHeadModel`, `rows` rows of at most `length` positions.

    On the CPU attention sees the part of the cache that is filled. On a GPU it sees all of it under a mask, so that
    every token is the same graph, which is compiled and captured once.
    """

    def __init__(self, model, rows, length, dtype=None):
        self.transformer = model.transformer
        self.heads = model.config.n_head
        weight = model.transformer.wte.weight
        self.fixed = weight.device.type != "cpu"
        shape = (rows, self.heads, length, model.config.n_embd // self.heads)
        empty = torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device)
        self.cache = [(empty.clone(), empty.clone()) for _ in model.transformer.h]
        self.places = torch.arange(length, device=weight.device)
        self.next = torch.compile(self.logits, mode="reduce-overhead") if self.fixed else self.logits

    def logits(self, ids, positions, places, mask, end):
        """Logits after the last of `ids` (rows, T).

        They stand at `positions` of their row and at `places` (T,) of the cache, the last of which is `end` - 1; `mask`
        (rows, 1, T, seen) says what attention sees, and None that it sees all before.
        """
        t = self.transformer
        rows, count = ids.shape
        x = F.embedding(ids, t.wte.weight) + F.embedding(positions, t.wpe.weight)
        for block, (all_keys, all_values) in zip(t.h, self.cache):
            h = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
            qkv = linear(h, block.attn.c_attn).view(rows, count, 3, self.heads, -1)
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            keys, values = all_keys[:rows], all_values[:rows]
            if self.fixed:
                keys.index_copy_(2, places, k)
                values.index_copy_(2, places, v)
            else:
                keys[:, :, end - count : end] = k
                values[:, :, end - count : end] = v
                keys, values = keys[:, :, :end], values[:, :, :end]
            causal = mask is None and count > 1
            a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
            x = x + linear(a.transpose(1, 2).reshape(rows, count, -1), block.attn.c_proj)
            h = F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias, block.ln_2.eps)
            x = x + linear(F.gelu(linear(h, block.mlp.c_fc), approximate="tanh"), block.mlp.c_proj)
        x = F.layer_norm(x[:, -1], x.shape[-1:], t.ln_f.weight, t.ln_f.bias, t.ln_f.eps)
        return F.linear(x, t.wte.weight)

    def write(self, ids, length, sampling, given=None, stop=None):
        """Continues `ids` (rows, T) by up to `length` tokens.

        `given` (rows, T) is 0 where a row is padded on its left. A row that has written `stop` writes only `stop`, and
        when all have, the writing ends.
        """
        rows, start = ids.shape
        if given is None:
            offset = ids.new_zeros(rows)
        else:
            offset = start - given.sum(1)
        padded = bool(offset.any())
        finished = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        written = ids.new_full((rows, length), 0 if stop is None else stop)

        def feed(compute, tokens, places, end):
            positions = (places - offset[:, None]).clamp(min=0)
            mask = None
            if padded or self.fixed:
                seen = self.places if self.fixed else self.places[:end]
                mask = (seen <= places[:, None]) & (seen >= offset[:, None, None])
                # A place in the padding sees itself, so that no row of the softmax is empty.
                mask = (mask | (seen == places[:, None]))[:, None]
            return compute(tokens, positions, places, mask, 0 if self.fixed else end)

        logits = feed(self.logits, ids, self.places[:start], start)
        for t in range(length):
            chosen = choose(logits.float(), sampling)
            if stop is not None:
                chosen = chosen.masked_fill(finished, stop)
                finished |= chosen == stop
            written[:, t] = chosen
            if t + 1 == length or (stop is not None and bool(finished.all())):
                return written[:, : t + 1]
            end = start + t + 1
            logits = feed(self.next, written[:, t : t + 1].contiguous(), self.places[end - 1 : end], end)


def generate(model, ids, length, sampling, given=None, stop=None):
    """What `Decoder.write` does, by transformers."""
    options = dict(do_sample=False)
    if sampling["temperature"] != 0:
        options = dict(do_sample=True, temperature=1.0, top_k=sampling["top_k"], top_p=sampling["top_p"])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if given is None else given,
        max_new_tokens=length,
        eos_token_id=stop,
        pad_token_id=0 if stop is None else stop,
        **options,
    )
    return written[:, ids.shape[1] :]


def linear(x, layer):
    """A layer of GPT-2, whose weight is (in, out)."""
    return torch.addmm(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight).view(*x.shape[:-1], -1)


def choose(logits, sampling):
    """The next token of every row. Top-p looks at what top-k left, so that nothing of the vocabulary's size is sorted."""
    if sampling["temperature"] == 0:
        return logits.argmax(-1)
    if sampling["top_k"] == 0 and sampling["top_p"] == 1:
        return draw(logits.softmax(-1))
    likeliest, tokens = logits.topk(sampling["top_k"] or logits.shape[-1])
    probabilities = likeliest.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling["top_p"], 0)
    return tokens.gather(1, draw(probabilities)[:, None]).squeeze(1)


def draw(probabilities):
    """One draw a row, from one uniform number: `torch.multinomial` takes one for every token, and twice the time."""
    sums = probabilities.cumsum(-1)
    threshold = torch.rand_like(sums[:, :1]) * sums[:, -1:]
    return torch.searchsorted(sums, threshold, right=True).squeeze(1).clamp(max=sums.shape[-1] - 1)
