"""The operator on the GPU backends, against float64: on a GPU, or emulated and interpreted on the CPU.

The executors are slow: shapes are those that attack edges, and each test draws few.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress import ops
from pycompress.ops.sparse_linear import pick
from pycompress.ops.sparse_linear_forms import (
    BLOCK,
    BLOCKS,
    block_of,
    block_sections,
    check_form,
    form_header,
    is_2to4,
    pack_blocks,
)
from pycompress.ops.sparse_linear_gpu import make_index, structure_of
from pycompress.ops.sparse_linear_reference import Call
from tests.gpu import Gpu
from tests.oracle import ROUNDOFF
from tests.sparse_oracle import ANY_M, FORMS, Layer, assert_close, block_mask, layer

F32, BF16, F16, S8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
# (weight, x): every kind of product.
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (S8, BF16), (S8, F32), (F32, F16), (BF16, F32)]
SHAPES = [(0, 8, 8), (1, 1, 1), (15, 17, 31), (33, 19, 127), (3, 5, 2501), (4, 9, 0), (5, 7, 64)]


def two_of_four(n: int, k: int, kept: float = 0.8) -> Tensor:
    """At most two of each four neighbours, ragged at the edge."""
    order = torch.rand(n, -(-k // 4), 4).argsort(2)
    mask = (order < 2).flatten(1)[:, :k]
    return (mask & (torch.rand(n, k) < kept)).contiguous()


def structured(gpu: Gpu, n: int, k: int, block: int = 16, sparsity: float = 0.5) -> Tensor:
    """A mask that has an index form there, and keeps something."""
    mask = two_of_four(n, k) if gpu.backend == "cuda" else block_mask(n, k, sparsity, (block, block))
    if n and k:
        mask[0, :4] = False if gpu.backend == "cuda" else mask[0, :4]
        mask[0, 0] = True
    return mask


def to(gpu: Gpu, made: Layer) -> Layer:
    return Layer(*(None if t is None else t.to(gpu.device) for t in made))  # type: ignore[arg-type]


def run(gpu: Gpu, x: Tensor, made: Layer, form: str = "bitmap", held: bool = True, **options: Any) -> Tensor:
    """In one form whatever M; held: derived forms are handed over, else made on the spot."""
    there, k, derived = to(gpu, made), x.shape[-1], {}
    if held:
        derived["row_start"] = ops.row_starts(there.bitmap, k)
        derived["index"] = make_index(there.bitmap, there.values, k, (gpu.backend,)) if form == "index" else None
        derived["dense"] = ops.sparse_to_dense(there.bitmap, there.values, k) if form == "dense" else None
    given = x.to(gpu.device) if x.device.type != gpu.device else x
    choice = (ANY_M, FORMS.index(form))
    return ops.sparse_linear(given, *there.args, choice=choice, backend=gpu.backend, **derived, **options).cpu()


def assert_near(y: Tensor, x: Tensor, made: Layer, activation: str = "none") -> None:
    """As assert_close; a tensor core cuts off what it aligns, to a bit or two less than float32 rounds to."""
    if y.is_cuda or torch.cuda.is_available():
        expected = ops.sparse_linear(
            x.double().float(), *made.args, activation=activation, backend="reference"
        ).double()
        allowed = 16 * ROUNDOFF[F32] * x.shape[-1] ** 0.5 + 4 * ROUNDOFF[x.dtype] * expected.abs()
        if made.scale is None:
            assert ((y.double() - expected).abs() <= allowed + 1e-4).all()
            return
    assert_close(y, x, made, activation)


# ---- the forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "dtype"), PAIRS, ids=str)
def test_bitmap_matches_float64(gpu: Gpu, weight: torch.dtype, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        x, made = torch.randn(m, k).to(dtype), layer(n, k, weight, bias=m != 3)
        assert_near(run(gpu, x, made, held=m != 15), x, made)


@pytest.mark.parametrize(("weight", "dtype"), PAIRS, ids=str)
def test_index_matches_float64(gpu: Gpu, weight: torch.dtype, dtype: torch.dtype) -> None:
    """Blocks in Triton, two of every four in CUDA; N and K ragged."""
    for (m, n, k), block in zip(((17, 33, 127), (1, 70, 64), (3, 5, 200)), BLOCKS, strict=True):
        x, made = torch.randn(m, k).to(dtype), layer(n, k, weight, mask=structured(gpu, n, k, block), bias=m != 1)
        assert_near(run(gpu, x, made, "index", held=m != 3), x, made)


def test_one_large_row(gpu: Gpu) -> None:
    x, made = torch.randn(1, 2048), layer(24, 2048)
    assert_near(run(gpu, x, made), x, made)
    x, made = torch.randn(1, 2048), layer(64, 2048, BF16, mask=structured(gpu, 64, 2048, 32))
    assert_near(run(gpu, x.bfloat16(), made, "index"), x.bfloat16(), made)


@pytest.mark.parametrize("weight", [F32, BF16, F16, S8], ids=str)
def test_dense(gpu: Gpu, weight: torch.dtype) -> None:
    """F.linear, or int8_linear of the same backend; given and made on the spot."""
    for held, dtype in ((True, F32), (False, F16 if weight == F16 else BF16)):
        x, made = torch.randn(5, 40).to(dtype), layer(9, 40, weight, 0.3)
        y = run(gpu, x, made, "dense", held, activation="gelu")
        reference = ops.sparse_linear(x, *made.args, activation="gelu", backend="reference")
        torch.testing.assert_close(y.float(), reference.float(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("weight", [F32, S8], ids=str)
def test_activations(gpu: Gpu, weight: torch.dtype, activation: str) -> None:
    """K = 0 leaves act(bias): the whole range of the activation; then a product before it."""
    tails = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4])
    values = torch.cat([torch.linspace(-30, 30, 41), tails])
    empty = layer(len(values), 0, weight)._replace(bias=values)
    x = torch.zeros(2, 0)
    assert_near(run(gpu, x, empty, activation=activation), x, empty, activation)
    for m, form in ((3, "bitmap"), (17, "index")):
        x, made = torch.randn(m, 48).bfloat16(), layer(18, 48, weight, mask=structured(gpu, 18, 48))
        assert_near(run(gpu, x, made, form, activation=activation), x, made, activation)


LAYOUTS = {
    "transposed": lambda: torch.randn(50, 6).t(),
    "odd stride": lambda: torch.randn(6, 157)[:, 1:151:3],
    "one row repeated": lambda: torch.randn(1, 50).expand(6, 50),
    "two levels": lambda: torch.randn(2, 5, 53)[:, 1:4, 1:51],
    "three levels": lambda: torch.randn(3, 2, 7, 50)[:, :, ::4].transpose(0, 1),
    "offset": lambda: torch.randn(6 * 50 + 3)[3:].view(6, 50),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(gpu: Gpu, layout: str) -> None:
    x = LAYOUTS[layout]()
    for form in ("bitmap", "index"):
        for weight, dtype in ((F32, F32), (S8, BF16)):
            made, given = layer(9, 50, weight, mask=structured(gpu, 9, 50)), x.to(dtype)
            moved = given.to(gpu.device)  # keeps the strides of what is dense
            y = run(gpu, moved, made, form)
            assert y.shape == (*given.shape[:-1], 9)
            assert_near(y.reshape(-1, 9), given.reshape(-1, 50), made)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
@pytest.mark.parametrize(("m", "bad"), [(2, -float("inf")), (18, float("nan"))])
def test_rows_that_are_not_finite(gpu: Gpu, m: int, bad: float) -> None:
    """int8: NaN in that whole row of y; float: what keeps a weight there is not finite. No other row."""
    for weight in (F32, S8):
        for form in ("bitmap", "index"):
            x, made = torch.randn(m, 48), layer(20, 48, weight, mask=structured(gpu, 20, 48), bias=False)
            clean = run(gpu, x, made, form)
            spoiled = x.clone()
            spoiled[m - 1, 17] = bad
            y = run(gpu, spoiled, made, form)
            assert torch.equal(y[: m - 1], clean[: m - 1])
            if weight == S8:
                assert y[m - 1].isnan().all()
            else:
                assert not y[m - 1][made.mask[:, 17]].isfinite().any()


@pytest.mark.parametrize("form", ["bitmap", "index"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 999), (1, 140000)])
def test_integer_sums_are_exact(gpu: Gpu, m: int, k: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of 1, so that y is the integer sum, at its extreme: where int32 wraps."""
    if (form, gpu.backend, k) == ("index", "triton", 140000):
        pytest.skip("minutes in the interpreter; the sums of this kernel in int64 have a test of their own")
    if gpu == Gpu("triton", "cpu") and k == 140000:  # half a minute there, in steps that suit a GPU
        from pycompress.kernels import sparse_linear

        tile = dataclasses.replace(sparse_linear.ONE, words=128)
        monkeypatch.setattr(sparse_linear, "pick_bitmap", lambda m: tile)
    mask = torch.ones(2, k, dtype=torch.bool)
    if form == "index":
        mask = structured(gpu, 2, k, 64, 0.0) if gpu.backend == "cuda" else mask
        mask[1, 64:] = False  # a full weight has no blocks
    made = layer(2, k, S8, mask=mask, bias=False)
    made = made._replace(values=torch.full_like(made.values, 127), scale=torch.ones(2))
    y = run(gpu, torch.full((m, k), 127.0), made, form, held=False)
    assert torch.equal(y, (127 * 127 * mask.sum(1)).to(F32).repeat(m, 1))


