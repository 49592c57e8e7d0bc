"""The rule of RWKV-7 against loops: each form, corners, splits, maps, devices; its layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models.mixers.base import Settings
from longctx.models.mixers.rwkv7 import RWKV7, ranks
from longctx.recurrence.delta import FLOOR
from longctx.recurrence.diagonal_low_rank import DiagonalLowRank, Inputs
from tests import kernel_laws, oracles
from tests.test_mixers import SEGMENTS, arrays, run, shaken

B, T, H, K, V = 2, 16, 2, 4, 3
FORMS = {'sequential': DiagonalLowRank('sequential'), 'chunked': DiagonalLowRank('chunked', 4),
         'scan': DiagonalLowRank('scan', 4)}

slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)
DEVICES = [slow(name) if name in ('ring of 2', 'ring of 8') else name for name in kernel_laws.MESHES]


@functools.cache
def case():
  """Erasing keys of length 1 and 0, decays of exactly 1 and 0 among others."""
  keys = jax.random.split(jax.random.key(0), 7)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  erase = normal(3, B, T, H, K)
  erase = (erase / jnp.linalg.norm(erase, axis=-1, keepdims=True)).at[:, 5].set(0.0)
  log_decay = -jnp.exp(normal(5, B, T, H, K) - 1).at[:, 1::6].set(0.0)
  log_decay = log_decay.at[:, 9::6, 0, :2].set(-jnp.inf)
  return (Inputs(normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V), erase,
                 jax.nn.sigmoid(normal(4, B, T, H, K)), log_decay, **kernel_laws.marks(B, T)),
          normal(6, B, H, K, V))


def loops(inputs, state):
  out, after = np.zeros(inputs.v.shape), np.zeros(state.shape)
  for b in range(B):
    for h in range(H):
      out[b, :, h], after[b, h] = oracles.diagonal_low_rank(
          *(x[b, :, h] for x in inputs[:6]), state[b, h], inputs.reset_BT[b], inputs.valid_BT[b])
  return out, after


@pytest.mark.parametrize('form', ['sequential', 'chunked'])
def test_equals_loops(form):
  kernel_laws.equals_loops(FORMS[form], case(), loops)


@pytest.mark.parametrize('form', ['chunked', 'scan'])
def test_forms_are_equal_in_values_and_gradients(form):
  kernel_laws.same(FORMS[form], FORMS['sequential'], case())


def test_any_split_and_one_token_at_a_time():
  kernel_laws.splits(FORMS['chunked'], case(), (0, 10, 16))
  kernel_laws.splits(FORMS['chunked'], case(), tuple(range(17)))


@pytest.mark.parametrize('form', ['chunked', slow('sequential')])
def test_maps_join_and_apply(form):
  kernel_laws.joins(FORMS[form], case())


@pytest.mark.parametrize('devices', DEVICES)
def test_cut_over_devices(devices):
  kernel_laws.same(FORMS['chunked'], FORMS['sequential'], case(), kernel_laws.MESHES[devices])


@pytest.mark.parametrize('changes', [
    dict(log_decay=-jnp.inf), dict(log_decay=FLOOR + 1e-3), dict(log_decay=0.0, rate=1.0),
    dict(q=0.0, k=0.0), dict(erase=0.0), dict(valid_BT=False)],
    ids=lambda changes: ' '.join(f'{k}={v}' for k, v in changes.items()))
def test_corners_have_finite_gradients(changes):
  inputs, state = case()
  full = {name: jnp.full_like(getattr(inputs, name), x) for name, x in changes.items()}
  kernel_laws.same(FORMS['chunked'], FORMS['sequential'], (inputs._replace(**full), state))


def test_state_is_float32_whatever_the_inputs():
  inputs, state = case()
  names = ('q', 'k', 'v', 'erase')
  half = inputs._replace(**{n: getattr(inputs, n).astype(jnp.bfloat16) for n in names})
  out, after, grads = kernel_laws.compiled(FORMS['chunked'])(half, state)
  exact = half._replace(**{n: getattr(half, n).astype(jnp.float32) for n in names})
  expected, after_expected, _ = kernel_laws.compiled(FORMS['chunked'])(exact, state)
  assert (out.dtype, after.dtype, grads[0].q.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
  kernel_laws.close(after, after_expected)   # bf16 never enters the map
  error = np.abs(np.asarray(out, np.float32) - expected)
  assert (error / (1 + np.abs(expected))).max() < 0.03


D = 12
small = functools.partial(Settings, dim=D, num_heads=2, key_dim=4, value_dim=6, chunk=4, std=0.3,
                          out_std=0.3)
tokens = lambda: np.random.default_rng(1).standard_normal((2, 11, D)).astype(np.float32)


def layer_loops(p, x):
  """RWKV-7's time mixing over one document x [T, D], token by token, float64 (rwkv_v7_numpy.py)."""
  heads, size, wide = 2, 4, 6
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  flat = lambda name: p[name].reshape(p[name].shape[0], -1)
  last, S, y = np.zeros(D), np.zeros((heads, size, wide)), np.zeros(x.shape)
  for t in range(len(x)):
    xr, xw, xk, xv, xa, xg = (x[t] + p[f'mix.{n}'] * (last - x[t]) for n in 'rwkvag')
    last = x[t]
    r, k, v = xr @ flat('w_r'), xk @ flat('w_k'), xv @ flat('w_v')
    w = np.exp(-sigmoid(np.tanh(xw @ p['w_decay_in']) @ flat('w_decay_out') + p['bias_decay'])
               / np.sqrt(np.e))
    a = sigmoid(xa @ p['w_rate_in'] @ flat('w_rate_out') + p['bias_rate'])
    g = sigmoid(xg @ p['w_gate_in']) @ flat('w_gate_out')
    erase, k = k * p['k_k'], k + k * (a - 1) * p['k_a']
    out = np.zeros((heads, wide))
    for h in range(heads):
      i, o = slice(size * h, size * h + size), slice(wide * h, wide * h + wide)
      c = erase[i] / np.sqrt((erase[i] ** 2).sum() + 1e-6)
      S[h] = w[i, None] * S[h] - np.outer(c * a[i], c @ S[h]) + np.outer(k[i], v[o])
      read = r[i] @ S[h]
      read = (read - read.mean()) / np.sqrt(read.var() + wide * 1e-5)
      out[h] = read * p['scale'][o] + p['bias'][o] + (r[i] * k[i] * p['r_k'][i]).sum() * v[o]
    y[t] = (out.ravel() * g) @ p['w_out'].reshape(-1, D)
  return y


