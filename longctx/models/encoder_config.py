"""What an encoder and an encoder-decoder are: sizes and choices, checked, and costs in closed form.

The layers are those of the decoder, so their sizes are checked and counted by its config.
Held by: tests/test_encoder_decoder.py, tests/test_encoder.py (counts against the models).
"""

import dataclasses
from collections.abc import Mapping

from longctx.errors import check, check_choice, check_range
from longctx.models import decoder_config, positions
from longctx.models.facts import LayerFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
  """What both have; made as one of the two below. 0 means: derived (see `resolved`)."""

  name: str
  vocab_size: int = 0           # 0: the tokenizer's
  max_length: int = 512         # longest row of tokens, in an encoder-decoder of the target
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 0         # 0: num_heads
  head_dim: int = 0             # 0: embed_dim / num_heads
  mlp: str = 'swiglu'           # swiglu | gelu
  mlp_dim: int = 0              # 0: 8/3 (swiglu) or 4 (gelu) times embed_dim, in multiples of 8
  mlp_block: int = 0            # tokens of each row of a device in the MLP at once; 0: all
  position: str = 'rope'        # one of models/positions.py
  rope_base: float = 10_000.0
  position_buckets: int = 32    # of position='t5'
  position_distance: int = 128  # from here on one bucket holds all distances
  qk_norm: bool = False
  tied: bool = True
  dropout: float = 0.0
  norm_epsilon: float = 1e-6
  init_std: float = 0.02
  dtype: str = 'float32'        # of the arithmetic; parameters are float32
  attention: str = 'auto'
  layer_loop: str = 'scan'      # scan | unrolled
  remat: str = 'none'

  def __post_init__(self):
    check_choice('model.position', self.position, positions.KINDS)
    check_choice('model.mlp', self.mlp, ('swiglu', 'gelu'))
    check(self.position != 'sinusoidal' or self.embed_dim % 2 == 0,
          f"model.embed_dim={self.embed_dim}: must be even for model.position='sinusoidal', which "
          'has sines and cosines')
    check_range('model.position_buckets', self.position_buckets, 4)
    exact = self.position_buckets // 2   # of a decoder, whose distances have one sign
    check(self.position_distance > exact, f'model.position_distance={self.position_distance}: must be '
          f'greater than {exact}, half of model.position_buckets, which hold one distance each')
    self.layers_config()   # refuses what the layers cannot be

  def layers_config(self, num_layers: int = 0) -> decoder_config.Config:
    """Of a stack of its layers, as the decoder's config has it; positions are told apart."""
    names = {f.name for f in dataclasses.fields(decoder_config.Config)}
    same = {f.name: getattr(self, f.name) for f in dataclasses.fields(Transformer) if f.name in names}
    return decoder_config.Config(**same | dict(
        name='decoder', num_layers=num_layers or self.num_layers,
        position='rope' if self.position == 'rope' else 'none'))

  def widths(self) -> dict[str, int]:
    """The sizes that 0 leaves to be derived."""
    return self.layers_config().widths()

  windows = (0,)   # every layer sees all that it may

  def table_parameters(self) -> int:
    return self.vocab_size * self.embed_dim * (1 if self.tied else 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Transformer):
  """An encoder: every token sees its whole document."""

  name: str = 'encoder'
  num_classes: int = 0          # of documents; 0: it guesses tokens

  def __post_init__(self):
    super().__post_init__()
    check_choice('model.name', self.name, ('encoder',))
    check(self.num_classes == 0 or self.num_classes >= 2, f'model.num_classes={self.num_classes}: must '
          'be at least 2, or 0 for a model that guesses tokens')
    check(not self.num_classes or self.tied, 'model.tied=False: a classifier has no table of output '
          'tokens; set model.tied=True')

  def resolved(self, vocab_size: int) -> 'Config':
    """Every derived size written out; one symbol more than the tokenizer has, the mask."""
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size + 1, **self.widths())

  def layer_facts(self, length: int) -> list[LayerFacts]:
    """Of each layer, in documents of `length` tokens; nothing is kept between calls."""
    stack = self.layers_config()
    facts = stack.layer_facts(length)
    keys = stack.mean_keys(length)[0]
    both = 4 * self.num_heads * self.widths()['head_dim'] * (length - keys)   # what follows is seen too
    return [f._replace(name='attention, both ways', flops=f.flops + both, state=0, grows=0)
            for f in facts]

  def mean_keys(self, length: int) -> dict[int, float]:
    return {0: float(length)}

  def num_parameters(self) -> int:
    return (self.layers_config().num_parameters() + positions.num_parameters(self, self.max_length)
            + self.num_classes * self.embed_dim)

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward a token, 2 a multiply-add; every query sees `length` keys."""
    del mean_keys
    head = 2 * self.embed_dim * (self.num_classes or self.vocab_size)
    return 3.0 * (head + sum(f.flops for f in self.layer_facts(length)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(Transformer):
  """An encoder-decoder: it reads a source whole, and then writes the target."""

  name: str = 'encoder_decoder'
  encoder_layers: int = 0       # 0: num_layers, of the decoder
  source_length: int = 512      # longest source, in tokens

  def __post_init__(self):
    super().__post_init__()
    check_choice('model.name', self.name, ('encoder_decoder',))
    check_range('model.encoder_layers', self.encoder_layers, 0)
    check_range('model.source_length', self.source_length, 1)

  def resolved(self, vocab_size: int) -> 'PairConfig':
    """Every derived size written out."""
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size,
                               encoder_layers=self.encoder_layers or self.num_layers, **self.widths())

  def cross_parameters(self) -> int:
    """What a decoder's layer has besides: attention to the source, and its norms."""
    stack = self.layers_config()
    return (stack.attention_matrices() + self.embed_dim
            + (2 * self.widths()['head_dim'] if self.qk_norm else 0))

  def layer_facts(self, length: int) -> list[LayerFacts]:
    """Of the encoder's layers and then the decoder's, for targets of `length` tokens.

    FLOPs are those of a target token, for sources of source_length: the encoder reads the source once.
    """
    S, w, D = self.source_length, self.widths(), self.embed_dim
    stack = self.layers_config()
    scores = 4 * self.num_heads * w['head_dim']   # of a query and a key
    a_source_token = 2 * stack.layer_matrices() + scores * S
    keys = 4 * D * w['num_kv_heads'] * w['head_dim']   # of a source token, in each decoder layer
    queries = 4 * D * self.num_heads * w['head_dim']   # and the way out, of a target token
    slot = 2 * w['num_kv_heads'] * w['head_dim'] + 1
    own = stack.layer_facts(length)
    encoder = own[0]._replace(name='encoder', flops=a_source_token * S / length, state=0, grows=0)
    decoder = [f._replace(name='decoder, source', parameters=f.parameters + self.cross_parameters(),
                          flops=f.flops + queries + scores * S + keys * S / length, state=S * slot)
               for f in own]
    return [encoder] * (self.encoder_layers or self.num_layers) + decoder

  def mean_keys(self, length: int) -> dict[int, float]:
    """Of the decoder's attention to its own tokens."""
    return self.layers_config().mean_keys(length)

  def num_parameters(self) -> int:
    """Closed form of the parameter count (needs vocab_size)."""
    layers = sum(f.parameters for f in self.layer_facts(1))
    return (self.table_parameters() + layers + 2 * self.embed_dim
            + positions.num_parameters(self, self.source_length)
            + positions.num_parameters(self, self.max_length))

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward a target token, the source's share with it; 2 a multiply-add.

    `mean_keys`: of the decoder's own tokens; None counts `length` for every query.
    """
    stack, w = self.layers_config(), self.widths()
    seen = length if mean_keys is None else mean_keys[0]
    more = 4 * self.num_heads * w['head_dim'] * (seen - stack.mean_keys(length)[0])
    forward = (2 * self.vocab_size * self.embed_dim + self.num_layers * more
               + sum(f.flops for f in self.layer_facts(length)))
    return 3.0 * forward
