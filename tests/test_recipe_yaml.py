"""Recipes from YAML: lines in errors, anchors and merge keys, numbers, and files that mean harm."""


import pytest

from pycompress.recipe import Recipe, RecipeError
from pycompress.recipe.reading import read_config
from pycompress.recipe.yaml_file import MAX_BYTES, read_yaml


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def refused(written):
    """The problems of a file, each without the folder."""

    def read(text):
        path = written(text)
        with pytest.raises(RecipeError) as caught:
            Recipe.of(path)
        return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]

    return read


def test_a_file_is_the_same_as_python(written):
    path = written(
        """
        seed: 3
        measure: {batch_sizes: [1, 512], layers: false}
        stages:
          - prune:
              sparsity: 0.9
              pattern: 4x4
              skip: [embed, head]
              train: {steps: 100, lr: 1e-3, warmup: 0.1}
          - sparsify:
              dtype: int8
          - quantize
        """
    )
    prune = {"sparsity": 0.9, "pattern": "4x4", "skip": ["embed", "head"]}
    recipe = Recipe.of(
        {
            "stages": [
                {"prune": prune | {"train": {"steps": 100, "lr": 1e-3, "warmup": 0.1}}},
                {"sparsify": {"dtype": "int8"}},
                "quantize",
            ],
            "seed": 3,
            "measure": {"batch_sizes": [1, 512], "layers": False},
        }
    )
    assert Recipe.of(path) == recipe
    assert Recipe.of(str(path)) == recipe


def test_every_problem_has_its_line(refused):
    problems = refused(
        """stages:
  - prune:
      sparcity: 0.9
      train:
        steps: 10
        lr: fast
  - quantise
  - sparsify
  - finetune:
      steps: 5
seed: -1
"""
    )
    assert [problem[:48] for problem in problems] == [
        "recipe.yaml:3: unknown key 'sparcity' in prune; ",
        "recipe.yaml:6: prune.train.lr is 'fast'; expecte",
        "recipe.yaml:7: unknown stage 'quantise'; did you",
        "recipe.yaml:9: finetune (stage 4) cannot come af",
        "recipe.yaml:11: seed is -1; expected a whole num",
    ]


def test_anchors_and_merge_keys(written):
    recipe = Recipe.of(
        written(
            """
            stages:
              - finetune: &train {steps: 5, lr: 1e-4, warmup: 2}
              - distill: {train: {<<: *train, lr: 1e-2}}
              - distill: {train: *train, alpha: 0.25}
              - finetune: {<<: [{steps: 7}, *train]}
            """
        )
    )
    one, two, three, four = recipe.stages
    assert (two.train.steps, two.train.lr, two.train.warmup) == (5, 1e-2, 2)
    assert three.train.lr == one.lr == 1e-4
    assert (four.steps, four.lr) == (7, 1e-4)


