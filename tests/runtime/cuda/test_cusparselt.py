"""The binding of cuSPARSELt, by a fake library."""

import contextlib
import ctypes
import threading

import pytest
import torch

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.cuda import cusparselt, cusparselt_product, semi_structured
from runtime.cuda.fake_cusparselt import FAILED, FOUND, STREAM, Fake
from runtime.cuda.matrices import close, weight_of

CPU = torch.device("cpu")


@pytest.fixture
def library(monkeypatch):
    """Puts a fake library in the real one's place."""

    def put(**options):
        fake = Fake(**options)
        declared = cusparselt.declared(fake.library)
        for module in (cusparselt, cusparselt_product):
            monkeypatch.setattr(module, "library", lambda: declared)
            monkeypatch.setattr(module, "on", lambda device: contextlib.nullcontext())
            monkeypatch.setattr(module, "stream_of", lambda device: STREAM)
        monkeypatch.setattr(semi_structured, "_found", {})
        for forget in (cusparselt.handle, semi_structured.takes):
            forget.cache_clear()
        cusparselt_product._PLANS.clear()
        put.fakes.append(fake)
        return fake

    put.fakes = []
    yield put
    for forget in (cusparselt.handle, semi_structured.takes):
        forget.cache_clear()
    cusparselt_product._PLANS.clear()
    assert [fake.wrong for fake in put.fakes] == [[] for _ in put.fakes]


def operands(rows, out=32, columns=48, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rows)
    weight = weight_of(out, columns, two_four=True, dtype=dtype)
    return torch.randn(rows, columns, generator=generator).to(dtype), weight, torch.randn(out, generator=generator)


