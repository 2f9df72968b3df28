"""The one training loop. The objective and the rows arrive as arguments; transformers.Trainer turns the crank.

Whatever is learned here (plain training, distillation, alignment) is a sum over kept positions of the whole
effective batch divided by their number, on one process or many: accumulation and sharding change speed, never the
gradient. State is checkpointed while it runs; a killed run goes on with the losses it would have had.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from smelt.optim import Muon
from smelt.progress import track
from smelt.spec import SmeltError, nearest

__all__ = ["Training", "reads", "train"]


@dataclass(frozen=True)
class Training:
    """The `train:` block of a recipe. Sizes are global: any number of processes does the same training."""

    data: Any = None  # corpus
    tokens: Annotated[int, Ge(1)] = 1_000_000  # positions trained on, in all
    context: Annotated[int, Ge(2)] = 512  # tokens of a row
    batch: Annotated[int, Ge(1)] = 16  # rows of an optimizer step, over all processes
    micro: Annotated[int, Ge(0)] = 0  # rows of one forward on one process; 0: as many as the step has
    lr: Annotated[float, Gt(0)] = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.05  # share of the steps
    floor: Annotated[float, Interval(ge=0, le=1)] = 0.1  # last learning rate / lr
    weight_decay: Annotated[float, Ge(0)] = 0.1
    clip: Annotated[float, Gt(0)] = 1.0  # gradient norm
    boundaries: Literal["cross", "mask"] = "cross"  # may a row attend across document ends
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile: about 1.2 times on CPU after 40 s; needs a C++ compiler
    teacher: Any = None  # a model name, or {model: NAME, cache: topk(k=64)}
    save_seconds: Annotated[float, Gt(0)] = 60.0  # between checkpoints

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / (self.batch * self.context)))


def reads(objective: Callable[..., Tensor], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The names an objective reads: the parameters of its call. Raises SmeltError for one the loop does not have."""
    names = tuple(inspect.signature(objective).parameters)
    for name in names:
        if name not in allowed:
            raise SmeltError(f"{type(objective).__name__} reads '{name}', which training does not supply{nearest(name, allowed)}")
    return names


class _Loop(Trainer):
    """Trainer with the loss of an objective: sum over kept positions / number of kept positions in the step."""

    loss_is_scaled_for_ga = True

    def __init__(self, step: Callable[..., tuple[Tensor, Tensor]], **kwargs: Any):
        super().__init__(**kwargs)
        self.step = step
        self.model_accepts_loss_kwargs = True  # so that labels of the whole effective batch are counted
        self._loss_shifts_labels = False  # rows come with labels already shifted

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        progress = self.state.global_step / max(1, self.state.max_steps)
        loss, keep = self.step(model, inputs, progress)
        items = keep.sum() if num_items_in_batch is None else num_items_in_batch
        total = torch.where(keep, loss, 0.0).sum() / torch.as_tensor(items, device=loss.device).clamp(min=1)
        return total * self.accelerator.num_processes  # ranks average their gradients; we want their sum

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)


class _Watch(TrainerCallback):
    """Checkpoints by the clock, marks finished ones, moves the bar, refuses a loss that is not a number."""

    def __init__(self, bar: Any, tokens_per_step: int, save_seconds: float, log: Path):
        self.bar, self.tokens, self.seconds, self.log = bar, tokens_per_step, save_seconds, log
        self.saved = time.monotonic()
        self.loss = ""

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.advance(self.tokens, self.loss)
        if time.monotonic() - self.saved > self.seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.saved = time.monotonic()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "complete").touch()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
            if not math.isfinite(logs["loss"]):
                raise SmeltError(f"the loss is {logs['loss']} at step {state.global_step}; a lower lr usually helps")


