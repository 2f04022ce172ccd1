"""Run as a script: per-row metrics of ranx for lists read from standard input, as JSON on standard output.

A process of its own, because ranx compiles for half a minute unless numba is switched off before it is imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["NUMBA_DISABLE_JIT"] = "1"

from ranx import Qrels, Run, evaluate


def main() -> None:
    """Answer one question: {"lists": [[item]], "positives": [[item]], "ks": [k]} → {"hr@1": [values]}."""
    question = json.load(sys.stdin)
    lists = {f"{row:06d}": items for row, items in enumerate(question["lists"])}
    qrels = Qrels({row: {str(i): 1 for i in items} for row, items in zip(lists, question["positives"], strict=True)})
    run = Run({row: {str(i): 1.0 / (rank + 1) for rank, i in enumerate(items)} for row, items in lists.items()})
    theirs = {"hr": "hit_rate", "ndcg": "ndcg", "recall": "recall", "mrr": "mrr"}
    names = {f"{ours}@{k}": f"{other}@{k}" for ours, other in theirs.items() for k in question["ks"]}
    values = evaluate(qrels, run, list(names.values()), return_mean=False)
    json.dump({ours: [float(v) for v in values[other]] for ours, other in names.items()}, sys.stdout)


if __name__ == "__main__":
    main()
