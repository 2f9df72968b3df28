from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from smelt import registry
from smelt.model._load import EMBEDDED, load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights import _merge
from smelt.weights._merge import Merge, affine, largest, merge_folders, together

METHODS = [cls for cls in (registry.load("weights", name) for name in registry.names("weights")) if issubclass(cls, Merge)]
BASED = [cls for cls in METHODS if cls.needs_base]

# ---------------------------------------------------------------------- what methods share


def test_affine_equals_the_sum_in_float64():
    tensors = [torch.randn(5, 7) for _ in range(4)]
    for weights in ([0.25] * 4, [1.5, -0.2, -0.4, 0.1], [-1.0, 1.0, 1.0, 0.0]):
        want = sum(w * t.double() for w, t in zip(weights, tensors))
        assert_close(affine(tensors, weights).double(), want, rtol=0, atol=3e-6)


def test_affine_is_exact_for_equal_tensors_and_for_one_picked():
    tensors = [torch.randn(100) for _ in range(3)]
    assert torch.equal(affine([tensors[0]] * 7, [1 / 7] * 7), tensors[0])
    for at in range(3):
        assert torch.equal(affine(tensors, [float(i == at) for i in range(3)]), tensors[at])


def slow_largest(values, share):
    flat = values.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))  # stable: ties by position
    kept = {i for i in order[: round(share * len(flat))] if flat[i] != 0}
    return torch.tensor([i in kept for i in range(len(flat))]).view_as(values)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.29, 0.5, 0.97, 1.0])
def test_largest_equals_sorting(share):
    ties = torch.tensor([3.0, -3.0, 1.0, 0.0, 3.0, -1.0, 1.0, 0.0, 2.0, 1.0]).view(2, 5)
    for values in (torch.randn(9, 11), ties, torch.zeros(3, 3), torch.ones(4, 4), torch.randn(6, 4).T, torch.tensor(2.0)):
        assert torch.equal(largest(values, share), slow_largest(values, share))


# ---------------------------------------------------------------------- laws of every merging method


def given(method, dtype=torch.float32, spread=0.1):
    """Tensors for the method: its own model's, the others', and the base's."""
    start = torch.randn(12, 16)
    tensors = [(start + spread * torch.randn(12, 16)).to(dtype) for _ in range(1 + len(method.models))]
    return tensors, start.to(dtype) if method.needs_base else None


def test_there_are_merging_methods():
    assert len(METHODS) >= 6 and len(BASED) >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", METHODS)
def test_same_shape_and_dtype_and_nothing_changed_in_place(cls, dtype):
    method = cls()
    tensors, base = given(method, dtype)
    before = [t.clone() for t in (*tensors, *([base] if base is not None else []))]
    first, second = (method("w", tensors, base) for _ in range(2))
    assert torch.equal(first, second), "the same twice"
    assert first.shape == tensors[0].shape and first.dtype == dtype and torch.isfinite(first).all()
    assert all(map(torch.equal, before, (*tensors, *([base] if base is not None else []))))
    assert all(first.data_ptr() != t.data_ptr() for t in tensors), "a tensor of its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", METHODS)
def test_models_that_all_equal_the_base_give_it(cls, dtype):
    method = cls()
    (tensor, *_), _ = given(method, dtype)
    tensors = [tensor.clone() for _ in range(1 + len(method.models))]
    assert torch.equal(method("w", tensors, tensor.clone() if cls.needs_base else None), tensor)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (2, 3, 4)])
@pytest.mark.parametrize("cls", METHODS)
def test_any_shape(cls, shape):
    method = cls()
    tensors = [torch.randn(shape) for _ in range(1 + len(method.models))]
    assert method("w", tensors, torch.randn(shape) if cls.needs_base else None).shape == shape


