"""The helper smelt/align/_pairs.py: reading, padding, log-probabilities, and preference training from end to end."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from smelt._train_loop import train
from smelt.align import READS
from smelt.align._pairs import Pair, Pairs, answers, continuations, preference_step, read_pairs
from smelt.align.dpo import DPO
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Training, reads

GOOD = {"prompt": "def f(x):", "chosen": "\n    return x", "rejected": "\n    pass", "score": 3}
TEXTS = ["".join(f"name_{i}_{j} = f({i * j % 13})\n" for j in range(30)) for i in range(6)]


def test_rows_are_read(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"chosen": "é🙂"})).encode())
    assert list(read_pairs(file)) == [Pair("def f(x):", "\n    return x", "\n    pass"), Pair("def f(x):", "é🙂", "\n    pass")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not a line of JSON"),
        (b"[1, 2]", "a JSON object"),
        (b'"text"', "a JSON object"),
        (b"\xff\xfe", "not a line of JSON in UTF-8"),
        (b"[" * 100_000, "not a line of JSON"),
        (json.dumps({"prompt": "a", "chosen": "b"}).encode(), "'rejected' is missing; there is 'prompt', 'chosen'"),
        (b"{}", "'prompt' is missing; there is nothing"),
        (json.dumps(GOOD | {"chosen": None}).encode(), "'chosen' is a NoneType"),
        (json.dumps(GOOD | {"rejected": [{"role": "assistant", "content": "x"}]}).encode(), "'rejected' is a list"),
        (b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, said):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes((json.dumps(GOOD) + "\n\n").encode() + line + b"\n" + json.dumps(GOOD).encode())
    with pytest.raises(SmeltError, match=said) as caught:
        list(read_pairs(file))
    assert str(caught.value).startswith(f"{file}:3: ")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SmeltError, match=r"none\.jsonl: cannot be read"):
        list(read_pairs(tmp_path / "none.jsonl"))


def test_continuations_are_true_and_the_others_are_another_prompts():
    pairs = continuations(TEXTS, seed=0, prompt_lines=3, answer_lines=2)
    assert len(pairs) == 6 * (30 // 5) and sorted(p.chosen for p in pairs) == sorted(p.rejected for p in pairs)
    assert all(any(p.prompt + p.chosen in text for text in TEXTS) for p in pairs)
    assert not any(any(p.prompt + p.rejected in text for text in TEXTS) for p in pairs)
    assert sum(abs(len(p.chosen) - len(p.rejected)) for p in pairs) <= 2 * max(len(p.chosen) for p in pairs)  # neighbours in length
    odd = continuations([*TEXTS[:1], "a\nb\nc\nd\ne\n"], 0, 3, 2)
    assert len(odd) == 7 and all(p.chosen != p.rejected for p in odd)
    assert continuations(["a\nb\nc\nd\ne\n"], 0, 3, 2)[0][1:] == ("d\ne\n", "d\ne\n")  # alone: equal answers, which Pairs leaves out
    assert pairs == continuations(TEXTS, seed=0, prompt_lines=3, answer_lines=2) != continuations(TEXTS, 1, 3, 2)


def by_hand(tokenizer, prompt: str, answer: str, model) -> float:
    """The sum over the answer's tokens, one call per token."""
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    begin = len(tokenizer(prompt)["input_ids"])
    total = 0.0
    for t in range(begin, len(ids)):
        total += model(torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)[ids[t]].item()
    return total


def test_log_probabilities_are_those_of_the_answers_alone(model, tokenizer):
    """Whatever the padding: rows of other lengths beside them, a longer context, other prompts."""
    pairs = [
        Pair("x =", " 1\n", "\nimport os\nimport sys\n"),
        Pair("def f(x):", "\n    return x + 1\n", ""),
        Pair("class A", ":", "(B):\n    pass\n"),
    ]
    for context in (48, 100):
        rows = Pairs(pairs, tokenizer, context, 3, seed=0)
        batch = {name: torch.stack([rows[i][name] for i in range(3)]) for name in rows[0]}
        with torch.no_grad():
            found = answers(model, batch)
        with torch.no_grad():
            wanted = [[by_hand(tokenizer, pairs[i].prompt, a, model) for a in pairs[i][1:]] for i in rows._order]
        assert torch.allclose(found, torch.tensor(wanted), atol=1e-3, rtol=1e-5)
        assert (batch["labels"] != -100).sum() == 3


def test_layout_of_a_row(tokenizer):
    item = Pairs([Pair("def f", "(x):\n", "(y, z):\n")], tokenizer, 20, 1, 0)[0]
    for side, answer in enumerate(("(x):\n", "(y, z):\n")):
        ids = [*tokenizer("def f" + answer)["input_ids"], tokenizer.eos_token_id]
        n = len(ids) - 1
        begin = len(tokenizer("def f")["input_ids"])
        assert item["input_ids"][side].tolist() == ids[:-1] + [tokenizer.pad_token_id] * (20 - n)
        assert item["attention_mask"][side].tolist() == [1] * n + [0] * (20 - n)
        assert item["targets"][side].tolist() == [-100] * (begin - 1) + ids[begin:] + [-100] * (20 - n)


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer):
    whole = tokenizer("return")["input_ids"]
    assert whole != tokenizer("retu")["input_ids"] + tokenizer("rn")["input_ids"]  # it does merge
    item = Pairs([Pair("x = 1\n    retu", "rn x\n", "xx\n")], tokenizer, 40, 1, 0)[0]
    kept = [t for t in item["targets"][0].tolist() if t != -100]
    assert tokenizer.decode(kept[:-1]).endswith("return x\n") and kept[-1] == tokenizer.eos_token_id


