"""The closed forms of what is sent equal the sends of the traced program; the advice is sane."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from longctx import assembly, configuration
from longctx.attention import intervals
from longctx.attention.blockwise import Blockwise
from longctx.attention.intervals import Options
from longctx.parallel import costs, mesh, sequence
from longctx.parallel.chips import CHIPS
from tests import traced

B, N, K, H = 2, 8, 4, 8
CHIP = {c.name: c for c in CHIPS}


def traced_sends(strategy, size, length, ulysses=1, window=0, order='contiguous', dtype=jnp.float32):
  """(forward, forward and backward) by primitive."""
  layout = mesh.make_layout(
      mesh.Config(data=1, seq=size, layout='sequence', strategy=strategy, ulysses=ulysses,
                  order=order, unit=4), jax.devices()[:size])
  mask = (intervals.sliding_window(B, length, window) if window
          else intervals.causal(B, length))
  mask = dataclasses.replace(mask, order=order)
  shape = lambda heads: jax.ShapeDtypeStruct((B, length, heads, H), dtype)
  attend = mesh.under(layout, lambda q, k, v: sequence.attend(
      Blockwise(), layout, q, k, v, mask, Options(scale=1.0), lse_gradient=False)[0])
  gradients = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
  count = lambda f: traced.sends(f, shape(N), shape(K), shape(K), axis_size=size)
  with jax.set_mesh(layout.mesh):
    return count(attend), count(gradients)


def total(sent):
  return sum(x for _, x in sent.values())


def shape_of(size, length, dtype=jnp.float32, **more):
  return costs.Shape(batch=B, tokens=length // size, heads=N, kv_heads=K, head_dim=H,
                     bytes_per_element=jnp.dtype(dtype).itemsize, devices=size, **more)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('size', [2, 3, 8])
def test_a_ring_sends_keys_only_and_not_one_hop_too_many(size, dtype):
  forward, both = traced_sends('ring', size, 48, dtype=dtype)
  expected = costs.ring_bytes(shape_of(size, 48, dtype), size - 1)
  assert set(forward) == set(both) == {'ppermute'}   # no gather of keys or values
  assert forward['ppermute'] == (3 * (size - 1), expected[0])          # k, v and the index
  assert both['ppermute'] == (3 * 2 * (size - 1) + 2 * (size - 1), sum(expected))


def test_both_ways_round_halve_what_a_link_carries():
  forward, both = traced_sends('bidirectional', 8, 48)
  index = 4 * B * 6 * 7
  one_way = costs.ring_bytes(shape_of(8, 48), 7)
  assert total(forward) == one_way[0] + index   # the index goes both ways
  assert total(both) == sum(one_way) + 2 * index
  assert forward['ppermute'][0] == 2 * 3 * 7


@pytest.mark.parametrize('order,window,hops', [
    ('contiguous', 1, 0), ('contiguous', 2, 1), ('contiguous', 7, 1), ('contiguous', 8, 2),
    ('contiguous', 48, 7), ('zigzag', 2, 7), ('zigzag', 3, 7)])
def test_a_window_makes_only_the_hops_it_needs(order, window, hops):
  """Six tokens a device: a window of W reaches ceil((W - 1) / 6) devices back."""
  forward, both = traced_sends('ring', 8, 48, window=window, order=order)
  count = lambda sent: sent.get('ppermute', (0, 0))[0]
  assert (count(forward), count(both)) == (3 * hops, 8 * hops)


def test_a_window_in_stripes_needs_the_devices_its_stripes_lie_on():
  """Stripes of 4 over 8 devices: a window of 9 reaches two stripes back, so two devices, and three
  where a round of the deal ends between."""
  forward, _ = traced_sends('ring', 8, 64, window=9, order='striped')
  assert forward['ppermute'][0] == 3 * 3


@pytest.mark.parametrize('strategy,size,ulysses', [('ulysses', 2, 1), ('ulysses', 4, 1),
                                                   ('ulysses', 8, 1), ('hybrid', 8, 2),
                                                   ('hybrid', 8, 4)])
def test_ulysses_and_hybrid_send_what_the_formula_says(strategy, size, ulysses):
  dtype = jnp.bfloat16 if size == 8 else jnp.float32
  forward, both = traced_sends(strategy, size, 48, ulysses, dtype=dtype)
  shape, degree = shape_of(size, 48, dtype), size if strategy == 'ulysses' else ulysses
  expected = costs.ulysses_bytes(shape, degree)
  if strategy == 'hybrid':
    inside = dataclasses.replace(shape, tokens=shape.tokens * degree, heads=N // degree,
                                 kv_heads=max(1, K // degree))
    expected = tuple(a + b for a, b in zip(expected, costs.ring_bytes(inside, size // degree - 1)))
    assert forward['ppermute'][0] == 3 * (size // degree - 1)
  assert total(forward) == expected[0]
  assert total(both) - total(forward) == expected[1]


def test_gathering_sends_everything_to_everybody():
  forward, both = traced_sends('allgather', 8, 48, dtype=jnp.bfloat16)
  expected = costs.gathered_bytes(shape_of(8, 48, jnp.bfloat16))
  assert total(forward) == expected[0]
  assert total(both) == sum(expected)


def test_the_advice_follows_the_lengths_and_the_heads():
  chip = CHIP['v5p']
  long = costs.Shape(batch=1, tokens=16_384, heads=32, kv_heads=8, head_dim=128, devices=64)
  best, why = costs.recommend(long, chip)
  assert best.strategy in ('ring', 'bidirectional')   # all of it hides
  assert why.startswith(best.strategy)
  # A window leaves nothing to hide behind, and only one hop to make.
  windowed = costs.recommend(dataclasses.replace(long, reach=4096), chip)[0]
  assert windowed.forward_bytes == costs.ring_bytes(long, 1)[0]
  # Three heads cannot be dealt out to eight devices.
  odd = dataclasses.replace(long, heads=3, kv_heads=3, devices=8)
  assert {c.strategy for c in costs.costs(odd, chip)} == {'ring', 'bidirectional', 'allgather'}


def test_the_strategy_is_chosen_from_the_config():
  """mesh.strategy='auto': by the chip's figures where there are any, and told either way."""
  p = configuration.parts(command_line_config())
  chosen, why = assembly.choose_strategy(p, [types.SimpleNamespace(device_kind='TPU v5p')] * 8)
  assert chosen.strategy in ('ring', 'bidirectional', 'hybrid')
  assert why.startswith(f'mesh.strategy: {chosen.strategy}: ') and why.endswith('on v5p')
  chosen, why = assembly.choose_strategy(p, jax.devices())
  assert (chosen.strategy, why) == ('ring', 'mesh.strategy: ring (nothing is published of cpu)')
  a = assembly.assemble(command_line_config())
  assert (a.layout.strategy, a.advice) == ('ring', why)


