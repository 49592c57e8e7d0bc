"""The LSTM cell over a sequence, with the input projection outside the time scan.

  [i, f, g, o] = x W_x + b + h W_h
  c' = sigmoid(f) c + sigmoid(i) tanh(g)        h' = sigmoid(o) tanh(c')

Only h W_h stands inside the scan. The backward pass is written out, so that the gradient of W_h
is one product over all steps instead of T small ones added up. State in float32 whatever the
compute type.
Sources: Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000; gate order of cuDNN.
Held by: tests/test_lstm.py (NumPy loops, torch.nn.LSTM, gradients by autodiff of the plain scan).

B batch  T tokens  E recurrent width
"""

import jax
import jax.numpy as jnp

# Sequential steps handed to the compiler at once; the loop's own cost is spread over them.
UNROLL = 4


def _cell(gates_B4E, c_BE):
  i, f, g, o = jnp.split(gates_B4E, 4, axis=-1)
  i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
  c_BE = f * c_BE + i * g
  return jnp.concatenate([i, f, g, o], axis=-1), o * jnp.tanh(c_BE), c_BE


def _forward(x_TB4E, w_EG, h_BE, c_BE, keep_TB1, valid_TB1):
  """keep 0 where a document begins (the state before it is dropped), valid 0 for padding."""
  def step(carry, inputs):
    h_BE, c_BE = carry
    x_B4E, keep_B1, valid_B1 = inputs
    h_in, c_in = h_BE * keep_B1, c_BE * keep_B1
    product = jnp.matmul(h_in.astype(w_EG.dtype), w_EG, preferred_element_type=jnp.float32)
    gates, h_new, c_new = _cell(x_B4E.astype(jnp.float32) + product, c_in)
    h_BE = jnp.where(valid_B1 > 0, h_new, h_BE)
    c_BE = jnp.where(valid_B1 > 0, c_new, c_BE)
    return (h_BE, c_BE), (h_BE, h_in, c_in, gates)

  (h_BE, c_BE), (y, h_in, c_in, gates) = jax.lax.scan(
      step, (h_BE, c_BE), (x_TB4E, keep_TB1, valid_TB1), unroll=UNROLL)
  return (y, h_BE, c_BE), (h_in, c_in, gates)


@jax.custom_vjp
def lstm_scan(x_TB4E: jax.Array, w_EG: jax.Array, h_BE: jax.Array, c_BE: jax.Array,
              keep_TB1: jax.Array, valid_TB1: jax.Array
              ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(y_TBE, h_BE, c_BE) from projected inputs x W_x + b, time first. G = 4E."""
  return _forward(x_TB4E, w_EG, h_BE, c_BE, keep_TB1, valid_TB1)[0]


def _lstm_forward(x_TB4E, w_EG, h_BE, c_BE, keep_TB1, valid_TB1):
  out, (h_in, c_in, gates) = _forward(x_TB4E, w_EG, h_BE, c_BE, keep_TB1, valid_TB1)
  kind = jnp.zeros((0,), x_TB4E.dtype)
  return out, (w_EG, h_in, c_in, gates, keep_TB1, valid_TB1, kind)


def _lstm_backward(residuals, cotangents):
  w_EG, h_in_TBE, c_in_TBE, gates_TB4E, keep_TB1, valid_TB1, kind = residuals
  dy_TBE, dh_BE, dc_BE = cotangents

  def step(carry, inputs):
    dh_BE, dc_BE = carry
    dy, c_in, gates, keep, valid = inputs
    dh_BE = dh_BE + dy
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    tanh_c = jnp.tanh(f * c_in + i * g)
    dh_new, dc_new = dh_BE * valid, dc_BE * valid
    dc = dc_new + dh_new * o * (1 - tanh_c * tanh_c)
    dgates = jnp.concatenate([dc * g * i * (1 - i), dc * c_in * f * (1 - f),
                              dc * i * (1 - g * g), dh_new * tanh_c * o * (1 - o)], axis=-1)
    back = jnp.matmul(dgates.astype(w_EG.dtype), w_EG.T, preferred_element_type=jnp.float32)
    dh_BE = keep * back + dh_BE * (1 - valid)
    dc_BE = keep * dc * f + dc_BE * (1 - valid)
    return (dh_BE, dc_BE), dgates

  (dh_BE, dc_BE), dgates_TB4E = jax.lax.scan(
      step, (dh_BE, dc_BE), (dy_TBE, c_in_TBE, gates_TB4E, keep_TB1, valid_TB1),
      reverse=True, unroll=UNROLL)
  dw_EG = jnp.einsum('TBE,TBG->EG', h_in_TBE.astype(w_EG.dtype), dgates_TB4E.astype(w_EG.dtype),
                     preferred_element_type=jnp.float32)
  return (dgates_TB4E.astype(kind.dtype), dw_EG.astype(w_EG.dtype), dh_BE, dc_BE,
          jnp.zeros_like(keep_TB1), jnp.zeros_like(valid_TB1))


lstm_scan.defvjp(_lstm_forward, _lstm_backward)
