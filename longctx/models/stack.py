"""A stack of layers: one by one, or in one `lax.scan` over periods of their pattern.

`layer_loop='scan'` keeps one stack of parameters for each place in the pattern (layers p, p + P,
p + 2P, ...), so that compile time and program size do not grow with the depth; 'unrolled' keeps each
layer's. A layer is `block(x_BTD, state, context, window, key) -> (x_BTD, state)`; its state is any
pytree, or None where nothing is kept; `context` is the same for all of them.
Held by: tests/test_decoder.py (scan == unrolled, remat), tests/test_encoder_decoder.py.

B batch  T tokens  D model  P period of the pattern of layers
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from longctx import watch
from longctx.models.attention_layer import Attention
from longctx.models.context import Context
from longctx.models.decoder_config import LAYER_INPUT, REMAT, Config
from longctx.models.layers import MLP, RMSNorm, dropout
from longctx.models.mixers import MIXERS


def new_attention(config: Config, rngs: nnx.Rngs) -> Attention:
  return Attention(
      dim=config.embed_dim, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim, qk_norm=config.qk_norm, norm_epsilon=config.norm_epsilon,
      implementation=config.attention, std=config.init_std, out_std=config.out_std, rngs=rngs)


class Block(nnx.Module):
  """One layer: a mixer and an MLP (or none), each behind a norm and beside the residual."""

  def __init__(self, config: Config, mixer: str = 'attention', *, rngs: nnx.Rngs):
    self.rate = config.dropout
    self.mixer_norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.mixer = (new_attention(config, rngs) if mixer == 'attention' else
                  MIXERS[mixer](config.mixer_settings(), rngs=rngs))
    without = config.mlp == 'none'
    self.mlp_norm = None if without else RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)
    self.mlp = None if without else MLP(
        config.embed_dim, config.mlp_dim, config.mlp, config.init_std, config.out_std,
        block=config.mlp_block, rngs=rngs)

  def __call__(self, x_BTD: jax.Array, state: Any, context: Context, window: int,
               key: jax.Array | None) -> tuple[jax.Array, Any]:
    """`state`: what the layer remembers, or None where nothing was before and nothing is kept."""
    keys = (None, None) if key is None else jax.random.split(key)
    y_BTD = self.mixer_norm(x_BTD)
    if isinstance(self.mixer, Attention):
      y_BTD, after = self.mixer(y_BTD, state, context, window)
    else:
      before = self.mixer.init_state(x_BTD.shape[0]) if state is None else state
      y_BTD, after = self.mixer(y_BTD, before, context)
    x_BTD += dropout(y_BTD, self.rate, keys[0])
    if self.mlp is not None:
      x_BTD += dropout(self.mlp(self.mlp_norm(x_BTD)), self.rate, keys[1])
    return x_BTD, None if state is None else after


def new_blocks(config: Config, make: Callable[..., nnx.Module], rngs: nnx.Rngs) -> nnx.List:
  """The layers of a config; make(config, mixer, rngs=...) gives one of them."""
  new_block = lambda mixer: lambda key: make(config, mixer, rngs=nnx.Rngs(key))
  if config.layer_loop == 'unrolled':
    return nnx.List([new_block(mixer)(rngs.params()) for mixer, _ in config.pattern()])
  repeats = config.num_layers // config.period
  return nnx.List([nnx.vmap(new_block(mixer))(jax.random.split(rngs.params(), repeats))
                   for mixer, _ in config.pattern(config.period)])


def layer(config: Config, blocks: Sequence[nnx.Module], i: int) -> nnx.Module:
  """Layer i, or the stack that it is in."""
  return blocks[i % config.period if config.layer_loop == 'scan' else i]


def one(config: Config, blocks: Sequence[nnx.Module], i: int) -> nnx.Module:
  """Layer i, by itself."""
  block = layer(config, blocks, i)
  if config.layer_loop == 'unrolled':
    return block
  graphdef, params = nnx.split(block)
  return nnx.merge(graphdef, jax.tree.map(lambda x: x[i // config.period], params))


def run(config: Config, blocks: Sequence[nnx.Module], x_BTD: jax.Array, states: Sequence[Any] | None,
        context: Any, key: jax.Array | None) -> tuple[jax.Array, tuple[Any, ...] | None]:
  """The last layer's output, and each layer's state after it (None where `states` is None)."""
  keys = None if key is None else jax.random.split(key, config.num_layers)
  apply = functools.partial(_apply, context=context, remat=config.remat)
  period, depth = config.period, config.num_layers
  windows = [window for _, window in config.pattern()]
  one_by_one = config.layer_loop == 'unrolled'
  if one_by_one or (states is not None and x_BTD.shape[1] == 1):
    # One token: stacking and unstacking the states would cost more than the layers.
    parts = [nnx.split(block) for block in blocks]
    after = []
    for i in range(depth):
      watch.tell('layer', index=i)
      graphdef, params = parts[i if one_by_one else i % period]
      if not one_by_one:
        params = jax.tree.map(lambda x, i=i: x[i // period], params)
      x_BTD, state = apply(graphdef, params, x_BTD, states and states[i],
                           None if keys is None else keys[i], window=windows[i])
      after.append(state)
    return x_BTD, tuple(after) if states is not None else None

  repeats = depth // period
  graphdefs, params = zip(*(nnx.split(block) for block in blocks))
  stacked = None if states is None else tuple(stack(states[p::period]) for p in range(period))
  keys = None if keys is None else keys.reshape(repeats, period)

  def one_period(x_BTD, inputs):
    params, states, keys = inputs
    after = []
    for p in range(period):
      x_BTD, state = apply(graphdefs[p], params[p], x_BTD, states and states[p],
                           None if keys is None else keys[p], window=windows[p])
      after.append(state)
    return x_BTD, tuple(after)

  x_BTD, stacked = jax.lax.scan(one_period, x_BTD, (params, stacked, keys))
  if states is None:
    return x_BTD, None
  by_place = [unstack(s, repeats) for s in stacked]
  return x_BTD, tuple(by_place[i % period][i // period] for i in range(depth))


def stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any, count: int) -> list[Any]:
  return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def _apply(graphdef, params, x_BTD, state, key, *, context: Any, window: int, remat: str):
  def run(params, x_BTD, state, key):
    x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
    return nnx.merge(graphdef, params)(x_BTD, state, context, window, key)
  if remat != 'none':
    run = jax.checkpoint(run, policy=REMAT[remat])
  return run(params, x_BTD, state, key)
