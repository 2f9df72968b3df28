from __future__ import annotations

import pytest

from smelt.distill._guidance import apportion, hard_negatives, joined, parsed, report

ROWS = [{"text": str(i), "label": label} for i, label in enumerate("aabbbc")]
SAYS = list("abbbac")  # right: 0, 2, 3, 5


def test_the_report_counts_what_a_loop_counts():
    text, missed = report(SAYS, ROWS, ["a", "b", "c", "d"])
    assert missed == {"a": 1, "b": 1, "c": 0, "d": 0}
    table = {line.split("\t")[0]: line.split("\t")[1:] for line in text.splitlines()[1:]}
    for label in "abcd":
        true = [i for i, row in enumerate(ROWS) if row["label"] == label]
        said = [i for i, word in enumerate(SAYS) if word == label]
        both = len({*true} & {*said})
        precision, recall = both / len(said) if said else 0, both / len(true) if true else 0
        f1 = 2 * precision * recall / (precision + recall) if both else 0
        assert table[label] == [str(len(true)), *(f"{x:.3f}" for x in (precision, recall, f1))]


def test_hard_negatives_are_wrong_and_the_surest_come_first():
    sure = [0.9, 0.3, 0.9, 0.9, 0.8, 0.9]
    assert hard_negatives(SAYS, sure, ROWS) == [4, 1]
    assert hard_negatives([row["label"] for row in ROWS], sure, ROWS) == []


@pytest.mark.parametrize("need", [{"a": 3, "b": 1, "c": 0}, {"a": 1, "b": 1, "c": 1}, {"a": 0, "b": 0, "c": 0}])
def test_the_samples_are_given_out_in_proportion(need):
    made = apportion(need, 10)
    assert sum(made.values()) == 10
    total = sum(need.values())
    for label, count in made.items():
        assert abs(count - (10 * need[label] / total if total else 10 / 3)) < 1


def test_only_new_rows_with_a_known_label_are_taken():
    lines = [
        "Here you are:", "```json", '{"text": "new", "label": "a"},', '{"text": "old", "label": "a"}', '{"text": "x", "label": "z"}',
        '{"text": "new", "label": "b"}', '{"text": " ", "label": "a"}', '{"text": ["y"], "label": "a"}', '{"text": "y", "label": ["a"]}',
        "[1]", '{"text": "\\ud800", "label": "a"}', '{"text": "also", "label": "b"}', "```",
    ]  # fmt: skip
    rows, refused = parsed("\n".join(lines), ["a", "b"], {"old"}, 5)
    assert rows == [{"text": "new", "label": "a"}, {"text": "also", "label": "b"}]
    assert refused == len(lines) - 2 - 2  # without the fences and the rows
    assert parsed("\n".join(lines), ["a", "b"], {"old"}, 1)[0] == rows[:1]


def test_logs_of_one_model_follow_each_other():
    def log(steps):
        return {
            "log": [{"step": steps, "tokens": 10 * steps, "loss": 1.0}],
            "steps": steps,
            "tokens": 10 * steps,
            "seconds": 1.0,
            "flops": 5,
        }

    whole = joined([log(4), log(2), log(3)])
    assert [(entry["step"], entry["tokens"]) for entry in whole["log"]] == [(4, 40), (6, 60), (9, 90)]
    assert (whole["steps"], whole["tokens"], whole["seconds"], whole["flops"]) == (9, 90, 3.0, 15)
