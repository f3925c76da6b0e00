"""Fused kernels: as many as are needed, equal to the plain functions, and never needed."""

import itertools

import pytest
import torch

import halfeven as he
from halfeven.quantization import compile as compilation
from halfeven.quantization.fake_quantize import fake_quantize
from halfeven.quantization.scheme import Scheme
from processes import in_a_process
from quantization.grids import SIGNED4, int32

pytestmark = pytest.mark.usefixtures("fused")


def test_every_type_and_rank_has_its_kernels():
    half = itertools.product((torch.float16, torch.bfloat16), (40,), (None, 3))
    for dtype, elements, channels in (*itertools.product((torch.float32,), (1, 40), (None, 1, 3)), *half):
        x = torch.randn(channels or 1, elements).to(dtype)
        scale = torch.full((channels,) if channels else (), 0.1)
        scheme = Scheme(bits=4, signed=True, axis=None if channels is None else 0)
        found = fake_quantize(x, scale, torch.zeros_like(scale, dtype=torch.int32), scheme)
        assert torch.equal(found, (torch.round(x.float() / 0.1).clamp(-8, 7) * torch.tensor(0.1)).to(dtype))


def test_more_kernels_than_the_compilers_limit_of_eight_are_no_error(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    scheme, variants = Scheme(bits=4, signed=True, axis=0), 0
    for autocast, inference in itertools.product((False, True), repeat=2):
        for elements, channels in itertools.product((1, 40), (1, 3)):
            x, scale = torch.randn(channels, elements), torch.full((channels,), 0.1)
            with torch.autocast("cpu", enabled=autocast), torch.inference_mode(inference):
                found = fake_quantize(x, scale, torch.zeros_like(scale, dtype=torch.int32), scheme)
            assert torch.equal(found, torch.round(x / 0.1).clamp(-8, 7) * torch.tensor(0.1))
            variants += 1
    assert variants > 8


def test_bit_widths_share_a_kernel_and_ranks_and_types_have_their_own():
    def kernels():
        return compilation._compile_variant.cache_info().currsize

    def run(x, **scheme):
        fake_quantize(x, torch.tensor(0.1), int32(0), Scheme(**scheme))

    run(torch.randn(30))
    before = kernels()
    for bits in (3, 4, 8):
        run(torch.randn(10 * bits), bits=bits)
        run(torch.randn(2, 5, bits), bits=bits, signed=True)
    assert kernels() == before
    run(torch.randn(30).double())
    fake_quantize(torch.randn(3, 10).double(), torch.full((3,), 0.1), int32(0, 0, 0), Scheme(axis=0))
    assert kernels() == before + 2


def test_a_function_keeps_what_it_closes_over_and_its_defaults():
    def shifted(by):
        return lambda x, low, high=0.5: torch.clamp(x + by, low, high)

    x = torch.linspace(-1, 1, 20)
    for by in (0.25, 0.75):
        assert torch.equal(compilation.fused(shifted(by))(x, 0), torch.clamp(x + by, 0, 0.5))


def results(x, scale, zero_point, axis, options):
    """The value and all gradients."""
    given = [tensor.clone() for tensor in (x, scale, zero_point)]
    leaves = [tensor.requires_grad_() for tensor in given if tensor.is_floating_point()]
    y = fake_quantize(*given, Scheme(axis=axis), 0.5, **options)
    (y * torch.arange(1.0, y.numel() + 1).reshape(y.shape)).sum().backward()
    return y.detach(), *(leaf.grad for leaf in leaves)


def test_eager_equals_compiled(monkeypatch):
    if not compilation.compiler_works():
        pytest.skip("torch.compile finds no compiler here")
    cases = []
    for axis, channels in ((None, None), (0, 4), (1, 5)):
        scale = torch.rand(channels or ()) * 0.05 + 0.01
        zero_point = torch.randint(0, 255, scale.shape, dtype=torch.int32)
        ties = torch.randint(-300, 300, (4, 5, 6)).float() * 0.005
        cases += [(x, scale, zero_point, axis, {}) for x in (torch.randn(4, 5, 6) * 3, ties)]
        # A stored scale that is a power of two: exp2 may differ in its last bit from kernel to kernel.
        log = {"domain": "log", "clip": (-1.0, 2.0), "rounding_gradient": False}
        cases += [(torch.round(ties * 1000) / 64, torch.full(scale.shape, -5.0), zero_point + 0.25, axis, log)]
        cases += [(ties, -scale, zero_point + 0.25, axis, {"domain": "linear", "clip": (0.0, float("inf"))})]
    compiled = [results(*case) for case in cases]
    monkeypatch.setattr(compilation, "_works", False)
    for found, case in zip(compiled, cases, strict=True):
        expected = results(*case)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        for mine, its in zip(found[2:], expected[2:], strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-2)


def works_in_a_new_process():
    return compilation.compiler_works()


def test_kernels_are_switched_off_by_the_environment():
    assert in_a_process(works_in_a_new_process) is False


def test_a_missing_compiler_is_said_once_and_changes_nothing(monkeypatch, caplog):
    def broken(function):
        def fail(*arguments):
            raise RuntimeError("no compiler found\ndetails")

        return fail

    x, scale = torch.randn(50), torch.tensor(0.1)
    expected = fake_quantize(x, scale, int32(0), SIGNED4)
    monkeypatch.setattr(compilation, "_works", None)
    monkeypatch.setattr(compilation, "_compile_variant", broken)
    with caplog.at_level("WARNING", logger="halfeven.quantization.compile"):
        found = [fake_quantize(x, scale, int32(0), SIGNED4) for _ in range(3)]
    assert all(torch.equal(f, expected) for f in found)
    messages = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(messages) == 1
    assert "no compiler found" in messages[0]
    assert "details" not in messages[0]


@pytest.fixture
def tried(monkeypatch):
    """Notes of each time that the compiler is tried, which builds nothing here."""
    found = []
    monkeypatch.setattr(compilation, "_try_compiler", lambda: found.append("tried"))
    monkeypatch.setattr(compilation, "_unfused", 0)
    monkeypatch.setattr(compilation, "UNFUSED_NUMBERS", 5000)
    return found


def test_a_model_is_quantized_once_without_kernels_and_trained_with_them(tried):
    images = torch.randn(4, 3, 8, 8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    qmodel = he.calibrate(he.prepare(model.eval(), images, scheme="w4a8"), [images]).eval()
    with torch.no_grad():
        qmodel(images)
    assert tried == []
    qmodel.train()(images).sum().backward()
    assert tried


def test_kernels_are_built_once_many_numbers_have_gone_without(tried):
    x = torch.randn(2000)
    for expected in ([], [], [], ["tried"]):
        fake_quantize(x, torch.tensor(0.1), int32(0), SIGNED4)
        assert tried == expected