@pytest.mark.parametrize("cls", METHODS)
def test_half_precision_is_float32_inside(cls):
    """bfloat16 in and out equals float32 throughout, rounded once."""
    method = cls()
    tensors, base = given(method, torch.bfloat16)
    full = method("w", [t.float() for t in tensors], None if base is None else base.float())
    assert torch.equal(method("w", tensors, base), full.to(torch.bfloat16))


@pytest.mark.parametrize("cls", METHODS)
def test_wrong_calls_are_refused(cls):
    method = cls()
    tensors, base = given(method)
    with pytest.raises(SmeltError, match="were given"):
        method("w", [*tensors, tensors[0]], base)
    with pytest.raises(SmeltError, match=r"\[12, 16\] and \[16, 12\]"):
        method("w", [*tensors[:-1], tensors[-1].T] if len(tensors) > 1 else tensors, base.T if len(tensors) == 1 else base)
    if cls.needs_base:
        with pytest.raises(SmeltError, match="needs the base"):
            method("w", tensors, None)


@pytest.mark.parametrize("cls", METHODS)
def test_a_recipe_can_say_it(cls):
    method = cls()
    assert registry.parse(registry.text(method), "weights") == method
    assert isinstance(method.models, tuple) and bool(method.base) == cls.needs_base


# ---------------------------------------------------------------------- folders


@dataclasses.dataclass(frozen=True)
class Mean(Merge):
    models: tuple[str, ...] = ("b",)

    def __call__(self, name, tensors, base=None):
        return torch.stack(together(self, tensors, base)).mean(0)


@dataclasses.dataclass(frozen=True)
class Added(Merge):
    needs_base = True
    models: tuple[str, ...] = ("b",)
    base: str = "base"

    def __call__(self, name, tensors, base=None):
        start, a, b = together(self, tensors, base)
        return a + b - start


@pytest.fixture
def pair(tmp_path):
    """Folders of two llamas with tied embeddings."""
    for name, seed in (("a", 0), ("b", 1)):
        save(tiny("llama", seed=seed), tiny_tokenizer(), tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


def merge(method, folders, out, base=None, **more):
    return merge_folders(method, folders, base, out, progress=None, **more)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "bert"])
def test_the_merged_folder_is_the_merged_model(architecture, tied, tmp_path):
    options = {} if architecture == "bert" else {"tie_word_embeddings": tied}
    models = [tiny(architecture, seed=seed, **options) for seed in (0, 1)]
    for name, model in zip("ab", models):
        save(model, tiny_tokenizer(), tmp_path / name)
    report = merge(Mean(), [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    made = load(tmp_path / "out").model
    states = [model.state_dict() for model in models]
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, torch.stack([state[name] for state in states]).mean(0)), name
    if architecture != "bert":
        assert (made.lm_head.weight.data_ptr() == made.model.embed_tokens.weight.data_ptr()) == tied
        change = sum((v - states[0][n]).square().sum() for n, v in made.named_parameters())
        norm = sum(states[0][n].square().sum() for n, _ in made.named_parameters())
        assert report["relative_change"] == pytest.approx((change / norm).sqrt().item(), rel=1e-4)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())
    for file in (tmp_path / "a").glob("*.json"):
        assert (tmp_path / "out" / file.name).read_text() == file.read_text()


def test_the_base_is_read_too(pair, tmp_path):
    save(tiny("llama", seed=2), tiny_tokenizer(), tmp_path / "base")
    merge(Added(), pair, tmp_path / "out", tmp_path / "base")
    a, b, base, out = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "base", "out"))
    assert a.keys() == out.keys() and all(torch.equal(out[n], a[n] + b[n] - base[n]) for n in a)
    with pytest.raises(SmeltError, match="2 models and the base they were trained from; 2 were given"):
        merge(Added(), pair, tmp_path / "other")


