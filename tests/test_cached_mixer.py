"""Memory Caching around mixers: recurrences by loops, within the mixer's own convolutions, gates, norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models.context import place_tokens
from longctx.models.memories.base import Cell, Settings
from longctx.models.memories.memory_caching import VARIANTS, MemoryCaching
from longctx.models.mixers import MIXERS
from longctx.recurrence import delta, elementwise
from tests import oracles
from tests.compilation import quick_compilation  # noqa: F401
from tests.kernel_laws import wave

pytestmark = pytest.mark.usefixtures('quick_compilation')

R, C, D, SLOTS = 4, 5, 16, 2
slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)
# One of each recurrence, with each way of putting memories together, and windows shorter and longer.
CASES = [('gated_delta', dict(top=1)), ('rglru', dict(short_term=2)),
         slow('mlstm', dict(short_term=C + 1)), slow('mamba2', dict(width=4)),
         slow('rwkv7_residual', dict(short_term=2)),
         slow('linear_attention_residual', {}), slow('gla', dict(short_term=C)),
         slow('gated_delta_residual', dict(short_term=1)), slow('mlstm', {}), slow('min_lstm', {}),
         slow('rglru_residual', dict(width=8)), slow('kda', {}), slow('delta_net', {}),
         slow('retention', {}), slow('min_gru', {})]


@functools.cache
def block(variant, options):
  settings = Settings(**dict(dim=D, num_heads=2, num_kv_heads=2, head_dim=8, segment=C, mlp='none',
                             std=0.4, out_std=0.4, size=SLOTS) | dict(options), variant=variant)
  return MemoryCaching(settings, rngs=nnx.Rngs(1))


@functools.cache
def row():
  return jnp.asarray(np.random.default_rng(0).normal(size=(1, R * C, D)), jnp.float32)


def read(layer, x_BTD):
  """What the layer adds, segment by segment, and the memory after."""
  def one(memory, x_BCD):
    y_BCD, memory = layer.mix(x_BCD, memory, Cell(jnp.ones((1, C), bool), jnp.zeros(1, jnp.int32)))
    return memory, y_BCD
  memory, y = jax.lax.scan(one, layer.init_memory(1), jnp.moveaxis(x_BTD.reshape(1, R, C, D), 1, 0))
  return y.reshape(1, R * C, D), memory


def recurrence(inputs, at):
  """(outputs, states by head, a reader) of the tokens `at`, from nothing; by the oracles, row 0."""
  from_nothing = np.zeros(len(at), bool), np.ones(len(at), bool)
  own = {name: np.asarray(x, np.float64)[0][at] for name, x in inputs._asdict().items()
         if x is not None and name not in ('reset_BT', 'valid_BT')}
  if 'a' in own:
    out, h = oracles.elementwise(own['a'], own['b'], np.zeros(own['a'].shape[1]), *from_nothing)
    return out, [h], lambda state, t: state[0]
  H, (K, V) = own['v'].shape[1], (own['q'].shape[2], own['v'].shape[2])
  shared = H // own['q'].shape[1]
  head = lambda name, n: own[name][:, n // shared if name in 'qk' else n]
  ends, outs = [], []
  for n in range(H):
    qkv, S = [head(name, n) for name in 'qkv'], np.zeros((K, V))
    if 'log_input' in own:
      out, *end = oracles.mlstm(*qkv, head('log_input', n), head('log_forget', n), S, np.zeros(K),
                                *from_nothing)
    elif 'erase' in own:
      out, *end = oracles.diagonal_low_rank(*qkv, *(head(x, n) for x in ('erase', 'rate', 'log_decay')),
                                            S, *from_nothing)
    elif 'beta' in own:
      decay = head('log_decay', n) if 'log_decay' in own else None
      out, *end = oracles.delta_rule(*qkv, head('beta', n), decay, S, *from_nothing)
    else:
      decay = head('log_decay', n) if 'log_decay' in own else np.zeros(len(at))
      out, *end = oracles.decayed_sum(*qkv, decay, S, *from_nothing)
    ends.append(end)
    outs.append(out)
  q_all = np.asarray(inputs.q, np.float64)[0]

  def said(state, t):
    out = []
    for n, (S, *rest) in enumerate(state):
      q = q_all[t, n // shared]
      out.append(q @ S / (max(abs(q @ rest[0]), 1) if rest else 1))
    return np.array(out)
  return np.stack(outs, axis=1), ends, said


def by_loops(layer, inputs, normed, w_u=None):
  """What the recurrence gives for each token of a row [T, ...], and the means in the cache after it."""
  s, number = layer.settings, lambda p: np.asarray(p[...], np.float64)
  if layer.w_u is not None and w_u is None:
    w_u = number(layer.w_u)
  window, cache, found = s.short_term, [], []
  for r in range(R):
    here, seen = np.arange(r * C, (r + 1) * C), cache[-SLOTS:]
    outs, _, said = recurrence(inputs, here)
    for i, t in enumerate(here):
      weights, mean = np.ones(len(seen) + 1), normed[here[:i + 1]].mean(0)
      if layer.w_u is not None:
        u = normed[t] @ w_u
        scores = np.array([u @ m for _, m in seen] + [u @ mean])
        chosen = sorted(range(len(seen)), key=lambda j: -scores[j])[:s.top or SLOTS] + [len(seen)]
        weights = np.zeros(len(seen) + 1)
        weights[chosen] = np.exp(scores[chosen] - scores[chosen].max())
        weights /= weights.sum()
      total = np.zeros_like(outs[i]) if window else weights[-1] * outs[i]
      for w, (state, _) in zip(weights, seen):
        total = total + w * said(state, t)
      found.append(total)
    old = here if not window else np.arange(max(0, r * C - window), (r + 1) * C - window)
    if len(old):
      cache.append((recurrence(inputs, old)[1], normed[old].mean(0)))
  return np.array(found), [mean for _, mean in cache[-SLOTS:]]


@functools.cache
def case(variant, options):
  """(the layer, f(u, given) -> (y of the mixer if its recurrence gives `given`, the recurrence's inputs),
  the shape of what it gives)."""
  layer = block(variant, options)
  every = jnp.ones((1, R * C), bool)

  def around(u_BTD, given):
    seen = []
    def run(kernel, inputs, state):
      out, after = kernel.finish(kernel.prepare(inputs), state)
      seen.append((inputs, out))
      return (out if given is None else given.astype(out.dtype)), after
    mixer = layer.cached.mixer
    context, _ = place_tokens(every, None, None, None, None)
    return mixer(u_BTD, mixer.init_state(1), context, run)[0], seen[0]

  _, (_, out) = jax.eval_shape(lambda u: around(u, None), row())
  return layer, jax.jit(around), out.shape


@pytest.mark.parametrize('variant, options', CASES)
def test_equals_loops(variant, options):
  layer, around, shape = case(variant, tuple(options.items()))
  y, memory = jax.jit(functools.partial(read, layer))(row())
  normed = oracles.rms_norm(np.asarray(row()[0], np.float64), np.asarray(layer.mixer_norm.scale[...]), 1e-6)
  u = jnp.asarray(normed[None], jnp.float32)
  _, (inputs, _) = around(u, jnp.zeros(shape))
  given, means = by_loops(layer, inputs, normed)
  expected, _ = around(u, jnp.asarray(given[None], jnp.float32))
  expected = np.asarray(expected, np.float64)[0]
  window = layer.settings.short_term
  if window:
    w = {name: np.asarray(getattr(layer.mixer, name)[...], np.float64) for name in ('w_q', 'w_kv', 'w_out')}
    first = np.arange(R * C) // C * C - window
    expected = expected + oracles.heads_of(normed, normed, w, lambda t, s: first[t] <= s <= t, 1e4)
  np.testing.assert_allclose(y[0], expected, atol=2e-4, rtol=2e-4)
  np.testing.assert_allclose(memory.store.mean[0, -len(means):], means, atol=1e-5)


# The layer whole in float64, for gradients.

sigmoid = lambda x: 1 / (1 + np.exp(-x))
BEGIN = np.arange(R * C) == 0


def min_lstm(p, u):
  """(the recurrence's inputs, what is made of its outputs)."""
  u = oracles.short_conv(u, p['conv/taps'], p['conv/bias'], BEGIN)
  f, i, x = (u @ p['w_in'][:, n] + p[f'biases/{n}'] for n in range(3))
  f, i, x = sigmoid(f), sigmoid(i), np.where(x >= 0, x + 0.5, sigmoid(x))
  return elementwise.Inputs((f / (f + i))[None], (i / (f + i) * x)[None], None, None), (
      lambda h: h @ p['w_out'])


def delta_net(p, u):
  """As min_lstm."""
  x = np.concatenate([np.einsum('td,dhk->thk', u, p[f'qkv/w_{name}']) for name in 'qkv'], axis=-1)
  x = oracles.short_conv(x.reshape(len(u), -1), p['qkv/conv/taps'], 0.0, BEGIN).reshape(x.shape)
  K = p['qkv/w_k'].shape[-1]
  q, k, v = np.split(x * sigmoid(x), [K, 2 * K], axis=-1)
  unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
  beta = sigmoid(u @ p['w_beta'])
  inputs = delta.Inputs(unit(q)[None] * K ** -0.5, unit(k)[None], v[None], beta[None], None)
  return inputs, lambda y: np.einsum('thv,hvd->td', oracles.rms_norm(y, p['norm/scale'], 1e-6), p['w_out'])


@pytest.mark.parametrize('mixer, options', [(min_lstm, dict(top=1)), slow(delta_net, {})])
def test_values_and_gradients_are_those_of_loops_in_float64(mixer, options):
  layer = block(mixer.__name__, tuple(options.items()))
  graphdef, params = nnx.split(layer)
  weigh = np.asarray(wave(row()[0]), np.float64)

  def loss(params, x):
    y, _ = read(nnx.merge(graphdef, params), x)
    return (y[0] * weigh.astype(np.float32)).sum(), y[0]

  (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, row())
  flat = lambda tree: {'/'.join(map(str, path)).removeprefix('cached/mixer/'): np.asarray(
      leaf.get_value(), np.float64) for path, leaf in nnx.to_flat_state(tree)}
  at, grads = flat(params) | {'x': np.asarray(row()[0], np.float64)}, flat(grads[0]) | {'x': grads[1][0]}

  def said(p):
    normed = oracles.rms_norm(p['x'], p['mixer_norm/scale'], 1e-6)
    inputs, finish = mixer(p, normed)
    return finish(by_loops(layer, inputs, normed, p['w_u'])[0])

  np.testing.assert_allclose(y, said(at), atol=2e-4, rtol=2e-4)
  draw, step = np.random.default_rng(2), 1e-5
  for name, grad in grads.items():
    along = draw.normal(size=grad.shape)
    moved = [(said(at | {name: at[name] + sign * step * along}) * weigh).sum() for sign in (1, -1)]
    np.testing.assert_allclose((grad * along).sum(), (moved[0] - moved[1]) / (2 * step), rtol=3e-3,
                               atol=3e-3, err_msg=name)


@pytest.mark.slow
def test_a_document_of_one_segment_is_the_mixers():
  """Nothing is cached: its own memory has the only gate."""
  layer = block('gated_delta', (('top', 1),))
  first = row()[:, :C]
  mixer, u = layer.cached.mixer, layer.mixer_norm(first)
  context, _ = place_tokens(jnp.ones((1, C), bool), None, None, None, None)
  alone = jax.jit(lambda u: mixer(u, mixer.init_state(1), context)[0])(u)
  y, _ = jax.jit(lambda x: layer.mix(x, layer.init_memory(1), Cell(jnp.ones((1, C), bool),
                                                                  jnp.zeros(1, jnp.int32))))(first)
  np.testing.assert_allclose(y, alone, atol=1e-5)


def test_every_mixer_may_be_wrapped():
  assert {f'{name}{rest}' for name in MIXERS for rest in ('', '_residual')} <= set(VARIANTS)
  assert {name.removesuffix('_residual') for name, _ in
          (getattr(case, 'values', case) for case in CASES)} == set(MIXERS)