def test_rows_and_layers_count_as_a_device_has_them():
  """mesh.data=-1 takes all other devices; only layers that attend have a window."""
  chips = [types.SimpleNamespace(device_kind='TPU v5p')] * 8
  def said(data, **model):
    config = command_line_config()
    config.mesh.update(dict(seq=2, data=data))
    config.data.batch_size, config.model.num_layers = 8, 2
    config.model.update(model)
    return assembly.choose_strategy(configuration.parts(config), chips)[1]
  assert said(-1) == said(4) != said(1)
  mixed = dict(layers=('mamba2', 'attention'), window=(0, 128))
  assert said(4, **mixed) == said(4, window=(128,)) != said(4)
  assert 'no layer attends' in said(4, layers=('mamba2',))


@pytest.mark.parametrize('order,hops', [('contiguous', 1), ('zigzag', 7), ('striped', 5)])
def test_a_window_costs_the_hops_that_the_order_makes(order, hops):
  s = costs.Shape(batch=1, tokens=1024, heads=8, kv_heads=8, head_dim=64, devices=8, reach=512,
                  order=order)
  assert costs.hops_of(s) == hops
  found = {c.strategy for c in costs.costs(s, CHIP['v5p'])}
  assert ('bidirectional' in found) == (hops == 7)   # what a window reaches comes one way


def command_line_config():
  config = configuration.base('decoder')
  config.mesh.seq, config.mesh.layout, config.mesh.strategy = 8, 'sequence', 'auto'
  config.data.length = config.model.max_length = 1024
  return config
