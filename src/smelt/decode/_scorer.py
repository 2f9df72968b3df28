"""What ranks several continuations of one text: functions (prefix ids, suffixes) -> one score each, larger is better.

    likelihood    (1 / |s|) sum_i ln p(s_i | x, s_<i)
    information   sum_i ln p(s_i | x, s_<i) - sum_i ln p(s_i | start, s_<i): pointwise mutual information of x and s
    similarity    cos(e(x), e(s)), e the mean of an encoder's last states over the tokens of a text
    judged        any function of texts

Laws are the raw ones of the scoring model, whatever temperature or truncation the continuations were drawn with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smelt.spec import SmeltError

__all__ = ["Judge", "Scorer", "information", "judged", "likelihood", "log_likelihoods", "similarity"]

Scorer = Callable[[list[int], list[list[int]]], Tensor]  # -> [n] float64
Judge = Callable[[str, list[str]], Sequence[float]]

ROWS = 16  # continuations read at once


def likelihood(model: Any) -> Scorer:
    def score(prefix: list[int], suffixes: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(suffix) for suffix in suffixes], dtype=torch.float64)
        return log_likelihoods(model, prefix, suffixes) / lengths

    return score


def information(model: Any, start: int) -> Scorer:
    """`start`: the token that stands for the beginning of any text."""

    def score(prefix: list[int], suffixes: list[list[int]]) -> Tensor:
        return log_likelihoods(model, prefix, suffixes) - log_likelihoods(model, [start], suffixes)

    return score


@torch.no_grad()
def log_likelihoods(model: Any, prefix: list[int], suffixes: Sequence[list[int]]) -> Tensor:
    """ln p(suffix | prefix) [n] in nats, float64. One call per `ROWS`, padded on the right, which causality hides."""
    found = []
    for at in range(0, len(suffixes), ROWS):
        part = suffixes[at : at + ROWS]
        longest = max(map(len, part))
        ids = torch.tensor([prefix + suffix + [0] * (longest - len(suffix)) for suffix in part], device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest + 1, return_dict=True).logits[:, :-1].float()
        said = logits.log_softmax(-1).gather(-1, ids[:, len(prefix) :, None])[..., 0].double().cpu()
        real = torch.arange(longest)[None] < torch.tensor([len(suffix) for suffix in part])[:, None]
        found.append(said.where(real, 0.0).sum(1))
    return torch.cat(found)


def similarity(model: Any, tokenizer: Any, writer: Any) -> Scorer:
    """`model` and `tokenizer` encode; `writer` is the tokenizer of the texts. Each text is cut to the encoder's length, the
    prefix to its end, a suffix to its beginning. Raises SmeltError for a text without a token in it."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
    special = len(tokenizer("")["input_ids"])
    if tokenizer.pad_token_id is None:
        raise SmeltError("rankgen: the tokenizer of the encoder has no padding token, so texts cannot be read side by side")

    def encoded(texts: list[str], side: str) -> Tensor:
        rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        room = longest - special
        cut = [ids[-room:] if side == "left" else ids[:room] for ids in rows]
        batch = tokenizer.pad({"input_ids": [_framed(tokenizer, ids) for ids in cut]}, padding_side="right", return_tensors="pt")
        given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = model.base_model(**given).last_hidden_state.double()
        real = given["attention_mask"].double()[..., None]
        return torch.nn.functional.normalize((states * real).sum(1) / real.sum(1).clamp_min(1), dim=-1).cpu()

    def score(prefix: list[int], suffixes: list[list[int]]) -> Tensor:
        texts = [writer.decode(suffix, skip_special_tokens=True) for suffix in suffixes]
        before = encoded([writer.decode(prefix, skip_special_tokens=True)], "left")
        return encoded(texts, "right") @ before[0]

    return score


def _framed(tokenizer: Any, ids: list[int]) -> list[int]:
    """With the special tokens of a single text around it."""
    frame = tokenizer("", verbose=False)["input_ids"]
    first = [frame[0]] if frame and frame[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id) else []
    return first + ids + frame[len(first) :]


def judged(judge: Judge, writer: Any) -> Scorer:
    """A function of texts as a scorer. Raises SmeltError when it does not give one number for each."""

    def score(prefix: list[int], suffixes: list[list[int]]) -> Tensor:
        texts = [writer.decode(suffix, skip_special_tokens=True) for suffix in suffixes]
        said = list(judge(writer.decode(prefix, skip_special_tokens=True), texts))
        if len(said) != len(texts):
            raise SmeltError(f"rankgen: the scorer gave {len(said)} scores for {len(texts)} continuations")
        return torch.tensor([float(one) for one in said], dtype=torch.float64)

    return score
