"""DistillationTrainer: its loss and gradients against a loop written by hand, whatever the steps are cut into."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

import pycompress
from pycompress.hf.distillation_trainer import DistillationTrainer
from pycompress.recipe import Distillation
from pycompress.tensor_file import TensorFileError

CLASSES, WORDS = 3, 29


class Sentences(Dataset):
    """Padded sentences of 3 to 9 words, with labels for a share of them."""

    def __init__(self, count: int, *, per_word: bool, labelled: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(7)
        self.items = []
        for at in range(count):
            length = 3 + at * 5 % 7
            ids = torch.randint(1, WORDS, (9,), generator=generator)
            mask = (torch.arange(9) < length).long()
            labels = torch.tensor(at % CLASSES)
            if per_word:
                kept = (torch.rand(9, generator=generator) < labelled) & (mask == 1)
                labels = torch.where(kept, ids, -100)
            self.items.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return dict(self.items[at])


def bert(cls=BertForMaskedLM, seed=0, width=16, layers=2, **options):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES, attn_implementation="eager",
        initializer_range=0.3, **options,
    )  # fmt: skip
    return cls(config)


def arguments(folder: Path, batch=8, accumulate=1, **options) -> TrainingArguments:
    chosen = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": 2,
        "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3,
    } | options  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **chosen)


def trained(folder, model, teacher, data, distillation, **options):
    trainer = DistillationTrainer(
        model, arguments(folder, **options), teacher_model=teacher, distillation=distillation, train_dataset=data
    )
    trainer.train()
    return trainer


def assert_same_weights(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        error = (a - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), (name, error)


TERMS = {
    "logits": {"alpha": 0.3, "tau": 2.0},
    "reverse": {"alpha": 0.0, "loss": "reverse_kl"},
    "hidden": {"alpha": 0.5, "hidden": {"weight": 2.0, "kind": "mse", "layers": "all"}},
    "cosine": {"alpha": 0.5, "loss": "none", "hidden": {"kind": "cosine"}},
    "modules": {"alpha": 0.5, "hidden": {"layers": {"bert.encoder.layer.0": "bert.encoder.layer.3"}}},
    "attention": {"alpha": 0.5, "attention": {"kind": "mse"}},
    "attention kl": {"alpha": 0.5, "attention": {"kind": "kl", "layers": "all"}},
}


@pytest.mark.parametrize("terms", TERMS)
def test_a_step_in_parts_is_the_step_at_once(tmp_path, terms):
    """Micro-batches differ in padding and in their number of labels: means of means would not do."""
    data, teacher = Sentences(16, per_word=True), bert(seed=1, width=20, layers=4)
    whole, parts = bert(), bert()
    for model, batch, accumulate in ((whole, 8, 1), (parts, 2, 4)):
        trained(tmp_path, model, teacher, data, TERMS[terms], batch=batch, accumulate=accumulate)
    assert_same_weights(parts, whole, 2e-6)
    with pytest.raises(AssertionError):
        assert_same_weights(parts, bert(), 1e-4)  # it did learn


def test_is_the_loop_written_by_hand(tmp_path):
    data, teacher, model = Sentences(16, per_word=True), bert(seed=1), bert()
    by_hand = copy.deepcopy(model)
    seen = []

    def collate(items):
        seen.append(_collate(items))
        return dict(seen[-1])

    trainer = DistillationTrainer(
        model, arguments(tmp_path, batch=4, accumulate=2), teacher_model=teacher, train_dataset=data,
        distillation={"alpha": 0.25, "tau": 2.0}, data_collator=collate,
    )  # fmt: skip
    trainer.train()

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    losses = []
    for batches in (seen[-4:-2], seen[-2:]):
        whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        labels = whole.pop("labels")
        valid = labels != -100
        logits = by_hand(**whole).logits[valid]
        with torch.no_grad():
            told = teacher(**whole).logits[valid]
        hard = functional.cross_entropy(logits, labels[valid])
        soft = functional.kl_div(
            (logits / 2).log_softmax(-1), (told / 2).log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1).mean()
        loss = 0.25 * hard + 0.75 * 4 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), hard.item(), 4 * soft.item()))
    assert_same_weights(model, by_hand, 2e-6)
    logged = [(e["loss"], e["task"], e["soft"]) for e in trainer.state.log_history if "loss" in e]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), rtol=1e-4, atol=1e-4)


def _collate(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def test_causal_labels_belong_to_the_token_before(tmp_path):
    def gpt2(seed):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            initializer_range=0.3, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    data, teacher = Sentences(16, per_word=True, labelled=0.7), gpt2(1)
    whole, parts = gpt2(0), gpt2(0)
    trained(tmp_path, whole, teacher, data, {"alpha": 0.5}, batch=8)
    trained(tmp_path, parts, teacher, data, {"alpha": 0.5}, batch=2, accumulate=4)
    assert_same_weights(parts, whole, 2e-6)

    trainer = DistillationTrainer(
        whole, arguments(tmp_path, per_device_eval_batch_size=16), teacher_model=teacher, distillation={"alpha": 0.5},
        eval_dataset=data,
    )  # fmt: skip
    batch = _collate([data[i] for i in range(16)])
    labels = functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        logits, told = whole(**batch).logits, teacher(**batch).logits
    expected = pycompress.ops.distill_loss(logits, told, labels, temperature=2.0, alpha=0.5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_predictions_hold_what_the_model_answers_and_no_hidden_states(tmp_path):
    data, teacher, model = Sentences(10, per_word=False), bert(BertForSequenceClassification, 1), None
    model = bert(BertForSequenceClassification)
    trainer = DistillationTrainer(
        model, arguments(tmp_path, per_device_eval_batch_size=4), teacher_model=teacher,
        distillation={"hidden": {"kind": "mse"}, "attention": {"kind": "mse"}}, eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    found = trainer.predict(data)
    assert found.predictions.shape == (10, CLASSES)
    with torch.no_grad():
        batch = _collate([data[i] for i in range(10)])
        logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), logits, rtol=1e-4, atol=1e-5)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx((logits.argmax(-1) == batch["labels"]).float().mean())


def test_goes_on_from_a_checkpoint_with_its_projections(tmp_path):
    data, teacher = Sentences(16, per_word=True), bert(seed=1, width=20)
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "batch": 4, "max_steps": 4}
    hidden = {"alpha": 0.5, "hidden": {"weight": 3.0}}
    through, parts = bert(), bert()
    straight = trained(tmp_path / "a", through, teacher, data, hidden, **options)
    saving = {**options, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "b", parts, teacher, data, hidden, **saving)
    checkpoint = tmp_path / "b" / "checkpoint-2"
    assert (checkpoint / "distillation.safetensors").exists()

    model = bert(seed=9)
    trainer = DistillationTrainer(
        model, arguments(tmp_path / "c", **options), teacher_model=teacher, distillation=hidden, train_dataset=data
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(model, through, 0.0)
    assert trainer.state.log_history[-2] == straight.state.log_history[-2]  # the last step: loss and terms
    for own, other in zip(trainer._objective.parameters(), straight._objective.parameters(), strict=True):
        assert torch.equal(own, other)

    other = bert(seed=1, width=24)
    trainer = DistillationTrainer(
        bert(), arguments(tmp_path / "d", **options), teacher_model=other, distillation=hidden, train_dataset=data
    )
    with pytest.raises(TensorFileError, match=r"distillation\.safetensors holds .* and this distillation has"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_pruned_student_keeps_its_zeros(tmp_path):
    model = bert()
    pycompress.prune_(model, 0.5)
    before = {name: m.mask.clone() for name, m in model.named_modules() if isinstance(m, pycompress.nn.MaskedLinear)}
    start = copy.deepcopy(model)
    options = {"optim": "adamw_torch", "weight_decay": 0.1}
    trained(tmp_path, model, bert(seed=1), Sentences(16, per_word=True), {"alpha": 0.5}, **options)
    assert before
    for name, mask in before.items():
        weight = model.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight, start.get_submodule(name).weight)


def test_takes_a_task_loss_and_bfloat16(tmp_path):
    data, teacher = Sentences(16, per_word=False), bert(BertForSequenceClassification, 1)

    def smoothed(outputs, labels, num_items_in_batch=None):
        return functional.cross_entropy(outputs.logits.float(), labels, label_smoothing=0.2)

    models = [bert(BertForSequenceClassification) for _ in range(2)]
    for model, (batch, accumulate) in zip(models, ((8, 1), (2, 4)), strict=True):
        trainer = DistillationTrainer(
            model, arguments(tmp_path, batch, accumulate, bf16=True), teacher_model=teacher, train_dataset=data,
            distillation=Distillation(alpha=0.5), compute_loss_func=smoothed,
        )  # fmt: skip
        trainer.train()
        assert trainer.evaluate(data)["eval_loss"] > 0
    assert_same_weights(models[1], models[0], 5e-3)  # bfloat16 products


def test_the_teacher_stays_as_it_is(tmp_path):
    teacher = bert(seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    trained(tmp_path, bert(), teacher, Sentences(16, per_word=True), {"alpha": 0.5, "hidden": {}})
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher_model": None}, TypeError, "teacher_model is a NoneType"),
        ({"distillation": 0.5}, TypeError, "distillation is a float; expected"),
        ({"distillation": {"alpha": 7}}, ValueError, "alpha"),
        ({"distillation": {"temperature": 2.0}}, ValueError, "temperature"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, error, message):
    chosen = {"teacher_model": bert(seed=1), "distillation": {"alpha": 0.5}} | options
    with pytest.raises(error, match=message):
        DistillationTrainer(bert(), arguments(tmp_path), **chosen)


def test_label_smoothing_and_other_vocabularies_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 would not be used"):
        DistillationTrainer(bert(), arguments(tmp_path, label_smoothing_factor=0.1), teacher_model=bert(seed=1))
    model, teacher = bert(), BertForMaskedLM(BertConfig(**{**bert().config.to_diff_dict(), "vocab_size": WORDS + 1}))
    before = copy.deepcopy(model)
    trainer = DistillationTrainer(
        model, arguments(tmp_path), teacher_model=teacher, train_dataset=Sentences(8, per_word=True)
    )
    with pytest.raises(ValueError, match=f"student has {WORDS} classes .* teacher {WORDS + 1}"):
        trainer.train()
    assert_same_weights(model, before, 0.0)


_TWO = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import torch
torch.set_num_threads(1)
from tests.test_distillation_trainer import Sentences, TERMS, bert, trained
model = bert()
trainer = trained(
    os.environ["OUT"], model, bert(seed=1, width=20, layers=4), Sentences(16, per_word=True), TERMS["hidden"],
    batch=int(sys.argv[1]), accumulate=2, **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
)
if trainer.args.process_index == 0:
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", 1)), trainer.args.world_size
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    kept = {"model": model.state_dict(), "projections": trainer._objective.state_dict(), "losses": losses}
    torch.save(kept, sys.argv[2])
"""


def test_two_processes_train_as_one(tmp_path):
    """8 examples a step: 2 x 4 in one process, 2 x 2 in each of two; the hidden term's projections are not DDP's."""
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    root = Path(__file__).parent.parent
    environment = {**os.environ, "ROOT": str(root), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    for command, batch, name in (([sys.executable], 4, "one"), (launch, 2, "two")):
        done = subprocess.run(
            [*command, str(script), str(batch), str(tmp_path / name)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-5, atol=2e-6, msg=key)
    for key, value in one["projections"].items():
        torch.testing.assert_close(two["projections"][key], value, rtol=1e-5, atol=2e-6, msg=key)
    assert one["projections"]
    assert one["losses"][0] != one["losses"][1]
