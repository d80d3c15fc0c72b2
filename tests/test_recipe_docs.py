"""docs/recipes.md: its recipe is one, and no key is left out."""

import re
from pathlib import Path

import yaml

from pycompress.recipe import (
    STAGES,
    Attention,
    Config,
    Distillation,
    Hidden,
    Measure,
    Recipe,
    Schedule,
    Sensitivity,
    Train,
)

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_its_recipe_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "recipe.yaml").write_text(blocks[0], encoding="utf-8")
    recipe = Recipe.of(tmp_path / "recipe.yaml")
    assert [stage.name for stage in recipe.stages] == ["prune", "qat", "sparsify", "quantize"]
    assert Recipe.of({"stages": yaml.safe_load(blocks[0])["stages"], "seed": 0}) == recipe


def test_every_key_is_there() -> None:
    parts = [Train, Distillation, Hidden, Attention, Schedule, Sensitivity, Measure, Recipe, Config]
    keys = {key for section in [*STAGES.values(), *parts] for key in section.model_fields}
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    said = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose)))) | {"stages"}
    assert keys <= said, sorted(keys - said)
