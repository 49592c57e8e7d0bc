"""A decoder-only transformer; its state is a key-value cache and a clock.

Pre-norm blocks, x += attention(norm(x)); x += mlp(norm(x)), a last norm, and logits by a table
that may be tied to the embedding. Layers run one by one (`layer_loop='unrolled'`) or stacked in
one `lax.scan` over periods of the window pattern (`'scan'`), which keeps compile time and program
size independent of depth.
Sources: arXiv:1706.03762; initialisation of GPT-2 (residual outputs scaled by 1/sqrt(2L)).
Held by: tests/test_models.py (whole == any split == token by token; packed == separate),
tests/test_decoder.py (counts, scan == unrolled, remat).

B batch  T tokens  S slots  D model  L layers  V vocab  P period of the window pattern
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import IMPLEMENTATIONS
from longctx.errors import check, check_choice, check_range
from longctx.models.attention_layer import Attention, Cache, empty_cache
from longctx.models.attention_layer import rebase as rebase_cache
from longctx.models.context import Clock, Context, new_clock, place_tokens, rebase
from longctx.models.layers import (
    DTYPES,
    MLP,
    Embedding,
    RMSNorm,
    dropout,
    normal,
    param,
    rotary_angles,
)

REMAT = {
    'none': None,                                                     # keep every activation
    'full': jax.checkpoint_policies.nothing_saveable,                 # keep layer inputs only
    'dots': jax.checkpoint_policies.dots_saveable,                    # keep matrix products
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Shape and arithmetic of a decoder. 0 means: derived (see `resolved`)."""

  name: str = 'decoder'
  vocab_size: int = 0           # 0: the tokenizer's
  max_length: int = 2048        # longest context, in tokens, that the model is made for
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 0         # 0: num_heads
  head_dim: int = 0             # 0: embed_dim / num_heads
  mlp: str = 'swiglu'           # swiglu | gelu
  mlp_dim: int = 0              # 0: 8/3 (swiglu) or 4 (gelu) times embed_dim, in multiples of 8
  window: tuple[int, ...] = (0,)   # per layer, repeated over the depth; 0 sees everything
  position: str = 'rope'        # rope | learned | none
  rope_base: float = 10_000.0
  qk_norm: bool = False
  tied: bool = True
  dropout: float = 0.0
  norm_epsilon: float = 1e-6
  init_std: float = 0.02
  dtype: str = 'float32'        # of the arithmetic; parameters are float32
  attention: str = 'auto'
  layer_loop: str = 'scan'      # scan | unrolled
  remat: str = 'none'

  def __post_init__(self):
    for name in ('num_layers', 'embed_dim', 'num_heads', 'max_length'):
      check_range(f'model.{name}', getattr(self, name), 1)
    for name in ('vocab_size', 'num_kv_heads', 'head_dim', 'mlp_dim'):
      check_range(f'model.{name}', getattr(self, name), 0)
    check_choice('model.mlp', self.mlp, ('swiglu', 'gelu'))
    check_choice('model.position', self.position, ('rope', 'learned', 'none'))
    check_choice('model.dtype', self.dtype, DTYPES)
    check_choice('model.attention', self.attention, ('auto', *IMPLEMENTATIONS))
    check_choice('model.layer_loop', self.layer_loop, ('scan', 'unrolled'))
    check_choice('model.remat', self.remat, REMAT)
    check(0 <= self.dropout < 1, f'model.dropout={self.dropout}: must be at least 0 and below 1')
    check(self.rope_base > 1, f'model.rope_base={self.rope_base}: must be greater than 1')
    check(self.init_std > 0, f'model.init_std={self.init_std}: must be greater than 0')
    check(self.norm_epsilon > 0, f'model.norm_epsilon={self.norm_epsilon}: must be positive')
    check(self.head_dim or self.embed_dim % self.num_heads == 0,
          f'model.num_heads={self.num_heads}: must divide model.embed_dim={self.embed_dim}; '
          'or set model.head_dim')
    kv_heads = self.num_kv_heads or self.num_heads
    check(self.num_heads % kv_heads == 0,
          f'model.num_kv_heads={kv_heads}: must divide model.num_heads={self.num_heads}; '
          'each kv head serves an equal group')
    check(self.position != 'rope' or self.widths()['head_dim'] % 2 == 0,
          f'model.head_dim={self.widths()["head_dim"]}: must be even for rope positions')
    check(len(self.window) >= 1 and all(w >= 0 for w in self.window),
          f'model.window={self.window}: must be a tuple of at least one size >= 0, as (512, 0)')
    check(self.num_layers % len(self.window) == 0,
          f'model.window={self.window}: its length must divide model.num_layers='
          f'{self.num_layers}; the pattern repeats over the layers')

  def widths(self) -> dict[str, int]:
    """The sizes that 0 leaves to be derived."""
    factor = 4.0 if self.mlp == 'gelu' else 8 / 3
    return dict(num_kv_heads=self.num_kv_heads or self.num_heads,
                head_dim=self.head_dim or self.embed_dim // self.num_heads,
                mlp_dim=self.mlp_dim or 8 * round(factor * self.embed_dim / 8))

  def resolved(self, vocab_size: int) -> 'Config':
    """This config with every derived size written out."""
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size, **self.widths())

  def layer_matrices(self) -> int:
    """Weights of one layer that multiply every token: W_q, W_kv, W_out and the MLP's."""
    w = self.widths()
    attention = 2 * self.embed_dim * w['head_dim'] * (self.num_heads + w['num_kv_heads'])
    return attention + (3 if self.mlp == 'swiglu' else 2) * self.embed_dim * w['mlp_dim']

  def num_parameters(self) -> int:
    """Closed form of the parameter count (needs vocab_size)."""
    norms = 2 * self.embed_dim + (2 * self.widths()['head_dim'] if self.qk_norm else 0)
    tables = self.vocab_size * self.embed_dim * (1 if self.tied else 2)
    learned = self.max_length * self.embed_dim if self.position == 'learned' else 0
    return (tables + learned + self.embed_dim
            + self.num_layers * (self.layer_matrices() + norms))

  @property
  def windows(self) -> tuple[int, ...]:
    """The different windows among the layers."""
    return tuple(sorted(set(self.window)))

  def mean_keys(self, length: int) -> dict[int, float]:
    """window -> keys that a query sees on average, in rows of one document of `length` tokens."""
    seen = {w: min(w or length, length) for w in self.windows}   # by the row's last query
    return {w: n - n * (n - 1) / (2 * length) for w, n in seen.items()}

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward per token of a row of `length` tokens, 2 a multiply-add.

    `mean_keys`: window -> keys that a query sees on average through it; None counts `length` for
    every query (the full convention of PaLM, arXiv:2204.02311 appendix B).
    """
    windows = self.window * (self.num_layers // len(self.window))
    keys = [length if mean_keys is None else mean_keys[w] for w in windows]
    matmuls = self.num_layers * self.layer_matrices() + self.vocab_size * self.embed_dim
    attention = sum(2 * k * self.num_heads * self.widths()['head_dim'] for k in keys)
    return 6.0 * (matmuls + attention)


class State(NamedTuple):
  """A clock and one cache a layer; a pytree, batch first."""

  clock: Clock
  caches: tuple[Cache, ...]


class Block(nnx.Module):
  """One layer: attention and MLP, each behind a norm and beside the residual."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    out_std = config.init_std / math.sqrt(2 * config.num_layers)
    self.rate = config.dropout
    self.attention_norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.attention = Attention(
        dim=config.embed_dim, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, qk_norm=config.qk_norm, norm_epsilon=config.norm_epsilon,
        implementation=config.attention, std=config.init_std, out_std=out_std, rngs=rngs)
    self.mlp_norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.mlp = MLP(config.embed_dim, config.mlp_dim, config.mlp, config.init_std, out_std,
                   rngs=rngs)

  def __call__(self, x_BTD: jax.Array, cache: Cache | None, context: Context, window: int,
               key: jax.Array | None) -> tuple[jax.Array, Cache | None]:
    keys = (None, None) if key is None else jax.random.split(key)
    y_BTD, cache = self.attention(self.attention_norm(x_BTD), cache, context, window)
    x_BTD += dropout(y_BTD, self.rate, keys[0])
    x_BTD += dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, keys[1])
    return x_BTD, cache


