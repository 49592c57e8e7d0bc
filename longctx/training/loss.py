"""Cross entropy in chunks along the sequence: the [B, T, V] logits never exist.

    nll_t  = lse_t - logits_t,y
    loss_t = (1 - s) nll_t + s mean_v(lse_t - logits_tv) + z lse_t^2
    total  = sum_t weight_t loss_t

`total` is linear in its cotangent, so the differentiated forward pass makes the gradients chunk by
chunk while it holds the chunk's logits, and the backward pass only multiplies by a scalar: three
matrix products in all and none computed twice. An undifferentiated call makes the logits alone.
Live memory: a few strips [B, chunk, V] and one float32 gradient of the embedding.

Sources: label smoothing, Szegedy et al. 2016, arXiv:1512.00567; z-loss, Chowdhery et al. 2022,
arXiv:2204.02311, section 5.
Held by: tests/test_loss.py.

B batch  T tokens  C tokens of a chunk  D model  V vocab  X shards of the batch  R of the length
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from longctx.errors import check, check_range
from longctx.parallel import mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  chunk: int = 512  # tokens of each row whose logits live at once; 0 = the whole row
  z_loss: float = 0.0
  label_smoothing: float = 0.0

  def __post_init__(self):
    check_range('loss.chunk', self.chunk, low=0)
    check_range('loss.z_loss', self.z_loss, low=0.0)
    check_range('loss.label_smoothing', self.label_smoothing, low=0.0)
    check(self.label_smoothing < 1,
          f'loss.label_smoothing={self.label_smoothing}: must be below 1')


def cross_entropy(hidden_BTD, embedding_VD, targets_BT, weights_BT, *, chunk: int = 512,
                  z_loss: float = 0.0, label_smoothing: float = 0.0, batch_shards: int = 1,
                  length_shards: int = 1):
  """(total, nll_BT): the weighted loss, and -log p(target) of every token, both float32.

  Differentiable in `hidden_BTD` and `embedding_VD` through `total`; `nll_BT` is for reading and the
  weights are constants. The products run in hidden's dtype with float32 sums; the gradient of the
  embedding is summed in float32 over the chunks and has the embedding's dtype.

  The weights come normalised by the caller (mask / number of targets of the whole global batch),
  which makes gradient accumulation and data parallelism exact. A target outside [0, V) is allowed
  where the weight is 0.

  `batch_shards` and `length_shards` are the sizes of the mesh axes that cut B and T (1: not cut).
  Every shard then walks its own tokens: no chunk moves tokens between devices, and the gradient of
  the embedding is summed over devices once, not once a chunk. The embedding may be cut along V; cut
  along D it would be gathered again for every chunk, so gather it before the call.
  """
  B, T, _ = hidden_BTD.shape
  if B % batch_shards or T % length_shards:
    raise ValueError(f'hidden has shape {hidden_BTD.shape}: batch_shards={batch_shards} must '
                     f'divide its batch and length_shards={length_shards} its length.')
  X, R = batch_shards, length_shards
  options = (chunk, float(z_loss), float(label_smoothing))
  cut = lambda x: x.reshape(X, B // X, R, T // R, *x.shape[2:])
  total, nll = _cross_entropy(options, cut(hidden_BTD), embedding_VD, cut(targets_BT),
                              cut(jax.lax.stop_gradient(weights_BT).astype(jnp.float32)))
  return total, jax.lax.stop_gradient(nll.reshape(B, T))


# Below this line B is the batch of one shard, T the length of one, and tensors read XBRT....


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden_XBRTD, embedding_VD, targets_XBRT, weights_XBRT):
  return _walk(options, hidden_XBRTD, embedding_VD, targets_XBRT, weights_XBRT, grad=False)[0]


def _forward(options, hidden_XBRTD, embedding_VD, targets_XBRT, weights_XBRT):
  out, (dhidden_XBRTD, dembedding_XRDV) = _walk(
      options, hidden_XBRTD, embedding_VD, targets_XBRT, weights_XBRT, grad=True)
  # The barrier keeps XLA from merging this transpose into the product (see _chunk).
  dembedding_DV = jax.lax.optimization_barrier(mesh.summed(dembedding_XRDV, 'embed', 'vocab'))
  dembedding_VD = dembedding_DV.T.astype(embedding_VD.dtype)
  return out, (dhidden_XBRTD, dembedding_VD)


def _backward(options, gradients, cotangents):
  del options
  scale = lambda g: (g * cotangents[0]).astype(g.dtype)  # cotangents[1] is of nll: only for reading
  dhidden_XBRTD, dembedding_VD = gradients
  return scale(dhidden_XBRTD), scale(dembedding_VD), None, None


_cross_entropy.defvjp(_forward, _backward)


def _walk(options, hidden_XBRTD, embedding_VD, targets_XBRT, weights_XBRT, *, grad):
  """((total, nll), gradients or None), a chunk of every shard at a time."""
  chunk, z_loss, label_smoothing = options
  X, _, R, T, _ = hidden_XBRTD.shape
  chunk = min(chunk or T, T)
  embedding_VD = embedding_VD.astype(hidden_XBRTD.dtype)

  def visit(start, size, carry):
    total_XR, nll_XBRT, gradients = carry
    at = lambda x: x if size == T else jax.lax.dynamic_slice_in_dim(x, start, size, axis=3)
    put = lambda x, part: (part if size == T else
                           jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=3))
    part_total, part_nll, part_gradients = _chunk(
        at(hidden_XBRTD), embedding_VD, at(targets_XBRT), at(weights_XBRT), z_loss,
        label_smoothing, grad)
    if grad:
      gradients = (put(gradients[0], part_gradients[0]), gradients[1] + part_gradients[1])
    return total_XR + part_total, put(nll_XBRT, part_nll), gradients

  gradients = None
  if grad:
    gradients = (jnp.zeros_like(hidden_XBRTD),
                 jnp.zeros((X, R, *embedding_VD.shape[::-1]), jnp.float32))
  carry = (jnp.zeros((X, R), jnp.float32), jnp.zeros(targets_XBRT.shape, jnp.float32), gradients)
  num_chunks, rest = divmod(T, chunk)
  if num_chunks == 1:
    carry = visit(0, chunk, carry)
  else:
    carry, _ = jax.lax.scan(lambda carry, i: (visit(i * chunk, chunk, carry), None), carry,
                            jnp.arange(num_chunks))
  if rest:
    carry = visit(T - rest, rest, carry)
  total_XR, nll_XBRT, gradients = carry
  return (total_XR.sum(), nll_XBRT), gradients


def _chunk(hidden_XBRCD, embedding_VD, targets_XBRC, weights_XBRC, z_loss, label_smoothing, grad):
  """(weighted loss, nll, gradients or None) of one chunk, whose logits live only here."""
  V = embedding_VD.shape[0]
  dtype = hidden_XBRCD.dtype
  logits = jnp.einsum('XBRCD,VD->XBRCV', hidden_XBRCD, embedding_VD,
                      preferred_element_type=jnp.float32)
  is_target = targets_XBRC[..., None] == jnp.arange(V, dtype=targets_XBRC.dtype)
  peak = logits.max(-1, keepdims=True)
  p = jnp.exp(logits - peak)  # not normalised; the gradient uses it again
  norm = p.sum(-1, keepdims=True)
  lse = (jnp.log(norm) + peak)[..., 0]
  label = jnp.take_along_axis(logits, targets_XBRC[..., None], -1, mode='clip')[..., 0]
  nll = lse - label
  loss = nll
  if label_smoothing:
    loss = (1 - label_smoothing) * nll + label_smoothing * (lse - logits.mean(-1))
  if z_loss:
    loss = loss + z_loss * lse**2
  total_XR = (weights_XBRC * loss).sum((1, 3))
  if not grad:
    return total_XR, nll, None
  # d loss / d logits = (1 + 2 z lse) softmax - (1 - s) [v = target] - s / V
  slope = weights_XBRC[..., None] * (1 + 2 * z_loss * lse[..., None]) / norm
  dlogits = slope * p - jnp.where(is_target, (1 - label_smoothing) * weights_XBRC[..., None], 0)
  if label_smoothing:
    dlogits = dlogits - weights_XBRC[..., None] * (label_smoothing / V)
  dlogits = dlogits.astype(dtype)
  dhidden = jnp.einsum('XBRCV,VD->XBRCD', dlogits, embedding_VD,
                       preferred_element_type=jnp.float32).astype(dtype)
  # [D, V] and not [V, D]: a CPU then transposes the chunk's hidden and not its wider logits.
  dembedding = jnp.einsum('XBRCD,XBRCV->XRDV', hidden_XBRCD, dlogits,
                          preferred_element_type=jnp.float32)
  return total_XR, nll, (dhidden, dembedding)
