"""Recurrent layers as published: those of transformers with copied weights, else loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.context import new_clock, place_tokens
from longctx.models.mixers import base, linear_attention, mamba2, minimal, rglru
from longctx.parallel import mesh
from tests import kernel_laws, oracles

B, T, D = 2, 11, 12
SEGMENTS = np.array([[1] * 4 + [2] * 7, [3] * 9 + [4] * 2])


def shaken(mixer_class, seed=0, **settings):
  """A mixer whose every parameter is drawn anew, none left at a 0 or 1 that could be forgotten."""
  more = {'groups': settings.pop('groups')} if 'groups' in settings else {}
  settings = base.Settings(**dict(dim=D, num_heads=2, chunk=4) | settings)
  abstract = nnx.eval_shape(lambda: mixer_class(settings, rngs=nnx.Rngs(0), **more))
  graphdef, params = nnx.split(abstract)
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  drawn = [jnp.asarray(0.3 * rng.standard_normal(x.shape) + 0.5 * (x.ndim == 1), jnp.float32)
           for x in leaves]
  return nnx.merge(graphdef, jax.tree.unflatten(tree, drawn))


def inputs(seed=1):
  return np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)


def run(mixer, x, segments=None):
  ids = None if segments is None else jnp.asarray(segments)
  context, _ = place_tokens(jnp.zeros(x.shape[:2], jnp.int32), new_clock(B), None, ids, None)
  return jax.jit(lambda x: mixer(x, mixer.init_state(B), context))(jnp.asarray(x))


def arrays(mixer):
  """The parameters by name, float64."""
  found = {}
  for path, leaf in nnx.to_flat_state(nnx.state(mixer)):
    found['.'.join(map(str, path))] = np.asarray(leaf.get_value(), np.float64)
  return found


@pytest.mark.slow
def test_rglru_is_the_block_of_recurrent_gemma():
  import torch
  from transformers.models.recurrent_gemma import modeling_recurrent_gemma as published
  mixer = shaken(rglru.RGLRU, width=16)
  config = published.RecurrentGemmaConfig(
      hidden_size=D, lru_width=16, num_attention_heads=2, num_hidden_layers=1, conv1d_width=4)
  theirs = published.RecurrentGemmaRecurrentBlock(config, 0)
  ours = arrays(mixer)
  tensor = lambda x: torch.tensor(np.asarray(x, np.float32).copy())
  gates = ours['w_gates'].transpose(1, 2, 0, 3)   # [I, 2, H, J] -> [2, H, I, J]
  weights = {
      'linear_x.weight': ours['w_in'][:, 0].T, 'linear_x.bias': ours['bias_x'],
      'linear_y.weight': ours['w_in'][:, 1].T, 'linear_y.bias': ours['bias_y'],
      'linear_out.weight': ours['w_out'].T, 'linear_out.bias': ours['bias_out'],
      'conv_1d.weight': ours['conv.taps'][::-1].T[:, None], 'conv_1d.bias': ours['conv.bias'],
      'rg_lru.recurrent_param': ours['decay'],
      'rg_lru.recurrent_gate_weight': gates[0], 'rg_lru.input_gate_weight': gates[1],
      'rg_lru.recurrent_gate_bias': ours['bias_r'].reshape(2, 8),
      'rg_lru.input_gate_bias': ours['bias_i'].reshape(2, 8)}
  theirs.load_state_dict({name: tensor(x) for name, x in weights.items()})
  x = inputs()
  with torch.no_grad():
    expected, _ = theirs(torch.tensor(x), torch.arange(T)[None].expand(B, T), None, use_cache=False)
  got, _ = run(mixer, x)
  np.testing.assert_allclose(got, expected.numpy(), atol=2e-5, rtol=2e-5)
  assert np.abs(expected.numpy()).max() > 0.3


@pytest.mark.parametrize('groups', [1, 2])
def test_mamba2_is_the_mixer_of_mamba2(groups):
  import torch
  from transformers.models.mamba2 import modeling_mamba2 as published
  mixer = shaken(mamba2.Mamba2, num_heads=4, key_dim=5, norm_epsilon=1e-5, groups=groups)
  config = published.Mamba2Config(
      hidden_size=D, num_heads=4, head_dim=6, state_size=5, n_groups=groups, conv_kernel=4,
      chunk_size=8, num_hidden_layers=1, initializer_range=0.3)
  theirs = published.Mamba2Mixer(config, 0).eval()
  ours = arrays(mixer)
  tensor = lambda x: torch.tensor(np.asarray(x, np.float32).copy())
  flat = lambda w: w.reshape(D, -1).T
  taps = np.concatenate([ours['conv_x.taps'], ours['conv_bc.taps']], axis=1)
  weights = {
      'in_proj.weight': np.concatenate([flat(ours[n]) for n in ('w_zx', 'w_bc', 'w_dt')]),
      'conv1d.weight': taps[::-1].T[:, None],
      'conv1d.bias': np.concatenate([ours['conv_x.bias'], ours['conv_bc.bias']]),
      'out_proj.weight': ours['w_out'].reshape(-1, D).T, 'norm.weight': ours['norm_scale'],
      'dt_bias': ours['dt_bias'], 'A_log': ours['A_log'], 'D': ours['D']}
  theirs.load_state_dict({name: tensor(x) for name, x in weights.items()})
  x = inputs()
  with torch.no_grad():
    expected = theirs(torch.tensor(x)).numpy()
  got, _ = run(mixer, x)
  np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
  assert np.abs(expected).max() > 0.3


def test_mamba2_starts_as_published():
  found = arrays(mamba2.Mamba2(base.Settings(dim=16, num_heads=512, value_dim=1), rngs=nnx.Rngs(0)))
  dt = np.log1p(np.exp(found['dt_bias']))
  assert 0.001 <= dt.min() < 0.0012 and 0.08 < dt.max() <= 0.1001
  assert np.log(dt).mean() == pytest.approx(np.log(0.01), abs=0.2)
  decay = np.exp(found['A_log'])
  assert 1 <= decay.min() < 1.3 and 15.5 < decay.max() <= 16.001
  assert (found['D'] == 1).all() and (found['norm_scale'] == 1).all()


def test_rglru_starts_as_published():
  mixer = rglru.RGLRU(base.Settings(dim=8, num_heads=2, width=512), rngs=nnx.Rngs(0))
  found = arrays(mixer)
  a = np.exp(-np.log1p(np.exp(found['decay'])))
  assert 0.9 <= a.min() < 0.91 and 0.99 < a.max() <= 0.9991
  assert (a ** 2).mean() == pytest.approx((0.9 ** 2 + 0.999 ** 2) / 2, abs=0.01)
  assert found['w_gates'].std() == pytest.approx(256 ** -0.5, rel=0.02)
  assert found['conv.taps'].std() == pytest.approx(0.05, rel=0.1)
  assert all(np.all(x == 0) for name, x in found.items() if 'bias' in name)


def test_rglru_has_a_finite_gradient_where_the_gate_keeps_everything():
  slope = jax.grad(lambda x: rglru.bounded_sqrt(x))
  assert float(slope(0.0)) == rglru.MAX_SLOPE
  assert float(slope(0.25)) == pytest.approx(1.0)
  mixer = shaken(rglru.RGLRU)
  mixer.bias_r.set_value(jnp.full((D,), -200.0))   # r = 0, a = 1
  graphdef, params = nnx.split(mixer)
  grads = jax.jit(jax.grad(lambda p: run(nnx.merge(graphdef, p), inputs(), SEGMENTS)[0].sum()))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
heads = lambda x, w: np.einsum('td,dhk->htk', x, w)
RESET = np.concatenate([np.ones((B, 1), bool), SEGMENTS[:, 1:] != SEGMENTS[:, :-1]], axis=1)


def by_loops(mixer, row):
  """Our layer on packed documents against `row(parameters, x, reset)` in float64, row by row."""
  x = inputs()
  got, _ = run(mixer, x, SEGMENTS)
  expected = np.stack([row(arrays(mixer), x[i].astype(np.float64), RESET[i]) for i in range(B)])
  np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
  assert np.abs(expected).max() > 0.3


@pytest.mark.parametrize('mixer_class', [minimal.MinGRU, minimal.MinLSTM])
def test_minimal_cells_equal_loops(mixer_class):
  def row(p, x, reset):
    u = oracles.short_conv(x, p['conv.taps'], p['conv.bias'], reset)
    *gates, candidate = (u @ p['w_in'][:, n] + p[f'biases.{n}'] for n in range(p['w_in'].shape[1]))
    write = sigmoid(gates[0])
    if len(gates) == 2:
      write = sigmoid(gates[1]) / (sigmoid(gates[0]) + sigmoid(gates[1]))
    new = np.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
    h, _ = oracles.elementwise(1 - write, write * new, np.zeros(new.shape[1]), reset,
                               np.ones(T, bool))
    return h @ p['w_out']
  by_loops(shaken(mixer_class, width=10), row)


def test_minimal_gates_stay_finite_where_they_saturate():
  mixer = shaken(minimal.MinLSTM)
  for bias in mixer.biases[:2]:
    bias.set_value(jnp.full(bias.get_value().shape, -200.0))   # both gates 0: i / (f + i) is 1/2
  write = mixer.write_gate(*(jnp.full((1,), -200.0),) * 2)
  assert float(jax.nn.sigmoid(write)[0]) == 0.5
  graphdef, params = nnx.split(mixer)
  grads = jax.jit(jax.grad(lambda p: run(nnx.merge(graphdef, p), inputs())[0].sum()))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def summed(p, x, reset, log_decay, feature=lambda x: x):
  """(q, k, v, out) of each head, before what each layer does with it."""
  q, k, v = (heads(x, p[name]) for name in ('w_q', 'w_k', 'w_v'))
  one = lambda h: oracles.decayed_sum(feature(q[h]), feature(k[h]), v[h], log_decay[h],
                                      np.zeros((q.shape[2], v.shape[2])), reset, np.ones(T, bool))[0]
  return q, k, np.stack([one(h) for h in range(len(q))])


def rms(x):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def test_linear_attention_equals_loops():
  def row(p, x, reset):
    feature = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    q, k, out = summed(p, x, reset, np.zeros((len(p['w_q'][0]), T)), feature)
    total = np.zeros((len(q), T, 1))
    for h in range(len(q)):
      for t in range(T):
        start = max(s for s in range(t + 1) if reset[s])
        total[h, t] = sum(feature(q[h, t]) @ feature(k[h, s]) for s in range(start, t + 1))
    return np.einsum('htv,hvd->td', out / total, p['w_out'])
  by_loops(shaken(linear_attention.LinearAttention, num_heads=3), row)


def test_retention_equals_loops():
  def row(p, x, reset):
    log_decay = np.log(1 - 2.0 ** (-5 - np.arange(2)))[:, None] * np.ones(T)
    _, _, out = summed(p, x, reset, log_decay)
    gated = rms(out * 6 ** -0.5) * silu(heads(x, p['w_g']))
    return np.einsum('htv,hvd->td', gated, p['w_out'])
  by_loops(shaken(linear_attention.Retention, num_heads=2), row)


def test_gla_equals_loops():
  def row(p, x, reset):
    logits = heads(x @ p['w_gate_in'], p['w_gate_out']) + p['gate_bias'].reshape(2, 1, 3)
    _, _, out = summed(p, x, reset, np.log(sigmoid(logits)) / 16)
    gated = rms(out * 3 ** -0.5) * p['norm_scale'] * silu(heads(x, p['w_g']))
    return np.einsum('htv,hvd->td', gated, p['w_out'])
  by_loops(shaken(linear_attention.GLA, num_heads=2), row)


CASES = {
    'min_gru': (minimal.MinGRU, {}),
    'min_lstm': (minimal.MinLSTM, dict(width=5, conv=1)),
    'linear_attention': (linear_attention.LinearAttention, {}),
    'retention': (linear_attention.Retention, dict(key_dim=3, value_dim=5, num_heads=3)),
    'gla': (linear_attention.GLA, {}),
    'rglru': (rglru.RGLRU, dict(width=20, num_heads=2)),
    'rglru, no convolution': (rglru.RGLRU, dict(conv=1)),
    'mamba2': (mamba2.Mamba2, {}),
    'mamba2 of other sizes': (mamba2.Mamba2, dict(key_dim=3, value_dim=7, num_heads=3, conv=1)),
}


@pytest.mark.parametrize('name', CASES)
def test_cost_counts_parameters_and_state(name):
  mixer_class, changes = CASES[name]
  settings = base.Settings(**(dict(dim=D, num_heads=2) | changes))
  mixer = shaken(mixer_class, dim=D, **changes)
  cost = mixer_class.cost(settings)
  assert cost.parameters == sum(x.size for x in jax.tree.leaves(nnx.state(mixer)))
  state = jax.eval_shape(lambda: mixer.init_state(3))
  assert cost.state == sum(x.size for x in jax.tree.leaves(state)) / 3
  assert cost.matrices == sum(x.size for name, x in arrays(mixer).items() if name.startswith('w_'))
  assert cost.flops > 0 and cost.wire > 0


@pytest.mark.parametrize('mixer_class,changes,message', [
    (rglru.RGLRU, dict(num_heads=5), 'model.num_heads=5: must divide the width of rglru'),
    (rglru.RGLRU, dict(num_heads=3, width=16), 'model.mixer_width=16'),
    (linear_attention.GLA, dict(num_heads=4), 'model.num_heads=4: must divide the keys of gla, 0.5'),
    (linear_attention.Retention, dict(num_heads=7), 'must divide the keys of retention, 1 times'),
    (linear_attention.Retention, dict(chunk=12), 'model.mixer_chunk=12: must be a power of two'),
    (mamba2.Mamba2, dict(num_heads=5), 'model.num_heads=5: must divide the inner width of mamba2'),
])
def test_mistakes_are_named(mixer_class, changes, message):
  with pytest.raises(ConfigError, match=message):
    mixer_class.cost(base.Settings(**(dict(dim=D, num_heads=2) | changes)))


@pytest.mark.parametrize('mixer_class', [
    mamba2.Mamba2, pytest.param(linear_attention.GLA, marks=pytest.mark.slow),
    pytest.param(rglru.RGLRU, marks=pytest.mark.slow)])
def test_layers_cut_over_devices(mixer_class):
  """Rows, tokens and heads over 2 devices each: outputs, state and gradients of one device."""
  mixer = shaken(mixer_class, dim=16, num_heads=4, key_dim=3)
  x = np.random.default_rng(1).standard_normal((2, 16, 16)).astype(np.float32)
  segments = jnp.asarray([[1] * 5 + [2] * 11, [3] * 8 + [4] * 8])
  graphdef, params = nnx.split(mixer)
  def call(params, x):
    context, _ = place_tokens(jnp.zeros(x.shape[:2], jnp.int32), new_clock(2), None, segments, None)
    mixer = nnx.merge(graphdef, params)
    y, state = mixer(x, mixer.init_state(2), context)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), (y, state)
  run = jax.value_and_grad(call, has_aux=True)
  layout = mesh.make_layout(mesh.Config(data=2, seq=2, model=2, layout='sequence'))
  kernel_laws.close(jax.jit(mesh.under(layout, run))(params, x), jax.jit(run)(params, x),
                    atol=3e-5, rtol=3e-5)
