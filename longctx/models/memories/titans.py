"""Titans: a neural memory that learns while it reads, beside, before or behind attention.

  memory   out = M(x)                                    the memory alone, no attention
  mag      out = g * norm(Attn([P; x])) * sigmoid(norm(M(x)))                the default
  mal      x' = x + M(x);  out = M(x) + Attn([P; x'])
  mac      h = M_before(q(x)) by weights that stand still; y = norm(Attn([P; h; x]))
           out = g * y * sigmoid(norm(M(y)))             the memory learns y

g is a learned number a channel that begins at init_std, as large as an embedding: at 1 what is normed would
be 25 times as large as the tokens it is added to, and the first layer's output hide them.
M(u): q, k, v = silu(conv4(u W)), q and k of length 1, are learned and read token by token, a chunk's
gradients at its start (longctx/memory/titans.py); alpha, eta and theta of each token and head are
sigmoids of u. P are persistent tokens of the layer, always seen. In mac token i sees h_j for j <= i only:
q(x_j) is of token j, and public code that shows all of h lets tokens read their future. The last three
inputs of the convolution are part of the memory.

With short_term attention sees the window too, and the memory learns a token when it falls out of it: in mag
and mal what the window kept of it (x, and x'), in mac its y, which waits beside the window. All that a
segment reads, it reads by the weights before it. 'memory' then has attention of its own beside it:
out = Attn(x) + M_before(x), without P, and can begin as the plain layer: with model.gate='tanh', which shuts what is
added (models/memories/base.py). The other forms cannot: what attention makes is scaled by the memory, or made of it.

memory_variant: '' is mag; memory_tokens: P (0: 4); memory_depth: matrices (0: 2); memory_width: between
them (0: 4 a head's); memory_chunk: tokens (0: 64, or the segment if shorter);
memory_rate: theta is at most rate / H (0: 1, or H / 4C where that is less: the C steps of a chunk start from one
place, and where their keys are alike they add up; with momentum 1/2 and 1 in the place of H / 4C gradients grew
from chunk to chunk, to a norm of 3,255 after 40 steps on books). So small a step adds to what is there; in
short segments memory_rate=16 lets a step be 1/2, and what comes again replaces what was there (0.96 to 0.99 of
four rewritten keys for 0.31 to 0.44, but for mac: experiments/03_memories). What a document begins with is learned.
Source: Behrouz et al. 2025, arXiv:2501.00663, sections 3 and 4. Where it gives no number: 4 persistent
tokens, depth 2, width 4 and a rate over H as in the public code lucidrains/titans-pytorch, but for long chunks.
Differs: mal adds up what the memory and the attention say, M(x) + Attn([P; x + M(x)]), where the paper's
output is the attention's, Attn(M([P; x])); g (the norms' weights are said to be learned, not what they begin
at, and in mac y is what the memory learns, so that its size is another matter); mag and mal are published with
a window that slides, the same for every token, beside a memory that learns each token as it is read, so that
both hold it. That cannot be set: without short_term token i of a segment sees P and x_0 .. x_i of the segment
alone; with it, short_term + i tokens before it, and the memory learns what falls out and is read by weights a
segment old. The memory does not read P (what it begins with is learned); heads; outputs of the memory are
projected; the convolution stands before silu, as in Gated DeltaNet; alpha begins near 0.007 (a bias: without,
half of a memory is gone a token later); the last matrix begins at 0: nothing learned, nothing said.
Held by: tests/test_models.py, tests/test_titans_layers.py, tests/test_titans.py.

B batch  C slots of a cell  P persistent tokens  N heads  H head dim  D model  W taps  E channels
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import watch
from longctx.attention import Intervals
from longctx.errors import check, check_choice
from longctx.memory import titans
from longctx.models.layers import RMSNorm, constant, linear, normal, param
from longctx.models.memories.base import Block, Cell, Cost, Memory, Past, Settings, attention_mask
from longctx.models.mixers.qkv import unit

VARIANTS = ('mag', 'mac', 'mal', 'memory')
TAPS, TOKENS, DEPTH, WIDTH, CHUNK = 4, 4, 2, 4, 64
FORGET = -5.0   # the bias of alpha's logit


class State(NamedTuple):
  """float32, batch first."""

  memory: titans.State
  tail: jax.Array      # [B, W - 1, 3 or 2, N, H]: what the convolution saw last: of q, k, v or of k, v
  asked: jax.Array     # [B, W - 1, 0 to 2, N, H]: and that of each read by weights that stand still
  waiting: Past | None = None   # y of the tokens in the window (mac with short_term)


def chunk_of(settings: Settings, most: int) -> int:
  """Tokens of a chunk; a segment is cut into whole ones."""
  chunk = settings.chunk or min(most, settings.segment)
  fits = max(c for c in range(1, min(chunk, settings.segment) + 1) if settings.segment % c == 0)
  said = str(settings.chunk) if settings.chunk else f'0 ({chunk} here)'
  check(settings.segment % chunk == 0, f'model.memory_chunk={said}: must divide model.segment='
        f'{settings.segment}, since whole chunks of a segment are learned; set {fits}')
  return chunk


def check_no_attention(settings: Settings, name: str) -> None:
  """A memory in the place of attention has nothing that these would change, but for a window's."""
  if settings.short_term:
    return
  check(settings.gate == 'sigmoid', f'model.gate={settings.gate!r}: is not read by {name}, which stands in the place '
        "of attention without model.short_term, so that nothing would be left; set model.short_term, or 'sigmoid'")
  check(not settings.qk_norm, f'model.qk_norm={settings.qk_norm}: is not read by {name}, which has no '
        'attention without model.short_term')
  check(settings.position != 'relative', f"model.position='relative': is not read by {name}, which has "
        "no attention without model.short_term; set 'rope' or 'none'")
  check(settings.num_kv_heads == settings.num_heads, f'model.num_kv_heads={settings.num_kv_heads}: is not '
        f'read by {name}, which has no attention without model.short_term, and keys of each head; leave it '
        'out')


