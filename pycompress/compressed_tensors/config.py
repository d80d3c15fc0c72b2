"""``quantization_config`` of a compressed-tensors checkpoint: which layer is kept how, as JSON and as :class:`Scheme`.

    {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
     "config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": {...},
                                   "input_activations": {...} or null, "output_activations": null}},
     "ignore": ["lm_head"],
     "sparsity_config": {"format": "sparse-bitmask", "targets": [...], ...} or {}}

A target is the name of a layer, ``re:`` and a pattern that its name begins with, or the name of the layer's class. Of
several that fit, a name counts before a pattern and a pattern before a class.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pycompress.tensor_file import TensorFileError

METHOD = "compressed-tensors"
PACKED, INT, NAIVE, MIXED, DENSE = "pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense"
BITMASK = "sparse-bitmask"
_FORMATS = (PACKED, INT, NAIVE)
_VERSION = "0.20.0"  # of the library whose layout is written
_ACTIVATIONS = ("float", "token", "tensor")
# A pattern of a file is run on every name: what could take exponential time is refused, see _compiled.
_LONGEST_PATTERN, _MOST_STARS = 500, 4


class CompressedTensorsError(TensorFileError):
    """A compressed-tensors checkpoint that is damaged, holds what pycompress cannot, or is of another model."""


@dataclass(frozen=True)
class Scheme:
    """How a layer is kept.

    bits: of a weight, 4 or 8. group_size: inputs that share a scale; None: a scale for each output. symmetric: no zero
    points of the weight. activations: ``"float"``, ``"token"`` (int8, a scale for each token, found when it runs) or
    ``"tensor"`` (int8, one scale, calibrated). affine: ``"tensor"`` has a zero point too. format: as the library names
    it. per_tensor: the weight has one scale altogether.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activations: str = "float"
    affine: bool = False
    format: str = PACKED
    per_tensor: bool = False

    def to_json(self, targets: Sequence[str]) -> dict[str, Any]:
        """The config group of these targets."""
        strategy = "channel" if self.group_size is None else "group"
        inputs = None
        if self.activations != "float":
            dynamic = self.activations == "token"
            inputs = _arguments(8, self.activations, not self.affine, dynamic=dynamic)
        return {
            "targets": list(targets),
            "weights": _arguments(self.bits, strategy, self.symmetric, group_size=self.group_size),
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


def _arguments(
    bits: int, strategy: str, symmetric: bool, *, dynamic: bool = False, group_size: int | None = None
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


# ---- writing --------------------------------------------------------------------------------------------------------


def to_json(
    schemes: Mapping[str, Scheme], floats: Iterable[str], sparse: Iterable[str], sparsity: float
) -> dict[str, Any]:
    """The ``quantization_config`` of a model.

    schemes: by the name of each quantised layer. floats: nn.Linear layers that are not. sparse: layers kept as bitmask
    and values; sparsity: the fraction of zeros among their weights.

    One scheme for all names the class, and what is left out: so do the library's own checkpoints, and engines that fuse
    layers under names of their own find it. Of several schemes each names its layers.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in groups}
    targets = [["Linear"]] if len(groups) == 1 else [sorted(names) for names in groups.values()]
    bitmasks = sorted(sparse)
    return {
        "config_groups": {
            f"group_{i}": scheme.to_json(names) for i, (scheme, names) in enumerate(zip(groups, targets, strict=True))
        },
        "format": formats.pop() if len(formats) == 1 else MIXED if formats else DENSE,
        "global_compression_ratio": None,
        "ignore": sorted(set(floats)) if groups else [],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {} if not bitmasks else _sparsity_json(bitmasks, sparsity),
        "transform_config": {},
        "version": _VERSION,
    }


def _sparsity_json(targets: list[str], sparsity: float) -> dict[str, Any]:
    return {
        "format": BITMASK,
        "global_sparsity": round(sparsity, 6),
        "ignore": [],
        "registry_requires_subclass": False,
        "sparsity_structure": "unstructured",
        "targets": targets,
    }


# ---- reading --------------------------------------------------------------------------------------------------------


class Config:
    """A ``quantization_config`` read: every scheme in it is one that pycompress has a layer for, or it raises.

    Raises:
        CompressedTensorsError: naming the group and what of it is unknown or cannot be held.
    """

    def __init__(self, value: object) -> None:
        config = _mapping(value, "quantization_config")
        if config.get("quant_method") != METHOD:
            raise CompressedTensorsError(
                f"its quant_method is {str(config.get('quant_method'))[:50]!r}; expected {METHOD!r}"
            )
        _check_absent(config)
        self.ignore = _Targets(config.get("ignore") or [], "ignore")
        self.groups: list[tuple[_Targets, Scheme]] = []
        default = config.get("format")
        for name, group in _mapping(config.get("config_groups") or {}, "config_groups").items():
            self.groups.append(_group(str(name), group, default))
        sparsity = _mapping(config.get("sparsity_config") or {}, "sparsity_config")
        kept = sparsity.get("format", DENSE)
        if kept not in (DENSE, BITMASK):
            raise CompressedTensorsError(
                f"its sparsity_config has the format {str(kept)[:50]!r}; pycompress reads {BITMASK} and {DENSE}"
            )
        self.has_bitmasks = kept == BITMASK

    def scheme_of(self, names: Collection[str], module: nn.Module) -> Scheme | None:
        """How the layer of these names is kept; None where it is not quantised."""
        if self.ignore.rank(names, module) is not None:
            return None
        ranks = [(targets.rank(names, module), i) for i, (targets, _) in enumerate(self.groups)]
        found = [(rank, i) for rank, i in ranks if rank is not None]
        return self.groups[min(found)[1]][1] if found else None


def _check_absent(config: Mapping[str, Any]) -> None:
    """What would change results and has no layer here."""
    for key, what in (("kv_cache_scheme", "a quantised cache of keys and values"), ("transform_config", "rotations")):
        if config.get(key):
            raise CompressedTensorsError(f"its {key} wants {what}, which pycompress does not have")
    status = config.get("quantization_status", "compressed")
    if status != "compressed" and config.get("config_groups"):
        raise CompressedTensorsError(
            f"its quantization_status is {str(status)[:50]!r}; expected 'compressed': its weights are still floats"
        )


# The library's names of whole schemes: weights, activations, format.
_PRESETS = {
    "W8A8": Scheme(8, activations="token", format=INT),
    "INT8": Scheme(8, activations="token", format=INT),
    "W4A16": Scheme(4, group_size=128),
    "W4A16_ASYM": Scheme(4, group_size=128, symmetric=False),
}


def _group(name: str, value: object, default: object) -> tuple[_Targets, Scheme]:
    where = f"config group {name[:50]!r}"
    if isinstance(value, list):
        if name.upper() not in _PRESETS:
            raise CompressedTensorsError(f"{where} is no scheme that pycompress has: {', '.join(_PRESETS)}")
        return _Targets(value, where), _PRESETS[name.upper()]
    group = _mapping(value, where)
    if group.get("output_activations"):
        raise CompressedTensorsError(f"{where} quantises outputs, which pycompress does not")
    if not group.get("weights"):
        raise CompressedTensorsError(f"{where} quantises no weights; pycompress has no such layer")
    weights = _mapping(group["weights"], f"weights of {where}")
    inputs = _mapping(group.get("input_activations") or {}, f"input_activations of {where}")
    kept = group.get("format") or default or (INT if inputs else PACKED)
    if kept == MIXED or kept not in _FORMATS:
        raise CompressedTensorsError(
            f"{where} has the format {str(kept)[:50]!r}; pycompress reads {', '.join(_FORMATS)}"
        )
    return _Targets(group.get("targets"), where), _scheme(weights, inputs, kept, where)


def _scheme(weights: Mapping[str, Any], inputs: Mapping[str, Any], kept: str, where: str) -> Scheme:
    bits, strategy = weights.get("num_bits", 8), weights.get("strategy")
    group, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy != "group":
        group = None
    elif type(group) is not int or not 0 < group < 2**31:
        raise CompressedTensorsError(f"{where} has group_size={str(group)[:50]}; expected a size")
    activations, affine = "float", False
    if inputs:
        activations, affine = _activations(inputs, where)
    which = f"{bits}-bit {'' if symmetric is True else 'a'}symmetric weights by {str(strategy)[:50]}"
    known = weights.get("type", "int") == "int" and not weights.get("dynamic") and type(symmetric) is bool
    known = known and strategy in ("tensor", "channel", "group")
    int8 = bits == 8 and symmetric is True and group is None
    int4 = bits == 4 and activations == "float" and kept == PACKED and (symmetric is True or strategy != "tensor")
    if not known or not (int8 or int4):
        type_ = str(weights.get("type", "int"))[:50]
        raise CompressedTensorsError(
            f"{where} has {which} of type {type_} in {kept}, activations by {activations}; pycompress holds 8-bit "
            "symmetric ones by channel or tensor, and 4-bit ones in pack-quantized with float activations"
        )
    return Scheme(bits, group, symmetric, activations, affine, kept, strategy == "tensor")


def _activations(inputs: Mapping[str, Any], where: str) -> tuple[str, bool]:
    strategy, dynamic, symmetric = inputs.get("strategy"), inputs.get("dynamic", False), inputs.get("symmetric", True)
    if strategy is None:
        strategy = "tensor"
    fits = inputs.get("num_bits", 8) == 8 and inputs.get("type", "int") == "int" and type(symmetric) is bool
    fits = fits and (strategy, dynamic) in (("token", True), ("tensor", False)) and (symmetric or strategy == "tensor")
    if not fits:
        raise CompressedTensorsError(
            f"{where} has activations of {str(inputs.get('num_bits', 8))[:20]} bits by {str(strategy)[:50]}, "
            f"dynamic={str(dynamic)[:20]}, symmetric={str(symmetric)[:20]}; pycompress has int8 ones by token "
            "(dynamic, symmetric) and by tensor (static)"
        )
    return strategy, not symmetric


class _Targets:
    """The targets of a group, or what is ignored."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
            raise CompressedTensorsError(f"{where} has targets {str(value)[:100]}; expected a list of names")
        self.plain = {target for target in value if not target.startswith("re:")}
        self.patterns = [_compiled(target[3:], where) for target in value if target.startswith("re:")]

    def rank(self, names: Collection[str], module: nn.Module) -> int | None:
        """0 for a layer that is named, 1 for one of a pattern, 2 for one of a class; None for any other."""
        if not self.plain.isdisjoint(names):
            return 0
        if any(pattern.match(name) for pattern in self.patterns for name in names):
            return 1
        return 2 if any(cls.__name__ in self.plain for cls in type(module).__mro__) else None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Refuses what could take exponential time: a repeated group, or many parts of any length."""
    stars = len(re.findall(r"[*+]|\{\d*,", re.sub(r"\\.|\[[^\]]*\]", "_", pattern)))
    why = ""
    if len(pattern) > _LONGEST_PATTERN or stars > _MOST_STARS or re.search(r"\)[*+{]", pattern):
        why = f"it is longer than {_LONGEST_PATTERN}, repeats a group, or has more than {_MOST_STARS} repetitions"
    else:
        try:
            return re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            why = str(error)
    raise CompressedTensorsError(f"{where} has the target 're:{pattern[:100]}', which is not used: {why}")


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CompressedTensorsError(f"its {what} is a {type(value).__name__}; expected a JSON object")
    return value
