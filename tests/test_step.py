"""One update: compiled once, skipped where it is not finite, the same in microbatches as in one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import assembly, train
from longctx.training import optim
from longctx.training import step as step_lib
from longctx.training.checkpoint import Checkpoints
from tests.compilation import quick_compilation  # noqa: F401
from tests.programs import tiny

B, T, V = 8, 16, 257


pytestmark = pytest.mark.usefixtures('quick_compilation')


@functools.cache
def assemble(variant='packed', devices=1, **changes):
  """assemble(optimizer_ema=0.9) sets config.optimizer.ema."""
  config = tiny.get_config(variant)
  for name, value in changes.items():
    section, _, field = name.partition('_')
    config[section][field] = value
  return assembly.assemble(config, jax.devices()[:devices])


JITTED = {}   # by id: `assemble` keeps what it made


def jitted(a):
  """The step as a run jits it."""
  return JITTED.setdefault(id(a), train.jit_step(a))


def make_batch(seed=0, rows=B):
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, 4, (rows, T)), axis=1)
  starts = np.diff(segments, axis=1, prepend=0) > 0
  positions = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
  # Rows of few and of many targets: a mean of means would not be the mean.
  mask = rng.random((rows, T)) < rng.random((rows, 1))
  return {'tokens': rng.integers(0, V, (rows, T)).astype(np.int32),
          'targets': rng.integers(0, V, (rows, T)).astype(np.int32),
          'loss_mask': mask.astype(np.float32), 'positions': positions.astype(np.int32),
          'segment_ids': segments.astype(np.int32), 'document_start': starts}


def bits(tree):
  data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [np.asarray(data(x)).tobytes() for x in jax.tree.leaves(tree)]


def numbers(tree):
  return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.device_get(tree))]


def run(a, batches, state=None, update=None):
  """The state after the batches, and the metrics of each."""
  update, found = update or jitted(a), []
  state = a.init() if state is None else state
  for batch in batches:
    state, metrics = update(state, a.layout.place(batch, B))
    found.append(jax.device_get(metrics))
  return state, found


# Compiled once.


def test_compiled_once_over_steps_and_a_restore(tmp_path, monkeypatch):
  traces, real = [], step_lib.train_step
  monkeypatch.setattr(step_lib, 'train_step',
                      lambda *args, **kw: (traces.append(1), real(*args, **kw))[1])
  compilations = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda event, seconds, **more: compilations.append(event) if 'backend_compile' in event else 0)
  a = assemble('windowed', devices=8, optimizer_ema=0.9, model_dropout=0.1)
  jit, state = jitted(a), a.init()

  def update(state, batch):
    compilations.clear()
    found = jit(state, a.layout.place(batch, B))
    counts.append(len(compilations))
    return found

  counts = []
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    for i in range(3):
      given = state
      state, _ = update(state, make_batch(i))
      assert all(x.is_deleted() for x in jax.tree.leaves((given.params, given.opt, given.ema,
                                                          given.memory)))
    checkpoints.save(3, state, stream_state={}, meta={})
    checkpoints.wait()
    state, whole = update(state, make_batch(3))
    restored = checkpoints.restore_newest(a.abstract).state
    restored, again = update(restored, make_batch(3))
  assert len(traces) == 1
  assert counts == [1, 0, 0, 0, 0]
  assert bits((restored, again)) == bits((state, whole))
  for x, asked in zip(jax.tree.leaves(state), jax.tree.leaves(a.abstract)):
    assert (x.sharding, x.dtype, x.shape) == (asked.sharding, asked.dtype, asked.shape)
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(whole))


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_every_optimizer_updates_is_saved_and_goes_on_from_there(name, tmp_path):
  a = assemble('lstm', devices=2, optimizer_name=name, mesh_layout='fsdp')
  first, (metrics,) = run(a, [make_batch(0)])
  assert metrics['good']
  assert bits(first.params) != bits(a.init().params)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    assert checkpoints.save(1, first, stream_state={}, meta={})
    checkpoints.wait()
    assert checkpoints.poll() == []
    restored = checkpoints.restore_newest(a.abstract).state
  assert bits(restored) == bits(first)
  assert bits(run(a, [make_batch(1)], restored)) == bits(run(a, [make_batch(1)], first))


# Steps that are not finite.


def masked_by(value):
  return make_batch(50) | {'loss_mask': np.full((B, T), value, np.float32)}


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value):
  a = assemble('packed', optimizer_ema=0.9)
  update = jitted(a)
  state, _ = run(a, [make_batch(0), make_batch(1)], update=update)
  kept = lambda s: bits((s.params, s.opt, s.ema, s.dropout_key))
  before = kept(state)
  state, found = run(a, [masked_by(value)] * 2, state, update)
  assert kept(state) == before
  assert [int(m['bad_in_a_row']) for m in found] == [1, 2]
  assert [int(m['skipped']) for m in found] == [1, 2]
  assert not any(m['good'] for m in found)
  assert int(state.step) == 4
  state, (good, bad) = run(a, [make_batch(2), masked_by(value)], state, update)
  assert (bool(good['good']), int(good['bad_in_a_row']), int(good['skipped'])) == (True, 0, 2)
  assert (int(bad['bad_in_a_row']), int(bad['skipped'])) == (1, 3)
  # Nothing but the count of steps tells that there were bad ones.
  straight, _ = run(a, [make_batch(i) for i in range(3)], update=update)
  assert kept(state) == kept(straight)


def test_a_spike_changes_nothing_and_is_counted():
  a = assemble('packed', run_spike_sigmas=6.0, run_spike_window=4, optimizer_learning_rate=1e-4)
  state, found = run(a, [make_batch(0)] * 5)
  assert all(m['good'] for m in found)
  model = nnx.merge(a.graphdef, jax.tree.map(jnp.copy, state.params))
  batch = make_batch(0)
  hidden_BTD, _ = model(batch['tokens'], None, positions_BT=batch['positions'],
                        segment_ids_BT=batch['segment_ids'])
  worst = batch | {'targets': np.asarray(model.logits(hidden_BTD).argmin(-1), np.int32)}
  before = bits((state.params, state.opt))
  state, (metrics,) = run(a, [worst], state)
  assert np.isfinite(metrics['loss']) and metrics['loss'] > found[-1]['loss'] + 0.05
  assert not metrics['good'] and bits((state.params, state.opt)) == before
  assert (int(metrics['skipped']), int(metrics['bad_in_a_row']), int(state.step)) == (1, 1, 6)
  state, (metrics,) = run(a, [make_batch(0)], state)
  assert metrics['good'] and bits((state.params, state.opt)) != before


def test_after_a_skipped_step_the_memory_is_of_the_data_that_was_read():
  a = assemble('lstm')
  before, _ = run(a, [make_batch(0)])
  old = numbers(before.memory)
  bad = make_batch(1) | {'loss_mask': np.full((B, T), np.nan, np.float32)}
  skipped, (metrics,) = run(a, [bad], before)
  assert not metrics['good']
  good, _ = run(a, [make_batch(1)], run(a, [make_batch(0)])[0])
  assert bits(skipped.memory) == bits(good.memory)   # the parameters that read it were the same
  assert any((x != y).any() for x, y in zip(numbers(skipped.memory), old))


def test_a_row_of_memory_that_is_not_finite_is_put_back_whole():
  old = {'h': jnp.zeros((3, 2)), 'clock': jnp.zeros(3, jnp.int32)}
  new = {'h': jnp.array([[1., 2.], [3., jnp.nan], [5., 6.]]), 'clock': jnp.full(3, 7)}
  kept = step_lib.keep_finite_rows(new, old)
  np.testing.assert_array_equal(kept['h'], [[1, 2], [0, 0], [5, 6]])
  np.testing.assert_array_equal(kept['clock'], [7, 0, 7])


def test_a_bad_parameter_is_named():
  a = assemble('packed')
  trainer = train.Trainer(a, '', None, None)
  state = a.init()
  state.params['blocks'][0]['mlp']['w_in'].set_value(
      state.params['blocks'][0]['mlp']['w_in'].get_value().at[..., 3, 1, 2].set(jnp.inf))
  before = bits(state.params)
  state, (metrics,) = run(a, [make_batch()], state)
  assert bits(state.params) == before
  assert int(metrics['skipped']) == 1
  squares = dict(zip([train.optim.path_name(path) for path, _ in
                      jax.tree_util.tree_leaves_with_path(a.abstract.params)],
                     metrics['grad_squares']))
  first = next(name for name, x in squares.items() if not np.isfinite(x))
  assert trainer.first_bad(metrics) == f'the gradient of {first} is not finite'
  healthy = metrics | {'grad_squares': np.ones_like(metrics['grad_squares'])}
  assert trainer.first_bad(healthy | {'loss': np.float32(np.nan)}) == 'the loss is not finite'
  names = list(squares)
  one = np.ones_like(metrics['grad_squares'])
  one[3] = np.inf
  assert trainer.first_bad(metrics | {'grad_squares': one}) == f'the gradient of {names[3]} is not finite'


# Microbatches. Adam would magnify the rounding of small gradients.

PLAIN = {'optimizer_name': 'sgd', 'optimizer_learning_rate': 0.5, 'loss_z_loss': 0.01}


@pytest.mark.parametrize('variant,devices', [
    ('windowed', 2), ('compressive', 1), pytest.param('lstm', 1, marks=pytest.mark.slow)])
def test_accumulation_equals_the_large_batch(variant, devices):
  batches = [make_batch(i) for i in range(3)]
  whole, of_whole = run(assemble(variant, devices, **PLAIN), batches)
  parts, of_parts = run(assemble(variant, devices, run_accumulate=4, **PLAIN), batches)
  for name in ('loss', 'grad_norm', 'grad_squares', 'tokens'):
    np.testing.assert_allclose([m[name] for m in of_parts], [m[name] for m in of_whole],
                               rtol=2e-5, atol=1e-9, err_msg=name)
  for x, y in zip(numbers((parts.params, parts.memory)), numbers((whole.params, whole.memory))):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_a_row_keeps_its_own_memory_in_microbatches():
  a = assemble('lstm', run_accumulate=4, **PLAIN)
  other = make_batch(0)
  other['tokens'][5, -1] = (other['tokens'][5, -1] + 1) % V
  memories = [numbers(run(a, [batch])[0].memory.layers) for batch in (make_batch(0), other)]
  for x, y in zip(*memories):
    assert [bool(np.any(x[row] != y[row])) for row in range(B)] == [row == 5 for row in range(B)]


# The loss.


def test_the_loss_is_the_mean_over_the_targets():
  a = assemble('packed')
  batch, state = make_batch(3), a.init()
  model = nnx.merge(a.graphdef, state.params)
  hidden_BTD, _ = model(batch['tokens'], None, positions_BT=batch['positions'],
                        segment_ids_BT=batch['segment_ids'])
  logits = np.asarray(model.logits(hidden_BTD), np.float64)
  total = count = 0
  for b in range(B):
    for t in range(T):
      if batch['loss_mask'][b, t]:
        total += np.log(np.exp(logits[b, t]).sum()) - logits[b, t, batch['targets'][b, t]]
        count += 1
  assert count != B * T
  _, (metrics,) = run(a, [batch], state)
  np.testing.assert_allclose(metrics['loss'], total / count, rtol=1e-5)
  assert metrics['tokens'] == count


def test_keys_are_those_that_queries_with_a_target_see():
  a = assemble('windowed', model_window=(4,))
  batch = make_batch(4)
  seen = {w: [] for w in (4, 0)}
  for b in range(B):
    for t in range(T):
      if batch['loss_mask'][b, t]:
        document = [s for s in range(t + 1) if batch['segment_ids'][b, s] ==
                    batch['segment_ids'][b, t]]
        for w, keys in seen.items():
          keys.append(len([s for s in document if not w or s > t - w]))
  _, (metrics,) = run(a, [batch])
  assert a.model_config.windows == (4,)
  assert list(metrics['keys']) == [4]
  assert np.mean(seen[0]) > np.mean(seen[4])   # a mean of minima, not the minimum of the mean
  np.testing.assert_allclose(metrics['keys'][4], np.mean(seen[4]), rtol=1e-6)


def test_a_batch_without_targets_is_no_disaster():
  _, (metrics,) = run(assemble('lstm', optimizer_ema=0.9), [masked_by(0.0)])
  assert (float(metrics['loss']), float(metrics['grad_norm'])) == (0.0, 0.0)
  assert metrics['good']


# Randomness.


def test_dropout_differs_from_step_to_step_and_comes_back_with_the_seed():
  a = assemble('packed', model_dropout=0.3)
  loss_at = lambda step: float(
      run(a, [make_batch()], a.init()._replace(step=jnp.int32(step)))[1][0]['loss'])
  losses = [loss_at(step) for step in range(4)]
  assert len(set(losses)) == 4
  assert [loss_at(step) for step in range(4)] == losses


def test_microbatches_drop_different_units():
  same = {k: np.repeat(v[:1], B, axis=0) for k, v in make_batch().items()}
  a = assemble('lstm', model_dropout=0.5, run_accumulate=B)   # a row each
  state, _ = run(a, [same])
  h_BE = np.asarray(state.memory.layers[0].h)
  assert len({row.tobytes() for row in h_BE}) == B


def test_init_and_dropout_have_their_own_seeds():
  def begin(seed):
    config = tiny.get_config('lstm')
    config.seed = seed
    a = assembly.assemble(config, jax.devices()[:1])
    return a, a.init()
  (a, zero), (_, again), (_, one) = begin(0), begin(0), begin(1)
  words = lambda key: jax.random.key_data(key).tolist()
  assert bits(zero) == bits(again)
  assert words(zero.dropout_key) != words(one.dropout_key)
  table = lambda s: np.asarray(s.params['embedding']['table'].get_value())
  assert (table(zero) != table(one)).all()
  make = jax.jit(lambda key: nnx.state(assembly.make_model(a.model_config, key), nnx.Param))
  for key in (zero.dropout_key, jax.random.key(0)):   # neither of them made the parameters
    assert (np.asarray(make(key)['embedding']['table'].get_value()) != table(zero)).any()
  assert words(zero.dropout_key) != words(jax.random.key(0))


# Averaged parameters.


def test_the_average_is_its_closed_form_over_the_good_steps():
  """sum d^(n-i) p_i / sum d^(n-i) over the updates i = 1..n; a skipped step is no update."""
  decay = 0.9
  a = assemble('lstm', optimizer_ema=decay)
  update, state, after = jitted(a), a.init(), []
  for batch in (masked_by(np.nan), *map(make_batch, range(3)), masked_by(np.nan), make_batch(3)):
    state, (metrics,) = run(a, [batch], state, update)
    if metrics['good']:
      after.append(numbers(state.params))
    if not after:
      continue
    weights = [decay ** (len(after) - 1 - i) for i in range(len(after))]
    for k, average in enumerate(numbers(state.ema)):
      expected = sum(w * p[k] for w, p in zip(weights, after)) / sum(weights)
      np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
  assert len(after) == 4
  assert run(assemble('packed'), [make_batch()])[0].ema is None
