"""Answers to all prompts from several seeds, in batches, scored against a reference each by ROUGE-L with stemming.

The check scores given answers, since sampled ones differ. Ways: `generate`, and the decoding loop.
"""

import peer
import torch
from decode import Decoder, generate
from rouge_score import rouge_scorer
from transformers import AutoTokenizer


def prepare(task, way):
    line, device, end = task["line"], task["device"], task["end"]
    model = peer.frozen(task["student"], task)
    tokenizer = AutoTokenizer.from_pretrained(task["student"])
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    longest, size = line["response"], task["batch"]
    decoder = Decoder(model, size, line["prompt"] + longest) if way == "loop" else None

    def write(prompts):
        # Prompts of one length stand together, so that little is padded.
        widest = max(map(len, prompts))
        ids = torch.tensor([[end] * (widest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        if decoder:
            return decoder.write(ids, longest, line["sampling"], mask, end)
        return generate(model, ids, longest, line["sampling"], mask, end)

    def score(answers):
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = [scorer.score(reference, text) for reference, text in zip(task["references"], texts)]
        return 100 * sum(score["rougeL"].fmeasure for score in scores) / len(scores)

    @torch.inference_mode()
    def work(check):
        if check:
            return 0, [score(task["responses"])]
        order = sorted(range(len(task["prompts"])), key=lambda row: len(task["prompts"][row]))
        tokens = 0
        for seed in task["seeds"]:
            torch.manual_seed(seed)
            answers = [None] * len(order)
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                for row, answer in zip(rows, write([task["prompts"][row] for row in rows]).tolist()):
                    answers[row] = answer[: answer.index(end) + 1] if end in answer else answer
            tokens += sum(map(len, answers))
            score(answers)
        return tokens, []

    return work


peer.serve(prepare)
