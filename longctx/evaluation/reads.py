"""Which tokens of a text an answer's tokens read, head by head, made from what a model tells on the
way.

What is told (longctx/watch.py) is in the layer's own terms: queries and keys with their mask, slots
of a memory, gates. `found` makes numbers of it inside the function that is compiled; `Places` then
says which token of the text each key, slot or cached segment stands for.

    agreement    of a query with a delta rule's memory: |q S| / (|q| |S|), 1 where it holds that
                 key alone
    attention    softmax over all keys that the layer was given, the cache's and the call's own
    retrieved    Memorizing: weights of the keys found among those kept
    segments     Memory Caching: the gates of past segments, spread evenly over their tokens
    states       Block-Recurrent: attention to the state vectors, which stand for no token
Held by: tests/test_inspect.py (weights times values is what the layer said; loops over places).

B batch (1)  R rows: queries of the answer  C slots of a cell  S keys  N query heads  K kv heads  M
past
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx.attention import reference
from longctx.models.memories.base import Block, gate_of
from longctx.models.memories.compressive import Compressive
from longctx.watch import Told


class Found(NamedTuple):
  """Of one layer and some rows; arrays, made where the layer ran. None: it has no such thing."""

  attention_NRS: Any = None
  index_S: Any = None           # the keys' own indices
  retrieved_NRP: Any = None
  slots_NRP: Any = None         # of the memory, of what was retrieved
  segments_RS: Any = None       # gates of cached segments, oldest first, and last of the row's own
  states_NRS: Any = None
  numbers_NR: Any = None        # dict: what a memory said of its read, by name


def layers(calls: Sequence[Told]) -> dict[int, list[Told]]:
  """What each layer told, by its number."""
  parts: dict[int, list[Told]] = {}
  for call in calls:
    if call.name == 'layer':
      parts[call.values['index']] = []
    elif parts:
      parts[max(parts)].append(call)
  return parts


def weights(calls: Sequence[Told], rows: slice) -> tuple[jax.Array, jax.Array]:
  """([N, R, S] of attention calls that are merged into one softmax, the index of each key [S])."""
  scores, keys = [], []
  for call in calls:
    q, k, mask, options, _ = call.values.values()
    mask = dataclasses.replace(
      mask,
      start_BT=mask.start_BT[:, rows],
      end_BT=mask.end_BT[:, rows],
      index_BT=mask.index_BT[:, rows],
      key_index_BS=mask.keys_BS,
      kind='any',
    )
    scores_BKGTS, _, _ = reference.scores(q[:, rows], k, mask, options)
    scores.append(scores_BKGTS[0].reshape(q.shape[2], -1, k.shape[1]))
    keys.append(mask.key_index_BS[0])
  scores_NRS = jnp.concatenate(scores, axis=-1)
  top_NR1 = scores_NRS.max(-1, keepdims=True)
  sink_N = calls[0].values['sink_N']
  p_NRS = jnp.where(scores_NRS > reference.NEG_INF / 2, jnp.exp(scores_NRS - top_NR1), 0.0)
  total_NR1 = p_NRS.sum(-1, keepdims=True)
  if sink_N is not None:
    total_NR1 += jnp.exp(sink_N[:, None, None] - top_NR1)
  return p_NRS / jnp.where(total_NR1 > 0, total_NR1, 1.0), jnp.concatenate(keys)


def found(calls: Sequence[Told], rows: slice, block: Any) -> Found:
  """Numbers of what one layer told while it read a call of which `rows` are asked for."""
  named = lambda name: [call for call in calls if call.name == name]
  attended, numbers = named('attention'), {}
  out: dict[str, Any] = {}
  if isinstance(block, Block):
    # The first is the layer's own; what follows is a memory's (states, losses).
    if relative := named('weights'):
      values = relative[0].values
      out |= dict(
        attention_NRS=values['weights_BNCS'][0, :, rows], index_S=values['mask'].keys_BS[0]
      )
    elif attended:
      out['attention_NRS'], out['index_S'] = weights(attended[:1], rows)
    if type(block).__name__ == 'BlockRecurrent':
      out['states_NRS'] = weights([named('attention')[0 if relative else 1]], rows)[0]
  elif attended:
    out['attention_NRS'], out['index_S'] = weights(attended, rows)
  for call in calls:
    v = call.values
    match call.name:
      case 'memorizing':
        count = len(v['slots_BKQP'][0])   # kv heads
        by_head = lambda x, count=count: _by_head(x[0], count, block.settings.num_heads)[:, rows]
        out |= dict(retrieved_NRP=by_head(v['weights_BKQP']), slots_NRP=by_head(v['slots_BKQP']))
      case 'memory_caching':
        out['segments_RS'] = v['gates_BCS'][0, rows]
      case 'infini':
        known_CN = v['known_BCKG'][0].reshape(v['known_BCKG'].shape[1], -1)
        numbers['read strength'] = known_CN[rows].T
      case 'armt':
        numbers['read strength'] = v['known_BC1'][0, rows].T
      case 'titans' | 'ttt':
        said_NCH = (v['said_BNCH'] - v.get('asked_BNCH', 0.0))[0]
        numbers['norm of what it said'] = jnp.linalg.norm(said_NCH[:, rows], axis=-1)
      case 'delta' if not isinstance(block, Block):   # else it wraps a mixer, whose work is its own
        length = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        said_RH, asked_RH = length(v['said_BTHV'][0, rows]), length(v['q_BTHK'][0, rows])
        all_H = jnp.linalg.norm(v['memory'][0], axis=(-2, -1))
        numbers['agreement'] = (said_RH / jnp.maximum(asked_RH * all_H, 1e-30)).T
  if getattr(block, 'store', None) is not None:
    gate_N = gate_of(block.gate.get_value(), block.settings.gate)
    some_NR = out['attention_NRS'][..., 0]
    numbers['gate'] = jnp.broadcast_to(gate_N[:, None], some_NR.shape)
  return Found(**out, numbers_NR=numbers)


def _by_head(x_KQP: jax.Array, kv_heads: int, heads: int) -> jax.Array:
  """[N, C, P] of queries that stand by kv head, slot and head of its group."""
  group = heads // kv_heads
  x_KCGP = x_KQP.reshape(kv_heads, -1, group, x_KQP.shape[-1])
  return jnp.moveaxis(x_KCGP, 2, 1).reshape(heads, -1, x_KQP.shape[-1])


class Read(NamedTuple):
  """Weights over the tokens of a text, and what is left of 1 for what is no token of it."""

  tokens_NRT: np.ndarray
  other_NR: np.ndarray


@dataclasses.dataclass(frozen=True)
class Places:
  """Which tokens keys stand for; of a layer of a memory model, in one cell of a document."""

  length: int          # T of the text
  segment: int = 0     # tokens
  short_term: int = 0  # M
  front: int = 0       # tokens of the memory's own, before and after the segment's
  back: int = 0
  number: int = 0      # segments before the cell
  slots: int = 0       # of a ring of kept tokens, or of compressed ones
  rate: int = 0        # tokens that were compressed into one; 0: none are

  @classmethod
  def of(cls, block: Block, length: int, number: int) -> 'Places':
    s, state = block.settings, {}
    if isinstance(block, Compressive):
      state = dict(slots=block.slots, rate=block.rate)
    elif type(block.store).__name__ == 'MemorizingStore':
      state = dict(slots=block.store.shape[0])
    return cls(length, s.segment, s.short_term, block.front, block.back, number, **state)

  @property
  def fallen(self) -> int:
    """Tokens that the short-term memory no longer holds."""
    return max(0, self.number * self.segment - self.short_term)

  def keys(self, count: int) -> list[tuple[int, int]]:
    """(first token, how many) of each key of a cell; (-1, 0): a key of the memory's own.

    They stand as [what a memory adds; past; the memory's own, the segment, its own].
    """
    start, own = self.number * self.segment, (-1, 0)
    more = count - self.short_term - self.front - self.segment - self.back
    added = [own] * more
    if self.rate:
      newest = self.fallen // self.rate
      added = [((newest - more + i) * self.rate, self.rate) if newest - more + i >= 0 else own
               for i in range(more)]
    past = [(start - self.short_term + j, 1) for j in range(self.short_term)]
    return (added + past + [own] * self.front + [(start + j, 1) for j in range(self.segment)]
            + [own] * self.back)

  def attention(self, weights_NRS: np.ndarray) -> Read:
    """Of a cell's attention."""
    tokens_NRT = np.zeros((*weights_NRS.shape[:2], self.length), np.float32)
    other_NR = np.zeros(weights_NRS.shape[:2], np.float32)
    for s, (first, count) in enumerate(self.keys(weights_NRS.shape[2])):
      if not count:
        other_NR += weights_NRS[..., s]
        continue
      low, high = max(first, 0), min(first + count, self.length)
      tokens_NRT[..., low:high] += weights_NRS[..., s, None] / count
    return Read(tokens_NRT, other_NR)

  def ring(self, weights_NRP: np.ndarray, slots_NRP: np.ndarray) -> np.ndarray:
    """[N, R, T] of finds in a ring of the tokens that fell out: number n in slot n mod slots."""
    token = self.fallen - 1 - (self.fallen - 1 - slots_NRP) % self.slots
    tokens_NRT = np.zeros((*weights_NRP.shape[:2], self.length), np.float32)
    for n, r in np.ndindex(weights_NRP.shape[:2]):
      some = weights_NRP[n, r] > 0   # a slot that holds nothing has no weight
      np.add.at(tokens_NRT[n, r], token[n, r][some], weights_NRP[n, r][some])
    return tokens_NRT

  def segments(self, gates_RS: np.ndarray) -> Read:
    """Of gates of cached segments, the last the row's own, which a window reads if there is one."""
    tokens_NRT = np.zeros((1, len(gates_RS), self.length), np.float32)
    slots = gates_RS.shape[1] - 1
    for s in range(slots + (self.short_term == 0)):
      first = (self.number - slots + s) * self.segment - self.short_term
      low, high = max(first, 0), min(first + self.segment, self.length)
      if low < high:
        tokens_NRT[0, :, low:high] += gates_RS[:, s, None] / (high - low)
    return Read(tokens_NRT, 1 - tokens_NRT.sum(-1))


def by_index(weights_NRS: np.ndarray, index_S: np.ndarray, length: int) -> Read:
  """Of a decoder's attention, whose keys have the tokens' indices; -1: an empty slot."""
  tokens_NRT = np.zeros((*weights_NRS.shape[:2], length), np.float32)
  there = index_S >= 0
  np.add.at(tokens_NRT, (slice(None), slice(None), index_S[there]), weights_NRS[..., there])
  return Read(tokens_NRT, 1 - tokens_NRT.sum(-1))
