"""What each way of cutting attention over `seq` puts on the wire and costs in time, in closed form.

Per device and layer, forward and backward, for B rows of T tokens a device, N query and K kv heads
of H (those of one device), elements of b bytes:

    ring           forward h (2 B T K H b + 4 B T); backward the same and h (2 B T K H 4)
                   h hops; float32 sums of gradients travel behind the keys; 4 B T are the indices
    bidirectional  the same bytes on two links
    ulysses (u)    (u-1)/u of q, k, v, out (b) each way, and of lse (4) forward; masks gathered;
                   of kv heads that are copied for u devices, float32 gradients
    hybrid         ulysses of u, then a ring of n/u whose parts are u T tokens of 1/u of the heads
    allgather      (n-1) (2 B T K H b + 4 B T) forward; (n-1) (2 B T K H 4) scattered back

Held by: tests/test_costs.py (equal to the sends of the traced program).
"""

import dataclasses

from longctx.parallel import layouts
from longctx.parallel.chips import Chip
from longctx.parallel.ring import hops_needed

INDEX = 4        # bytes of a token's index, and of a mask's vector
SUM = 4          # bytes of a partial gradient
EFFICIENCY = 0.6   # of peak that an attention kernel reaches; sequence-parallel notes of many systems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Attention of one layer as one device has it."""

  batch: int
  tokens: int          # of one device
  heads: int
  kv_heads: int
  head_dim: int
  bytes_per_element: int = 2
  devices: int = 1     # that share the sequence
  pairs: float = 0.5   # seen of all query-key pairs: 0.5 causal
  reach: int = 0       # of a window; 0 sees all
  order: str = 'contiguous'   # of the tokens over the devices, in runs of `unit` where striped
  unit: int = layouts.UNIT

  def flops(self) -> float:
    """Forward and backward (2.5 times the forward) of one device's queries."""
    keys = self.tokens * self.devices
    seen = min(self.pairs * keys, self.reach or keys)
    return 3.5 * 4 * self.batch * self.tokens * seen * self.heads * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  strategy: str
  ulysses: int
  forward_bytes: int     # sent by one device
  backward_bytes: int
  seconds: float         # of compute and of what of the wire it cannot hide
  why: str


def ring_bytes(s: Shape, hops: int) -> tuple[int, int]:
  keys = 2 * s.batch * s.tokens * s.kv_heads * s.head_dim
  index = INDEX * s.batch * s.tokens
  forward = hops * (keys * s.bytes_per_element + index)
  return forward, forward + hops * keys * SUM


def ulysses_bytes(s: Shape, degree: int, vectors: int = 4) -> tuple[int, int]:
  """`vectors`: of the mask, gathered once a direction (start, end, index and the keys' index)."""
  kv_heads = max(s.kv_heads, degree) if s.kv_heads % degree else s.kv_heads
  tokens = s.batch * s.tokens
  back = SUM if s.kv_heads % degree else s.bytes_per_element   # of copies the gradients are summed
  queries, keys = (2 * n * s.head_dim * tokens for n in (s.heads, kv_heads))
  turned = (queries + keys) * s.bytes_per_element
  lse = s.heads * 4 * tokens
  away = lambda x: x * (degree - 1) // degree
  forward = away(turned + lse) + (degree - 1) * vectors * INDEX * tokens
  return forward, away(queries * s.bytes_per_element + keys * back)


def gathered_bytes(s: Shape) -> tuple[int, int]:
  keys = 2 * s.batch * s.tokens * s.kv_heads * s.head_dim
  others = s.devices - 1
  return others * (keys * s.bytes_per_element + INDEX * s.batch * s.tokens), others * keys * SUM


def hops_of(s: Shape, degree: int = 1) -> int:
  """Hops of the ring, whose places are groups of `degree` devices, in the tokens' order."""
  length = s.tokens * s.devices
  unit = layouts.unit_of(s.order, length, s.devices, s.unit)
  place = lambda run: layouts.device_of(s.order, run, s.devices) // degree
  return hops_needed(place, length // unit, unit, s.devices // degree, s.reach)


def costs(s: Shape, chip: Chip) -> list[Cost]:
  """Every strategy that the heads allow, the quickest first."""
  compute = s.flops() / (EFFICIENCY * chip.flops)
  link = chip.link
  n, found = s.devices, []

  def add(strategy, ulysses, sent, hidden_wire, open_wire, why):
    found.append(Cost(strategy=strategy, ulysses=ulysses, forward_bytes=int(sent[0]),
                      backward_bytes=int(sent[1]), why=why,
                      seconds=max(compute, hidden_wire / link) + open_wire / link))

  hops = hops_of(s)
  sent = ring_bytes(s, hops)
  add('ring', 1, sent, sum(sent), 0, 'transfers hide behind the hops')
  if hops == n - 1:   # else the keys that a window reaches come one way
    add('bidirectional', 1, sent, sum(sent) / 2, 0, 'half of the keys on each of two links')
  for u in (u for u in range(2, n + 1) if n % u == 0):
    if s.heads % u or (s.kv_heads % u and u % s.kv_heads):
      continue
    turned, ring = ulysses_bytes(s, u), (0, 0)
    if u < n:
      inside = dataclasses.replace(s, tokens=s.tokens * u, heads=s.heads // u,
                                   kv_heads=max(1, s.kv_heads // u))
      ring = ring_bytes(inside, hops_of(s, u))
    both = tuple(a + b for a, b in zip(turned, ring))
    add('ulysses' if u == n else 'hybrid', 1 if u == n else u, both, sum(ring), sum(turned),
        'the all-to-alls stand open before and after' + ('' if u == n else '; the ring hides'))
  sent = gathered_bytes(s)
  add('allgather', 1, sent, 0, sum(sent), 'nothing to hide behind; keys of all tokens in memory')
  return sorted(found, key=lambda c: c.seconds)


def recommend(s: Shape, chip: Chip) -> tuple[Cost, str]:
  """The quickest strategy, and a sentence why."""
  first, *others = costs(s, chip)
  best_other = others[0] if others else first
  mib = (first.forward_bytes + first.backward_bytes) / 2 ** 20
  return first, (f'{first.strategy}: {1e3 * first.seconds:.3g} ms a layer, {mib:.3g} MiB sent '
                 f'({first.why}); next {best_other.strategy}, {1e3 * best_other.seconds:.3g} ms')
