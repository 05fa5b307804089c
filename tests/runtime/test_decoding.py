import contextlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, MambaConfig, Qwen2Config

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.models import load_model
from phoenix_sparse.runtime import decoding
from phoenix_sparse.runtime.bench import Pair
from phoenix_sparse.runtime.cuda.fusing import fuse
from phoenix_sparse.runtime.decodable import refusal, why_one_by_one
from phoenix_sparse.runtime.decoding import Decoder, sampler
from phoenix_sparse.runtime.loading import generate
from phoenix_sparse.runtime.slots import attending
from tiny import COMMON, SIZES, make_model, pruned


def prompts(batch, count, seed=0):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


def searched(model, ids, count, **options):
    """transformers' greedy search."""
    options = {"pad_token_id": 256} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options)


def mixed_windows():
    """Qwen2 with full attention in the first layer, and windows of 8 in the others."""
    torch.manual_seed(3)
    sizes = SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 1}
    config = Qwen2Config(**sizes, **COMMON, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.1)
    return model


MAKERS = {kind: (lambda kind=kind: make_model(kind)) for kind in ("llama", "mistral", "qwen2", "opt")}
MAKERS["mixed windows"] = mixed_windows


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_tokens_of_greedy_search(kind, attention):
    model = MAKERS[kind]()
    model.set_attn_implementation(attention)
    for batch, count in ((1, 1), (3, 7), (2, 40)):
        ids = prompts(batch, count)
        decoder = Decoder(model, batch, count + 30)
        found = decoder.generate(ids, 30)
        assert torch.equal(found, searched(model, ids, 30))
        assert found[:, count:].unique().numel() > 3
        again = prompts(batch, 1 + count // 2, seed=1)  # the same decoder, other prompts: nothing is left of the first
        assert torch.equal(decoder.generate(again, 20), searched(model, again, 20))
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "opt"])
def test_packed_and_fused_models_decode_likewise(kind):
    pair = Pair(pruned(kind)[0], "auto")
    ids = prompts(2, 9)
    found = {}
    for form in pair.forms:
        with pair.as_(form) as model:
            found[form] = Decoder(model, 2, 40).generate(ids, 31)
            assert torch.equal(found[form], searched(model, ids, 31))
    assert fuse(pair.model) > 0
    found["fused"] = Decoder(pair.model, 2, 40).generate(ids, 31)
    assert torch.equal(found["dense"], found["sparse"])
    assert torch.equal(found["sparse"], found["fused"])


def test_a_model_of_some_size(shared):
    for dtype in ("float32", "bfloat16"):
        model = load_model(shared / "models" / "base-65m", dtype)
        ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
        assert torch.equal(Decoder(model, 2, 44).generate(ids, 32), searched(model, ids, 32, pad_token_id=0))


def test_logits_are_transformers_own_to_the_last_bit():
    """In bfloat16, where two tokens are often as likely as each other and any other rounding chooses otherwise."""
    model, ids = make_model().to(torch.bfloat16), prompts(2, 9)
    decoder, cache = Decoder(model, 2, 60), DynamicCache(config=model.config)
    with torch.inference_mode():
        expected = model(ids, past_key_values=cache).logits[:, -1]
        assert torch.equal(decoder.prefill(ids), expected)
        for _ in range(40):
            token = decoder.tokens[:, decoder.count - 1 : decoder.count].clone()
            decoder.advance(1)
            assert torch.equal(decoder.logits, model(token, past_key_values=cache).logits[:, -1])


def test_another_thread_in_the_middle_of_a_step_does_not_matter():
    """Such a thread has named another attention in the configuration, for windows that slide as well."""
    model, ids = make_model("mistral"), prompts(2, 40)
    expected = searched(model, ids, 20)
    with attending(model.config):
        assert refusal(model) is None
        assert torch.equal(Decoder(model, 2, 60).generate(ids, 20), expected)
        assert torch.equal(searched(model, ids, 20), expected)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["mistral", "mixed windows"])  # windows of 16 and of 8 slide
