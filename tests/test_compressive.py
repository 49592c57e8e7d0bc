"""The Compressive Transformer's layer against lists of tokens and loops, and who gets which gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.memories import compressive
from longctx.models.memories.auxiliary import add_loss
from longctx.models.memories.base import Block, Cell, Past, Settings
from longctx.models.memories.compressive import Compressive
from tests import oracles

B, S, C, M, SLOTS, RATE, D, N, K, H = 2, 5, 6, 9, 4, 3, 6, 4, 2, 4
SETTINGS = Settings(dim=D, num_heads=N, num_kv_heads=K, head_dim=H, segment=C, short_term=M, size=SLOTS,
                    mlp='none', std=0.5, out_std=0.5)


@functools.cache
def made(variant=''):
  """(settings, graphdef, parameters, x [B, S, C, D])."""
  settings = dataclasses.replace(SETTINGS, variant=variant)
  graphdef, params = nnx.split(Compressive(settings, rngs=nnx.Rngs(0)))
  return settings, graphdef, params, jax.random.normal(jax.random.key(1), (B, S, C, D))


# The definition.


def numbers(params):
  flat = {path: np.float64(x[...]) for path, x in nnx.to_flat_state(params)}
  return {'/'.join(map(str, path)): x for path, x in flat.items()}


def heads(p, x):
  h = oracles.rms_norm(x, p['mixer_norm/scale'], 1e-6)
  return (np.einsum('td,dnh->nth', h, p['mixer/w_q']),
          *np.einsum('td,dckh->ckth', h, p['mixer/w_kv']))


def f_c(p, kind, tokens):
  """One compressed state of c tokens."""
  if kind == 'mean':
    return sum(tokens) / len(tokens)
  if kind == 'max':
    return np.array([max(x[d] for x in tokens) for d in range(D)])
  return sum(x @ w for x, w in zip(tokens, p['w_compress'])) + p['b_compress']


def say(p, queries, hidden):
  """Attention of all queries over all hidden states, no positions: [T, N, H]."""
  out = np.zeros((len(queries), N, H))
  if len(hidden):
    (q, _, _), (_, k, v) = heads(p, queries), heads(p, np.array(hidden))
    for t, n in np.ndindex(len(queries), N):
      scores = k[n // (N // K)] @ q[n, t] / np.sqrt(H)
      weights = np.exp(scores - scores.max())
      out[t, n] = weights / weights.sum() @ v[n // (N // K)]
  return out


def document(p, kind, x):
  """x [S, C, D] -> what mixing adds [S, C, D], the loss, compressed and short-term memory after."""
  compressed, memory, out, loss = [], [], np.zeros_like(x), 0.0
  for s, segment in enumerate(x):
    known = [*compressed, *memory, *segment]
    # Slots are counted; compressed ones stand before a whole short-term memory.
    places = np.array([*range(-M - len(compressed), -M), *range(-len(memory), 0), *range(C)])
    q, k, v = heads(p, np.array(known))
    for t, n in np.ndindex(C, N):
      head, upto = n // (N // K), len(known) - C + t + 1
      query = oracles.rope(q[n, upto - 1:upto], places[upto - 1:upto], 10_000.0)[0]
      scores = oracles.rope(k[head, :upto], places[:upto], 10_000.0) @ query / np.sqrt(H)
      weights = np.exp(scores - scores.max())
      out[s, t] += weights / weights.sum() @ v[head, :upto] @ p['mixer/w_out'][n]
    memory = [*memory, *segment]
    old, memory = memory[:max(0, len(memory) - M)], memory[-M:]
    new = [f_c(p, kind, old[i:i + RATE]) for i in range(0, len(old), RATE)]
    loss += np.mean((say(p, segment, old) - say(p, segment, new)) ** 2)
    compressed = (compressed + new)[-SLOTS:]
  return out, loss, compressed, memory


# The layer: segment by segment, and all at once.


@functools.partial(jax.jit, static_argnums=0)
def one_by_one(graphdef, params, x_BSCD):
  block = nnx.merge(graphdef, params)
  cell = Cell(jnp.ones((B, C), bool), jnp.zeros((B,), jnp.int32))
  def step(memory, x_BCD):
    y_BCD, after = block.mix(x_BCD, memory, cell)
    return after, (y_BCD, memory)
  after, (y, before) = jax.lax.scan(step, block.init_memory(B), jnp.moveaxis(x_BSCD, 1, 0))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (y, before)), after


@functools.partial(jax.jit, static_argnums=0)
def at_once(graphdef, params, x_BSCD):
  block, rows = nnx.merge(graphdef, params), lambda x: x.reshape(-1, *x.shape[2:])
  before, after = block.before(x_BSCD, block.init_memory(B), jnp.ones((B, S, C), bool))
  cell = Cell(jnp.ones((B * S, C), bool), jnp.zeros((B * S,), jnp.int32), parts=S)
  y, _ = block.mix(rows(x_BSCD), jax.tree.map(rows, before), cell)
  return (y.reshape(x_BSCD.shape), before), after


@functools.cache
def gradients(how, weight=1.0):
  """Of sum(weight * y * seen) in the parameters, by name."""
  _, graphdef, params, x = made()
  seen = jax.random.normal(jax.random.key(2), x.shape)
  loss = lambda params: weight * (how(graphdef, params, x)[0][0] * seen).sum()
  return numbers(jax.jit(jax.grad(loss))(params))


@pytest.mark.parametrize('kind', ['conv', 'mean', 'max'])
def test_a_layer_is_that_of_lists_of_tokens(kind):
  _, graphdef, params, x = made(kind if kind != 'conv' else '')
  (y, _), after = one_by_one(graphdef, params, x)
  for b in range(B):
    out, _, compressed, memory = document(numbers(params), kind, np.float64(x[b]))
    np.testing.assert_allclose(y[b], out, atol=2e-5)
    assert after.store.count[b] == len(compressed) == SLOTS and after.past.count[b] == M
    np.testing.assert_allclose(after.store.hidden[b], compressed, atol=1e-5)
    np.testing.assert_allclose(after.past.hidden[b], memory, atol=1e-6)


def test_all_at_once_is_one_by_one():
  _, graphdef, params, x = made()
  for a, b in zip(jax.tree.leaves(one_by_one(graphdef, params, x)),
                  jax.tree.leaves(at_once(graphdef, params, x))):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for (name, a), b in zip(gradients(one_by_one).items(), gradients(at_once).values()):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=name)


LEARNED = ('w_compress', 'b_compress')   # f_c


def test_f_c_gets_the_gradient_of_its_own_loss_and_of_nothing_else():
  """Five times the model's loss: five times each gradient, but f_c's, which is its own loss's slope."""
  once, five = gradients(one_by_one), gradients(one_by_one, 5.0)
  for name in once:
    expected = once[name] * (1 if name in LEARNED else 5)
    np.testing.assert_allclose(five[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
  _, _, params, x = made()
  p, step = numbers(params), 1e-5
  loss = lambda p: np.mean([document(p, 'conv', np.float64(x[b]))[1] for b in range(B)])
  for name, at in (('w_compress', (0, 0, 0)), ('w_compress', (2, 3, 1)), ('b_compress', (4,))):
    up, down = ({**p, name: p[name].copy()} for _ in range(2))
    up[name][at] += step
    down[name][at] -= step
    slope = (loss(up) - loss(down)) / (2 * step)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(once[name][at], slope, rtol=1e-3)


def test_without_its_loss_f_c_gets_no_gradient_and_no_other_parameter_notices(monkeypatch):
  """lucidrains' layer calls detach_ on the live Wq, Wk and Wv, which then learn nothing any more."""
  with_loss = gradients(one_by_one)
  monkeypatch.setattr(compressive, 'RECONSTRUCTION_WEIGHT', 0.0)
  without = gradients.__wrapped__(one_by_one.__wrapped__)   # traced anew
  for name, x in without.items():
    assert (np.abs(x).max() > 1e-3) != (name in LEARNED), name
    if name in LEARNED:
      assert (x == 0).all() and np.abs(with_loss[name]).max() > 1e-3
    else:
      np.testing.assert_allclose(x, with_loss[name], atol=1e-6, err_msg=name)


def test_an_unfinished_segment_teaches_nothing():
  """It is read again when it is whole: its loss counts once."""
  _, graphdef, params, x = made()

  @jax.jit
  @jax.grad
  def slope(params, valid_BC):
    block = nnx.merge(graphdef, params)
    memory = block.init_memory(B)
    full = lambda part, n: Past(part.hidden + 0.1, jnp.full_like(part.count, n))
    memory = memory._replace(store=full(memory.store, SLOTS), past=full(memory.past, M))
    return block.mix(x[:, 0], memory, Cell(valid_BC, jnp.ones((B,), jnp.int32)))[0].sum()

  taught = lambda *valid: np.abs(numbers(slope(params, jnp.asarray(valid)))['w_compress']).max()
  whole, part = [True] * C, [True] * (C - 1) + [False]
  assert taught(part, part) == 0 and taught(whole, part) > 0


def test_a_loss_beside_is_seen_by_gradients_alone():
  f = lambda x, w: (add_loss(x, jnp.sin(w).sum(), 0.5) * jnp.asarray([2.0, 3.0])).sum()
  x, w = jnp.asarray([1.0, -1.0]), jnp.asarray([2.0, 1.0])
  assert f(x, w) == -1
  dx, dw = jax.jit(jax.grad(f, (0, 1)))(x, w)
  np.testing.assert_allclose(dx, [2, 3])
  np.testing.assert_allclose(dw, 0.5 * np.cos(w), rtol=1e-6)
  assert 'sine' not in jax.jit(f).lower(x, w).compile().as_text()


def test_rows_of_padding_and_equal_tokens_are_finite():
  _, graphdef, params, _ = made()

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, x_BCD):
    block = nnx.merge(graphdef, params)
    memory, cell = block.init_memory(B), Cell(jnp.asarray([[True] * C, [False] * C]), jnp.zeros(B, int))
    for _ in range(3):
      y, memory = block.mix(x_BCD, memory, cell)
    return (y ** 2).sum(), (y, memory)

  for x in (jnp.zeros((B, C, D)), jnp.full((B, C, D), 1e6)):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(params, x)))


