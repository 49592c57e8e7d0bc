"""Text out of a model: the prompt is read in chunks, then one token at a time from the state.

`generate` yields token ids as they are made; `read_chunk`, `read_tail` and `decode`, which it is made
of, carry a `Memory` on from call to call (inference/reader.py). The prompt goes through the model in chunks of one
fixed shape, the last one padded with `valid` = False, so that any prompt compiles the same two
programs: `read` (a chunk) and `step` (one token). The state is donated from call to call, and the
next step is sent to the device before the last token is fetched, so that Python's time is hidden.

How a token is chosen, in the order of Hugging Face's logits warpers:
  temperature  logits / temperature; 0 means the largest logit, the lowest id on a tie
  top_k        keeps the k largest logits, and all that tie with the k-th; 0 = off
  top_p        keeps the fewest tokens whose probability reaches top_p, the one that crosses it
               included; among equal ones the lowest ids first; 1 = off (Holtzman et al. 2020,
               arXiv:1904.09751)
  min_p        keeps what has at least min_p times the largest probability; 0 = off (Nguyen et al.
               2024, arXiv:2407.01082)
At least one token is always kept, and one that is not kept is never drawn.
Held by: tests/test_sampling.py (NumPy oracle; greedy == argmax of the full forward pass).

B batch  T tokens  D model  V vocab
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import errors, progress
from longctx.parallel import mesh

CHUNK = 256  # tokens a call of the model, of a prompt or text
ENDED = -1  # in a batch: the row stopped before this token
NOT_FINITE = -2  # the model's logits held a NaN; never leaves this file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How one token is chosen from the logits; the fields are the flags of longctx.generate."""
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    errors.check_range('temperature', self.temperature, low=0)
    errors.check(self.temperature != float('inf'), 'temperature=inf: must be finite')
    errors.check_range('top_k', self.top_k, low=0)
    errors.check(0 < self.top_p <= 1,
                 f'top_p={self.top_p}: must be above 0 and at most 1 (1 keeps every token)')
    errors.check(0 <= self.min_p < 1,
                 f'min_p={self.min_p}: must be at least 0 and below 1 (0 keeps every token)')


def filter_logits(logits_BV: jax.Array, *, temperature: float = 1.0, top_k: int = 0,
                  top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
  """Logits over temperature (above 0), with -inf for every token that is not kept."""
  vocab = logits_BV.shape[-1]
  logits_BV = logits_BV.astype(jnp.float32)
  # The largest is 0 from here on: a small temperature cannot overflow.
  logits_BV = (logits_BV - jnp.max(logits_BV, -1, keepdims=True)) / temperature
  if 0 < top_k < vocab:
    kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
  if top_p < 1:
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, -1), order_BV, axis=-1)
    before_BV = jnp.pad(jnp.cumsum(sorted_BV, -1)[:, :-1], ((0, 0), (1, 0)))
    keep_BV = jnp.put_along_axis(
        jnp.zeros(logits_BV.shape, bool), order_BV, before_BV < top_p, axis=-1, inplace=False)
    logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
  if min_p > 0:
    probs_BV = jax.nn.softmax(logits_BV, -1)
    floor_B1 = min_p * jnp.max(probs_BV, -1, keepdims=True)
    logits_BV = jnp.where(probs_BV >= floor_B1, logits_BV, -jnp.inf)
  return logits_BV


