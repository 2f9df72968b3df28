"""A new, untrained Mistral-architecture decoder with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from smelt.spec import Paper, SmeltError

__all__ = ["Mistral"]

END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Mistral:
    """parameters = V d + L (2 d (h + g) 64 + 3 d f + 2 d) + d, embeddings shared with the head.

    d hidden, f ffn, h query heads and g key/value heads of dimension 64, L layers, V vocabulary. Full causal
    attention (no sliding window), RMSNorm, SwiGLU, rotary positions. Weights ~ N(0, 0.02), the matrices that write
    to the residual stream (o_proj, down_proj) divided by sqrt(2 L) as in GPT-2. The tokenizer is a byte-level BPE
    trained on `data`'s train split, so any text round-trips. Raises SmeltError without `data`.
    """

    paper: ClassVar = Paper("Mistral 7B", "arXiv:2310.06825", "table 1")
    layers: Annotated[int, Ge(1)] = 8
    hidden: Annotated[int, Ge(64)] = 256
    ffn: Annotated[int, Ge(1)] = 640
    heads: Annotated[int, Ge(1)] = 4
    kv_heads: Annotated[int, Ge(1)] = 2
    vocab: Annotated[int, Ge(258), Le(1 << 20)] = 4096
    context: Annotated[int, Ge(16)] = 2048
    data: Any = None  # a corpus: the tokenizer is trained on its train split

    def create(self, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        if self.data is None:
            raise SmeltError("mistral needs a corpus for its tokenizer: mistral(data=stdlib())")
        config = self.config()
        tokenizer = byte_level_bpe((d.text for d in self.data.documents("train")), self.vocab, self.context)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MistralForCausalLM(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight /= (2 * self.layers) ** 0.5
                layer.mlp.down_proj.weight /= (2 * self.layers) ** 0.5
        return model, tokenizer

    def config(self) -> MistralConfig:
        if self.heads % self.kv_heads:
            raise SmeltError(f"mistral: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        return MistralConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=64,
            max_position_embeddings=self.context,
            sliding_window=None,
            tie_word_embeddings=True,
        )


def byte_level_bpe(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab` tokens, the end-of-text and padding tokens included. Deterministic."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=context)