@pytest.mark.parametrize('variant', ['', 'max'])
def test_costs_are_what_is_there(variant):
  settings = dataclasses.replace(SETTINGS, variant=variant, size=0)
  cost, block = Compressive.cost(settings), Compressive(settings, rngs=nnx.Rngs(0))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(jax.eval_shape(lambda: block.init_store(1))) == cost.state == M * D + 1
  plain = Block(settings, rngs=nnx.Rngs(0))
  assert count(nnx.state(block)) - count(nnx.state(plain)) == cost.parameters


def test_impossible_sizes_are_refused():
  refused = lambda **changes: Compressive.cost(dataclasses.replace(SETTINGS, **changes))
  with pytest.raises(ConfigError, match=r'segment=8: must be a multiple of model.memory_rate=0 \(3 here\).*give both'):
    refused(segment=8)
  with pytest.raises(ConfigError, match=r'short_term=4: must be a multiple of model.memory_rate=0 \(3 here\)'):
    refused(short_term=4)
  with pytest.raises(ConfigError, match=r'memory_rate=2.5: must be a whole number'):
    refused(rate=2.5)
  with pytest.raises(ConfigError, match='memory_size=0: must be at least 1'):
    refused(short_term=0, size=0)
  with pytest.raises(ConfigError, match='memory_variant'):
    refused(variant='min')
