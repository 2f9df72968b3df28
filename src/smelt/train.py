"""What is learned, from what, by which objective; `_train_loop.py` turns the crank.

Whatever is learned here (plain training, distillation, alignment) is a sum over kept positions of the whole
effective batch divided by their number, on one process or many: accumulation and sharding change speed, never the
gradient. State is checkpointed while it runs; a killed run goes on with the losses it would have had.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from smelt.align import READS as ALIGNED
from smelt.align._pairs import Pairs, continuations, preference_step, read_pairs
from smelt.attention._mixer import MixerModule
from smelt.data import PairFiles
from smelt.data._tokens import Rows, Tokens, tokenize
from smelt.distill import FLAT, READS, Composed, Equipped, Procedure, Stateful
from smelt.distill._capture import Capture
from smelt.distill._retokenize import Retokenizer
from smelt.distill._teacher import agree, named, supply
from smelt.distill._topk import TopK, fill
from smelt.journal import Journal
from smelt.model._files import identity
from smelt.model._load import Loaded, same_tokenizer, vocabulary
from smelt.model._walk import multiplied, parts
from smelt.recipe import Training
from smelt.runtime import bind
from smelt.spec import SmeltError, nearest
from smelt.weights._adapter import learned

__all__ = ["Course", "Training", "draft", "language_step", "prefer", "reads", "teach"]

NEGLIGIBLE = 0.01  # a teacher that moves the gradient by less than this share might as well be absent


def reads(objective: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The names an objective reads: the parameters of its call. Raises SmeltError for one the loop does not have."""
    names = objective.reads if isinstance(objective, Composed) else tuple(inspect.signature(objective).parameters)
    for name in names:
        if name not in allowed:
            raise SmeltError(f"{type(objective).__name__} reads '{name}', which training does not supply{nearest(name, allowed)}")
    return names