@pytest.mark.parametrize("version", [(0, 7), (0, 8), (0, 10), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(library, version, dtype):
    fake = library(version=version)
    for out, columns in [(16, 32), (240, 336), (48, 16)]:
        weight = weight_of(out, columns, two_four=True, dtype=dtype)
        weight[3] = 0
        compressed = semi_structured.compress(weight)
        assert compressed.nbytes == out * columns * 5 // 4  # what the library says, whatever that is
        for rows in (1, 8, 13, 65, 700):
            x, bias = torch.randn(rows, columns).to(dtype), torch.randn(out).to(dtype)
            for offset in (None, bias):
                y = semi_structured.multiply(x, compressed, out, offset)
                exact = x.double() @ weight.double().t() + (0 if offset is None else offset.double())
                assert y.shape == (rows, out)
                assert y.is_contiguous()
                assert close(y, exact)
    kinds = [one.kind for one in fake.alive.values()]
    assert kinds.count("handle") == 1


def test_what_is_made_is_kept(library):
    fake = library()
    x, weight, bias = operands(20)
    bias, other = bias.bfloat16(), bias.bfloat16() * 2
    compressed = semi_structured.compress(weight)
    assert fake.count("MatDescriptorDestroy") == 1
    first = semi_structured.multiply(x, compressed, 32)
    made = list(fake.calls)
    for rows in (20, 17, 24):  # all of them 24
        assert torch.equal(semi_structured.multiply(x[:rows], compressed, 32), first[:rows])
    assert fake.calls[len(made) :] == ["Matmul"] * 3
    assert fake.count("Init") == fake.count("MatmulPlanInit") == 1
    exact = x.double() @ weight.double().t()
    for offset in (bias, other, bias):
        assert close(semi_structured.multiply(x, compressed, 32, offset), exact + offset.double())
    assert fake.count("MatmulPlanInit") == 3  # a plan knows where its bias lies
    y = semi_structured.multiply(x[:16], compressed, 32)
    assert close(y, exact[:16])
    assert fake.count("MatmulPlanInit") == 4
    with pytest.raises(PhoenixError, match=r"x is torch\.float16 and the 2:4 weight torch\.bfloat16"):
        semi_structured.multiply(x.half(), compressed, 32)


def test_plans_have_a_limit(library, monkeypatch):
    fake = library()
    monkeypatch.setattr(cusparselt_product, "MOST_PLANS", 2)
    x, weight, _ = operands(40)
    compressed = semi_structured.compress(weight)
    alive = []
    for rows in (8, 16, 8, 24, 8, 16):  # 16 goes for 24, then 24 for 16
        assert close(semi_structured.multiply(x[:rows], compressed, 32), x[:rows].double() @ weight.double().t())
        alive.append(sum(one.kind == "plan" for one in fake.alive.values()))
    assert alive == [1, 2, 2, 2, 2, 2]
    assert fake.count("MatmulPlanInit") == 4
    assert fake.count("MatmulAlgSelectionDestroy") == 2
    assert fake.count("MatDescriptorDestroy") == 1 + 2 * 3


@pytest.mark.parametrize("biased", [False, True])
def test_an_algorithm_is_searched_for_once(library, biased):
    fake = library()
    _, weight, bias = operands(8)
    bias = bias.bfloat16() if biased else None
    compressed = semi_structured.compress(weight)
    state = torch.get_rng_state()
    for _ in range(2):
        semi_structured.settle(weight, compressed, bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert fake.count("MatmulSearch") == 1
    x = torch.randn(100, 48).bfloat16()
    y = semi_structured.multiply(x, compressed, 32, bias)
    assert close(y, x.double() @ weight.double().t() + (0 if bias is None else bias.double()))
    ways = [one.found for one in fake.alive.values() if one.kind == "way"]
    assert ways
    assert all(way == list(FOUND) for way in ways)
    semi_structured.multiply(x, compressed, 32, bias, (4, 1, 1))
    semi_structured.multiply(x, compressed, 32, None if biased else torch.zeros(32).bfloat16())  # not searched for
    ways = [one.found for one in fake.alive.values() if one.kind == "way"]
    assert [4, 1, 1] in ways
    assert [0, 1, 1] in ways


def test_an_algorithm_that_some_rows_do_not_have(library):
    fake = library(kernels=lambda rows: 20 if rows >= 64 else 5)
    _, weight, _ = operands(8)
    compressed = semi_structured.compress(weight)
    semi_structured.settle(weight, compressed, None)
    x = torch.randn(16, 48).bfloat16()
    assert close(semi_structured.multiply(x, compressed, 32), x.double() @ weight.double().t())
    made = fake.count("MatmulAlgSelectionInit")
    semi_structured.multiply(x, compressed, 32)
    assert fake.count("MatmulAlgSelectionInit") == made
    assert [one.found for one in fake.alive.values() if one.kind == "way"][-1] == [0, 1, 1]


def test_products_that_are_wrong_are_not_used(library, monkeypatch):
    library()
    _, weight, _ = operands(8)
    compressed = semi_structured.compress(weight)
    product = cusparselt_product.multiply

    def wrong(x, *rest):
        return product(x, *rest) * (1.0 if len(x) > 100 else 1.1)

    monkeypatch.setattr(cusparselt_product, "multiply", wrong)
    with pytest.raises(PhoenixError, match="wrong products with a weight of 32x48 on this GPU; give prefill=dense"):
        semi_structured.settle(weight, compressed, None)
    assert semi_structured._found == {}


def test_cusparselt_is_proved(library, monkeypatch):
    fake = library()
    semi_structured.prove.__wrapped__(CPU, torch.bfloat16)
    assert fake.count("MatmulSearch") == 2
    product = cusparselt_product.multiply
    for wrong_way in (None, FOUND):

        def wrong(x, compressed, out, bias, way, wrong_way=wrong_way):
            return product(x, compressed, out, bias, way) * (1.1 if way == wrong_way else 1.0)

        monkeypatch.setattr(cusparselt_product, "multiply", wrong)
        with pytest.raises(PhoenixError, match="wrong products on this GPU; give prefill=dense"):
            semi_structured.prove.__wrapped__(CPU, torch.bfloat16)

    def fail(*parts):
        raise RuntimeError("operation not supported\nand more")

    monkeypatch.setattr(cusparselt_product, "multiply", fail)
    with pytest.raises(PhoenixError, match=r"fails on this GPU \(operation not supported\)"):
        semi_structured.prove.__wrapped__(CPU, torch.bfloat16)


def test_what_the_library_refuses(library):
    fake = library()
    fake.refuse = {(240, 336)}
    assert not semi_structured.takes((240, 336), torch.bfloat16, CPU)
    assert semi_structured.takes((240, 352), torch.bfloat16, CPU)
    assert not cusparselt_product.takes(CPU, torch.bfloat16, (32, 48), 12)
    assert {one.kind for one in fake.alive.values()} <= {"handle", "product"}  # products have nothing to free
    with pytest.raises(
        PhoenixError, match="StructuredDescriptorInit failed .operation not supported, status 10.; give"
    ):
        semi_structured.compress(weight_of(240, 336, two_four=True))


STEPS = (
    "Init StructuredDescriptorInit DenseDescriptorInit MatmulDescriptorInit MatmulDescSetAttribute MatmulGetWorkspace"
)


@pytest.mark.parametrize("name", [*STEPS.split(), "MatmulAlgSelectionInit", "MatmulPlanInit", "Matmul"])
def test_every_failure_is_told(library, name):
    fake = library()
    x, weight, bias = operands(16)
    compressed = torch.zeros(32 * 48 * 5 // 8).bfloat16()
    fake.fail = {name: FAILED}
    message = rf"^prefill: cuSPARSELt's cusparseLt{name} failed \(kernel launch failure, status 6\); give .*$"
    for _ in range(2):
        with pytest.raises(PhoenixError, match=message) as raised:
            semi_structured.multiply(x, compressed, 32, bias.bfloat16())
        assert "\n" not in str(raised.value)
    kinds = [one.kind for one in fake.alive.values()]
    assert kinds.count("matrix") == kinds.count("plan") * 3
    fake.fail = {}
    compressed = semi_structured.compress(weight)
    y = semi_structured.multiply(x, compressed, 32, bias.bfloat16())
    assert close(y, x.double() @ weight.double().t() + bias.bfloat16().double())


def test_threads_share_plans(library):
    fake = library()
    x, weight, _ = operands(64)
    compressed = semi_structured.compress(weight)
    exact, found = x.double() @ weight.double().t(), []

    def work():
        found.extend(
            close(semi_structured.multiply(x[:rows], compressed, 32), exact[:rows]) for rows in range(8, 64, 8)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 28
    assert fake.count("MatmulPlanInit") == 7
    assert fake.count("Init") == 1


def test_products_are_compiled(library):
    library()
    x, weight, bias = operands(20)
    compressed, bias = semi_structured.compress(weight), bias.bfloat16()
    y = semi_structured.multiply(x, compressed, 32, bias)
    compiled = torch.compile(semi_structured.multiply, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, compressed, 32, bias), y)
    assert torch.equal(compiled(x, compressed, 32, bias, (3, 1, 1)), y)


def test_there_are_no_gradients(library):
    library()
    x, weight, _ = operands(16)
    y = semi_structured.multiply(x.requires_grad_(), semi_structured.compress(weight), 32)
    with pytest.raises(PhoenixError, match="2:4 products have no gradients; train the dense model"):
        y.float().sum().backward()


def test_old_libraries_are_refused():
    with pytest.raises(PhoenixError, match=r"cuSPARSELt 0\.6 is too old; update torch for 0\.7 or newer"):
        cusparselt.declared(Fake(version=(0, 6)).library)


def test_there_is_no_library(monkeypatch):
    def nothing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    with pytest.raises(PhoenixError, match=r"libcusparseLt\.so\.0 was not found; install torch's own"):
        cusparselt.library.__wrapped__()


def test_the_library_beside_torch_is_found(monkeypatch, tmp_path):
    """Where the loader doesn't know it by name, it is looked for in NVIDIA's packages."""
    there = tmp_path / "nvidia" / "cusparselt" / "lib" / "libcusparseLt.so.0"
    there.parent.mkdir(parents=True)
    there.touch()

    def only(name):
        if name != str(there):
            raise OSError(name)
        return Fake().library

    monkeypatch.setattr(ctypes, "CDLL", only)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cusparselt.library.__wrapped__().cusparseLtMatmul.argtypes
