"""Keep the text that a strong model finds much likelier than a weak one: worth learning, and learnable."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Interval

from smelt.data import Corpus, Document, Split
from smelt.data._bigram import Bigram
from smelt.data._text import clean, fingerprint
from smelt.data._tokens import PLAIN, pieces
from smelt.model._files import identity
from smelt.model._load import Loaded, load, locate, same_tokenizer
from smelt.progress import track
from smelt.spec import Paper, SmeltError

__all__ = ["MiniPLM"]

WAITING = 256  # chunks that are sorted by length before they are scored together
LOGITS = 1 << 26  # numbers in the logits of one call


@dataclass(frozen=True)
class MiniPLM:
    """Keep x iff r(x) = [log p_teacher(x) - log p_reference(x)] / |x| is among the top `keep` of all train chunks.

    A chunk is `chunk` tokens of a document (its last one may be shorter; a document of one chunk is kept whole, under its
    own name); it is scored after an end-of-text token, nats per token. Ties go to the earlier one, so a larger share keeps all
    that a smaller one keeps. Kept chunks come in the order of the corpus; validation and test are left as they are.

    `teacher` and `reference` are models (`embedded`, a folder, a hub id) of one tokenizer; the reference is to be weaker and
    made of the same kind of text, but not of this text. Without one it is a bigram model of the teacher's tokens, counted
    on the validation split: it tells random, shuffled and unigram noise from code (area under the curve 1.00), but prefers
    text that repeats itself (0.16 for 8 tokens over and over), which a teacher copies and bigrams cannot: name a model there.
    `pool` is the share of the documents that is scored at all, chosen by their names.

    Cost: 2 (N_teacher + N_reference) FLOPs for each token of the pool and three passes over the train split, whenever it is
    read (none for keep=1); a run reads it once and keeps its token ids under this digest. Memory: both models, 256 MB of logits, 4 bytes a
    chunk. Raises SmeltError for models of different tokenizers or with less room than a chunk, for an empty pool, and
    without reference for an empty validation split. Models with code of their own or pickled weights are not taken.

    Differs from the paper: chunks end with their document (there texts are joined); a counted reference (there a model of
    104M parameters). Its README prints a quotient of the two; this is the difference, as in its code.
    """

    paper: ClassVar = Paper("MiniPLM: Knowledge Distillation for Pre-Training Language Models", "arXiv:2410.17215", "difference sampling")
    corpus: Corpus
    teacher: str = "embedded"
    reference: str = ""  # a model; "": bigrams of the validation split
    keep: Annotated[float, Interval(gt=0, le=1)] = 0.5
    chunk: Annotated[int, Ge(8)] = 1024
    pool: Annotated[float, Interval(gt=0, le=1)] = 1.0

    def documents(self, split: Split) -> Iterator[Document]:
        if split != "train":
            yield from self.corpus.documents(split)
            return
        if self.keep == 1:  # nothing to choose
            yield from (document for document, _ in self._chunks(self._load(self.teacher).tokenizer))
            return
        scores, tokenizer = self.scores()
        kept = np.zeros(len(scores), bool)
        kept[np.argsort(-scores, kind="stable")[: max(1, round(self.keep * len(scores)))]] = True
        for (document, _), chosen in zip(self._chunks(tokenizer), kept, strict=True):
            if chosen:
                yield document

    def digest(self) -> str:
        models = [identity(locate(name)) if name else "bigram" for name in (self.teacher, self.reference)]
        about = f"{self.keep} {self.chunk} {self.pool} {models} {self.corpus.digest()}"
        return "miniplm-" + hashlib.sha256(about.encode()).hexdigest()

    def scores(self) -> tuple[np.ndarray, Any]:
        """(r of every chunk of the pool, in the order of the corpus; the teacher's tokenizer)."""
        teacher = self._load(self.teacher)
        tokenizer = teacher.tokenizer
        reference: Loaded | Bigram
        if self.reference:
            reference = self._load(self.reference)
            if not same_tokenizer(tokenizer, reference.tokenizer):
                raise SmeltError(
                    f"miniplm: '{self.teacher}' and '{self.reference}' differ in their tokenizers, so they read different tokens"
                )
        else:
            reference = self._counted(tokenizer)
        total = sum(len(document.text) for document in self._pool())
        found: list[np.ndarray] = []
        waiting: list[list[int]] = []
        with track("miniplm: scoring", total, "characters") as bar:
            for document, ids in self._chunks(tokenizer):
                waiting.append(ids)
                bar.advance(len(document.text))
                if len(waiting) == WAITING:
                    found.append(difference(waiting, teacher, reference))
                    waiting = []
            if waiting:
                found.append(difference(waiting, teacher, reference))
        if not found:
            raise SmeltError(f"miniplm: pool={self.pool} leaves no text of the train split to choose from")
        return np.concatenate(found), tokenizer

    def _load(self, name: str) -> Loaded:
        loaded = load(name)
        room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or self.chunk
        if loaded.model.get_output_embeddings() is None:
            raise SmeltError(f"miniplm: '{name}' does not predict next tokens, so it scores no text")
        if self.chunk > room:
            raise SmeltError(f"miniplm: chunk={self.chunk} is longer than the {room} positions of '{name}'")
        if loaded.tokenizer.eos_token_id is None or not loaded.tokenizer.is_fast:
            raise SmeltError(f"miniplm: the tokenizer of '{name}' needs an end-of-text token and must say which text a token covers")
        return loaded

    def _counted(self, tokenizer: Any) -> Bigram:
        start, size = tokenizer.eos_token_id, max(tokenizer.get_vocab().values()) + 1
        model = Bigram(
            ([start, *tokenizer(clean(piece.text), **PLAIN)["input_ids"]] for piece in pieces(self.corpus.documents("validation"))), size
        )
        if not len(model.keys):
            raise SmeltError("miniplm: the validation split is empty, so no reference can be counted on it; name one: reference='MODEL'")
        return model

    def _pool(self) -> Iterator[Document]:
        for document in self.corpus.documents("train"):
            if self.pool == 1 or fingerprint(document.name, purpose=b"miniplm") < self.pool * 2**64:
                yield document

    def _chunks(self, tokenizer: Any) -> Iterator[tuple[Document, list[int]]]:
        """(chunk as a document, its ids after the end-of-text token)."""
        for name, text in pieces(self._pool()):
            text = clean(text)
            made = tokenizer(text, return_offsets_mapping=True, **PLAIN)
            ids, spans = made["input_ids"], made["offset_mapping"]
            cuts = [0, *(spans[at][0] for at in range(self.chunk, len(ids), self.chunk)), len(text)]
            for part, (low, high) in enumerate(itertools.pairwise(cuts)):
                inside = ids[part * self.chunk : (part + 1) * self.chunk]
                if inside and text[low:high].strip():
                    yield Document(f"{name}:{part}" if len(cuts) > 2 else name, text[low:high]), [tokenizer.eos_token_id, *inside]


def difference(rows: list[list[int]], teacher: Loaded, reference: Loaded | Bigram) -> np.ndarray:
    """r [n] in nats per token of rows of ids, each after a start token that is not scored."""
    strong = _mean_log(rows, teacher)
    if isinstance(reference, Bigram):
        return strong - np.array([reference.log_probabilities(row).mean() for row in rows])
    return strong - _mean_log(rows, reference)


@torch.no_grad()
def _mean_log(rows: list[list[int]], loaded: Loaded) -> np.ndarray:
    """Mean log p of the tokens of every row; rows of like length together, padded on the right where nothing looks back."""
    model = loaded.model
    width = model.get_output_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    found, at = np.zeros(len(rows)), 0
    while at < len(order):
        longest = len(rows[order[at]])
        part = order[at : at + max(1, LOGITS // (width * longest))]
        ids, labels = (torch.zeros(len(part), longest - 1, dtype=torch.long) + fill for fill in (0, -100))
        for place, index in enumerate(part):
            row = torch.tensor(rows[index])
            ids[place, : len(row) - 1], labels[place, : len(row) - 1] = row[:-1], row[1:]
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
        lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().to(model.device), reduction="none")
        found[part] = -(lost.view(labels.shape).double().sum(1).cpu() / (labels != -100).sum(1)).numpy()
        at += len(part)
    return found
