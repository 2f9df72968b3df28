from __future__ import annotations

import json

import pytest
import torch

from smelt.distill._examples import Batches, Epochs, Pair, Weighed, encode, judged, likelihood, paired, read_examples, share, shuffled
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Training


def test_rows_are_read_and_further_columns_left(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"input": "x", "label": "y", "more": 3}\n\n{"input": "u", "label": "v", "rationale": "w"}\n')
    rows = read_examples(str(file), ("input", "label"), ("rationale",))
    assert rows == [{"input": "x", "label": "y"}, {"input": "u", "label": "v", "rationale": "w"}]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "not a line of JSON"),
        ("[1]", "a JSON object with 'input', 'label'"),
        ('{"inputs": "x", "label": "y"}', "'input' is missing; did you mean 'inputs'?"),
        ('{"input": 3, "label": "y"}', "'input' is a int"),
        ('{"input": "x", "label": " "}', "'label' is empty"),
        ('{"input": "x", "label": "\\ud800"}', "surrogate"),
    ],
)
def test_a_line_that_will_not_do_is_named(tmp_path, line, said):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"input": "x", "label": "y"}) + "\n" + line + "\n")
    with pytest.raises(SmeltError) as caught:
        read_examples(str(file), ("input", "label"))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{file}:2: ")


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(SmeltError, match="No such file"):
        read_examples(str(tmp_path / "none.jsonl"), ("input",))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SmeltError, match="no rows"):
        read_examples(str(tmp_path / "empty.jsonl"), ("input",))


def test_a_pair_ends_and_its_prompt_loses_its_beginning():
    tokenizer = tiny_tokenizer()
    prompt, said = encode(tokenizer, "def f(x):"), [*encode(tokenizer, "return"), tokenizer.eos_token_id]
    assert paired(tokenizer, "def f(x):", "return", 100) == Pair(prompt, said)
    assert paired(tokenizer, "def f(x):", "return", len(said) + 2) == Pair(prompt[-2:], said)
    assert paired(tokenizer, "def f(x):", "return", len(said)) is None
    assert paired(tokenizer, "", "return", 100) == Pair([tokenizer.eos_token_id], said)


def test_epochs_visit_everything_once_and_follow_from_the_index():
    order = Epochs(7, 3)
    seen = [order.at(i) for i in range(21)]
    assert all(sorted(seen[at : at + 7]) == list(range(7)) for at in (0, 7, 14))
    assert [Epochs(7, 3).at(i) for i in (15, 2, 20)] == [seen[15], seen[2], seen[20]]
    assert seen[:7] != seen[7:14]


def test_rows_count_answers_only_and_weights_follow_the_batch():
    settings = Training(tokens=2 * 2 * 8, context=8, batch=2)
    made = {0: [([5, 6, 7, 8], 2), ([9, 10], 1)], 1: [([1, 2, 3], 1), ([4, 5, 6], 2)]}
    rows = Batches(made.__getitem__, lambda lengths: [10.0 * n for n in lengths], settings, 99)
    assert len(rows) == 4
    assert rows[0]["input_ids"].tolist() == [5, 6, 7, 99, 99, 99, 99, 99]
    assert rows[0]["labels"].tolist() == [-100, 7, 8, -100, -100, -100, -100, -100]
    assert [rows[i]["weights"].item() for i in (2, 0, 3, 1)] == [20, 20, 10, 10]


def test_shuffled_rows_hold_every_pair_of_an_epoch():
    pairs = [Pair([i], [i + 10, 0]) for i in range(6)]
    rows = shuffled(pairs, Training(tokens=3 * 2 * 4, context=4, batch=2), 1, 0)
    assert sorted(rows[i]["input_ids"][0].item() for i in range(6)) == list(range(6))
    assert all(rows[i]["labels"][0] == rows[i]["input_ids"][0] + 10 for i in range(6))


def test_weighed_is_the_objective_times_the_weight_of_its_row():
    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    weighed, weights = Weighed(CrossEntropy()), torch.tensor([2.0, 0.0, 0.5])
    assert weighed.reads == ("student", "labels", "keep", "weights")
    plain = CrossEntropy()(logits, labels)
    got = weighed(student=logits, labels=labels, keep=labels > 0, weights=weights)
    for row in range(3):
        torch.testing.assert_close(got[row], weights[row] * plain[row])


def test_likelihood_is_the_chain_rule_one_token_at_a_time():
    model = tiny(layers=1, hidden=16, heads=2, kv_heads=1)
    model.train()
    pairs = [Pair([3, 4], [5]), Pair([7], [8, 9, 10]), Pair([3, 4, 5, 6], [7, 8])]
    loaded = Loaded(model, tiny_tokenizer(), None)
    got, greedy = judged(loaded, pairs, rows=2)
    assert torch.equal(got, likelihood(loaded, pairs))
    assert model.training
    made = loaded.model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)[0, 2:].tolist()
    assert judged(loaded, [Pair([3, 4], made), Pair([3, 4], [made[0], made[1] ^ 1])])[1].tolist() == [True, False]
    for value, right, (prompt, answer) in zip(got, greedy.tolist(), pairs, strict=True):
        total, alike = 0.0, True
        for at, token in enumerate(answer):
            logits = model.eval()(input_ids=torch.tensor([prompt + answer[:at]])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            alike &= logits.argmax().item() == token
        assert right == alike
        assert value.item() == pytest.approx(total, rel=1e-4)


def test_copies_are_held_out_together_and_the_share_is_uniform():
    found = [share(str(i)) for i in range(2000)]
    assert share("7") == found[7]
    assert sum(x < 0.2 for x in found) / 2000 == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 2000) ** 0.5)
