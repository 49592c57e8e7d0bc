"""The short convolution: against numpy.convolve a document at a time, however it is split or padded."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.models.context import new_clock, place_tokens
from longctx.models.mixers.short_conv import ShortConv

B, T, C = 2, 12, 3
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 6, [4] * 2 + [5] * 10])


@functools.cache
def conv(width):
  module = ShortConv(C, width, rngs=nnx.Rngs(width))
  call = jax.jit(lambda x, tail, clock, segments, valid: _call(module, x, tail, clock, segments,
                                                                valid))
  return module, call


def _call(module, x, tail, clock, segments, valid):
  context, clock = place_tokens(x[..., 0].astype(jnp.int32), clock, None, segments, valid)
  y, tail = module(x, tail, context)
  return y, tail, clock


def inputs():
  return np.random.default_rng(0).normal(size=(B, T, C)).astype(np.float32)


def expected(module, x_BTC, segments):
  """numpy's own convolution of each channel of each document."""
  out = np.empty_like(x_BTC, dtype=np.float64)
  taps = np.asarray(module.taps.get_value(), np.float64)
  bias = np.asarray(module.bias.get_value(), np.float64)
  for b in range(len(x_BTC)):
    for document in np.unique(segments[b]):
      rows = np.flatnonzero(segments[b] == document)
      for c in range(C):
        out[b, rows, c] = np.convolve(x_BTC[b, rows, c], taps[:, c])[:len(rows)] + bias[c]
  return out


@pytest.mark.parametrize('edges', [(0, 12), (0, 1, 2, 3, 7, 12), tuple(range(13))])
@pytest.mark.parametrize('width', [1, 2, 4])
def test_documents_in_any_split(width, edges):
  module, call = conv(width)
  tail, clock, pieces = module.init_state(B), new_clock(B), []
  for a, b in itertools.pairwise(edges):
    y, tail, clock = call(inputs()[:, a:b], tail, clock, jnp.asarray(SEGMENTS[:, a:b]), None)
    pieces.append(y)
  np.testing.assert_allclose(np.concatenate(pieces, 1), expected(module, inputs(), SEGMENTS),
                             atol=1e-6)
  assert tail.dtype == jnp.float32


@pytest.mark.parametrize('edges', [(0, 16), (0, 4, 8, 12, 16)])
def test_padding_is_skipped(edges):
  module, call = conv(4)
  valid = np.ones((B, 16), bool)
  valid[0, [0, 1, 6, 15]] = valid[1, [5, 8, 9, 10]] = False
  x, segments = np.full((B, 16, C), 99, np.float32), np.zeros((B, 16), int)
  x[valid], segments[valid] = inputs().reshape(-1, C), SEGMENTS.ravel()
  tail, clock, pieces = module.init_state(B), new_clock(B), []
  for a, b in itertools.pairwise(edges):
    y, tail, clock = call(x[:, a:b], tail, clock, jnp.asarray(segments[:, a:b]),
                          jnp.asarray(valid[:, a:b]))
    pieces.append(y)
  found = np.concatenate(pieces, 1)[valid].reshape(B, T, C)
  np.testing.assert_allclose(found, expected(module, inputs(), SEGMENTS), atol=1e-6)
  np.testing.assert_array_equal(tail, inputs()[:, -3:])
