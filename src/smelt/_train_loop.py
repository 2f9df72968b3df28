"""The crank that transformers.Trainer turns: one training of one model, resumable, on one process or many."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from smelt._train_around import _complete, bar_of, halved, interrupts, last_complete, leaving_no_trace
from smelt._train_schedule import optimizer_of, rate
from smelt.model._walk import multiplied
from smelt.parallel._shard import gathered, load_optimizer, optimizer_state, scatter, shard
from smelt.progress import Track
from smelt.recipe import Training
from smelt.spec import SmeltError

__all__ = ["kept_mean", "train"]

ENTRIES = 200  # of the log, at most
SAVING = 0.02  # share of the time that checkpoints may take
EQUIPMENT = "equipment.pt"
LEARNED = "learned.safetensors"  # of a student that stands still but for an adapter
STILL = 3  # log entries in a row without any gradient before it is said


def kept_mean(loss: Tensor, keep: Tensor, items: Tensor | int) -> Tensor:
    """The one reduction: the losses of the kept positions, summed, over `items`, how many the whole step keeps."""
    return torch.where(keep, loss, 0.0).sum() / torch.as_tensor(items, device=loss.device).clamp(min=1)


def _learned(student: nn.Module) -> dict[str, Tensor] | None:
    """What is trained of a student whose other weights stand still; None where all of it is trained."""
    weights = dict(student.named_parameters())
    free = {name: p.detach() for name, p in weights.items() if p.requires_grad}
    return None if len(free) == len(weights) else free


class _Pair(nn.Module):
    """A student and the equipment of its objective: one module for the optimizer, called as the student.

    DDP looks at the student only: it follows a forward's outputs, and equipment is used after them. `_Loop` sums its gradients.
    """

    def __init__(self, student: nn.Module, equipment: nn.Module):
        super().__init__()
        self.student, self.equipment = student, equipment
        mine = {id(p) for p in student.parameters()}
        named = [*equipment.named_parameters(), *equipment.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [f"equipment.{name}" for name, value in named if id(value) not in mine]
        self.own = [p for p in equipment.parameters() if id(p) not in mine]
        self._keys_to_ignore_on_save = getattr(student, "_keys_to_ignore_on_save", None)  # Trainer asks for it when it resumes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)


class _Loop(Trainer):
    """Trainer with the loss of an objective: sum over kept positions / number of kept positions in the step."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        step: Callable[..., tuple[Tensor, Tensor]],
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
        student: PreTrainedModel,
        equipment: nn.Module | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.step, self.change, self.student, self.equipment, self.pair = step, change, student, equipment, kwargs["model"]
        self.step_loss: Tensor | float = 0.0  # of the effective batch so far, this process's part
        self.model_accepts_loss_kwargs = True  # so that labels of the whole effective batch are counted
        self._loss_shifts_labels = False  # rows come with labels already shifted
        self.started = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        progress = self.state.global_step / max(1, self.state.max_steps)
        loss, keep = self.step(model, inputs, progress)
        total = kept_mean(loss, keep, keep.sum() if num_items_in_batch is None else num_items_in_batch)
        if not self.started:  # later losses are looked at when they are logged, so that a device need not wait
            self.started = True
            _finite(total.item(), self.state.global_step + 1)
        self.step_loss = self.step_loss + total.detach()
        return total * self.accelerator.num_processes  # ranks average their gradients; we want their sum

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if isinstance(self.pair, _Pair) and self.args.world_size > 1 and self.accelerator.sync_gradients:
            for p in self.pair.own:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.args.world_size  # the mean, as DDP's
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.change is not None and batches:  # before what counts is counted
            batches = [self.change({name: value.to(device) for name, value in batch.items()}) for batch in batches]
            items = torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum()
            items = self.accelerator.gather(items).sum()
        return batches, items

    def floating_point_ops(self, inputs):
        return 0  # counted once, in `train`; Trainer would walk over the model at every step

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            learned = _learned(self.student)
            if learned is None:
                self.student.save_pretrained(folder)
            else:
                save_file({name: value.contiguous() for name, value in learned.items()}, folder / LEARNED, {"format": "pt"})
            if self.equipment is not None:
                torch.save(self.equipment.state_dict(), folder / EQUIPMENT)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        learned = _learned(self.student)
        if learned is None:
            super()._load_from_checkpoint(resume_from_checkpoint, self.student)
        else:
            held = load_file(Path(resume_from_checkpoint) / LEARNED)
            for name, value in learned.items():
                value.copy_(held[name])
        if self.equipment is not None:
            self.equipment.load_state_dict(torch.load(Path(resume_from_checkpoint) / EQUIPMENT, weights_only=True))


