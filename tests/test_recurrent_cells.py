"""Elman, LSTM, GRU, sLSTM against loops in NumPy; gradients against autodiff of plain steps; costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models import context, recurrent
from longctx.recurrence import cell, slstm
from tests import oracles

T, B, E, N = 6, 3, 6, 2   # N heads of sLSTM
CELLS = recurrent.CELLS
STATES = {'elman': 1, 'lstm': 2, 'gru': 1, 'slstm': 4}


@functools.cache
def inputs(name, seed=0):
  """x, w, biases, state after a few tokens, keep, valid."""
  C = CELLS[name].gates
  keys = jax.random.split(jax.random.key(seed), 6)
  normal = jax.random.normal
  keep, valid = ((jax.random.uniform(k, (T, B, 1)) > 0.2).astype(jnp.float32) for k in keys[:2])
  valid = valid.at[:2, 0].set(0)   # padding before anything is seen
  w = 0.5 * normal(keys[2], (E // N, N, C, E // N) if name == 'slstm' else (E, C, E))
  b = normal(keys[3], (2, C, E))
  state = [normal(k, (B, E)) for k in jax.random.split(keys[5], STATES[name])]
  if name == 'slstm':
    state[2] = 1 + jnp.abs(state[2])
    state = [s.at[0].set(0) for s in state]
  return normal(keys[4], (T, B, C, E)), w, (b[0], b[1]), CELLS[name].state(*state), keep, valid


def call(name):
  return functools.partial(cell.scan_cell, CELLS[name])


def loops(name, x, w, b, state, keep, valid):
  """Cell by cell, row by row, number by number in float64."""
  x, w, keep, valid = (np.asarray(a, np.float64) for a in (x, w, keep, valid))
  b_in, b_hidden = (np.asarray(a, np.float64) for a in b)
  x = x + b_in + (0 if name == 'gru' else b_hidden)
  if name == 'gru':
    x[:, :, :2] += b_hidden[:2]
  state = [np.asarray(s, np.float64).copy() for s in state]
  y = np.zeros((T, B, E))
  for row in range(B):
    for t in range(T):
      s = [part[row] * keep[t, row] for part in state]
      if name == 'elman':
        s = [oracles.elman_cell(x[t, row, 0], w[:, 0], s[0])]
      elif name == 'lstm':
        s = oracles.lstm_cell(np.ones(1), x[t, row][None], w, np.zeros((4, E)), *s)
      elif name == 'gru':
        s = [oracles.gru_cell(x[t, row], w, b_hidden[2], s[0])]
      else:
        s = oracles.slstm_cell(x[t, row], w, *s)
      if valid[t, row]:
        for part, new in zip(state, s):
          part[row] = new
      y[t, row] = state[0][row]
  return y, state


@pytest.mark.parametrize('name', CELLS)
def test_scan_computes_the_cell_with_resets_and_padding(name):
  args = inputs(name)
  y, state = whole(name)(*args)[1]
  expected, after = loops(name, *args)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  if name == 'slstm':   # the loops hold c and n without stabiliser
    state = (state.h, state.c * jnp.exp(state.m), state.n * jnp.exp(state.m))
    np.testing.assert_allclose(expected[-1], state[0], atol=1e-5)
  for a, b in zip(state, after):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def plain(name, x, w, b, state, keep, valid):
  """The same cell, left to autodiff."""
  def step(state, inputs):
    x, keep, valid = inputs
    before = tuple(s * keep for s in state)
    after, _ = CELLS[name].step(x + b[0], cell._multiply(before[0], w) + b[1], before)
    after = tuple(jnp.where(valid > 0, new, old) for new, old in zip(after, state))
    return after, after[0]
  state, y = jax.lax.scan(step, tuple(state), (x, keep, valid))
  return y, state


def with_gradients(name, function):
  """(outputs, gradients of x, w, biases, state) of a number that every output moves.

  Of sLSTM's state only h: the rest depends on the choice of the stabiliser.
  """
  def total(x, w, b, state, keep, valid):
    y, after = function(x, w, b, state, keep, valid)
    outs = (y, after[0]) if name == 'slstm' else (y, *after)
    weights = [jax.random.normal(jax.random.key(9 + i), out.shape) for i, out in enumerate(outs)]
    return sum((w * out).sum() for w, out in zip(weights, outs)), (y, after)
  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
  return lambda *args: (lambda found: (found[1], found[0][1]))(run(*args))


@functools.cache
def whole(name):
  """(gradients, outputs) of the cell's own scan; compiled once for the tests of this file."""
  return with_gradients(name, call(name))


