"""``PyCompressHfQuantizer``: what transformers calls while it loads a model that pycompress compressed, or shall."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from pycompress.convert import QuantizeReport, quantize_
from pycompress.hf.config import METHOD, PyCompressConfig
from pycompress.hf.loading import Loading
from pycompress.hf.saving import whole_state

_LOG = logging.getLogger(__name__)


class PyCompressHfQuantizer(HfQuantizer):
    """Of a compressed checkpoint, replaces the layers before the weights are read; a float one it quantises afterwards.

    It stays on the model as ``model.hf_quantizer``. report: what quantize_ did to a float checkpoint, else None.
    """

    requires_calibration = False
    quantization_config: PyCompressConfig

    def __init__(self, quantization_config: PyCompressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # A config.json written by hand may ask for a float checkpoint to be quantised.
        self.pre_quantized = quantization_config.structure is not None
        self.report: QuantizeReport | None = None
        self._loading: Loading | None = None

    def validate_environment(self, *args: Any, device_map: object = None, **kwargs: Any) -> None:
        places = set(map(str, device_map.values())) if isinstance(device_map, Mapping) else set()
        if self.pre_quantized and (len(places) > 1 or "disk" in places):
            raise ValueError(
                f"from_pretrained: device_map spreads a model compressed by pycompress over "
                f"{', '.join(sorted(places))}; give it one device, as device_map={{'': 'cpu'}}"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.structure is not None:
            self._loading = Loading.begin(model, config.structure, config.lengths)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._loading is not None:
            self._loading.finish()
            self._loading = None
        elif not self.pre_quantized:
            self.report = quantize_(model, **self.quantization_config.options())
            _LOG.info("pycompress quantised the model as it was loaded:\n%s", self.report)
        model.is_quantized = False  # type: ignore[assignment]  # it makes .half() and .float() raise; here they work

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Floats never become integers: a float weight in the place of an int8 one is found, by Loading.finish."""
        new = super().get_new_dtype(converter, param, dtype)
        return new if new is not None and new.is_floating_point else None

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """A compressed checkpoint has the names and shapes of the model's own state_dict."""
        return [] if self.pre_quantized else super().update_weight_conversions(weight_conversions, *model)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str = "") -> list[str]:
        """Called by transformers 4, which does not mark the tensors that it has loaded."""
        if self._loading is not None:
            self._loading.check(missing_keys)
        return missing_keys

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, str]]:
        """What save_pretrained writes of a model that was loaded."""
        return whole_state(model, None), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """MaskedLinear and FakeQuantLinear train; the layers that do not have no float weight to train."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


register_quantization_config(METHOD)(PyCompressConfig)
register_quantizer(METHOD)(PyCompressHfQuantizer)
