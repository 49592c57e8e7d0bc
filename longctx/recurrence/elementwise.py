"""The element-wise linear recurrence h_t = a_t h_{t-1} + b_t, in three forms.

    sequential   one token after the other: the definition
    chunked      the tokens in chunks: first each chunk's map (product of a, end from zero), all chunks
                 side by side; then the states between chunks; then all chunks side by side again from
                 their true states. T/C + 2C dependent steps instead of T.
    scan         jax.lax.associative_scan of (a2, b2) o (a1, b1) = (a2 a1, a2 b1 + b2)

No form divides or takes logarithms, so a = 0 (a document begins) and a = 1 (padding) are exact. The
gradient of the last two is written out: the same recurrence run backwards, g_t = dh_t + a_{t+1} g_{t+1},
with db_t = g_t and da_t = g_t h_{t-1}. Nothing is kept for it but a and h.
Sources: Martin & Cundy 2018, arXiv:1709.04057; Blelloch 1990.
Held by: tests/test_elementwise.py.

B batch  T tokens  E recurrent width  C tokens of a chunk  N chunks
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.recurrence import chunks

# CPU: measured at T 4096, E 512 (experiments/02_recurrences). Else the fewest dependent steps for
# some thousand tokens, T/C + 2C.
CHUNKS = {'cpu': 256, '': 64}
# A GPU pays for every step of a loop over a chunk with a launch; log2(T) rounds are fewer. Not timed.
FORMS = {'gpu': 'scan', '': 'chunked'}


class Inputs(NamedTuple):
  """What the recurrence reads; a in [0, 1]."""

  a: jax.Array                   # [B, T, E]
  b: jax.Array                   # [B, T, E]
  reset_BT: jax.Array | None     # True where a document begins
  valid_BT: jax.Array | None     # False for padding


@dataclasses.dataclass(frozen=True)
class Elementwise:
  """The kernel that `state_scan.over_sequence` runs; its state is h_BE, float32."""

  form: str = 'auto'             # auto: by platform | sequential | chunked | scan
  chunk: int = 0                 # 0: by platform

  cut = 'recurrent'

  def prepare(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    a, b = inputs.a.astype(jnp.float32), inputs.b.astype(jnp.float32)
    if inputs.reset_BT is not None:
      a = jnp.where(inputs.reset_BT[..., None], 0.0, a)
    if inputs.valid_BT is not None:
      a = jnp.where(inputs.valid_BT[..., None], a, 1.0)
      b = jnp.where(inputs.valid_BT[..., None], b, 0.0)
    return a, b

  def transition(self, prepared: Any) -> tuple[jax.Array, jax.Array]:
    a, b = prepared
    zeros = jnp.zeros_like(b[:, 0])
    end_BE = self.run(a, b, zeros)[:, -1]
    product_BE = self.run(a, jnp.zeros_like(b), zeros + 1)[:, -1]   # its gradient is right at a = 0
    return product_BE, end_BE

  def join(self, first: Any, second: Any) -> Any:
    return first[0] * second[0], second[0] * first[1] + second[1]

  def apply(self, transition: Any, state: jax.Array) -> jax.Array:
    return transition[0] * state + transition[1]

  def finish(self, prepared: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    h_BTE = self.run(*prepared, state)
    return h_BTE, h_BTE[:, -1]

  def read(self, inputs: Inputs, states_BSE: jax.Array) -> jax.Array:
    """[B, 1, S, E]: what S states that stand still say, the same to every token."""
    del inputs
    return states_BSE[:, None]

  def run(self, a_BTE: jax.Array, b_BTE: jax.Array, h_BE: jax.Array) -> jax.Array:
    chunk = chunks.choose(self.chunk, CHUNKS)
    form = chunks.choose('' if self.form == 'auto' else self.form, FORMS)
    if form == 'scan':
      return scan(a_BTE, b_BTE, h_BE)
    if form == 'sequential' or a_BTE.shape[1] <= chunk:
      return sequential(a_BTE, b_BTE, h_BE)
    return chunked(chunk, a_BTE, b_BTE, h_BE)


def sequential(a_BTE: jax.Array, b_BTE: jax.Array, h_BE: jax.Array) -> jax.Array:
  """h_BTE from the state before the first token; its gradient is left to autodiff."""
  def step(h_BE, token):
    h_BE = token[0] * h_BE + token[1]
    return h_BE, h_BE
  tokens = jnp.swapaxes(a_BTE, 0, 1), jnp.swapaxes(b_BTE, 0, 1)
  return jnp.swapaxes(jax.lax.scan(step, h_BE, tokens)[1], 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(chunk: int, a_BTE: jax.Array, b_BTE: jax.Array, h_BE: jax.Array) -> jax.Array:
  """h_BTE as `sequential` gives it."""
  return _chunked_forward(chunk, a_BTE, b_BTE, h_BE)[0]


def _in_chunks(chunk, x_BTE, value=0):
  """[B, N, C, E]; tokens that are missing at the end get `value`."""
  B, T, E = x_BTE.shape
  if more := -T % chunk:
    x_BTE = jnp.pad(x_BTE, ((0, 0), (0, more), (0, 0)), constant_values=value)
  return x_BTE.reshape(B, -(-T // chunk), chunk, E)


_at = lambda x_BNCE, c: jax.lax.dynamic_index_in_dim(x_BNCE, c, 2, keepdims=False)
_put = lambda x_BNCE, x_BNE, c: jax.lax.dynamic_update_index_in_dim(x_BNCE, x_BNE, c, 2)


def _between(maps, h_BE, reverse=False):
  """The state before each chunk [B, N, E], and after all, from the chunks' maps."""
  def across(h_BE, chunk_map):
    return chunk_map[0] * h_BE + chunk_map[1], h_BE
  maps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), maps)
  h_BE, start_NBE = jax.lax.scan(across, h_BE, maps, reverse=reverse)
  return jnp.swapaxes(start_NBE, 0, 1), h_BE