@pytest.mark.parametrize('name', CELLS)
def test_written_gradient_equals_autodiff(name):
  args = inputs(name)
  got, expected = (jax.tree.leaves(f(*args)[0]) for f in
                   (whole(name), with_gradients(name, functools.partial(plain, name))))
  if name == 'slstm':   # the last is that of a starting m, given as zero
    got, expected = got[:-1], expected[:-1]
  for a, b in zip(got, expected):
    np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize('name', CELLS)
def test_gradient_through_segments_is_that_of_the_whole(name):
  def pieces(x, w, b, state, keep, valid):
    ys = []
    for at in (slice(0, 4), slice(4, 6)):
      y, state = cell.scan_cell(CELLS[name], x[at], w, b, state, keep[at], valid[at])
      ys.append(y)
    return jnp.concatenate(ys), state
  args = inputs(name)
  for a, c in zip(jax.tree.leaves(with_gradients(name, pieces)(*args)),
                  jax.tree.leaves(whole(name)(*args))):
    np.testing.assert_allclose(a, c, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('name', CELLS)
def test_corners_are_finite(name):
  """Saturated gates, all padding, zero inputs, a document at every token: values and gradients."""
  x, w, b, state, keep, valid = inputs(name)
  zeros = CELLS[name].state(*(jnp.zeros_like(s) for s in state))
  for case in [(300 * jnp.sign(x), 50 * w, b, state, keep, valid),
               (-300 * jnp.sign(x), w, b, zeros, keep, valid), (x, w, b, zeros, keep, 0 * valid),
               (0 * x, 0 * w, b, zeros, 0 * keep, valid)]:
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(whole(name)(*case)))


