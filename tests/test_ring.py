"""Every strategy, order of the tokens, mask and ring size held to the definition.

Masks and orders are data, so one compiled program a strategy and ring size serves them all.

B batch  T tokens  N query heads  K kv heads  H head dim  R ring
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention import attention, blockwise, intervals
from longctx.attention.intervals import Options
from longctx.errors import ConfigError
from longctx.parallel import layouts, mesh, sequence
from tests import oracles

B, T, PADDED, N, K, H, UNIT = 2, 45, 48, 8, 4, 4, 2
SCALE = H ** -0.5
KERNEL = types.SimpleNamespace(forward=functools.partial(blockwise.forward, block=4),
                               backward=functools.partial(blockwise.backward, block=4))
OPTIONS = Options(scale=SCALE)
FAST = {'xla_llvm_disable_expensive_passes': True}


def documents():
  ids = np.zeros((B, T), np.int32)
  ids[0, [1, 2, 3, 20, 31]] = 1   # documents of one token among them
  ids[1, [7, 44]] = 1
  return jnp.asarray(ids.cumsum(axis=1))


def holes():
  """Rows that see nothing: the first ones, and one amid others."""
  mask = intervals.causal(B, T)
  end = np.array(mask.end_BT)
  end[0, :5], end[1, 30] = 0, 0
  return dataclasses.replace(mask, end_BT=jnp.asarray(end), kind='any')


MASKS = {
    'causal': intervals.causal(B, T),
    'packed': intervals.packed(documents()),
    'packed, both ways': intervals.packed(documents(), causal=False),
    'window': intervals.sliding_window(B, T, 7),
    'window longer than the row': intervals.sliding_window(B, T, 100),
    'packed in windows': intervals.intersect(intervals.packed(documents()),
                                             intervals.sliding_window(B, T, 9)),
    'chunks': intervals.chunked(B, T, 10),
    'prefix': intervals.prefix_lm(jnp.array([13, 0]), T),
    'bidirectional': intervals.bidirectional(B, T),
    'rows that see nothing': holes(),
}


def without_sinks(mask):
  """The same mask with an empty second interval: every mask is one compiled program."""
  if mask.has_sinks:
    return mask
  return dataclasses.replace(mask, sink_start_BT=mask.start_BT, sink_end_BT=mask.start_BT)


MASKS = {name: without_sinks(mask) for name, mask in MASKS.items()} | {
    'window with sinks': intervals.with_sinks(intervals.sliding_window(B, T, 5), 3)}


def layout_of(strategy, size, order='contiguous', ulysses=1, model=1):
  config = mesh.Config(data=1, seq=size, model=model, layout='sequence', strategy=strategy,
                       ulysses=ulysses, order=order, unit=UNIT)
  return mesh.make_layout(config, jax.devices()[:size * model])


def laid_out(mask, slots):
  """The mask with its tokens in the slots' order; slots beyond T are padding."""
  row = lambda x, fill: jnp.pad(x, ((0, 0), (0, PADDED - T)), constant_values=fill)[:, slots]
  return intervals.Intervals(
      start_BT=row(mask.start_BT, 0), end_BT=row(mask.end_BT, 0), index_BT=row(mask.index_BT, -1),
      sink_start_BT=row(mask.sink_start_BT, 0), sink_end_BT=row(mask.sink_end_BT, 0))


@functools.cache
def inputs():
  r = np.random.RandomState(0)
  qkv = tuple(r.randn(B, T, heads, H) for heads in (N, K, K))
  return qkv, (r.randn(B, T, N, H), r.randn(B, T, N))


@functools.cache
def expected(name):
  qkv, cotangents = inputs()
  mask = MASKS[name]
  sees = np.asarray(intervals.sees(mask))
  out, lse = oracles.masked_attention(*qkv, sees, SCALE)
  return (out, np.maximum(lse, -1e30)), oracles.masked_gradients(*qkv, sees, SCALE, *cotangents)[:3]


@functools.cache
def program(strategy, size, ulysses):
  """Values and gradients, jitted. Ulysses's own sorting apart, the order of the tokens is data."""
  layout = layout_of(strategy, size, ulysses=ulysses)
  def run(qkv, mask, cotangents):
    attend = lambda *qkv: sequence.attend(KERNEL, layout, *qkv, mask, OPTIONS)
    out, pull = jax.vjp(attend, *qkv)
    return out, pull(cotangents)
  return jax.jit(mesh.under(layout, run), compiler_options=FAST)


def run(compiled, size, name, order, dtype):
  slots = layouts.permutation(order, PADDED, size, UNIT)
  put = lambda x: np.pad(x, [(0, 0), (0, PADDED - T)] + [(0, 0)] * (x.ndim - 2))[:, slots]
  back = lambda x: np.asarray(x, np.float64)[:, np.argsort(slots)][:, :T]
  qkv, cotangents = jax.tree.map(lambda x: jnp.asarray(put(x), dtype), inputs())
  out, grads = compiled(qkv, laid_out(MASKS[name], slots), cotangents)
  return jax.tree.map(back, (out, grads))


def check(got, want, tolerance):
  names = ('out', 'lse', 'dq', 'dk', 'dv')
  for name, a, b in zip(names, (*got[0], *got[1]), (*want[0], *want[1])):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


STRATEGIES = [('ring', 1, 1), ('ring', 2, 1), ('ring', 3, 1), ('ring', 4, 1), ('ring', 8, 1),
              ('bidirectional', 2, 1), ('bidirectional', 3, 1), ('bidirectional', 8, 1),
              ('allgather', 3, 1), ('allgather', 8, 1), ('ulysses', 2, 1), ('ulysses', 4, 1),
              ('ulysses', 8, 1), ('hybrid', 4, 2), ('hybrid', 8, 2), ('hybrid', 8, 4)]


@pytest.mark.parametrize('strategy,size,ulysses', STRATEGIES)
def test_every_mask_and_order_is_the_definition(strategy, size, ulysses):
  """float64 to 1e-12; the orders share one program, Ulysses's own sorting is tested below."""
  compiled = program(strategy, size, ulysses)
  with jax.enable_x64(True):
    for name in MASKS:
      for order in layouts.ORDERS:
        check(run(compiled, size, name, order, jnp.float64), expected(name), 1e-12)
