"""The workflow's objective: each term against the formula written out, and what is refused before training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pycompress.nn import DistillationLoss
from pycompress.nn.feature_losses import AttentionLoss
from pycompress.recipe.sections import Attention, Distillation, Hidden
from pycompress.workflow.objective import Objective
from pycompress.workflow.rng import rng_state
from tests.workflow_models import Encoder, Lm, ids, net, token_batch

pytestmark = pytest.mark.usefixtures("one_thread")
X, LABELS = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4, 0])


def value(objective: Objective, batch: Any) -> tuple[float, dict[str, float]]:
    loss, terms = objective(batch)
    assert loss.dim() == 0
    assert not any(term.requires_grad for term in terms.values())
    return float(loss.detach()), {name: float(term) for name, term in terms.items()}


def soft(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL(teacher | student), mean over rows."""
    s, t = (functional.log_softmax(x.double() / tau, -1) for x in (student, teacher))
    return tau**2 * (t.exp() * (t - s)).sum(-1).mean()


# ---- task -----------------------------------------------------------------------------------------------------


def test_default_task_is_cross_entropy() -> None:
    model = net(0)
    objective = Objective.make(None, model, None, None, (X, LABELS))
    loss, terms = value(objective, (X, LABELS))
    expected = functional.cross_entropy(model(X), LABELS).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert terms == {"task": pytest.approx(expected, rel=1e-6)}
    assert not objective.distils
    assert list(objective.parameters()) == []


def test_tokens_without_a_label_take_no_part() -> None:
    model = Encoder()
    inputs, labels = ids(3, 5), torch.randint(7, (3, 5))
    labels[:, 3:] = -100
    objective = Objective.make(None, model, None, None, (inputs, labels))
    expected = functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    assert value(objective, (inputs, labels))[0] == pytest.approx(expected.item(), rel=1e-6)


def test_loss_fn_sees_output_and_batch() -> None:
    seen = []

    def loss_fn(output: Any, batch: Any) -> Tensor:
        seen.append(batch)
        return (output - batch[1]["target"]).square().mean()

    model, batch = net(0), (X, {"target": 1.0})
    objective = Objective.make(None, model, None, loss_fn, batch)
    loss, terms = value(objective, batch)
    assert loss == terms["task"] == pytest.approx((model(X) - 1).square().mean().item())
    assert seen[-1] is batch


