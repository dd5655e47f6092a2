"""Counts the words of answers: a folder with a corpus in, a folder for metrics out."""

import argparse
import json
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("corpus", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--split", default="train")
args = parser.parse_args()

rows = [json.loads(line) for line in (args.corpus / f"{args.split}.jsonl").read_text().splitlines()]
answers = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]
print(f"read {len(rows)} rows")  # to the log of the stage
words = sum(len(answer.split()) for answer in answers) / max(len(answers), 1)
(args.out / "metrics.json").write_text(json.dumps({"rows": len(rows), "words": words}))
