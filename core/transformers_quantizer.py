"""The reader of packed checkpoints inside transformers' `from_pretrained` (4.57 and 5.x).

transformers builds the float model on the meta device, hands it to `preprocess_model`, loads the checkpoint's tensors
by name, and calls `postprocess_model`. Here the first puts packed modules where config.json says, the second takes the
tables back to fp16 that the loader cast to the compute dtype (fp16 -> float32 -> fp16 is exact).

Two choices differ from other methods. The compute dtype is always float32, whatever config.json's `dtype` says: that
is the dtype *on disk* of what stayed float (norms), and the model that was measured computed in float32. And
`preprocess_model` is replaced as a whole, because the 4.57 original imports `accelerate`, which is not needed here.

Imported by `dwindle.registration` while transformers loads; nothing of transformers but its quantizer base and its
table is touched at import.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dwindle.quantized_model import QUANT_METHOD, VERSION, PackedModule, replace_modules

__all__ = ["DwindleConfig", "DwindleQuantizer", "register"]

logger = logging.getLogger("dwindle")


class DwindleConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a packed checkpoint; see `dwindle.quantized_model` for its keys."""

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        version: int = VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.tied = tied or {}
        self.modules = modules or {}
        if unknown:
            logger.warning("quantization_config: ignored unknown keys %s", sorted(unknown))


class DwindleQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules into a model that `from_pretrained` is about to fill."""

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        """Return False: the codes are constants. Adapters train beside them."""
        return False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return True: the state dict is the packed checkpoint."""
        return True

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """Return float32, the compute dtype of packed models."""
        if dtype not in (None, torch.float32):
            logger.debug("a packed checkpoint computes in float32; dtype %s names how its norms are stored", dtype)
        return torch.float32

    def preprocess_model(self, model: nn.Module, **_: Any) -> None:
        """Replace float modules by empty packed ones."""
        replace_modules(model, self.quantization_config.to_dict())

    def postprocess_model(self, model: nn.Module, **_: Any) -> nn.Module:
        """Give every table its stored dtype again."""
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.restore_tables()
        return model

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        return model


def register() -> None:
    """Add the method to transformers' table, once."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(DwindleConfig)
        auto.register_quantizer(QUANT_METHOD)(DwindleQuantizer)