@pytest.mark.parametrize("most", [1, 20_000, 100_000, 10**9])
def test_shards_hold_at_most_what_was_asked(most, pair, tmp_path):
    report = merge(Mean(), pair, tmp_path / "out", shard_bytes=most)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report["shards"] and (len(files) == 1) == (most == 10**9)
    for file in files:
        sizes = [value.nbytes for value in load_file(file).values()]
        assert sum(sizes) <= most or len(sizes) == 1
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    ids = torch.arange(2, 50).view(2, 24)
    merge(Mean(), pair, tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out").model(ids).logits, load(tmp_path / "whole").model(ids).logits)


def test_sharded_sources_and_mixed_dtypes(pair, tmp_path):
    a, b = (load(folder).model for folder in pair)
    save(b.to(torch.bfloat16), tiny_tokenizer(), tmp_path / "half")
    a.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2

    class Checked(Mean):
        def __call__(self, name, tensors, base=None):
            assert [t.dtype for t in tensors] == [torch.float32, torch.bfloat16]
            return (tensors[0] + tensors[1].float()) / 2

    merge(Checked(), [tmp_path / "many", tmp_path / "half"], tmp_path / "out")
    state, out = b.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(v, (a.state_dict()[n] + state[n].float()) / 2) for n, v in out.items())


def test_a_tied_head_that_is_stored_too_is_merged_once(pair, tmp_path):
    state = load_file(pair[1] / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, pair[1] / "model.safetensors", {"format": "pt"})
    for order, out in ((pair, "x"), (pair[::-1], "y")):
        merge(Mean(), order, tmp_path / out)
        assert "lm_head.weight" not in load_file(tmp_path / out / "model.safetensors")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_models_that_do_not_belong_together_are_refused_by_name(pair, tmp_path):
    a = pair[0]
    others = {
        "qwen2": (tiny("qwen2"), "has model_type=qwen2, .* has model_type=llama"),
        "wider": (tiny("llama", ffn=128), "has intermediate_size=128, .* has intermediate_size=96"),
        "deeper": (tiny("llama", layers=3), "num_hidden_layers=3"),
        "heads": (tiny("llama", heads=8, kv_heads=4, head_dim=8), "has head_dim=8"),  # the same shapes
        "untied": (tiny("llama", tie_word_embeddings=False), "tie_word_embeddings=False"),
        "rope": (tiny("llama", rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), "rope_parameters="),
    }
    for name, (model, message) in others.items():
        save(model, tiny_tokenizer(), tmp_path / name)
        with pytest.raises(SmeltError, match=message):
            merge(Mean(), [a, tmp_path / name], tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))], "nothing is left behind"


def test_a_token_more_and_a_free_setting(pair, tmp_path):
    edit(pair[1], eos_token_id=5, max_position_embeddings=512, dtype="bfloat16")
    merge(Mean(), pair, tmp_path / "out")
    save(tiny("llama"), byte_level_bpe(["other words entirely, (x) -> y"] * 9, 320, 256), tmp_path / "c")
    with pytest.raises(SmeltError, match="another tokenizer"):
        merge(Mean(), [pair[0], tmp_path / "c"], tmp_path / "two")


