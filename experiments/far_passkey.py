"""A passkey's document of any length, read from the state in calls of a few segments.

Held by: tests/test_experiments.py.
"""

import copy
from typing import Any

import jax
import numpy as np
from flax import nnx

from longctx.data.tasks import token_batches


class Reader:
  """A model as two jitted calls: read a piece of a document, and answer without keeping the question."""

  def __init__(self, graphdef: nnx.GraphDef, params: Any, digits: int):
    model = lambda params: nnx.merge(graphdef, params)

    def ask(params, state, question):
      hidden, _ = model(params)(question, state)
      return model(params).logits(hidden[:, -digits:])

    self.params = params
    self.fresh = jax.jit(lambda params, rows, capacity: model(params).init_state(rows, capacity=capacity),
                         static_argnums=(1, 2))
    self._read = jax.jit(lambda params, state, tokens: model(params)(tokens, state)[1],
                         donate_argnums=1)
    self._ask = jax.jit(ask)

  def of(self, params: Any) -> 'Reader':
    """The same programs with other parameters."""
    other = copy.copy(self)
    other.params = params
    return other

  def read(self, state: Any, tokens: np.ndarray) -> Any:
    return self._read(self.params, state, tokens)

  def ask(self, state: Any, question: np.ndarray) -> np.ndarray:
    """Logits [B, digits, V]."""
    return np.asarray(self._ask(self.params, state, question))


class Document:
  """Rows of a passkey and noise without an end: pieces of `call` segments, the question, the answer."""

  def __init__(self, task: token_batches.Task, rows: int, *, segment: int, call: int, digits: int):
    tokens, targets = task.make(np.random.default_rng(20_000), rows, segment * (call + 1))
    self.first, self.question = tokens[:, :-segment], tokens[:, -segment:]
    self.answer = targets[:, -digits:]
    self.high = task.vocab_size - 1   # the mark: noise is below it

  def piece(self, i: int) -> np.ndarray:
    if i == 0:
      return self.first
    noise = np.random.default_rng((30_000, i)).integers(10, self.high, self.first.shape)
    return noise.astype(np.int32)
