"""An encoder-decoder: the source is read both ways, the target is written by layers that look at it.

    encoded = encoder(source)
    x += attention(norm(x));  x += attention(norm(x), to encoded);  x += mlp(norm(x))

The keys and values that a decoder's layer has of the source are part of its state, so that a token costs
no more of the encoder:

    state = model.encode(source_BS, valid_BS)
    hidden_BTD, state = model(tokens_BT, state)

In training nothing is kept: model(tokens_BT, None, source_BS=..., source_valid_BS=...). Without a source
(init_state, or none given) the layers hear nothing of one. All documents of a row have the row's source.
The table of the tokens is that of source, target and, where tied, logits.
Sources: Vaswani et al. 2017, arXiv:1706.03762; Raffel et al. 2019 (T5), arXiv:1910.10683. Differs from
the first: norms stand before (RMSNorm, as T5's); from the second: scores are scaled by H^-0.5 and not
the initial weights, tied logits are not scaled. No position is told to attention to the source, as in both.
Held by: tests/test_encoder_decoder.py (an oracle in NumPy, T5 of transformers), tests/test_models.py.

B batch  T tokens  S source tokens  N query heads  K kv heads  H head dim  D model  V vocab
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import Intervals, attention
from longctx.models import stack
from longctx.models.attention_layer import (
  Cache,
  cut_heads,
  cut_slots,
  empty_cache,
  even_slots,
)
from longctx.models.context import Clock, Context, new_clock, place_tokens
from longctx.models.decoder_config import Config as LayersConfig
from longctx.models.encoder import Layers
from longctx.models.encoder_config import PairConfig
from longctx.models.layers import DTYPES, MLP, Embedding, RMSNorm, dropout
from longctx.models.positions import Positions


class Layer(NamedTuple):
  """What a layer of the decoder remembers; the index of a source's key is its place, -1 for padding."""

  own: Cache
  source: Cache


class State(NamedTuple):
  """Batch first."""

  clock: Clock
  layers: tuple[Layer, ...]


class Source(NamedTuple):
  """The encoder's output, for layers that keep nothing of it."""

  encoded_BSD: jax.Array
  index_BS: jax.Array


class Reading(NamedTuple):
  """What all layers of a call are told."""

  target: Context
  source: Source | None    # None: each layer's state has its keys


class Block(nnx.Module):
  """A layer of the decoder: its own tokens, the source, an MLP."""

  def __init__(self, config: LayersConfig, mixer: str, *, rngs: nnx.Rngs):
    del mixer
    self.rate = config.dropout
    norm = lambda: RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.mixer_norm, self.mixer = norm(), stack.new_attention(config, rngs)
    self.source_norm, self.source = norm(), stack.new_attention(config, rngs)
    self.mlp_norm = norm()
    self.mlp = MLP(config.embed_dim, config.mlp_dim, config.mlp, config.init_std, config.out_std,
                   block=config.mlp_block, rngs=rngs)

  def __call__(self, x_BTD: jax.Array, state: Layer | None, reading: Reading, window: int,
               key: jax.Array | None) -> tuple[jax.Array, Layer | None]:
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    y_BTD, own = self.mixer(self.mixer_norm(x_BTD), state and state.own, reading.target, window)
    x_BTD += dropout(y_BTD, self.rate, keys[0])
    y_BTD = self.hear(self.source_norm(x_BTD), state and state.source, reading)
    x_BTD += dropout(y_BTD, self.rate, keys[1])
    x_BTD += dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, keys[2])
    return x_BTD, None if state is None else state._replace(own=own)

  def source_keys(self, source: Source) -> Cache:
    return Cache(*self.source.keys(source.encoded_BSD), source.index_BS)

  def hear(self, x_BTD: jax.Array, kept: Cache | None, reading: Reading) -> jax.Array:
    """What the source says to each token; nothing to padding."""
    given = self.source_keys(reading.source) if kept is None else kept
    q_BTNH, k_BSKH, v_BSKH = self.source.queries(x_BTD), given.k, given.v
    if kept is None:
      q_BTNH, k_BSKH, v_BSKH = cut_heads(q_BTNH, k_BSKH, v_BSKH)
    index_BT = reading.target.index_BT
    mask = Intervals(start_BT=jnp.zeros_like(index_BT), index_BT=index_BT, key_index_BS=given.index,
                     end_BT=jnp.where(index_BT >= 0, k_BSKH.shape[1], 0))
    out_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, mask, scale=self.source.head_dim ** -0.5,
                         implementation=self.source.implementation, cached=kept is not None)
    return self.source.merged(out_BTNH)


