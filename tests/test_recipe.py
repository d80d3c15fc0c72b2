"""Recipes in Python: sections, order, what is refused and in which words, and the way to plain values and back."""

import copy
import json
import math
import pickle

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pycompress.recipe import (
    STAGES,
    Distill,
    Distillation,
    Finetune,
    Hidden,
    LowRank,
    Measure,
    Prune,
    Qat,
    Quantize,
    Recipe,
    RecipeError,
    Schedule,
    Sensitivity,
    Sparsify,
    Stage,
    Train,
)
from pycompress.recipe.order import order_problems, working

TRAIN = Train(steps=10)


def refused(make):
    with pytest.raises(RecipeError) as caught:
        make()
    return str(caught.value)


def test_of_takes_every_form():
    recipe = Recipe.of([Prune(sparsity=0.9, train=TRAIN), Sparsify(dtype="int8"), "quantize"])
    plain = [{"prune": {"sparsity": 0.9, "train": {"steps": 10}}}, {"sparsify": {"dtype": "int8"}}, {"quantize": None}]
    assert Recipe.of(plain) == recipe
    assert Recipe.of({"stages": plain}) == recipe
    assert Recipe(stages=plain) == recipe
    assert Recipe.of(recipe) is recipe
    assert Recipe.of({"stages": plain, "seed": 3}).seed == 3
    assert [stage.name for stage in recipe.stages] == ["prune", "sparsify", "quantize"]


def test_round_trip_leaves_defaults_out():
    recipe = Recipe.of([Finetune(steps=5, lr=1e-4), Quantize()])
    assert recipe.to_dict() == {"stages": [{"finetune": {"steps": 5, "lr": 1e-4}}, {"quantize": {}}]}


share = st.floats(0, 1)
decay = st.floats(0, 1, exclude_max=True)
trains = st.builds(
    Train,
    steps=st.integers(50, 10**6),
    lr=st.floats(1e-8, 10),
    warmup=st.one_of(st.integers(0, 40), share),
    optimizer=st.sampled_from(["adamw", "adam"]),
    betas=st.tuples(decay, decay),
    clip_norm=st.none() | st.floats(0.1, 5),
    freeze=st.lists(st.text("abc.*0", min_size=1, max_size=4), max_size=2),
)
distillations = st.builds(
    Distillation, alpha=st.floats(0, 0.99), hidden=st.none() | st.builds(Hidden, layers=st.just({"a.0": "b.1"}))
)
stages = st.one_of(
    st.builds(
        LowRank, rank=st.one_of(st.integers(1, 9), st.dictionaries(st.text("ab.0", min_size=1), st.integers(1, 9)))
    ),
    st.builds(Prune, sparsity=share, pattern=st.sampled_from(["unstructured", "4x4", "row"])),
    st.builds(
        Prune,
        sparsity=share,
        train=trains,
        distill=st.none() | distillations,
        schedule=st.none()
        | st.builds(Schedule, begin=st.integers(0, 9), end=st.floats(0.1, 1), every=st.integers(1, 9)),
    ),
    st.builds(Distill, alpha=st.floats(0, 0.99), train=trains),
    st.builds(Finetune, epochs=st.floats(0.1, 9)),
    st.builds(Qat, mode=st.sampled_from(["dynamic", "static"]), train=trains),
    st.builds(
        Quantize, smooth=st.none() | share, sensitivity=st.none() | st.builds(Sensitivity), skip=st.just(["head"])
    ),
    st.builds(Sparsify, tokens=st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=3)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(stages, min_size=1, max_size=5), st.integers(0, 2**63 - 1), st.lists(st.integers(1, 512), max_size=3))
