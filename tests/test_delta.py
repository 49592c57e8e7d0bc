"""The delta rule against loops: each decay and form, corners, splits, maps, devices; its layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.mixers import delta_net, gated_delta, kda
from longctx.models.mixers.base import Settings
from longctx.parallel.state_scan import over_sequence
from longctx.recurrence.delta import FLOOR, Delta, Inputs
from longctx.recurrence.triangular import decayed_pairs, inverse, sums_around
from tests import kernel_laws, oracles
from tests.test_mixers import SEGMENTS, arrays, run, shaken

B, T, H, K, V = 2, 16, 2, 4, 3
FORMS = {'sequential': Delta('sequential'), 'chunked': Delta('chunked', 4), 'scan': Delta('scan', 4)}
DECAYS = ('none', 'head', 'channel')

slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)
DEVICES = [slow(name) if name in ('ring of 2', 'ring of 8') else name for name in kernel_laws.MESHES]


@functools.cache
def case(decay):
  """beta from 0 to 2, keys of length 1 and 0, decays of exactly 1 and 0 among others."""
  keys = jax.random.split(jax.random.key(0), 6)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  k = unit(normal(1, B, T, H, K)).at[:, 5].set(0.0)
  beta = (2 * jax.nn.sigmoid(2 * normal(3, B, T, H))).at[:, 3].set(0.0).at[:, 11].set(2.0)
  log_decay = None
  if decay != 'none':
    log_decay = -jnp.exp(normal(4, B, T, H, K) - 1).at[:, 1::6].set(0.0)
    log_decay = log_decay.at[:, 9::6, 0, :2].set(-jnp.inf)
    log_decay = log_decay[..., 0] if decay == 'head' else log_decay
  return (Inputs(normal(0, B, T, H, K), k, normal(2, B, T, H, V), beta, log_decay,
                 **kernel_laws.marks(B, T)), normal(5, B, H, K, V))


def loops(inputs, state):
  out, after = np.zeros(inputs.v.shape), np.zeros(state.shape)
  for b in range(len(out)):
    for h in range(out.shape[2]):
      rows = [None if x is None else x[b, :, h] for x in inputs[:5]]
      out[b, :, h], after[b, h] = oracles.delta_rule(
          *rows, state[b, h], inputs.reset_BT[b], inputs.valid_BT[b])
  return out, after


@pytest.mark.parametrize('decay', DECAYS)
@pytest.mark.parametrize('form', ['sequential', 'chunked'])
def test_equals_loops(form, decay):
  kernel_laws.equals_loops(FORMS[form], case(decay), loops)


@pytest.mark.parametrize('form,decay', [
    *(('chunked', decay) for decay in DECAYS), ('scan', 'channel'), slow('scan', 'none'),
    slow('scan', 'head')])
def test_forms_are_equal_in_values_and_gradients(form, decay):
  kernel_laws.same(FORMS[form], FORMS['sequential'], case(decay))


@pytest.mark.parametrize('decay', ['channel', slow('head')])
def test_any_split_and_one_token_at_a_time(decay):
  kernel_laws.splits(FORMS['chunked'], case(decay), (0, 10, 16))
  kernel_laws.splits(FORMS['chunked'], case(decay), tuple(range(17)))


@pytest.mark.parametrize('form,decay', [('sequential', 'head'), ('chunked', 'channel')])
def test_maps_join_and_apply(form, decay):
  kernel_laws.joins(FORMS[form], case(decay))


@pytest.mark.parametrize('devices', DEVICES)
def test_cut_over_devices(devices):
  decay = 'channel' if devices == 'ring of 4' else 'head'
  kernel_laws.same(FORMS['chunked'], FORMS['sequential'], case(decay), kernel_laws.MESHES[devices])


def test_one_key_again_and_again_keeps_its_digits():
  """Powers of L cancel here: the doubled Neumann series of a chunk of 64 has no digit left."""
  k = np.broadcast_to([[[[0.6, 0.8]]]], (1, 128, 1, 2))
  rng = np.random.default_rng(0)
  v = rng.standard_normal((1, 128, 1, 2))
  for most in (1.0, 2.0):
    inputs = Inputs(k, k, v, np.full((1, 128, 1), most), None, np.zeros((1, 128), bool),
                    np.ones((1, 128), bool))
    expected, after = loops(inputs, np.zeros((1, 1, 2, 2)))
    out, state = jax.jit(functools.partial(over_sequence, Delta('chunked', 64)))(
        jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), inputs),
        jnp.zeros((1, 1, 2, 2)))
    np.testing.assert_allclose(out, expected, atol=2e-4)   # 128 reflections one after the other
    np.testing.assert_allclose(state, after, atol=2e-4)


@pytest.mark.parametrize('size', [1, 2, 4, 8, 32])
def test_inverse_and_its_gradient(size):
  rng = np.random.default_rng(size)
  lower = np.tril(rng.standard_normal((3, size, size)), -1)
  weights = np.tril(rng.standard_normal((3, size, size)), -1)
  expected = np.linalg.inv(np.eye(size) + lower)
  got, slope = jax.jit(lambda x: jax.vjp(inverse, x)[1](jnp.asarray(weights, jnp.float32)) + (
      inverse(x),))(jnp.asarray(lower, jnp.float32))[::-1]
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
  swap = lambda x: np.swapaxes(x, -1, -2)
  expected = -swap(expected) @ weights @ swap(expected)
  np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_decayed_pairs():
  """Decays of e^-60 and e^-88 a token overflow in neither factor and cost the others no digits."""
  C = 8
  rng = np.random.default_rng(0)
  x, y, g = rng.standard_normal((2, C, 3)), rng.standard_normal((C, 3)), -rng.random((C, 3))
  g[2], g[5, 1] = -88, -60
  expected = np.zeros((2, C, C))
  for t in range(C):
    for i in range(t + 1):
      for d in range(3):
        expected[0, t, i] += x[0, t, d] * y[i, d] * np.exp(g[i + 1:t + 1, d].sum())
        expected[1, t, i] += x[1, t, d] * y[i, d] * np.exp(g[i + 1:t, d].sum()) * (i < t)
  got = jax.jit(decayed_pairs, static_argnums=3)(
      *(jnp.asarray(a, jnp.float32) for a in (x, y, g)), (True, False))
  np.testing.assert_allclose(got, expected, atol=1e-6)
  np.testing.assert_allclose(sums_around(jnp.asarray(g, jnp.float32))[2],
                             [g[t + 1:].sum(0) for t in range(C)], rtol=1e-6)


@pytest.mark.parametrize('form', ['sequential', 'chunked'])
def test_a_key_that_rounding_made_too_long_does_not_make_the_memory_grow(form):
  """beta = 2 and nothing forgotten: each token turns what the memory holds along its key."""
  k = jax.random.normal(jax.random.key(13), (K,))
  key = (k / jnp.linalg.norm(k)).astype(jnp.bfloat16)
  assert jnp.sum(jnp.square(key.astype(jnp.float32))) > 1.003
  k = jnp.broadcast_to(key, (1, 4096, 1, K))
  v = jnp.zeros((1, 4096, 1, 1), jnp.bfloat16)
  inputs = Inputs(k, k, v, jnp.full((1, 4096, 1), 2.0), None)
  state = jax.random.normal(jax.random.key(1), (1, 1, K, 1))
  _, after = jax.jit(functools.partial(over_sequence, FORMS[form]))(inputs, state)
  assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(state), rel=1e-3)


@pytest.mark.parametrize('decay', ['head', 'channel'])
def test_corners_have_finite_gradients(decay):
  """All decays 0, all 1, a log decay just above the floor; keys all zero; nothing but padding."""
  inputs, state = case(decay)
  inputs = jax.tree.map(lambda x: x[:, :4], inputs)
  for changes in (
      {'log_decay': jnp.full_like(inputs.log_decay, -jnp.inf)},
      {'log_decay': jnp.zeros_like(inputs.log_decay), 'beta': jnp.ones_like(inputs.beta)},
      {'log_decay': jnp.full_like(inputs.log_decay, FLOOR + 1e-3)},
      {'k': jnp.zeros_like(inputs.k), 'q': jnp.zeros_like(inputs.q)},
      {'valid_BT': jnp.zeros_like(inputs.valid_BT)}):
    kernel_laws.same(FORMS['chunked'], FORMS['sequential'],
                     (inputs._replace(**changes), state))


@pytest.mark.parametrize('decay', ['head', slow('channel')])
def test_decays_of_nearly_0_keep_their_digits_after_strong_ones(decay):
  kernel_laws.nearly_no_decay_after_strong_ones(
      Delta('chunked', 64), FORMS['sequential'], case(decay))


def test_state_is_float32_whatever_the_inputs():
  inputs, state = case('head')
  half = inputs._replace(**{n: getattr(inputs, n).astype(jnp.bfloat16) for n in 'qkv'})
  out, after, grads = kernel_laws.compiled(FORMS['chunked'])(half, state)
  exact = half._replace(**{n: getattr(half, n).astype(jnp.float32) for n in 'qkv'})
  expected, after_expected, _ = kernel_laws.compiled(FORMS['chunked'])(exact, state)
  assert (out.dtype, after.dtype, grads[0].q.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
  np.testing.assert_allclose(after, after_expected, atol=1e-5)   # bf16 never enters the map
  np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.05)


# Layers.

D = 12
small = functools.partial(Settings, dim=D, num_heads=2, key_dim=4, value_dim=6, std=0.3, out_std=0.3)
tokens = lambda: np.random.default_rng(1).standard_normal((2, 11, D)).astype(np.float32)


@pytest.mark.slow
def test_gated_delta_is_the_layer_of_qwen3_next():
  import torch
  from transformers.models.qwen3_next import modeling_qwen3_next as published
  mixer = shaken(gated_delta.GatedDelta, key_dim=4, value_dim=6)
  config = published.Qwen3NextConfig(
      hidden_size=D, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4,
      linear_value_head_dim=6, linear_conv_kernel_dim=4, num_hidden_layers=1, rms_norm_eps=1e-6,
      layer_types=['linear_attention'])
  theirs = published.Qwen3NextGatedDeltaNet(config, 0)
  ours = arrays(mixer)
  rows = lambda w: w.reshape(D, 2, -1).transpose(1, 2, 0)   # [D, H, K] -> [H, K, D]
  stack = lambda *names: np.concatenate([rows(ours[n]) for n in names], 1).reshape(-1, D)
  taps = np.split(ours['qkv.conv.taps'].reshape(4, 2, 14), [4, 8], axis=-1)   # a head's q, k, v
  taps = np.concatenate([x.reshape(4, -1) for x in taps], axis=1)             # q, k, v of all heads
  weights = {
      'in_proj_qkvz.weight': stack('qkv.w_q', 'qkv.w_k', 'qkv.w_v', 'w_gate'),
      'in_proj_ba.weight': stack('w_beta', 'w_decay'), 'conv1d.weight': taps[::-1].T[:, None],
      'dt_bias': ours['dt_bias'], 'A_log': ours['a_log'], 'norm.weight': ours['norm.scale'],
      'out_proj.weight': ours['w_out'].reshape(12, D).T}
  theirs.load_state_dict({n: torch.tensor(x.astype(np.float32)) for n, x in weights.items()})
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens())).numpy()
  got, _ = run(mixer, tokens())
  np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
  assert np.abs(expected).max() > 0.3


def test_gated_delta_starts_as_published():
  mixer = gated_delta.GatedDelta(Settings(dim=16, num_heads=256, key_dim=1), rngs=nnx.Rngs(0))
  found = arrays(mixer)
  rate, step = np.exp(found['a_log']), np.log1p(np.exp(found['dt_bias']))
  assert 0.01 <= rate.min() < 0.5 and 15.5 < rate.max() <= 16 and abs(rate.mean() - 8) < 0.8
  assert 1e-3 <= step.min() < 1.3e-3 and 0.08 < step.max() <= 0.1001
  assert abs(np.log(step).mean() - np.log(1e-2)) < 0.2
  assert gated_delta.GatedDelta.cost(Settings(dim=256, num_heads=4)).state == 4 * 48 * 96 + 3 * 768


LAYERS = {'gated_delta': gated_delta.GatedDelta, 'delta_net': delta_net.DeltaNet, 'kda': kda.KDA}


def layer_loops(name, p, x, most):
  """The published layer over one document x [T, D], from its parameters, in float64."""
  H, K, V = 2, 4, 6
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  softplus = lambda z: np.log1p(np.exp(z))
  length = len(x)
  mixed = np.concatenate([np.einsum('td,dhk->thk', x, p[f'qkv.w_{n}']) for n in 'qkv'], axis=-1)
  mixed, conv = mixed.reshape(length, -1), np.zeros((length, H * (2 * K + V)))
  for t in range(length):
    for j in range(min(4, t + 1)):
      conv[t] += p['qkv.conv.taps'][j] * mixed[t - j]
  q, k, v = np.split((conv * sigmoid(conv)).reshape(length, H, -1), [K, 2 * K], axis=-1)
  unit = lambda z: z / np.sqrt((z * z).sum(-1, keepdims=True) + 1e-6)
  q, k, beta = unit(q) / np.sqrt(K), unit(k), most * sigmoid(x @ p['w_beta'])
  decay = None
  if name == 'gated_delta':
    decay = -np.exp(p['a_log']) * softplus(x @ p['w_decay'] + p['dt_bias'])
  elif name == 'kda':
    low = np.einsum('tr,rhk->thk', x @ p['w_decay_in'], p['w_decay_out'])
    decay = -np.exp(p['a_log'])[:, None] * softplus(low + p['dt_bias'].reshape(H, K))
  y = np.zeros((length, x.shape[1]))
  for h in range(H):
    out, _ = oracles.delta_rule(q[:, h], k[:, h], v[:, h], beta[:, h],
                                None if decay is None else decay[:, h], np.zeros((K, V)),
                                np.zeros(length, bool), np.ones(length, bool))
    out = oracles.rms_norm(out, p['norm.scale'], 1e-6)
    if name == 'gated_delta':
      gate = x @ p['w_gate'][:, h]
      out = out * gate * sigmoid(gate)
    elif name == 'kda':
      out = out * sigmoid(x @ p['w_gate_in'] @ p['w_gate_out'][:, h]
                          + p['bias_gate'].reshape(H, V)[h])
    y += out @ p['w_out'][h]
  return y


@pytest.mark.parametrize('name,negative', [
    ('gated_delta', True), ('delta_net', True), ('kda', True), slow('delta_net', False),
    slow('kda', False)])
def test_layer_is_the_published_one(name, negative):
  mixer = shaken(LAYERS[name], key_dim=4, value_dim=6, negative=negative)
  got, _ = run(mixer, tokens(), SEGMENTS)
  for row, (a, b) in ((0, (0, 4)), (0, (4, 11)), (1, (0, 9)), (1, (9, 11))):
    expected = layer_loops(name, arrays(mixer), np.float64(tokens()[row, a:b]), 1.0 + negative)
    np.testing.assert_allclose(got[row, a:b], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('name', ['kda', slow('gated_delta'), slow('delta_net')])
def test_zero_inputs_and_saturated_gates_have_finite_gradients(name):
  mixer = LAYERS[name](small(chunk=4), rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(mixer)
  loss = jax.jit(jax.grad(lambda p, x: jnp.sum(run(nnx.merge(graphdef, p), x)[0] ** 2)))
  for x in (np.zeros((2, 11, D), np.float32), 1e4 * tokens()):
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(loss(params, x)))


@pytest.mark.parametrize('name', LAYERS)
def test_costs(name):
  for settings in (small(), small(conv=1), Settings(dim=16, num_heads=2)):
    mixer, cost = LAYERS[name](settings, rngs=nnx.Rngs(0)), LAYERS[name].cost(settings)
    found = arrays(mixer)
    assert cost.parameters == sum(x.size for x in found.values())
    assert cost.matrices == sum(x.size for n, x in found.items() if n.split('.')[-1][:2] == 'w_')
    assert cost.state == sum(x[0].size for x in jax.tree.leaves(mixer.init_state(1)))
    assert cost.wire == 2 * np.prod(mixer.dims[:2]) * sum(mixer.dims[1:]) / 2


def test_mistakes_are_named():
  cost = gated_delta.GatedDelta.cost
  with pytest.raises(ConfigError, match=r'model.num_heads=5: must divide 3/4 of model.embed_dim=12'):
    cost(Settings(dim=12, num_heads=5))
  with pytest.raises(ConfigError, match=r'model.mixer_chunk=24: must be a power of two, as 32, or 0'):
    cost(small(chunk=24))