@pytest.mark.parametrize("head", ["plain", "shifted", "smoothed", "weighted", "regression"])
def test_the_models_own_loss(head: str) -> None:
    """Cross-entropy, shifted or not, is recognised and left to the kernel; any other is the model's to make."""
    model = Lm(head)
    batch = token_batch(4, 6)
    if head == "regression":
        batch["labels"] = torch.randn(4, 6, 7)
    objective = Objective.make(None, model, None, None, batch)
    expected = model(**batch).loss
    made = model.losses
    loss, _ = objective(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (model.losses == made) == (head in ("plain", "shifted")), "asked for only where it is not cross-entropy"
    wanted = torch.autograd.grad(expected, model.parameters_used())
    found = torch.autograd.grad(loss, model.parameters_used())
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_that_builds_on_its_labels_gets_them() -> None:
    class Decoder(Lm):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Tensor | None = None) -> Any:
            if labels is None:
                raise ValueError("needs decoder inputs")
            return super().forward(input_ids + labels.clamp(min=0), attention_mask, labels)

    model, teacher, batch = Decoder("plain"), Decoder("plain", seed=1), token_batch(4, 6)
    objective = Objective.make(Distillation(tau=1.0), model, teacher, None, batch)
    loss, terms = value(objective, batch)
    assert terms["task"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert loss == pytest.approx(0.5 * terms["task"] + 0.5 * terms["soft"], rel=1e-5)


# ---- distillation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_logit_distillation(alpha: float) -> None:
    student, teacher = net(0), net(1)
    objective = Objective.make(Distillation(alpha=alpha, tau=3.0), student, teacher, None, (X, LABELS))
    loss, terms = value(objective, (X, LABELS))
    hard, kl = functional.cross_entropy(student(X), LABELS), soft(student(X), teacher(X), 3.0)
    assert loss == pytest.approx((alpha * hard + (1 - alpha) * kl).item(), rel=1e-5)
    assert terms == {
        name: pytest.approx(term.item(), rel=1e-5)
        for name, term, there in (("task", hard, alpha > 0), ("soft", kl, True))
        if there
    }
    assert objective.distils


def test_hard_and_soft_term_are_one_call_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = DistillationLoss.forward
    monkeypatch.setattr(DistillationLoss, "forward", lambda self, *a, **k: (calls.append(self), real(self, *a, **k))[1])
    monkeypatch.setattr(functional, "cross_entropy", None)
    objective = Objective.make(Distillation(), net(0), net(1), None, (X, LABELS))
    calls.clear()
    objective((X, LABELS))
    assert [(loss.alpha, loss.temperature) for loss in calls] == [(0.5, 2.0)]


def test_with_a_loss_fn_the_soft_term_stands_alone() -> None:
    student, teacher = net(0), net(1)
    objective = Objective.make(
        Distillation(alpha=0.25, tau=2.0), student, teacher, lambda output, batch: output.abs().mean(), X
    )
    loss, _ = value(objective, X)
    expected = 0.25 * student(X).abs().mean() + 0.75 * soft(student(X), teacher(X), 2.0)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("given", ["labels", "mask", "nothing"])
def test_tokens_of_the_soft_term(given: str) -> None:
    student, teacher = Encoder(), Encoder(seed=1)
    batch: dict[str, Tensor] = {"input_ids": ids(3, 5)}
    kept = torch.ones(3, 5, dtype=torch.bool)
    if given != "nothing":
        kept[0, 2:] = False
        batch["attention_mask"] = kept.long()
    if given == "labels":
        kept = kept.clone()
        kept[1, 0] = False
        batch["labels"] = torch.where(kept, 1, -100)
    objective = Objective.make(Distillation(alpha=0.0, tau=2.0), student, teacher, None, batch)
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    expected = soft(student(**inputs).logits[kept], teacher(**inputs).logits[kept], 2.0)
    assert value(objective, batch)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_of_a_causal_model_are_shifted_for_the_soft_term_too() -> None:
    student, teacher, batch = Lm("shifted"), Lm("shifted", seed=1), token_batch(4, 6)
    kept = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    for alpha in (0.0, 0.5):
        objective = Objective.make(Distillation(alpha=alpha, tau=1.0), student, teacher, None, batch)
        inputs = {key: x for key, x in batch.items() if key != "labels"}
        expected = soft(student(**inputs).logits[kept], teacher(**inputs).logits[kept], 1.0)
        assert value(objective, batch)[1]["soft"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_teacher_learns_nothing() -> None:
    student, teacher = net(0), net(1)
    objective = Objective.make(Distillation(), student, teacher, None, (X, LABELS))
    objective((X, LABELS))[0].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_without_logits_the_task_keeps_its_weight() -> None:
    student, teacher = net(0), net(1)
    d = Distillation(loss="none", alpha=0.25, hidden=Hidden(layers={"0": "0"}))
    loss, terms = value(Objective.make(d, student, teacher, None, (X, LABELS)), (X, LABELS))
    assert terms["task"] == pytest.approx(functional.cross_entropy(student(X), LABELS).item(), rel=1e-5)
    assert loss == pytest.approx(0.25 * terms["task"] + terms["hidden"], rel=1e-6)


# ---- hidden states --------------------------------------------------------------------------------------------


def mean_square(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)[mask != 0].mean()


@pytest.mark.parametrize("layers", ["last", "all"])
def test_hidden_states_of_the_mask(layers: Any) -> None:
    student, teacher, batch = Encoder(layers=2), Encoder(seed=1, layers=4), token_batch(3, 5, labels=False)
    d = Distillation(loss="none", alpha=0.0, hidden=Hidden(weight=2.0, layers=layers))
    objective = Objective.make(d, student, teacher, None, batch)
    s, t = (model(**batch, output_hidden_states=True).hidden_states for model in (student, teacher))
    pairs = [(2, 4)] if layers == "last" else [(0, 0), (1, 2), (2, 4)]
    expected = torch.stack([mean_square(s[a], t[b], batch["attention_mask"]) for a, b in pairs]).mean()
    loss, terms = value(objective, batch)
    assert terms == {"hidden": pytest.approx(expected.item(), rel=1e-5)}
    assert loss == pytest.approx(2 * expected.item(), rel=1e-5)


def test_hidden_states_are_asked_for_only_where_needed() -> None:
    student, batch = Encoder(), token_batch(3, 5)
    Objective.make(Distillation(), student, Encoder(seed=1), None, batch)(batch)
    assert not student.asked
    d = Distillation(hidden=Hidden())
    Objective.make(d, student, Encoder(seed=1), None, batch)(batch)
    assert student.asked == {"output_hidden_states"}


def test_named_modules_and_learned_projections() -> None:
    student, teacher = net(0, width=16), net(1, width=24)
    d = Distillation(loss="none", alpha=0.0, hidden=Hidden(layers={"0": "0", "2": "2"}))
    objective = Objective.make(d, student, teacher, None, X, seed=3)
    again = Objective.make(d, student, teacher, None, X, seed=3)
    projections = dict(objective.named_parameters())
    assert [tuple(p.shape) for p in projections.values()] == [(24, 16)]
    assert all(torch.equal(p, q) for p, q in zip(objective.parameters(), again.parameters(), strict=True))
    (projection,) = projections.values()
    first = (student[0](X) @ projection.T - teacher[0](X)).square().mean()
    second = (student(X) - teacher(X)).square().mean()
    loss, _ = objective(X)
    assert loss.item() == pytest.approx(((first + second) / 2).item(), rel=1e-5)
    loss.backward()
    assert projection.grad is not None
    assert projection.grad.any()
    assert not student[0]._forward_hooks
    assert not teacher[0]._forward_hooks


def test_modules_that_were_exchanged_are_listened_to() -> None:
    student, teacher = net(0), net(1)
    d = Distillation(loss="none", alpha=0.0, hidden=Hidden(layers={"0": "0"}))
    objective = Objective.make(d, student, teacher, None, X)
    before = objective(X)[0].item()
    student[0] = nn.Linear(12, 16)
    assert objective(X)[0].item() != before


def test_hooks_inside_torchs_encoder_layers_are_reached() -> None:
    def encoder(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    d = Distillation(loss="none", alpha=0.0, hidden=Hidden(layers={"0.layers.0.linear1": "0.layers.1.linear1"}))
    objective = Objective.make(d, encoder(0), encoder(1), None, torch.randn(2, 3, 16))
    assert torch.backends.mha.get_fastpath_enabled()
    assert value(objective, torch.randn(2, 3, 16))[0] > 0
    assert torch.backends.mha.get_fastpath_enabled()


# ---- attention maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_maps(kind: Any, heads: int) -> None:
    student, teacher, batch = Encoder(), Encoder(seed=1, heads=heads), token_batch(3, 5, labels=False)
    d = Distillation(loss="none", alpha=0.0, attention=Attention(kind=kind, layers="all"))
    objective = Objective.make(d, student, teacher, None, batch)
    s, t = (model(**batch, output_attentions=True).attentions for model in (student, teacher))
    loss_fn = AttentionLoss(kind, heads="match" if heads == 2 else "mean")
    expected = torch.stack([loss_fn(a, b, batch["attention_mask"]) for a, b in zip(s, t, strict=True)]).mean()
    assert value(objective, batch)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_maps_after_dropout_are_refused() -> None:
    student, batch = Encoder(dropout=0.5), token_batch(3, 5, labels=False)
    d = Distillation(loss="none", alpha=0.0, attention=Attention())
    objective = Objective.make(d, student, Encoder(seed=1), None, batch)
    student.train()
    with pytest.raises(ValueError, match="attention_probs_dropout_prob=0"):
        objective(batch)


# ---- making leaves nothing behind -----------------------------------------------------------------------------


def test_making_changes_nothing() -> None:
    student, teacher = nn.Sequential(net(0), nn.BatchNorm1d(5), nn.Dropout(0.5)), net(1)
    student[0].eval()
    before, state = copy.deepcopy(student.state_dict()), rng_state()[0]["torch"]
    Objective.make(Distillation(hidden=Hidden(layers={"0.0": "0"})), student, teacher, None, (X, LABELS))
    assert [m.training for m in student] == [False, True, True]
    assert teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), student.state_dict().values(), strict=True))
    assert torch.equal(state, rng_state()[0]["torch"])
    assert all(p.grad is None for p in student.parameters())


