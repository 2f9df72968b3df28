"""What a teacher is told of a student that classifies, and what is taken of its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["apportion", "hard_negatives", "joined", "parsed", "report"]

Row = dict[str, str]


def parsed(answer: str, labels: Sequence[str], seen: set[str], most: int) -> tuple[list[Row], int]:
    """(rows of an answer's JSON lines that have a known label and a text not in `seen`, how many lines were none)."""
    found: dict[str, Row] = {}
    lines = [line.strip().rstrip(",") for line in answer.splitlines() if line.strip() and not line.strip().startswith("```")]
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if (
            isinstance(text, str)
            and text.strip()
            and label in labels
            and text not in seen
            and not any("\ud800" <= c <= "\udfff" for c in text)
        ):
            found.setdefault(text, {"text": text, "label": str(label)})
    return list(found.values())[:most], len(lines) - min(len(found), most)


def report(says: Sequence[str], rows: Sequence[Row], labels: Sequence[str]) -> tuple[str, dict[str, int]]:
    """(a table with rows, precision, recall and F1 of each label, {label: errors it takes part in as the truth})."""
    lines, missed = ["label\trows\tprecision\trecall\tf1"], {}
    for label in labels:
        hits = sum(said == row["label"] == label for said, row in zip(says, rows, strict=True))
        named, true = sum(said == label for said in says), sum(row["label"] == label for row in rows)
        ratios = hits / max(1, named), hits / max(1, true), 2 * hits / max(1, named + true)
        lines.append(f"{label}\t{true}\t" + "\t".join(f"{ratio:.3f}" for ratio in ratios))
        missed[label] = true - hits
    return "\n".join(lines), missed


def hard_negatives(says: Sequence[str], sure: Sequence[float], rows: Sequence[Row]) -> list[int]:
    """Places of the rows answered wrong, the most confident first."""
    return sorted((i for i, row in enumerate(rows) if says[i] != row["label"]), key=lambda i: (-sure[i], i))


def apportion(need: dict[str, int], count: int) -> dict[str, int]:
    """`count` in proportion to need, by the largest remainders; alike where nothing is needed."""
    need = need if any(need.values()) else dict.fromkeys(need, 1)
    total = sum(need.values())
    made = {label: count * share // total for label, share in need.items()}
    rest = sorted(need, key=lambda label: (-(count * need[label] % total), label))[: count - sum(made.values())]
    return {label: made[label] + (label in rest) for label in need}


def joined(logs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The logs of trainings of one model after each other as one."""
    made, before = dict(logs[0]) | {"log": [], "steps": 0, "tokens": 0, "seconds": 0.0, "flops": 0}, {"step": 0, "tokens": 0}
    for log in logs:
        made["log"] += [entry | {name: entry[name] + before[name] for name in before} for entry in log["log"]]
        for name in ("steps", "tokens", "seconds", "flops"):
            made[name] += log[name]
        before = {"step": made["steps"], "tokens": made["tokens"]}
    return made
