"""Recurrent token mixers by name: what `model.layers` may say beside 'attention'."""

MIXERS: dict[str, type] = {}
