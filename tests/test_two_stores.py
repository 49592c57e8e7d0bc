"""Two stores: with a window exactly what falls out of it is written; without one, the whole segment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models.memories import MEMORIES
from longctx.models.memories.base import Cell, Memory, Past, Settings, there
from tests.compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures('quick_compilation')

B, C, D, OWN = 2, 4, 8, 2   # OWN: tokens of ARMT
WRITERS = {
    'infini': {}, 'compressive': dict(size=4, rate=2), 'memorizing': dict(size=16, top=2),
    'memory_caching': dict(size=3), 'memory_caching gated_delta': dict(size=3),
    'armt': dict(tokens=OWN, width=4), 'ttt': dict(chunk=2),
    **{f'titans {variant}': dict(chunk=2, width=4) for variant in ('mag', 'mac', 'mal', 'memory')}}
QUICK = ('ttt',)
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)
cases = lambda names: [name if name in QUICK else slow(name) for name in names]


def test_every_writer_of_what_falls_out_is_held_to_this():
  falling = {name for name, kind in MEMORIES.items() if kind.falls and name != 'none'}
  assert {name.partition(' ')[0] for name in WRITERS} == falling


def layer(name, window):
  """Without an MLP; no parameter is left as it begins, where a closed one would hide the rest."""
  kind, _, variant = name.partition(' ')
  settings = Settings(dim=D, num_heads=2, num_kv_heads=2, head_dim=4, segment=C, short_term=window, std=0.5,
                      out_std=0.5, mlp='none', position='none', variant=variant, **WRITERS[name])
  graphdef, params = nnx.split(MEMORIES[kind](settings, rngs=nnx.Rngs(0)))
  draw = np.random.default_rng(0)
  noisy = lambda x: x + 0.3 * (np.ptp(x) == 0) * draw.normal(size=x.shape).astype(np.float32)
  return nnx.merge(graphdef, jax.tree.map(noisy, params))


@functools.cache
def drawn(*shape):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def read(block, x_BCD, memory):
  """The memory after a segment."""
  x_BCD = jnp.concatenate([x_BCD, drawn(B, OWN, D)[:, :block.back]], axis=1)
  cell = Cell(jnp.ones(x_BCD.shape[:2], bool), jnp.ones(B, jnp.int32))
  return block(x_BCD, memory, cell, None)[1]


def written(store):
  """Without what a reader saw last, what waits in a window, and slots that hold nothing."""
  if isinstance(store, Past):
    return store._replace(hidden=jnp.where(there(store)[..., None], store.hidden, 0))
  return store._replace(asked=(), waiting=()) if hasattr(store, 'asked') else store


@pytest.mark.parametrize('window', [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', cases(WRITERS))
def test_exactly_the_tokens_that_fall_out_of_the_window_are_written(name, window):
  """Each token of window and segment is moved by itself, and what was written looked at, bit for bit."""
  block, count = layer(name, window), jnp.array([window, C if window > C else 0])   # a full one, a new one

  def after(j):
    move = jnp.where(jnp.arange(window + C) == j, 1.0, 0.0)[:, None] * drawn(D)
    held = lambda *key: Past(drawn(B, window, D, *key).reshape(B, window, D) + move[:window], count)
    memory = Memory(held(), block.init_store(B))
    if getattr(memory.store, 'waiting', None) is not None:   # with it what attention made of it
      memory = memory._replace(store=memory.store._replace(waiting=held(1)))
    return written(read(block, drawn(B, C, D) + move[window:], memory).store)

  unmoved, *moved = zip(*map(np.asarray, jax.tree.leaves(
      jax.jit(lambda: jax.lax.map(after, jnp.arange(-1, window + C)))())))
  for b in range(B):
    felt = [j for j, stores in enumerate(moved)
            if any((x[b] != y[b]).any() for x, y in zip(stores, unmoved))]
    # The first C of window and segment fall; of the window's slots the last `count` hold a token.
    assert felt == [j for j in range(C) if j >= window - count[b]]


@pytest.mark.parametrize('name', cases([
    'ttt', 'armt', 'infini', 'memory_caching', 'memory_caching gated_delta', 'titans mag', 'titans memory']))
def test_without_a_window_the_whole_segment_is_written(name):
  """What a window of one segment lets fall a segment later.

  Held where what is written does not hang on what is read; of ARMT's the first segment, which reads
  nothing.
  """
  late, at_once = layer(name, C), layer(name, 0)
  own = dict(nnx.to_flat_state(nnx.state(late)))
  nnx.update(at_once, nnx.from_flat_state(
      {path: own[path] for path, _ in nnx.to_flat_state(nnx.state(at_once))}))
  segments = 1 if name == 'armt' else 2

  def stores(block, count):
    memory = block.init_memory(B)
    for s in range(count):
      memory = read(block, drawn(B, 3, C, D)[:, s], memory)
    store = written(memory.store)
    return store.memory if name.startswith('titans') else store   # its convolution sees q too at once
  found = jax.jit(lambda: (stores(late, segments + 1), stores(at_once, segments), stores(at_once, 0)))()
  changed = False
  for a, b, begin in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    changed |= bool((b != begin).any())
  assert changed