def test_layer_is_the_time_mixing_of_rwkv7():
  mixer = shaken(RWKV7, key_dim=4, value_dim=6)
  got, _ = run(mixer, tokens(), SEGMENTS)
  for row, (a, b) in ((0, (0, 4)), (0, (4, 11)), (1, (0, 9)), (1, (9, 11))):
    expected = layer_loops(arrays(mixer), np.float64(tokens()[row, a:b]))
    np.testing.assert_allclose(got[row, a:b], expected, atol=2e-5 * np.abs(expected).max(), rtol=2e-5)
  assert np.abs(expected).max() > 0.3


def test_layer_starts_as_published_and_counts_itself():
  for settings in (small(), Settings(dim=128, num_heads=2)):
    mixer, cost = RWKV7(settings, rngs=nnx.Rngs(0)), RWKV7.cost(settings)
    found = arrays(mixer)
    assert cost.parameters == sum(x.size for x in found.values())
    assert cost.matrices == sum(x.size for n, x in found.items() if n[:2] == 'w_')
    assert cost.state == sum(x[0].size for x in jax.tree.leaves(mixer.init_state(1)))
  assert cost.wire == 2 * 64 * 128
  assert found['bias_decay'].min() < -7 and found['bias_decay'].max() > 2.9
  for n in (0, 40, 127):   # of 128 channels in heads of 64
    zigzag = (n % 64 - 31.5) / 31.5
    assert found['bias_rate'][n] == pytest.approx(
        -0.19 + 0.3 * zigzag * abs(zigzag) + 0.4 * (n / 127 - 0.5), abs=1e-5)
    assert found['mix.w'][n] == pytest.approx(1 - (n / 128) ** 0.45, abs=1e-5)
  rows = found['w_rate_out'].reshape(32, -1)
  np.testing.assert_allclose(rows @ rows.T, 0.01 * np.eye(32), atol=1e-6)
  assert not found['w_rate_in'].any()
  assert ranks(2048, 64) == {'decay': 128, 'rate': 128, 'gate': 224}


def test_zero_inputs_and_saturated_gates_have_finite_gradients():
  mixer = RWKV7(small(), rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(mixer)
  loss = jax.jit(jax.grad(lambda p, x: jnp.sum(run(nnx.merge(graphdef, p), x)[0] ** 2)))
  for x in (np.zeros((2, 11, D), np.float32), 1e3 * tokens()):
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(loss(params, x)))