def test_to_dict_and_back(drawn, seed, sizes):
    values = {"stages": drawn, "seed": seed, "measure": {"batch_sizes": sizes}}
    assume(not order_problems([stage.name for stage in drawn]))
    try:
        recipe = Recipe.of(values)
    except RecipeError as error:
        if "qat" in str(error):  # sparsify would not keep what it trained for
            return
        raise
    plain = recipe.to_dict()
    assert Recipe.of(plain) == recipe
    assert Recipe.of(json.loads(json.dumps(plain))) == recipe
    assert Recipe.of(yaml.safe_load(yaml.safe_dump(plain))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert copy.deepcopy(recipe) == recipe


def test_sections_do_not_change():
    stage = Prune(sparsity=0.5, skip=["head", 0])
    assert stage.skip == ("head", "0")
    with pytest.raises(ValueError, match="frozen"):
        stage.sparsity = 0.9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: Prune(sparcity=0.9),
            "unknown key 'sparcity' in prune; did you mean 'sparsity'? valid keys: sparsity, ",
        ),
        (lambda: Prune(lr=1e-3), "unknown key 'lr' in prune; it belongs under train; valid keys: "),
        (lambda: Prune(sparsity=1.5), "prune.sparsity is 1.5; expected a number from 0 to 1"),
        (lambda: Prune(sparsity=math.nan), "prune.sparsity is nan; expected a number from 0 to 1"),
        (lambda: Prune(sparsity=True), "prune.sparsity is true; expected a number from 0 to 1"),
        (lambda: Prune(pattern="4 x 4"), "prune.pattern: unknown pattern '4 x 4'; expected one of "),
        (
            lambda: Prune(pattern="2:4", sparsity=0.9),
            "prune: sparsity=0.9 with pattern '2:4', which prunes 0.5; leave it",
        ),
        (lambda: Prune(schedule={}), "prune: schedule needs train: steps to spread over"),
        (lambda: Prune(method="wanda", train=TRAIN), "prune: method 'wanda' prunes at once; leave train out"),
        (lambda: Prune(method="taylor", train=TRAIN, schedule={"kind": "constant"}), "begin at 1 or later"),
        (lambda: Prune(train=TRAIN, sparsity=0.2, schedule={"initial_sparsity": 0.5}), "is above sparsity=0.2"),
        (lambda: Train(steps=True), "train.steps is true; expected a whole number of at least 1"),
        (lambda: Train(steps=3.0), "train.steps is 3.0; expected a whole number of at least 1"),
        (lambda: Train(steps="3"), "train.steps is '3'; expected a whole number of at least 1"),
        (lambda: Train(), "train: give either steps or epochs"),
        (lambda: Train(steps=5, epochs=1), "train: give either steps or epochs"),
        (lambda: Train(steps=5, lr=0), "train.lr is 0; expected a number above 0"),
        (lambda: Train(steps=5, lr=math.inf), "train.lr is inf; expected a number above 0"),
        (
            lambda: Train(steps=5, warmup=-1),
            "train.warmup is -1; expected steps, a whole number of at least 0, or a share",
        ),
        (lambda: Train(steps=5, warmup=5), "train: warmup=5 leaves none of 5 steps"),
        (
            lambda: Train(steps=5, betas=[0.9]),
            "train.betas is [0.9]; expected a list of 2, each a number of at least 0",
        ),
        (
            lambda: Train(steps=5, optimizer="sgd", momentum=1),
            "train.momentum is 1; expected a number of at least 0 and below 1",
        ),
        (lambda: Train(steps=5, momentum=0.5), "train: momentum is not used by optimizer 'adamw'; leave it out"),
        (lambda: Train(steps=5, schedule="constant", final_lr=0.1), "final_lr=0.1 is not used by schedule 'constant'"),
        (lambda: Train(steps=5, optimizer="adamW"), "train.optimizer is 'adamW'; expected adamw, adam or sgd"),
        (lambda: Train(steps=5, freeze=3.5), "train.freeze is 3.5; expected a list of module names or patterns"),
        (lambda: Schedule(begin=0.9), "schedule: end=0.7 is before begin=0.9"),
        (lambda: Distillation(loss="jsd", beta=0), "distillation: loss 'jsd' with beta=0 is 0 for all logits"),
        (lambda: Distillation(beta=0.1), "distillation: beta is not used by loss 'forward_kl'"),
        (lambda: Distillation(loss="none"), "distillation: loss 'none' without hidden and attention takes nothing"),
        (lambda: Distillation(alpha=1), "distillation: alpha=1 gives the teacher no weight"),
        (lambda: Distill(alpha=0.5), "distill lacks 'train': a mapping with keys of steps, epochs, "),
        (
            lambda: Hidden(layers={"a": 5}),
            "hidden.layers is a mapping; expected last or all or a mapping of names to text",
        ),
        (lambda: LowRank(), "low_rank: give exactly one of rank, energy and ratio"),
        (
            lambda: LowRank(rank={"a": 0}),
            "low_rank.rank is a mapping; expected a whole number of at least 1 or a mapping",
        ),
        (lambda: Quantize(method="mse"), "quantize: method is of mode 'static', but mode is 'dynamic'"),
        (lambda: Quantize(layers=["conv"]), "quantize.layers[0] is 'conv'; expected a list, each item linear, conv2d"),
        (lambda: Quantize(layers=()), "quantize: layers is empty; leave it out for linear layers"),
        (lambda: Quantize(group_size=32), "quantize: group_size is of modes 'int4' and 'nf4', but mode is 'dynamic'"),
        (lambda: Quantize(mode="int4", group_size=0), "quantize.group_size is 0; expected "),
        (lambda: Quantize(mode="nf4", symmetric=False), "quantize: symmetric is of mode 'int4', but mode is 'nf4'"),
        (
            lambda: Quantize(layers="all", sensitivity=Sensitivity()),
            "quantize: sensitivity measures linear layers; leave layers out, or sensitivity",
        ),
        (
            lambda: Quantize(mode="int4", group_size=32, sensitivity=Sensitivity()),
            "quantize: sensitivity measures symmetric groups of 128; leave group_size and symmetric out",
        ),
        (lambda: Quantize(smooth_where="fold"), "quantize: smooth_where is not used without smooth; leave it out"),
        (lambda: Sparsify(tokens=5), "sparsify.tokens is 5; expected a list, each item a whole number of at least 1"),
        (lambda: Measure(batch_sizes=[1, 0]), "measure.batch_sizes[1] is 0; expected "),
    ],
)
def test_a_section_says_what_is_wrong(make, expected):
    message = refused(make)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([], "recipe: stages is []; expected a list with one or more of low_rank, prune, "),
        (5, "recipe: a recipe is a list of stages or a mapping with stages:, not 5"),
        ({"seed": 1}, "recipe: stages is missing; expected "),
        ({"stages": ["quantize"], "sead": 1}, "recipe: unknown key 'sead'; did you mean 'seed'? valid keys: stages, "),
        ({"stages": ["quantize"], "seed": -1}, "recipe: seed is -1; expected a whole number of at least 0"),
        (["quantise"], "stage 1: unknown stage 'quantise'; did you mean 'quantize'? valid stages: low_rank, prune, "),
        (["quantize", 7], "stage 2: a stage is a name or name: {key: value}, not 7; valid stages: "),
        ([{"prune": None, "sparsity": 0.5}], "stage 1: a stage has one name, but sparsity stands beside prune; indent"),
        ([{"finetune": {"steps": 1, "lrr": 1}}], "stage 1: unknown key 'lrr' in finetune; did you mean 'lr'?"),
        (
            [{"prune": {"train": {"stepz": 1, "steps": 1}}}],
            "stage 1: unknown key 'stepz' in prune.train; did you mean 'steps'?",
        ),
        ([Sparsify(), Prune()], "stage 2: prune (stage 2) cannot come after sparsify (stage 1): sparsify leaves"),
        ([{"finetune": {"steps": 1, 5: 1}}], "stage 1: unknown key '5' in finetune"),
    ],
)
def test_of_says_where_and_what(source, expected):
    assert expected in refused(lambda: Recipe.of(source))


