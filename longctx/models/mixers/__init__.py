"""Recurrent token mixers by name: what `model.layers` may say beside 'attention'."""

from longctx.models.mixers.rglru import RGLRU

MIXERS: dict[str, type] = {
    'rglru': RGLRU,
}
