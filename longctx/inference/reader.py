"""One text, read and carried on by a model, for as long as one likes and across processes.

Tokens go through the model in chunks of one fixed size, counted from the text's begin, and what is left of
a chunk waits in the tail: however a text is cut into calls of `read`, the model sees the same chunks, and a
context saved between two calls is carried on bit for bit. Generating reads the tail first. Where the model
reads in segments a chunk is whole segments, so that each token is computed once.
Held by: tests/test_chat.py.

B batch (1)  T tokens  D model
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from longctx import store
from longctx.errors import check
from longctx.inference import sampling as s
from longctx.models import attention_layer
from longctx.parallel import device_memory, mesh


class Reader:
  """What a model remembers of one text. `tokens` were given or made so far, the tail's counted."""

  def __init__(self, graphdef: nnx.GraphDef, params: Any, identity: store.Identity, *,
               first_token: int, banned: Sequence[int] = (), capacity: int = 0, chunk: int = s.CHUNK,
               layout: mesh.Layout | None = None):
    """Allocates nothing: `begin` an empty text, or `restore` one.

    Args:
      graphdef, params: the two halves of `nnx.split(model)`.
      identity: of the model, for contexts.
      first_token: the separator, which begins every text and ends what is made.
      banned: ids that are never chosen.
      capacity: tokens that a state that grows has room for; 0: the model's max_length.
      chunk: tokens a call of the model, at least.
      layout: the mesh that `params` are on; None: one device.
    """
    self.model = nnx.merge(graphdef, params)
    self.graphdef, self.params, self.identity = graphdef, params, identity
    self.first_token, self.banned, self.layout = first_token, banned, layout
    config = self.model.config
    self.chunk = s.whole_segments(chunk, config)
    # Without room for more, a cache that sees everything and learned positions give NaN.
    self.is_bound = self.model.state_grows or getattr(config, 'position', '') == 'learned'
    most = getattr(config, 'max_length', 0)
    check(not capacity or not most or capacity <= most, f'--capacity={capacity}: must be at most '
          f'model.max_length={most}, the longest context that the model is made for')
    check(not capacity or self.is_bound, f'--capacity={capacity}: does nothing with this model, whose '
          'memory does not grow with the text; leave it out')
    self.capacity = (capacity or most) if self.is_bound else 0
    check(self.capacity > 0 or not self.is_bound, '--capacity=0: the state of this model grows, and '
          'its max_length is 0; say for how many tokens there must be room, such as --capacity=4096')
    self.memory: s.Memory | None = None
    self.tokens = 0

  def another(self) -> 'Reader':
    """For another text of the same model."""
    return Reader(self.graphdef, self.params, self.identity, first_token=self.first_token,
                  banned=self.banned, capacity=self.capacity, chunk=self.chunk, layout=self.layout)

  def _run(self, sampling: s.Sampling = s.Sampling()) -> s.Programs:
    """For reading the default does, so that no other setting compiles it again."""
    return s.programs(self.graphdef, sampling, self.first_token, tuple(self.banned), self.layout)

  def init_state(self, batch_size: int, capacity: int) -> Any:
    return self.model.init_state(batch_size, capacity=capacity)

  def begin(self) -> None:
    """An empty text; what was remembered is forgotten."""
    self.memory = None   # gives its room back
    self.check_fits(self.capacity)
    self.memory = s.Memory(self._run().fresh(1, self.capacity, self.params),
                           [np.array([self.first_token], np.int32)])
    self.tokens = 1

  def check_fits(self, capacity: int) -> None:
    """ConfigError, with numbers, if a state for so many tokens is larger than the device's memory."""
    shapes, shardings = self._shapes(capacity)
    devices = [None] if self.layout is None else list(self.layout.mesh.devices.flat)
    device = devices[0] or jax.local_devices()[0]
    need = sum(math.prod(x.shape if sharding is None else sharding.shard_shape(x.shape))
               * x.dtype.itemsize for x, sharding in zip(jax.tree.leaves(shapes), shardings))
    need *= len(devices) if device.platform == 'cpu' else 1   # CPU devices share one memory
    free = device_memory.free_bytes(device)
    check(free is None or need <= free, f'the memory of this model takes {need:,} bytes of a device'
          f'{f" with room for {capacity:,} tokens" * (capacity > 0)}, and {device.device_kind} has '
          f'{free or 0:,} left; give a smaller --capacity where the state grows, or more devices with '
          '--seq')

  def _shapes(self, capacity: int) -> tuple[Any, list[Any]]:
    """The state's shapes, and the sharding of each of its arrays (None: one device)."""
    shapes = jax.eval_shape(lambda: self.init_state(1, capacity))
    if self.layout is None:
      return shapes, [None] * len(jax.tree.leaves(shapes))
    return shapes, jax.tree.leaves(attention_layer.shardings(self.layout, shapes))

  @property
  def num_bytes(self) -> int:
    """Of the state, all devices together."""
    return sum(x.nbytes for x in jax.tree.leaves(self.memory.state))

  @property
  def waiting(self) -> int:
    """Tokens in the tail."""
    return len(self.memory.tail[0])

  @property
  def _call(self) -> int:
    """Tokens of the next call: a chunk, or what one lacks that was begun token by token."""
    return self.chunk - (self.tokens - self.waiting) % self.chunk

  @property
  def room(self) -> float:
    """How many more tokens the state can take."""
    return self.capacity - self.tokens if self.is_bound else math.inf

  def check_room(self, count: int, what: str) -> None:
    check(count <= self.room, f'{what}: {count:,} tokens more than the {self.tokens:,} so far are '
          f'{self.tokens + count:,}; this context has room for {self.capacity:,}. /forget empties it')

  def read(self, tokens: Sequence[int] | np.ndarray, *, stop: Callable[[], bool] = lambda: False,
           after_chunk: Callable[[], None] = lambda: None) -> int:
    """Takes more of the text; returns how many tokens it took, fewer only if `stop()` said so."""
    tokens = np.asarray(tokens, np.int32)
    self.check_room(len(tokens), 'read')
    before = self.waiting
    self.memory.tail = [np.concatenate([self.memory.tail[0], tokens])]
    self.tokens += len(tokens)   # now: whatever ends this call, state and tail are the text
    given, run = before + len(tokens), self._run()
    while self.waiting > self._call and not stop():
      s.read_chunk(run, self.params, self.memory, self.chunk, self._call)
      after_chunk()
    back = 0
    if self.waiting > self._call:   # stopped: what waits of these tokens is given back
      kept = max(0, before - (given - self.waiting))
      back = self.waiting - kept
      self.memory.tail = [self.memory.tail[0][:kept]]
      self.tokens -= back
    return len(tokens) - back

  def read_tail(self) -> None:
    """Reads what waits, so that the state alone has seen the whole text."""
    if self.waiting:
      s.read_tail(self._run(), self.params, self.memory, self.chunk)

  def generate(self, *, max_new_tokens: int, sampling: s.Sampling, seed: int = 0) -> Iterator[int]:
    """Carries the text on; it stands after the tokens handed out, whenever one ceases to ask for more.

    The draw depends on the seed and on how many tokens the text has, so that one saved and loaded
    goes on as it would have.
    """
    if not self.waiting:
      raise ValueError('nothing to carry on from: the last token was read already; read one more')
    self.check_room(1, 'generate')
    hidden_BD = s.read_tail(self._run(), self.params, self.memory, self.chunk)
    draw = int(np.random.SeedSequence([seed, self.tokens]).generate_state(1)[0] >> 1)
    for token_B in s.decode(self._run(sampling), self.params, hidden_BD, self.memory,
                            max_new_tokens=int(min(max_new_tokens, self.room)),
                            stop_token=self.first_token, seed=draw):
      self.tokens += 1
      yield int(token_B[0])

  def check_finite(self, what: str) -> None:
    """FloatingPointError where what is remembered is NaN or infinite; what waits was not read yet."""
    store.check_finite(self.memory.state, what)

  def context(self) -> store.Context:
    """All of it, to be saved; FloatingPointError where it is not finite."""
    return store.take(self.memory.state, self.identity, capacity=self.capacity,
                      tokens=self.tokens - self.waiting, tail=self.memory.tail[0].tolist())

  def restore(self, context: store.Context, where: str = 'the context') -> None:
    """Carries on from a context of the same model."""
    header = context.header
    store.check_same(header.identity, self.identity, where)
    state = store.state_of(context, self.init_state, where)
    self.check_fits(header.capacity)
    self.memory = None
    _, shardings = self._shapes(header.capacity)
    put = lambda x, sharding: jax.device_put(x, sharding, may_alias=False)   # it will be donated
    leaves = [put(x, sharding) for x, sharding in zip(jax.tree.leaves(state), shardings)]
    state = jax.tree.structure(state).unflatten(leaves)
    bad = store.spoilt(state)
    check(not bad, f'{where}: {bad} in it is NaN or infinite, and must be finite: nothing can be read on from it; '
          'delete it (python -m longctx.contexts delete NAME --store=DIR), or give another')
    self.memory = s.Memory(state, [np.array(header.tail, np.int32)])
    self.capacity = header.capacity
    self.tokens = header.tokens + len(header.tail)

  def merge(self, other: 'Reader') -> None:
    """Adds another text of the same model to what is remembered; where memories add."""
    rule = getattr(self.model, 'merge_states', None)
    # Before the tails are read: where it cannot be, both stay as they are.
    store.check_merge((self.identity, other.identity), (self.capacity, other.capacity), rule)
    self.model.check_merge(self.tokens, other.tokens)
    self.read_tail()
    other.read_tail()
    self.restore(store.merge(self.context(), other.context(), rule, self.init_state))