@pytest.mark.parametrize('name', CELLS)
def test_bfloat16_inputs_and_a_float32_state(name):
  x, w, *rest = inputs(name)
  narrow = lambda a: a.astype(jnp.bfloat16)
  (dx, dw, *_), (y, after) = whole(name)(narrow(x), narrow(w), *rest)
  (_, dw_wide, *_), (y_wide, _) = whole(name)(x, w, *rest)
  assert {a.dtype for a in (y, *after)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(y, y_wide, atol=0.06)
  assert dx.dtype == dw.dtype == jnp.bfloat16
  np.testing.assert_allclose(dw.astype(jnp.float32), dw_wide, atol=0.03 * np.abs(dw_wide).max())


def test_slstm_starts_at_the_first_token_however_small_its_input_gate():
  """A maximum with a starting m = 0 would underflow: h = 0 / 0 instead of o tanh(z)."""
  x = jnp.asarray([-200.0, 3.0, 0.7, 0.4])[None, None, :, None] * jnp.ones((1, B, 4, E))
  state = cell.zero_state(slstm.CELL, B, E)
  y, after = slstm.slstm(x, inputs('slstm')[1], state)
  np.testing.assert_allclose(y[0], np.tanh(0.7) / (1 + np.exp(-0.4)), rtol=1e-5)
  y, _ = slstm.slstm(jnp.concatenate([x, x + 90.0]), 0 * inputs('slstm')[1], state)
  np.testing.assert_allclose(y[1], np.tanh(90.7), rtol=1e-5)   # what came first is forgotten
  assert (np.asarray(after.n) >= 1).all()


def test_slstm_heads_do_not_read_each_other():
  x, w, _, state, *_ = inputs('slstm')
  moved = state._replace(h=state.h.at[:, :E // N].add(1.0))   # head 0
  a, b = slstm.slstm(x[:1], w, state)[0][0], slstm.slstm(x[:1], w, moved)[0][0]
  assert (a[:, E // N:] == b[:, E // N:]).all() and (a[:, :E // N] != b[:, :E // N]).all()


# Models.

LAYERS = [('elman', 1), ('lstm', 1), ('gru', 1), ('slstm', 4)]


def config_of(name, heads=1, **more):
  return recurrent.Config(name=name, cell_heads=heads, vocab_size=50, embed_dim=12, **more)


@pytest.mark.parametrize('name, heads', LAYERS)
def test_cost_of_a_layer_is_that_of_its_parameters_state_and_program(name, heads):
  config = config_of(name, heads, num_layers=1, hidden_dim=64)
  (found,) = config.layer_costs()
  layer = recurrent.Layer(config, 12, rngs=nnx.Rngs(0))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(layer))) == found.parameters
  state = layer.init_state(1)
  assert sum(s.size for s in state) == found.state == config.state_floats()
  here, _ = context.place_tokens(jnp.zeros((1, 1), jnp.int32), None, None, None, None)
  graphdef, params = nnx.split(layer)
  program = jax.jit(lambda params, x, state: nnx.merge(graphdef, params)(x, state, here))
  counted = program.lower(params, jnp.ones((1, 1, 12)), state).compile().cost_analysis()
  flops, transcendental = counted['flops'], counted.get('transcendentals', 0.0)
  expected = 2 * found.matrices + found.flops
  # Matrices are counted exactly; the rest to what a compiler makes of a sigmoid.
  assert 2 * found.matrices <= flops
  assert flops + transcendental == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize('tied,hidden,more', [
    (False, 16, {}), (True, 16, {}), (True, 12, {'layer_norm': True}),
    (False, 16, {'name': 'gru', 'layer_norm': True}),
    (False, 16, {'name': 'slstm', 'cell_heads': 2}), (True, 16, {'name': 'elman'})])
def test_count_and_initial_values(tied, hidden, more):
  config = recurrent.Config(**{'vocab_size': 50, 'embed_dim': 12, 'hidden_dim': hidden,
                               'num_layers': 3, 'tied': tied, 'forget_bias': 1.5} | more)
  model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == config.num_parameters()
  bias = np.asarray(model.stack.layers[1].bias.get_value())
  if config.name in ('lstm', 'slstm'):
    assert (bias[1] == 1.5).all()
    bias = bias[[0, 2, 3]]
  assert (bias == 0).all()
  w = np.asarray(model.stack.layers[1].w_hidden.get_value())
  limit = (hidden // config.cell_heads) ** -0.5
  assert np.abs(w).max() <= limit
  assert w.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)


def test_all_parameters_uniform():
  config = config_of('lstm', hidden_dim=16, init_uniform=0.05, forget_bias=0.0)
  for x in jax.tree.leaves(nnx.state(recurrent.Recurrent(config, rngs=nnx.Rngs(0)))):
    assert 0.04 < np.abs(x).max() <= 0.05
    assert np.asarray(x).std() == pytest.approx(0.05 / np.sqrt(3), rel=0.2)


def test_layer_norm_stands_before_each_layer_and_after_the_last():
  config = config_of('elman', hidden_dim=16, layer_norm=True)
  model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  run = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.arange(10)[None])[0])
  hidden = run(params)
  np.testing.assert_allclose(hidden.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(hidden.var(-1), 1, atol=2e-3)
  params['embedding']['table'] = params['embedding']['table'].replace(
      3 * params['embedding']['table'].get_value() + 5)
  np.testing.assert_allclose(run(params), hidden, atol=2e-3)


def test_both_ways_over_packed_documents_and_padding_on_any_side():
  """Against rows of one document with padding on the right, which tests/test_torch_rnn.py holds."""
  config = config_of('lstm', hidden_dim=8, num_layers=2, bidirectional=True, layer_norm=True)
  encoder = recurrent.Encoder(config, rngs=nnx.Rngs(0))
  assert (sum(x.size for x in jax.tree.leaves(nnx.state(encoder.stack)))
          == config.stack_parameters())
  tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 50)
  segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 3, 3, 3]])
  valid = jnp.asarray([[True, True, False, True, True, True, True, False, False]])
  run = jax.jit(lambda tokens, segments, valid: encoder(
      tokens, segment_ids_BT=segments, valid_BT=valid))
  packed = run(tokens, segments, valid)
  assert packed.shape == (1, 9, 16)
  for a, b in ((0, 2), (3, 4), (4, 7)):
    size = b - a
    right = jnp.zeros((1, 9), tokens.dtype).at[0, :size].set(tokens[0, a:b])
    seen = jnp.arange(9)[None] < size
    want = run(right, jnp.ones((1, 9), jnp.int32), seen)[0, :size]
    np.testing.assert_allclose(packed[0, a:b], want, atol=1e-5)
    left = run(jnp.roll(right, 9 - size), jnp.ones((1, 9), jnp.int32), seen[:, ::-1])
    np.testing.assert_allclose(left[0, 9 - size:], want, atol=1e-5)


