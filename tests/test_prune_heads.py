"""prune_ by attention head."""

import copy

import pytest
import torch

from pycompress import prune_
from tests.prune_helpers import masks, mlp, reason

# --- heads ---


def bert(heads=4):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=heads, num_hidden_layers=2, intermediate_size=48, vocab_size=50
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_heads(scope):
    model = bert()
    with torch.no_grad():
        for name in ("query", "key", "value"):
            model.encoder.layer[0].attention.self.get_submodule(name).weight[8:16] *= 1e-3
        model.encoder.layer[0].attention.output.dense.weight[:, 8:16] *= 1e-3
    report = prune_(model, 0.25, pattern="head", scope=scope)
    assert len(report.pruned) == 8
    found = masks(model)
    total = 0
    for index in (0, 1):
        at = f"encoder.layer.{index}.attention"
        kept = found[f"{at}.self.query"].any(1).view(4, 8)
        assert (kept.all(1) == kept.any(1)).all()  # whole heads
        total += int((~kept.any(1)).sum())
        for name in ("query", "key", "value"):
            assert torch.equal(found[f"{at}.self.{name}"], kept.flatten()[:, None].expand(32, 32))
        assert torch.equal(found[f"{at}.output.dense"], kept.flatten()[None].expand(32, 32))
    assert total == 2
    assert not found["encoder.layer.0.attention.self.query"][8:16].any()
    assert "no projection of an attention" in reason(report, "encoder.layer.0.output.dense")
    assert sum(layer.pruned_units for layer in report.pruned) == 8
    assert all(layer.units == 4 for layer in report.pruned)


def test_pruned_heads_say_nothing():
    model = bert()
    ids = torch.randint(0, 50, (2, 7))
    prune_(model, 1.0, pattern="head")
    attention = model.encoder.layer[0].attention
    hidden = model.embeddings(ids)
    out = attention.output.dense(attention.self(hidden)[0])
    assert torch.equal(out, attention.output.dense.bias.expand_as(out))


def test_heads_of_a_partly_skipped_attention_stay_whole():
    model = bert()
    report = prune_(model, 0.5, pattern="head", skip="encoder.layer.0.attention.self.key")
    assert len(report.pruned) == 4
    for name in ("self.query", "self.value", "output.dense"):
        left = reason(report, f"encoder.layer.0.attention.{name}")
        assert left == (
            "its heads go through encoder.layer.0.attention.self.key too, "
            "which is left: skip='encoder.layer.0.attention.self.key'"
        )
    with pytest.raises(ValueError, match="pattern 'head' found no attention"):
        prune_(mlp(), 0.5, pattern="head")


def test_heads_of_an_attention_that_no_batch_reaches_stay():
    model = bert()

    def first_layer_only(output, batch):
        return output.hidden_states[1].square().mean()

    batches = [{"input_ids": torch.randint(0, 50, (2, 7)), "output_hidden_states": True}]
    report = prune_(model, 0.5, pattern="head", method="taylor", batches=batches, loss_fn=first_layer_only)
    assert [layer.name.split(".")[2] for layer in report.pruned] == ["0"] * 4
    assert reason(report, "encoder.layer.1.attention.self.value") == "the loss does not depend on it"
    with pytest.raises(ValueError, match="nothing to prune"):
        prune_(
            bert(), 0.5, pattern="head", method="taylor", batches=batches,
            loss_fn=lambda output, batch: output.hidden_states[0].square().mean(),
        )  # fmt: skip


def test_heads_with_calibration():
    model = bert()
    batches = [{"input_ids": torch.randint(0, 50, (2, 7))}]
    for method, kwargs in (("wanda", {}), ("taylor", {"loss_fn": lambda output, batch: output[0].square().mean()})):
        report = prune_(copy.deepcopy(model), 0.5, pattern="head", method=method, batches=batches, **kwargs)
        assert report.sparsity == 0.5