def language_step(
    objective: Callable[..., Tensor],
    reading: tuple[str, ...],
    supplied: Callable[[dict[str, Tensor]], dict[str, Any]] | None = None,
    warn: Callable[[str], None] | None = None,
    also: Callable[[], dict[str, Any]] | None = None,
):
    """The step of a language objective: student (and teacher) read the same ids; labels are the next tokens.

    `supplied(inputs)` are the teacher's tensors (`distill._teacher.supply`; it is shown the student's logits too), `also()` what
    else the student has beside its logits, asked after its forward. Positions without a label are dropped before the
    objective sees them, unless it reads them in their places. With `warn` the first call looks at what the teacher
    changes, and says when that is next to nothing.
    """
    placed = any(name not in FLAT for name in reading)
    pending = [warn] if warn is not None and {"teacher"} <= set(reading) <= {*FLAT, "keep"} else []

    def step(model: Any, inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        ids, labels = inputs["input_ids"], inputs["labels"]
        hidden = "student_hidden" in reading
        extra = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        out = model(input_ids=ids, use_cache=False, output_hidden_states=hidden, **extra)
        keep = labels != -100
        have: dict[str, Any] = {"student": out.logits, "labels": labels.clamp(min=0), "keep": keep, "progress": progress}
        have |= {"student_ids": ids, "weights": inputs.get("weights", out.logits.new_ones(len(ids)))}
        if hidden:
            have["student_hidden"] = out.hidden_states
        if also is not None:
            have.update(also())
        if supplied is not None:
            have.update(supplied(inputs | {"student": out.logits}))
        if not placed and not keep.all():
            have.update({name: have[name][keep] for name in ("student", "teacher", "labels", "keep") if name in have})
            if "teachers" in have:
                have["teachers"] = tuple(None if logits is None else logits[keep] for logits in have["teachers"])
        if pending and progress == 0:
            _look(objective, reading, have, placed, pending.pop())
        return objective(**{name: have[name] for name in reading}), have["keep"]

    return step


def _look(
    objective: Callable[..., Tensor], reading: tuple[str, ...], have: dict[str, Any], placed: bool, warn: Callable[[str], None]
) -> None:
    """Does the teacher matter? Compares the gradient of the logits with the one the student itself would give as teacher."""
    if not placed:  # a few positions tell
        wide = {"student": 1, "teacher": 1, "labels": 0, "keep": 0}
        have = have | {name: have[name].flatten(0, -1 - dims)[:256] for name, dims in wide.items()}
    student, teacher = have["student"].detach(), have["teacher"]
    if teacher.isnan().any():
        raise SmeltError("the teacher's logits are not numbers (nan)")

    def slope(target: Tensor) -> Tensor:
        logits = student.clone().requires_grad_()
        loss = objective(**{name: (have | {"student": logits, "teacher": target})[name] for name in reading})
        return torch.autograd.grad(torch.where(have["keep"], loss, 0.0).sum(), logits)[0]

    if torch.allclose(student, teacher.to(student.dtype), rtol=1e-4, atol=1e-4):
        warn("the teacher's logits equal the student's at the first step: they are the same model, and there is nothing to learn from it")
        return
    whole = slope(teacher)
    share = ((whole - slope(student)).norm() / whole.norm().clamp(min=1e-30)).item()
    if share < NEGLIGIBLE:
        warn(f"the teacher changes the gradient by {100 * share:.2g} % only: its term of the loss is negligible")


class _Behind(Dataset):
    """Rows whose first labels do not count: those of a prefix that is read both ways, where the next token is no secret."""

    def __init__(self, rows: Any, prefix: int):
        self.rows, self.prefix = rows, prefix

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        row = dict(self.rows[at])
        row["labels"] = row["labels"].clone()
        row["labels"][: self.prefix - 1] = -100
        return row


@dataclass
class Course:
    """What a `Procedure` drives: a student, its teachers, text, and one folder that outlives a kill.

    `teachers` are local models; `ask` may also reach an endpoint. `tokens` is the train split of `settings.data` in the
    student's ids. A fit that was finished is not done again, an answer that was given is not asked for again.
    """

    student: Loaded
    teachers: tuple[Loaded, ...]
    tokens: Tokens
    settings: Training
    folder: Path
    seed: int = 0
    label: str = "train"
    cache_folder: Path | None = None
    fsdp: bool = False
    store: bool = False  # keep the weights of every finished fit, for the next call
    reader: Callable[[Any, Any, Any], Tokens] | None = None  # (corpus, split, tokenizer) -> its ids
    speaker: Any = None  # answers(prompts, new, temperature) of a teacher that is not local
    warnings: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> Loaded | None:
        return self.teachers[0] if self.teachers else None

    def rows(self, tokens: Tokens | None = None, settings: Training | None = None) -> Rows:
        """Packed rows for the whole of a fit: settings.steps * settings.batch of them."""
        asked = settings or self.settings
        chosen = self.tokens if tokens is None else tokens
        return Rows(chosen, asked.context, asked.steps * asked.batch, self.seed, asked.boundaries)

    def read(self, corpus: Any = None, split: Any = "train", tokenizer: Any = None) -> Tokens:
        """The ids of a corpus (default: that of the train block), in the student's tokenizer unless another is given."""
        corpus, tokenizer = corpus or self.settings.data, tokenizer or self.student.tokenizer
        if self.reader is not None:
            return self.reader(corpus, split, tokenizer)
        key = hashlib.sha256(repr((corpus.digest(), split, vocabulary(tokenizer))).encode()).hexdigest()
        return tokenize(corpus, split, tokenizer, Path(self.folder) / f"tokens-{key[:16]}")

    def journal(self, name: str) -> Journal:
        """A dictionary that outlives a kill. It has one writer, so methods that keep one run on one process."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SmeltError(f"{self.label}: this method keeps a journal ({name}), which has one writer; run it on one process")
        return Journal(Path(self.folder) / f"{name}.jsonl")

    @contextlib.contextmanager
    def generating(self, loaded: Loaded | None = None, *, cache: Any = None, decode: Any = None) -> Iterator[Callable[..., Tensor]]:
        """`generate(ids [b, n], new, temperature, seed) -> [b, n + up to new]`, through the runtime's cache and decode methods.

        Temperature 0 is greedy; otherwise every token is drawn from softmax(logits / temperature), from `seed` alone. A
        text ends at its end-of-text token and is filled with it. Prompts have one length: nothing is padded. No gradient.
        """
        model, tokenizer, _ = loaded or self.student
        eos = tokenizer.eos_token_id

        def generate(ids: Tensor, new: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
            training = model.training
            model.eval()
            how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
            devices = [ids.device] if ids.device.type == "cuda" else []
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=devices):
                    torch.manual_seed(seed)
                    how = {"do_sample": False, "max_new_tokens": new, "pad_token_id": eos, "eos_token_id": eos} | how
                    return model.generate(ids, use_cache=True, attention_mask=torch.ones_like(ids), **how)
            finally:
                model.train(training)

        with bind(model, cache=cache, decode=decode, tokenizer=tokenizer):
            yield generate

    def ask(self, prompts: Sequence[str], new: int = 256, temperature: float = 0.0, times: int = 1) -> list[str]:
        """Answers of the teacher, `times` for each prompt in a row. On the disk before they are returned: never asked for twice."""
        if self.speaker is None and self.teacher is None:
            raise SmeltError("this procedure asks a teacher and there is none; write 'teacher: NAME' in its train block")
        who = self.speaker.identity() if self.speaker is not None else identity(self.teacher.folder)  # type: ignore[union-attr]
        wanted = [(prompt, time) for prompt in prompts for time in range(times)]
        keys = [hashlib.sha256(repr((who, prompt, new, temperature, time, self.seed)).encode()).hexdigest() for prompt, time in wanted]
        missing = list({key: item for key, item in zip(keys, wanted, strict=True) if key not in self._answers}.items())
        seeds = [int(key[:8], 16) for key, _ in missing]
        if missing and self.speaker is not None:
            for at, text in self.speaker.answers([prompt for _, (prompt, _) in missing], new, temperature, seeds):
                self._answers.put(missing[at][0], text)
        elif missing:
            tokenizer = self.teacher.tokenizer  # type: ignore[union-attr]
            with self.generating(self.teacher) as generate:
                for seed, (key, (prompt, _)) in zip(seeds, missing, strict=True):
                    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=self.teacher.model.device)  # type: ignore[union-attr]
                    made = generate(ids, new, temperature, seed)[0, ids.shape[1] :]
                    self._answers.put(key, tokenizer.decode(made, skip_special_tokens=True))
        return [self._answers[key] for key in keys]

    @cached_property
    def _answers(self) -> Journal:
        return self.journal("answers")

    @torch.no_grad()
    def loss(self, loaded: Loaded, tokens: Tokens, rows: int = 32, context: int | None = None) -> float:
        """Mean nats per token of a model on the first `rows` rows of a stream, always the same."""
        taken = Rows(tokens, context or self.settings.context, rows, 0, jitter=False)
        training, total, count = loaded.model.training, 0.0, 0
        loaded.model.eval()
        for at in range(0, rows, self.settings.micro or self.settings.batch):
            part = default_collate([taken[i] for i in range(at, min(rows, at + (self.settings.micro or self.settings.batch)))])
            ids, labels = (part[name].to(loaded.model.device) for name in ("input_ids", "labels"))
            logits = loaded.model(input_ids=ids, use_cache=False).logits.float()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += labels.numel()
        loaded.model.train(training)
        return total / count

    def fit(
        self,
        objective: Any,
        *,
        rows: Dataset | None = None,
        settings: Training | None = None,
        pupil: Loaded | None = None,
        teachers: tuple[Loaded, ...] | None = None,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        after: Callable[[int, float], None] | None = None,
        name: str = "fit",
    ) -> dict[str, Any]:
        """One training of `pupil` (the student) in place by an objective; what `train` returns. `name` it when there are several.

        `rows` give {"input_ids", "labels"} of one length, labels already shifted and -100 where nothing counts.
        `change(inputs)` may replace the rows of a micro-batch (samples of the student, say); it must follow from the inputs
        and the weights. `after(steps done, loss)` is called after every optimizer step.
        """
        from smelt._train_loop import train  # here: transformers' Trainer takes as long to import as all else, and most runs train nothing

        asked, student = settings or self.settings, pupil or self.student
        taught = self.teachers if teachers is None else teachers
        place = Path(self.folder) / name if self.store else Path(self.folder)
        if self.store and (place / "log.json").exists():
            load_model(student.model, place / "model.safetensors")
            return json.loads((place / "log.json").read_text())
        reading = reads(objective, READS)
        if not any(item.startswith("teacher") for item in reading):
            taught = ()
        if "teachers" not in reading and len(taught) > 1:
            raise SmeltError(f"{len(taught)} teachers and an objective that reads one; write ensemble(objective=...)")
        if (cache := named(asked.teacher)[1]) is not None:
            cache.fits(objective, reading)
        widths = [agree(student, one, reading) for one in (taught or (None,))]
        for who, loaded in (("student", student), *(("teacher", one) for one in taught)):
            room = parts(loaded.model.config).context
            if asked.context > room and not (who == "teacher" and not widths[0]):
                raise SmeltError(f"train: context={asked.context} is longer than the {room} positions of the {who}")
        rows = self.rows(settings=asked) if rows is None else rows
        mixers = [module for module in student.model.modules() if isinstance(module, MixerModule)]
        if mixers and asked.boundaries == "mask":
            raise SmeltError("train: boundaries=mask cuts keys and values apart, and this model keeps a state instead; leave it out")
        if (prefix := max((m.prefix for m in mixers), default=1)) > 1:
            rows = _Behind(rows, prefix)
        warnings: list[str] = []
        silent = objective.silent if isinstance(objective, Composed) else frozenset()
        equipment = None
        if isinstance(objective, Equipped):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                equipment = objective.equipment(student, taught[0] if taught else None)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
        if equipment is not None:
            equipment.to(device)
        undo = contextlib.ExitStack()

        def projected(loaded: Loaded, side: str) -> Capture | None:
            if f"{side}_projected" not in reading:
                return None
            made = Capture(loaded.model)
            undo.callback(made.close)
            return made

        capture = projected(student, "student")
        captures = [projected(one, "teacher") for one in taught]

        def also() -> dict[str, Any]:
            have: dict[str, Any] = {"equipment": equipment}
            if "student_head" in reading:
                have["student_head"] = student.model.get_output_embeddings().weight
            if "student_embedding" in reading:
                have["student_embedding"] = student.model.get_input_embeddings().weight
            return have if capture is None else have | {"student_projected": capture.take()}

        def stepped(steps: int, loss: float) -> None:
            if equipment is not None and isinstance(objective, Stateful):
                objective.after(equipment, loss, steps / asked.steps)
            if after is not None:
                after(steps, loss)

        held = equipment is not None and any(True for _ in itertools.chain(equipment.parameters(), equipment.buffers()))
        fsdp = self.fsdp or asked.shard == "fsdp2"
        watched = stepped if isinstance(objective, Stateful) or after is not None else None
        with undo:
            supplied, about = self._supplied(taught, widths, captures, reading, rows, asked, cache, silent, student, change is not None)
            step = language_step(objective, reading, supplied, warnings.append, also)
            log = train(
                student.model,
                rows,
                step,
                asked,
                place,
                self.seed,
                self.label,
                warnings,
                fsdp,
                change,
                equipment if held else None,
                watched,
                "student" not in reading,
            )
        log["flops"] += sum(2 * multiplied(one.model) * log["tokens"] for k, one in enumerate(taught) if k not in silent)
        log |= about
        if self.store and int(os.environ.get("RANK", "0")) == 0:
            place.mkdir(parents=True, exist_ok=True)
            save_model(student.model, str(place / "model.safetensors"))
            (place / "log.new").write_text(json.dumps(log))
            os.replace(place / "log.new", place / "log.json")
        return log

    def _supplied(
        self,
        taught: tuple[Loaded, ...],
        widths: list[int],
        captures: list[Capture | None],
        reading: tuple[str, ...],
        rows: Any,
        asked: Training,
        cache: TopK | None,
        silent: frozenset[int],
        student: Loaded,
        changed: bool,
    ) -> tuple[Callable[..., dict[str, Any]] | None, dict[str, Any]]:
        """(what gives the teachers' tensors of a batch, what to say of their cache)."""
        if not taught:
            return None, {}
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
        makers = []
        for one, width, capture in zip(taught, widths, captures, strict=True):
            translate = None if width else Retokenizer(student.tokenizer, one.tokenizer, parts(one.model.config).context)
            how: dict[str, Any] = {"width": width, "precision": asked.precision, "compile": asked.compile}
            makers.append(supply(one.model.to(device), reading, translate=translate, capture=capture, **how))
        if "teachers" in reading:

            def several(inputs: dict[str, Tensor]) -> dict[str, Any]:
                made = [None if k in silent else make(inputs) for k, make in enumerate(makers)]
                have = next((one for one in made if one is not None), {})
                return have | {"teachers": tuple(None if one is None else one["teacher"] for one in made)}

            return several, {}
        if cache is None:
            return makers[0], {}
        if changed:
            raise SmeltError("a cached teacher answers for fixed rows only; this method makes its rows as it trains, so leave out 'cache'")
        key = _key(identity(taught[0].folder), self.tokens, asked, self.seed, widths[0], cache.k, cache.drawn)
        place = Path(self.cache_folder or Path(self.folder) / "teacher") / key[:16]
        cached = fill(cache, makers[0], rows, place, vocab=widths[0], key=key, device=device)
        return supply(taught[0].model, reading, cached), {"cache": cached.stats()}


def teach(
    student: Loaded,
    teacher: Loaded | Sequence[Loaded] | None,
    tokens: Tokens,
    method: Any,
    settings: Training,
    folder: Path,
    *,
    seed: int = 0,
    label: str = "train",
    cache_folder: Path | None = None,
    fsdp: bool = False,
    reader: Callable[[Any, Any, Any], Tokens] | None = None,
    speaker: Any = None,
) -> dict[str, Any]:
    """Train `student.model` in place on `tokens` with a method of the family `distill`; what `train` returns.

    `settings.teacher` may ask for a cache ({model: NAME, cache: topk(k=64)}): it is filled first, in a folder of
    `cache_folder` (default: of `folder`) named by the teacher and the rows, so that a second student finds it done.
    `flops` has 2 N of every teacher per token besides, cached or not; `cache` what the cache takes and loses.
    With `settings.adapter` only the adapter is trained, whatever the method; "adapter" says what that was and how it is left.
    Raises SmeltError when the teacher cannot teach this student (see `distill._teacher.agree`).
    """
    teachers = () if teacher is None else (teacher,) if isinstance(teacher, Loaded) else tuple(teacher)
    store = isinstance(method, Procedure)
    course = Course(student, teachers, tokens, settings, Path(folder), seed, label, cache_folder, fsdp, store, reader, speaker)
    run = partial(method.teach, course) if isinstance(method, Procedure) else partial(course.fit, method)
    if settings.adapter is None:
        return run()
    _together(settings, fsdp)
    return learned(settings.adapter, student.model, run, lambda: course.rows()[0]["input_ids"][None], seed, Path(folder))


def _together(settings: Training, fsdp: bool = False) -> None:
    if fsdp or settings.shard == "fsdp2":
        raise SmeltError("train: shard=fsdp2 cuts a model that is trained as a whole; an adapter needs whole copies (DDP)")


def prefer(
    policy: Loaded,
    reference: Loaded | None,
    corpus: Any,
    objective: Any,
    settings: Training,
    folder: Path,
    *,
    seed: int = 0,
    label: str = "align",
    cache_folder: Path | None = None,
) -> dict[str, Any]:
    """Align `policy.model` in place with an objective of the family `align`; what `train` returns.

    Pairs {prompt, chosen, rejected} come from the .jsonl files of a `files` corpus; any other corpus gives pairs of
    its own text: the true next lines against those of another place. `reference` is by default the policy as it is now.
    `settings.tokens` counts pairs * context: a step holds `settings.batch` pairs.
    """
    from smelt._train_loop import train  # here, as in `fit`

    reading = reads(objective, ALIGNED)
    if reference is None and any(name.startswith("reference_") for name in reading):
        reference = Loaded(copy.deepcopy(policy.model).eval(), policy.tokenizer, policy.folder)
    if reference is not None and not same_tokenizer(policy.tokenizer, reference.tokenizer):
        raise SmeltError("align: the reference has another tokenizer than the policy; their token ids mean different things")
    files = corpus.rows_of_pairs() if isinstance(corpus, PairFiles) else None
    pairs = (
        [pair for file in files for pair in read_pairs(file)]
        if files
        else continuations((document.text for document in corpus.documents("train")), seed)[: settings.steps * settings.batch]
    )
    rows = Pairs(pairs, policy.tokenizer, settings.context, settings.steps * settings.batch, seed)
    step = preference_step(objective, reading, reference.model if reference else None)
    run = partial(train, policy.model, rows, step, settings, folder, seed, label)
    if settings.adapter is None:
        about = run()
    else:
        _together(settings)
        about = learned(settings.adapter, policy.model, run, lambda: rows[0]["input_ids"], seed, Path(folder))
    about["flops"] *= 2  # a pair is two rows
    if reference is not None:
        about["flops"] += 2 * multiplied(reference.model) * 2 * about["tokens"]
    about["warnings"] += [f"{count} pairs left out: {why}" for why, count in rows.dropped.items() if count]
    return about


def draft(
    target: Loaded, tokens: Tokens, method: Any, settings: Training, folder: Path, result: Path, *, seed: int = 0, label: str = "draft"
) -> dict[str, Any]:
    """Train the draft of a decoding method (`decode._learned.Learned`) over a target that stands still; what `train` returns.

    `result` gets the file that a `weights` field names. The target reads every row once, without gradient. `flops` has
    2 N per token for its blocks, and what the method says of its draft.
    One process, whole rows: raises SmeltError for a teacher, an adapter, shard, boundaries=mask, several processes.
    """
    from smelt._train_loop import train  # here, as in `fit`

    given = {"teacher": settings.teacher, "adapter": settings.adapter}
    for key in [key for key, value in given.items() if value is not None]:
        raise SmeltError(f"train: a draft learns from its own target; leave out '{key}'")
    if settings.shard != "none" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SmeltError("train: a draft is trained on one process; leave out 'shard' and torchrun")
    if settings.boundaries != "cross":
        raise SmeltError("train: a draft reads whole rows; leave out boundaries=mask")
    if settings.context < 3:
        raise SmeltError(f"train: context={settings.context} holds no token that a draft could say; it needs 3 or more")
    model = target.model
    config = model.config.get_text_config(decoder=True)
    if settings.context > parts(config).context:
        raise SmeltError(f"train: context={settings.context} is longer than the {parts(config).context} positions of the model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = method.module(config)
        method.start(made, model)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
    made.to(device)
    rows = Rows(tokens, settings.context, settings.steps * settings.batch, seed)

    def change(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs | {"labels": torch.cat([torch.full_like(inputs["labels"][:, :1], -100), inputs["labels"][:, 1:]], 1)}

    def step(_: Any, inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        if model.training:
            model.eval()  # the loop sets what it trains to training, this target with it
        with torch.no_grad():
            states = model.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
        loss = method.loss(made, model, inputs["input_ids"], states)
        return loss, torch.ones_like(loss, dtype=torch.bool)

    free = [p for p in model.parameters() if p.requires_grad]
    for p in free:
        p.requires_grad_(False)
    try:
        log = train(model, rows, step, settings, folder, seed, label, change=change, equipment=made)
    finally:
        for p in free:
            p.requires_grad_(True)
    method.write(made, result, model, target.tokenizer)
    flops = 2 * (multiplied(model) - model.get_output_embeddings().weight.numel()) + method.cost(made, config)
    return log | {"flops": flops * log["tokens"], "draft_parameters": sum(p.numel() for p in made.parameters())}


def _key(teacher: str, tokens: Tokens, settings: Training, seed: int, *more: Any) -> str:
    """Of a teacher's cache: all that its contents follow from. The ids themselves are checked row by row."""
    shape = (len(tokens), settings.context, settings.steps * settings.batch, settings.boundaries, settings.precision, seed)
    start = hashlib.sha256(tokens.ids[: 1 << 22].tobytes()).hexdigest()
    return hashlib.sha256(repr((teacher, shape, start, *more)).encode()).hexdigest()
