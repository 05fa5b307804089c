import pytest
import torch

from phoenix_sparse.determinism import be_deterministic, sound_gradients
from phoenix_sparse.errors import PhoenixError


@pytest.fixture(autouse=True)
def _put_back():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_gradients_are_strict_within_and_as_before_after():
    be_deterministic()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with sound_gradients(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn


def test_a_run_that_may_vary_stays_free():
    torch.use_deterministic_algorithms(False)
    with sound_gradients(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_determinism_is_named():
    be_deterministic()
    with (
        pytest.raises(PhoenixError, match="some_kernel does not have.*deterministic=false"),
        sound_gradients(torch.device("cuda")),
    ):
        raise RuntimeError("some_kernel does not have a deterministic implementation, but you set ...")


def test_other_errors_pass_and_the_state_is_put_back():
    be_deterministic()
    with pytest.raises(RuntimeError, match="something else"), sound_gradients(torch.device("cuda")):
        raise RuntimeError("something else")
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [320, 384])
def test_masked_attention_has_finite_gradients(length):
    generator = torch.Generator().manual_seed(1)
    query, key, value = ((torch.randn(2, 4, length, 64, generator=generator) * 0.1).cuda().bfloat16() for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -960.0  # scores near -120, as massive activations make them
    query.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    with sound_gradients(torch.device("cuda")):
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert torch.isfinite(query.grad).all()