def stack(trees: list[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any, count: int) -> list[Any]:
  return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


class Decoder(nnx.Module):
  """hidden, state = decoder(tokens, state, ...); logits = decoder.logits(hidden)."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    config = config.resolved(config.vocab_size)
    self.config = config
    self.embedding = Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs)
    self.positions = (param(rngs, normal(config.init_std), (config.max_length, config.embed_dim),
                            (None, 'embed')) if config.position == 'learned' else None)
    new_block = lambda key: Block(config, rngs=nnx.Rngs(key))
    if config.layer_loop == 'scan':
      # One stack for each place in the window pattern: layers p, p + P, p + 2P, ...
      repeats = config.num_layers // len(config.window)
      blocks = [nnx.vmap(new_block)(jax.random.split(rngs.params(), repeats))
                for _ in config.window]
    else:
      blocks = [new_block(rngs.params()) for _ in range(config.num_layers)]
    self.blocks = nnx.List(blocks)
    self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.head = (None if config.tied else
                 Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs))

  @property
  def state_grows(self) -> bool:
    """Whether the state needs room for every token: some layer sees the whole document."""
    return 0 in self.config.window

  def init_state(self, batch_size: int, capacity: int = 0) -> State:
    """An empty state. `capacity` in tokens: how long the document may get (0: max_length)."""
    config = self.config
    capacity = capacity or config.max_length
    dtype = DTYPES[config.dtype]
    return State(new_clock(batch_size), tuple(
        empty_cache(batch_size, min(window - 1, capacity) if window else capacity,
                    config.num_kv_heads, config.head_dim, dtype)
        for window in config.window * (config.num_layers // len(config.window))))

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
    if config.position == 'rope':
      context = context._replace(
          angles=rotary_angles(context.position_BT, config.head_dim, config.rope_base))
    key = None
    if dropout_key is not None and config.dropout:
      first, key = jax.random.split(dropout_key)
      x_BTD = dropout(x_BTD, config.dropout, first)
    x_BTD, caches = self._layers(x_BTD, state and state.caches, context, key)
    hidden_BTD = self.norm(x_BTD)
    if state is None:
      return hidden_BTD, None
    for window, cache in zip(config.window, caches):
      if not window:
        full_BT = context.index_BT >= cache.index.shape[1]
        hidden_BTD = jnp.where(full_BT[..., None], jnp.nan, hidden_BTD)
    if not self.state_grows:   # else the room ends long before the indices do
      clock, less_B, shift = rebase(clock, math.lcm(*(n for c in caches if (n := c.index.shape[1]))))
      caches = tuple(rebase_cache(cache, less_B, shift) for cache in caches)
    return hidden_BTD, State(clock, caches)

  def _layers(self, x_BTD, caches, context, key):
    config = self.config
    keys = None if key is None else jax.random.split(key, config.num_layers)
    apply = functools.partial(_apply_block, context=context, remat=config.remat)
    pattern, depth = config.window, config.num_layers
    one_by_one = config.layer_loop == 'unrolled'
    if one_by_one or (caches is not None and x_BTD.shape[1] == 1):
      # One token: stacking and unstacking the caches would cost more than the layers.
      parts = [nnx.split(block) for block in self.blocks]
      after = []
      for i in range(depth):
        graphdef, params = parts[i if one_by_one else i % len(pattern)]
        if not one_by_one:
          params = jax.tree.map(lambda x, i=i: x[i // len(pattern)], params)
        x_BTD, cache = apply(graphdef, params, x_BTD, caches and caches[i],
                             None if keys is None else keys[i],
                             window=pattern[i % len(pattern)])
        after.append(cache)
      return x_BTD, tuple(after) if caches is not None else None

    period, repeats = len(pattern), depth // len(pattern)
    graphdefs, params = zip(*(nnx.split(block) for block in self.blocks))
    stacked = None if caches is None else tuple(stack(caches[p::period]) for p in range(period))
    keys = None if keys is None else keys.reshape(repeats, period)

    def one_period(x_BTD, inputs):
      params, caches, keys = inputs
      after = []
      for p in range(period):
        x_BTD, cache = apply(graphdefs[p], params[p], x_BTD, caches and caches[p],
                             None if keys is None else keys[p], window=pattern[p])
        after.append(cache)
      return x_BTD, tuple(after)

    x_BTD, stacked = jax.lax.scan(one_period, x_BTD, (params, stacked, keys))
    if caches is None:
      return x_BTD, None
    by_place = [unstack(s, repeats) for s in stacked]
    return x_BTD, tuple(by_place[i % period][i // period] for i in range(depth))

  def output_embedding_VD(self) -> jax.Array:
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)


def _apply_block(graphdef, params, x_BTD, cache, key, *, context: Context, window: int,
                 remat: str):
  def run(params, x_BTD, cache, key):
    return nnx.merge(graphdef, params)(x_BTD, cache, context, window, key)
  if remat != 'none':
    run = jax.checkpoint(run, policy=REMAT[remat])
  return run(params, x_BTD, cache, key)
