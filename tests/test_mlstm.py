"""The mLSTM against loops without a stabiliser: each form, corners, splits, maps, devices; its layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.mixers.base import Settings
from longctx.models.mixers.mlstm import MLSTMBlock
from longctx.parallel.state_scan import over_sequence
from longctx.recurrence.mlstm import MLSTM, Inputs, State
from tests import kernel_laws, oracles
from tests.test_mixers import SEGMENTS, arrays, shaken
from tests.test_mixers import run as run_layer

B, T, H, K, V = 2, 16, 2, 4, 3
FORMS = {'sequential': MLSTM('sequential'), 'chunked': MLSTM('chunked', 4), 'scan': MLSTM('scan', 4)}

slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)
DEVICES = [slow(name) if name in ('ring of 2', 'ring of 8') else name for name in kernel_laws.MESHES]


@functools.cache
def case():
  """Input gates from e^-6 to e^6, forget gates near 0 and 1; the state at m of either sign."""
  keys = jax.random.split(jax.random.key(0), 8)
  normal = lambda i, *shape: jax.random.normal(keys[i], shape)
  log_forget = jax.nn.log_sigmoid(3 * normal(4, B, T, H) + 1).at[:, 4, 0].set(0.0)
  state = State(normal(5, B, H, K, V), normal(6, B, H, K), jnp.abs(normal(7, B, H)))
  return (Inputs(normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V),
                 2 * normal(3, B, T, H), log_forget, **kernel_laws.marks(B, T)), state)


def loops(inputs, state):
  """m as the recursion has it, and the memory times e^-m."""
  out, C, n = np.zeros(inputs.v.shape), np.zeros(state.C.shape), np.zeros(state.n.shape)
  m = state.m.copy()
  for b in range(B):
    for h in range(H):
      scale = np.exp(state.m[b, h])
      out[b, :, h], C[b, h], n[b, h] = oracles.mlstm(
          *(x[b, :, h] for x in inputs[:5]), state.C[b, h] * scale, state.n[b, h] * scale,
          inputs.reset_BT[b], inputs.valid_BT[b])
      for t in range(T):
        if inputs.valid_BT[b, t]:
          before = 0 if inputs.reset_BT[b, t] else m[b, h]
          m[b, h] = max(inputs.log_forget[b, t, h] + before, inputs.log_input[b, t, h], 0)
      C[b, h], n[b, h] = C[b, h] * np.exp(-m[b, h]), n[b, h] * np.exp(-m[b, h])
  return out, State(C, n, m)


@pytest.mark.parametrize('form', FORMS)
def test_equals_loops(form):
  kernel_laws.equals_loops(FORMS[form], case(), loops)


@pytest.mark.parametrize('form', ['chunked', 'scan'])
def test_forms_are_equal_in_values_and_gradients(form):
  kernel_laws.same(FORMS[form], FORMS['sequential'], case())


def test_any_split_and_one_token_at_a_time():
  kernel_laws.splits(FORMS['chunked'], case(), (0, 10, 16))
  kernel_laws.splits(FORMS['chunked'], case(), tuple(range(17)))


@pytest.mark.parametrize('form', ['chunked', slow('sequential')])
def test_maps_join_and_apply(form):
  kernel_laws.joins(FORMS[form], case())


@pytest.mark.parametrize('devices', DEVICES)
def test_cut_over_devices(devices):
  kernel_laws.same(FORMS['chunked'], FORMS['sequential'], case(), kernel_laws.MESHES[devices])


empty = lambda: State(jnp.zeros((B, H, K, V)), jnp.zeros((B, H, K)), jnp.zeros((B, H)))


@functools.cache
def run(form):
  return jax.jit(functools.partial(over_sequence, FORMS[form]))


@pytest.mark.parametrize('form', ['sequential', 'chunked'])
def test_equals_the_parallel_form_of_the_paper_where_gates_are_large(form):
  """Input gates up to e^200 overflow all but stabilised forms."""
  inputs = case()[0]._replace(reset_BT=None, valid_BT=None)
  inputs = inputs._replace(log_input=60 * inputs.log_input)
  assert float(inputs.log_input.max()) > 200
  out, _ = run(form)(inputs, empty())
  for b in range(B):
    for h in range(H):
      expected = oracles.mlstm_parallel(*(np.asarray(x[b, :, h], np.float64) for x in inputs[:5]))
      np.testing.assert_allclose(out[b, :, h], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('form', ['sequential', 'chunked'])
def test_the_outputs_do_not_depend_on_m(form):
  inputs, state = case()
  moved = State(state.C * np.exp(-3), state.n * np.exp(-3), state.m + 3)
  kernel_laws.close(run(form)(inputs, moved)[0], run(form)(inputs, state)[0])
  moved = empty()._replace(m=jnp.full((B, H), 7.0))   # an empty memory has no scale
  kernel_laws.close(run(form)(inputs, moved)[0], run(form)(inputs, empty())[0])


@pytest.mark.parametrize('changes', [
    dict(log_input=1e3), dict(log_input=-1e3), dict(log_forget=-jnp.inf), dict(k=0.0),
    dict(q=0.0), dict(valid_BT=False)],
    ids=lambda changes: ' '.join(f'{k}={v}' for k, v in changes.items()))
def test_corners_are_equal_in_gradients_too(changes):
  inputs, _ = case()
  full = {name: jnp.full_like(getattr(inputs, name), x) for name, x in changes.items()}
  kernel_laws.same(FORMS['chunked'], FORMS['sequential'], (inputs._replace(**full), empty()),
                   atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('changes', [dict(log_forget=0.0), dict(q=0.0, log_input=1e3)])
def test_corners_have_finite_gradients(changes):
  """Where m has two slopes (a tie), or a query of 0 asks a memory of e^1000."""
  inputs, _ = case()
  full = {name: jnp.full_like(getattr(inputs, name), x) for name, x in changes.items()}
  results = [kernel_laws.compiled(FORMS[form])(inputs._replace(**full), empty())
             for form in ('chunked', 'sequential')]
  for (out, after, grads), (expected, after_expected, _) in [results]:
    kernel_laws.close(kernel_laws.seen(out, inputs), kernel_laws.seen(expected, inputs))
    kernel_laws.close(after, after_expected)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_state_is_float32_whatever_the_inputs():
  inputs, state = case()
  half = inputs._replace(**{n: getattr(inputs, n).astype(jnp.bfloat16) for n in 'qkv'})
  out, after, grads = kernel_laws.compiled(FORMS['chunked'])(half, state)
  exact = half._replace(**{n: getattr(half, n).astype(jnp.float32) for n in 'qkv'})
  expected, after_expected, _ = kernel_laws.compiled(FORMS['chunked'])(exact, state)
  assert (out.dtype, grads[0].q.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert {x.dtype for x in after} == {jnp.dtype('float32')}
  kernel_laws.close(after, after_expected)   # bf16 never enters the memory
  error = np.abs(np.asarray(out, np.float32) - expected)
  assert (error / (1 + np.abs(expected))).max() < 0.03


D = 12
small = functools.partial(Settings, dim=D, num_heads=2, width=16, chunk=4, std=0.3, out_std=0.3)
tokens = lambda: np.random.default_rng(1).standard_normal((2, 11, D)).astype(np.float32)


def layer_loops(p, x):
  """The mLSTM block of the xLSTM paper over one document x [T, D], float64."""
  length, E, heads = len(x), 16, 2
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  u, z = x @ p['w_up'][:, 0], x @ p['w_up'][:, 1]
  conv = np.zeros((length, E)) + p['conv.bias']
  for t in range(length):
    for j in range(min(4, t + 1)):
      conv[t] += p['conv.taps'][j] * u[t - j]
  conv = conv * sigmoid(conv)
  q, k, v = np.zeros((3, length, E))
  for block in range(E // 4):
    at = slice(4 * block, 4 * block + 4)
    q[:, at] = conv[:, at] @ p['w_q'][:, block]
    k[:, at] = conv[:, at] @ p['w_k'][:, block]
    v[:, at] = u[:, at] @ p['w_v'][:, block]
  gates = np.concatenate([q, k, v], axis=1) @ p['w_gates'].reshape(3 * E, 4)
  i, f = gates[:, :2] + p['bias_input'], gates[:, 2:] + p['bias_forget']
  h = np.zeros((length, E))
  for head in range(heads):
    at = slice(8 * head, 8 * head + 8)
    out, _, _ = oracles.mlstm(q[:, at], k[:, at] / np.sqrt(8), v[:, at], i[:, head],
                              np.log(sigmoid(f[:, head])), np.zeros((8, 8)), np.zeros(8),
                              np.zeros(length, bool), np.ones(length, bool))
    out = out - out.mean(1, keepdims=True)
    h[:, at] = out / np.sqrt((out * out).mean(1, keepdims=True) + 1e-6) * p['scale'][at]
  return ((h + p['skip'] * conv) * z * sigmoid(z)) @ p['w_down']


def test_layer_is_the_block_of_the_paper():
  mixer = shaken(MLSTMBlock, width=16)
  got, _ = run_layer(mixer, tokens(), SEGMENTS)
  for row, (a, b) in ((0, (0, 4)), (0, (4, 11)), (1, (0, 9)), (1, (9, 11))):
    expected = layer_loops(arrays(mixer), np.float64(tokens()[row, a:b]))
    np.testing.assert_allclose(got[row, a:b], expected, atol=2e-5, rtol=2e-5)


def test_layer_starts_as_published_and_counts_itself():
  for settings in (small(), small(conv=1), Settings(dim=16, num_heads=4)):
    mixer, cost = MLSTMBlock(settings, rngs=nnx.Rngs(0)), MLSTMBlock.cost(settings)
    found = arrays(mixer)
    assert cost.parameters == sum(x.size for x in found.values())
    assert cost.matrices == sum(x.size for n, x in found.items() if n[:2] == 'w_')
    assert cost.state == sum(x[0].size for x in jax.tree.leaves(mixer.init_state(1)))
  np.testing.assert_allclose(found['bias_forget'], [3, 4, 5, 6])
  assert np.all(found['w_gates'] == 0) and 0 < np.abs(found['bias_input']).max() < 0.5
  assert cost.wire == 4 * (8 * 9 + 2)
  with pytest.raises(ConfigError, match=r'model.num_heads=3: must divide model.mixer_width=16'):
    MLSTMBlock.cost(small(num_heads=3))


def test_zero_inputs_and_saturated_gates_have_finite_gradients():
  mixer = MLSTMBlock(small(), rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(mixer)
  loss = jax.jit(jax.grad(lambda p, x: jnp.sum(run_layer(nnx.merge(graphdef, p), x)[0] ** 2)))
  for x in (np.zeros((2, 11, D), np.float32), 1e3 * tokens()):
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(loss(params, x)))
