"""Attention in tiles of queries x keys: memory grows with T, and tiles that nobody sees cost nothing.

Each query block walks the key blocks it needs with the online softmax; the backward pass makes
each tile's probabilities again from (out, lse). Which blocks are needed is read from the intervals
(`Plan`), so every mask is one case, under any layout of the tokens; a tile that all its queries see
whole skips the mask. Pure JAX: any platform. Results and sums are added to in place, so that a
ring's hops need no memory of their own.

Sources: Rabe & Staats 2021, arXiv:2112.05682; FlashAttention, Dao et al. 2022, arXiv:2205.14135
(the backward pass from lse and delta = sum(out * dout)).
Held by: tests/test_attention.py, tests/test_ring.py.

B batch  T queries  S keys  N query heads  K kv heads  G = N / K  H head dim
I query blocks  J key blocks  P queries of a block  R keys of a block  M = G P rows of a tile
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention.intervals import Intervals, Options
from longctx.attention.whole import Sums

NEG_INF = -1e30   # finite: a row that sees nothing gives 0, not NaN
# Queries and keys of a tile. A small one's scores stay in a core's first caches; a large one's products
# are large enough that a CPU shares them among its cores, which long rows gain by and short ones not.
SHORT, LONG, LONG_FROM = 128, 256, 1025
NEVER = np.iinfo(np.int32).max   # index of a key that pads a block: no interval holds it


class Result(NamedTuple):
  """What queries have gathered so far, in the folded form: [B, K, G, T, ...], whole blocks."""

  acc: jax.Array      # sum of exp(score - top) v
  top: jax.Array      # the largest score
  total: jax.Array    # sum of exp(score - top)


@dataclasses.dataclass(frozen=True)
class Blockwise:
  """The kernel; `block` tokens a tile, 0: by the length. `forward` and `backward` are made of the other methods,
  which a ring calls hop by hop on folded arrays (see parallel/ring.py)."""

  block: int = 0
  LSE_GRADIENT = True
  KNOWS_KINDS = False
  platform = ''

  def cannot(self, q: Any, k: Any, v: Any, mask: Intervals, options: Options) -> str:
    """It serves everything."""
    del q, k, v, mask, options
    return ''

  def forward(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
              options: Options) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN), both float32 at least, lse in natural base.

    A query that sees nothing gives out 0 and lse -1e30.
    """
    q, k, v = self.fold(q_BTNH, k_BSKH, v_BSKH)
    return self.unfold(self.add(q, k, v, mask, options, self.nothing(q)), q_BTNH.shape[1])

  def backward(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Intervals,
               options: Options, out_BTNH: jax.Array, lse_BTN: jax.Array, dout_BTNH: jax.Array,
               dlse_BTN: jax.Array | None = None
               ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """(dq, dk, dv, dbias), float32 at least. (out, lse) may be those over more keys than these."""
    q, k, v = self.fold(q_BTNH, k_BSKH, v_BSKH)
    saved = self.saved(q_BTNH, k_BSKH, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN)
    sums = self.add_gradients(q, k, v, mask, options, saved,
                              Sums(self.no_dq(q), *self.no_dkv(k, v), self.no_dbias(q, options)))
    return (self.finish_dq(sums.dq, options, q_BTNH.shape[1]),
            *self.finish_dkv(sums.dk, sums.dv, options, k_BSKH.shape[1]),
            self.finish_dbias(sums.dbias))

  def tiles(self, mask: Intervals) -> jax.Array:
    """int32 [B]: tiles that a call with this mask computes for each row (of every head)."""
    return self.shapes(mask).rows(mask).plan.count().sum(-1)

  def size(self, length: int) -> int:
    """Tokens of a tile of a row that long; the same when the row is filled up to whole tiles."""
    return min(self.block or (LONG if length >= LONG_FROM else SHORT), length)

  def shapes(self, mask: Intervals) -> '_Shapes':
    return _Shapes(self.size(mask.start_BT.shape[1]), self.size(mask.keys_BS.shape[1]))

  # What a ring calls. Folded arrays have the heads in front and are filled up to whole blocks.

  def fold(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
           ) -> tuple[jax.Array, jax.Array, jax.Array]:
    K = k_BSKH.shape[2]
    return (self._fold_queries(q_BTNH, K), *(self._fold_keys(x) for x in (k_BSKH, v_BSKH)))

  def _fold_queries(self, x_BTN: jax.Array, K: int) -> jax.Array:
    x = _pad(x_BTN, self.size(x_BTN.shape[1]))
    return jnp.moveaxis(x.reshape(*x.shape[:2], K, -1, *x.shape[3:]), 1, 3)

  def _fold_keys(self, x_BSKH: jax.Array) -> jax.Array:
    return _pad(x_BSKH, self.size(x_BSKH.shape[1])).swapaxes(1, 2)

  def nothing(self, q_BKGTH: jax.Array) -> Result:
    """The result over no keys."""
    wide = _wide(q_BKGTH)
    rows = q_BKGTH.shape[:-1]
    return Result(jnp.zeros(q_BKGTH.shape, wide), jnp.full(rows, NEG_INF, wide),
                  jnp.zeros(rows, wide))

  def add(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Intervals, options: Options,
          result: Result) -> Result:
    """The result over the keys of before and these."""
    shapes = self.shapes(mask)
    return _every_head(functools.partial(_forward_head, shapes), (q, k, v),
                       _per_head(options, q), shapes.rows(mask), result)

  def unfold(self, result: Result, length: int) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""
    some = result.top > NEG_INF / 2
    total = jnp.where(some, result.total, 1.0)
    out = jnp.where(some[..., None], result.acc / total[..., None], 0.0)
    lse = jnp.where(some, result.top + jnp.log(total), NEG_INF)
    return _unfold(out, length), _unfold(lse, length)

  def saved(self, q_BTNH: jax.Array, k_BSKH: jax.Array, out_BTNH: jax.Array, lse_BTN: jax.Array,
            dout_BTNH: jax.Array, dlse_BTN: jax.Array | None) -> tuple[jax.Array, ...]:
    """What the backward pass needs of the whole result: (dout, lse, delta), folded."""
    wide, K = _wide(q_BTNH), k_BSKH.shape[2]
    # A product of matrices and not a sum of products, at which a CPU is slow.
    delta_BTN = jnp.einsum('BTNH,BTNH->BTN', out_BTNH.astype(wide), dout_BTNH.astype(wide))
    if dlse_BTN is not None:
      delta_BTN -= dlse_BTN
    # A row that saw nothing has p = exp(-1e30 - lse): its lse becomes +1e30, so that p is 0.
    lse_BTN = jnp.where(lse_BTN > NEG_INF / 2, lse_BTN, -NEG_INF)
    return tuple(self._fold_queries(x, K)
                 for x in (dout_BTNH.astype(q_BTNH.dtype), lse_BTN, delta_BTN))

  def no_dq(self, q: jax.Array) -> jax.Array:
    return jnp.zeros(q.shape, _wide(q))

  def no_dkv(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    B, K, S, H = k.shape
    R = self.size(S)
    zeros = lambda x: jnp.zeros((B, K, S // R, H, R), _wide(x))
    return zeros(k), zeros(v)

  def no_dbias(self, q: jax.Array, options: Options) -> Any:
    B = q.shape[0]
    return jax.tree.map(lambda x: jnp.zeros((B, *x.shape), _wide(x)), _per_head(options, q).bias)

  def add_gradients(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Intervals,
                    options: Options, saved: tuple[jax.Array, ...], sums: Sums) -> Sums:
    """The gradients so far and those of these keys; dk and dv are [B, K, J, H, R], and neither
    dk nor dq has the factor `scale` yet."""
    shapes = self.shapes(mask)
    return _every_head(functools.partial(_backward_head, shapes), (q, k, v, *saved),
                       _per_head(options, q), shapes.rows(mask), Sums(*sums))

  def finish_dq(self, dq: jax.Array, options: Options, length: int) -> jax.Array:
    return options.scale * _unfold(dq, length)

  def finish_dkv(self, dk: jax.Array, dv: jax.Array, options: Options, num_keys: int
                 ) -> tuple[jax.Array, jax.Array]:
    def keys(x_BKJHR):
      x_BKJRH = x_BKJHR.swapaxes(3, 4)
      x_BKSH = x_BKJRH.reshape(*x_BKJRH.shape[:2], -1, x_BKJRH.shape[-1])
      return x_BKSH[:, :, :num_keys].swapaxes(1, 2)
    return options.scale * keys(dk), keys(dv)

  def finish_dbias(self, dbias: Any) -> Any:
    """With its heads in front."""
    return jax.tree.map(lambda x: x.sum(0).reshape(-1, *x.shape[3:]), dbias)


def _wide(x: jax.Array) -> jnp.dtype:
  """What sums run in."""
  return jnp.promote_types(jnp.float32, x.dtype)


def _per_head(options: Options, q_BKGTH: jax.Array) -> Options:
  """The same options, the bias's arrays with [K, G] in place of their leading N."""
  K, G = q_BKGTH.shape[1:3]
  return jax.tree.map(lambda x: x.reshape(K, G, *x.shape[1:]), options)


def _unfold(x_BKGT: jax.Array, length: int) -> jax.Array:
  x = jnp.moveaxis(x_BKGT[:, :, :, :length], 3, 1)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


class _Shapes(NamedTuple):
  """Tokens of a tile."""

  P: int
  R: int

  def rows(self, mask: Intervals) -> '_Rows':
    start_BT, end_BT, index_BT = (_pad(x, self.P)
                                  for x in (mask.start_BT, mask.end_BT, mask.index_BT))
    key_BS = _pad(mask.keys_BS, self.R, NEVER)
    sinks = None
    if mask.has_sinks:
      sinks = _pad(mask.sink_start_BT, self.P), _pad(mask.sink_end_BT, self.P)
    cut = lambda x, size: x.reshape(x.shape[0], -1, size)
    spans = [(cut(start_BT, self.P), cut(end_BT, self.P))]
    if sinks is not None:
      spans.append(tuple(cut(x, self.P) for x in sinks))
    return _Rows(start_BT, end_BT, index_BT, key_BS, sinks, make_plan(spans, cut(key_BS, self.R)))


def _pad(x: jax.Array, multiple: int, fill: int = 0) -> jax.Array:
  """Dim 1 filled up at its end to a multiple."""
  missing = -x.shape[1] % multiple
  if not missing:
    return x
  return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


class Plan(NamedTuple):
  """The key blocks each query block needs, as up to four runs: int32 [B, I] each.

  Blocks inner_first to inner_end are seen whole; left to inner_first, inner_end to right, and the
  two runs of the sinks need the mask.
  """

  left: jax.Array
  inner_first: jax.Array
  inner_end: jax.Array
  right: jax.Array
  sink_runs: tuple[tuple[jax.Array, jax.Array], ...]

  def count(self) -> jax.Array:
    """Tiles that each query block computes."""
    return self.right - self.left + sum(jnp.maximum(e - f, 0) for f, e in self.sink_runs)


def make_plan(spans: list[tuple[jax.Array, jax.Array]], index_BJR: jax.Array) -> Plan:
  """From each query block's intervals [B, I, P] and each key block's indices; never [T, S]."""
  low_BJ = index_BJR.min(-1)
  high_BJ = jnp.where(index_BJR == NEVER, -1, index_BJR).max(-1)   # padding sees to `whole` below
  padded_BJ = (index_BJR == NEVER).any(-1)
  J = index_BJR.shape[1]
  number_J = jnp.arange(J, dtype=jnp.int32)

  def run(start_BIP, end_BIP):
    """First and one past the last block with a key that anybody might see."""
    real_BIP = start_BIP < end_BIP
    first_BI = jnp.where(real_BIP, start_BIP, NEVER).min(-1)
    last_BI = jnp.where(real_BIP, end_BIP, -NEVER).max(-1)
    needed_BIJ = ((low_BJ[:, None] < last_BI[..., None])
                  & (first_BI[..., None] <= high_BJ[:, None]))
    return bounds(needed_BIJ)

  def bounds(which_BIJ):
    first_BI = jnp.where(which_BIJ, number_J, J).min(-1)
    end_BI = jnp.where(which_BIJ, number_J + 1, 0).max(-1)
    return jnp.minimum(first_BI, end_BI), end_BI   # (0, 0) where there is none

  (start_BIP, end_BIP), *sinks = spans
  left, right = run(start_BIP, end_BIP)
  whole_BIJ = ((start_BIP.max(-1)[..., None] <= low_BJ[:, None])
               & (high_BJ[:, None] < end_BIP.min(-1)[..., None]) & ~padded_BJ[:, None])
  inner_first, inner_end = bounds(whole_BIJ)
  # Keys in no order may leave holes in the run: then every tile takes the mask.
  solid = whole_BIJ.sum(-1) == inner_end - inner_first
  inside = solid & (inner_end > inner_first)
  inner_first = jnp.where(inside, inner_first, right)
  inner_end = jnp.where(inside, inner_end, right)
  sink_runs = []
  for sink in sinks:
    first, end = run(*sink)
    sink_runs += [(first, jnp.minimum(end, left)), (jnp.maximum(first, right), end)]
  return Plan(left, inner_first, inner_end, right, tuple(sink_runs))


class _Rows(NamedTuple):
  """Who sees whom, in whole blocks; batch first."""

  start_BT: jax.Array
  end_BT: jax.Array
  index_BT: jax.Array
  key_BS: jax.Array
  sinks: tuple[jax.Array, jax.Array] | None
  plan: Plan


def _every_head(function: Callable, arrays_BK: Any, options_K: Any, rows_B: _Rows,
                carry_BK: Any) -> Any:
  """carry = function(at, arrays, options, rows, carry) for each row and kv head, in place.

  `at` says where in the arrays its row and head stand: nothing is copied out. A CPU takes the heads
  in turn: the tiles of one stay in cache, and a product of two matrices is fast there where a batch
  of small products is not. Other devices take a row's heads at once.
  """
  B, K = jax.tree.leaves(arrays_BK)[0].shape[:2]
  pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)

  def in_turn(arrays_BK, options_K, rows_B, carry_BK):
    def turn(i, carry_BK):
      b, k = i // K, i % K
      return function((b, k), arrays_BK, pick(options_K, k), pick(rows_B, b), carry_BK)
    return jax.lax.fori_loop(0, B * K, turn, carry_BK)

  def at_once(arrays_BK, options_K, rows_B, carry_BK):
    def turn(b, carry_BK):
      # The loops' bounds are the row's: not batched.
      heads = jax.vmap(functools.partial(function, (b,)), (1, 0, None, 1), 1)
      return heads(arrays_BK, options_K, pick(rows_B, b), carry_BK)
    return jax.lax.fori_loop(0, B, turn, carry_BK)

  return jax.lax.platform_dependent(arrays_BK, options_K, rows_B, carry_BK,
                                    cpu=in_turn, default=at_once)


def _slice(x: jax.Array, at: tuple, dim: int, start: jax.Array, size: int) -> jax.Array:
  """x[at] from `start` on along its dim `dim`, without x[at]."""
  starts = [*at, *[0] * (x.ndim - len(at))]
  sizes = [*[1] * len(at), *x.shape[len(at):]]
  starts[len(at) + dim], sizes[len(at) + dim] = start, size
  return jax.lax.dynamic_slice(x, _int32(starts), sizes).reshape(sizes[len(at):])


def _put(x: jax.Array, new: jax.Array, at: tuple, dim: int, start: jax.Array) -> jax.Array:
  """The inverse of `_slice`, in place."""
  starts = [*at, *[0] * (x.ndim - len(at))]
  starts[len(at) + dim] = start
  return jax.lax.dynamic_update_slice(x, new.reshape((1,) * len(at) + new.shape), _int32(starts))


def _int32(starts: list) -> list[jax.Array]:
  """Of one type, whether 64-bit types are enabled or not."""
  return [jnp.asarray(x, jnp.int32) for x in starts]


class _Head:
  """The blocks of one row and kv head, and the scores of a tile."""

  def __init__(self, shapes: _Shapes, at: tuple, options: Options, rows: _Rows):
    self.shapes, self.at, self.options, self.rows = shapes, at, options, rows

  def queries(self, x_BKGT: jax.Array, i: jax.Array) -> jax.Array:
    """[M, ...] of query block i."""
    x = _slice(x_BKGT, self.at, 1, i * self.shapes.P, self.shapes.P)
    return x.reshape(-1, *x.shape[2:])

  def put_queries(self, x_BKGT: jax.Array, new_M: jax.Array, i: jax.Array) -> jax.Array:
    new_GP = new_M.reshape(-1, self.shapes.P, *new_M.shape[1:])
    return _put(x_BKGT, new_GP, self.at, 1, i * self.shapes.P)

  def keys(self, x_BKS: jax.Array, j: jax.Array) -> jax.Array:
    return _slice(x_BKS, self.at, 0, j * self.shapes.R, self.shapes.R)

  def add_tile(self, x_BKJHR: jax.Array, new_HR: jax.Array, j: jax.Array) -> jax.Array:
    return _put(x_BKJHR, _slice(x_BKJHR, self.at, 0, j, 1) + new_HR, self.at, 0, j)

  def of_queries(self, x_T: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_T, i * self.shapes.P, self.shapes.P)

  def of_keys(self, x_S: jax.Array, j: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_S, j * self.shapes.R, self.shapes.R)

  def walk(self, i: jax.Array, body: Callable, carry: Any) -> Any:
    """body(j, masked, carry) for each key block j that query block i needs."""
    plan = jax.tree.map(lambda x: x[i], self.rows.plan)
    edges = ((plan.left, plan.inner_first), (plan.inner_end, plan.right), *plan.sink_runs)
    sizes = [jnp.maximum(end - first, 0) for first, end in edges]

    def edge(n, carry):   # the n-th tile of the runs laid end to end
      j, passed = n, 0
      for (first, _), size in zip(edges, sizes):
        j = jnp.where((passed <= n) & (n < passed + size), first + n - passed, j)
        passed += size
      return body(j, True, carry)

    carry = jax.lax.fori_loop(plan.inner_first, plan.inner_end,
                              lambda j, carry: body(j, False, carry), carry)
    return jax.lax.fori_loop(0, sum(sizes), edge, carry)

  def scores(self, i: jax.Array, j: jax.Array, q_MH: jax.Array, k_RH: jax.Array, masked: bool,
             options: Options) -> tuple[jax.Array, jax.Array]:
    """(scores_MR with mask and bias, d scores / d (scale q k): 1 without a soft cap)."""
    scores_MR = options.scale * jnp.einsum('MH,RH->MR', q_MH, k_RH,
                                           preferred_element_type=_wide(q_MH))
    slope_MR = 1.0
    if options.softcap:
      tanh_MR = jnp.tanh(scores_MR / options.softcap)
      scores_MR, slope_MR = options.softcap * tanh_MR, 1 - tanh_MR ** 2
    rows, shape = self.rows, scores_MR.shape
    key_R = self.of_keys(rows.key_BS, j)
    if options.bias is not None:
      bias_GPR = options.bias.block(self.of_queries(rows.index_BT, i), key_R)
      scores_MR += bias_GPR.reshape(shape).astype(scores_MR.dtype)
    if masked:
      within = lambda start_T, end_T: ((self.of_queries(start_T, i)[:, None] <= key_R)
                                       & (key_R < self.of_queries(end_T, i)[:, None]))
      sees_PR = within(rows.start_BT, rows.end_BT)
      if rows.sinks is not None:
        sees_PR |= within(*rows.sinks)
      scores_MR = jnp.where(sees_PR, scores_MR.reshape(-1, *sees_PR.shape), NEG_INF).reshape(shape)
    return scores_MR, slope_MR


def _forward_head(shapes, at, arrays, options, rows, result):
  q, k, v = arrays
  head = _Head(shapes, at, options, rows)
  wide = _wide(q)

  def query_block(i, result):
    q_MH = head.queries(q, i)

    def tile(j, masked, carry):
      max_M, sum_M, acc_MH = carry
      k_RH, v_RH = head.keys(k, j), head.keys(v, j)
      scores_MR, _ = head.scores(i, j, q_MH, k_RH, masked, options)
      new_max_M = jnp.maximum(max_M, scores_MR.max(-1))
      # Rows that have seen nothing yet gather exp(0) here; the first key they see weighs it away.
      p_MR = jnp.exp(scores_MR - new_max_M[:, None])
      shrink_M = jnp.exp(max_M - new_max_M)
      part_MH = jnp.einsum('MR,RH->MH', p_MR.astype(v_RH.dtype), v_RH,
                           preferred_element_type=wide)
      return (new_max_M, sum_M * shrink_M + p_MR.sum(-1), acc_MH * shrink_M[:, None] + part_MH)

    before = [head.queries(x, i) for x in (result.top, result.total, result.acc)]
    top_M, total_M, acc_MH = head.walk(i, tile, tuple(before))
    put = lambda x, new: head.put_queries(x, new, i)
    return Result(put(result.acc, acc_MH), put(result.top, top_M), put(result.total, total_M))

  return jax.lax.fori_loop(0, q.shape[-2] // shapes.P, query_block, result)


def _backward_head(shapes, at, arrays, options, rows, sums):
  q, k, v, dout, lse, delta = arrays
  head = _Head(shapes, at, options, rows)
  wide = _wide(q)

  def query_block(i, sums):
    q_MH, dout_MH, lse_M, delta_M = (head.queries(x, i) for x in (q, dout, lse, delta))

    def tile(j, masked, carry):
      dq_MH, dk, dv, dbias = carry
      k_RH, v_RH = head.keys(k, j), head.keys(v, j)
      scores_MR, slope_MR = head.scores(i, j, q_MH, k_RH, masked, options)
      p_MR = jnp.exp(scores_MR - lse_M[:, None])
      dp_MR = jnp.einsum('MH,RH->MR', dout_MH, v_RH, preferred_element_type=wide)
      ds_MR = p_MR * (dp_MR - delta_M[:, None])
      if options.bias is not None:
        block = lambda bias: bias.block(head.of_queries(rows.index_BT, i),
                                        head.of_keys(rows.key_BS, j))
        bias_GPR, pull = jax.vjp(block, options.bias)
        part, = pull(ds_MR.reshape(bias_GPR.shape).astype(bias_GPR.dtype))
        dbias = jax.tree.map(lambda a, b: a.at[at].add(b.astype(a.dtype)), dbias, part)
      ds_MR = (ds_MR * slope_MR).astype(q_MH.dtype)
      dq_MH += jnp.einsum('MR,RH->MH', ds_MR, k_RH, preferred_element_type=wide)
      # [H, R] and not [R, H]: a CPU then transposes the thin operand and not the tile (2x faster).
      dk_HR = jnp.einsum('MH,MR->HR', q_MH, ds_MR, preferred_element_type=wide)
      dv_HR = jnp.einsum('MH,MR->HR', dout_MH, p_MR.astype(dout_MH.dtype),
                         preferred_element_type=wide)
      return dq_MH, head.add_tile(dk, dk_HR, j), head.add_tile(dv, dv_HR, j), dbias

    dq_MH, *others = head.walk(i, tile, (head.queries(sums.dq, i), *sums[1:]))
    return Sums(head.put_queries(sums.dq, dq_MH, i), *others)

  return jax.lax.fori_loop(0, q.shape[-2] // shapes.P, query_block, sums)