def test_logits_of_every_step_are_those_of_the_whole_sequence(kind):
    model = MAKERS[kind]()
    decoder, ids = Decoder(model, 2, 40), prompts(2, 5)
    logits = [decoder.prefill(ids)]
    for _ in range(34):
        decoder.advance(1)
        logits.append(decoder.logits)
    with torch.no_grad():
        whole = model(decoder.tokens[:, :39]).logits[:, 4:]
    assert torch.allclose(torch.stack(logits, 1), whole, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_ends(count):
    """Sequences stop each at its own end, and are padded; several tokens may be ends."""
    model, ids = make_model(), prompts(3, 6)
    free = searched(model, ids, 60)
    for ends in ([int(free[0, 6])], [int(free[0, 9]), int(free[1, 20])], [int(row[25]) for row in free], [7]):
        expected = searched(model, ids, count, eos_token_id=ends, pad_token_id=11)
        found = Decoder(model, 3, 6 + count).generate(ids, count, ends=ends, padding=11)
        assert torch.equal(found, expected), ends
    model.generation_config.eos_token_id = int(free[2, 12])
    alone = Decoder(model, 1, 80).generate(ids[2:], count)
    assert torch.equal(alone, searched(model, ids[2:], count))
    assert torch.equal(Decoder(model, 3, 80).generate(ids, count, ends=[]), free[:, : 6 + count])


def test_never_beyond_its_length():
    model = make_model()
    with pytest.raises(PhoenixError, match="257 tokens are more than the model's context of 256"):
        Decoder(model, 1, 257)
    decoder, ids = Decoder(model, 1, 20), prompts(1, 12)
    with pytest.raises(PhoenixError, match="prefill first"):
        decoder.advance(1)
    assert decoder.generate(ids, 100).shape == (1, 20)
    assert torch.equal(decoder.generate(prompts(1, 20), 5), prompts(1, 20))
    decoder.prefill(ids)
    decoder.advance(8)
    with pytest.raises(PhoenixError, match="pass the length of 20"):
        decoder.advance(1)
    for wrong in (prompts(2, 5), prompts(1, 21), prompts(1, 0), prompts(1, 4)[0]):
        with pytest.raises(PhoenixError, match="all prompts of one length and without padding"):
            decoder.prefill(wrong)
    for count in (0, -3):
        with pytest.raises(PhoenixError, match=f"{count} new tokens; give 1 or more"):
            decoder.generate(ids, count)
    with pytest.raises(PhoenixError, match="give 1 or more of each"):
        Decoder(model, 0, 5)


def test_rewinding_decodes_the_same_again():
    decoder, ids = Decoder(make_model("mistral"), 2, 60), prompts(2, 10)
    decoder.prefill(ids)
    decoder.advance(40)
    first = decoder.tokens.clone()
    decoder.rewind(15)
    decoder.advance(30)
    assert torch.equal(decoder.tokens, first)
    for count in (0, 46):
        with pytest.raises(PhoenixError, match="give a number from 1 to 45"):
            decoder.rewind(count)


def test_models_that_are_refused():
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    bloom = AutoModelForCausalLM.from_config(BloomConfig(**small, n_head=2)).eval()
    assert refusal(bloom) == "BloomForCausalLM takes no position_ids"
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**small, state_size=4))
    assert refusal(mamba) is not None
    with pytest.raises(PhoenixError, match="takes no position_ids; use the model's own generate"):
        Decoder(bloom, 1, 5)
    model = make_model()
    model.config._attn_implementation = "flex_attention"
    assert "not sdpa or eager" in refusal(model)


def test_text(tokenizer):
    model, prompt = make_model(), "Ben has 3 hats."
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = tokenizer.decode(searched(model, ids, 25)[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(model, tokenizer, prompt, max_new_tokens=25) == expected
    with pytest.raises(PhoenixError, match="300 tokens, and the model's context 256"):
        generate(model, tokenizer, "a" * 300)
    with pytest.raises(PhoenixError, match="0 new tokens"):
        generate(model, tokenizer, prompt, max_new_tokens=0)
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=257, hidden_size=16, n_layer=1, n_head=2)).eval()
    expected = tokenizer.decode(searched(other, ids, 9)[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(other, tokenizer, prompt, max_new_tokens=9) == expected  # by transformers' own loop


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), temperature=st.floats(0.2, 3.0), top_p=st.floats(0.05, 1.0))
def test_samples_come_from_the_fewest_likeliest_tokens(seed, temperature, top_p):
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) * 2
    choose = sampler(temperature, top_p, seed)
    drawn = torch.stack([choose(logits) for _ in range(20)], 1)
    for row, tokens in zip((logits / temperature).double().softmax(-1).tolist(), drawn.tolist(), strict=True):
        order = sorted(range(12), key=lambda token: -row[token])
        sums = [sum(row[token] for token in order[:count]) for count in range(12)]
        allowed = {token for token, before in zip(order, sums, strict=True) if before < top_p + 1e-6}
        assert set(tokens) <= allowed
    again = sampler(temperature, top_p, seed)
    assert torch.equal(drawn, torch.stack([again(logits) for _ in range(20)], 1))


def test_samples_are_as_likely_as_they_should_be():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    choose = sampler(2.0, 1.0)
    counts = torch.cat([choose(logits.expand(500, 4)) for _ in range(10)]).bincount(minlength=4) / 5000
    assert torch.allclose(counts, (logits[0] / 2).softmax(0), atol=0.03)
    for wrong in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.5), (float("nan"), 1.0)):
        with pytest.raises(PhoenixError, match="temperature"):
            sampler(*wrong)


