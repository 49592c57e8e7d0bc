"""h_t = a_t h_{t-1} + b_t against loops: each form, resets, padding, splits, maps, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.recurrence import chunks
from longctx.recurrence.elementwise import CHUNKS, Elementwise, Inputs
from tests import kernel_laws, oracles

B, T, E = 2, 16, 6
FORMS = {'sequential': Elementwise('sequential'), 'chunked': Elementwise('chunked', 4),
         'chunks that leave a rest': Elementwise('chunked', 5), 'scan': Elementwise('scan')}


@functools.cache
def case():
  keys = jax.random.split(jax.random.key(0), 3)
  a = jax.nn.sigmoid(2 * jax.random.normal(keys[0], (B, T, E)))
  a = a.at[:, ::5, 0].set(1.0).at[:, 3::4, 1].set(0.0)   # keeps all, keeps nothing
  return (Inputs(a, jax.random.normal(keys[1], (B, T, E)), **kernel_laws.marks(B, T)),
          jax.random.normal(keys[2], (B, E)))


def loops(inputs, state):
  rows = [oracles.elementwise(*(x[i] for x in (inputs.a, inputs.b, state, inputs.reset_BT,
                                               inputs.valid_BT))) for i in range(B)]
  return tuple(np.stack(x) for x in zip(*rows))


@pytest.mark.parametrize('form', FORMS)
def test_equals_loops(form):
  kernel_laws.equals_loops(FORMS[form], case(), loops)


@pytest.mark.parametrize('form', list(FORMS)[1:])
def test_forms_are_equal_in_values_and_gradients(form):
  kernel_laws.same(FORMS[form], FORMS['sequential'], case())


@pytest.mark.parametrize('form', ['chunked', 'scan'])
def test_any_split_and_one_token_at_a_time(form):
  kernel_laws.splits(FORMS[form], case(), (0, 8, 16))
  kernel_laws.splits(FORMS[form], case(), tuple(range(17)))


def test_maps_join_and_apply():
  kernel_laws.joins(FORMS['chunked'], case())


@pytest.mark.parametrize('devices', kernel_laws.MESHES)
def test_cut_over_devices(devices):
  kernel_laws.same(Elementwise('chunked', 1 if devices == 'ring of 8' else 2), FORMS['sequential'],
                   case(), kernel_laws.MESHES[devices])


def test_state_and_output_are_float32_whatever_the_inputs():
  inputs, state = case()
  half = inputs._replace(a=inputs.a.astype(jnp.bfloat16), b=inputs.b.astype(jnp.bfloat16))
  out, after, grads = kernel_laws.compiled(FORMS['chunked'])(half, state)
  assert {out.dtype, after.dtype} == {jnp.dtype('float32')}
  assert grads[0].a.dtype == jnp.bfloat16
  exact = half._replace(a=half.a.astype(jnp.float32), b=half.b.astype(jnp.float32))
  np.testing.assert_array_equal(out, kernel_laws.compiled(FORMS['chunked'])(exact, state)[0])


def test_chunks_and_form_by_platform(monkeypatch):
  long = Inputs(jnp.ones((1, 600, 1)), jnp.ones((1, 600, 1)), None, None)
  loop = lambda kernel: str(jax.make_jaxpr(kernel.finish)(kernel.prepare(long), jnp.zeros((1, 1))))
  assert loop(Elementwise()) == loop(Elementwise('chunked', CHUNKS['cpu']))
  assert loop(Elementwise()) != loop(Elementwise('chunked', CHUNKS['cpu'] // 2))
  monkeypatch.setattr(chunks, 'platform', lambda: 'gpu')
  assert loop(Elementwise()) == loop(Elementwise('scan')) != loop(Elementwise('chunked'))
