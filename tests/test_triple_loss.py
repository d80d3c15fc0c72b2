"""TripleLoss against DistilBERT's training code in float64, bad input, and the feature losses in use."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.nn import AttentionLoss, HiddenStateLoss, TopKLogits, TripleLoss, TripleLossParts
from tests.test_feature_losses import MASK, close, close_gradient, maps

LABELS = torch.tensor([[-100, 6, -100, -100, -100], [3, -100, -100, -100, -100], [-100] * 5])


def triple_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = {name: torch.randn(3, 5, 11) for name in ("student_logits", "teacher_logits")}
    x |= {name: torch.randn(3, 5, 8) for name in ("student_hidden", "teacher_hidden")}
    x = {name: value.to(dtype) for name, value in x.items()}
    for name in ("student_logits", "student_hidden"):
        x[name].requires_grad_()
    return x


def distilbert(inputs: dict[str, Tensor], labels: Tensor, mask: Tensor, soft_mask: Tensor, tau: float) -> list[Tensor]:
    """Soft, hard and cosine term as DistilBERT's training code computes them, in float64."""
    s, t, hs, ht = (x.double() for x in inputs.values())
    s_chosen, t_chosen = s[soft_mask.bool()], t[soft_mask.bool()]
    kl = functional.kl_div((s_chosen / tau).log_softmax(-1), (t_chosen / tau).softmax(-1), reduction="batchmean")
    hard = functional.cross_entropy(s.flatten(0, 1), labels.flatten())
    chosen = mask.bool()
    cosine = functional.cosine_embedding_loss(hs[chosen], ht[chosen], torch.ones(int(chosen.sum())))
    return [kl * tau**2, hard, cosine]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("restrict", [False, True], ids=["attended", "labelled"])
@pytest.mark.parametrize("same", [False, True], ids=["mlm", "causal"])
def test_triple_loss_is_distilberts(same: bool, restrict: bool, dtype: torch.dtype) -> None:
    inputs = triple_inputs(dtype)
    labels = torch.randint(11, (3, 5)).masked_fill(MASK == 0, -100) if same else LABELS
    terms = distilbert(inputs, labels, MASK, (labels != -100) if restrict else MASK, tau=2.0)
    expected = 5.0 * terms[0] + 2.0 * terms[1] + 1.0 * terms[2]
    leaves = [inputs["student_logits"], inputs["student_hidden"]]
    gradients = torch.autograd.grad(expected, leaves)

    loss = TripleLoss(restrict_soft_to_labels=restrict)
    parts = loss(**inputs, labels=labels, attention_mask=MASK, return_parts=True)
    assert isinstance(parts, TripleLossParts)
    for actual, wanted in zip(parts, [expected, *terms], strict=True):
        close(actual, wanted)
    assert [p.requires_grad for p in parts] == [True, False, False, False]
    for actual, wanted in zip(torch.autograd.grad(parts.loss, leaves), gradients, strict=True):
        close_gradient(actual, wanted, terms=1 if same or restrict else 2)


def test_one_sweep_where_the_tokens_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    loss, inputs = TripleLoss(), triple_inputs()
    for term in (loss.soft, loss.hard, loss.both):
        term.register_forward_hook(lambda module, *_: calls.append(module.alpha))

    def sweeps(labels: Tensor, mask: Tensor | None) -> list[float]:
        calls.clear()
        loss(**inputs, labels=labels, attention_mask=mask)
        return list(calls)

    everywhere = torch.ones(3, 5, dtype=torch.long)
    assert sweeps(everywhere, None) == [pytest.approx(2 / 7)]
    assert sweeps(everywhere.masked_fill(MASK == 0, -100), MASK) == [pytest.approx(2 / 7)]
    assert sweeps(LABELS, MASK) == [0.0, 1.0]
    assert sweeps(LABELS, None) == [0.0, 1.0]
    loss.restrict_soft_to_labels = True
    assert sweeps(LABELS, MASK) == [pytest.approx(2 / 7)]


@pytest.mark.parametrize("left", ["alpha_soft", "alpha_hard", "alpha_cos"])
def test_a_term_of_weight_zero_is_left_out(left: str) -> None:
    inputs, names = triple_inputs(), ("alpha_soft", "alpha_hard", "alpha_cos")
    terms = dict(zip(names, distilbert(inputs, LABELS, MASK, MASK, tau=2.0), strict=True))
    if left == "alpha_cos":
        inputs = {name: x for name, x in inputs.items() if "hidden" not in name}
    labels = None if left == "alpha_hard" else LABELS
    weights = {name: 0.0 if name == left else 3.0 for name in names}
    parts = TripleLoss(**weights)(**inputs, labels=labels, attention_mask=MASK, return_parts=True)
    close(parts.loss, sum(3.0 * term for name, term in terms.items() if name != left))
    assert dict(zip(names, parts[1:], strict=True))[left] == 0


