"""The models of the arena, each at as many parameters as its MLP, or its hidden width, can make it.

Segment memories read segments of the task's length; the fields that count tokens are given in segments here. A
window is one segment: of rows of four segments a longer one leaves nothing to be remembered otherwise. What
else makes a memory a memory (slots, tokens, inner rates) is one setting for all five trials; experiment 03 has
others, made for each of its tasks.
"""

import dataclasses
import functools
from typing import Any

from longctx.models import decoder, memory_config, recurrent
from longctx.models.mixers import MIXERS

PARAMETERS = 150_000   # embeddings counted; the map of the token before, alike for all, is not
CELLS = ('elman', 'lstm', 'gru', 'slstm')
ATTENTION = {'attention': 0, 'window': 1}   # segments that a query sees back; 0: all
# short_term in segments.
MEMORIES = {
    'transformer_xl': dict(short_term=1),
    'compressive': dict(short_term=1, long_term='compressive', memory_rate=2),
    'memorizing': dict(long_term='memorizing', memory_size=512, memory_top=8),
    'infini': dict(long_term='infini'),
    'infini_linear': dict(long_term='infini', memory_variant='linear'),
    'rmt': dict(long_term='rmt', memory_tokens=4),
    'armt': dict(long_term='armt', memory_tokens=4, memory_width=16),
    'block_recurrent': dict(long_term='block_recurrent', memory_tokens=16),
    'memory_caching': dict(long_term='memory_caching', memory_size=32),
    'titans_memory': dict(long_term='titans', memory_variant='memory', memory_width=64),
    'titans_mag': dict(long_term='titans', memory_variant='mag', memory_width=64),
    'titans_mal': dict(long_term='titans', memory_variant='mal', memory_width=64),
    'titans_mac': dict(long_term='titans', memory_variant='mac', memory_width=64),
    'ttt': dict(long_term='ttt'),
}
NEGATIVE = {'gated_delta (0,2)': 'gated_delta'}   # with eigenvalues below 0: tracks states
NAMES = (*ATTENTION, *CELLS, *MIXERS, *NEGATIVE, *MEMORIES)
SIZES = dict(num_layers=2, embed_dim=64)


@functools.cache
def config(name: str, vocab_size: int, segment: int) -> Any:
  """The model at the budget."""
  if name in CELLS:
    start = recurrent.Config(name=name, vocab_size=vocab_size, hidden_dim=64, tied=True,
                             cell_heads=2 if name == 'slstm' else 1, **SIZES)
    return nearest(start, 'hidden_dim', range(16, 257, 2))
  sizes = dict(vocab_size=vocab_size, num_heads=2, mlp='gelu', mlp_dim=64, **SIZES)
  if name in MEMORIES:
    fields = MEMORIES[name]
    start = memory_config.Config(
        segment=segment, init_std=0.1, remat='none', **sizes, **fields | dict(
            short_term=segment * fields.get('short_term', 0)))
  else:
    layers = ('attention',) if name in ATTENTION else (NEGATIVE.get(name, name),)
    start = decoder.Config(
        mixer_heads=2, layers=layers, window=(segment * ATTENTION.get(name, 0),), init_std=0.1,
        max_length=1 << 20, mixer_negative=name in NEGATIVE, layer_loop='unrolled', **sizes)
  return nearest(start, 'mlp_dim', range(8, 1025, 8))


def nearest(start: Any, field: str, widths: range) -> Any:
  """The config with the width that brings it nearest to the budget."""
  made = (dataclasses.replace(start, **{field: width}) for width in widths)
  return min(made, key=lambda c: abs(c.num_parameters() - PARAMETERS))