def test_all_problems_are_told_at_once():
    source = [{"prune": {"sparcity": 0.9}}, "quantise", {"sparsify": {"dtype": "int4"}}, {"finetune": {}}]
    with pytest.raises(RecipeError) as caught:
        Recipe.of({"stages": source, "seed": "x"})
    starts = [problem[:30] for problem in caught.value.problems]
    assert starts == [
        "recipe: seed is 'x'; expected ",
        "stage 1: unknown key 'sparcity",
        "stage 2: unknown stage 'quanti",
        "stage 3: sparsify.dtype is 'in",
        "stage 4: finetune: give either",
        "stage 4: finetune (stage 4) ca",
    ]
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_text_of_a_number_from_yaml_1_1_is_a_number():
    assert Train(steps=1, lr="1e-3").lr == 1e-3
    assert "lr is '0.001'" in refused(lambda: Train(steps=1, lr="0.001"))


# ---- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["low_rank", "prune", "distill", "finetune", "qat", "sparsify", "quantize"],
        ["distill", "low_rank", "finetune", "prune", "prune", "qat", "finetune", "qat", "quantize"],
        ["quantize"],
    ],
)
def test_orders_that_work(names):
    assert order_problems(names) == []
    assert order_problems(working(names)) == []


@pytest.mark.parametrize(
    ("names", "why", "works"),
    [
        (["sparsify", "prune"], "sparsify leaves the weights as they are run", "prune, sparsify"),
        (["quantize", "qat"], "none is trained or changed after it", "qat, quantize"),
        (["quantize", "sparsify"], "quantize makes pruned layers dense int8", "sparsify, quantize"),
        (["sparsify", "quantize", "sparsify"], "the first one has taken every pruned layer", "sparsify, quantize"),
        (["qat", "prune"], "qat fits the weights to their rounding", "prune, qat"),
        (["qat", "low_rank"], "qat fits the weights to their rounding", "low_rank, qat"),
        (["prune", "low_rank"], "prune the factors instead", "low_rank, prune"),
    ],
)
def test_orders_that_do_not(names, why, works):
    (problem,) = order_problems(names)
    assert problem.path == ("stages", len(names) - 1)
    assert why in problem.text
    assert problem.text.endswith(f"This order works: {works}")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(list(STAGES)), min_size=1, max_size=7))
