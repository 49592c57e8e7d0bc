"""Recurrent token mixers by name: what `model.layers` may say beside 'attention'."""

from longctx.models.mixers.gated_delta import GatedDelta
from longctx.models.mixers.mamba2 import Mamba2
from longctx.models.mixers.rglru import RGLRU

MIXERS: dict[str, type] = {
    'gated_delta': GatedDelta,
    'mamba2': Mamba2,
    'rglru': RGLRU,
}
