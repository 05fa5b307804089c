import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from phoenix_sparse.runtime import head as module
from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.head import Head, head_of, put_head
from phoenix_sparse.runtime.kernels import choice
from phoenix_sparse.runtime.kernels.choice import own_dense_is_faster
from phoenix_sparse.runtime.loading import load
from phoenix_sparse.runtime.packing import pack_model
from runtime.kernels.matrices import libraries
from tiny import make_model, pruned

LIBRARIES = [one for one in libraries() if one.has_dense]
built = pytest.mark.skipif(not LIBRARIES, reason="this machine has no dense kernel")
IDS = torch.tensor([[5, 9, 200, 31, 7, 7, 120]])


class Counting:
    """The kernels; how often the dense one was called."""

    def __init__(self, library):
        self.library, self.path, self.has_dense, self.calls = library, library.path, True, 0

    def dense(self, x, weight):
        self.calls += 1
        return self.library.dense(x, weight)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that are always taken, and counted."""
    found = Counting(LIBRARIES[-1])
    monkeypatch.setattr(module, "library", lambda: found)
    monkeypatch.setenv(choice.VARIABLE, "off")
    return found


@pytest.fixture
def packed(tmp_path, request):
    model, _ = pruned(getattr(request, "param", "llama"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    pack_model(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "packed"


def make_head(out=40, columns=33):
    return Head.of(torch.nn.Linear(columns, out, bias=False).bfloat16().requires_grad_(False))


@built
@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 200),
    columns=st.integers(1, 300),
    lead=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 9),
    transposed=st.booleans(),
)
def test_products_are_float64_s_rounded_once(out, columns, lead, seed, transposed):
    torch.manual_seed(seed)
    head = make_head(out, columns)
    x = torch.randn(*lead, columns).bfloat16()
    if transposed and lead:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, "off")
        found = head(x)
    exact = x.double() @ head.weight.double().T
    slack = 1e-6 * (x.double().abs() @ head.weight.double().abs().T)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*lead, out)
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + slack).all()


@built
def test_the_kernel_takes_a_few_rows_without_gradients_and_torch_all_else(kernels):
    head = make_head()
    few, many = torch.randn(2, 4, 33).bfloat16(), torch.randn(9, 33).bfloat16()
    with torch.no_grad():
        head(few)
        assert kernels.calls == 1
        plain = torch.nn.functional.linear
        assert torch.equal(head(many), plain(many, head.weight))
        assert torch.equal(head(many[:0]), plain(many[:0], head.weight))
        assert torch.equal(head.float()(many.float()), plain(many.float(), head.weight))
        with pytest.raises(RuntimeError, match="shape"):
            head.bfloat16()(torch.randn(2, 32).bfloat16())
    few.requires_grad_()
    head(few).sum().backward()
    assert torch.allclose(few.grad, head.weight.float().sum(0).bfloat16().expand_as(few), atol=0.02)
    assert kernels.calls == 1


@built
@pytest.mark.parametrize("packed", ["llama", "opt"], indirect=True)
def test_a_packed_model_is_loaded_with_it(packed, kernels):
    for model in (load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        head = model.get_output_embeddings()
        assert type(head) is Head
        assert (head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
        before = kernels.calls
        with torch.no_grad():
            found = model(IDS).logits
            assert kernels.calls == before + 1
            model.set_output_embeddings(torch.nn.Linear(1, 1))
            model.get_output_embeddings().weight = head.weight
            model.get_output_embeddings().bias = None
            assert torch.allclose(found, model(IDS).logits, atol=0.02, rtol=0.02)
        assert kernels.calls == before + 1


def test_states_and_copies_are_as_they_were(packed):
    model, again = load(packed), load(packed)
    plain = torch.nn.Linear(32, 257, bias=False, dtype=torch.bfloat16)
    plain.weight = again.get_output_embeddings().weight
    again.set_output_embeddings(plain)
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    copied = copy.deepcopy(model)
    assert type(copied.get_output_embeddings()) is Head
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, model(IDS).logits)


def test_heads_with_a_bias_or_hooks_are_left_alone():
    for change in ("bias", "_hf_hook"):
        model = make_model()
        head = model.get_output_embeddings()
        setattr(head, change, torch.nn.Parameter(torch.zeros(257)) if change == "bias" else object())
        put_head(model)
        assert model.get_output_embeddings() is head
        assert change != "bias" or head_of(model) is None


def test_the_bench_compares_with_torch_s_own_head():
    model = pruned()[0]
    weight = model.get_output_embeddings().weight
    pair = Pair(model, "auto")
    for form, kind in (("sparse", Head), ("dense", torch.nn.Linear), ("sparse", Head)):
        with pair.as_(form) as chosen:
            assert type(chosen.get_output_embeddings()) is kind
            assert chosen.get_output_embeddings().weight is weight


class Slow:
    path = "slow"

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def dense(self, x, weight):
        self.calls += 1
        if self.seconds:  # sleeping for no time gives the core away, on a busy machine for long
            time.sleep(self.seconds)


@pytest.mark.parametrize(("seconds", "faster"), [(0.05, False), (0.0, True)])
def test_what_is_faster_is_measured_once(seconds, faster, monkeypatch):
    monkeypatch.setattr(choice, "dense_table", {})
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    one, x, weight = Slow(seconds), torch.ones(2, 512).bfloat16(), torch.ones(4096, 512).bfloat16()
    for _ in range(3):
        assert own_dense_is_faster(one, x, weight) is faster
    assert one.calls == choice.ROUNDS + 1
    own_dense_is_faster(one, x[:1], weight)
    assert one.calls == 2 * (choice.ROUNDS + 1)
    assert len(choice.dense_table) == 2
    monkeypatch.setenv(choice.VARIABLE, "off")
    assert own_dense_is_faster(one, x, weight)
