"""The decayed sum against loops: decays a head and a channel, groups, forms, splits, maps, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.recurrence.decay import Decay, Inputs
from tests import kernel_laws, oracles

B, T, H, K, V = 2, 16, 4, 3, 5
SEQUENTIAL, CHUNKED = Decay('sequential'), Decay('chunked', 4)
FORMS = {'sequential': SEQUENTIAL, 'chunked': CHUNKED, 'one chunk': Decay('chunked', 64),
         'scan': Decay('scan', 2)}
KINDS = ('a head', 'a channel', 'grouped', 'none')


@functools.cache
def case(kind, length=T):
  keys = jax.random.split(jax.random.key(0), 5)
  groups = 2 if kind == 'grouped' else H
  normal = lambda key, *shape: jax.random.normal(key, (B, length, *shape))
  shape = (H, K) if kind == 'a channel' else (H,)
  log_decay = -jax.nn.softplus(2 * normal(keys[3], *shape))
  log_decay = log_decay.at[:, ::5, 0].set(0.0).at[:, 3::6, 1].set(-60.0)
  log_decay = None if kind == 'none' else log_decay
  inputs = Inputs(normal(keys[0], groups, K), normal(keys[1], groups, K), normal(keys[2], H, V),
                  log_decay, **kernel_laws.marks(B, length))
  return inputs, jax.random.normal(keys[4], (B, H, K, V))


def loops(inputs, state):
  out, after = np.zeros_like(inputs.v), np.zeros_like(state)
  group = H // inputs.q.shape[2]
  for i in range(B):
    for h in range(H):
      decay = np.zeros(T) if inputs.log_decay is None else inputs.log_decay[i, :, h]
      out[i, :, h], after[i, h] = oracles.decayed_sum(
          inputs.q[i, :, h // group], inputs.k[i, :, h // group], inputs.v[i, :, h], decay,
          state[i, h], inputs.reset_BT[i], inputs.valid_BT[i])
  return out, after


@pytest.mark.parametrize('kind', KINDS)
def test_equals_loops(kind):
  kernel_laws.equals_loops(SEQUENTIAL, case(kind), loops)
  kernel_laws.equals_loops(CHUNKED, case(kind), loops)


@pytest.mark.parametrize('form', ['one chunk', 'scan'])
@pytest.mark.parametrize('kind', ['grouped', 'a channel'])
def test_forms_are_equal_in_values_and_gradients(kind, form):
  kernel_laws.same(FORMS[form], SEQUENTIAL, case(kind))


@pytest.mark.parametrize('kind', ['grouped', 'a channel'])
def test_any_split_and_one_token_at_a_time(kind):
  kernel_laws.splits(CHUNKED, case(kind), (0, 8, 16))
  kernel_laws.splits(CHUNKED, case(kind), tuple(range(17)))


def test_a_length_that_no_chunk_divides():
  inputs, state = case('a head')
  short = kernel_laws.cut(inputs, 0, 13)
  kernel_laws.same(CHUNKED, SEQUENTIAL, (short, state))


@pytest.mark.parametrize('kind', ['a head', 'a channel'])
def test_maps_join_and_apply(kind):
  kernel_laws.joins(CHUNKED, case(kind))
  inputs = case(kind)[0]
  maps = [kernel.transition(kernel.prepare(inputs)) for kernel in (SEQUENTIAL, CHUNKED)]
  kernel_laws.close(maps[1], jax.tree.map(lambda x, y: x[..., :y.shape[-2], :], *maps))


@pytest.mark.parametrize('kind,devices', [
    ('a head', 'ring of 2'), ('a channel', 'ring of 4'), ('a head', 'ring of 8'),
    ('grouped', 'data, ring and heads'), ('a channel', 'data, ring and heads')])
def test_cut_over_devices(kind, devices):
  kernel_laws.same(CHUNKED, SEQUENTIAL, case(kind), kernel_laws.MESHES[devices])


@pytest.mark.parametrize('kind', ['a head', 'a channel'])
@pytest.mark.parametrize('decay', [0.0, -1e-30, -20.0, -88.0, -1e4, -np.inf])
def test_decays_at_the_ends_of_their_range(kind, decay):
  """Decay 1 and decay 0 exactly: finite, equal to the definition, gradients too."""
  inputs, state = case(kind)
  extreme = inputs.log_decay.at[:, ::3].set(decay).at[:, :, 1].set(decay)
  kernel_laws.same(CHUNKED, SEQUENTIAL, (inputs._replace(log_decay=extreme), state))


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
