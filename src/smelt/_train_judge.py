"""A judge of the family `rank` and the model it is trained with: lists, grades of a teacher, the loop."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from smelt import registry
from smelt.data._lists import lists_of
from smelt.data.code_pairs import CodePairs
from smelt.journal import Journal
from smelt.model._files import identity
from smelt.model._load import Loaded, locate
from smelt.progress import track
from smelt.rank import Asked, Embedder, Judge
from smelt.rank._order import ask, order
from smelt.rank._training import Labelled, Learns, write
from smelt.recipe import Training
from smelt.spec import SmeltError

__all__ = ["learner", "ranked"]

GRADED = 32  # lists that a teacher is asked for at once
EMBEDDED = 512  # texts


class _Places(Dataset):
    """Which list each row of the training is, and for the how manieth time: every list once, in a new order, before any comes again."""

    def __init__(self, lists: int, rows: int, seed: int):
        self.lists = lists
        shuffles = [torch.randperm(lists, generator=torch.Generator().manual_seed(seed + epoch)) for epoch in range(-(-rows // lists))]
        self.order = torch.cat(shuffles)[:rows]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"list": self.order[at], "turn": torch.tensor(at // self.lists), "labels": torch.ones(1, dtype=torch.long)}


def learner(method: Any) -> Any:
    """What learns in a rank method: itself or the judge it holds; None where nothing does."""
    return next((held for held in registry.held(method) if isinstance(held, Learns)), None)


def ranked(
    student: Loaded,
    teacher: Loaded | None,
    method: Any,
    settings: Training,
    folder: Path,
    result: Path,
    cache_folder: Path | None = None,
    *,
    seed: int = 0,
    label: str = "rank",
) -> dict[str, Any]:
    """Train `student.model` in place as the model of a judge (`rank._training.Learns`); what `train` returns.

    Lists come from `settings.data`: its own (`code_pairs`), those of JSONL files, or the documented functions of any other corpus.
    A row of the training is a list, so `tokens` / (`batch` * `context`) steps see `batch` lists each, `context` tokens of one at most.
    With a teacher the method's `labels` grades every list that is seen, once; answers are kept in `cache_folder`, where seeds and
    arms with the same teacher and labels find them, else in `folder`. Heads go to `result`.
    One process: raises SmeltError for shard, an adapter, several processes, a teacher without labels and labels without a teacher.
    """
    from smelt._train_loop import train  # here, as in `smelt.train`

    judge = learner(method)
    if settings.shard != "none" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SmeltError("train: a judge is trained on one process; leave out 'shard' and torchrun")
    if settings.adapter is not None:
        raise SmeltError("train: a judge is trained whole; leave out 'adapter'")
    if judge.together and settings.context > student.model.config.get_text_config().max_position_embeddings:
        raise SmeltError(f"train: context={settings.context} is longer than the positions of the model")
    said = registry.text(judge)
    if (teacher is None) != (judge.labels is None):
        what = "a teacher and no labels, so it is not said how it grades" if judge.labels is None else "labels and no teacher"
        name = registry.name_of(judge)[1]
        raise SmeltError(f"train: {said} has {what}; give 'teacher: FOLDER' and, on what is trained itself, {name}(labels=embedding())")
    model = student.model
    rows = [Labelled(*row) for row in lists_of(settings.data, seed, CodePairs(corpus=settings.data))]
    places = _Places(len(rows), settings.steps * settings.batch, seed)
    if teacher is not None:
        teach, what = (_embed, "vectors") if judge.copies else (_grade, "grades")
        file = Path(cache_folder or folder) / f"{what}-{_graders(judge.labels, teacher)[:16]}.jsonl"
        teach(rows, sorted(set(places.order.tolist())), judge.labels, teacher, Journal(file), label)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = judge.heads(model.config.get_text_config())
    if heads is not None:
        heads.to(model.device)

    def step(_: Any, inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        drawn = zip(inputs["list"].flatten().tolist(), inputs["turn"].flatten().tolist(), strict=True)
        batch = judge.collate([rows[i]._replace(turn=turn) for i, turn in drawn], student, settings.context)
        loss = judge.loss(model, heads, {name: value.to(model.device) for name, value in batch.items()})
        return loss, torch.ones_like(loss, dtype=torch.bool)

    log = train(model, places, step, settings, folder, seed, label, equipment=heads)
    model.eval()
    result.mkdir(parents=True, exist_ok=True)
    write(judge, heads.eval() if heads is not None else None, result)
    return log | {"lists": len(rows)}


def _graders(labels: Any, teacher: Loaded) -> str:
    """All that a grade follows from beside the list."""
    weights = [Path(place) for held in registry.held(labels) if (place := getattr(held, "weights", None))]
    models = [locate(name) for held in registry.held(labels) if (name := getattr(held, "query_model", None))]
    who = [identity(place) for place in [teacher.folder, *weights, *models] if place is not None]
    return _digest(registry.text(labels), registry.source_digest(labels), *who)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _grade(rows: list[Labelled], wanted: list[int], labels: Any, teacher: Loaded, journal: Journal, label: str) -> None:
    """Grades of the teacher in the place of the rows' own: scores, or the place from the end where it only orders."""
    keys = {i: _digest(rows[i].query, *rows[i].passages) for i in wanted}
    missing = list({keys[i]: i for i in wanted if keys[i] not in journal}.values())
    with track(f"grading lists for {label}", len(missing), "lists") as bar:
        for start in range(0, len(missing), GRADED):
            some = missing[start : start + GRADED]
            asked = [Asked(rows[i].query, rows[i].passages) for i in some]
            if isinstance(labels, Judge) and labels.comparable:
                grades = [a.scores.tolist() for a in ask(labels, asked, teacher) if a.scores is not None]
            else:
                grades = [[float(len(places) - places.index(i)) for i in range(len(places))] for places in order(labels, asked, teacher)]
            for i, grade in zip(some, grades, strict=True):
                journal.put(keys[i], grade)
            bar.advance(len(some))
    for i in wanted:
        rows[i] = rows[i]._replace(grades=journal[keys[i]])


def _embed(rows: list[Labelled], wanted: list[int], labels: Any, teacher: Loaded, journal: Journal, label: str) -> None:
    """Vectors of the teacher beside the rows' own grades, each different text once. Float32 in base64: 4/3 of their bytes."""
    if not isinstance(labels, Embedder):
        raise SmeltError(
            f"train: {label} learns the teacher's vectors, and labels={registry.text(labels)} has none; one that has is embedding()"
        )
    keys = {
        i: [_digest(role, text) for role, text in zip("q" + "p" * len(rows[i].passages), [rows[i].query, *rows[i].passages])]
        for i in wanted
    }
    texts = {key: text for i in wanted for key, text in zip(keys[i], [rows[i].query, *rows[i].passages], strict=True)}
    asks = {keys[i][0] for i in wanted}
    for query in (True, False):
        missing = [key for key in texts if (key in asks) is query and key not in journal]
        with track(f"embedding {'queries' if query else 'passages'} for {label}", len(missing), "texts") as bar:
            for start in range(0, len(missing), EMBEDDED):
                some = missing[start : start + EMBEDDED]
                for key, vector in zip(some, labels.embed([texts[key] for key in some], teacher, query), strict=True):
                    journal.put(key, base64.b64encode(vector.numpy().tobytes()).decode())
                bar.advance(len(some))
    found = {key: torch.frombuffer(bytearray(base64.b64decode(journal[key])), dtype=torch.float32) for key in texts}
    for i in wanted:
        rows[i] = rows[i]._replace(vectors=torch.stack([found[key] for key in keys[i]]))
