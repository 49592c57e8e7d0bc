"""What every segment memory keeps, and that it counts: laws besides those of tests/test_models.py.

A new memory is held to them by its line in MODELS there. All run that file's programs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import small_training
from longctx import store
from longctx.data.tasks.token_batches import TASKS, UNSCORED
from longctx.models import memory_config, memory_decoder
from longctx.models.memories import MEMORIES
from tests.compilation import quick_compilation  # noqa: F401
from tests.test_models import MODELS, SLOW, built, made, memory, tokens

pytestmark = pytest.mark.usefixtures('quick_compilation')

ALL = [name for name, config in MODELS.items() if config.name == 'memory']
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALL]
STEP = 8   # tokens of a call; segments are of 5 or 6, so that each call ends within one


@functools.cache
def half_read(name):
  """The state of two rows amid the third or fourth segment."""
  model, call = made(name)
  state = model.init_state(2)
  for start in (0, STEP):
    _, state = call(tokens()[:, start:start + STEP], state)
  return state


def ending(name, state):
  """(hidden states of the last tokens, the state after them)."""
  return made(name)[1](tokens()[:, 2 * STEP:3 * STEP], state)


def same_bits(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_memory_is_held_to_these_laws():
  assert set(MEMORIES) == {MODELS[name].long_term for name in ALL}


@pytest.mark.parametrize('name', NAMES)
def test_saved_amid_a_segment_it_goes_on_bit_for_bit(name, tmp_path):
  model, state = made(name)[0], half_read(name)
  assert (np.asarray(state.count) > 0).all()
  assert (np.asarray(state.number) == 2 * STEP // model.config.segment).all()
  who = store.identify(model.config, nnx.state(model), 'bytes')
  rows = []
  for row in range(2):
    path = tmp_path / f'{row}.lcm'
    store.save(path, store.take(state, who, row=row, tokens=2 * STEP))
    rows.append(store.state_of(store.load(path, who), model.init_state))
  restored = jax.tree.map(lambda *x: np.concatenate(x), *rows)
  same_bits(restored, state)
  same_bits(ending(name, restored), ending(name, state))


# Of a row's memory under bfloat16, by the last name: all else adds up, or is read by what does, and is float32.
KEPT_AS_IT_CAME = ('hidden', 'k', 'v')   # hidden states, and Memorizing's keys and values: bfloat16
COUNTED = ('count', 'written')           # int32


def kept_as_it_came(config):
  """Numbers of a row, all layers together, that are no sums: 2 bytes each under bfloat16."""
  c, D = config, config.embed_dim
  heads = (c.num_kv_heads or c.num_heads) * D // c.num_heads
  own = {
      'compressive': (c.memory_size or c.short_term) * D, 'memorizing': 2 * c.memory_size * heads,
      'titans': c.short_term * D * (c.memory_variant == 'mac'),           # what waits beside the window
      'memory_caching': 3 * D * (c.memory_width > 0 or 'rglru' in c.memory_variant),   # a convolution of 4 taps
  }.get(c.long_term, 0)
  return c.num_layers * c.short_term * D + len(c.memory_layers or range(c.num_layers)) * own


@pytest.mark.parametrize('name', ALL)
def test_it_keeps_as_many_numbers_and_bytes_as_declared(name):
  """Under bfloat16, before and after a call."""
  config = dataclasses.replace(MODELS[name], dtype='bfloat16')
  def states():
    model = memory_decoder.MemoryDecoder(config, rngs=nnx.Rngs(0))
    before = model.init_state(1)
    return before, model(tokens()[:1, :STEP], before)[1]
  declared = sum(facts.state for facts in MODELS[name].layer_facts(24))
  for state in jax.eval_shape(states):
    kept = store.context.named(state.memory)
    assert sum(math.prod(x.shape) for x in kept.values()) == declared
    for path, x in kept.items():
      last = path.split('.')[-1]
      assert x.dtype == ('bfloat16' if last in KEPT_AS_IT_CAME else 'int32' if last in COUNTED else 'float32'), path
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in kept.values()) == (
        4 * declared - 2 * kept_as_it_came(config))


def loss(name, state):
  """Mean negative log-likelihood of the last tokens, by row, in float64."""
  logits = np.asarray(made(name)[0].logits(ending(name, state)[0]), np.float64)[:, :-1]
  logits -= logits.max(-1, keepdims=True)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  targets = np.asarray(tokens())[:, 2 * STEP + 1:, None]
  return -np.take_along_axis(logp, targets, axis=-1).mean((1, 2))


@pytest.mark.parametrize('name', NAMES)
def test_zeroing_what_it_remembers_changes_the_loss(name):
  """Each store by itself: none of them is carried along and never read."""
  state = half_read(name)
  whole = loss(name, state)
  zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  kept = state.memory
  layers = lambda change: kept._replace(layers=tuple(map(change, kept.layers)))
  parts = {'tokens': kept._replace(tokens=zero(kept.tokens)),
           'short term': layers(lambda m: m._replace(past=zero(m.past))),
           'long term': layers(lambda m: m._replace(store=zero(m.store)))}
  heard = set()
  for part, without in parts.items():
    if any((a != b).any() for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(without))):
      changed = np.abs(loss(name, state._replace(memory=without)) - whole)
      assert (changed > 1e-5).all(), part
      heard.add(part)
  config = MODELS[name]
  assert heard == ({'short term'} if config.short_term else set()) | (
      {'none': set(), 'rmt': {'tokens'}}.get(config.long_term, {'long term'}))


TRAINED = {   # and for how many steps
    'transformer_xl': (150, dict(short_term=8)),
    'compressive': (150, dict(long_term='compressive', short_term=2, memory_rate=1, memory_size=8)),
    'infini': (150, dict(long_term='infini')),
    'memorizing': (150, dict(long_term='memorizing', memory_size=16, memory_top=4)),
    'block_recurrent': (400, dict(long_term='block_recurrent', memory_variant='lstm', memory_tokens=4)),
    'armt': (150, dict(long_term='armt', memory_tokens=2, memory_width=16)),
    'ttt': (150, dict(long_term='ttt')),
    'memory_caching': (150, dict(long_term='memory_caching', memory_size=4)),
    **{f'titans {variant}': (400, dict(long_term='titans', memory_variant=variant, memory_width=32, memory_rate=1))
       for variant in ('memory', 'mag', 'mal')},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAINED)
def test_a_trained_memory_is_what_knows(name):
  """Trained to tell which value came with each of two keys; zeroed before it is asked, it guesses."""
  steps, settings = TRAINED[name]
  task, segment = TASKS['segment_recall'], 2
  config = memory_config.Config(vocab_size=task.vocab_size, num_layers=2, embed_dim=64, num_heads=2, mlp='gelu',
                                init_std=0.1, remat='none', segment=segment, **settings)
  programs, rng = small_training.programs(config, segment, steps), np.random.default_rng(0)
  batches = (task.make(rng, 64, 8) for _ in range(steps))
  model = nnx.merge(programs.graphdef, small_training.train(programs, batches, steps, 3e-3, 0).params)
  tokens, targets = task.make(rng, 256, 8)
  _, state = model(tokens[:, :4], model.init_state(256))
  asked = targets[:, 4:] != UNSCORED
  def accuracy(memory):
    hidden, _ = model(tokens[:, 4:], state._replace(memory=memory))
    return (np.asarray(model.logits(hidden).argmax(-1)) == targets[:, 4:])[asked].mean()
  assert accuracy(state.memory) > 0.9
  assert accuracy(jax.tree.map(jnp.zeros_like, state.memory)) < 0.3


def written(state):
  """What is in the long-term memories; without what a reader saw last, and what waits in a window."""
  stores = [m.store for m in state.memory.layers]
  return state.memory.tokens, [s._replace(asked=(), waiting=()) if hasattr(s, 'asked') else s for s in stores]


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in ALL if MODELS[name].short_term and MODELS[name].long_term != 'none'])
def test_a_token_is_written_when_it_falls_out_of_the_window_and_no_sooner(name):
  """The window's oldest token, bit for bit, is not yet in the long-term memory; the one before it is."""
  config, (model, call) = MODELS[name], made(name)
  oldest = 2 * STEP // config.segment * config.segment - config.short_term
  def after_another(at):
    other, state = tokens().at[:, at].add(1) % config.vocab_size, model.init_state(2)
    for start in (0, STEP):
      _, state = call(other[:, start:start + STEP], state)
    return jax.tree.leaves(written(state))
  same = lambda at: [np.array_equal(a, b) for a, b in zip(
      after_another(at), jax.tree.leaves(written(half_read(name))), strict=True)]
  assert not all(same(oldest - 1))
  assert all(same(oldest)) == MEMORIES[config.long_term].falls


