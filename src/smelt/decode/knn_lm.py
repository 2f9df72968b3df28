"""A language model mixed with the tokens that followed the most similar states in a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from smelt.decode import Steered
from smelt.decode._datastore import Datastore, collect, keys_of, keys_seen, weights_digest
from smelt.decode._given import corpus_of
from smelt.model._load import vocabulary
from smelt.spec import Paper, SmeltError

__all__ = ["KNNLM"]

POSITIONS = 512  # mixed at once
PROBED = 64  # tokens of the first text whose keys go into the digest
_last: dict[str, Datastore] = {}  # the newest store of the process, so that binding it again with another weight builds nothing


@dataclass(frozen=True)
class KNNLM(Steered):
    """p(y) = weight * sum_{i in N} 1[v_i = y] exp(-d_i / T) / sum_{i in N} exp(-d_i / T) + (1 - weight) * p_LM(y).

    A key is the input of the last layer's feed-forward, behind its norm, at each of the first `tokens` positions of the train
    split of `data`, at most `document` of each document (0: all of it), so that a small store is not one of a few modules;
    v_i the token that followed, N the `k` keys nearest to the state of the query in squared L2 distance
    d, found exactly. Equal tokens add up. temperature=0: T = (mean of the query's k distances) / 8, because a T in absolute
    units means nothing at another model's scale. The hook gives ln p as logits [b, n, V], float32, for every position that
    is asked for, so probes, sampling and verified drafts read the same law. weight=0 puts no hook on.

    A store stands for its model and corpus: it is built when the method is bound, before any hook is on, and kept while no
    other is built in the process. `store` names a folder that keeps it across processes, one file named by the digest of
    the weights, some states, the tokenizer, the corpus and the settings; a changed model builds anew.

    Cost: building reads `tokens` tokens once in pieces of `context`. n (D b + 8) + 4 D bytes, b = 4 for float32 keys and 2 for
    float16 (the paper's n (D b + 4), and each key's norm). Each position: n D multiply-adds and k D to take distances.
    Exact search goes through all keys for each token: 100,000 of 256 numbers are 102 MB read per generated token.

    When it hurts (`benchmarks/knn_lm_when_it_hurts.py`): a token that none of the neighbours has costs ln(1 / (1 - weight)) nats,
    the most any token can lose. On the embedded model and 6,202 held-out tokens of code 30,000 keys at weight 0.05 gain 0.014 nats
    with document=0 and 0.025 with 1024, and lose 0.037 at 0.25; 10,000 (document=0) at 0.1 lose 0.039, 68 % of it on tokens
    that the store lacks. How far the nearest neighbour is told little there, whether the neighbours agree more.
    Don't measure on stored text: every state would find itself.

    Raises SmeltError for what is no corpus, without a tokenizer, for an empty train split, keys beyond the range of
    float16, a damaged file, and for a call with labels, whose loss would be the plain model's.

    Differs from the paper: exact search and no product quantization; T from the distances (the paper's is 1); k=64 and
    weight=0.05 where the paper has 1024 and 0.25 at 103 million keys; the mean is over one query's own neighbours, so that
    a text comes out the same alone and in company (reconstruction).
    """

    paper: ClassVar = Paper(
        "Generalization through Memorization: Nearest Neighbor Language Models", "arXiv:1911.00172", "equations 2 and 3"
    )
    data: Any = "stdlib"  # a corpus, or text as after `data:` in a recipe
    tokens: Annotated[int, Ge(1)] = 100_000  # n
    document: Annotated[int, Ge(0)] = 1024  # most of one document; 0: no limit
    k: Annotated[int, Ge(1)] = 64
    weight: Annotated[float, Ge(0), Le(1)] = 0.05  # lambda
    temperature: Annotated[float, Ge(0)] = 0.0  # T; 0: relative to the distances
    keys: Literal["float32", "float16"] = "float32"
    context: Annotated[int, Gt(1)] = 1024  # tokens of one piece; at most the model's
    store: str = ""  # folder; "": in memory only

    def __post_init__(self) -> None:
        corpus_of(self.data, "knn_lm")

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {}

    @contextmanager
    def attach(self, model: Any, tokenizer: Any) -> Iterator[None]:
        if not self.weight:
            yield
            return
        store = self.built(model, tokenizer)
        with keys_seen(model) as seen:

            def mix(_: Any, __: tuple, kwargs: dict[str, Any], out: Any) -> Any:
                if isinstance(out, tuple):
                    raise SmeltError("knn_lm reads the logits of a call by name; leave return_dict on")
                if getattr(out, "loss", None) is not None:
                    raise SmeltError("knn_lm: the loss of a call with labels is the plain model's; take it from the logits")
                states, asked = seen.pop(), kwargs.get("logits_to_keep")
                states = states[:, asked] if isinstance(asked, Tensor) else states[:, -out.logits.shape[1] :]
                out.logits = self.mixed(out.logits.flatten(0, 1), states.flatten(0, 1), store).view(out.logits.shape)
                return out

            handle = model.register_forward_hook(mix, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def built(self, model: Any, tokenizer: Any) -> Datastore:
        """The store of this model and corpus: the one at hand, the one on the disk, or a new one."""
        if tokenizer is None:
            raise SmeltError("knn_lm: reading a corpus needs the model's tokenizer")
        data, config = corpus_of(self.data, "knn_lm"), model.config.get_text_config(decoder=True)
        context = min(self.context, getattr(config, "max_position_embeddings", None) or self.context)
        texts = _texts(data, tokenizer, self.document)
        first = next(texts, None)
        if first is None:
            raise SmeltError("knn_lm: the train split of the data is empty, so there is nothing to store")
        probe = keys_of(model, first[: min(PROBED, context)]).cpu().float()  # also sees what else is bound to the model
        about: list[Any] = [weights_digest(model), hashlib.sha256(probe.numpy().tobytes()).hexdigest(), vocabulary(tokenizer)]
        about += [repr(data), data.digest(), self.tokens, self.document, context, self.keys]
        name = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
        if name not in _last:
            file = Path(self.store) / f"{name}.safetensors" if self.store else None
            if file is not None and file.is_file():
                store = Datastore.read(file, model.device)
            else:
                store = collect(model, _texts(data, tokenizer, self.document), self.tokens, context, getattr(torch, self.keys))
                if file is not None:
                    store.save(file)
            _last.clear()
            _last[name] = store
        return _last[name]

    def law(self, distances: Tensor, tokens: Tensor, vocab: int) -> Tensor:
        """p_kNN [m, V] from squared distances and tokens [m, k]."""
        scale = self.temperature or distances.mean(1, keepdim=True) / 8
        nearer = distances - distances.min(1, keepdim=True).values
        weights = (-nearer / torch.as_tensor(scale, device=distances.device).clamp_min(1e-30)).softmax(1)
        return weights.new_zeros(len(weights), vocab).scatter_add_(1, tokens, weights)

    def mixed(self, logits: Tensor, states: Tensor, store: Datastore) -> Tensor:
        """ln p [m, V] of the mixture, float32."""
        share = torch.tensor(self.weight, dtype=torch.float64)
        log_knn, log_lm = float(share.log()), float((-share).log1p())  # of 1 - weight: -inf where it is 1
        parts = []
        for plain, queries in zip(logits.split(POSITIONS), states.split(POSITIONS), strict=True):
            said = self.law(*store.nearest(queries, self.k), plain.shape[1]).to(plain.device)
            parts.append(torch.logaddexp(plain.float().log_softmax(-1) + log_lm, said.log() + log_knn))
        return torch.cat(parts)

    @classmethod
    def example(cls, draft: Path) -> KNNLM:
        return cls(tokens=256, k=8, weight=0.25)


def _texts(data: Any, tokenizer: Any, most: int) -> Iterator[list[int]]:
    """Ids of each document of the train split behind a start token, as the probes read held-out text; `most` of them, 0: all."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for document in data.documents("train"):
        text = document.text.encode("utf-8", "replace").decode()
        ids = ([] if start is None else [start]) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids[: most + 1] if most else ids  # `most` tokens with one after each
