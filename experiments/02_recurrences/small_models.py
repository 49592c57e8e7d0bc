"""The models that experiment 02 compares, each at two layers for a task or at a budget for text."""

import dataclasses
from typing import Any

from longctx.models import decoder, recurrent
from longctx.models.mixers import MIXERS

CELLS = ('elman', 'gru', 'lstm', 'slstm')
ATTENTION = 'attention'
NEGATIVE = {'delta_net (0,2)': 'delta_net', 'gated_delta (0,2)': 'gated_delta', 'kda (0,2)': 'kda'}
GRIFFIN = 'griffin'   # two recurrent layers, then local attention
# One of each kind: exact memory, cells, numbers, sums, the delta rules, with and without states to track.
TELLING = (ATTENTION, 'lstm', 'slstm', 'rglru', 'linear_attention', 'mamba2', 'gated_delta',
           'gated_delta (0,2)', 'rwkv7')
NAMES = (ATTENTION, *CELLS, *MIXERS, *NEGATIVE, GRIFFIN)


def config(name: str, *, vocab_size: int, dim: int, layers: int, mlp: bool, window: int = 0) -> Any:
  """The model `name` at width `dim`."""
  if name in CELLS:
    return recurrent.Config(name=name, vocab_size=vocab_size, num_layers=layers, embed_dim=dim,
                            hidden_dim=dim, tied=True, cell_heads=2 if name == 'slstm' else 1)
  pattern = ('rglru', 'rglru', 'attention') if name == GRIFFIN else (NEGATIVE.get(name, name),)
  return decoder.Config(
      vocab_size=vocab_size, num_layers=max(layers, len(pattern)) // len(pattern) * len(pattern),
      embed_dim=dim, num_heads=2, mixer_heads=2, layers=pattern, mlp='swiglu' if mlp else 'none',
      window=(window,), max_length=1 << 20, mixer_negative=name in NEGATIVE, layer_loop='unrolled')


def at_budget(name: str, parameters: int, **sizes: Any) -> Any:
  """The model with as many parameters as near as its widths allow: MLP or hidden width turned."""
  field = 'hidden_dim' if name in CELLS else 'mlp_dim'
  start = config(name, **sizes)
  made = lambda width: dataclasses.replace(start, **{field: width})
  step = 2 if name in CELLS else 8
  return min((made(width) for width in range(8, 2049, step)),
             key=lambda c: abs(c.num_parameters() - parameters))