def test_a_model_says_what_its_memory_is_written_with():
  """--mode=describe has it from here."""
  of = {name: memory_config.Config(long_term=name, segment=6, short_term=6).layer_facts(8)[0].name
        for name in MEMORIES}
  assert of['none'] == 'attention, 6 kept'
  assert {name for name, says in of.items() if says == f'{name} of each segment, 6 kept'} == {
      'rmt', 'block_recurrent'}
  assert {name for name, says in of.items() if says == f'{name} of what falls out, 6 kept'} == (
      set(MEMORIES) - {'none', 'rmt', 'block_recurrent'})


# --- Corners of two that have none of their own; the others' files have theirs.


CORNER = {'infini': memory('infini', segment=4, mlp='none'),
          'rmt': memory('rmt', segment=4, memory_tokens=2, mlp='none')}


@functools.cache
def sloped(name):
  """(parameters, f(parameters, tokens) -> (loss, gradients)) of two segments, the first of all too."""
  graphdef, params = nnx.split(built(CORNER[name]))
  def loss(params, tokens):
    model = nnx.merge(graphdef, params)
    logits = model.logits(model(tokens)[0])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()
  return params, jax.jit(jax.value_and_grad(loss))


CASES = [(name, corner) for name in CORNER
         for corner in ('as drawn', 'keys of zeros', 'an open gate', 'a shut gate', 'only zeros')
         if name == 'infini' or 'gate' not in corner]


