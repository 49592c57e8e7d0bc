"""How a state of the Block-Recurrent Transformer takes in what it attended to, h: a gate, no residual.

  fixed   z = W h + b             s' = s * sigmoid(g) + z * (1 - sigmoid(g))     g: a constant a number
  lstm    z = tanh(W_z h + b_z)   s' = s * sigmoid(W_f h + b_f + 1) + z * sigmoid(W_i h + b_i - 1)

Source: Hutchins et al. 2022, arXiv:2203.07852, section 3.2.
Held by: tests/test_block_recurrent.py.

B batch  M states  E numbers of h  D model
"""

import jax
import jax.numpy as jnp


def fixed(state_BMD: jax.Array, z_BMD: jax.Array, gate_D: jax.Array) -> jax.Array:
  keep_D = jax.nn.sigmoid(gate_D)
  return state_BMD * keep_D + z_BMD * (1 - keep_D)


def lstm(state_BMD: jax.Array, z_BMD: jax.Array, input_BMD: jax.Array, forget_BMD: jax.Array
         ) -> jax.Array:
  """The biases of +1 and -1 are added here."""
  kept_BMD = state_BMD * jax.nn.sigmoid(forget_BMD + 1)
  return kept_BMD + jnp.tanh(z_BMD) * jax.nn.sigmoid(input_BMD - 1)
