from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch

from smelt.evaluate.lm_eval import LmEval, metrics
from smelt.spec import SmeltError

TASK = """
task: smelt_made
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["x", "name"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def test_a_clear_line_when_it_is_not_installed(variant, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SmeltError, match=r"lm-eval is not installed.*pip install 'smelt\[lm-eval\]'"):
        LmEval(tasks=("arc_easy",))(variant)


def test_figures_keep_their_direction_and_their_parts():
    found = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "word_perplexity,none": 7.0, "f1,strict": 0.25, "n,none": math.nan}
        },
        "higher_is_better": {"t": {"acc": True, "word_perplexity": False}},
        "samples": {
            "t": [
                *({"filter": "none", "acc": a, "word_perplexity": (-3.0, 4)} for a in (0.0, 1.0, 1.0, 0.0)),
                *({"filter": "strict", "f1": f} for f in (0.0, 0.5)),
            ]
        },
    }
    acc, perplexity, f1 = metrics(found, "t")
    assert (acc.name, acc.value, acc.better, acc.samples) == ("lm_eval_t_acc", 0.5, "higher", (0.0, 1.0, 1.0, 0.0))
    assert (perplexity.name, perplexity.better, perplexity.samples) == ("lm_eval_t_word_perplexity", "lower", ())
    assert (f1.name, f1.samples, f1.weights) == ("lm_eval_t_f1_strict", (0.0, 0.5), (1.0, 1.0))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("default")
def test_a_local_task_scores_what_the_model_likes_better(variant, tmp_path):
    documents = [{"text": f"def f{i}(self): return", "label": i % 2} for i in range(6)]
    (tmp_path / "documents.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(tmp_path / "documents.json")))
    (found,) = LmEval(tasks=("smelt_made",), include=str(tmp_path), limit=5)(variant)
    right = []
    for document in documents[:5]:
        likelihood = []
        for choice in (" x", " name"):
            context, rest = (variant.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (document["text"], choice))
            scores = variant.model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
            likelihood.append(sum(float(scores[len(context) + i - 1, t].detach()) for i, t in enumerate(rest)))
        right.append(float((likelihood[1] > likelihood[0]) == (document["label"] == 1)))
    assert (found.name, found.samples, found.value) == ("lm_eval_smelt_made_acc", tuple(right), sum(right) / 5)
    with pytest.raises(SmeltError, match="did you mean 'hellaswag'"):
        LmEval(tasks=("hellaswagg",))(variant)