def test_an_empty_prompt_starts_after_an_end_of_text(tokenizer):
    item = Pairs([Pair("", "a", "b")], tokenizer, 8, 1, 0)[0]
    assert item["input_ids"][0, 0] == tokenizer.eos_token_id and item["targets"][0, 0] == tokenizer("a")["input_ids"][0]


def test_long_prompts_lose_their_beginning_alike_and_hopeless_pairs_are_counted(tokenizer):
    prompt, short, long = "a b c d e f g h i j k l m n o p", "!", "? ? ? ?"
    need = len(tokenizer(long)["input_ids"]) + 1
    rows = Pairs([Pair(prompt, short, long), Pair(prompt, "x", "x"), Pair("a", "b", "! " * 30)], tokenizer, need + 4, 1, 0)
    assert rows.dropped == {"equal answers": 1, "answer too long": 1} and len(rows.rows) == 1
    (chosen, begin), (rejected, other) = rows.rows[0]
    assert begin == other == 5 and len(rejected) == need + 5  # ids are one longer than the context: the last is only a target
    assert chosen[:5].tolist() == rejected[:5].tolist() == tokenizer(prompt)["input_ids"][-5:]
    with pytest.raises(SmeltError, match="no preference pair is left"):
        Pairs([Pair("a", "b", "b")], tokenizer, 8, 1, 0)


def test_an_opening_token_survives_the_cut(tokenizer):
    class Opening:
        eos_token_id, bos_token_id, pad_token_id, eos_token = 0, 5, 1, "<|endoftext|>"

        def __call__(self, text, verbose):
            return {"input_ids": [5, *tokenizer(text)["input_ids"]]}

    item = Pairs([Pair("a b c d e f g h i j", "!", "?")], Opening(), 6, 1, 0)[0]
    tail = tokenizer("a b c d e f g h i j")["input_ids"][-4:]
    assert item["input_ids"][0].tolist() == [5, *tail, tokenizer("!")["input_ids"][0]]


def test_epochs_are_permutations_that_follow_from_the_seed(tokenizer):
    pairs = [Pair("x", str(i), "no") for i in range(9)]
    order = [Pairs(pairs, tokenizer, 8, 27, 3)[i]["input_ids"][0].tolist() for i in range(27)]
    rows = Pairs(pairs, tokenizer, 8, 27, 3)
    assert [rows[i]["input_ids"][0].tolist() for i in reversed(range(27))] == order[::-1]
    epochs = [order[:9], order[9:18], order[18:]]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_the_step_refuses_what_would_learn_nothing(model, tokenizer):
    objective = DPO()
    reading = reads(objective, READS)
    with pytest.raises(SmeltError, match="there is none"):
        preference_step(objective, reading)
    with pytest.raises(SmeltError, match="training mode"):
        preference_step(objective, reading, copy.deepcopy(model).train())
    item = Pairs([Pair("x", "1", "2")], tokenizer, 8, 1, 0)[0]
    with pytest.raises(SmeltError, match="the same model"):
        preference_step(objective, reading, model)(model, {k: v[None] for k, v in item.items()}, 0.0)


def taste(numbers) -> list[Pair]:
    """Prompts of many lengths; the chosen answer adds, the rejected one multiplies."""
    return [Pair(f"def f_{i}({'x, ' * (i % 7)}y):\n    return", f" y + {i}\n", f" y * {i}\n") for i in numbers]


def batch_of(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    rows = Pairs(pairs, tiny_tokenizer(), 64, len(pairs), 0)
    return {name: torch.stack([rows[i][name] for i in range(len(pairs))]) for name in rows[0]}


def trained(folder, micro: int, steps: int):
    policy, reference, objective = tiny("llama"), tiny("llama"), DPO(beta=0.5)
    settings = Training(tokens=8 * 64 * steps, context=64, batch=8, micro=micro, lr=1e-3, warmup=0.0, weight_decay=0.0)
    rows = Pairs(taste(range(40)), tiny_tokenizer(), 64, 8 * steps, 0)
    log = train(policy, rows, preference_step(objective, reads(objective, READS), reference), settings, folder)["log"]
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), tiny("llama").parameters(), strict=True))
    return policy.eval(), reference, log


def test_training_raises_the_margin_of_the_chosen_answers(tmp_path):
    """Also for prompts it never saw; the first loss is log 2, so the sum is divided by pairs and not by tokens."""
    policy, reference, log = trained(tmp_path, 0, 15)
    unseen = batch_of(taste(range(100, 120)))
    with torch.no_grad():
        margin = (answers(policy, unseen) - answers(reference, unseen)) @ torch.tensor([1.0, -1.0])
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[-1]["loss"] < 0.5 * math.log(2)
    assert (margin > 0).float().mean() >= 0.9


def test_accumulating_equals_one_big_batch(tmp_path):
    """Micro-batches are trimmed to other lengths, and still: the same losses and weights."""
    whole, _, log = trained(tmp_path / "a", 0, 3)
    parts, _, other = trained(tmp_path / "b", 2, 3)
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in other], abs=1e-5)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