def test_triple_loss_of_nothing_is_zero() -> None:
    inputs = triple_inputs()
    none = torch.full((3, 5), -100)
    parts = TripleLoss()(**inputs, labels=none, attention_mask=torch.zeros(3, 5).long(), return_parts=True)
    assert [p.item() for p in parts] == [0.0] * 4
    parts.loss.backward()
    for name in ("student_logits", "student_hidden"):
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name]))
    # Attended but without a label, as a short text with nothing masked: soft and cosine terms only.
    parts = TripleLoss()(**inputs, labels=none, attention_mask=MASK, return_parts=True)
    assert parts.hard == 0
    assert parts.soft > 0


def test_triple_loss_projects_and_takes_a_stored_teacher() -> None:
    inputs = triple_inputs()
    inputs["teacher_hidden"] = torch.randn(3, 5, 6)
    loss = TripleLoss(student_dim=8, teacher_dim=6)
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 8)]
    whole = loss(**inputs, labels=LABELS, attention_mask=MASK)
    inputs["teacher_logits"] = TopKLogits.from_logits(inputs["teacher_logits"], 11, temperature=2.0)
    close(loss(**inputs, labels=LABELS, attention_mask=MASK), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_soft": -1.0}, "TripleLoss: alpha_soft=-1.0, expected a finite weight that is not negative"),
        ({"alpha_cos": math.inf}, "TripleLoss: alpha_cos=inf, expected a finite weight"),
        ({"alpha_soft": 0, "alpha_hard": 0, "alpha_cos": 0}, "TripleLoss: every weight is 0"),
        ({"temperature": 0.0}, "temperature=0.0, expected a positive finite number"),
    ],
)
def test_triple_loss_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TripleLoss(**options)


def test_triple_loss_inputs_that_do_not_fit() -> None:
    inputs, loss = triple_inputs(), TripleLoss()
    with pytest.raises(ValueError, match=r"labels=None with alpha_hard=2\.0.*give labels"):
        loss(**inputs)
    with pytest.raises(ValueError, match=r"teacher_hidden=None with alpha_cos=1\.0; give both hidden states"):
        loss(**(inputs | {"teacher_hidden": None}), labels=LABELS)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(5, 3\), expected \(3, 5\)"):
        loss(**inputs, labels=LABELS, attention_mask=MASK.T)
    with pytest.raises(ValueError, match=r"labels has shape \(5, 3\)"):
        loss(**inputs, labels=LABELS.T)
    with pytest.raises(ValueError, match="label 11 "):
        loss(**inputs, labels=LABELS.masked_fill(LABELS == 6, 11))
    with pytest.raises(ValueError, match=r"student_hidden has shape \(15, 8\) and student_logits \(3, 5, 11\)"):
        loss(**(inputs | {n: inputs[n].flatten(0, 1) for n in ("student_hidden", "teacher_hidden")}), labels=LABELS)


# ---- in use -----------------------------------------------------------------------------------------------------


def test_losses_compile_whole() -> None:
    inputs = triple_inputs()
    hidden, triple = HiddenStateLoss("cosine"), TripleLoss()

    def step(x: dict[str, Tensor], attention: Tensor) -> Tensor:
        loss = triple(**x, labels=LABELS, attention_mask=MASK) + AttentionLoss("kl")(attention, attention.flip(1), MASK)
        return loss + hidden(x["student_hidden"], x["teacher_hidden"], MASK)

    attention = maps(2, MASK)
    expected = step(inputs, attention)
    close(torch.compile(step, fullgraph=True, backend="aot_eager")(inputs, attention), expected)


def test_a_bert_learns_from_another() -> None:
    """Real Hugging Face outputs: hidden states, maps and MLM logits of a padded batch."""
    transformers = pytest.importorskip("transformers")

    def bert(width: int, heads: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=32,
            attention_probs_dropout_prob=0.0, attn_implementation="eager",
        )  # fmt: skip
        return transformers.BertForMaskedLM(config)

    teacher, student = bert(24, 4).eval(), bert(16, 2)
    ids = torch.randint(50, (3, 5))
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        t = teacher(ids, attention_mask=MASK, **wanted)
    triple = TripleLoss(student_dim=16, teacher_dim=24)
    attention = AttentionLoss("kl", heads="mean")
    optimizer = torch.optim.AdamW([*student.parameters(), *triple.parameters()], lr=1e-2)
    losses = []
    for _ in range(8):
        s = student(ids, attention_mask=MASK, **wanted)
        loss = triple(
            s.logits,
            t.logits,
            LABELS,
            student_hidden=s.hidden_states[-1],
            teacher_hidden=t.hidden_states[-1],
            attention_mask=MASK,
        )
        loss = loss + attention(s.attentions[-1], t.attentions[-1], MASK)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert math.isfinite(sum(losses))
    assert losses[-1] < losses[0]
