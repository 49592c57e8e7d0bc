"""A decoder: attention, recurrent mixers, or a pattern of both; its state is one part a layer.

Pre-norm blocks, x += mixer(norm(x)); x += mlp(norm(x)), a last norm, and logits by a table that may
be tied to the embedding. `layers` names the mixer of each layer ('attention' or one of MIXERS),
`window` what an attention layer sees; both repeat over the depth. Layers run one by one
(`layer_loop='unrolled'`) or stacked in one `lax.scan` over periods of the pattern (`'scan'`), which
keeps compile time and program size independent of depth.
Sources: arXiv:1706.03762; initialisation of GPT-2 (residual outputs scaled by 1/sqrt(2L)).
Held by: tests/test_models.py (whole == any split == token by token; packed == separate),
tests/test_decoder.py (counts, scan == unrolled, remat).

B batch  T tokens  S slots  D model  L layers  V vocab  P period of the pattern of layers
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check
from longctx.models import stack
from longctx.models.attention_layer import Cache, empty_cache, even_slots
from longctx.models.attention_layer import rebase as rebase_cache
from longctx.models.context import Clock, new_clock, place_tokens, rebase
from longctx.models.decoder_config import Config
from longctx.models.layers import (
  DTYPES,
  Embedding,
  RMSNorm,
  dropout,
  normal,
  param,
  rotary_angles,
)
from longctx.models.mixers import MIXERS


class State(NamedTuple):
  """A clock and what each layer remembers (a Cache, or its mixer's state); batch first."""

  clock: Clock
  layers: tuple[Any, ...]


class Decoder(nnx.Module):
  """hidden, state = decoder(tokens, state, ...); logits = decoder.logits(hidden)."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    config = config.resolved(config.vocab_size)
    self.config = config
    self.embedding = Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs)
    self.positions = (param(rngs, normal(config.init_std), (config.max_length, config.embed_dim),
                            (None, 'embed')) if config.position == 'learned' else None)
    self.blocks = stack.new_blocks(config, stack.Block, rngs)
    self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.head = (None if config.tied else
                 Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs))

  @property
  def state_grows(self) -> bool:
    """Whether the state needs room for every token: some layer sees the whole document."""
    return 0 in self.config.windows

  def init_state(self, batch_size: int, capacity: int = 0) -> State:
    """An empty state. `capacity` in tokens: how long the document may get (0: max_length).

    A large one is rounded up, so that devices can share it evenly.
    """
    config = self.config
    capacity = capacity or config.max_length
    dtype = DTYPES[config.dtype]
    def layer(i, mixer, window):
      if mixer == 'attention':
        slots = even_slots(min(window - 1, capacity) if window else capacity)
        return empty_cache(batch_size, slots, config.num_kv_heads, config.head_dim, dtype)
      return stack.layer(config, self.blocks, i).mixer.init_state(batch_size)
    return State(new_clock(batch_size), tuple(
        layer(i, mixer, window) for i, (mixer, window) in enumerate(config.pattern())))

  def __call__(self, tokens_BT: jax.Array, state: State | None = None, *,
               positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None,
               places: tuple[jax.Array, jax.Array] | None = None
               ) -> tuple[jax.Array, State | None]:
    """Hidden states [B, T, D] in the compute type, and the state after these tokens.

    `places`: (index_BT, start_BT) where the tokens do not stand in their order; see place_tokens.

    A row that outgrows the capacity of a full-attention layer's cache gives NaN from there on:
    the callers that know lengths refuse it before (training, evaluation, generation).
    """
    config = self.config
    context, clock = place_tokens(tokens_BT, state and state.clock, positions_BT,
                                  segment_ids_BT, valid_BT, places)
    x_BTD = self.embedding(tokens_BT, DTYPES[config.dtype])
    if self.positions is not None:
      table = self.positions.get_value().astype(x_BTD.dtype)
      x_BTD += jnp.take(table, context.position_BT, axis=0, mode='fill', fill_value=jnp.nan)
    if config.position == 'rope' and 'attention' in config.layers:
      context = context._replace(
          angles=rotary_angles(context.position_BT, config.head_dim, config.rope_base))
    key = None
    if dropout_key is not None and config.dropout:
      first, key = jax.random.split(dropout_key)
      x_BTD = dropout(x_BTD, config.dropout, first)
    x_BTD, layers = stack.run(config, self.blocks, x_BTD, state and state.layers, context, key)
    hidden_BTD = self.norm(x_BTD)
    if state is None:
      return hidden_BTD, None
    full = [layer for layer, kind in zip(layers, config.pattern()) if kind == ('attention', 0)]
    if full:   # all have the same room
      full_BT = context.index_BT >= full[0].index.shape[1]
      hidden_BTD = jnp.where(full_BT[..., None], jnp.nan, hidden_BTD)
    else:      # else the room ends long before the indices do
      slots = [n for layer in layers if isinstance(layer, Cache) and (n := layer.index.shape[1])]
      clock, less_B, shift = rebase(clock, math.lcm(*slots))
      layers = tuple(rebase_cache(layer, less_B, shift) if isinstance(layer, Cache) else layer
                     for layer in layers)
    return hidden_BTD, State(clock, layers)

  def check_merge(self, *tokens: int) -> None:
    """ConfigError where `merge_states` would be no sum, however many tokens the texts have."""
    del tokens
    others = [m for m in dict.fromkeys(self.config.layers)
              if not getattr(MIXERS.get(m), 'adds', False)]
    check(not others, f'merge: model.layers has {", ".join(others)}, whose memory is no plain sum over '
          "what was read, so two cannot be added; only model.layers=('linear_attention',) can. Read "
          'both texts into one context')
    check(self.config.position != 'learned', "merge: with model.position='learned' two texts would "
          "stand at the same positions; only 'rope' and 'none' can, which linear_attention does not "
          'read. Read both texts into one context')

  def merge_states(self, a: State, b: State) -> State:
    """The state after two texts, each read from an empty one: what follows attends to both.

    Exact where a layer's state is a plain sum over its tokens. In one layer it is the state after one
    text and then the other; above it, the layers below read each text without the other.
    """
    self.check_merge()
    clock = Clock(a.clock.index + b.clock.index, a.clock.start + b.clock.start,
                  jnp.maximum(a.clock.segment, b.clock.segment))
    return State(clock, jax.tree.map(jnp.add, a.layers, b.layers))

  def output_embedding_VD(self) -> jax.Array:
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)