def test_wide_integer_sums_of_many_tokens(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that sum in int64, which an executor could reach at K = 140000 only in minutes."""
    if gpu.backend == "cuda":
        pytest.skip("there is one kernel for every K")
    from pycompress.kernels import sparse_linear, sparse_linear_block

    for module in (sparse_linear, sparse_linear_block):
        monkeypatch.setattr(module, "INT32_K", 0)
    for m in (4, 17):
        for form in ("bitmap", "index"):
            x, made = torch.randn(m, 150), layer(40, 150, S8, mask=block_mask(40, 150, 0.5, (16, 16)))
            assert_near(run(gpu, x, made, form), x, made)


def test_uneven_rows(gpu: Gpu) -> None:
    """Empty rows beside full ones, and a weight without values."""
    mask = block_mask(20, 70, 0.8)
    mask[[0, 7, 19]] = False
    mask[3] = True
    for weight in (BF16, S8):
        for made in (layer(20, 70, weight, mask=mask), layer(20, 70, weight, mask=torch.zeros_like(mask))):
            for m in (1, 4, 17):
                x = torch.randn(m, 70)
                y = run(gpu, x, made)
                assert_near(y, x, made)
                assert torch.equal(y[:, [0, 7, 19]], made.bias[[0, 7, 19]].expand(m, 3))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 20), n=st.integers(0, 40), k=st.integers(0, 150), sparsity=st.floats(0, 1),
    pair=st.sampled_from(PAIRS), form=st.sampled_from(["bitmap", "index"]), bias=st.sampled_from([None, F32, BF16]),
)  # fmt: skip
@example(m=0, n=0, k=0, sparsity=0.0, pair=(F32, F32), form="index", bias=None)
@example(m=3, n=0, k=9, sparsity=0.5, pair=(F32, F32), form="index", bias=F32)
def test_any_shape(
    gpu: Gpu, m: int, n: int, k: int, sparsity: float, pair: tuple[torch.dtype, torch.dtype], form: str, bias: Any
) -> None:
    x = torch.randn(m, k).to(pair[1])
    mask = structured(gpu, n, k, 16, sparsity) if form == "index" else block_mask(n, k, sparsity)
    made = layer(n, k, pair[0], mask=mask, bias=bias is not None)
    if bias is not None:
        made = made._replace(bias=made.bias.to(bias))
    assert_near(run(gpu, x, made, form), x, made)


# ---- what is refused ------------------------------------------------------------------------------------------------


DAMAGE = {
    "count": (lambda b, v: (b, v[1:]), "the bitmap keeps .* weights but there are"),
    "more": (lambda b, v: (b, torch.cat([v, v[:1]])), "the bitmap keeps .* weights but there are"),
    "stray": (lambda b, v: (b | torch.tensor([0, 0, 128], dtype=torch.uint8), v), "K=21"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_weight_is_refused(gpu: Gpu, damage: str) -> None:
    change, message = DAMAGE[damage]
    made = layer(5, 21, mask=torch.arange(105).view(5, 21) % 3 == 0)
    bitmap, values = change(made.bitmap, made.values)
    with pytest.raises(ValueError, match=message):
        run(gpu, torch.randn(1, 21), made._replace(bitmap=bitmap, values=values), held=False)


def test_row_start_of_another_weight_reads_nothing_out_of_range(gpu: Gpu) -> None:
    """It is not checked on a GPU, as that would wait for it: y is wrong, but only the weight's memory is read."""
    made = to(gpu, layer(9, 40))
    for shift in (-(2**40), -3, 5, 2**40):
        start = ops.row_starts(made.bitmap, 40) + shift
        for m in (1, 17):
            x = torch.randn(m, 40, device=gpu.device)
            y = ops.sparse_linear(x, *made.args, row_start=start, choice=(ANY_M, 0), backend=gpu.backend)
            assert y.shape == (m, 9)


def blocks(made: Layer, k: int, block: int = 16) -> Tensor:
    return pack_blocks(made.bitmap, made.values, k, block)


def test_a_damaged_block_form_is_refused() -> None:
    made = layer(40, 50, mask=block_mask(40, 50, 0.5, (16, 16)))
    sound = blocks(made, 50)
    for word in range(13):
        form = sound.clone()
        form[8 * word : 8 * word + 8].view(torch.int64)[0] += 1
        with pytest.raises(ValueError, match="sparse_linear: index"):
            check_form(form, made.bitmap, made.values, 50)
    header = form_header(sound)
    for start, value in ((header.start_a, -1), (header.start_a + 4, 2**30), (header.start_b, -1), (header.start_b, 4)):
        form = sound.clone()
        form[start : start + 4].view(torch.int32)[0] = value
        with pytest.raises(ValueError, match=r"index is damaged: .*make it again"):
            form_header(form)
    for size in (0, 64, 200, sound.numel() - 128):
        with pytest.raises(ValueError, match="sparse_linear: index"):
            form_header(sound[:size].clone())
    with pytest.raises(ValueError, match="does not begin at a multiple of 16"):
        form_header(torch.empty(sound.numel() + 1, dtype=torch.uint8)[1:].copy_(sound))


def test_an_edited_form_is_checked_again() -> None:
    made = layer(40, 50, mask=block_mask(40, 50, 0.5, (16, 16)))
    form = blocks(made, 50)
    assert form_header(form).kind == BLOCK
    form[0] += 1
    with pytest.raises(ValueError, match="no header of this version"):
        form_header(form)


def test_the_form_of_another_weight_is_refused(gpu: Gpu) -> None:
    if gpu.backend == "cuda":
        pytest.skip("blocks are Triton's")
    made = to(gpu, layer(40, 50, mask=block_mask(40, 50, 0.5, (16, 16))))
    x = torch.randn(3, 50, device=gpu.device)
    for n, k, dtype in ((41, 50, F32), (40, 49, F32), (40, 50, BF16)):
        other = to(gpu, layer(n, k, dtype, mask=block_mask(n, k, 0.1, (16, 16))))
        with pytest.raises(ValueError, match="index is of a weight N="):
            ops.sparse_linear(x, *made.args, index=blocks(other, k), choice=(ANY_M, 1), backend="triton")
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run this|blocks, which the Triton kernels multiply"):
        ops.sparse_linear(x, *made.args, index=blocks(made, 50), choice=(ANY_M, 1), backend="cuda")


# ---- forms and their structure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("weight", [F32, F16, S8], ids=str)
def test_blocks_hold_the_weight(weight: torch.dtype, block: int) -> None:
    for n, k in ((1, 1), (70, 130), (64, 128), (0, 9), (9, 0)):
        made = layer(n, k, weight, mask=block_mask(n, k, 0.6, (16, 16)))
        form = blocks(made, k, block)
        header = form_header(form)
        assert (header.n, header.k, header.nnz, header.block, header.dtype) == (
            n,
            k,
            made.values.numel(),
            block,
            weight,
        )
        pointer, column, values = block_sections(form, header)
        dense = torch.zeros(header.rows * block, -(-k // block) * block, dtype=weight)
        for row in range(header.rows):
            for j in range(int(pointer[row]), int(pointer[row + 1])):
                col = int(column[j]) * block
                dense[row * block : (row + 1) * block, col : col + block] = values[j]
                assert values[j].numel() == block * block
        assert torch.equal(dense[:n, :k], torch.where(made.mask, made.weight, 0))
        assert not dense[n:].any()
        assert not dense[:, k:].any()
    with pytest.raises(ValueError, match="block=8, expected one of 64, 32, 16"):
        pack_blocks(made.bitmap, made.values, k, 8)


def test_structures() -> None:
    def block(mask: Tensor) -> int | None:
        return block_of(layer(*mask.shape, mask=mask).bitmap, mask.shape[1])

    for size in BLOCKS:
        mask = block_mask(200, 150, 0.6, (size, size))
        mask[:size, :size] = True
        assert block(mask) == size
        assert block(mask & (torch.rand(200, 150) > 0.1)) == size  # mostly full
        assert block(mask & (torch.rand(200, 150) > 0.5)) != size
    assert block(block_mask(200, 150, 0.5)) is None
    assert block(torch.ones(64, 64, dtype=torch.bool)) is None
    assert block(torch.zeros(64, 64, dtype=torch.bool)) is None
    mask = two_of_four(20, 45)
    for change, expected in ((False, True), (True, False)):
        if change:
            mask[3, 4:7] = True
        assert is_2to4(layer(20, 45, mask=mask).bitmap, 45) is expected
    made = layer(64, 64, BF16, mask=two_of_four(64, 64))
    assert structure_of(made.bitmap, made.values, 64, ("cuda", "triton")) == ("2:4", 64 * 32)
    assert structure_of(made.bitmap, made.values, 64, ("triton",)) == ("", 0)
    assert structure_of(made.bitmap, made.values.float(), 64, ("cuda",)) == ("", 0)
    made = layer(64, 64, BF16, mask=torch.eye(4).bool().repeat_interleave(16, 0).repeat_interleave(16, 1))
    assert structure_of(made.bitmap, made.values, 64, ("cuda", "triton")) == ("block16", 4 * 256)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_named_backends_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(4, 8), torch.randn(2, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match="backend='triton' cannot run this: x is on cpu, the Triton kernels run on NVIDIA"
    ):
        ops.sparse_linear(x, *made.args, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' cannot run this: x is on cpu, the CUDA kernels run on NVIDIA"):
        ops.sparse_linear(x, *made.args, backend="cuda")
    meta = Call(*(t.to("meta") for t in (x, *made[2:4])), None, None, None, None, None, (), "none")
    assert pick("auto", meta).name == "reference"
    assert pick("auto", Call(x, *made.args, None, None, None, (), "none")).name == "native"


def test_float16_values_on_the_cpu() -> None:
    """The reference takes them; the native kernels name what they take."""
    x, made = torch.randn(5, 40).half(), layer(9, 40, F16)
    assert_close(ops.sparse_linear(x, *made.args), x, made)
    with pytest.raises(ValueError, match=r"backend='native' cannot run this: values are float16, .* bfloat16"):
        ops.sparse_linear(x, *made.args, backend="native")