def test_a_mistake_in_an_anchor_has_the_line_where_it_stands(refused):
    (problem,) = refused(
        """stages:
  - finetune: &train
      steps: 5
      lrr: 1e-4
  - finetune:
      <<: *train
"""
    )
    assert problem.startswith("recipe.yaml:4: unknown key 'lrr' in finetune; did you mean 'lr'?")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+2", -250.0), (".5", 0.5), ("5.", 5.0), ("12", 12), ("-3", -3),
        ("1_000", 1000), ("010", 10), ("2:4", "2:4"), ("1:30:00", "1:30:00"), ("4x4", "4x4"), ("0x10", "0x10"),
        ("2026-11-22", "2026-11-22"),
        ("true", True), ("No", False), ("~", None), ("null", None), ("", None), (".inf", float("inf")),
        ("'1e-3'", "1e-3"), ('"5"', "5"), ("'yes'", "yes"), ("=", "="), ("9" * 99, int("9" * 99)),
    ],
)  # fmt: skip
def test_scalars(written, text, value):
    found = read_yaml(written(f"key: {text}\n")).values["key"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_text(written):
    assert read_yaml(written("{1: a, on: b, 2.5: c}")).values == {"1": "a", "on": "b", "2.5": "c"}


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: the file is empty"),
        ("# nothing\n", "recipe.yaml: the file is empty"),
        ("[" * 1000, "nested more than 24 deep"),
        ("[" * 100 + "]" * 100, "nested more than 24 deep"),
        ("- " * 500 + "x", "nested more than 24 deep"),
        ("a: &a [*a]", "recipe.yaml:1: nested more than 24 deep"),
        ("&a {<<: *a}", "recipe.yaml: nested more than 24 deep"),
        (ALIASES, "more than 20000 values, aliases written out"),
        ("stages: [!!python/object/apply:os.system [ls]]", "recipe.yaml:1: stages[0] has the tag !!python/object/app"),
        ("stages:\n- !!binary aGk=", "recipe.yaml:2: stages[0] has the tag !!binary"),
        ("stages:\n- !mine {a: 1}", "recipe.yaml:2: stages[0] has the tag !mine"),
        ("!!set {a}", "recipe.yaml:1: the file has the tag !!set"),
        (b"stages:\n- caf\xe9\n", "recipe.yaml:2: no UTF-8 text (byte 0xe9); save it as UTF-8"),
        (b"\xff\xfes\x00", "recipe.yaml:1: no UTF-8 text (byte 0xff)"),
        ("stages:\n- \x01", "recipe.yaml:2: no valid YAML: character 0x1 is not allowed"),
        ("stages:\n\t- quantize", "recipe.yaml:2: no valid YAML: while scanning"),
        ("stages: [quantize\nseed: 1", "recipe.yaml:2: no valid YAML: while parsing a flow"),
        ("stages: [*nothing]", "recipe.yaml:1: no valid YAML: found undefined alias 'nothing'"),
        ("stages: [quantize]\n---\nseed: 1", "recipe.yaml:2: no valid YAML: expected a single document"),
        ("seed: 1\nstages: [quantize]\nseed: 2", "recipe.yaml:3: key 'seed' is given twice, first in line 1; leave"),
        ("stages:\n- prune: {skip: [a],\n   skip: [b]}", "recipe.yaml:3: key 'prune.skip' is given twice, first in"),
        ("? [a]\n: b", "recipe.yaml:1: a key is a name, not a list or a mapping"),
        ("<<: 5\nstages: [quantize]", "recipe.yaml:1: <<: takes a mapping"),
        ("seed: " + "9" * 5000 + "\nstages: [quantize]", "recipe.yaml:1: seed is "),
        ("just text", "recipe.yaml:1: a recipe is a list of stages or a mapping with stages:, not 'just text'"),
    ],
)  # fmt: skip
def test_what_is_no_recipe(refused, text, expected):
    problems = refused(text)
    assert expected in problems[0]
    assert len(problems[0]) < 400


def test_large_files_are_not_read(refused):
    assert refused(b"x" * (10 << 20)) == [f"recipe.yaml: more than {MAX_BYTES} bytes, which is no recipe"]


def test_files_that_cannot_be_read(tmp_path):
    for path, why in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(RecipeError, match=f"{path}: cannot be read: {why}"):
            Recipe.of(path)


def test_utf8_with_a_byte_order_mark(written):
    assert Recipe.of(written("\N{ZERO WIDTH NO-BREAK SPACE}stages: [quantize]")).stages[0].name == "quantize"


# ---- the keys of the command line --------------------------------------------------------------------------------


def test_config_keys(written):
    path = written(
        "model: task.py:make\neval_fn: {call: 'a.b:c.d', k: 1e-3}\nout: runs/x\nstages: [quantize]\nseed: 4\n"
    )
    config, document = read_config(path)
    assert (config.model.source, config.model.name, config.model.arguments) == ("task.py", "make", None)
    assert (str(config.eval_fn), config.eval_fn.arguments) == ("a.b:c.d", {"k": 1e-3})
    assert config.out == "runs/x"
    assert document.line(("eval_fn",)) == 2
    assert config.recipe() == Recipe.of({"stages": ["quantize"], "seed": 4})
    assert Recipe.of(path) == config.recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages: [quantize]", ":1: the recipe lacks 'model': text as file.py:name"),
        (
            "model: task.py\nstages: [quantize]",
            ":1: model: 'task.py' names no function; expected file.py:name or package",
        ),
        ("model: 5\nstages: [quantize]", ":1: model: expected text as file.py:name, not 5"),
        (
            "model: {cal: x}\nstages: [quantize]",
            ':1: model: expected {call: "file.py:name", key: value}, but there is no',
        ),
        ("modell: a:b\nmodel: a:b\nstages: [quantize]", ":1: unknown key 'modell'; did you mean 'model'? valid keys: "),
    ],
)
def test_config_problems(written, text, expected):
    with pytest.raises(RecipeError) as caught:
        read_config(written(text))
    assert expected in str(caught.value)