def convolve(x_BCE: jax.Array, tail_BWE: jax.Array, taps_WE: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(y_t = sum_j taps_j x_{t-j}, the last inputs after a whole segment); E may be several dims."""
  C, W = x_BCE.shape[1], taps_WE.shape[0]
  all_BSE = jnp.concatenate([tail_BWE.astype(x_BCE.dtype), x_BCE], axis=1)
  taps = taps_WE.astype(x_BCE.dtype)
  y_BCE = sum(taps[j] * all_BSE[:, W - 1 - j:W - 1 - j + C] for j in range(W))
  return y_BCE, all_BSE[:, C:].astype(jnp.float32)


class NeuralMemory(nnx.Module):
  """said_BCD, state = memory(u_BCD, state, valid_BC), token by token; or `recall`, and `learn`."""

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    s, self.streams = settings, streams(settings)
    D, N, H = s.dim, s.num_heads, s.head_dim
    self.heads, self.chunk = (N, H), chunk_of(s, CHUNK)
    self.rate = (s.rate or min(1, H / (4 * self.chunk))) / H
    self.w_qkv = param(rngs, normal(s.std), (D, 3, N, H), ('embed', None, 'heads', None))
    limit = TAPS ** -0.5   # torch's Conv1d
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)
    self.taps = param(rngs, uniform, (TAPS, 3, N, H), (None, None, 'heads', None))
    self.w_gates = param(rngs, normal(s.std), (D, 3, N), ('embed', None, 'heads'))
    self.forget = param(rngs, constant(FORGET), (N,), ('heads',))
    self.momentum = param(rngs, constant(0.0), (N,), ('heads',))
    self.step = param(rngs, constant(0.0), (N,), ('heads',))
    depth, width = sizes(s)
    shapes = titans.shapes(H, width, depth)
    self.start = nnx.List([
        param(rngs, normal(p ** -0.5) if i < depth - 1 else constant(0.0), (N, p, f),
              ('heads', None, None)) for i, (p, f) in enumerate(shapes)])
    self.w_out = param(rngs, normal(s.out_std), (N, H, D), ('heads', None, 'embed'))

  @staticmethod
  def parameters(settings: Settings) -> int:
    N, H = settings.num_heads, settings.head_dim
    return NeuralMemory.matrices(settings) + N * (TAPS * 3 * H + 3) + N * weights(settings)

  @staticmethod
  def matrices(settings: Settings) -> int:
    return settings.dim * settings.num_heads * (4 * settings.head_dim + 3)

  def init_memory(self, batch_size: int) -> State:
    rows = lambda x: jnp.broadcast_to(x, (batch_size, *x.shape))
    start = tuple(rows(w.get_value()) for w in self.start)
    tail = lambda count: jnp.zeros((batch_size, TAPS - 1, count, *self.heads), jnp.float32)
    return State(titans.State(start, tuple(jnp.zeros_like(w) for w in start)),
                 *(tail(count) for count in self.streams))

  def __call__(self, u_BCD: jax.Array, state: State, valid_BC: jax.Array) -> tuple[jax.Array, State]:
    (q, k, v), tail = self._project(u_BCD, state.tail, slice(0, 3))
    tokens = self._tokens(u_BCD, q, k, v, valid_BC)
    said_BNCH, memory = titans.segment(state.memory, tokens, self.chunk)
    watch.tell('titans', said_BNCH=said_BNCH)
    return self._merge(said_BNCH, u_BCD), state._replace(memory=memory, tail=tail)

  def recall(self, u_BCD: jax.Array, state: State, stream: int = 0) -> tuple[jax.Array, State]:
    """What the memory before the segment says to each of its tokens; u is of a stream of its own."""
    own = slice(stream, stream + 1)
    (q,), asked = self._project(u_BCD, state.asked[:, :, own], slice(0, 1))
    said_BNCH = titans.read(state.memory.weights, unit(jnp.moveaxis(q, 2, 1)))
    watch.tell('titans', said_BNCH=said_BNCH)
    return self._merge(said_BNCH, u_BCD), state._replace(asked=state.asked.at[:, :, own].set(asked))

  def learn(self, u_BCD: jax.Array, state: State, valid_BC: jax.Array) -> State:
    """The state after tokens that ask nothing; u is 0 where there is none, before a document's first."""
    (k, v), tail = self._project(u_BCD, state.tail, slice(1, 3))
    tokens = self._tokens(u_BCD, None, k, v, valid_BC)
    return state._replace(memory=titans.segment(state.memory, tokens, self.chunk)[1], tail=tail)

  def _tokens(self, u_BCD: jax.Array, q: jax.Array | None, k: jax.Array, v: jax.Array,
              valid_BC: jax.Array) -> titans.Tokens:
    gates = linear(u_BCD, self._flat(self.w_gates)).astype(jnp.float32)
    bias = jnp.concatenate([x.get_value() for x in (self.forget, self.momentum, self.step)])
    alpha, eta, theta = jnp.split(jax.nn.sigmoid(gates + bias), 3, axis=-1)
    by_head = lambda x: jnp.moveaxis(x, 2, 1)
    return titans.Tokens(
        None if q is None else unit(by_head(q)), unit(by_head(k)), by_head(v).astype(jnp.float32),
        by_head(alpha), by_head(eta), self.rate * by_head(theta),
        jnp.broadcast_to(valid_BC[:, None], by_head(alpha).shape))

  def _flat(self, w: nnx.Param) -> jax.Array:
    return w.get_value().reshape(w.get_value().shape[0], -1)

  def _project(self, u_BCD, tail, which: slice):
    """([B, C, N, H] of each of q, k, v that is asked for, the tail after)."""
    w = self.w_qkv.get_value()[:, which]
    x = linear(u_BCD, w.reshape(w.shape[0], -1)).reshape(*u_BCD.shape[:2], *w.shape[1:])
    y, tail = convolve(x, tail, self.taps.get_value()[:, which])
    return jnp.moveaxis(jax.nn.silu(y), 2, 0), tail

  def _merge(self, said_BNCH: jax.Array, like_BCD: jax.Array) -> jax.Array:
    said = jnp.moveaxis(said_BNCH, 1, 2).reshape(*like_BCD.shape[:2], -1).astype(like_BCD.dtype)
    return linear(said, self.w_out.get_value().reshape(-1, like_BCD.shape[-1]))


def sizes(settings: Settings) -> tuple[int, int]:
  """(depth, width)."""
  return settings.depth or DEPTH, settings.width or WIDTH * settings.head_dim


def streams(settings: Settings) -> tuple[int, int]:
  """(channels of the convolution that see what is learned, reads by weights that stand still)."""
  reads_first = settings.variant == 'mac'
  return (2, 1 + reads_first) if settings.short_term else (3, int(reads_first))


def weights(settings: Settings) -> int:
  """Of a head's memory."""
  depth, width = sizes(settings)
  return sum(math.prod(shape) for shape in titans.shapes(settings.head_dim, width, depth))


class Titans(Block):
  dependency = 'P2'
  reads = ('variant', 'tokens', 'width', 'depth', 'chunk', 'rate', 'gate')

  @classmethod
  def cost(cls, settings: Settings) -> Cost:
    s = settings
    check_choice('model.memory_variant', s.variant, ('', *VARIANTS))
    chunk, (depth, width) = chunk_of(s, CHUNK), sizes(s)
    check(depth > 1 or not s.width, f'model.memory_width={s.width}: is not read with '
          'model.memory_depth=1, which has no hidden layer; leave it out')
    attends, persistent = s.variant != 'memory' or s.short_term > 0, s.variant != 'memory'
    check(s.gate == 'sigmoid' or not persistent, f"model.gate={s.gate!r}: is read with model.memory_variant='memory' "
          f'alone, not {s.variant or VARIANTS[0]!r}, where attention is scaled by the memory or reads it, and is not '
          "added to; set model.gate='sigmoid'")
    if not persistent:
      check_no_attention(s, "model.memory_variant='memory'")
      check(not s.tokens, f'model.memory_tokens={s.tokens}: is not read with '
            "model.memory_variant='memory', whose attention has none of its own")
    D, N, H, C = s.dim, s.num_heads, s.head_dim, s.segment
    channels = N * H
    flops = 2.0 * TAPS * 3 * channels + N * titans.flops(H, width, depth, chunk,
                                                         apart=s.short_term > 0)
    parameters, state = NeuralMemory.parameters(s) + int(s.gate == 'tanh'), 2 * N * weights(s)
    if s.short_term:
      flops += 2 * N * weights(s)
    if persistent:
      P, keyed = s.tokens or TOKENS, 2 * D * H * (N + 2 * s.num_kv_heads)   # of a token among the keys
      parameters += P * D + D * (1 if s.variant == 'mal' else 3)
      flops += 4 * channels * P + keyed * P / C
    if s.variant == 'mac':
      flops += (4 * D + 2 * TAPS) * channels + 2 * N * weights(s) + keyed + 2 * channels * (C + 1)
      state += s.short_term * D + 1 if s.short_term else 0
    return Cost(parameters=parameters, matrices=NeuralMemory.matrices(s), flops=flops,
                state=state + sum(streams(s)) * (TAPS - 1) * channels, attends=attends)

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    super().__init__(settings, rngs=rngs)
    s = settings
    self.variant = s.variant or VARIANTS[0]
    norm = lambda: RMSNorm(s.dim, s.norm_epsilon, rngs=rngs)
    self.memory = NeuralMemory(s, rngs=rngs)
    self.memory_norm = norm() if self.variant == 'mal' else None
    mixes = self.variant in ('mag', 'mac')
    self.seen_norm, self.said_norm = (norm(), norm()) if mixes else (None, None)
    self.gain = param(rngs, constant(s.std), (s.dim,), (None,)) if mixes else None
    self.persistent = (param(rngs, normal(s.std), (s.tokens or TOKENS, s.dim), (None, 'embed'))
                       if self.variant != 'memory' else None)

  def init_store(self, batch_size: int) -> State:
    store = self.memory.init_memory(batch_size)
    return store._replace(waiting=self.init_past(batch_size)) if self.variant == 'mac' else store

  def mix(self, x_BCD: jax.Array, memory: Memory, cell: Cell) -> tuple[jax.Array, Memory]:
    (past, store), valid = memory, cell.valid_BC
    if past is not None:
      return self.mix_behind_a_window(x_BCD, past, store, cell)
    if self.variant == 'memory':
      said, store = self.memory(self.mixer_norm(x_BCD), store, valid)
      return said, Memory(None, store)
    if self.variant == 'mal':
      said, store = self.memory(self.memory_norm(x_BCD), store, valid)
      x_BCD += said
      return said + self.look(x_BCD, None, cell), Memory(None, store)
    if self.variant == 'mag':
      seen = self.seen_norm(self.look(x_BCD, None, cell))
      said, store = self.memory(self.mixer_norm(x_BCD), store, valid)
    else:
      heard, store = self.memory.recall(self.mixer_norm(x_BCD), store)
      seen = self.seen_norm(self.look(x_BCD, None, cell, heard))
      said, store = self.memory(seen, store, valid)
    return self.gated(seen, said), Memory(None, store)

  def gated(self, seen_BCD: jax.Array, said_BCD: jax.Array) -> jax.Array:
    return self.gain.get_value().astype(seen_BCD.dtype) * seen_BCD * jax.nn.sigmoid(self.said_norm(said_BCD))

  def mix_behind_a_window(self, x_BCD: jax.Array, past: Past, store: State, cell: Cell
                          ) -> tuple[jax.Array, Memory]:
    """As `mix`; what falls out of the window is learned, when all has been read."""
    if self.variant == 'mac':
      heard, store = self.memory.recall(self.mixer_norm(x_BCD), store)
      y_BCD = self.seen_norm(self.look(x_BCD, past, cell, heard))
      said, store = self.memory.recall(y_BCD, store, stream=1)
      out = self.gated(y_BCD, said)
      learned_BCD, valid_BC = self.leaving(y_BCD, store.waiting, cell)
      store = store._replace(waiting=self.remember(y_BCD, store.waiting, cell))
    else:
      norm = self.memory_norm if self.variant == 'mal' else self.mixer_norm
      said, store = self.memory.recall(norm(x_BCD), store)
      if self.variant == 'mal':
        x_BCD += said
      seen = self.look(x_BCD, past, cell)
      out = self.gated(self.seen_norm(seen), said) if self.variant == 'mag' else self.let_in(said) + seen
      old_BCD, valid_BC = self.leaving(x_BCD, past, cell)
      learned_BCD = norm(old_BCD)
    store = self.memory.learn(learned_BCD, store, valid_BC)
    return out, Memory(self.remember(x_BCD, past, cell), store)

  def look(self, x_BCD: jax.Array, past: Past | None, cell: Cell, *heard_BCD: jax.Array) -> jax.Array:
    """Attention over [P; heard; past; x]."""
    if self.persistent is None:
      q, k, v = self.project(x_BCD, past)
      return self.mixer.merged(self.attend(q, k, v, past, cell))
    B, C, _ = x_BCD.shape
    own_BPD = jnp.broadcast_to(self.persistent.get_value().astype(x_BCD.dtype),
                               (B, *self.persistent.get_value().shape))
    old = () if past is None else (jax.lax.stop_gradient(past.hidden),)
    q, k, v = self.mixer.heads(self.mixer_norm(
        jnp.concatenate([own_BPD, *heard_BCD, *old, x_BCD], axis=1)))
    return self.mixer.merged(self.attend(q[:, -C:], k, v, past, cell))

  def mask(self, past: Past | None, cell: Cell) -> Intervals:
    """Token i sees P, h_j of j <= i, the past and itself: h_j has the index of token j."""
    if self.persistent is None:
      return attention_mask(past, cell)
    P, own = self.persistent.get_value().shape[0], attention_mask(past, cell)
    behind = lambda index: jnp.where(index >= 0, index + P, -1)
    index_BC = behind(own.index_BT)
    always_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (index_BC.shape[0], P))
    heard = (index_BC,) if self.variant == 'mac' else ()
    return Intervals(start_BT=own.start_BT, end_BT=index_BC + 1, index_BT=index_BC,
                     key_index_BS=jnp.concatenate([always_BP, *heard, behind(own.keys_BS)], axis=1))