def test_damaged_and_missing_weights_are_refused(pair, tmp_path):
    state = load_file(pair[1] / "model.safetensors")
    name = "model.norm.weight"
    save_file({n: v for n, v in state.items() if n != name}, pair[1] / "model.safetensors")
    with pytest.raises(SmeltError, match=f"has the weight '{name}', .*b has not"):
        merge(Mean(), pair, tmp_path / "out")
    save_file(state | {name: torch.zeros(3)}, pair[1] / "model.safetensors")
    with pytest.raises(SmeltError, match=rf"'{name}' is \[64\] in .*a, but \[3\] in .*b"):
        merge(Mean(), pair, tmp_path / "out")
    save_file(state | {name: torch.full((64,), torch.nan)}, pair[1] / "model.safetensors")
    with pytest.raises(SmeltError, match=f"Mean: '{name}' came out with .* not finite"):
        merge(Mean(), pair, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"], "a merge that failed leaves nothing"


def test_quantized_models_adapters_and_a_folder_in_use_are_refused(pair, tmp_path):
    shutil.copytree(pair[1], tmp_path / "q")
    edit(tmp_path / "q", quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(SmeltError, match="q is quantized; merge the models it was made from"):
        merge(Mean(), [pair[0], tmp_path / "q"], tmp_path / "out")
    with pytest.raises(SmeltError, match="merges 2 models; 1 were given"):
        merge(Mean(), pair[:1], tmp_path / "out")
    with pytest.raises(SmeltError, match="exists already"):
        merge(Mean(), pair, pair[0])
    (tmp_path / "out").mkdir()
    merge(Mean(), pair, tmp_path / "out")  # an empty folder is as good as none
    (pair[1] / "adapter_config.json").write_text("{}")
    with pytest.raises(SmeltError, match="merge the adapter first"):
        merge(Mean(), pair, tmp_path / "two")


def test_whole_numbers_are_copied_when_all_agree(pair, tmp_path):
    for folder in pair:
        state = load_file(folder / "model.safetensors")
        save_file(state | {"model.steps": torch.tensor([3, 1, 2])}, folder / "model.safetensors")
    merge(Mean(), pair, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.steps"].tolist() == [3, 1, 2]
    save_file(state | {"model.steps": torch.tensor([3, 1, 4])}, folder / "model.safetensors")
    with pytest.raises(SmeltError, match=r"'model\.steps' holds whole numbers that differ"):
        merge(Mean(), pair, tmp_path / "two")


def test_a_tensor_is_let_go_before_the_next_is_read(pair, tmp_path, monkeypatch):
    """At most those of one name are alive at once."""
    alive, most, read = set(), [0], _merge._Source.read

    def counted(source, name):
        value = read(source, name)
        alive.add(key := (source.folder, name))
        weakref.finalize(value, alive.discard, key)
        most[0] = max(most[0], len(alive))
        return value

    monkeypatch.setattr(_merge._Source, "read", counted)
    merge(Mean(), pair, tmp_path / "out")
    assert most[0] == 2


MEASURE = """
import sys
import weakref
from pathlib import Path
from smelt.weights._merge import merge_folders
from smelt.registry import parse

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

root, method = Path(sys.argv[1]), parse(sys.argv[2], "weights")
small, large = [root / "s0", root / "s1"], [root / "a", root / "b"]
base = lambda folders: folders[1] if method.needs_base else None
merge_folders(method, small, base(small), root / "warm", progress=None)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
merge_folders(method, large, base(large), root / sys.argv[3], shard_bytes=int(sys.argv[4]), progress=None)
print(1024 * (kilobytes("VmHWM") - before))
"""
LARGE = [pytest.param("linear()", 1024, marks=pytest.mark.slow), pytest.param("ties(models=['b'])", 1024, marks=pytest.mark.slow)]


@pytest.mark.parametrize("method, hidden", [("linear()", 512), *LARGE])
def test_memory_is_at_most_a_quarter_of_a_model_and_one_shard(method, hidden, tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from /proc")
    for name, seed in (("a", 0), ("b", 1)):
        save(tiny("llama", layers=10, hidden=hidden, ffn=2 * hidden, seed=seed), tiny_tokenizer(), tmp_path / name)
    for name in ("s0", "s1"):
        save(tiny("llama"), tiny_tokenizer(), tmp_path / name)
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert size > (80 << 20 if hidden == 512 else 320 << 20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), method, "out", str(size // 16)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout)
    print(f"{method}: models of {size >> 20} MB, shards of {size >> 24} MB, {peak / 2**20:.1f} MB more at the peak")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 16
    assert peak <= size // 4 + size // 16


def test_the_embedded_model_with_itself_is_itself(tmp_path):
    merge(parse("linear(models=['base', 'base'])", "weights"), [EMBEDDED] * 3, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (EMBEDDED, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], v) and v.dtype == before[n].dtype for n, v in after.items())
