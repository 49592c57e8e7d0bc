"""Any recurrent mixer of models/mixers as the recurrence that Memory Caching keeps states of.

The mixer is what it is everywhere: its convolution or token shift looks back over segments, its norms,
gates and skips are its own. Only its recurrence is run here: from nothing at a segment's begin, and what it
gives for token t is put together with what kept states say to t, each of which stands still:

    q_t S        of delta_net, gated_delta, kda, retention, gla, mamba2, rwkv7; of linear_attention over
                 the sum of all its normalisers
    q_t C / max(|q_t n|, e^-m)       of mlstm
    h            of min_gru, min_lstm, rglru: the same to every token

Source: arXiv:2602.24281, M^(i)(q_t). Differs: the published backbones are linear attention and deep memories.
Held by: tests/test_cached_mixer.py (loops for each recurrence), tests/test_models.py.

B batch  C tokens  K inputs before them that the mixer looks back at  D model
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.errors import ConfigError
from longctx.models.context import place_tokens
from longctx.models.memories.base import Settings
from longctx.models.mixers import MIXERS
from longctx.models.mixers import base as mixers


def mixer_settings(name: str, settings: Settings) -> mixers.Settings:
  """memory_width is the mixer's key_dim, or its width where it has no keys; the rest is as published."""
  s, size = settings, 'key_dim' if 'key_dim' in MIXERS[name].reads else 'width'
  return mixers.Settings(dim=s.dim, num_heads=s.num_heads, num_layers=s.num_layers,
                         norm_epsilon=s.norm_epsilon, std=s.std, out_std=s.out_std, **{size: s.width})


def cost(name: str, settings: Settings) -> mixers.Cost:
  try:
    return MIXERS[name].cost(mixer_settings(name, settings))
  except ConfigError as error:
    raise ConfigError(f'{error} (model.memory_width={settings.width} stands for model.mixer_key_dim and '
                      'model.mixer_width here)') from None


def looks_back(name: str, settings: Settings) -> int:
  """Inputs before a token's own that it sees besides the state."""
  if not cost(name, settings).tail:
    return 0
  return mixer_settings(name, settings).conv - 1 if 'conv' in MIXERS[name].reads else 1


class CachedMixer(nnx.Module):
  """y_BCD, state = cached(u_BCD, valid_BC, left, speak)."""

  def __init__(self, name: str, settings: Settings, *, rngs: nnx.Rngs):
    self.mixer = MIXERS[name](mixer_settings(name, settings), rngs=rngs)

  def empty(self, batch_size: int) -> Any:
    """The recurrence's own state."""
    return self.mixer.init_state(batch_size)[0]

  def __call__(self, u_BCD: jax.Array, valid_BC: jax.Array,
               left: tuple[jax.Array, jax.Array] | None,
               speak: Callable[[jax.Array, Callable[[Any], jax.Array]], jax.Array]
               ) -> tuple[jax.Array, Any]:
    """What the mixer adds for each token of a segment, and its recurrence's state after them.

    Args:
      left: the K inputs before the segment [B, K, D], and which of them there are.
      speak: of the recurrence's own output [B, C, ...] and a function that gives what states [B, S, ...]
        say [B, C or 1, S, ...], what the mixer goes on with.
    """
    K = 0
    if left is not None:
      K = left[0].shape[1]
      u_BCD = jnp.concatenate([left[0], u_BCD], axis=1)
      valid_BC = jnp.concatenate([left[1], valid_BC], axis=1)

    def run(kernel, inputs, state):
      inputs = jax.tree.map(lambda x: x[:, K:], inputs)
      out, state = kernel.finish(kernel.prepare(inputs), state)
      out = speak(out, lambda states: kernel.read(inputs, states)).astype(out.dtype)
      return jnp.pad(out, ((0, 0), (K, 0), *[(0, 0)] * (out.ndim - 2))), state

    context, _ = place_tokens(valid_BC, None, None, None, valid_BC)
    y, state = self.mixer(u_BCD, self.mixer.init_state(len(u_BCD)), context, run)
    return y[:, K:], state[0]