class _Sharded(_Loop):
    """The loop over a model that is cut over the processes; `student` is where its weights are put together."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.cut = kwargs["model"]
        # what Trainer calls a model that owns its placement and the reduction of its gradients: accelerate leaves it alone
        self.is_distributed_loading_by_transformers = True

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self):
        self.cut.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.cut.set_requires_gradient_sync(True)

    def _get_grad_norm(self, model, grad_norm=None):
        norm: Any = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _save(self, output_dir=None, state_dict=None):
        gathered(self.cut, self.student)
        if self.args.should_save:
            self.student.save_pretrained(str(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir):
        optimizer: Any = self.optimizer
        schedule: Any = self.lr_scheduler
        state = optimizer_state(self.cut, optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(schedule.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, self.student)
        scatter(self.student, self.cut)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            optimizer: Any = self.optimizer
            schedule: Any = self.lr_scheduler
            load_optimizer(self.cut, optimizer.optimizer, Path(checkpoint) / "optimizer.pt")
            schedule.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


class _Watch(TrainerCallback):
    """Checkpoints by the clock, marks finished ones, moves the bar, looks at what is logged."""

    def __init__(self, bar: Track, per_step: int, save_seconds: float, warnings: list[str], before: dict[str, Any], after: Callable | None):
        self.after = after
        self.bar, self.per_step, self.save_seconds, self.warnings, self.before = bar, per_step, save_seconds, warnings, before
        self.saved = self.began = time.monotonic()
        self.wait, self.still, self.loss, self.interrupted = save_seconds, 0, "", False
        self.loop: Any = None

    @property
    def seconds(self) -> float:
        """Spent on the steps done so far, those before a resume included."""
        return self.before.get("seconds", 0.0) + time.monotonic() - self.began

    def on_train_begin(self, args, state, control, **kwargs):
        # the mean of a log interval that a checkpoint cut in two goes on where it was
        self.loop._tr_loss += self.before.get("loss", 0.0)
        self.loop._globalstep_last_logged = self.before.get("logged", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.advance(self.per_step, self.loss)
        if self.after is not None:
            loss = torch.as_tensor(self.loop.step_loss)
            if args.world_size > 1:
                torch.distributed.all_reduce(loss)
            self.after(state.global_step, loss.item())
        self.loop.step_loss = 0.0
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or last
        due = not last and time.monotonic() - self.saved > self.wait
        if args.world_size > 1:  # the clocks differ: the first process decides for all, where they meet anyway
            due = control.should_log and not last and _agreed(due, args.device)
        if due or self.interrupted:
            control.should_save = True
            control.should_training_stop = control.should_training_stop or self.interrupted
            self.saved = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            about = {"seconds": self.seconds, "warnings": self.warnings}
            about |= {"loss": self.loop._tr_loss.item(), "logged": self.loop._globalstep_last_logged}
            _complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", about)
        now = time.monotonic()
        self.wait, self.saved = max(self.save_seconds, (now - self.saved) / SAVING), now

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        self.loss = f"loss {logs['loss']:.4f}"
        _finite(logs["loss"], state.global_step)
        self.still = 0 if logs.get("grad_norm") else self.still + 1
        if self.still == STILL or (STILL > self.still == state.global_step == state.max_steps):
            self.warnings.append(f"the gradient was exactly zero up to step {state.global_step}: nothing is being learned")


def _finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise SmeltError(f"the loss is {loss} at step {step}; a lower lr usually helps")


def _agreed(mine: bool, device: torch.device) -> bool:
    flag = torch.tensor(int(mine), device=device)
    torch.distributed.broadcast(flag, src=0)
    return bool(flag.item())


def train(
    model: PreTrainedModel,
    rows: Dataset,
    step: Callable[[Any, dict[str, Tensor], float], tuple[Tensor, Tensor]],
    settings: Training,
    folder: Path,
    seed: int = 0,
    label: str = "train",
    warnings: list[str] | None = None,
    fsdp: bool = False,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    equipment: nn.Module | None = None,
    after: Callable[[int, float], None] | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """Train `model` in place. `step(model, inputs, progress) -> (loss [...], keep [...])`; rows are taken in order.

    `change(inputs)` may put other rows in the place of a micro-batch, before what counts is counted. `equipment` is
    trained beside the model and put into every checkpoint, its buffers too, but is no part of it.
    `partial`: the loss leaves some of the model without a gradient (hidden states only), which DDP must be told.
    `after(steps done, loss)` is called after every optimizer step with the loss of its whole batch.

    `folder` holds checkpoints while it runs; call again with the same arguments after a kill and it goes on, with the
    losses and weights it would have had. Ctrl-C writes a checkpoint at the end of the step, then raises.
    Returns {"log": [{step, tokens, loss, lr, grad_norm}], "steps", "tokens", "seconds", "flops", "warnings",
    "resumed_at"}: seconds over all resumes, flops = 6 N per token (4 for what stands still), N without a lookup-only embedding;
    `warnings` (a list that `step` may add to) is what looked wrong. Peak memory: weights, gradients, optimizer state
    (1 or 2 x weights) and the activations of `micro` rows; of several processes each has a whole copy (DDP), or with
    `fsdp` its part of weights, gradients and optimizer state (see `parallel._shard`). Raises SmeltError when a loss is not finite.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = settings.micro or math.ceil(settings.batch / world)
    if settings.batch % (micro * world):
        raise SmeltError(f"train: batch={settings.batch} is not a multiple of micro={micro} times {world} processes")
    if fsdp and settings.optimizer == "muon":
        raise SmeltError("train: optimizer=muon needs whole matrices, which FSDP cuts; take adamw, or whole copies (DDP)")
    if fsdp and equipment is not None:
        raise SmeltError("train: shard=fsdp2 cuts the student only; an objective with parameters of its own needs whole copies (DDP)")
    steps, per_step = settings.steps, settings.batch * settings.context
    resume = last_complete(Path(folder))
    before = json.loads((resume / "complete").read_text() or "{}") if resume else {}
    done = int(resume.name.rsplit("-", 1)[1]) if resume else 0
    warnings = [] if warnings is None else warnings
    warnings.extend(text for text in before.get("warnings", ()) if text not in warnings)
    half = settings.precision == "bf16"
    with leaving_no_trace(model), halved(model, half), bar_of(label, steps * per_step, done * per_step) as bar:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=settings.batch // (micro * world),
            learning_rate=settings.lr,
            max_grad_norm=settings.clip,
            logging_steps=max(1, steps // ENTRIES),
            logging_nan_inf_filter=False,
            save_strategy="no",
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            log_level_replica="error",
            seed=seed,
            data_seed=seed,
            bf16=half,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=settings.compile,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=partial,
        )
        cut: Any = shard(model, arguments.device) if fsdp and world > 1 else model
        optimizer = optimizer_of(cut, settings, equipment)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: rate(at, steps, settings))
        watch = _Watch(bar, per_step, settings.save_seconds, warnings, before, after)
        whole = cut if equipment is None else _Pair(cut, equipment)
        given: dict[str, Any] = {
            "step": step,
            "change": change,
            "student": model,
            "equipment": equipment,
            "model": whole,
            "args": arguments,
        }
        given |= {"train_dataset": rows, "optimizers": (optimizer, schedule), "callbacks": [watch]}
        loop = _Loop(**given) if cut is model else _Sharded(**given)
        watch.loop = loop
        loop.remove_callback(PrinterCallback)
        with interrupts(watch, world):
            loop.train(resume_from_checkpoint=str(resume) if resume else None)
        if cut is not model:
            gathered(cut, model)
    if watch.interrupted:
        raise KeyboardInterrupt
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log = [
        {
            "step": entry["step"],
            "tokens": entry["step"] * per_step,
            "loss": entry["loss"],
            "lr": entry["learning_rate"],
            "grad_norm": entry["grad_norm"],
        }
        for entry in loop.state.log_history
        if "loss" in entry
    ]
    return {
        "log": log,
        "steps": steps,
        "tokens": steps * per_step,
        "seconds": watch.seconds,
        "flops": (4 * multiplied(model) + 2 * min(multiplied(model), free)) * steps * per_step,
        "warnings": warnings,
        "resumed_at": done,
    }