def _chunked_forward(chunk, a_BTE, b_BTE, h_BE):
  a_BNCE, b_BNCE = _in_chunks(chunk, a_BTE, 1), _in_chunks(chunk, b_BTE)

  def summarise(c, maps):
    a = _at(a_BNCE, c)
    return a * maps[0], a * maps[1] + _at(b_BNCE, c)
  zeros_BNE = jnp.zeros_like(a_BNCE[:, :, 0])
  start_BNE, _ = _between(jax.lax.fori_loop(0, chunk, summarise, (zeros_BNE + 1, zeros_BNE)), h_BE)

  def within(c, carry):
    h_BNE = _at(a_BNCE, c) * carry[0] + _at(b_BNCE, c)
    return h_BNE, _put(carry[1], h_BNE, c)
  _, h_BNCE = jax.lax.fori_loop(0, chunk, within, (start_BNE, jnp.zeros_like(a_BNCE)))
  h_BTE = jax.lax.collapse(h_BNCE, 1, 3)[:, :a_BTE.shape[1]]
  return h_BTE, (a_BTE, h_BTE, start_BNE)


def _chunked_backward(chunk, residuals, dh_BTE):
  a_BTE, h_BTE, start_BNE = residuals
  a_BNCE, dh_BNCE = _in_chunks(chunk, a_BTE, 1), _in_chunks(chunk, dh_BTE)
  h_BNCE = _in_chunks(chunk, h_BTE)

  def summarise(i, maps):   # what runs back is a_t g_t
    a = _at(a_BNCE, chunk - 1 - i)
    return a * maps[0], a * (maps[1] + _at(dh_BNCE, chunk - 1 - i))
  zeros_BNE = jnp.zeros_like(start_BNE)
  maps = jax.lax.fori_loop(0, chunk, summarise, (zeros_BNE + 1, zeros_BNE))
  end_BNE, dh_BE = _between(maps, jnp.zeros_like(start_BNE[:, 0]), reverse=True)

  def within(i, carry):
    c = chunk - 1 - i
    back_BNE, da_BNCE, db_BNCE = carry
    g_BNE = back_BNE + _at(dh_BNCE, c)
    before_BNE = jnp.where(c == 0, start_BNE, _at(h_BNCE, jnp.maximum(c - 1, 0)))
    return (_at(a_BNCE, c) * g_BNE, _put(da_BNCE, g_BNE * before_BNE, c), _put(db_BNCE, g_BNE, c))
  zeros_BNCE = jnp.zeros_like(a_BNCE)
  _, *gradients = jax.lax.fori_loop(0, chunk, within, (end_BNE, zeros_BNCE, zeros_BNCE))
  return *(jax.lax.collapse(g, 1, 3)[:, :a_BTE.shape[1]] for g in gradients), dh_BE


chunked.defvjp(_chunked_forward, _chunked_backward)


@jax.custom_vjp
def scan(a_BTE: jax.Array, b_BTE: jax.Array, h_BE: jax.Array) -> jax.Array:
  """h_BTE as `sequential` gives it."""
  return _associative(a_BTE, b_BTE.at[:, 0].add(a_BTE[:, 0] * h_BE))


def _associative(a_BTE, b_BTE, reverse=False):
  join = lambda one, two: (two[0] * one[0], two[0] * one[1] + two[1])
  return jax.lax.associative_scan(join, (a_BTE, b_BTE), reverse=reverse, axis=1)[1]


def _scan_forward(a_BTE, b_BTE, h_BE):
  h_BTE = scan(a_BTE, b_BTE, h_BE)
  return h_BTE, (a_BTE, h_BTE, h_BE)


def _scan_backward(residuals, dh_BTE):
  a_BTE, h_BTE, h_BE = residuals
  later_BTE = jnp.concatenate([a_BTE[:, 1:], jnp.zeros_like(a_BTE[:, :1])], axis=1)
  g_BTE = _associative(later_BTE, dh_BTE, reverse=True)
  before_BTE = jnp.concatenate([h_BE[:, None], h_BTE[:, :-1]], axis=1)
  return g_BTE * before_BTE, g_BTE, a_BTE[:, 0] * g_BTE[:, 0]


scan.defvjp(_scan_forward, _scan_backward)
