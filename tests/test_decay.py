"""The decayed sum against loops: decays a head and a channel, forms, splits, maps, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.recurrence.decay import Decay, Inputs
from tests import kernel_laws, oracles

B, T, H, K, V = 2, 16, 4, 3, 5
SEQUENTIAL, CHUNKED = Decay('sequential'), Decay('chunked', 4)
FORMS = {'one chunk': Decay('chunked', 64), 'scan': Decay('scan', 2)}


@functools.cache
def case(kind):
  """Two groups of two heads where each has its decay; else every head has queries of its own."""
  keys = jax.random.split(jax.random.key(0), 5)
  groups = 2 if kind == 'a head' else H
  normal = lambda key, *shape: jax.random.normal(key, (B, T, *shape))
  shape = (H, K) if kind == 'a channel' else (H,)
  log_decay = -jax.nn.softplus(2 * normal(keys[3], *shape))
  log_decay = log_decay.at[:, ::5, 0].set(0.0).at[:, 3::6, 1].set(-60.0)
  log_decay = None if kind == 'no decay' else log_decay
  inputs = Inputs(normal(keys[0], groups, K), normal(keys[1], groups, K), normal(keys[2], H, V),
                  log_decay, **kernel_laws.marks(B, T))
  return inputs, jax.random.normal(keys[4], (B, H, K, V))


def loops(inputs, state):
  out, after = np.zeros_like(inputs.v), np.zeros_like(state)
  length = out.shape[1]
  group = H // inputs.q.shape[2]
  for i in range(B):
    for h in range(H):
      decay = np.zeros(length) if inputs.log_decay is None else inputs.log_decay[i, :, h]
      out[i, :, h], after[i, h] = oracles.decayed_sum(
          inputs.q[i, :, h // group], inputs.k[i, :, h // group], inputs.v[i, :, h], decay,
          state[i, h], inputs.reset_BT[i], inputs.valid_BT[i])
  return out, after


@pytest.mark.parametrize('kind', ['a head', 'a channel', 'no decay'])
def test_equals_loops(kind):
  kernel_laws.equals_loops(CHUNKED, case(kind), loops)
  if kind != 'no decay':
    kernel_laws.equals_loops(SEQUENTIAL, case(kind), loops)


def test_a_length_that_no_chunk_divides():
  inputs, state = case('a head')
  kernel_laws.equals_loops(CHUNKED, (kernel_laws.cut(inputs, 0, 13), state), loops)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kind', ['a head', 'a channel'])
def test_forms_are_equal_in_values_and_gradients(kind, form):
  kernel_laws.same(FORMS[form], SEQUENTIAL, case(kind))


@pytest.mark.parametrize('kind,edges', [('a head', tuple(range(17))), ('a channel', (0, 8, 16))])
def test_any_split_and_one_token_at_a_time(kind, edges):
  kernel_laws.splits(CHUNKED, case(kind), edges)


@pytest.mark.parametrize('kind', ['a head', 'a channel'])
def test_maps_join_and_apply(kind):
  kernel_laws.joins(CHUNKED, case(kind))


def test_the_map_of_tokens_taken_one_by_one():
  kernel_laws.joins(SEQUENTIAL, case('a channel'))


@pytest.mark.parametrize('kind,devices', [
    ('a channel', 'ring of 2'), ('a head', 'ring of 4'), ('a channel', 'ring of 8'),
    ('a head', 'data, ring and heads')])
def test_cut_over_devices(kind, devices):
  kernel_laws.same(CHUNKED, SEQUENTIAL, case(kind), kernel_laws.MESHES[devices])


@pytest.mark.parametrize('kind', ['a head', 'a channel'])
@pytest.mark.parametrize('decay', [0.0, -1e-30, -20.0, -88.0, -1e4, -np.inf])
def test_decays_at_the_ends_of_their_range(kind, decay):
  """Decay 1 and decay 0 exactly: finite, equal to the definition, gradients too."""
  inputs, state = case(kind)
  extreme = inputs.log_decay.at[:, ::3].set(decay).at[:, :, 1].set(decay)
  kernel_laws.same(CHUNKED, SEQUENTIAL, (inputs._replace(log_decay=extreme), state))


@pytest.mark.parametrize('kind', ['a head', 'a channel'])
def test_decays_of_nearly_0_keep_their_digits_after_strong_ones(kind):
  kernel_laws.nearly_no_decay_after_strong_ones(FORMS['one chunk'], SEQUENTIAL, case(kind))


def test_bfloat16_keeps_a_float32_state():
  inputs, state = case('a head')
  half = inputs._replace(**{n: getattr(inputs, n).astype(jnp.bfloat16) for n in 'qkv'})
  out, after, _ = kernel_laws.compiled(CHUNKED)(half, state)
  assert out.dtype == jnp.bfloat16 and after.dtype == jnp.float32
  exact = half._replace(**{n: getattr(half, n).astype(jnp.float32) for n in 'qkv'})
  expected, after_expected, _ = kernel_laws.compiled(SEQUENTIAL)(exact, state)
  seen = lambda x: kernel_laws.seen(x, inputs).astype(np.float32)
  np.testing.assert_allclose(seen(out), seen(expected), atol=0.06, rtol=0.02)
  np.testing.assert_allclose(after, after_expected, atol=0.03, rtol=0.01)
