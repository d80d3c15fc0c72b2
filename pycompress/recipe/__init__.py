"""Recipes: what to do to a model, in which order, typed and checked before any work.

>>> from pycompress.recipe import Prune, Recipe, Sparsify, Train
>>> Recipe.of([Prune(sparsity=0.9, pattern="4x4", train=Train(steps=500)), Sparsify(dtype="int8")])
>>> Recipe.of("recipe.yaml")
"""

from pycompress.recipe.base import Section
from pycompress.recipe.config import Config, Reference
from pycompress.recipe.problems import RecipeError
from pycompress.recipe.sections import (
    STAGES,
    Attention,
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
    Schedule,
    Sensitivity,
    Sparsify,
    Stage,
    Train,
)

__all__ = [
    "STAGES",
    "Attention",
    "Config",
    "Distill",
    "Distillation",
    "Finetune",
    "Hidden",
    "LowRank",
    "Measure",
    "Prune",
    "Qat",
    "Quantize",
    "Recipe",
    "RecipeError",
    "Reference",
    "Schedule",
    "Section",
    "Sensitivity",
    "Sparsify",
    "Stage",
    "Train",
]
