"""The rule of RWKV-7 against loops: each form, corners, splits, maps, devices; its layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.recurrence.delta import FLOOR
from longctx.recurrence.diagonal_low_rank import DiagonalLowRank, Inputs
from tests import kernel_laws, oracles

B, T, H, K, V = 2, 16, 2, 4, 3
FORMS = {'sequential': DiagonalLowRank('sequential'), 'chunked': DiagonalLowRank('chunked', 4),
         'scan': DiagonalLowRank('scan', 4)}


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


@pytest.mark.parametrize('form', ['sequential', 'chunked'])
def test_maps_join_and_apply(form):
  kernel_laws.joins(FORMS[form], case())


@pytest.mark.parametrize('devices', kernel_laws.MESHES)
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
