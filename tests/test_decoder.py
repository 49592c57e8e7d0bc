"""The decoder against its definition in NumPy; scan == unrolled; remat; counts; a full cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models import context, decoder, stack
from longctx.models.layers import rotary_angles
from tests import oracles

CONFIG = decoder.Config(vocab_size=19, num_layers=4, embed_dim=16, num_heads=4, num_kv_heads=2,
                        window=(0, 3), max_length=32, init_std=0.4, layer_loop='unrolled',
                        rope_base=100.0).resolved(19)
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, 19)


@functools.cache
def unrolled():
  return decoder.Decoder(CONFIG, rngs=nnx.Rngs(0))


def block_weights(block):
  value = lambda p: np.asarray(p.get_value(), np.float64)
  return dict(attention_norm=value(block.mixer_norm.scale), w_q=value(block.mixer.w_q),
              w_kv=value(block.mixer.w_kv), w_attention_out=value(block.mixer.w_out),
              mlp_norm=value(block.mlp_norm.scale), w_in=value(block.mlp.w_in),
              w_out=value(block.mlp.w_out))


def test_it_computes_its_definition():
  model = unrolled()
  hidden, _ = jax.jit(model)(TOKENS)
  for row in range(2):
    x = np.asarray(model.embedding.table.get_value(), np.float64)[np.asarray(TOKENS[row])]
    for i, block in enumerate(model.blocks):
      x = oracles.decoder_block(
          x, block_weights(block), num_heads=4, num_kv_heads=2, positions=np.arange(12),
          base=100.0, epsilon=CONFIG.norm_epsilon, window=CONFIG.window[i % 2])
    x = oracles.rms_norm(x, 1.0, CONFIG.norm_epsilon)
    np.testing.assert_allclose(hidden[row], x, atol=2e-5)


def as_scan(params):
  """The parameters of an unrolled decoder, stacked as the scanned one has them."""
  blocks = [params['blocks'][i] for i in range(CONFIG.num_layers)]
  period = len(CONFIG.window)
  stacked = {p: stack.stack(blocks[p::period]) for p in range(period)}
  return nnx.State({**{k: v for k, v in params.items() if k != 'blocks'}, 'blocks': stacked})


@functools.cache
def gradients(remat, loop):
  config = dataclasses.replace(CONFIG, remat=remat, layer_loop=loop)
  graphdef, params = nnx.split(unrolled())
  if loop == 'scan':
    params = as_scan(params)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))))
  loss = lambda params: (nnx.merge(graphdef, params)(TOKENS)[0] ** 3).sum()
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  return float(value), grads


@pytest.mark.parametrize('remat,loop', [('none', 'scan'), ('full', 'scan'), ('dots', 'unrolled'),
                                        ('dots_no_batch', 'scan')])
def test_loops_and_remat_policies_compute_the_same(remat, loop):
  value, grads = gradients(remat, loop)
  expected, expected_grads = gradients('none', 'unrolled')
  if loop == 'scan':
    expected_grads = as_scan(expected_grads)
  assert value == pytest.approx(expected, rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3),
               grads, expected_grads)


@pytest.mark.slow
def test_remat_keeps_less(optimized):
  """Peak temp memory of the gradient falls with the policy: full < dots < none."""
  config = decoder.Config(vocab_size=19, num_layers=8, embed_dim=32, num_heads=2,
                          max_length=64).resolved(19)
  def temp(remat):
    model = nnx.eval_shape(lambda: decoder.Decoder(
        dataclasses.replace(config, remat=remat), rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    loss = lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0].sum()
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes
  none, dots, full = temp('none'), temp('dots'), temp('full')
  assert full < dots < none
  assert full < none / 2


def test_initial_spread_is_as_stated():
  config = decoder.Config(vocab_size=300, num_layers=3, embed_dim=64, num_heads=4,
                          init_std=0.02).resolved(300)
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  std = lambda p: float(jnp.std(p.get_value()))
  block = model.blocks[0]
  out = 0.02 / math.sqrt(2 * 3)
  for param, expected in ((model.embedding.table, 0.02), (block.mixer.w_q, 0.02),
                          (block.mixer.w_kv, 0.02), (block.mlp.w_in, 0.02),
                          (block.mixer.w_out, out), (block.mlp.w_out, out)):
    assert std(param) == pytest.approx(expected, rel=0.05)
  stacked = block.mixer.w_q.get_value()
  assert not np.array_equal(stacked[0], stacked[1])
  assert (block.mlp_norm.scale.get_value() == 1).all()


@pytest.mark.parametrize('changes', [{}, dict(tied=False), dict(qk_norm=True),
                                     dict(mlp='gelu', position='learned'),
                                     dict(head_dim=10, mlp_dim=33)])
def test_count_and_flops_in_closed_form(changes):
  config = dataclasses.replace(CONFIG, **{'mlp_dim': 0, **changes}).resolved(19)
  params = nnx.state(nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))))
  assert sum(x.size for x in jax.tree.leaves(params)) == config.num_parameters()
  # The matrices that multiply each token: every weight of two dims or more, but a tied table once
  # and tables that are only looked up not at all.
  matrices = sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(params['blocks']))
                 if x.ndim >= 2) + 19 * config.embed_dim
  attention = 2 * 4 * config.head_dim * 100
  assert config.flops_per_token(100) == 6 * (matrices + 4 * attention)
  seen = 2 * 4 * config.head_dim
  # Layers see 3 keys and all in turn; the first two queries of a row see fewer than 3.
  keys = config.mean_keys(100)
  assert keys == {0: 50.5, 3: (1 + 2 + 3 * 98) / 100}
  assert config.flops_per_token(100, keys) == pytest.approx(
      6 * (matrices + 2 * seen * 50.5 + 2 * seen * 2.97))
  assert config.mean_keys(2) == {0: 1.5, 3: 1.5}


def test_a_full_cache_says_nan_and_not_something_else():
  model = unrolled()
  state = model.init_state(2, capacity=8)
  hidden, state = jax.jit(model)(TOKENS[:, :8], state)
  assert np.isfinite(hidden).all()
  hidden, _ = jax.jit(model)(TOKENS[:, 8:9], state)
  assert np.isnan(hidden).all()


def test_a_windowed_state_does_not_grow_and_a_full_one_does():
  windowed = dataclasses.replace(CONFIG, window=(3,))
  model = nnx.eval_shape(lambda: decoder.Decoder(windowed, rngs=nnx.Rngs(0)))
  sizes = {sum(x.size for x in jax.tree.leaves(jax.eval_shape(
      lambda n=n: model.init_state(1, n)))) for n in (100, 10_000)}
  assert len(sizes) == 1 and not model.state_grows
  assert unrolled().state_grows


def stream_outputs(window, lengths, limit, monkeypatch):
  """Hidden states of two rows read in calls of these lengths, and the largest index on the way."""
  monkeypatch.setattr(context, 'LIMIT', limit)
  config = dataclasses.replace(CONFIG, window=window, num_layers=2, max_length=400)
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  call = jax.jit(lambda *args: model(args[0], args[1], segment_ids_BT=args[2], valid_BT=args[3]))
  total = sum(lengths)
  tokens = jax.random.randint(jax.random.key(1), (2, total), 0, 19)
  segments = jnp.asarray(np.cumsum(np.isin(np.arange(total), [7, 90, 91]))[None].repeat(2, 0))
  # Padding in the second row only: its indices come to the limit later.
  valid = jnp.asarray(np.stack([np.ones(total, bool), np.arange(total) % 5 > 0]))
  state, out, at, largest = model.init_state(2), [], 0, 0
  for length in lengths:
    cut = lambda x, at=at, length=length: x[:, at:at + length]
    hidden, state = call(cut(tokens), state, cut(segments), cut(valid))
    out.append(jnp.where(cut(valid)[..., None], hidden, 0.0))
    at, largest = at + length, max(largest, int(state.clock.index.max()))
  return np.asarray(jnp.concatenate(out, axis=1)), largest


@pytest.mark.parametrize('window, lengths, bits', [
    ((3, 5), (8,) * 24, True),           # rings of 2 and 4: indices go back by a multiple of both
    ((8,), (1,) * 50 + (16,) * 8, True),
    ((8, 6), (8,) * 24, False),          # of 7 and 5 in steps of 32: 35 is above, so the rings turn
])
def test_a_stream_without_an_end_never_runs_out_of_indices(window, lengths, bits, monkeypatch):
  whole, far = stream_outputs(window, lengths, 2 ** 30, monkeypatch)
  again, near = stream_outputs(window, lengths, 64, monkeypatch)
  assert far == sum(lengths) > 150
  assert near < 64 + max(lengths)
  if bits:
    np.testing.assert_array_equal(again, whole)
  else:
    np.testing.assert_allclose(again, whole, atol=1e-5)


def test_the_indices_of_a_row_go_back_before_int32_ends():
  full = jnp.array([2 ** 30 - 1, 2 ** 30, 2 ** 30 + 2 ** 29], jnp.int32)
  clock = context.Clock(full, jnp.array([5, 2 ** 30 - 9, -2 ** 30], jnp.int32), jnp.zeros(3))
  after, less, shift = context.rebase(clock, 3 * 5 * 7)
  assert shift % 105 == 0 and 2 ** 28 < shift <= 2 ** 29
  assert less.tolist() == [0, shift, shift]
  assert after.index.tolist() == [2 ** 30 - 1, 2 ** 30 - shift, 2 ** 30 + 2 ** 29 - shift]
  assert after.start.tolist() == [5, 2 ** 30 - 9 - shift, -2 ** 30]


def test_rotary_angles_are_those_of_the_definition():
  positions = jnp.array([[0, 1, 5, 1000]])
  cos, sin = rotary_angles(positions, 8, 10_000.0)
  expected = np.array([0, 1, 5, 1000])[:, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
  np.testing.assert_allclose(cos[0, :, 0], np.cos(expected), atol=1e-4)
  np.testing.assert_allclose(sin[0, :, 0], np.sin(expected), atol=1e-4)
