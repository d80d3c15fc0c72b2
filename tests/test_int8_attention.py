"""Int8MultiheadAttention: nn.MultiheadAttention with quantised projections, in all its arguments.

The attention itself is checked with float projections, where it must agree with torch to rounding; the quantised one
against nn.MultiheadAttention with the weights rounded.
"""

import copy
import io
import itertools
import math

import pytest
import torch
from torch import nn

from pycompress.nn import Int8Linear, Int8MultiheadAttention
from pycompress.nn.projected_attention import ProjectedAttention

E, H, L, S, N = 24, 4, 5, 7, 3


def attention(seed=0, **kwargs):
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(E, H, **kwargs)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


def inputs(batch_first=False, batched=True, same=False, kdim=E, vdim=E, dtype=torch.float32):
    torch.manual_seed(1)
    length = S if same else L

    def made(tokens, width):
        shape = (tokens, width) if not batched else (N, tokens, width) if batch_first else (tokens, N, width)
        return torch.randn(shape, dtype=dtype)

    query = made(length, E)
    return (query, query, query) if same else (query, made(S, kdim), made(S, vdim))


def without_fast_path(module, *args, **kwargs):
    """Torch's own answer, not by its fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def assert_same(actual, expected, **tolerance):
    assert (actual[1] is None) == (expected[1] is None)
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            assert a.shape == e.shape
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e, **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


def packed_float(module):
    """ProjectedAttention with one float in_proj."""
    opened = ProjectedAttention.opened(module)
    for key in ("q_proj", "k_proj", "v_proj"):
        del opened._modules[key]
    opened.in_proj = nn.Linear(E, 3 * E, module.in_proj_bias is not None)
    opened.in_proj.weight = module.in_proj_weight
    opened.in_proj.bias = module.in_proj_bias
    return opened


MASKS = {
    "none": {},
    "bool": {"attn_mask": "bool"},
    "float": {"attn_mask": "float"},
    "planes": {"attn_mask": "planes"},
    "padding": {"key_padding_mask": "bool"},
    "float padding": {"key_padding_mask": "float"},
    "both": {"attn_mask": "bool", "key_padding_mask": "bool"},
    "both float": {"attn_mask": "planes", "key_padding_mask": "float"},
    "causal": {"attn_mask": "causal", "is_causal": True},
    "causal padding": {"attn_mask": "causal", "is_causal": True, "key_padding_mask": "float"},
}


def masks(case, length, batched):
    torch.manual_seed(2)
    found = dict(MASKS[case])
    if (kind := found.get("attn_mask")) is not None:
        planes = N * H if batched else H
        found["attn_mask"] = {
            "bool": lambda: torch.rand(length, S) > 0.8,
            "float": lambda: torch.randn(length, S),
            "planes": lambda: torch.randn(planes, length, S),
            "causal": lambda: torch.full((length, S), -math.inf).triu(1),
        }[kind]()
    if (kind := found.get("key_padding_mask")) is not None:
        shape = (N, S) if batched else (S,)
        padded = torch.zeros(shape, dtype=torch.bool)
        padded[..., -2:] = True
        found["key_padding_mask"] = padded if kind == "bool" else torch.randn(shape).masked_fill(padded, -math.inf)
    return found


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("layout", ["batch_first", "tokens_first", "unbatched"])
def test_agrees_with_torch(case, layout):
    batched, batch_first = layout != "unbatched", layout == "batch_first"
    for same, packed, extra in itertools.product((True, False), (True, False), ("", "bias_kv", "zero", "both")):
        options = {"add_bias_kv": extra in ("bias_kv", "both"), "add_zero_attn": extra in ("zero", "both")}
        module = attention(batch_first=batch_first, **options).eval()
        ours = packed_float(module) if packed else ProjectedAttention.opened(module)
        assert ours.packed == packed
        qkv = inputs(batch_first, batched, same)
        kwargs = masks(case, len(qkv[0]) if not batched else qkv[0].shape[1 if batch_first else 0], batched)
        for need in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            expected = without_fast_path(module, *qkv, **kwargs, **need)
            assert_same(ours(*qkv, **kwargs, **need), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(10, 13), (E, 13), (10, E), (None, None)])
def test_widths_and_bias(kdim, vdim, bias):
    module = attention(kdim=kdim, vdim=vdim, bias=bias, batch_first=True).eval()
    qkv = inputs(True, kdim=kdim or E, vdim=vdim or E)
    assert_same(ProjectedAttention.opened(module)(*qkv), without_fast_path(module, *qkv))
    ours = Int8MultiheadAttention.from_float(module, "weight_only")
    assert ours.packed == (kdim is None)
    assert_same(ours(*qkv), without_fast_path(ours.to_float(), *qkv))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training_draws_as_torch_does(need_weights):
    module = attention(dropout=0.4, batch_first=True).train()
    ours = ProjectedAttention.opened(module)
    assert ours.training
    qkv = inputs(True)
    torch.manual_seed(3)
    expected = module(*qkv, need_weights=need_weights)
    torch.manual_seed(3)
    assert_same(ours(*qkv, need_weights=need_weights), expected)
    assert not torch.allclose(ours(*qkv)[0], expected[0])
    assert_same(ours.eval()(*qkv), without_fast_path(module.eval(), *qkv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_quantised_is_torch_with_rounded_weights(mode, packed, dtype):
    module = attention(batch_first=True).to(dtype).eval()
    ours = Int8MultiheadAttention.from_float(module, mode, packed=packed)
    assert {key: type(child) for key, child in ours.named_children()} == dict.fromkeys(
        ("in_proj", "out_proj") if packed else ("q_proj", "k_proj", "v_proj", "out_proj"), Int8Linear
    )
    rounded = ours.to_float()
    assert type(rounded) is nn.MultiheadAttention
    for same in (True, False):
        qkv = inputs(True, same=same, dtype=dtype)
        actual, expected = ours(*qkv), without_fast_path(rounded, *qkv)
        if mode == "weight_only" and dtype == torch.float32:
            assert_same(actual, expected)
            continue
        assert actual[0].dtype == dtype
        if mode == "dynamic":
            expected, budget = without_fast_path(module, *qkv), 0.03
        else:
            budget = 20 * torch.finfo(dtype).eps
        a, e = actual[0].double(), expected[0].double()
        assert (a - e).norm() / e.norm() < budget


def test_static_ranges():
    module = attention().eval()
    query, key, value = inputs()
    ranges = {
        name: (float(x.min()), float(x.max()))
        for name, x in (("q_proj", query), ("k_proj", key), ("v_proj", value))
    }
    ranges["out_proj"] = (-3.0, 3.0)
    split = Int8MultiheadAttention.from_float(module, "static", packed=False, input_range=ranges)
    whole = Int8MultiheadAttention.from_float(module, "static", input_range=ranges)
    scales = [float(getattr(split, name).input_scale) for name in ("q_proj", "k_proj", "v_proj")]
    assert float(whole.in_proj.input_scale) >= max(scales)
    expected = without_fast_path(module, query, key, value)[0]
    for ours in (split, whole):
        assert (ours(query, key, value)[0] - expected).norm() / expected.norm() < 0.05
    with pytest.raises(ValueError, match="needs the input range of q_proj, k_proj, v_proj, out_proj"):
        Int8MultiheadAttention.from_float(module, "static")
    del ranges["out_proj"]
    with pytest.raises(ValueError, match="needs the input range of out_proj"):
        Int8MultiheadAttention.from_float(module, "static", input_range=ranges)
    with pytest.raises(ValueError, match="mode='dynamic' would ignore it"):
        Int8MultiheadAttention.from_float(module, input_range=ranges)


# ---- state ----------------------------------------------------------------------------------------------------------


def test_state_dict_and_a_new_module():
    module = attention(add_bias_kv=True, batch_first=True).eval()
    ours = Int8MultiheadAttention.from_float(module)
    state = ours.state_dict()
    layer = ("weight", "weight_scale", "bias")
    assert set(state) == {"bias_k", "bias_v", *(f"{p}.{key}" for p in ("in_proj", "out_proj") for key in layer)}
    assert state["in_proj.weight"].dtype == torch.int8
    assert state["in_proj.weight"].shape == (3 * E, E)
    fresh = Int8MultiheadAttention(E, H, add_bias_kv=True, batch_first=True).eval()
    fresh.load_state_dict(state)
    assert_same(fresh(*inputs(True)), ours(*inputs(True)), rtol=0, atol=0)
    split = Int8MultiheadAttention.from_float(module, packed=False)
    assert {key.partition(".")[0] for key in split.state_dict()} == {
        *("q_proj", "k_proj", "v_proj", "out_proj", "bias_k", "bias_v")
    }
    again = Int8MultiheadAttention(E, H, add_bias_kv=True, batch_first=True, packed=False).eval()
    again.load_state_dict(split.state_dict())
    assert_same(again(*inputs(True)), ours(*inputs(True)))


def test_copies_and_moves():
    ours = Int8MultiheadAttention.from_float(attention(batch_first=True)).eval()
    expected = ours(*inputs(True))
    assert_same(copy.deepcopy(ours)(*inputs(True)), expected, rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(*inputs(True)), expected, rtol=0, atol=0)
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half.in_proj.weight_scale.dtype == torch.float32
    assert half(*inputs(True, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_from_float_shares_nothing_and_one_copy_is_held():
    module = attention(add_bias_kv=True)
    ours = Int8MultiheadAttention.from_float(module)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    big = Int8MultiheadAttention.from_float(nn.MultiheadAttention(256, 4))
    assert big.memory_bytes() <= 1.1 * (4 * 256 * 256 + 8 * 4 * 256)


def test_gradients_reach_the_inputs_and_the_biases():
    ours = Int8MultiheadAttention.from_float(attention(add_bias_kv=True, batch_first=True), "weight_only")
    rounded = ours.to_float()
    found = []
    for module in (ours, rounded):
        qkv = [x.clone().requires_grad_() for x in inputs(True)]
        module(*qkv)[0].square().sum().backward()
        found.append([*(x.grad for x in qkv), module.bias_k.grad, module.bias_v.grad, module.out_proj.bias.grad])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_autocast():
    ours = Int8MultiheadAttention.from_float(attention(batch_first=True)).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, _ = ours(*inputs(True))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(*inputs(True))[0], rtol=0.05, atol=0.05)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, q, k, v: m(q, k, v, is_causal=True), "is_causal is a hint about attn_mask"),
        (lambda m, q, k, v: m(q, k, v[1:]), "key is .* but value is"),
        (lambda m, q, k, v: m(q[..., :5], k, v), "query has 5 features; expected 24"),
        (lambda m, q, k, v: m(q[:, :2], k, v), "query has a batch of 2 but key one of 3"),
        (lambda m, q, k, v: m(q[0], k, v), "expected all 3-D, or all 2-D"),
        (lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(L, S + 1)), r"attn_mask is \(5, 8\); expected \(5, 7\)"),
        (lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(N, L, S)), r"expected \(5, 7\) or \(12, 5, 7\)"),
        (lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.zeros(S, N)), r"key_padding_mask is \(7, 3\)"),
        (lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(L, S, dtype=torch.int32)), "attn_mask is torch.int32"),
    ],
)
def test_operands_that_do_not_fit(call, message):
    ours = Int8MultiheadAttention.from_float(attention())
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(ours, *inputs())


def test_bad_options():
    with pytest.raises(ValueError, match=r"unknown mode 'int2'; expected one of dynamic, .*int4, nf4"):
        Int8MultiheadAttention(E, H, mode="int2")
    with pytest.raises(ValueError, match="embed_dim=24 and num_heads=5"):
        Int8MultiheadAttention(E, 5)
    with pytest.raises(ValueError, match="packed=True with embed_dim=24, kdim=8"):
        Int8MultiheadAttention(E, H, kdim=8, packed=True)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        Int8MultiheadAttention(E, H, backend="fast")
    with pytest.raises(ValueError, match=r"expected an nn\.MultiheadAttention, got Linear"):
        Int8MultiheadAttention.from_float(nn.Linear(4, 4))
    broken = attention()
    broken.in_proj_weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN|finite"):
        Int8MultiheadAttention.from_float(broken)
    assert "mode=dynamic" in repr(Int8MultiheadAttention(E, H, 0.1, kdim=8))
