"""Every order in which segments may be read gives what one after the other gives; on a mesh as well.

With dropout: all of them drop the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models import memory_config, memory_decoder, schedules
from longctx.models.memories import MEMORIES
from longctx.parallel import aot, mesh
from tests.test_models import MODELS, VOCAB, built, memory

B, S, DROPOUT = 2, 4, 0.2
KEY = jax.random.key(5)
dependency = lambda config: MEMORIES[config.long_term].dependency
# Diagonals are of two layers at least.
MEMORY = {name: dataclasses.replace(config, num_layers=2) if dependency(config) == 'P2' else config
          for name, config in MODELS.items() if config.name == 'memory'}
SIDE_BY_SIDE = [name for name, c in MEMORY.items() if dependency(c) in ('P0', 'P1')]
DIAGONAL = [name for name, c in MEMORY.items() if dependency(c) == 'P2']
# Of one mechanism one variant, and of the rest those whose maps or FIFOs are their own.
QUICK = ('transformer_xl', 'infini', 'compressive', 'memorizing', 'armt')
marked = lambda names: [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@functools.cache
def sizes(name, rows=B):
  return jax.random.randint(jax.random.key(2), (rows, S, MEMORY[name].segment), 0, VOCAB)


def read(name, schedule, truncate=0, layout=None, rows=B):
  """(a sum over hidden states, hidden states, memory after), and the gradient of the sum."""
  model = built(dataclasses.replace(MEMORY[name], truncate=truncate, dropout=DROPOUT))
  graphdef, params = nnx.split(model)
  tokens = sizes(name, rows)

  def run(params, tokens):
    model = nnx.merge(graphdef, params)
    hidden, memory = model.read_segments(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(rows, jnp.int32),
                                         model.fresh(rows), KEY, schedule, every=0)
    return (hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))).sum(), (hidden, memory)

  run = jax.value_and_grad(run, has_aux=True)
  if layout is None:
    return jax.jit(run)(params, tokens)
  params = jax.device_put(params, layout.params_sharding(params))   # as in training
  tokens = jax.device_put(tokens, layout.sharding('batch', 'length', None))
  return jax.jit(mesh.under(layout, run))(params, tokens)


def close(a, b, tolerance=3e-5):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    scale = max(1.0, float(np.abs(y).max(initial=0)))   # some have no number
    np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=tolerance,
                               err_msg=jax.tree_util.keystr(path))


one_by_one = functools.cache(
    lambda name, truncate=0, rows=B: read(name, 'sequential', truncate, rows=rows))


@pytest.mark.parametrize('name', marked(SIDE_BY_SIDE))
def test_all_segments_at_once(name):
  close(read(name, 'parallel'), one_by_one(name))


@pytest.mark.parametrize('name', marked([n for n in SIDE_BY_SIDE if MEMORIES[MEMORY[n].long_term].deals]))
def test_groups_of_segments_side_by_side(name, monkeypatch):
  monkeypatch.setattr(schedules, 'AT_ONCE', 2 * B * MEMORY[name].segment)
  assert schedules._groups(B, S, MEMORY[name].segment) == 2
  close(read(name, 'parallel'), one_by_one(name))


def test_groups_are_of_all_devices_that_a_row_is_cut_over(monkeypatch):
  monkeypatch.setattr(schedules, 'AT_ONCE', 6)
  assert schedules._groups(B, S, 6) == 4
  with mesh.use(mesh.make_layout(mesh.Config(data=2, seq=2, layout='sequence'), jax.devices()[:4])):
    assert schedules._groups(B, S, 6) == 2
    assert schedules._groups(B, 5, 6) == 1


@pytest.mark.parametrize('name', marked(DIAGONAL))
def test_a_wavefront_over_layers_and_segments(name):
  close(read(name, 'wavefront'), one_by_one(name))


@pytest.mark.parametrize('name,schedule', [
    ('infini', 'parallel'), pytest.param('memory caching', 'parallel', marks=pytest.mark.slow),
    pytest.param('armt', 'wavefront', marks=pytest.mark.slow)])
def test_truncated_gradients_are_those_of_the_sequence(name, schedule):
  whole = one_by_one(name)
  close(read(name, schedule, truncate=2), one_by_one(name, truncate=2))
  difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[1], one_by_one(name, truncate=2)[1])
  assert max(jax.tree.leaves(difference)) > 1e-3   # there was something to cut off


def test_the_memory_matters():
  """Another first segment changes what is said in the last: the schedules are not equal for nothing."""
  for name in ('transformer_xl', 'infini', 'armt', 'rmt'):
    model = built(dataclasses.replace(MEMORY[name], dropout=DROPOUT))
    state = one_by_one(name)[0][1][0]
    other = sizes(name).at[:, S - 2].add(1) % VOCAB
    hidden, _ = jax.jit(lambda tokens, model=model: model.read_segments(
        tokens, jnp.ones(tokens.shape, bool), jnp.zeros(B, jnp.int32), model.fresh(B),
        KEY, 'sequential'))(other)
    assert np.abs(np.asarray(hidden[:, -1]) - np.asarray(state[:, -1])).max() > 1e-3, name


@functools.cache
def temporary(name, segments, whole, remat):
  """Bytes that a gradient needs besides parameters and gradients, from tokens to hidden states."""
  config = dataclasses.replace(LONG[name], remat=remat)
  model = nnx.eval_shape(lambda: memory_decoder.MemoryDecoder(config, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  def loss(params, tokens):
    valid = None if whole else jnp.ones(tokens.shape, bool)
    return (nnx.merge(graphdef, params)(tokens, valid_BT=valid)[0] ** 2).sum()
  tokens = jax.ShapeDtypeStruct((1, segments * config.segment), jnp.int32)
  return aot.memory_of(jax.jit(jax.grad(loss)).lower(params, tokens).compile()).temporary


long = functools.partial(memory, segment=16, mlp='gelu', mlp_dim=16 * 16, schedule='sequential')
LONG = {'infini': long('infini'), 'rmt': long('rmt', memory_tokens=2),
        'titans': long('titans', memory_chunk=8)}


def growth(name, whole, remat):
  """(bytes a segment from 4 segments to 16, of the states it carries, of its tokens' hidden states)."""
  config, few, many = LONG[name], 4, 16
  more = temporary(name, many, whole, remat) - temporary(name, few, whole, remat)
  state = 4 * sum(facts.state for facts in config.layer_facts(config.segment))
  return more / (many - few), state, 4 * config.segment * config.embed_dim


@pytest.mark.parametrize('name, whole', [('infini', True), *(
    pytest.param(name, whole, marks=pytest.mark.slow) for name in LONG for whole in (True, False)
    if (name, whole) != ('infini', True))])
def test_memory_of_training_grows_by_the_carried_states_alone(name, whole, optimized):
  """Read one by one, as whole rows or as documents anywhere; beside them what the loss is made of."""
  more, state, hidden = growth(name, whole, 'full')
  assert state <= more <= state + 2 * hidden


@pytest.mark.slow
@pytest.mark.parametrize('name', ['infini', 'transformer_xl'])
def test_memory_of_segments_side_by_side_grows_by_inputs_and_memories(name, optimized, monkeypatch):
  """Of a group alone a device holds what a layer makes: a fifth, and less, of that of all at once."""
  LONG[f'{name} at once'] = long('none', short_term=16) if name == 'transformer_xl' else long('infini')
  LONG[f'{name} at once'] = dataclasses.replace(LONG[f'{name} at once'], schedule='auto')
  more = []
  for at_once in (schedules.AT_ONCE, 32):
    monkeypatch.setattr(schedules, 'AT_ONCE', at_once)
    temporary.cache_clear()
    more.append(growth(f'{name} at once', True, 'full')[0])
  assert more[1] < more[0] / 5


@pytest.mark.slow
def test_without_rematerialisation_it_grows_by_all_that_a_layer_makes(optimized):
  more, state, hidden = growth('infini', True, 'none')
  assert more > state + 50 * hidden


@pytest.mark.slow
@pytest.mark.parametrize('name', MEMORY)
def test_aligned_rows_give_what_rows_of_any_documents_do(name):
  """A document carried on, one that ends in padding, and one that begins; in the default schedule."""
  config = dataclasses.replace(MEMORY[name], truncate=2, dropout=DROPOUT)
  graphdef, params = nnx.split(built(config))
  T = 2 * config.segment
  tokens = jax.random.randint(jax.random.key(3), (2, B, T), 0, VOCAB)
  ids = jnp.array([[[1] * T, [5] * (T - 1) + [0]], [[1] * T, [6] * T]])

  @functools.partial(jax.jit, static_argnums=1)
  def run(params, aligned):
    def total(params):
      model, out = nnx.merge(graphdef, params), []
      state = model.init_state(B)
      for i in range(2):
        hidden, state = model(tokens[i], state, segment_ids_BT=ids[i], aligned=aligned, dropout_key=KEY)
        out.append(jnp.where((ids[i] > 0)[..., None], hidden, 0))
      state = state._replace(tail=jnp.where(state.count[:, None] > 0, state.tail, 0))
      return sum((x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum() for x in out), (out, state)
    return jax.value_and_grad(total, has_aux=True)(params)

  (_, (_, state)), _ = found = run(params, True)
  assert list(state.number) == [4, 2] and not np.asarray(state.count).any()
  close(found, run(params, False))


@pytest.mark.parametrize('name,sizes_of_mesh', [
    ('transformer_xl', dict(data=2, seq=4, layout='sequence')),
    ('infini', dict(data=1, seq=4, model=2, layout='sequence')),
    ('armt', dict(data=4, model=2, layout='tensor')),
    pytest.param('infini', dict(data=2, seq=2, model=2, layout='sequence'), marks=pytest.mark.slow),
    pytest.param('memory caching', dict(data=2, seq=4, layout='sequence'), marks=pytest.mark.slow),
    pytest.param('caching behind a window', dict(data=2, seq=4, layout='sequence'),
                 marks=pytest.mark.slow),
    pytest.param('compressive', dict(data=2, seq=4, layout='sequence'), marks=pytest.mark.slow),
    pytest.param('memorizing', dict(data=2, seq=4, layout='sequence'), marks=pytest.mark.slow),
    pytest.param('two stores', dict(data=2, seq=2, model=2, layout='sequence'), marks=pytest.mark.slow),
    *(pytest.param(name, dict(data=4, model=2, layout='tensor'), marks=pytest.mark.slow)
      for name in ('transformer_xl', 'compressive', 'memory caching', 'rmt', 'memorizing', 'block_recurrent',
                   'block_recurrent lstm', 'titans mag', 'titans mac', 'titans mal', 'titans alone',
                   'titans behind a window', 'ttt'))])
def test_a_mesh_changes_nothing(name, sizes_of_mesh):
  layout = mesh.make_layout(mesh.Config(**sizes_of_mesh), jax.devices()[:8])
  rows = max(B, layout.size('batch'))
  schedule = 'parallel' if name in SIDE_BY_SIDE else 'sequential'
  close(read(name, schedule, layout=layout, rows=rows), one_by_one(name, rows=rows))


@pytest.mark.slow
@pytest.mark.parametrize('name', DIAGONAL)
def test_a_mesh_changes_nothing_in_a_wavefront(name):
  """Eight devices: rows and parameters over four, heads over two; the cells of a diagonal over none."""
  layout = mesh.make_layout(mesh.Config(data=4, model=2, layout='tensor'), jax.devices()[:8])
  close(read(name, 'wavefront', layout=layout, rows=4), one_by_one(name, rows=4))


@pytest.mark.parametrize('name,sizes_of_mesh', [
    ('infini', dict(data=2, seq=2, model=2, layout='sequence')),
    ('armt', dict(data=4, model=2, layout='tensor'))])
@pytest.mark.slow
def test_a_mesh_changes_nothing_for_documents_anywhere(name, sizes_of_mesh):
  """Documents that begin inside a segment, and one that fills its row: values and gradients."""
  config = MEMORY[name]
  graphdef, params = nnx.split(built(config))
  layout = mesh.make_layout(mesh.Config(**sizes_of_mesh), jax.devices()[:8])
  rows, T = max(B, layout.size('batch')), 4 * config.segment
  tokens = sizes(name, rows).reshape(rows, T)
  ids = jnp.stack([jnp.arange(T) // (config.segment + 3), jnp.ones(T, int)] * (rows // 2))

  def run(params):
    hidden, _ = nnx.merge(graphdef, params)(tokens, None, segment_ids_BT=ids)
    return (hidden * jnp.cos(jnp.arange(hidden.size).reshape(hidden.shape))).sum(), hidden

  run = jax.value_and_grad(run, has_aux=True)
  close(jax.jit(mesh.under(layout, run))(params), jax.jit(run)(params))


@pytest.mark.parametrize('settings,message', [
    (dict(long_term='rmt', schedule='parallel'), "'parallel': rmt needs each segment before the next"),
    (dict(long_term='infini', schedule='wavefront'), 'serves memories of dependency class P2'),
    (dict(long_term='armt', memory_layers=(0,), schedule='wavefront'), 'that all layers have'),
    (dict(long_term='infini', memory_top=3), "model.memory_top=3: is not read with model.long_term="),
    (dict(long_term='none', memory_layers=(1,)), "is not read with model.long_term='none'"),
    (dict(long_term='none', gate='tanh'), "model.gate='tanh': is not read with"),
    (dict(long_term='infinite'), 'did you mean "infini"'),
    (dict(long_term='infini', memory_layers=(2,)), 'must be layers from 0 to 1'),
])
def test_what_cannot_be_is_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    memory_config.Config(**(dict(vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=2) | settings))