@pytest.mark.parametrize('name, corner', CASES)
def test_gradients_are_finite_in_the_corners(name, corner):
  params, run = sloped(name)
  params = jax.tree.map(lambda x: x, params)
  block = params['blocks'][0]
  put = lambda leaf, value: leaf.set_value(jnp.full_like(leaf.get_value(), value))
  if corner == 'keys of zeros':
    w_kv = block['mixer']['w_kv']
    w_kv.set_value(w_kv.get_value().at[:, 0].set(0))
  if 'gate' in corner:
    put(block['gate'], 1e4 if 'open' in corner else -1e4)
  if corner == 'only zeros':
    params = jax.tree.map(jnp.zeros_like, params)
  value, grads = run(params, tokens()[:, :8])
  assert np.isfinite(value)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  if corner == 'as drawn':   # and none of what the memory is made of is deaf
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', ['infini', 'memorizing', 'two stores'])
def test_gates_begin_at_zero(name):
  """Half open as a sigmoid, shut as a tanh. At +10, as in public code, no head would hear its own segment."""
  model = memory_decoder.MemoryDecoder(MODELS[name], rngs=nnx.Rngs(0))
  gates = [block.gate.get_value() for block in model.blocks if getattr(block, 'gate', None) is not None]
  assert gates
  assert not any(np.asarray(gate).any() for gate in gates)


def test_what_tokens_carry_is_float32_whatever_the_arithmetic():
  config = dataclasses.replace(CORNER['rmt'], dtype='bfloat16')
  model = memory_decoder.MemoryDecoder(config, rngs=nnx.Rngs(0))
  state = model.init_state(2)
  _, after = jax.eval_shape(model, tokens()[:, :8], state)
  assert state.memory.tokens.dtype == after.memory.tokens.dtype == jnp.float32
  _, after = jax.eval_shape(lambda: model.read_segments(
      tokens()[:, :8].reshape(2, 2, 4), jnp.ones((2, 2, 4), bool), jnp.zeros(2, jnp.int32),
      model.fresh(2)))
  assert after.tokens.dtype == jnp.float32

