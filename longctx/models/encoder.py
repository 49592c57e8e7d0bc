"""An encoder: every token sees its whole document; guesses masked tokens, or says a document's class.

Trained as BERT is (15 % of the tokens are to be guessed; longctx/data/masking.py). As a classifier,
with model.num_classes, the hidden vector of a document's first token, the separator, meets a table of
classes: the loss of a token is then that of a class. `Layers` is the stack without the tables, which an
encoder-decoder has too.
Source: Devlin et al. 2018, arXiv:1810.04805. Differs: a norm before each layer's half and none after
(RMSNorm, no bias), no segment embedding, no next-sentence loss, no further layer before either table;
positions as configured (BERT's own: 'learned').
Held by: tests/test_encoder.py.

B batch  T tokens  D model  V vocab  C classes
"""

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.models import stack
from longctx.models.context import Context, place_tokens
from longctx.models.encoder_config import Config, Transformer
from longctx.models.layers import DTYPES, Embedding, RMSNorm, dropout, normal, param
from longctx.models.positions import Positions


class Layers(nnx.Module):
  """Positions, layers that see both ways, and a last norm: x_BTD = layers(x_BTD, context, key)."""

  def __init__(self, config: Transformer, num_layers: int, length: int, *, rngs: nnx.Rngs):
    self.config = config.layers_config(num_layers)
    self.positions = Positions(config, length=length, both_ways=True, rngs=rngs)
    self.blocks = stack.new_blocks(self.config, stack.Block, rngs)
    self.norm = RMSNorm(config.embed_dim, config.norm_epsilon, rngs=rngs)

  def __call__(self, x_BTD: jax.Array, context: Context, key: jax.Array | None) -> jax.Array:
    x_BTD, context = self.positions(x_BTD, context.both_ways())
    key, first = (None, None) if key is None else jax.random.split(key)
    x_BTD = dropout(x_BTD, self.config.dropout, first)
    return self.norm(stack.run(self.config, self.blocks, x_BTD, None, context, key)[0])


class Encoder(nnx.Module):
  """hidden, None = encoder(tokens, None, ...); logits = encoder.logits(hidden)."""

  state_grows = False

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    config = self.config = config.resolved(config.vocab_size)
    self.embedding = Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs)
    self.layers = Layers(config, config.num_layers, config.max_length, rngs=rngs)
    # Of classes there are few: they are cut over no axis, and so have no meaning by which to.
    self.classes = (param(rngs, normal(config.init_std), (config.num_classes, config.embed_dim),
                          (None, 'embed')) if config.num_classes else None)
    self.head = (None if config.tied else
                 Embedding(config.vocab_size, config.embed_dim, config.init_std, rngs=rngs))

  def init_state(self, batch_size: int, capacity: int = 0) -> tuple[()]:
    """Nothing: a document is read in one call."""
    del batch_size, capacity
    return ()

  def __call__(self, tokens_BT: jax.Array, state: None = None, *,
               positions_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
               valid_BT: jax.Array | None = None, dropout_key: jax.Array | None = None
               ) -> tuple[jax.Array, None]:
    """Hidden states [B, T, D] in the compute type; padding may stand anywhere."""
    if state is not None:
      raise ValueError('an encoder reads a document in one call: state must be None')
    context, _ = place_tokens(tokens_BT, None, positions_BT, segment_ids_BT, valid_BT)
    x_BTD = self.embedding(tokens_BT, DTYPES[self.config.dtype])
    return self.layers(x_BTD, context, dropout_key), None

  def output_embedding_VD(self) -> jax.Array:
    """[C, D] of a classifier."""
    if self.classes is not None:
      return self.classes.get_value()
    return (self.embedding if self.head is None else self.head).table.get_value()

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """float32 logits [B, T, V], of a classifier [B, T, C]."""
    table = self.output_embedding_VD().astype(hidden_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, table, preferred_element_type=jnp.float32)
