"""What every recurrence of longctx/recurrence is held to, kernel by kernel and form by form.

A case is (inputs, state): a kernel's NamedTuple with reset_BT and valid_BT, and a state tree.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from longctx.parallel import mesh, state_scan

MARKS = ('reset_BT', 'valid_BT')
MESHES = {'ring of 2': (1, 2, 1), 'ring of 4': (1, 4, 1), 'ring of 8': (1, 8, 1),
          'data, ring and heads': (2, 2, 2)}


def marks(batch: int, length: int) -> dict[str, np.ndarray]:
  """Documents begin inside a chunk of 4, at its edge, twice in one; padding left, amid, right."""
  reset, valid = np.zeros((batch, length), bool), np.ones((batch, length), bool)
  reset[0, [2, 8, 13, 15]] = True
  reset[1, [0, 6, 7]] = True
  valid[0, [4, 5, 10]] = False
  valid[1, [0, 12, 13, 14, 15]] = False
  return {'reset_BT': reset & valid, 'valid_BT': valid}


def wave(x):
  """Weights of a loss that tells every number from every other."""
  return jnp.cos(1 + jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


@functools.cache
def compiled(kernel, devices=None):
  """(out, state after, gradients of a loss by inputs and state); devices: data, seq, model."""
  def run(inputs, state):
    known = {k: getattr(inputs, k) for k in MARKS}
    rest = inputs._replace(**dict.fromkeys(MARKS))
    def loss(rest, state):
      out, after = state_scan.over_sequence(kernel, rest._replace(**known), state)
      seen = 1.0 if known['valid_BT'] is None else jnp.expand_dims(
          known['valid_BT'], range(2, out.ndim))
      total = (out * wave(out) * seen).sum()
      return total + sum((x * wave(x)).sum() for x in jax.tree.leaves(after)), (out, after)
    grads, (out, after) = jax.grad(loss, argnums=(0, 1), has_aux=True)(rest, state)
    return out, after, grads
  if devices is None:
    return jax.jit(run)
  data, seq, model = devices
  layout = mesh.make_layout(mesh.Config(data=data, seq=seq, model=model, layout='sequence'),
                            jax.devices()[:data * seq * model])
  return jax.jit(mesh.under(layout, run))


def close_to_the_largest(got, expected, tolerance=1e-5):
  """Each array to `tolerance` times its largest number, or 1."""
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    scale = max(1.0, np.abs(b).max(initial=0))
    np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=tolerance)


def close(got, expected, atol=1e-5, rtol=1e-5):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=atol, rtol=rtol)


def seen(out, inputs):
  """Outputs at the tokens that are not padding, in rows of one array."""
  valid = np.ones(out.shape[:2], bool) if inputs.valid_BT is None else np.asarray(inputs.valid_BT)
  return np.asarray(out)[valid]


def same(kernel, other, case, devices=None, **tolerance):
  """Outputs, state and all gradients of two kernels, or of one on other devices."""
  out, after, grads = compiled(kernel, devices)(*case)
  expected, after_expected, grads_expected = compiled(other)(*case)
  close(seen(out, case[0]), seen(expected, case[0]), **tolerance)
  close((after, grads), (after_expected, grads_expected), **tolerance)


def nearly_no_decay_after_strong_ones(kernel, sequential, case):
  """Sums of a chunk of 64 reach -2400; decays among its last tokens are small differences of them."""
  inputs, state = case
  many = lambda x: None if x is None else jnp.tile(x, (1, 8, *[1] * (x.ndim - 2)))
  inputs = inputs._replace(**dict.fromkeys(MARKS))
  inputs = type(inputs)(*map(many, inputs))
  strong = jnp.arange(inputs.q.shape[1]) % 64 < 40
  strong = jnp.expand_dims(strong, range(1, inputs.log_decay.ndim - 1))
  log_decay = jnp.where(strong, -60.3, -0.0123)
  inputs = inputs._replace(log_decay=jnp.broadcast_to(log_decay, inputs.log_decay.shape))
  close_to_the_largest(compiled(kernel)(inputs, state), compiled(sequential)(inputs, state))


def equals_loops(kernel, case, loops, **tolerance):
  """`loops(inputs, state)` in float64 gives (out, state); also holds the gradient to differences."""
  inputs, state = jax.tree.map(lambda x: np.asarray(x, np.float64) if x.dtype != bool else x, case)
  out, after, grads = compiled(kernel)(*case)
  expected, after_expected = loops(inputs, state)
  close(seen(out, inputs), seen(expected, inputs), **tolerance)
  close(after, after_expected, **tolerance)
  # The loss along one direction through all inputs and the state, by a central difference.
  rng = np.random.default_rng(5)
  floats = (inputs._replace(**dict.fromkeys(MARKS)), state)
  direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), floats)
  def loss(step):
    moved, state = jax.tree.map(lambda x, d: x + step * d, floats, direction)
    out, after = loops(moved._replace(**{k: getattr(inputs, k) for k in MARKS}), state)
    parts = [out * np.asarray(inputs.valid_BT).reshape(*out.shape[:2], *[1] * (out.ndim - 2))]
    parts += jax.tree.leaves(after)
    weights = [np.cos(1 + np.arange(x.size)).reshape(x.shape) for x in parts]
    return sum((x * w).sum() for x, w in zip(parts, weights))
  slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
  along = sum((np.asarray(g, np.float64) * d).sum()
              for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
  np.testing.assert_allclose(along, slope, rtol=3e-4, atol=3e-4)


def cut(inputs, a, b):
  return jax.tree.map(lambda x: x[:, a:b], inputs)


def splits(kernel, case, edges, **tolerance):
  """Piece after piece gives what the whole gives."""
  inputs, state = case
  out, after, _ = compiled(kernel)(inputs, state)
  pieces = []
  for a, b in itertools.pairwise(edges):
    piece, state, _ = compiled(kernel)(cut(inputs, a, b), state)
    pieces.append(piece)
  close(seen(np.concatenate(pieces, axis=1), inputs), seen(out, inputs), **tolerance)
  close(state, after, **tolerance)


def joins(kernel, case, **tolerance):
  """The map of all tokens is the map of one half after the other's, in any grouping."""
  inputs, state = case
  length = jax.tree.leaves(inputs)[0].shape[1]
  run = jax.jit(lambda inputs: kernel.transition(kernel.prepare(inputs)))
  q = [run(cut(inputs, i, i + length // 4)) for i in range(0, length, length // 4)]
  one, two = kernel.join(q[0], q[1]), kernel.join(q[2], q[3])
  whole = run(inputs)
  close(kernel.join(one, two), whole, **tolerance)
  close(kernel.join(q[0], kernel.join(q[1], two)), whole, **tolerance)
  close(kernel.apply(whole, state), compiled(kernel)(inputs, state)[1], **tolerance)
  close(kernel.apply(two, kernel.apply(one, state)), kernel.apply(whole, state), **tolerance)
