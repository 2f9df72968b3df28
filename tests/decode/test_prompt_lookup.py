import pytest
import torch

from smelt.decode._count import count
from smelt.decode.prompt_lookup import PromptLookup
from smelt.model._tiny import tiny
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def drafted(ids: list[int], tokens: int, ngram: int) -> list[int]:
    """What followed the last earlier place of the longest ending that has one, and then itself again."""
    for n in range(min(ngram, len(ids) - 1), 0, -1):
        for i in reversed(range(len(ids) - n)):
            if ids[i : i + n] == ids[-n:]:
                said = list(ids)
                for j in range(tokens):
                    said.append(said[i + n + j])
                return said[len(ids) :]
    return []


def rounds(prompt: list[int], answer: list[int], tokens: int, ngram: int) -> int:
    """Target calls needed to say `answer` after `prompt`."""
    done, calls = 0, 0
    while done < len(answer):
        draft = drafted(prompt + answer[:done], tokens, ngram)
        kept = 0
        while kept < len(draft) and done + kept < len(answer) and draft[kept] == answer[done + kept]:
            kept += 1
        done, calls = done + kept + 1, calls + 1
    return calls


@pytest.mark.parametrize(("tokens", "ngram"), [(1, 1), (3, 2), (10, 3), (40, 1)])
def test_calls_are_those_of_the_obvious_search(tokens, ngram):
    target = tiny("llama", eos_token_id=None, bos_token_id=None)
    random = torch.Generator().manual_seed(3)
    arguments = PromptLookup(tokens=tokens, ngram=ngram).arguments(target, None)
    total = 0
    for _ in range(4):
        ids = torch.randint(2, 320, (1, 12), generator=random).repeat(1, 2)
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
        with count(target) as seen:
            out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, **arguments)
        assert out.tolist() == plain.tolist()
        assert seen.calls == rounds(ids[0].tolist(), plain[0, 24:].tolist(), tokens, ngram)
        total += seen.calls
    assert total < 200


def test_recipe_text_and_ranges():
    assert text(parse("prompt_lookup(tokens=5)", "decode")) == "prompt_lookup(tokens=5)"
    check(PromptLookup())
    for bad in ("prompt_lookup(tokens=0)", "prompt_lookup(ngram=0)"):
        with pytest.raises(SmeltError):
            parse(bad, "decode")