def test_mistakes():
  with pytest.raises(ConfigError, match=r'model.bidirectional=True: a language model must not see '
                     r'the tokens that follow; set model.bidirectional=False'):
    recurrent.Recurrent(config_of('lstm', bidirectional=True), rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match=r"model.cell_heads=2: is read with model.name='slstm' only"):
    config_of('gru', 2)
  with pytest.raises(ConfigError, match=r'model.cell_heads=3: must divide model.hidden_dim=512'):
    config_of('slstm', 3)
  with pytest.raises(ConfigError, match=r'model.name=\'ltsm\': must be one of .*"lstm"'):
    config_of('ltsm')


def test_a_stream_without_an_end_never_runs_out_of_indices(monkeypatch):
  monkeypatch.setattr(context, 'LIMIT', 16)
  config = recurrent.Config(name='elman', vocab_size=7, embed_dim=4, hidden_dim=4, num_layers=1)
  model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
  state = model.init_state(1)
  read = jax.jit(lambda state: model(jnp.zeros((1, 5), jnp.int32), state)[1])
  for _ in range(12):
    state = read(state)
  assert int(state.clock.index[0]) == 12   # of 60: 8 less six times


def test_dropout_needs_a_key_and_scales_what_it_keeps():
  config = config_of('lstm', hidden_dim=64, num_layers=1, dropout=0.4)
  model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
  run = jax.jit(lambda key: model(jnp.arange(10)[None], dropout_key=key)[0])
  quiet, dropped = run(None), run(jax.random.key(1))
  np.testing.assert_array_equal(quiet, run(None))
  assert (np.asarray(quiet) != 0).all()
  zeros = float((np.asarray(dropped) == 0).mean())
  assert zeros == pytest.approx(0.4, abs=0.1)


def test_dropout_between_layers_and_not_inside_the_recurrence():
  """Zaremba's: what enters a layer is dropped, what goes on in time is not."""
  config = config_of('elman', hidden_dim=64, num_layers=2, dropout=0.5)
  stack = recurrent.Stack(config, rngs=nnx.Rngs(0))
  here, _ = context.place_tokens(jnp.zeros((1, 5), jnp.int32), None, None, None, None)
  x = jax.random.normal(jax.random.key(0), (1, 5, 12))
  run = jax.jit(lambda key: stack(x, stack.init_state(1), (here,), key)[1])
  quiet, dropped = run(None), run(jax.random.key(1))
  np.testing.assert_array_equal(quiet[0].h, dropped[0].h)
  assert (np.asarray(quiet[1].h) != np.asarray(dropped[1].h)).all()
