"""The chunked loss equals its definition, its gradients too, on one device and on eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.errors import ConfigError
from longctx.training.loss import Config, cross_entropy
from tests import oracles

ALL = {'z_loss': 0.02, 'label_smoothing': 0.1}
OPTIONS = [{}, {'z_loss': 0.01}, {'label_smoothing': 0.2}, ALL]


def inputs(B=2, T=7, D=5, V=11, seed=0, dtype=np.float32, scale=1.0):
  rng = np.random.default_rng(seed)
  hidden = (scale * rng.normal(size=(B, T, D))).astype(dtype)
  embedding = rng.normal(size=(V, D)).astype(np.float32)
  weights = rng.uniform(0.1, 1, size=(B, T)) * (rng.random((B, T)) < 0.7)
  return hidden, embedding, rng.integers(0, V, (B, T)), np.float32(weights / weights.sum())


def value_and_grad(hidden, embedding, targets, weights, **options):
  f = lambda h, e: cross_entropy(h, e, targets, weights, **options)
  (total, nll), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(
      hidden, embedding)
  return total, nll, *grads


def assert_equal_oracle(got, want, rtol=2e-5):
  for name, a, b in zip(('total', 'nll', 'dhidden', 'dembedding'), got, want):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_the_oracles_gradients_are_difference_quotients(options):
  hidden, embedding, targets, weights = inputs(B=1, T=2, D=3, V=4)
  hidden, embedding = np.float64(hidden), np.float64(embedding)
  _, _, *grads = oracles.cross_entropy(hidden, embedding, targets, weights, **options)
  for x, grad in zip((hidden, embedding), grads):
    for i in np.ndindex(x.shape):
      x[i] += 1e-5
      up = oracles.cross_entropy(hidden, embedding, targets, weights, **options)[0]
      x[i] -= 2e-5
      down = oracles.cross_entropy(hidden, embedding, targets, weights, **options)[0]
      x[i] += 1e-5
      assert grad[i] == pytest.approx((up - down) / 2e-5, abs=1e-8)


@pytest.mark.parametrize('options, chunk', [
    *((options, 3) for options in OPTIONS),
    *((ALL, chunk) for chunk in (0, 1, 4, 7, 100))], ids=str)
def test_values_and_gradients_equal_the_definition(options, chunk):
  args = inputs()
  assert_equal_oracle(value_and_grad(*args, chunk=chunk, **options),
                      oracles.cross_entropy(*args, **options))


@pytest.mark.parametrize('batch_shards, length_shards, chunk', [
    (2, 1, 0), (1, 3, 2), (4, 3, 0), (4, 3, 2), (2, 3, 3)])
def test_shards_and_remainders_change_nothing(batch_shards, length_shards, chunk):
  args = inputs(B=4, T=15)
  got = value_and_grad(*args, chunk=chunk, batch_shards=batch_shards, length_shards=length_shards,
                       **ALL)
  assert_equal_oracle(got, oracles.cross_entropy(*args, **ALL))


def test_shards_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='length_shards=2'):
    cross_entropy(*inputs(T=7), length_shards=2)


@pytest.mark.parametrize('chunk', [0, 3])
def test_an_undifferentiated_call_gives_the_same_values(chunk):
  args = inputs()
  total, nll = cross_entropy(*args, chunk=chunk, z_loss=0.01, label_smoothing=0.1)
  want = oracles.cross_entropy(*args, z_loss=0.01, label_smoothing=0.1)
  np.testing.assert_allclose(total, want[0], rtol=1e-5)
  np.testing.assert_allclose(nll, want[1], rtol=1e-5)
  assert total.dtype == nll.dtype == jnp.float32


def test_bfloat16_keeps_float32_sums():
  hidden, embedding, targets, weights = inputs(B=2, T=64, D=8, dtype=jnp.bfloat16)
  total, nll, dhidden, dembedding = value_and_grad(hidden, embedding, targets, weights, chunk=4)
  rounded = np.float32(embedding.astype(jnp.bfloat16))
  want = oracles.cross_entropy(np.float32(hidden), rounded, targets, weights)
  assert (nll.dtype, dhidden.dtype, dembedding.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(total, want[0], rtol=1e-5)  # logits of rounded inputs, not rounded
  np.testing.assert_allclose(nll, want[1], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(np.float32(dhidden), want[2], atol=0.01 * np.abs(want[2]).max())
  np.testing.assert_allclose(dembedding, want[3], atol=0.005 * np.abs(want[3]).max())


def test_gradients_scale_with_the_cotangent():
  hidden, embedding, targets, weights = inputs()
  f = lambda h, e: -3 * cross_entropy(h, e, targets, weights, chunk=3)[0] + (h * h).sum()
  dhidden, dembedding = jax.grad(f, argnums=(0, 1))(hidden, embedding)
  want = oracles.cross_entropy(hidden, embedding, targets, weights)
  np.testing.assert_allclose(dhidden, -3 * want[2] + 2 * hidden, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dembedding, -3 * want[3], rtol=1e-4, atol=1e-5)


def test_only_the_total_carries_gradients_and_the_weights_are_constants():
  hidden, embedding, targets, weights = inputs()
  nll = lambda h, e: cross_entropy(h, e, targets, weights)[1].sum()
  assert all(not g.any() for g in jax.grad(nll, argnums=(0, 1))(hidden, embedding))
  assert not jax.grad(lambda w: cross_entropy(hidden, embedding, targets, w)[0])(weights).any()


def test_two_halves_of_a_batch_add_up_to_it():
  hidden, embedding, targets, weights = inputs(B=4)
  whole = value_and_grad(hidden, embedding, targets, weights, chunk=3)
  a, b = (value_and_grad(hidden[i], embedding, targets[i], weights[i], chunk=3)
          for i in (slice(0, 2), slice(2, 4)))
  np.testing.assert_allclose(whole[0], a[0] + b[0], rtol=1e-6)
  np.testing.assert_allclose(whole[3], a[3] + b[3], rtol=1e-5, atol=1e-7)


def test_large_logits_stay_finite_and_exact():
  args = inputs(scale=3e4)
  assert_equal_oracle(value_and_grad(*args, chunk=2), oracles.cross_entropy(*args))


@pytest.mark.parametrize('bad', [-100, 11, 2**31 - 1])
def test_a_target_outside_the_vocabulary_is_harmless_where_its_weight_is_0(bad):
  hidden, embedding, targets, weights = inputs()
  weights[:, ::2] = 0
  want = oracles.cross_entropy(hidden, embedding, targets, weights, 0.01, 0.1)
  targets[:, ::2] = bad
  got = value_and_grad(hidden, embedding, targets, weights, chunk=2, z_loss=0.01,
                       label_smoothing=0.1)
  assert np.isfinite(got[1]).all()
  for i in (0, 2, 3):
    np.testing.assert_allclose(got[i], want[i], rtol=2e-5, atol=1e-6)


def count(jaxpr, primitive):
  """How often a primitive stands in a jaxpr, bodies of loops included once each."""
  found = sum(str(eqn.primitive) == primitive for eqn in jaxpr.eqns)
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      found += count(inner, primitive) if hasattr(inner, 'eqns') else 0
  return found


def test_the_work_is_three_products_and_one_exponential_and_loops_only_when_cut():
  args = inputs(T=8)
  loss = lambda h, e, t, w, chunk: cross_entropy(h, e, t, w, chunk=chunk)[0]
  grad = jax.grad(loss, argnums=(0, 1))
  work = lambda f, chunk: [count(jax.make_jaxpr(f, static_argnums=4)(*args, chunk).jaxpr, name)
                           for name in ('dot_general', 'exp', 'scan')]
  assert work(loss, 0) == [1, 1, 0]
  assert work(grad, 0) == [3, 1, 0]
  assert work(grad, 8) == [3, 1, 0]
  assert work(grad, 4) == [3, 1, 1]
  assert work(grad, 3) == [6, 2, 1]  # a loop of two chunks and the rest
  assert work(grad, 5) == [6, 2, 0]  # one chunk and the rest
  assert work(loss, 4) == [1, 1, 1]


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 8, 1)], ids=str)
def test_eight_devices_equal_one_and_move_no_token(sizes, optimized):
  args = inputs(B=8, T=64, D=8, V=32)
  mesh = jax.make_mesh(sizes, ('data', 'seq', 'model'), axis_types=(AxisType.Auto,) * 3)
  sharding = lambda *axes: NamedSharding(mesh, P(*axes))
  rows, vocab = sharding('data', 'seq'), sharding('model')
  f = lambda h, e, t, w: cross_entropy(h, e, t, w, chunk=4, z_loss=1e-3, label_smoothing=0.1,
                                       batch_shards=sizes[0], length_shards=sizes[1])
  f = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True),
              in_shardings=(rows, vocab, rows, rows),
              out_shardings=((sharding(), rows), (rows, vocab)))
  compiled = f.lower(*args).compile()
  (total, nll), grads = compiled(*(jax.device_put(x, s) for x, s in
                                   zip(args, (rows, vocab, rows, rows))))
  assert_equal_oracle((total, nll, *grads), oracles.cross_entropy(*args, 1e-3, 0.1))

  text = compiled.as_text()
  assert not re.findall(r'(?:all-gather|all-to-all|collective-permute)(?:-start)?\(', text)
  # The gradient of the embedding [D, V / model] meets the other devices' once, outside the loop.
  inside, outside = text.split('\nENTRY')[0], text.split('\nENTRY')[1]
  reduced = rf'f32\[8,{32 // sizes[2]}\][^=]* all-reduce\('
  assert not re.search(reduced, inside)
  assert bool(re.search(reduced, outside)) == (sizes[0] * sizes[1] > 1)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_memory_is_a_twentieth_of_the_logits_at_vocabulary_128k_and_length_64k(dtype, optimized):
  T, V, D = 65536, 131072, 64
  shape = jax.ShapeDtypeStruct
  f = lambda h, e, t, w: cross_entropy(h, e, t, w, chunk=Config().chunk)[0]
  compiled = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(
      shape((1, T, D), dtype), shape((V, D), jnp.float32), shape((1, T), jnp.int32),
      shape((1, T), jnp.float32)).compile()
  assert 0 < compiled.memory_analysis().temp_size_in_bytes <= 4 * T * V / 20


@pytest.mark.parametrize('mistake, message', [
    ({'chunk': -1}, 'loss.chunk=-1: must be at least 0'),
    ({'z_loss': -0.1}, 'loss.z_loss=-0.1: must be at least 0'),
    ({'label_smoothing': 1.0}, 'loss.label_smoothing=1.0: must be below 1'),
    ({'label_smoothing': -0.1}, 'loss.label_smoothing=-0.1: must be at least 0'),
    ({'z_loss': float('nan')}, 'loss.z_loss=nan'),
])
def test_mistakes_are_named(mistake, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    Config(**mistake)
