"""Optimisers equal their definitions, schedules their closed forms, and only matrices decay."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.training import optim
from longctx.training.optim import Config, make_optimizer, make_schedule
from tests import oracles
from tests.test_models import CLASSES, MODELS

L, D, N, H, F, V = 3, 8, 2, 4, 12, 17


def params(seed=0):
  """A small decoder's parameters with stacked layers, an LSTM cell's, and an unstacked norm."""
  rng = np.random.default_rng(seed)
  one = lambda *shape, dims: nnx.Param(jnp.float32(rng.normal(size=shape)), dims=dims)
  return nnx.State({
      'embedding': {'table': one(V, D, dims=('vocab', 'embed'))},
      'positions': one(L, D, dims=(None, 'embed')),
      'layers': {
          'attention': {'w_q': one(L, D, N, H, dims=('embed', 'heads', None)),
                        'w_kv': one(L, D, 2, N, H, dims=('embed', None, 'kv_heads', None)),
                        'w_out': one(L, N, H, D, dims=('heads', None, 'embed')),
                        'q_norm': {'scale': one(L, H, dims=(None,))}},
          'mlp': {'w_in': one(L, D, 2, F, dims=('embed', None, 'mlp')),
                  'w_out': one(L, F, D, dims=('mlp', 'embed'))},
          'norm': {'scale': one(L, D, dims=(None,))},
          'gate': one(L, D, dims=('embed',))},   # only its own rank tells that it is no matrix
      'cell': {'w_hidden': one(D, 4, D, dims=('recurrent', None, 'recurrent')),
               'bias': one(4, D, dims=(None, 'recurrent'))},
      'norm': {'scale': one(D, dims=(None,))},
      'head': {'table': one(V, D, dims=('vocab', 'embed'))},
  })


DECAYING = {'embedding/table', 'head/table', 'positions', 'layers/attention/w_q',
            'layers/attention/w_kv', 'layers/attention/w_out', 'layers/mlp/w_in',
            'layers/mlp/w_out', 'cell/w_hidden'}


def named(tree):
  return {optim.path_name(path): np.asarray(x)
          for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def run(config, grads, steps=4, num_steps=10, start=None):
  """Parameters after `steps` updates with the given gradients (a list, taken in turn)."""
  p = params() if start is None else start
  tx = make_optimizer(config, num_steps, p)
  state = tx.init(p)

  @jax.jit
  def update(p, state, g):
    updates, state = tx.update(g, state, p)
    return optax.apply_updates(p, updates), state

  for i in range(steps):
    p, state = update(p, state, grads[i % len(grads)])
  return p


# What decays.


def test_matrices_decay_and_norms_and_biases_do_not_though_they_are_stacked():
  flags = named(optim.map_params(optim.decays, params()))
  assert flags.keys() >= DECAYING
  assert {name for name, flag in flags.items() if flag} == DECAYING


@pytest.mark.parametrize('name', ['u_bias', 'norm_scale', 'out_bias', 'scale', 'bias'])
def test_vectors_of_heads_do_not_decay_nor_are_they_orthogonalised(name):
  """TTT's and Transformer-XL's have a row a head, which is no matrix; w_gate is one."""
  tree = {name: nnx.Param(jnp.ones((2, 3)), dims=('heads', None)),
          'w_gate': nnx.Param(jnp.ones((2, 3)), dims=('embed', 'mlp'))}
  assert named(optim.map_params(optim.decays, tree)) == {name: False, 'w_gate': True}
  assert named(optim.map_params(lambda *x: optim.muon_dims(*x) is None, tree)) == {name: True, 'w_gate': False}


def test_gates_have_a_rate_of_their_own_and_never_decay():
  tree = params()
  ones = jax.tree.map(jnp.ones_like, tree)
  steps = []
  for rate in (1.0, 30.0):
    tx = make_optimizer(Config(name='sgd', momentum=0.0, gate_rate=rate, clip_norm=0.0), 10, tree)
    steps.append(tx.update(ones, tx.init(tree), tree)[0])
  ratio = jax.tree.map(lambda a, b: b / a, *steps)
  for path, x in nnx.to_flat_state(ratio):
    np.testing.assert_allclose(x.get_value(), 30.0 if 'gate' in path else 1.0, rtol=1e-6)
  np.testing.assert_allclose(steps[0]['layers']['gate'].get_value(), -1e-3, rtol=1e-6)   # no decay


@pytest.mark.parametrize('name', optim.OPTIMIZERS)
def test_under_a_zero_gradient_only_matrices_shrink_by_rate_times_decay(name):
  zeros = jax.tree.map(jnp.zeros_like, params())
  config = Config(name=name, learning_rate=0.5, weight_decay=0.1, schedule='constant')
  before, after = named(params()), named(run(config, [zeros], steps=1))
  for key in before:
    kept = 1 - 0.5 * 0.1 if key in DECAYING else 1
    np.testing.assert_allclose(after[key], kept * before[key], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize('dims', [None, ('embed', 'heads', None, 'mlp', 'x'), ('embed',)])
def test_a_parameter_that_does_not_name_its_dims_is_refused(dims):
  metadata = {} if dims is None else {'dims': dims}
  bad = nnx.State({'mlp': {'w': nnx.Param(jnp.zeros((2, 3, 4)), **metadata)}})
  with pytest.raises(ValueError, match=re.escape('mlp/w has shape (2, 3, 4)')):
    make_optimizer(Config(), 10, bad)


def test_abstract_parameters_are_enough():
  tx = make_optimizer(Config(name='muon'), 10, jax.eval_shape(params))
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(jax.eval_shape(tx.init, params())) == shapes(tx.init(params()))


# Directions.


@pytest.mark.parametrize('name', ['adamw', 'lion', 'sgd', 'adafactor'])
@pytest.mark.parametrize('clip_norm', [0.0, 0.7])
def test_four_steps_equal_the_definition(name, clip_norm):
  config = Config(name=name, learning_rate=0.1, schedule='linear', warmup_steps=2,
                  weight_decay=0.2, beta1=0.8, beta2=0.9, epsilon=1e-3, momentum=0.6,
                  clip_norm=clip_norm)
  grads = [params(seed) for seed in (1, 2, 3, 4)]
  rates = [oracles.schedule('linear', s, 10, 0.1, 2, 0.1, 0.2) for s in range(4)]
  want = oracles.optimizer(
      name, named(params()), [named(g) for g in grads], rates, DECAYING, weight_decay=0.2,
      beta1=0.8, beta2=0.9, epsilon=1e-3, momentum=0.6, clip_norm=clip_norm)
  got = named(run(config, grads))
  for key in want:
    np.testing.assert_allclose(got[key], want[key], rtol=2e-5, atol=2e-6, err_msg=key)


def test_sgd_without_momentum_keeps_no_state():
  config = Config(name='sgd', momentum=0.0, weight_decay=0.0, clip_norm=0.0, learning_rate=0.5,
                  schedule='constant')
  grads = params(1)
  got, p, g = named(run(config, [grads], steps=1)), named(params()), named(grads)
  for key in p:
    np.testing.assert_allclose(got[key], p[key] - 0.5 * g[key], rtol=1e-6)
  state = make_optimizer(config, 10, params()).init(params())
  assert max(x.size for x in jax.tree.leaves(state)) == 1


MUON = Config(name='muon', learning_rate=1.0, schedule='constant', weight_decay=0.0, clip_norm=0.0,
              momentum=0.9)


def muon_update(grads):
  p = params()
  tx = make_optimizer(MUON, 10, p)
  return named(jax.jit(lambda g: tx.update(g, tx.init(p), p)[0])(grads))


def matrices(name, x):
  """The matrices [rows = in, columns = out] of each layer of a parameter, in order."""
  if name == 'layers/attention/w_q':
    return [x[i].reshape(D, N * H) for i in range(L)]
  if name == 'layers/attention/w_kv':
    return [x[i, :, j].reshape(D, N * H) for i in range(L) for j in range(2)]
  if name == 'layers/attention/w_out':
    return [x[i].reshape(N * H, D) for i in range(L)]
  if name == 'layers/mlp/w_in':
    return [x[i, :, j] for i in range(L) for j in range(2)]
  if name == 'cell/w_hidden':
    return [x[:, j] for j in range(4)]
  return list(x)


MUONS = DECAYING - {'embedding/table', 'head/table', 'positions'}


def test_muon_takes_each_matrix_of_each_layer_by_itself():
  grads = named(params(1))
  updates = muon_update(params(1))
  for name in MUONS:
    for update, grad in zip(matrices(name, updates[name]), matrices(name, grads[name])):
      # The first momentum is the gradient, times a number that orthogonalisation forgets.
      want = oracles.newton_schulz(grad)
      np.testing.assert_allclose(update, -optim.MUON_RMS * max(grad.shape) ** 0.5 * want,
                                 rtol=1e-3, atol=1e-4, err_msg=name)


def test_muons_singular_values_are_near_one_and_its_rms_is_adams():
  updates = muon_update(params(1))
  for name in MUONS:
    for update in matrices(name, updates[name]):
      values = np.linalg.svd(update / (optim.MUON_RMS * max(update.shape) ** 0.5))[1]
      assert 0.6 < values.min() <= values.max() < 1.25, name   # the quintic's own band
      assert 0.1 < np.sqrt(np.mean(update**2)) < 0.25, name


def test_muon_leaves_embeddings_norms_and_biases_to_adamw():
  adam = Config(name='adamw', learning_rate=1.0, schedule='constant', weight_decay=0.0,
                clip_norm=0.0)
  grads = [params(1), params(2)]
  muon, adamw, start = named(run(MUON, grads, 2)), named(run(adam, grads, 2)), named(params())
  for name in start:
    same = np.allclose(muon[name], adamw[name], rtol=1e-5, atol=1e-6)
    assert same == (name not in MUONS), name


# The models' own parameters.


@functools.cache
def own(model):
  """{parameter: (its dims, whether it decays, (rows, columns) that Muon makes of these dims)} of a model."""
  config, found = MODELS[model], {}

  def one(path, param):
    dims, muon = optim.own_dims(path, param), optim.muon_dims(path, param)
    first = len(param.get_value().shape) - len(dims)
    taken = muon and tuple(tuple(i - first for i in axes) for axes in (muon.reduction_axis, muon.output_axis))
    name = re.sub(r'\b\d+/', '', optim.path_name(path))
    found[re.sub(r'/\d+$', '', name)] = dims, optim.decays(path, param), taken
    return 0

  optim.map_params(one, nnx.state(nnx.eval_shape(lambda: CLASSES[config.name](config, rngs=nnx.Rngs(0)))))
  return found


OUT_OF_EMBED, INTO_EMBED, EACH_OF_TWO = ((0,), (1, 2)), ((0, 1), (2,)), ((0,), (2, 3))
PLAIN = ((0,), (1,))
MUON_OF = {   # all that Muon takes of models with a segment memory: rows and columns; other dims count matrices
    'mixer/w_q': OUT_OF_EMBED, 'mixer/w_kv': EACH_OF_TWO, 'mixer/w_out': INTO_EMBED, 'mlp/w_in': ((0,), (2,)),
    'mlp/w_out': PLAIN, 'relative/w_distance': OUT_OF_EMBED,
    'w_qkv': EACH_OF_TWO, 'w_eta': PLAIN, 'start_W': ((1,), (2,)), 'w_out': INTO_EMBED,                     # ttt
    'memory/w_qkv': EACH_OF_TWO, 'memory/w_gates': ((0,), (2,)), 'memory/start': ((1,), (2,)),
    'memory/w_out': INTO_EMBED,                                                                             # titans
    'w_query': PLAIN, 'w_key': PLAIN, 'w_value': PLAIN, 'w_beta': PLAIN,                  # armt; memory_caching
    'w_u': PLAIN, 'w_compress': INTO_EMBED,                                 # memory_caching; compressive
    'w_q_to_states': OUT_OF_EMBED, 'w_state_q': EACH_OF_TWO, 'w_state_kv': EACH_OF_TWO,   # block_recurrent
    'w_out_of_states': INTO_EMBED, **dict.fromkeys(('w_z', 'w_input', 'w_forget'), ((0, 1, 2), (3,))),
}


def test_what_muon_takes_of_every_memory():
  seen = set()
  for model in MODELS:
    if MODELS[model].name == 'memory':
      for name, (_, _, taken) in own(model).items():
        if '/cached/' not in name:   # a decoder's mixer
          assert taken == MUON_OF.get(name.removeprefix('blocks/')), f'{model}: {name}'
          seen.add(name.removeprefix('blocks/'))
  assert seen >= MUON_OF.keys()


def test_vectors_of_heads_and_taps_are_no_matrices_in_any_model():
  seen = set()
  for model in MODELS:
    for name, (dims, decays, taken) in own(model).items():
      last = name.split('/')[-1]
      if dims == ('heads', None) or last in ('taps', 'table'):
        assert taken is None, f'{model}: {name}'
        assert decays == (last in ('taps', 'table')), f'{model}: {name}'
        seen.add(last)
  assert seen == {'taps', 'table', 'start_b', 'norm_scale', 'norm_bias', 'out_scale', 'out_bias', 'u_bias', 'v_bias'}


@pytest.mark.parametrize('model, at', [('ttt', 'start_W'), ('titans mag', 'start')])
def test_what_a_head_begins_with_is_orthogonalised_by_itself(model, at):
  config = MODELS[model]
  block = CLASSES[config.name](config, rngs=nnx.Rngs(0)).blocks[0]
  params = nnx.state({at: getattr(getattr(block, 'memory', block), at)})
  rng = np.random.default_rng(0)
  def gradient(x):   # of singular values that five steps bring together: 1 to 3
    u, s, v = np.linalg.svd(rng.standard_normal(x.shape), full_matrices=False)
    return jnp.asarray(u * np.linspace(1, 3, s.shape[-1]) @ v, x.dtype)
  grads, tx = jax.tree.map(gradient, params), make_optimizer(MUON, 10, params)
  for update in jax.tree.leaves(jax.jit(lambda g: tx.update(g, tx.init(params), params)[0])(grads)):
    assert len(update) == config.num_heads
    for matrix in np.asarray(update):
      values = np.linalg.svd(matrix / (optim.MUON_RMS * max(matrix.shape) ** 0.5))[1]
      assert 0.6 < values.min() <= values.max() < 1.25


# Clipping.


@pytest.mark.parametrize('factor, scale', [(0.5, 2.0), (2.0, 1.0)])
def test_clipping_is_by_the_norm_of_all_gradients_together(factor, scale):
  grads = params(1)
  norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in named(grads).values()))
  np.testing.assert_allclose(optim.global_norm(grads), norm, rtol=1e-6)
  clipped, _ = optim.clip_by_global_norm(factor * norm).update(grads, optax.EmptyState())
  want = jax.tree.map(lambda g: g * factor if factor < 1 else g, grads)
  for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_zero_gradient_is_not_divided_by_its_norm():
  zeros = jax.tree.map(jnp.zeros_like, params())
  clipped, _ = optim.clip_by_global_norm(1.0).update(zeros, optax.EmptyState())
  assert all((x == 0).all() for x in jax.tree.leaves(clipped))


# Schedules.


@pytest.mark.parametrize('name', optim.SCHEDULES)
@pytest.mark.parametrize('warmup', [0, 1, 7])
def test_schedules_equal_their_closed_forms(name, warmup):
  config = Config(schedule=name, learning_rate=0.3, warmup_steps=warmup, final_fraction=0.25,
                  decay_fraction=0.3, decay_start=9, decay_every=6, decay_factor=0.8)
  schedule = jax.jit(make_schedule(config, 40))
  for step in [*range(41), 100]:
    want = oracles.schedule(name, step, 40, 0.3, warmup, 0.25, 0.3, (9, 6, 0.8))
    np.testing.assert_allclose(schedule(jnp.int32(step)), want, rtol=1e-5, err_msg=str(step))


def test_corner_points():
  config = {'learning_rate': 1.0, 'warmup_steps': 4, 'final_fraction': 0.1, 'decay_fraction': 0.5,
            'decay_start': 2, 'decay_every': 14, 'decay_factor': 0.1}
  value = lambda name, step: float(make_schedule(Config(schedule=name, **config), 20)(step))
  for name in optim.SCHEDULES:
    assert [value(name, step) for step in (0, 3, 4)] == pytest.approx([0.2, 0.8, 1.0]), name
    assert value(name, 20) == pytest.approx(1.0 if name == 'constant' else 0.1), name
  assert value('cosine', 12) == pytest.approx(0.55)   # half way between peak and end
  assert value('linear', 12) == pytest.approx(0.55)
  assert [value('wsd', step) for step in (10, 15)] == pytest.approx([1.0, 0.55])
  assert [value('staircase', step) for step in (19, 33, 34)] == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize('decay_fraction, want', [(0.0, [1, 1, 1]), (1.0, [1, 0.55, 0.145])])
def test_wsd_without_a_decay_and_with_nothing_else(decay_fraction, want):
  config = Config(schedule='wsd', learning_rate=1.0, decay_fraction=decay_fraction)
  schedule = make_schedule(config, 20)
  assert [float(schedule(step)) for step in (0, 10, 19)] == pytest.approx(want)


# Averages and bad gradients.


def test_the_average_is_bias_corrected_from_its_first_step():
  history = [params(seed) for seed in range(1, 6)]
  ema = params(0)   # the initial parameters, which must not count
  for step, p in enumerate(history):
    ema = jax.jit(lambda e, p, s: optim.update_ema(e, p, 0.9, s))(ema, p, jnp.int32(step))
    weights = [0.9 ** (step - i) for i in range(step + 1)]
    for name, got in named(ema).items():
      want = sum(w * np.float64(named(q)[name]) for w, q in zip(weights, history)) / sum(weights)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_average_with_a_long_memory_keeps_its_digits():
  ema = jnp.float32(7)
  for step in range(3):
    ema = optim.update_ema(ema, jnp.float32(step), 0.99999, jnp.int32(step))
  assert ema == pytest.approx(1.0, abs=1e-4)   # plain mean of 0, 1, 2


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_the_first_bad_group_is_named(bad):
  grads = params()
  assert optim.first_bad_group(grads) == ''
  assert not any(optim.nonfinite_by_group(grads).values())
  w_out = grads['layers']['mlp']['w_out']
  w_out.set_value(w_out.get_value().at[2, 3, 1].set(bad))
  grads['norm']['scale'].set_value(grads['norm']['scale'].get_value().at[0].set(bad))
  assert optim.first_bad_group(grads) == 'layers/mlp/w_out'
  flags = optim.nonfinite_by_group(grads)
  assert {name for name, flag in flags.items() if flag} == {'layers/mlp/w_out', 'norm/scale'}
  assert flags.keys() == named(grads).keys()


# Mistakes.


@pytest.mark.parametrize('mistake, message', [
    ({'name': 'adam'}, "optimizer.name='adam': must be one of adamw, adafactor, lion, muon, sgd "
                       '(did you mean "adamw"?)'),
    ({'schedule': 'cosin'}, '(did you mean "cosine"?)'),
    ({'learning_rate': -1.0}, 'optimizer.learning_rate=-1.0: must be at least 0'),
    ({'learning_rate': math.nan}, 'optimizer.learning_rate=nan'),
    ({'learning_rate': math.inf}, 'optimizer.learning_rate=inf: must be finite'),
    ({'warmup_steps': -1}, 'optimizer.warmup_steps=-1: must be at least 0'),
    ({'beta1': 1.0}, 'optimizer.beta1=1.0: must be at least 0 and below 1'),
    ({'beta2': -0.1}, 'optimizer.beta2=-0.1'),
    ({'momentum': 1.5}, 'optimizer.momentum=1.5'),
    ({'ema': 1.0}, 'optimizer.ema=1.0'),
    ({'epsilon': 0.0}, 'optimizer.epsilon=0.0: must be above 0'),
    ({'final_fraction': 1.5}, 'optimizer.final_fraction=1.5: must be at least 0 and at most 1'),
    ({'decay_fraction': -0.5}, 'optimizer.decay_fraction=-0.5'),
    ({'weight_decay': -0.1}, 'optimizer.weight_decay=-0.1'),
    ({'clip_norm': -1.0}, 'optimizer.clip_norm=-1.0'),
])
def test_mistakes_are_named(mistake, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    Config(**mistake)


def test_a_warm_up_longer_than_the_run_is_refused():
  with pytest.raises(ConfigError, match=re.escape('optimizer.warmup_steps=20: must be below')):
    make_schedule(Config(warmup_steps=20), 20)
