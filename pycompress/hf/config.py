"""``PyCompressConfig``: what ``from_pretrained`` is told, and what config.json keeps of a compressed model.

    {"quant_method": "pycompress", "version": 1,
     "structure": {...},                      what each layer is, as pycompress.structure.describe gives it
     "lengths": {"fc.weight_values": 512}}    of the tensors whose size the structure does not tell

A config without a structure asks for a float checkpoint to be quantised once it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from pycompress.convert import quantize_
from pycompress.tensor_header import are_sizes

METHOD = "pycompress"  # the quant_method
VERSION = 1
_OP = "PyCompressConfig"


class PyCompressConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` compresses a float checkpoint; the arguments are those of ``pycompress.quantize_``.

    >>> AutoModel.from_pretrained(path, quantization_config=PyCompressConfig("weight_only", skip="lm_head"))

    Args:
        mode: as in quantize_, one mode or a mapping of patterns to modes. "static" needs batches to calibrate on, which
            loading has not: load the float model, then pycompress.calibrate and quantize_.
        layers, skip, group_size, symmetric, fuse, backend: as in quantize_.
        structure, lengths, version: as config.json keeps them; of a model that is compressed already, and then the
            only ones that count.

    Raises:
        TypeError, ValueError: an argument that is unknown or of the wrong form, a newer version.
    """

    def __init__(
        self,
        mode: str | Mapping[str, str] = "dynamic",
        *,
        layers: str | Iterable[str] = "linear",
        skip: str | Iterable[str] = (),
        group_size: int = 128,
        symmetric: bool = True,
        fuse: bool = True,
        backend: str = "auto",
        structure: Mapping[str, Any] | None = None,
        lengths: Mapping[str, int] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if version != VERSION:
            raise ValueError(f"{_OP}: version {version!r}; this pycompress reads version {VERSION}: update pycompress")
        if unknown or quant_method != METHOD:
            found = next(iter(unknown), f"quant_method={quant_method!r}")
            raise TypeError(f"{_OP}: does not know {found}; check the name, or update pycompress if a file has it")
        if structure is not None and not (isinstance(structure, Mapping) and _are_lengths(lengths)):
            raise ValueError(f"{_OP}: structure or lengths is not as pycompress writes it; config.json is damaged")
        self.quant_method = METHOD  # transformers' own are of an enum
        self.mode = dict(mode) if isinstance(mode, Mapping) else mode
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.skip = skip if isinstance(skip, str) else list(skip)
        self.group_size, self.symmetric = group_size, symmetric
        self.fuse, self.backend = fuse, backend
        self.structure = structure
        self.lengths = dict(lengths or {})
        if structure is None:
            _check(self.options())

    def options(self) -> dict[str, Any]:
        """The arguments of quantize_."""
        keys = ("mode", "layers", "skip", "group_size", "symmetric", "fuse", "backend")
        return {key: getattr(self, key) for key in keys}

    def to_dict(self) -> dict[str, Any]:
        """As config.json keeps it."""
        head = {"quant_method": METHOD, "version": VERSION}
        if self.structure is None:
            return {**head, **self.options()}
        return {**head, "structure": self.structure, "lengths": self.lengths}

    def __repr__(self) -> str:
        if self.structure is None:
            return f"{_OP}({', '.join(f'{key}={value!r}' for key, value in self.options().items())})"
        return f"{_OP}(structure of {len(self.structure.get('layers', ()))} layers)"


def _check(options: dict[str, Any]) -> None:
    """Raises as quantize_ will, before a checkpoint is loaded; which layers the patterns name is not known yet."""
    mode = options.pop("mode")
    del options["skip"]
    for value in mode.values() if isinstance(mode, Mapping) else (mode,):
        if value == "static":
            raise ValueError(
                f"{_OP}: mode='static' needs batches to calibrate on, which loading has not; load the float model, "
                "then pycompress.quantize_(model, 'static', calibration=pycompress.calibrate(model, batches))"
            )
        quantize_(nn.Sequential(), {"*": value} if isinstance(mode, Mapping) else value, **options)


def _are_lengths(lengths: object) -> bool:
    return lengths is None or (
        isinstance(lengths, Mapping) and all(isinstance(key, str) for key in lengths) and are_sizes([*lengths.values()])
    )
