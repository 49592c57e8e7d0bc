"""A stacked LSTM language model; its state is one (h, c) a layer and a clock, of constant size.

Embedding, LSTM layers with dropout between them, an optional projection back to the embedding's
width, and logits by a table that may be tied to the embedding.
Sources: Zaremba et al. 2014, arXiv:1409.2329 (dropout on non-recurrent connections); Press & Wolf
2016, arXiv:1608.05859 (tying); Jozefowicz et al. 2015 (forget bias 1). Differs from PyTorch's
nn.LSTM: one bias instead of a sum of two.
Held by: tests/test_models.py, tests/test_lstm.py.

B batch  T tokens  E recurrent width  D embedding  V vocab  L layers
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import check, check_choice, check_range
from longctx.models.context import Clock, Context, new_clock, place_tokens, rebase
from longctx.models.layers import DTYPES, Embedding, dropout, param
from longctx.parallel.mesh import constrain
from longctx.recurrence.lstm import lstm_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Shape and arithmetic of an LSTM language model."""

  name: str = 'lstm'
  vocab_size: int = 0           # 0: the tokenizer's
  max_length: int = 0           # 0: no limit; the state does not grow
  num_layers: int = 2
  embed_dim: int = 256
  hidden_dim: int = 512
  tied: bool = False
  dropout: float = 0.0
  forget_bias: float = 1.0
  init_std: float = 0.05        # of the embedding and the head
  dtype: str = 'float32'

  def __post_init__(self):
    for name in ('num_layers', 'embed_dim', 'hidden_dim'):
      check_range(f'model.{name}', getattr(self, name), 1)
    for name in ('vocab_size', 'max_length'):
      check_range(f'model.{name}', getattr(self, name), 0)
    check_choice('model.dtype', self.dtype, DTYPES)
    check(0 <= self.dropout < 1, f'model.dropout={self.dropout}: must be at least 0 and below 1')
    check(self.init_std > 0, f'model.init_std={self.init_std}: must be greater than 0')
    check_range('model.forget_bias', self.forget_bias)

  def resolved(self, vocab_size: int) -> 'Config':
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size)

  @property
  def projects(self) -> bool:
    """Whether hidden states are brought back to the embedding's width for tied logits."""
    return self.tied and self.hidden_dim != self.embed_dim

  def layer_matrices(self) -> int:
    inputs = [self.embed_dim] + [self.hidden_dim] * (self.num_layers - 1)
    return sum(4 * self.hidden_dim * (n + self.hidden_dim) for n in inputs)

  def num_parameters(self) -> int:
    """Closed form of the parameter count (needs vocab_size)."""
    head = 0 if self.tied else self.vocab_size * self.hidden_dim
    projection = self.hidden_dim * self.embed_dim if self.projects else 0
    return (self.vocab_size * self.embed_dim + self.layer_matrices()
            + 4 * self.hidden_dim * self.num_layers + projection + head)

  windows = ()   # no layer of it attends

  def mean_keys(self, length: int) -> dict[int, float]:
    del length
    return {}

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward per token, 2 a multiply-add; no term grows with length."""
    del length, mean_keys
    width = self.embed_dim if self.tied else self.hidden_dim
    projection = self.hidden_dim * self.embed_dim if self.projects else 0
    return 6.0 * (self.layer_matrices() + projection + self.vocab_size * width)


class Carry(NamedTuple):
  """h and c of one layer, float32 [B, E]."""

  h: jax.Array
  c: jax.Array


class State(NamedTuple):
  clock: Clock
  layers: tuple[Carry, ...]


def uniform(limit: float):
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)


class Layer(nnx.Module):
  """One LSTM layer: the projection of all inputs at once, then the scan."""

  def __init__(self, input_dim: int, hidden_dim: int, forget_bias: float, *, rngs: nnx.Rngs):
    limit = hidden_dim ** -0.5
    self.hidden_dim = hidden_dim
    self.w_in = param(rngs, uniform(limit), (input_dim, 4, hidden_dim),
                      ('embed', None, 'recurrent'))
    self.w_hidden = param(rngs, uniform(limit), (hidden_dim, 4, hidden_dim),
                          (None, None, 'recurrent'))
    forget_E = jnp.zeros((4, 1)).at[1].set(forget_bias)
    self.bias = param(rngs, lambda key, shape, dtype: jnp.broadcast_to(forget_E, shape),
                      (4, hidden_dim), (None, 'recurrent'))

  def __call__(self, x_BTD: jax.Array, carry: Carry, context: Context
               ) -> tuple[jax.Array, Carry]:
    dtype, width = x_BTD.dtype, 4 * self.hidden_dim
    batch, length, _ = x_BTD.shape
    gates_TBCE = jnp.einsum('BTD,DCE->TBCE', x_BTD, self.w_in.get_value().astype(dtype))
    gates_TBCE += self.bias.get_value().astype(dtype)
    ones_TB1 = jnp.ones((length, batch, 1), jnp.float32)
    keep_TB1 = (ones_TB1 if context.reset_BT is None else
                1.0 - context.reset_BT.T[..., None].astype(jnp.float32))
    valid_TB1 = (ones_TB1 if context.valid_BT is None else
                 context.valid_BT.T[..., None].astype(jnp.float32))
    y_TBE, h_BE, c_BE = lstm_scan(
        gates_TBCE.reshape(length, batch, width),
        self.w_hidden.get_value().astype(dtype).reshape(self.hidden_dim, width),
        carry.h, carry.c, keep_TB1, valid_TB1)
    return jnp.swapaxes(y_TBE, 0, 1).astype(dtype), Carry(h_BE, c_BE)


class LSTM(nnx.Module):
  """hidden, state = lstm(tokens, state, ...); logits = lstm.logits(hidden)."""

  state_grows = False

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.embedding = Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs)
    inputs = [config.embed_dim] + [config.hidden_dim] * (config.num_layers - 1)
    self.layers = nnx.List([Layer(n, config.hidden_dim, config.forget_bias, rngs=rngs)
                            for n in inputs])
    self.projection = (param(rngs, uniform(config.hidden_dim ** -0.5),
                             (config.hidden_dim, config.embed_dim), ('recurrent', 'embed'))
                       if config.projects else None)
    self.head = (None if config.tied else
                 Embedding(config.vocab_size, config.hidden_dim, config.init_std, rngs=rngs))

  def init_state(self, batch_size: int, capacity: int = 0) -> State:
    """Zeros; `capacity` means nothing to a state that does not grow."""
    del capacity
    zeros = jnp.zeros((batch_size, self.config.hidden_dim), jnp.float32)
    return State(new_clock(batch_size), tuple(Carry(zeros, zeros) for _ in self.layers))

  def __call__(self, tokens_BT: jax.Array, state: State | None = None, *,
               positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None
               ) -> tuple[jax.Array, State | None]:
    """Hidden states [B, T, D or E] in the compute type, and the state after these tokens."""
    config = self.config
    context, clock = place_tokens(tokens_BT, state and state.clock, positions_BT,
                                  segment_ids_BT, valid_BT)
    carries = (state or self.init_state(tokens_BT.shape[0])).layers
    keys = (None,) * (config.num_layers + 1)
    if dropout_key is not None and config.dropout:
      keys = jax.random.split(dropout_key, config.num_layers + 1)
    x_BTD = dropout(self.embedding(tokens_BT, DTYPES[config.dtype]), config.dropout, keys[0])
    after = []
    for layer, carry, key in zip(self.layers, carries, keys[1:]):
      x_BTD, carry = layer(x_BTD, carry, context)
      x_BTD = dropout(constrain(x_BTD, 'batch', 'length', None), config.dropout, key)
      after.append(carry)
    if self.projection is not None:
      x_BTD = x_BTD @ self.projection.get_value().astype(x_BTD.dtype)
    return x_BTD, None if state is None else State(rebase(clock)[0], tuple(after))

  def output_embedding_VD(self) -> jax.Array:
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)
