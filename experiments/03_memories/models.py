"""What experiment 03 compares: a table of config fields for each part, and how a model is made of them.

In recall and passkey each token's vector has a map of the one before it added (experiments/small_training.py);
no model has a short convolution of its own, which would do the same beyond a segment's edge, except
where a memory is published with one.
"""

from typing import Any

from longctx.models import decoder, memory_config

FULL = 'full_cache'   # remembers everything: what the others are measured against

# Segments of two tokens. 64 wide, two layers, two heads of 32.
RECALL = {
    FULL: dict(name='decoder'),
    'gated_delta': dict(name='decoder', layers=('gated_delta',), mixer_conv=1),
    'transformer_xl': dict(short_term=8),   # four segments
    'infini': dict(long_term='infini'),
    'infini_linear': dict(long_term='infini', memory_variant='linear'),
    'compressive': dict(short_term=8, long_term='compressive', memory_rate=2),
    'memorizing': dict(long_term='memorizing', memory_size=64, memory_top=8),
    'rmt': dict(long_term='rmt', memory_tokens=4),
    'armt': dict(long_term='armt', memory_tokens=2, memory_width=16),
    'block_recurrent': dict(long_term='block_recurrent', memory_tokens=16),
    'memory_caching': dict(long_term='memory_caching', memory_size=64),
    'titans_memory': dict(long_term='titans', memory_variant='memory', memory_width=64),
    'titans_mag': dict(long_term='titans', memory_variant='mag', memory_width=64),
    'titans_mal': dict(long_term='titans', memory_variant='mal', memory_width=64),
    'titans_mac': dict(long_term='titans', memory_variant='mac', memory_width=64),
    'ttt': dict(long_term='ttt'),
}
# With an inner step of up to 1/2 in place of 1/32: what is read replaces what was there.
RECALL |= {f'titans_{variant}_16': RECALL[f'titans_{variant}'] | dict(memory_rate=16.0)
           for variant in ('memory', 'mag', 'mal', 'mac')}

# Segments of 64 tokens, the same widths. Titans' rate is that of short chunks: a mark is met once, and by the
# default for chunks of 64 (an eighth) it is not learned in 1,000 steps.
PASSKEY = {
    'gated_delta': dict(name='decoder', layers=('gated_delta',), mixer_conv=1),
    'transformer_xl': dict(short_term=256),
    'infini': dict(long_term='infini'),
    'infini_linear': dict(long_term='infini', memory_variant='linear'),
    'compressive': dict(short_term=256, long_term='compressive', memory_rate=4),
    'memorizing': dict(long_term='memorizing', memory_size=1024, memory_top=8),
    'rmt': dict(long_term='rmt', memory_tokens=8),
    'armt': dict(long_term='armt', memory_tokens=8, memory_width=16),
    'titans_mag': dict(long_term='titans', memory_variant='mag', memory_width=64, memory_rate=1.0),
    'titans_mac': dict(long_term='titans', memory_variant='mac', memory_width=64, memory_rate=1.0),
    'ttt': dict(long_term='ttt'),
}

# Segments of 512 bytes; configs/books_memory.py says the rest. About 3M parameters each.
BOOKS = {
    'no_memory': dict(long_term='none'),
    'transformer_xl': dict(long_term='none', short_term=512),
    'compressive': dict(long_term='compressive', short_term=512, memory_rate=4),
    'memorizing': dict(long_term='memorizing', memory_layers=(4,), memory_size=8192),
    'rmt': dict(long_term='rmt', memory_tokens=16),
    'armt': dict(long_term='armt', memory_tokens=16),
    'infini': dict(long_term='infini'),
    'block_recurrent': dict(long_term='block_recurrent', memory_layers=(4,), short_term=512),
    'titans_mag': dict(long_term='titans', memory_variant='mag'),
}
# Gates at the common rate, where configs/books_memory.py gives them 30 times as much.
GATES_AT_ONE = {'infini_gate_1': 'infini', 'memorizing_gate_1': 'memorizing'}
BOOKS |= {name: BOOKS[model] for name, model in GATES_AT_ONE.items()}


def small(fields: dict[str, Any], vocab_size: int, segment: int) -> Any:
  """The config of a model of recall or passkey."""
  sizes = dict(vocab_size=vocab_size, num_layers=2, embed_dim=64, num_heads=2, mlp='gelu',
               init_std=0.1, remat='none') | fields
  if sizes.get('name') == 'decoder':
    return decoder.Config(max_length=1 << 21, layer_loop='unrolled', **sizes)
  return memory_config.Config(segment=segment, **sizes)


NAMES = tuple(dict.fromkeys((*RECALL, *PASSKEY, *BOOKS)))


def style(model: str) -> dict[str, Any]:
  """The same colour and dashes for a model in every figure."""
  i = NAMES.index(model)
  return dict(color=f'C{i % 10}', linestyle=('-', '--', ':')[i // 10], linewidth=1, label=model)