def sample_token(logits_BV: jax.Array, key: jax.Array, *, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
  """One token a row [B] int32; the numbers are Python's, fixed when the caller is compiled."""
  if temperature == 0:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  kept_BV = filter_logits(
      logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  return jax.random.categorical(key, kept_BV, axis=-1).astype(jnp.int32)


class Programs(NamedTuple):
  """The compiled parts of `generate`."""

  fresh: Callable[..., Any]   # (batch, capacity, params) -> an empty state
  encode: Callable[..., Any]  # (capacity, params, source_BS, valid_BS) -> the state after sources
  read: Callable[..., Any]    # (params, state, tokens_BT, valid_BT) -> hidden of each last token, state
  first: Callable[..., Any]   # (params, hidden_BD, key) -> token_B, alive_B
  step: Callable[..., Any]    # (params, state, token_B, alive_B, key, index) -> token_B, alive_B, state


@dataclasses.dataclass
class Memory:
  """What is known of a text from call to call; the state is donated, and the newest stands here."""

  state: Any
  tail: list[np.ndarray]   # of each row: tokens given or made that the state has not read


@functools.lru_cache(maxsize=8)
def programs(graphdef: nnx.GraphDef, sampling: Sampling, stop_token: int, banned: tuple[int, ...],
             layout: mesh.Layout | None, state: Any = None) -> Programs:
  """Shared by all calls with the same model and settings.

  `state`: the shardings that the model's state keeps from call to call, and all else is whole on every
  device, so that every process of a run can fetch it; None: as the compiler likes.
  """
  whole = layout.sharding() if layout and state is not None else None
  wrap = functools.partial(mesh.under, layout) if layout else lambda function: function

  def choose(model, hidden_BD, alive_B, key):
    logits_BV = model.logits(hidden_BD[:, None])[:, 0]
    healthy_B = ~jnp.isnan(logits_BV).any(-1)
    if banned:
      logits_BV = logits_BV.at[:, jnp.array(banned)].set(-jnp.inf)
    token_B = sample_token(logits_BV, key, **dataclasses.asdict(sampling))
    token_B = jnp.where(healthy_B, token_B, NOT_FINITE)
    token_B = jnp.where(alive_B, token_B, ENDED)
    return token_B, alive_B & (token_B != stop_token)

  def fresh(batch, capacity, params):
    return nnx.merge(graphdef, params).init_state(batch, capacity=capacity)

  def encode(capacity, params, source_BS, valid_BS):
    return nnx.merge(graphdef, params).encode(source_BS, valid_BS, capacity=capacity)

  def read(params, state, tokens_BT, valid_BT):
    hidden_BTD, state = nnx.merge(graphdef, params)(tokens_BT, state, valid_BT=valid_BT)
    last_B = jnp.maximum(jnp.sum(valid_BT, 1) - 1, 0)
    return jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0], state

  def first(params, hidden_BD, key):
    return choose(nnx.merge(graphdef, params), hidden_BD, jnp.ones(len(hidden_BD), bool), key)

  def step(params, state, token_B, alive_B, key, index):
    model = nnx.merge(graphdef, params)
    hidden_B1D, state = model(
        jnp.maximum(token_B, 0)[:, None], state, valid_BT=alive_B[:, None])
    token_B, alive_B = choose(model, hidden_B1D[:, 0], alive_B, jax.random.fold_in(key, index))
    return token_B, alive_B, state

  return Programs(
      jax.jit(wrap(fresh), static_argnums=(0, 1), out_shardings=state),
      jax.jit(wrap(encode), static_argnums=0, out_shardings=state),
      jax.jit(wrap(read), donate_argnums=1, out_shardings=(whole, state)),
      jax.jit(wrap(first), out_shardings=whole),
      jax.jit(wrap(step), donate_argnums=1, out_shardings=(whole, whole, state)))


def whole_segments(chunk: int, config: Any) -> int:
  """`chunk`, or the least above it that is whole segments, of a model that reads in segments: a call that
  ends within one would have its begin computed again (models/segments.py)."""
  segment = getattr(config, 'segment', 1)
  return -(-chunk // segment) * segment


def read_chunk(run: Programs, params: Any, memory: Memory, chunk: int, most: int = 0
               ) -> tuple[jax.Array, np.ndarray]:
  """Reads `chunk` tokens of each row's tail (`most`, if given: in the same program), or what it has.

  Returns the hidden vector of each row's last token [B, D], and which rows had any [B, 1].
  """
  most = most or chunk
  counts_B = np.array([min(most, len(tail)) for tail in memory.tail])
  tokens_BT = np.zeros((len(counts_B), chunk), np.int32)
  for row, (tail, count) in enumerate(zip(memory.tail, counts_B)):
    tokens_BT[row, :count] = tail[:count]
  valid_BT = np.arange(chunk) < counts_B[:, None]
  hidden_BD, memory.state = run.read(params, memory.state, tokens_BT, valid_BT)
  memory.tail = [tail[most:] for tail in memory.tail]
  return hidden_BD, valid_BT[:, :1]


def read_tail(run: Programs, params: Any, memory: Memory, chunk: int) -> jax.Array:
  """Reads every row's tail, of at least one token; the hidden vector of each row's last token."""
  hidden_BD = None
  while any(len(tail) for tail in memory.tail):
    new_BD, had_B1 = read_chunk(run, params, memory, chunk)
    progress.moved()
    # Rows whose tail ended in an earlier chunk keep what they had.
    hidden_BD = new_BD if hidden_BD is None else jnp.where(had_B1, new_BD, hidden_BD)
  return hidden_BD


def decode(run: Programs, params: Any, hidden_BD: jax.Array, memory: Memory, *, max_new_tokens: int,
           stop_token: int, seed: int) -> Iterator[np.ndarray]:
  """Makes tokens after those that `memory` has read, `hidden_BD` being of the last; see generate_batch.

  Whenever a token is handed out, and at the end, `memory` stands after the tokens handed out so far:
  all are read, or in the tail. A stop token is neither.
  """
  key = jax.random.key(seed)
  token_B, alive_B = run.first(params, hidden_BD, jax.random.fold_in(key, 0))
  for index in range(1, max_new_tokens + 1):
    current_B, reads = token_B, index < max_new_tokens
    if reads:
      token_B, alive_B, memory.state = run.step(params, memory.state, token_B, alive_B, key, index)
    current_B = np.array(current_B)
    progress.moved()
    if (current_B == NOT_FINITE).any():
      raise FloatingPointError(f'the logits of new token {index} hold NaN: the parameters or the '
                               'state are not finite')
    current_B[current_B == stop_token] = ENDED
    if not reads:
      memory.tail = [np.array([t] if t != ENDED else [], np.int32) for t in current_B.tolist()]
    if (current_B == ENDED).all():
      return
    yield current_B


def generate_batch(graphdef: nnx.GraphDef, params: Any, prompts: Sequence[Sequence[int]], *,
                   max_new_tokens: int, sampling: Sampling = Sampling(), capacity: int = 0,
                   chunk: int = CHUNK, stop_token: int = -1, banned: Sequence[int] = (),
                   seed: int = 0, layout: mesh.Layout | None = None,
                   sources: Sequence[Sequence[int]] | None = None) -> Iterator[np.ndarray]:
  """Carries on several prompts of any lengths at once; one [B] array of token ids a step.

  Args:
    graphdef, params: the two halves of `nnx.split(model)`.
    prompts: token ids, at least one a row.
    max_new_tokens: how many tokens are made at most.
    sampling: how a token is chosen.
    capacity: tokens that the state must hold; 0 = enough for this call, in whole chunks, so that
      prompts of like length share the compiled programs.
    chunk: prompt tokens a call, at least: whole segments of a model that reads in segments.
    stop_token: ends its row and is not handed out (ENDED stands there and after it); -1 = none.
    banned: ids that are never chosen, such as the separator where it does not stop the text.
    seed: the draw; token n of the same call with the same seed is the same token.
    layout: the mesh that `params` are on, whose `seq` shares caches and prompts; None: one device.
    sources: of an encoder-decoder, token ids of what each row is to be made from.
  """
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or min(lengths) < 1:
    raise ValueError(f'prompts of {lengths} tokens: each must have at least 1, the separator')
  chunk = whole_segments(chunk, nnx.merge(graphdef, params).config)
  needed = max(lengths) + max_new_tokens
  capacity = capacity or -(-needed // chunk) * chunk
  if capacity < needed:
    raise ValueError(f'capacity={capacity}: the prompt and max_new_tokens={max_new_tokens} need '
                     f'{needed}')
  run = programs(graphdef, sampling, stop_token, tuple(banned), layout)
  state = (run.fresh(len(prompts), capacity, params) if sources is None else
           run.encode(capacity, params, *padded(sources, chunk)))
  memory = Memory(state, [np.asarray(prompt, np.int32) for prompt in prompts])
  hidden_BD = read_tail(run, params, memory, chunk)
  yield from decode(run, params, hidden_BD, memory, max_new_tokens=max_new_tokens,
                    stop_token=stop_token, seed=seed)


def padded(rows: Sequence[Sequence[int]], chunk: int) -> tuple[np.ndarray, np.ndarray]:
  """(ids, which are there) [B, S]; S in whole chunks, so that sources of like length share programs."""
  size = -(-max(map(len, rows)) // chunk) * chunk
  ids_BS = np.zeros((len(rows), size), np.int32)
  for row, ids in enumerate(rows):
    ids_BS[row, :len(ids)] = ids
  return ids_BS, np.arange(size) < np.array([len(ids) for ids in rows])[:, None]


def generate(graphdef: nnx.GraphDef, params: Any, prompt_ids: Sequence[int],
             **settings: Any) -> Iterator[int]:
  """Carries on one prompt; the settings are those of `generate_batch`. Yields token ids."""
  for token_B in generate_batch(graphdef, params, [prompt_ids], **settings):
    yield int(token_B[0])