def test_sampling_goes_on_from_what_was_drawn():
    model, ids = make_model(), prompts(2, 6)
    tokens = Decoder(model, 2, 30).generate(ids, 24, ends=[], choose=sampler(1.0, 0.9, 3))
    assert not torch.equal(tokens, searched(model, ids, 24))
    choose, seen = sampler(1.0, 0.9, 3), ids
    for _ in range(24):  # the same draws, from logits without a cache
        with torch.no_grad():
            seen = torch.cat([seen, choose(model(seen).logits[:, -1])[:, None]], 1)
    assert torch.equal(tokens, seen)


def test_compiled_steps():
    model, ids = pruned("llama")[0], prompts(2, 6)
    with Pair(model, "auto").as_("sparse"):
        fuse(model)
        torch.compiler.reset()
        assert torch.equal(Decoder(model, 2, 30, compiled=True).generate(ids, 24), searched(model, ids, 24))


class Recorder:
    """A CUDA graph's place, for a CPU: it replays the step by running it, into the memory of the first results."""

    works, made = True, 0

    def __init__(self):
        Recorder.made += 1

    @contextlib.contextmanager
    def graph(self, graph):
        if not Recorder.works:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        yield


class RecordedDecoder(Decoder):
    def _record(self, room):
        last, position = self.last.clone(), self.position.clone()
        super()._record(room)
        with torch.inference_mode():  # while recording nothing happens on a GPU
            self.last.copy_(last)
            self.position.copy_(position)
        if self.reason is None:
            graph, logits = self._graphs[room]
            graph.replay = lambda: logits.copy_(self._step())


@pytest.fixture
def recording(monkeypatch):
    """Decoders that take the CPU for a GPU."""
    nothing = contextlib.nullcontext()
    fakes = {"device": lambda _: nothing, "stream": lambda _: nothing, "CUDAGraph": Recorder}
    stream = SimpleNamespace(wait_stream=lambda _: None)
    fakes |= {"Stream": lambda: stream, "current_stream": lambda: stream, "graph": lambda graph: graph.graph(graph)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(decoding, "why_one_by_one", lambda model, device: None)
    monkeypatch.setattr(decoding, "FEWEST", 16)
    monkeypatch.setattr(Recorder, "works", True)
    monkeypatch.setattr(Recorder, "made", 0)


@pytest.mark.parametrize("choose", [None, lambda logits: logits.argmin(-1)])
@pytest.mark.parametrize("kind", ["mistral", "mixed windows"])
def test_replayed_steps(recording, kind, choose):
    model, ids = MAKERS[kind](), prompts(2, 6)
    decoder = RecordedDecoder(model, 2, 60)
    found = decoder.generate(ids, 54, ends=[], choose=choose)
    assert decoder.captured
    assert Recorder.made == 3  # steps that look at 16, 32 and 64 positions
    seen = ids
    for _ in range(54):
        with torch.no_grad():
            logits = model(seen).logits[:, -1]
        chosen = logits.argmax(-1) if choose is None else choose(logits)
        seen = torch.cat([seen, chosen[:, None]], 1)
    assert torch.equal(found, seen)
    assert torch.equal(decoder.generate(ids, 54, ends=[], choose=choose), seen)
    assert Recorder.made == 3


def test_what_cannot_be_recorded_runs_step_by_step(recording, monkeypatch):
    monkeypatch.setattr(Recorder, "works", False)
    model, ids = make_model(), prompts(1, 6)
    decoder = RecordedDecoder(model, 1, 30)
    with pytest.warns(UserWarning, match=r"CUDA can't record them \(operation not permitted"):
        found = decoder.generate(ids, 24)
    assert not decoder.captured
    assert torch.equal(found, searched(model, ids, 24))


def test_why_steps_are_not_recorded():
    gpu = torch.device("cuda")
    model = make_model()
    assert why_one_by_one(model, gpu) is None
    assert why_one_by_one(model, torch.device("cpu")) == "not on a GPU"
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "rotary" in why_one_by_one(model, gpu)
    with Pair(pruned()[0], "auto").as_("sparse") as packed:
        assert "PHOENIX_CUDA" in why_one_by_one(packed, gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_on_a_gpu_the_step_is_recorded(kind, compiled):
    model, ids = MAKERS[kind]().to("cuda"), prompts(2, 7).to("cuda")
    decoder = Decoder(model, 2, 60, compiled=compiled)
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, 50), searched(model, ids, 50))
        assert decoder.captured, decoder.reason
