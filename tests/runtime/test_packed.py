import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.packed import Packed, check, pack, quantize, unpack


def sparse(rows: int, columns: int, density: float, seed: int, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


matrices = st.builds(
    sparse,
    st.integers(1, 33),
    st.integers(1, 70),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 999),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)


@given(matrices)
def test_packing_and_back_is_exact(weight):
    packed = pack(weight)
    check(packed, "layer")
    assert packed.nnz == int((weight.view(torch.uint8).reshape(*weight.shape, -1) != 0).any(-1).sum())
    assert torch.equal(unpack(packed).view(torch.uint8), weight.view(torch.uint8))


def test_negative_zeros_keep_their_sign():
    weight = torch.tensor([[0.0, -0.0, 1.0]])
    packed = pack(weight)
    assert packed.nnz == 2
    assert torch.equal(torch.signbit(unpack(packed)), torch.signbit(weight))


@given(matrices)
def test_int8_is_within_half_a_step(weight):
    packed = quantize(pack(weight))
    check(packed, "layer")
    back, step = unpack(packed), packed.scales.float()[:, None]
    assert ((back - weight.float()).abs() <= step * 0.501).all()
    assert torch.equal(packed.bitmask, pack(weight).bitmask)
    largest = weight.float().abs().amax(1)
    assert (step[:, 0][largest > 0] <= largest[largest > 0] / 127 * 1.02).all()


def test_size_of_a_weight():
    packed = pack(sparse(64, 4096, 0.5, 0))
    size = sum(part.nbytes for part in packed.tensors().values())
    density = packed.nnz / (64 * 4096)
    assert size / (64 * 4096) <= 1.02 * (2 * density + 1 / 8)


def changed(**parts):
    weight = sparse(6, 21, 0.5, 3)
    packed = pack(weight)
    return Packed(**(packed.__dict__ | {name: change(getattr(packed, name)) for name, change in parts.items()}))


def put(value: torch.Tensor, index: int, new) -> torch.Tensor:
    value = value.clone()
    value[index] = new
    return value


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"shape": lambda s: (s[0], s[1] + 8)}, "the bitmask of 29 columns"),
        ({"shape": lambda s: (0, s[1])}, "none of 0x21"),
        ({"shape": lambda s: (7, s[1])}, "none of 7x21"),
        ({"bitmask": lambda b: b.int()}, "is int32"),
        ({"bitmask": lambda b: b | torch.tensor([0, 0, 128], dtype=torch.uint8)}, "beyond column 20"),
        ({"bitmask": lambda b: b ^ torch.tensor([1, 0, 0], dtype=torch.uint8)}, "number of bits"),
        ({"row_offsets": lambda r: r + 1}, "begin with 1"),
        ({"row_offsets": lambda r: put(r, 2, 10**15)}, "row_offsets|number of bits"),
        ({"row_offsets": lambda r: put(r, 2, -5)}, "fall at row 1"),
        ({"row_offsets": lambda r: r[:-1]}, "row_offsets are"),
        ({"row_offsets": lambda r: r.float()}, "row_offsets are"),
        ({"compressed": lambda c: c[:-1]}, "values"),
        ({"compressed": lambda c: c.reshape(1, -1)}, "values are"),
        ({"compressed": lambda c: c.double()}, "values are"),
        ({"compressed": lambda c: put(c, 0, float("nan"))}, "NaN"),
        ({"compressed": lambda c: c.to(torch.int8)}, "scales belong"),
        ({"scales": lambda _: torch.ones(6)}, "scales belong"),
    ],
)
def test_whatever_contradicts_itself_is_refused(parts, what):
    with pytest.raises(PhoenixError, match=f"^layer: .*({what})"):
        check(changed(**parts), "layer")


def test_scales_must_be_positive():
    packed = quantize(pack(sparse(6, 21, 0.5, 3)))
    packed.scales[2] = 0
    with pytest.raises(PhoenixError, match="not all positive"):
        check(packed, "layer")


def test_other_tensors_are_refused():
    with pytest.raises(PhoenixError, match="give a matrix of float32"):
        pack(torch.ones(2, 3, dtype=torch.int32))
    with pytest.raises(PhoenixError, match="3-dimensional"):
        pack(torch.ones(2, 3, 4))
