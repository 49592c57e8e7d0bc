"""The laws of every recurrent mixer by itself: a new one is held to them by its line in MIXERS.

Chunked = token by token in values and gradients, corners, a state saved amid a document, one
program for all segments, float32 states, empty batches, devices; cost and weight decay.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx import store
from longctx.models import decoder, recurrent
from longctx.models.context import new_clock, place_tokens
from longctx.models.mixers import MIXERS
from longctx.models.mixers.base import Settings
from longctx.parallel import mesh
from longctx.store import file
from longctx.training import optim
from tests import kernel_laws, traced
from tests.kernel_laws import close_to_the_largest
from tests.test_mixers import shaken

B, T, D, CHUNK = 2, 11, 16, 4   # no number of chunks makes T
SMALLER = {'mamba2': dict(key_dim=4)}   # than the published 128

# Documents begin in mid-chunk; padding on the left, amid and on the right.
SEGMENTS = np.array([[0] * 2 + [1] * 4 + [2] * 5, [5] * 2 + [6] * 7 + [7] * 2])
VALID = np.array([[0, 0] + [1] * 9, [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]], bool)
# One mixer of each recurrence; what takes long is asked of the others in the slow suite.
KINDS = ('rglru', 'mamba2', 'gla', 'gated_delta', 'mlstm', 'rwkv7')
NOT_SUMMED = ('conv', 'conv_x', 'conv_bc', 'previous')   # of a state: the last inputs


slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)
KINDS_FIRST = [name if name in KINDS else slow(name) for name in MIXERS]
tokens = lambda seed, length=T: np.random.default_rng(seed).standard_normal(
    (B, length, D)).astype(np.float32)


def made(name, form='auto'):
  return shaken(MIXERS[name], dim=D, chunk=CHUNK, form=form, **SMALLER.get(name, {}))


@functools.cache
def compiled(name, form='auto'):
  """(x, state, clock, segments, valid) -> ((loss, (y, state, clock)), gradients); and its traces."""
  mixer, traces = made(name, form), []
  graphdef, params = nnx.split(mixer)
  def loss(params, x, state, clock, segments, valid):
    traces.append(x.dtype)
    context, clock = place_tokens(jnp.zeros(x.shape[:2], jnp.int32), clock, None, segments, valid)
    y, after = nnx.merge(graphdef, params)(x, state, context)
    leaves = [y * valid[..., None], *jax.tree.leaves(after)]
    return sum((z * kernel_laws.wave(z)).sum() for z in leaves), (y, after, clock)
  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  return functools.partial(run, params), traces


def started(name):
  return made(name).init_state(B), new_clock(B)


@functools.cache
def begun(name):
  """The state and the clock after a first segment, in mid-document."""
  (_, (_, state, clock)), _ = compiled(name)[0](
      tokens(1), *started(name), SEGMENTS - 5, np.ones_like(VALID))
  return state, clock


@pytest.mark.parametrize('name', KINDS_FIRST)
def test_chunks_equal_one_token_after_the_other_in_values_and_gradients(name):
  call = (tokens(2), *begun(name), SEGMENTS, VALID)
  (_, (y, *after)), grads = compiled(name)[0](*call)
  (_, (y_expected, *after_expected)), grads_expected = compiled(name, 'sequential')[0](*call)
  close_to_the_largest(y[VALID], y_expected[VALID])
  close_to_the_largest(after, after_expected)
  # Gradients are sums over tokens: to the digits of the largest.
  close_to_the_largest(jax.tree.leaves(grads), jax.tree.leaves(grads_expected), 2e-5)
  assert not np.asarray(grads[1])[~VALID].any()   # padding says nothing


CORNERS = {'zeros': (0, VALID), 'nothing but padding': (1, np.zeros_like(VALID)),
           'large': (1e3, VALID)}


@pytest.mark.parametrize('name', MIXERS)
def test_gradients_are_finite_in_the_corners_and_padding_moves_no_state(name):
  for factor, valid in CORNERS.values():
    for state in (started(name), begun(name)):
      (loss, (_, after, clock)), grads = compiled(name)[0](
          np.float32(factor) * tokens(2), *state, SEGMENTS, valid)
      assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, after, grads)))
      if not valid.any():
        jax.tree.map(np.testing.assert_array_equal, (after, clock), state)


@pytest.mark.parametrize('name', MIXERS)
def test_a_state_saved_amid_a_document_goes_on_bit_for_bit_in_the_same_program(name):
  run, traces = compiled(name)
  identity = store.Identity(model=name, config={}, parameters='', tokenizer='')
  init = lambda rows, capacity: (made(name).init_state(rows), new_clock(rows))
  state = begun(name)
  rows = [file.encode(store.take(state, identity, row=row, tokens=T)) for row in range(B)]
  read = [store.state_of(file.decode(data, name), init) for data in rows]
  saved = jax.tree.map(lambda *x: np.concatenate(x), *read)
  for seed in (2, 3):   # of segments
    state, saved = (run(tokens(seed), *x, SEGMENTS, VALID) for x in (state, saved))
    jax.tree.map(np.testing.assert_array_equal, saved, state)
    state, saved = (x[0][1][1:] for x in (state, saved))
  assert len(traces) == 1


@pytest.mark.parametrize('name', MIXERS)
def test_bfloat16_inputs_keep_a_float32_state(name):
  mixer = made(name)
  @jax.jit
  def run(x):
    context, _ = place_tokens(jnp.zeros(x.shape[:2], jnp.int32), *2 * (None,), SEGMENTS, VALID)
    return mixer(x, mixer.init_state(B), context)
  y, state = run(jnp.asarray(tokens(1), jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  for key, x in store.context.named(state).items():
    assert x.dtype == jnp.float32, key
    # Its digits are float32's too: it was not rounded on the way.
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float32)
    assert key in NOT_SUMMED or (rounded != x).any(), key


@pytest.mark.parametrize('form', ['auto', slow('sequential')])
@pytest.mark.parametrize('name', MIXERS)
def test_an_empty_batch_gives_empty_outputs_and_rows_without_tokens_are_refused(name, form):
  graphdef, params = nnx.split(made(name, form))
  def loss(params, x):
    ids = jnp.zeros(x.shape[:2], jnp.int32)
    context, _ = place_tokens(ids, new_clock(len(x)), None, ids, ids > 0)
    mixer = nnx.merge(graphdef, params)
    y, after = mixer(x, mixer.init_state(len(x)), context)
    return y.sum(), (y, after)
  run = lambda *shape: jax.eval_shape(jax.grad(loss, has_aux=True), params,
                                      jax.ShapeDtypeStruct(shape, jnp.float32))
  grads, (y, after) = run(0, T, D)
  assert y.shape == (0, T, D) and {len(x) for x in jax.tree.leaves(after)} == {0}
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
  with pytest.raises(ValueError, match=re.escape('tokens have shape (2, 0)')):
    run(2, 0, D)


LAYOUTS = {'data 2, seq 2, model 2': (2, 2, 2), 'seq 8': (1, 8, 1)}
LENGTH = 24   # 3 tokens a device of 8: the convolution's halo is all of them


@functools.cache
def forward(name, layout, length):
  """y and the state after, of a second segment; `layout`: devices of data, seq, model, or None."""
  mixer = made(name)
  graphdef, params = nnx.split(mixer)
  def call(params, x, state, clock, segments):
    context, clock = place_tokens(jnp.zeros(x.shape[:2], jnp.int32), clock, None, segments, None)
    return *nnx.merge(graphdef, params)(x, state, context), clock
  if layout is not None:
    data, seq, model = layout
    call = mesh.under(mesh.make_layout(
        mesh.Config(data=data, seq=seq, model=model, layout='sequence'),
        jax.devices()[:data * seq * model]), call)
  segments = np.sort(np.random.default_rng(0).integers(0, 5, (B, length)))
  return jax.jit(call)(params, tokens(2, length), *begun(name), segments)


# One layout a mixer, the other in the slow suite: heads are cut where recurrences differ.
@pytest.mark.parametrize('name,layout', [
    (name, layout) if (name in KINDS) == ('model' in layout) else slow(name, layout)
    for name in MIXERS for layout in LAYOUTS])
def test_cut_over_eight_devices_equals_one(name, layout):
  close_to_the_largest(forward(name, LAYOUTS[layout], LENGTH), forward(name, None, LENGTH))


RINGS = (3, 5, 6, 7)
AT_ONCE = {('gated_delta', 3), ('mlstm', 3), ('mamba2', 5), ('gla', 6), ('rglru', 7)}


@pytest.mark.parametrize('name,ring', [
    (name, ring) if (name, ring) in AT_ONCE else slow(name, ring)
    for name in KINDS if name != 'rwkv7' for ring in RINGS])   # whose map is that of gated_delta
def test_rings_of_any_size_equal_one_device(name, ring):
  length = 3 * 5 * 7 * 2
  close_to_the_largest(forward(name, (1, ring, 1), length), forward(name, None, length))


# What a layer says of its cost.

ELEMENTWISE = ('min_gru', 'min_lstm', 'rglru')   # recurrences without a matrix product


def abstract(name, **settings):
  """(cost, graphdef, parameters without values)."""
  settings = Settings(**dict(dim=64, num_heads=2) | settings)
  mixer = nnx.eval_shape(lambda: MIXERS[name](settings, rngs=nnx.Rngs(0)))
  return MIXERS[name].cost(settings), *nnx.split(mixer)


def outputs(graphdef):
  def call(params, x):
    context, _ = place_tokens(jnp.zeros(x.shape[:2], jnp.int32), *4 * (None,))
    mixer = nnx.merge(graphdef, params)
    return mixer(x, mixer.init_state(len(x)), context)
  return call


@pytest.mark.parametrize('name,form', [
    *((name, 'auto') for name in MIXERS),
    *((name, 'scan') if name in ('gated_delta', 'rwkv7') else slow(name, 'scan') for name in MIXERS)])
def test_the_claimed_arithmetic_is_that_of_the_traced_products(name, form):
  """The claim also has the element-wise parts that matter: a convolution, decays of a state."""
  cost, graphdef, params = abstract(name, form=form)
  length = 4096
  x = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
  counted = traced.products(outputs(graphdef), params, x) / length
  assert 0.98 <= (2 * cost.matrices + cost.flops) / counted <= 1.08
  if name not in ELEMENTWISE:
    assert 0.98 <= cost.flops / (counted - 2 * cost.matrices) <= 1.08


@pytest.mark.parametrize('seq', [2, slow(8)])
@pytest.mark.parametrize('name', MIXERS)
def test_the_claimed_sends_are_the_traced_ones(name, seq):
  """The map to each other device, in float32; besides, the convolution's halo, in the compute type."""
  cost, graphdef, params = abstract(name)
  layout = mesh.make_layout(mesh.Config(data=1, seq=seq, layout='sequence'), jax.devices()[:seq])
  x = jax.ShapeDtypeStruct((B, 8 * seq, 64), jnp.bfloat16)
  with jax.set_mesh(layout.mesh):
    sent = traced.sends(mesh.under(layout, outputs(graphdef)), params, x, axis_size=seq)
  assert sent.pop('all_gather')[1] == 4 * cost.wire * B * (seq - 1)
  state = jax.eval_shape(lambda: nnx.merge(graphdef, params).init_state(B))
  halo = sum(x.size for key, x in store.context.named(state).items() if key in NOT_SUMMED)
  assert sent.pop('ppermute', (0, 0))[1] == 2 * halo
  assert not sent


