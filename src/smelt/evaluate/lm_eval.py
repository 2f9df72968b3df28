"""Standard benchmarks through EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Len

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder
from smelt.spec import Paper, SmeltError, nearest

__all__ = ["LmEval"]


@dataclass(frozen=True)
class LmEval(Probe):
    """lm_eval_TASK_METRIC = what lm-eval reports for TASK, its filter named when it is not "none".

    `tasks` are names lm-eval knows, or has in the folder `include` of task files (which may point at local data). Samples
    are per document where the metric is their mean, for paired ratios. Nothing is downloaded by smelt, but a task's
    own data set is fetched by lm-eval when it is not on this machine.

    The bound model is used as it stands: tasks that write text go through the bound cache and decoding; tasks that
    compare likelihoods read each text in one call, in which a cache method has not yet forgotten anything, so
    measure caches with perplexity or recall. batch=1 keeps padding out of the figures.

    Cost: lm-eval's own. Raises SmeltError when lm-eval is not installed, a task is unknown, or it cannot be run.
    """

    paper: ClassVar = Paper("Lessons from the Trenches on Reproducible Evaluation", "arXiv:2405.14782", "the harness")
    tasks: Annotated[tuple[str, ...], Len(1)] = ("arc_easy",)
    limit: Annotated[int, Ge(0)] = 0  # documents of each task; 0: all
    shots: Annotated[int, Ge(-1)] = -1  # examples before the question; -1: as the task says
    include: str = ""  # a folder with more task files
    batch: Annotated[int, Ge(1)] = 1

    @classmethod
    def example(cls) -> Self | None:
        return None  # needs lm-eval and the data of a task

    def __call__(self, variant: Variant) -> list[Metric]:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SmeltError(f"lm-eval is not installed ({error.name}): pip install 'smelt[lm-eval]'") from error
        model = decoder(variant, "lm_eval")
        manager = TaskManager(include_path=self.include or None)
        for task in self.tasks:
            if task not in manager.all_tasks:
                raise SmeltError(f"lm-eval has no task '{task}'{nearest(task, manager.all_tasks)}")
        harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(variant.tokenizer), batch_size=self.batch)  # it sets a padding token
        try:
            found = simple_evaluate(
                model=harness,
                tasks=list(self.tasks),
                num_fewshot=None if self.shots < 0 else self.shots,
                limit=self.limit or None,
                bootstrap_iters=0,
                task_manager=manager,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except Exception as error:  # whatever a task or its data raises
            first = str(error).strip().split("\n")[0][:300]
            raise SmeltError(f"lm-eval could not run {', '.join(self.tasks)}: {type(error).__name__}: {first}") from error
        return [metric for task in found["results"] for metric in metrics(found, task)]


def metrics(found: dict[str, Any], task: str) -> list[Metric]:
    """The figures of one task (or group) out of lm-eval's results."""
    made = []
    for key, value in found["results"][task].items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        parts = [s.get(name) for s in found.get("samples", {}).get(task, []) if s.get("filter", "none") == filtered]
        samples = tuple(float(p) for p in parts if isinstance(p, int | float))
        if len(samples) != len(parts) or not samples or not math.isclose(sum(samples) / len(samples), value, abs_tol=1e-9):
            samples = ()  # the metric is not a mean over documents
        higher = found.get("higher_is_better", {}).get(task, {}).get(name, True)
        label = f"lm_eval_{task}_{name}" + ("" if filtered == "none" else f"_{filtered}")
        made.append(Metric(label, float(value), "score", "higher" if higher else "lower", samples, (1.0,) * len(samples)))
    return made
