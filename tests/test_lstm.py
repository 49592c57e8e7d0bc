"""The LSTM against loops in NumPy and torch.nn.LSTM; its gradient against autodiff of plain steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import lstm
from longctx.recurrence.lstm import lstm_scan
from tests import oracles

T, B, E = 9, 3, 5


def inputs(seed=0):
  keys = jax.random.split(jax.random.key(seed), 6)
  normal = lambda key, *shape: jax.random.normal(key, shape)
  keep = (jax.random.uniform(keys[4], (T, B, 1)) > 0.2).astype(jnp.float32)
  valid = (jax.random.uniform(keys[5], (T, B, 1)) > 0.2).astype(jnp.float32)
  return (normal(keys[0], T, B, 4 * E), 0.5 * normal(keys[1], E, 4 * E), normal(keys[2], B, E),
          normal(keys[3], B, E), keep, valid)


def loops(x, w, h, c, keep, valid):
  x, w, h, c, keep, valid = (np.asarray(a, np.float64) for a in (x, w, h, c, keep, valid))
  y = np.zeros((T, B, E))
  h, c = h.copy(), c.copy()
  for b in range(B):
    for t in range(T):
      if valid[t, b]:
        h[b], c[b] = oracles.lstm_cell(
            np.ones(1), x[t, b].reshape(1, 4, E), w.reshape(E, 4, E), np.zeros((4, E)),
            h[b] * keep[t, b], c[b] * keep[t, b])
      y[t, b] = h[b]
  return y, h, c


def test_scan_computes_the_cell_with_resets_and_padding():
  args = inputs()
  for got, expected in zip(jax.jit(lstm_scan)(*args), loops(*args)):
    np.testing.assert_allclose(got, expected, atol=1e-5)


def plain(x, w, h, c, keep, valid):
  """The same cell, left to autodiff."""
  ys = []
  for t in range(T):
    h_in, c_in = h * keep[t], c * keep[t]
    i, f, g, o = jnp.split(x[t] + h_in @ w, 4, axis=-1)
    c_new = jax.nn.sigmoid(f) * c_in + jax.nn.sigmoid(i) * jnp.tanh(g)
    h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)
    h, c = jnp.where(valid[t] > 0, h_new, h), jnp.where(valid[t] > 0, c_new, c)
    ys.append(h)
  return jnp.stack(ys), h, c


def test_written_gradient_equals_autodiff():
  *args, keep, valid = inputs()
  weights = [jax.random.normal(jax.random.key(9 + i), s) for i, s in
             enumerate(((T, B, E), (B, E), (B, E)))]
  def total(function):
    return lambda *a: sum((w * out).sum() for w, out in zip(weights, function(*a, keep, valid)))
  got = jax.jit(jax.grad(total(lstm_scan), argnums=(0, 1, 2, 3)))(*args)
  expected = jax.jit(jax.grad(total(plain), argnums=(0, 1, 2, 3)))(*args)
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_equals_torch():
  torch = pytest.importorskip('torch', reason='torch is a development requirement')
  config = lstm.Config(vocab_size=11, embed_dim=6, hidden_dim=8, num_layers=2, init_std=0.5)
  model = lstm.LSTM(config, rngs=nnx.Rngs(0))
  theirs = torch.nn.LSTM(6, 8, num_layers=2, batch_first=True)
  with torch.no_grad():
    for i, layer in enumerate(model.layers):
      flat = lambda p: torch.tensor(np.asarray(p.get_value()).reshape(-1, 32).T.copy())
      getattr(theirs, f'weight_ih_l{i}').copy_(flat(layer.w_in))
      getattr(theirs, f'weight_hh_l{i}').copy_(flat(layer.w_hidden))
      getattr(theirs, f'bias_ih_l{i}').copy_(
          torch.tensor(np.asarray(layer.bias.get_value()).ravel()))
      getattr(theirs, f'bias_hh_l{i}').zero_()
  tokens = np.random.default_rng(0).integers(0, 11, (3, 7))
  hidden, state = jax.jit(model)(jnp.asarray(tokens), model.init_state(3))
  table = np.asarray(model.embedding.table.get_value())
  expected, (h, c) = theirs(torch.tensor(table[tokens]))
  np.testing.assert_allclose(hidden, expected.detach().numpy(), atol=1e-5)
  for i, carry in enumerate(state.layers):
    np.testing.assert_allclose(carry.h, h[i].detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(carry.c, c[i].detach().numpy(), atol=1e-5)


@pytest.mark.parametrize('tied,hidden', [(False, 16), (True, 16), (True, 12)])
def test_count_and_initial_values(tied, hidden):
  config = lstm.Config(vocab_size=50, embed_dim=12, hidden_dim=hidden, num_layers=3, tied=tied,
                       forget_bias=1.5)
  model = lstm.LSTM(config, rngs=nnx.Rngs(0))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == config.num_parameters()
  bias = np.asarray(model.layers[1].bias.get_value())
  assert (bias[1] == 1.5).all() and (bias[[0, 2, 3]] == 0).all()
  w = np.asarray(model.layers[1].w_hidden.get_value())
  assert np.abs(w).max() <= hidden ** -0.5
  assert w.std() == pytest.approx(hidden ** -0.5 / np.sqrt(3), rel=0.1)


def test_a_stream_without_an_end_never_runs_out_of_indices(monkeypatch):
  from longctx.models import context
  monkeypatch.setattr(context, 'LIMIT', 16)
  model = lstm.LSTM(lstm.Config(vocab_size=7, embed_dim=4, hidden_dim=4), rngs=nnx.Rngs(0))
  state = model.init_state(1)
  for _ in range(12):
    _, state = model(jnp.zeros((1, 5), jnp.int32), state)
  assert int(state.clock.index[0]) == 12   # of 60: 8 less six times


def test_dropout_needs_a_key_and_scales_what_it_keeps():
  config = lstm.Config(vocab_size=11, embed_dim=64, hidden_dim=64, num_layers=1, dropout=0.4)
  model = lstm.LSTM(dataclasses.replace(config), rngs=nnx.Rngs(0))
  tokens = jnp.arange(10)[None]
  quiet, _ = model(tokens)
  again, _ = model(tokens)
  np.testing.assert_array_equal(quiet, again)
  dropped, _ = model(tokens, dropout_key=jax.random.key(1))
  zeros = float((np.asarray(dropped) == 0).mean())
  assert zeros == pytest.approx(0.4, abs=0.1)
