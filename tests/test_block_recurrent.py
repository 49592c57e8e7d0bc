"""The Block-Recurrent Transformer's layer against its equations in loops, float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.memories.base import Block, Cell, Settings
from longctx.models.memories.block_recurrent import BlockRecurrent
from tests import oracles

B, S, C, D, M, N, K, H = 2, 3, 4, 6, 3, 4, 2, 4
SETTINGS = Settings(dim=D, num_heads=N, num_kv_heads=K, head_dim=H, segment=C, tokens=M, mlp='none',
                    std=0.5, out_std=0.5)
KINDS = ('fixed', 'lstm')


@functools.cache
def made(kind):
  """(graphdef, parameters, x [B, S, C, D], what is summed)."""
  settings = dataclasses.replace(SETTINGS, variant='' if kind == 'fixed' else kind)
  graphdef, params = nnx.split(BlockRecurrent(settings, rngs=nnx.Rngs(0)))
  x, seen = jax.random.normal(jax.random.key(1), (2, B, S, C, D))
  return graphdef, params, x, seen


def numbers(params):
  return {'/'.join(map(str, path)): np.float64(x[...]) for path, x in nnx.to_flat_state(params)}


# The definition.


def attend(q, k, v, causal=False):
  """q [T, N, H], k and v [S, K, H] -> [T, N, H]; rope among tokens."""
  out = np.zeros_like(q)
  for t, n in np.ndindex(len(q), N):
    head, upto = n // (N // K), t + 1 if causal else len(k)
    query, keys = q[:, n], k[:, head]
    if causal:
      query, keys = (oracles.rope(x, np.arange(len(x)), 10_000.0) for x in (query, keys))
    scores = keys[:upto] @ query[t] / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[t, n] = weights / weights.sum() @ v[:upto, head]
  return out


def layer(p, kind, x, states):
  """(what mixing adds to x [C, D], the next states [M, D])."""
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  heads = lambda h, w: np.einsum('td,dnh->tnh', h, w)
  h = oracles.rms_norm(x, p['mixer_norm/scale'], 1e-6)
  g = oracles.rms_norm(states, p['state_norm/scale'], 1e-6) + p['state_ids']
  token_k, token_v = (heads(h, p['mixer/w_kv'][:, i]) for i in range(2))
  state_k, state_v = (heads(g, p['w_state_kv'][:, i]) for i in range(2))
  near = attend(heads(h, p['mixer/w_q']), token_k, token_v, causal=True)
  far = attend(heads(h, p['w_q_to_states']), state_k, state_v)
  y = np.concatenate([near, far], axis=1).reshape(len(x), -1) @ np.concatenate(
      [p['mixer/w_out'], p['w_out_of_states']]).reshape(-1, D)
  heard = np.concatenate([attend(heads(g, p['w_state_q'][:, 0]), state_k, state_v),
                          attend(heads(g, p['w_state_q'][:, 1]), token_k, token_v)], axis=1)
  linear = lambda w: heard.reshape(len(states), -1) @ p[f'w_{w}'].reshape(-1, D) + p[f'b_{w}']
  if kind == 'fixed':
    keep = sigmoid(p['b_keep'])
    return y, states * keep + linear('z') * (1 - keep)
  return y, (states * sigmoid(linear('forget') + 1)
             + np.tanh(linear('z')) * sigmoid(linear('input') - 1))


def document(p, kind, x):
  """x [S, C, D] -> (what mixing adds, the states after)."""
  states, out = p['states'], []
  for segment in x:
    y, states = layer(p, kind, segment, states)
    out.append(y)
  return np.array(out), states


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, x_BSCD):
  block = nnx.merge(graphdef, params)
  cell = Cell(jnp.ones((B, C), bool), jnp.zeros((B,), jnp.int32))
  def step(memory, x_BCD):
    y_BCD, memory = block.mix(x_BCD, memory, cell)
    return memory, y_BCD
  memory, y = jax.lax.scan(step, block.init_memory(B), jnp.moveaxis(x_BSCD, 1, 0))
  return jnp.moveaxis(y, 0, 1), memory.store


@functools.cache
def one_cell(kind):
  """A compiled cell with padding, its value and gradient; `changes` to parameters by name."""
  graphdef, params, _, _ = made(kind)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def call(params, x_BCD, states, valid_BC):
    block = nnx.merge(graphdef, params)
    y, memory = block.mix(x_BCD, block.init_memory(B)._replace(store=states),
                          Cell(valid_BC, jnp.zeros((B,), jnp.int32)))
    return (y ** 2).sum() + (memory.store ** 2).sum(), (y, memory.store)
  return params, call


@pytest.mark.parametrize('kind', KINDS)
def test_a_layer_and_its_states_are_the_equations(kind):
  graphdef, params, x, _ = made(kind)
  y, states = run(graphdef, params, x)
  for b in range(B):
    expected, after = document(numbers(params), kind, np.float64(x[b]))
    np.testing.assert_allclose(y[b], expected, atol=2e-5)
    np.testing.assert_allclose(states[b], after, atol=2e-5)


# A number of each parameter that the states of three segments pass through.
PROBES = {'fixed': ('states', 'state_ids', 'state_norm/scale', 'b_keep', 'w_z', 'w_state_q', 'w_state_kv',
                    'w_q_to_states', 'w_out_of_states', 'mixer/w_kv'),
          'lstm': ('states', 'w_forget', 'b_input', 'w_input', 'w_z')}


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_go_through_all_segments(kind):
  graphdef, params, x, seen = made(kind)
  grads = numbers(jax.jit(jax.grad(lambda p: (run(graphdef, p, x)[0] * seen).sum()))(params))
  p, step = numbers(params), 1e-5
  loss = lambda p: sum((document(p, kind, np.float64(x[b]))[0] * np.float64(seen[b])).sum()
                       for b in range(B))
  for name in PROBES[kind]:
    at = tuple(n // 2 for n in p[name].shape)
    up, down = ({**p, name: p[name].copy()} for _ in range(2))
    up[name][at] += step
    down[name][at] -= step
    slope = (loss(up) - loss(down)) / (2 * step)
    assert abs(slope) > 1e-5, name
    np.testing.assert_allclose(grads[name][at], slope, rtol=2e-3, atol=2e-5, err_msg=name)


def test_keys_and_values_are_of_the_states_as_they_are():
  """lucidrains' block-recurrent-transformer-pytorch, issue 3, took them from the first states: tokens
  then see the same states for ever."""
  params, call = one_cell('fixed')
  x, states = jax.random.normal(jax.random.key(3), (B, C, D)), params['states'][...]
  valid = jnp.ones((B, C), bool)
  first = jnp.broadcast_to(states, (B, M, D))
  (_, (y, _)), _ = call(params, x, first, valid)
  (_, (other, _)), _ = call(params, x, first + jax.random.normal(jax.random.key(4), first.shape), valid)
  assert (np.abs(y - other).max(axis=(1, 2)) > 1e-2).all()


@pytest.mark.parametrize('kind', KINDS)
def test_states_do_not_hear_padding_and_nothing_is_infinite(kind):
  params, call = one_cell(kind)
  x, states = jax.random.normal(jax.random.key(3), (B, C, D)), jnp.zeros((B, M, D))
  part = jnp.asarray([[True, True, False, False], [False] * 4])
  (_, (y, after)), grads = call(params, x, states, part)
  (_, (again, same)), _ = call(params, jnp.where(part[..., None], x, 1e3), states, part)
  np.testing.assert_array_equal(after, same)
  np.testing.assert_array_equal(y[0, :2], again[0, :2])
  saturated = lambda scale: jax.tree.map(
      lambda x: jnp.full_like(x, scale) if x.shape == (D,) else x, params)
  for scale in (1e4, -1e4):
    out = call(saturated(scale), x, states, part)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, out)))


@pytest.mark.parametrize('kind', KINDS)
def test_costs_are_what_is_there(kind):
  settings = dataclasses.replace(SETTINGS, variant=kind, tokens=0)
  cost = BlockRecurrent.cost(settings)
  block, plain = BlockRecurrent(settings, rngs=nnx.Rngs(0)), Block(settings, rngs=nnx.Rngs(0))
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  memory = jax.eval_shape(lambda: block.init_memory(1))
  assert memory.store.dtype == jnp.float32 and count(memory) == cost.state == 512 * D
  assert count(nnx.state(block)) - count(nnx.state(plain)) == cost.parameters


def test_an_unknown_gate_is_refused():
  with pytest.raises(ConfigError, match=r'memory_variant.*did you mean "lstm"'):
    BlockRecurrent.cost(dataclasses.replace(SETTINGS, variant='lst'))
