"""The small parts of models: values against NumPy, hand-written gradients against plain formulas.

B batch  T tokens  N heads  H head dim  D, F widths
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import layers, lookup
from longctx.parallel import mesh
from tests import oracles


def draw(*shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def gradients(function, *args, cotangent):
  """The value, and the gradient of each argument under a cotangent of the result, compiled."""
  def run(*args):
    value, back = jax.vjp(function, *args)
    return value, back(cotangent)
  return jax.jit(run)(*args)


numbers = lambda x: np.asarray(x, np.float64)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize('D, F', [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)])
def test_linear_is_the_product_and_so_is_its_gradient(D, F, dtype, tolerance):
  x, w, cotangent = draw(2, 3, D, dtype=dtype), draw(D, F, seed=1), draw(2, 3, F, seed=2, dtype=dtype)
  y, (dx, dw) = gradients(layers.linear, x, w, cotangent=cotangent)
  assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
  dw_expected = np.zeros((D, F))
  for b in range(2):
    for t in range(3):
      at = dict(rtol=tolerance, atol=4 * tolerance)
      np.testing.assert_allclose(numbers(y[b, t]), numbers(x[b, t]) @ numbers(w), **at)
      np.testing.assert_allclose(numbers(dx[b, t]), numbers(w) @ numbers(cotangent[b, t]), **at)
      dw_expected += np.outer(numbers(x[b, t]), numbers(cotangent[b, t]))
  # The operands are what they are; the sum over tokens is float32 whatever their type.
  np.testing.assert_allclose(dw, dw_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(4,), (2, 3, 4)])
def test_linear_takes_any_dims_in_front(shape):
  x, w = draw(*shape), draw(4, 6, seed=1)
  plain = gradients(lambda x, w: x @ w, x, w, cotangent=draw(*shape[:-1], 6, seed=2))
  ours = gradients(layers.linear, x, w, cotangent=draw(*shape[:-1], 6, seed=2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize('function, plain', [(layers.scaled, np.multiply), (layers.shifted, np.add)])
@pytest.mark.parametrize('shape, dims', [((7,), 1), ((2, 5, 3), 1), ((2, 5, 3, 4), 2)])
def test_scaled_and_shifted_are_their_definition_and_so_are_their_gradients(
    shape, dims, function, plain, dtype, tolerance):
  x, g, w = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype), draw(*shape[-dims:], seed=2)
  y, (dx, dw) = gradients(function, x, w, cotangent=g)
  assert (y.dtype, dx.dtype, dw.dtype, dw.shape) == (dtype, dtype, jnp.float32, w.shape)
  by_factor = (lambda a: a * numbers(w), lambda a: a * numbers(x))
  to_x, to_w = by_factor if plain is np.multiply else (lambda a: a,) * 2
  at = dict(rtol=tolerance, atol=4 * tolerance)
  np.testing.assert_allclose(numbers(y), plain(numbers(x), numbers(w)), **at)
  np.testing.assert_allclose(numbers(dx), to_x(numbers(g)), **at)
  rows = tuple(range(len(shape) - dims))
  np.testing.assert_allclose(dw, to_w(numbers(g)).sum(rows), **at)


def test_gated_is_silu_times_x_and_so_is_its_gradient():
  gate, x, g = 3 * draw(4, 50), draw(4, 50, seed=1), draw(4, 50, seed=2)
  y, (dgate, dx) = gradients(layers.gated, gate, x, cotangent=g)
  z, x64, g64 = numbers(gate), numbers(x), numbers(g)
  silu = lambda z: z / (1 + np.exp(-z))
  slope = (silu(z + 1e-5) - silu(z - 1e-5)) / 2e-5
  np.testing.assert_allclose(y, silu(z) * x64, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(dgate, g64 * x64 * slope, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(dx, g64 * silu(z), rtol=1e-5, atol=1e-6)


def test_gated_far_from_zero_stays_finite():
  gate = jnp.array([-200.0, -50.0, 50.0, 200.0])
  y, (dgate, dx) = gradients(layers.gated, gate, jnp.ones(4), cotangent=jnp.ones(4))
  np.testing.assert_allclose(y, [0, 0, 50, 200], atol=1e-6)
  np.testing.assert_allclose(dgate, [0, 0, 1, 1], atol=1e-6)
  np.testing.assert_allclose(dx, [0, 0, 50, 200], atol=1e-6)


@pytest.mark.parametrize('vocab', [7, lookup.ONE_HOT_VOCAB + 1])
def test_lookup_and_its_gradient(vocab):
  tokens = jnp.array([[0, 3, 3], [6, 0, 3]])
  table, cotangent = draw(vocab, 4), draw(2, 3, 4, seed=1)
  rows, (grad,) = gradients(lambda t: lookup.lookup(t, tokens, jnp.float32), table, cotangent=cotangent)
  expected = np.zeros((vocab, 4))
  for b in range(2):
    for t in range(3):
      np.testing.assert_array_equal(rows[b, t], table[tokens[b, t]])
      expected[tokens[b, t]] += numbers(cotangent[b, t])
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
  assert np.isnan(lookup.lookup(table, jnp.array([[vocab]]), jnp.float32)).all()


@pytest.mark.parametrize('layout, sizes', [
    ('sequence', (2, 2, 2)), ('sequence_fsdp', (1, 4, 2)), ('fsdp', (8, 1, 1)), ('data', (8, 1, 1)),
    ('sequence', (1, 1, 8))])   # 8 do not divide the symbols: the table stays whole
def test_a_cut_table_gives_the_same_rows_and_gradient(layout, sizes):
  vocab = lookup.ONE_HOT_VOCAB + 2
  tokens = jax.random.randint(jax.random.key(2), (8, 12), 0, vocab).at[1, 3].set(vocab)
  table, cotangent = draw(vocab, 16), draw(8, 12, 16, seed=1)
  run = lambda t: lookup.lookup(t, tokens, jnp.float32)
  data, seq, model = sizes
  cut = mesh.make_layout(mesh.Config(data=data, seq=seq, model=model, layout=layout))
  plain, found = gradients(run, table, cotangent=cotangent), gradients(
      mesh.under(cut, run), table, cotangent=cotangent)
  np.testing.assert_array_equal(found[0], plain[0])   # NaN where there is no such symbol
  assert np.isnan(found[0][1, 3]).all() and np.isnan(found[0]).sum() == 16
  np.testing.assert_allclose(found[1][0], plain[1][0], rtol=1e-5, atol=1e-6)


@functools.cache
def feed_forward(kind, block, cut=False):
  """(y, gradients of the weights and of x), 4 x 40 tokens."""
  graphdef, params = nnx.split(layers.MLP(8, 12, kind, 0.5, 0.5, block=block, rngs=nnx.Rngs(0)))
  run = lambda params, x: nnx.merge(graphdef, params)(x)
  if cut:
    run = mesh.under(mesh.make_layout(mesh.Config(data=2, seq=2, model=2, layout='sequence')), run)
  return jax.tree.leaves(gradients(run, params, draw(4, 40, 8), cotangent=draw(4, 40, 8, seed=1)))


@pytest.mark.parametrize('kind, block, cut', [
    ('swiglu', 1, False), ('swiglu', 7, False), ('swiglu', 39, True), ('swiglu', 6, True),
    ('gelu', 20, False), ('gelu', 5, True)])
def test_blocks_of_tokens_compute_the_feed_forward_layer(kind, block, cut):
  for a, b in zip(feed_forward(kind, block, cut), feed_forward(kind, 0), strict=True):
    # An entry is a sum of terms as large as the largest entry, which may cancel to nearly nothing.
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_norm_is_its_definition_in_float32(dtype):
  norm = layers.RMSNorm(8, 1e-3, rngs=nnx.Rngs(0))
  assert (norm.scale.get_value() == 1).all()
  norm.scale.set_value(draw(8, seed=3))
  x = (draw(2, 3, 8) * jnp.array([1e-3, 1.0, 300.0])[:, None]).astype(dtype)
  y = norm(x)
  assert y.dtype == dtype
  for b in range(2):
    expected = oracles.rms_norm(numbers(x[b]), numbers(norm.scale.get_value()), 1e-3)
    np.testing.assert_allclose(numbers(y[b]), expected, rtol=1e-5 if dtype == jnp.float32 else 8e-3)


def test_rotate_turns_pairs_and_scores_depend_on_distance_alone():
  x = draw(1, 4, 2, 6)
  positions = jnp.array([[0, 1, 7, 50]])
  y = layers.rotate(x, layers.rotary_angles(positions, 6, 100.0))
  for t, p in enumerate([0, 1, 7, 50]):
    for n in range(2):
      turned = (numbers(x[0, t, n, :3]) + 1j * numbers(x[0, t, n, 3:])) * np.exp(
          1j * p * 100.0 ** (-np.arange(3) / 3))
      np.testing.assert_allclose(y[0, t, n], [*turned.real, *turned.imag], atol=1e-5)
  np.testing.assert_array_equal(y[0, 0], x[0, 0])   # position 0 stays as it is
  q, k = draw(1, 1, 1, 6, seed=1), draw(1, 1, 1, 6, seed=2)
  turn = lambda x, p: layers.rotate(x, layers.rotary_angles(jnp.array([[p]]), 6, 100.0))
  near, far = ((turn(q, p + 5) * turn(k, p)).sum() for p in (0, 40))
  np.testing.assert_allclose(near, far, rtol=1e-4)
  # Turning back is its gradient.
  angles = layers.rotary_angles(positions, 6, 100.0)
  _, (dx,) = gradients(lambda x: layers.rotate(x, angles), x, cotangent=y)
  np.testing.assert_allclose(dx, x, atol=1e-5)


@pytest.mark.parametrize('kind', ['swiglu', 'gelu'])
def test_the_feed_forward_layer(kind):
  mlp = layers.MLP(4, 6, kind, 0.5, 0.5, rngs=nnx.Rngs(0))
  x = draw(2, 3, 4)
  w_in, w_out = numbers(mlp.w_in.get_value()), numbers(mlp.w_out.get_value())
  if kind == 'swiglu':
    gate = numbers(x) @ w_in[:, 0]
    h = gate / (1 + np.exp(-gate)) * (numbers(x) @ w_in[:, 1])
  else:   # the tanh form, as GPT-2's
    z = numbers(x) @ w_in
    h = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3)))
  np.testing.assert_allclose(mlp(x), h @ w_out, rtol=1e-4, atol=1e-5)


def test_dropout_scales_what_it_keeps():
  x = jnp.ones((100, 100))
  y = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert (y == 0).mean() == pytest.approx(0.25, abs=0.02)
  assert layers.dropout(x, 0.25, None) is x and layers.dropout(x, 0.0, jax.random.key(0)) is x