# What weight decay leaves alone: rates, steps, mixes, biases and scales; matrices and taps decay.
KEPT = {
    'delta_net': {'norm/scale'},
    'gated_delta': {'a_log', 'dt_bias', 'norm/scale'},
    'gla': {'gate_bias', 'norm_scale'},
    'kda': {'a_log', 'dt_bias', 'bias_gate', 'norm/scale'},
    'linear_attention': set(),
    'mamba2': {'A_log', 'dt_bias', 'D', 'norm_scale', 'conv_x/bias', 'conv_bc/bias'},
    'min_gru': {'biases/0', 'biases/1', 'conv/bias'},
    'min_lstm': {'biases/0', 'biases/1', 'biases/2', 'conv/bias'},
    'mlstm': {'bias_input', 'bias_forget', 'scale', 'skip', 'conv/bias'},
    'retention': set(),
    'rglru': {'decay', 'bias_x', 'bias_y', 'bias_r', 'bias_i', 'bias_out', 'conv/bias'},
    'rwkv7': {*(f'mix/{name}' for name in 'rwkvag'), 'bias_decay', 'bias_rate', 'k_k', 'k_a', 'r_k',
              'scale', 'bias'},
    'elman': {'bias'},
    'lstm': {'bias'},
    'gru': {'bias', 'bias_hidden'},
    'slstm': {'bias'},
}


@pytest.mark.parametrize('name', [*MIXERS, *recurrent.CELLS])
def test_weight_decay_leaves_alone_what_the_table_says(name):
  """In a whole model, where the parameters of a decoder's layers stand stacked."""
  sizes = dict(vocab_size=29, num_layers=2, embed_dim=16)
  if name in MIXERS:
    config, prefix = decoder.Config(num_heads=2, layers=(name,), **sizes), 'blocks/0/mixer/'
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
  else:
    config, prefix = recurrent.Config(name=name, hidden_dim=16, **sizes), 'stack/layers/1/'
    model = nnx.eval_shape(lambda: recurrent.Recurrent(config, rngs=nnx.Rngs(0)))
  flags = jax.tree_util.tree_leaves_with_path(optim.map_params(optim.decays, nnx.state(model)))
  flags = {optim.path_name(path): flag for path, flag in flags}
  own = {key.removeprefix(prefix): flag for key, flag in flags.items() if key.startswith(prefix)}
  assert {key for key, flag in own.items() if not flag} == KEPT[name]
  assert any(own.values())