def train(
    model: PreTrainedModel,
    rows: Dataset,
    step: Callable[[Any, dict[str, Tensor], float], tuple[Tensor, Tensor]],
    settings: Training,
    folder: Path,
    seed: int = 0,
    label: str = "train",
) -> dict[str, Any]:
    """Train `model` in place. `step(model, inputs, progress) -> (loss [...], keep [...])`; rows are taken in order.

    `folder` holds checkpoints while it runs; call again with the same arguments after a kill and it goes on.
    Returns {"log": [{step, tokens, loss, lr, grad_norm}], "steps", "tokens", "seconds"}. Peak memory: weights,
    gradients, optimizer state (1 or 2 x weights) and the activations of `micro` rows.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = settings.micro or math.ceil(settings.batch / world)
    if settings.batch % (micro * world):
        raise SmeltError(f"train: batch={settings.batch} is not a multiple of micro={micro} times {world} processes")
    steps = settings.steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch // (micro * world),
        learning_rate=settings.lr,
        max_grad_norm=settings.clip,
        logging_steps=max(1, steps // 200),
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        seed=seed,
        data_seed=seed,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        torch_compile=settings.compile,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _rate(at, steps, settings))
    started = time.monotonic()
    resume = _last_complete(folder)
    done = int(resume.name.rsplit("-", 1)[1]) if resume else 0
    per_step = settings.batch * settings.context
    model.config.use_cache = False
    with track(label, steps * per_step, "tokens", done * per_step) as bar:
        loop = _Loop(
            step,
            model=model,
            args=arguments,
            train_dataset=rows,
            optimizers=(optimizer, schedule),
            callbacks=[_Watch(bar, per_step, settings.save_seconds, folder)],
        )
        loop.remove_callback(_printer())
        loop.train(resume_from_checkpoint=str(resume) if resume else None)
    model.config.use_cache = True
    log = [
        {"step": entry["step"], "tokens": entry["step"] * per_step, "loss": entry["loss"], "lr": entry["learning_rate"]}
        for entry in loop.state.log_history
        if "loss" in entry
    ]
    return {"log": log, "steps": steps, "tokens": steps * per_step, "seconds": time.monotonic() - started, "resumed_at": done}


def _printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _optimizer(model: PreTrainedModel, settings: Training) -> torch.optim.Optimizer:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = {id(p) for module in model.modules() if isinstance(module, torch.nn.Linear) for p in module.parameters()}
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
    if settings.optimizer == "muon":
        matrices = [p for _, p in trained if p.dim() == 2 and id(p) in inner and id(p) not in outer]
        chosen = {id(p) for p in matrices}
        return Muon(matrices, [p for _, p in trained if id(p) not in chosen], settings.lr, settings.weight_decay)
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), eps=1e-8)


def _rate(at: int, steps: int, settings: Training) -> float:
    """Learning rate of step `at` as a share of lr: linear warm-up, then the schedule down to `floor`."""
    warm = math.ceil(settings.warmup * steps)
    if at < warm:
        return (at + 1) / warm
    share = min(1.0, (at - warm) / max(1, steps - warm))
    if settings.schedule == "constant":
        return 1.0
    fall = 0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1 - share
    return settings.floor + (1 - settings.floor) * fall


def _last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; unfinished ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    for broken in [p for p in found if not (p / "complete").exists()]:
        shutil.rmtree(broken, ignore_errors=True)
    return next((p for p in reversed(found) if (p / "complete").exists()), None)


def language_step(objective: Callable[..., Tensor], reading: tuple[str, ...], teach: Callable[..., dict] | None = None):
    """The step of a language objective: student (and teacher) read the same ids; labels are the next tokens."""

    def step(model: Any, inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        ids, labels = inputs["input_ids"], inputs["labels"]
        hidden = "student_hidden" in reading
        extra = {"position_ids": inputs["position_ids"]} if "position_ids" in inputs else {}
        out = model(input_ids=ids, use_cache=False, output_hidden_states=hidden, **extra)
        keep = labels != -100
        have: dict[str, Any] = {"student": out.logits, "labels": labels.clamp(min=0), "keep": keep, "progress": progress}
        if hidden:
            have["student_hidden"] = out.hidden_states
        if teach is not None:
            have.update(teach(inputs))
        return objective(**{name: have[name] for name in reading}), keep

    return step