def test_the_order_that_is_proposed_works(names):
    proposed = working(names)
    assert order_problems(proposed) == []
    assert set(proposed) == set(names)


def test_sparsify_keeps_what_qat_trained_for():
    qat = Qat(train=TRAIN)
    assert "what qat trains for is kept only" in refused(lambda: Recipe.of([qat, Sparsify()]))
    assert "after qat with mode 'static'" in refused(
        lambda: Recipe.of([Qat(mode="static", train=TRAIN), Sparsify(dtype="int8")])
    )
    assert "one mode is enough" in refused(lambda: Recipe.of([qat, Qat(mode="static", train=TRAIN)]))
    Recipe.of([qat, Sparsify(dtype="int8"), "quantize"])


# ---- what stages need ---------------------------------------------------------------------------------------------


def test_what_a_stage_needs():
    assert Prune().training is None
    assert Prune(train=TRAIN).training == TRAIN
    assert Finetune(steps=3).training.steps == 3
    assert Distill(train=TRAIN).distillation.alpha == 0.5
    assert Qat(train=TRAIN, distill=Distillation()).distillation == Distillation()
    assert Finetune(steps=3).distillation is None
    needing = [Prune(method="wanda"), Prune(method="taylor"), Qat(mode="static", train=TRAIN), Quantize(smooth=0.5)]
    assert all(stage.needs_samples for stage in needing)
    assert not any(
        stage.needs_samples for stage in (Prune(), Prune(method="taylor", train=TRAIN, schedule={"begin": 1}))
    )
    assert not Quantize().needs_samples


def test_every_stage_has_a_name_of_its_own():
    assert {name: kind.name for name, kind in STAGES.items()} == {name: name for name in STAGES}
    assert all(issubclass(kind, Stage) for kind in STAGES.values())
