"""What all trained drafts share: files and refusals, the layer with its memory, the tree, and the training over a still target."""

from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.decode._grower import Grower, Layer, Memory
from smelt.decode._learned import Learned
from smelt.decode._loop import Choice
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer

NAMES = [n for n in registry.names("decode") if issubclass(registry.load("decode", n), Learned)]
V = 320


def target(tmp_path, **more) -> Loaded:
    return Loaded(tiny(**{"layers": 2, "hidden": 32, "ffn": 48, "heads": 2, "kv_heads": 1, **more}), tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"])
def test_the_layer_reads_in_pieces_what_it_reads_at_once(architecture):
    """Rows one by one, in chunks, and all together behind a memory: the same as one causal call."""
    layer = Layer(tiny(architecture).config).eval()
    rows, at = torch.randn(1, 9, 64), torch.arange(9)[None]
    with torch.no_grad():
        once = layer(rows, at)
        for cuts in ([1] * 9, [4, 5], [3, 1, 5]):
            memory, made = Memory(), []
            for part, places in zip(rows.split(cuts, 1), at.split(cuts, 1), strict=True):
                made.append(layer(part, places, None, memory))
            torch.testing.assert_close(torch.cat(made, 1), once, rtol=1e-4, atol=1e-5)
        memory.length = 4  # cut, and read on
        torch.testing.assert_close(layer(rows[:, 4:], at[:, 4:], None, memory), once[:, 4:], rtol=1e-4, atol=1e-5)
    assert (once[:, 1:] - once[:, :-1]).abs().max() > 0.1


class Table(Grower):
    """The law after a text is that of its last token, whatever stands before: what a tree should be can be listed."""

    def __init__(self, model, law, *shape):
        super().__init__(model, *shape)
        self.law, self.calls = law, 0

    def known(self, text, at, states):
        self.calls += 1
        return self.law[text[-1]][None]

    def deeper(self, tokens, above, level):
        self.calls += 1
        return self.law[tokens]


def listed(law, last, depth, width, nodes):
    """EAGLE-2 by hand: {path: sum of log-probabilities} of the nodes that stay."""
    law = law.double().log_softmax(-1)
    level, found = {(): 0.0}, {}
    for _ in range(depth):
        new = {}
        for path, score in level.items():
            row = law[path[-1] if path else last]
            for token in row.topk(width).indices.tolist():
                new[(*path, token)] = score + float(row[token])
        found |= new
        level = dict(sorted(new.items(), key=lambda item: -item[1])[:width])
    return dict(sorted(found.items(), key=lambda item: -item[1])[:nodes])


def test_the_tree_holds_the_best_nodes_and_their_parents(tmp_path):
    model = target(tmp_path, vocab=30).model
    law = 3 * torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    for depth, width, nodes, room in ((4, 3, 12, 99), (4, 3, 12, 2), (1, 5, 3, 99), (3, 2, 99, 99)):
        grower = Table(model, law, True, depth, width, nodes)
        grower.begin([5, 6, 7], Choice([], False))
        assert grower.draft([5, 6, 7], room) is None  # the target has read nothing yet
        grower.kept([5, 6, 7, 8], 0, torch.zeros(3, 32))
        made = grower.draft([5, 6, 7, 8], room)
        paths = []
        for node, parent in enumerate(made.parents):
            assert parent < node
            paths.append(((*paths[parent],) if parent >= 0 else ()) + (int(made.tokens[node]),))
        assert set(paths) == set(listed(law, 8, min(depth, room), width, nodes))
        assert made.law is None and grower.calls == min(depth, room)


def test_a_chain_is_the_likeliest_or_is_drawn_from_the_law_it_names(tmp_path):
    model = target(tmp_path, vocab=30).model
    law = 2 * torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    for sample in (False, True):
        grower = Table(model, law, False, 4, 3, 12)
        grower.begin([5], Choice([], sample))
        grower.kept([5, 8], 0, torch.zeros(1, 32))
        made = grower.draft([5, 8], 9)
        before = [8, *made.tokens.tolist()[:-1]]
        assert made.parents is None and len(made.tokens) == 4
        if sample:
            torch.testing.assert_close(made.law, law[before].softmax(-1))
        else:
            assert made.law is None and made.tokens.tolist() == law[before].argmax(-1).tolist()