def test_the_models_are_no_part_of_it() -> None:
    objective = Objective.make(Distillation(), net(0), net(1), None, (X, LABELS))
    assert list(objective.state_dict()) == []
    assert "task=cross-entropy" in repr(objective)


# ---- Hugging Face ---------------------------------------------------------------------------------------------


def test_hugging_face_models() -> None:
    transformers = pytest.importorskip("transformers")

    def bert(seed: int, layers: int, width: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, attn_implementation="eager", num_labels=3, attention_probs_dropout_prob=0.0,
            **options,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)

    batch = {**token_batch(4, 6, labels=False, vocabulary=50), "labels": torch.tensor([0, 1, 2, 1])}
    student, teacher = bert(0, 2, 16), bert(1, 4, 24)
    d = Distillation(alpha=0.4, tau=2.0, hidden=Hidden(layers="all"), attention=Attention(layers="all"))
    objective = Objective.make(d, student, teacher, None, batch)
    assert "cross-entropy" in repr(objective)
    assert len(list(objective.parameters())) == 3
    student.eval(), teacher.eval()
    loss, terms = value(objective, batch)
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    logits = [model(**inputs).logits for model in (student, teacher)]
    assert terms["task"] == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    assert terms["soft"] == pytest.approx(soft(*logits, 2.0).item(), abs=1e-6)
    assert loss == pytest.approx(
        0.4 * terms["task"] + 0.6 * terms["soft"] + terms["hidden"] + terms["attention"], rel=1e-5
    )

    sdpa = bert(0, 2, 16)
    sdpa.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        Objective.make(Distillation(attention=Attention()), sdpa, teacher, None, batch)


def test_causal_language_model_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")

    def gpt(seed: int) -> Any:
        torch.manual_seed(seed)
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()

    batch = token_batch(4, 6, vocabulary=50)
    student = gpt(0)
    objective = Objective.make(Distillation(tau=1.0), student, gpt(1), None, batch)
    assert "shifted" in repr(objective)
    assert value(objective, batch)[1]["task"] == pytest.approx(student(**batch).loss.item(), rel=1e-5)
