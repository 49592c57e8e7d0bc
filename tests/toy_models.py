"""Small models with exactly known answers, under the interface of longctx.models.

`CountModel` is the adaptive order-0 model with Laplace's rule: after the tokens seen so far,
p(v) = (1 + times v was seen) / (V + tokens seen). What it answers depends on every token of the
context and on nothing else, so a window that starts wrongly, a state that is not carried, or a
padding token that is counted changes its loss. What it says at padding is NaN. `TailModel` keeps the
tokens themselves in a state that grows, and says NaN when it was given too little capacity.

B batch  T tokens  S slots  V vocab
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int
  max_length: int = 0
  name: str = 'toy'


class CountModel(nnx.Module):
  """Laplace's rule of succession; hidden is log(1 + counts), logits are hidden."""

  def __init__(self, vocab_size: int, max_length: int = 0, state_grows: bool = False):
    self.config = Config(vocab_size, max_length)
    self.state_grows = state_grows
    self.eye = nnx.Param(jnp.eye(vocab_size))

  def init_state(self, batch_size, capacity=0):
    del capacity
    return jnp.zeros((batch_size, self.config.vocab_size), jnp.int32)

  def __call__(self, tokens_BT, state, positions_BT=None, segment_ids_BT=None, valid_BT=None,
               dropout_key=None):
    TRACES.append(tokens_BT.shape)
    counts_BV = self.init_state(len(tokens_BT)) if state is None else state
    seen_BTV = jax.nn.one_hot(tokens_BT, self.config.vocab_size, dtype=jnp.int32)
    if valid_BT is not None:
      seen_BTV *= valid_BT[:, :, None]
    counts_BTV = jnp.cumsum(seen_BTV, axis=1) + counts_BV[:, None]
    hidden_BTV = jnp.log1p(counts_BTV.astype(jnp.float32))
    if valid_BT is not None:
      hidden_BTV = jnp.where(valid_BT[:, :, None], hidden_BTV, jnp.nan)
    return hidden_BTV, None if state is None else counts_BTV[:, -1]

  def output_embedding_VD(self):
    return self.eye.get_value()

  def logits(self, hidden_BTD):
    return hidden_BTD @ self.eye.get_value().T


class TailModel(CountModel):
  """Predicts, with the counts of the last `tail` tokens; its state is a buffer of `capacity`."""

  tail = 5

  def __init__(self, vocab_size: int, max_length: int = 0):
    super().__init__(vocab_size, max_length, state_grows=True)

  def init_state(self, batch_size, capacity=0):
    return (jnp.full((batch_size, capacity), -1, jnp.int32), jnp.zeros(batch_size, jnp.int32))

  def __call__(self, tokens_BT, state, positions_BT=None, segment_ids_BT=None, valid_BT=None,
               dropout_key=None):
    TRACES.append(tokens_BT.shape)
    if valid_BT is None:
      valid_BT = jnp.ones(tokens_BT.shape, bool)
    def one(carry, x):
      buffer_BS, size_B = carry
      token_B, valid_B = x
      slot_B = jnp.where(valid_B, size_B, buffer_BS.shape[1])
      buffer_BS = buffer_BS.at[jnp.arange(len(size_B)), slot_B].set(token_B, mode='drop')
      size_B = size_B + valid_B
      recent_BS = jnp.arange(buffer_BS.shape[1]) >= size_B[:, None] - self.tail
      seen_BSV = jax.nn.one_hot(jnp.where(recent_BS, buffer_BS, -1), self.config.vocab_size)
      hidden_BV = jnp.log1p(seen_BSV.sum(1))
      spoilt_B = (size_B > buffer_BS.shape[1]) | ~valid_B
      hidden_BV = jnp.where(spoilt_B[:, None], jnp.nan, hidden_BV)
      return (buffer_BS, size_B), hidden_BV
    start = self.init_state(*tokens_BT.shape) if state is None else state
    end, hidden_TBV = jax.lax.scan(one, start, (tokens_BT.T, valid_BT.T))
    return jnp.swapaxes(hidden_TBV, 0, 1), None if state is None else end


TRACES: list[tuple[int, ...]] = []  # shapes of the tokens, one entry a trace of a toy model