class EncoderDecoder(nnx.Module):
  """hidden, state = model(tokens, model.encode(source)); logits = model.logits(hidden)."""

  state_grows = True

  def __init__(self, config: PairConfig, *, rngs: nnx.Rngs):
    config = self.config = config.resolved(config.vocab_size)
    self.embedding = Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs)
    self.encoder = Layers(config, config.encoder_layers, config.source_length, rngs=rngs)
    self.positions = Positions(config, length=config.max_length, both_ways=False, rngs=rngs)
    self.layers_config = config.layers_config()
    self.blocks = stack.new_blocks(self.layers_config, Block, rngs)
    self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.head = (None if config.tied else
                 Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs))

  def init_state(self, batch_size: int, capacity: int = 0) -> State:
    """A state without a source: nothing was read. `capacity`: tokens of the target (0: max_length)."""
    c = self.config
    sources = [empty_cache(batch_size, even_slots(c.source_length), c.num_kv_heads, c.head_dim,
                           DTYPES[c.dtype]) for _ in range(c.num_layers)]
    return self._state(sources, batch_size, capacity)

  def encode(self, source_BS: jax.Array, valid_BS: jax.Array | None = None, *, capacity: int = 0
             ) -> State:
    """The state after a source, before a target of at most `capacity` tokens (0: max_length)."""
    source = self._encoded(source_BS, valid_BS, None)
    keys = [cut_slots(stack.one(self.layers_config, self.blocks, i).source_keys(source))
            for i in range(self.config.num_layers)]
    return self._state(keys, source_BS.shape[0], capacity)

  def _state(self, sources: list[Cache], batch_size: int, capacity: int) -> State:
    c = self.config
    own = lambda: empty_cache(batch_size, even_slots(capacity or c.max_length), c.num_kv_heads,
                              c.head_dim, DTYPES[c.dtype])
    return State(new_clock(batch_size), tuple(Layer(own(), source) for source in sources))

  def _encoded(self, source_BS, valid_BS, key) -> Source:
    context, _ = place_tokens(source_BS, None, None, None, valid_BS)
    x_BSD = self.embedding(source_BS, DTYPES[self.config.dtype])
    return Source(self.encoder(x_BSD, context, key), context.index_BT)

  def __call__(self, tokens_BT: jax.Array, state: State | None = None, *,
               positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None,
               source_BS: jax.Array | None = None, source_valid_BS: jax.Array | None = None
               ) -> tuple[jax.Array, State | None]:
    """Hidden states [B, T, D] in the compute type, and the state after these tokens.

    A row that outgrows the capacity of its state gives NaN from there on.
    """
    if state is not None and source_BS is not None:
      raise ValueError('source_BS and a state: the state of encode() has its source; give one of them')
    keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
    context, clock = place_tokens(tokens_BT, state and state.clock, positions_BT, segment_ids_BT,
                                  valid_BT)
    x_BTD = self.embedding(tokens_BT, DTYPES[self.config.dtype])
    x_BTD, context = self.positions(x_BTD, context)
    x_BTD = dropout(x_BTD, self.config.dropout, keys[0])
    source = None
    if state is None:
      source = (self._encoded(source_BS, source_valid_BS, keys[1]) if source_BS is not None else
                no_source(x_BTD))
    x_BTD, layers = stack.run(self.layers_config, self.blocks, x_BTD, state and state.layers,
                              Reading(context, source), keys[2])
    hidden_BTD = self.norm(x_BTD)
    if state is None:
      return hidden_BTD, None
    full_BT = context.index_BT >= layers[0].own.index.shape[1]
    return jnp.where(full_BT[..., None], jnp.nan, hidden_BTD), State(clock, layers)

  def output_embedding_VD(self) -> jax.Array:
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)


def no_source(x_BTD: jax.Array) -> Source:
  """One token that nobody sees."""
  B, _, D = x_BTD.shape
  return Source(jnp.zeros((B, 1, D), x_BTD.dtype), jnp.full((B, 1), -1, jnp.int32))
