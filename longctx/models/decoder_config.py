"""What a decoder is: every size and choice, checked, and its costs in closed form.

Held by: tests/test_decoder.py, tests/test_models.py (counts), tests/test_hlo.py (arithmetic).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from longctx.attention import IMPLEMENTATIONS
from longctx.errors import check, check_choice, check_range
from longctx.models.facts import LayerFacts
from longctx.models.layers import DTYPES
from longctx.models.mixers import MIXERS
from longctx.models.mixers.base import Cost, Settings

LAYER_INPUT = 'layer input'
REMAT = {
    'none': None,                                                     # keep every activation
    'full': jax.checkpoint_policies.nothing_saveable,                 # keep layer inputs only
    'dots': jax.checkpoint_policies.dots_saveable,                    # keep matrix products
    'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(   # inputs, on the host
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src='device', offload_dst='pinned_host'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Shape and arithmetic of a decoder. 0 means: derived (see `resolved`)."""

  name: str = 'decoder'
  vocab_size: int = 0           # 0: the tokenizer's
  max_length: int = 2048        # longest context, in tokens, that the model is made for
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 0         # 0: num_heads
  head_dim: int = 0             # 0: embed_dim / num_heads
  mlp: str = 'swiglu'           # swiglu | gelu | none
  mlp_dim: int = 0              # 0: 8/3 (swiglu) or 4 (gelu) times embed_dim, in multiples of 8
  mlp_block: int = 0            # tokens of each row of a device in the MLP at once; 0: all
  layers: tuple[str, ...] = ('attention',)   # per layer, repeated over the depth; or of MIXERS
  window: tuple[int, ...] = (0,)   # of attention, per layer, repeated; 0 sees everything
  position: str = 'rope'        # rope | learned | none
  rope_base: float = 10_000.0
  qk_norm: bool = False
  tied: bool = True
  dropout: float = 0.0
  norm_epsilon: float = 1e-6
  init_std: float = 0.02
  dtype: str = 'float32'        # of the arithmetic; parameters are float32
  attention: str = 'auto'
  mixer_heads: int = 0          # of recurrent mixers; 0: num_heads
  mixer_key_dim: int = 0        # a head's keys; 0 here and below: as published for the mixer
  mixer_value_dim: int = 0
  mixer_width: int = 0          # of element-wise recurrences
  mixer_conv: int = 4           # taps of the short convolution
  mixer_form: str = 'auto'      # auto | sequential | chunked | scan
  mixer_chunk: int = 0          # tokens of a chunk; 0: by platform
  mixer_negative: bool = False  # delta rules: beta in (0, 2), which can track states
  layer_loop: str = 'scan'      # scan | unrolled
  remat: str = 'none'

  def __post_init__(self):
    for name in ('num_layers', 'embed_dim', 'num_heads', 'max_length'):
      check_range(f'model.{name}', getattr(self, name), 1)
    for name in ('vocab_size', 'num_kv_heads', 'head_dim', 'mlp_dim', 'mlp_block', 'mixer_heads',
                 'mixer_key_dim', 'mixer_value_dim', 'mixer_width', 'mixer_chunk'):
      check_range(f'model.{name}', getattr(self, name), 0)
    check_choice('model.mlp', self.mlp, ('swiglu', 'gelu', 'none'))
    check_choice('model.position', self.position, ('rope', 'learned', 'none'))
    check_choice('model.dtype', self.dtype, DTYPES)
    check_choice('model.attention', self.attention, ('auto', *IMPLEMENTATIONS))
    check_range('model.mixer_conv', self.mixer_conv, 1)
    check_choice('model.mixer_form', self.mixer_form, ('auto', 'sequential', 'chunked', 'scan'))
    check(len(self.layers) >= 1, "model.layers=(): must name a mixer, as ('attention',)")
    for mixer in self.layers:
      check_choice('model.layers', mixer, ('attention', *MIXERS))
    check_choice('model.layer_loop', self.layer_loop, ('scan', 'unrolled'))
    check_choice('model.remat', self.remat, REMAT)
    check(0 <= self.dropout < 1, f'model.dropout={self.dropout}: must be at least 0 and below 1')
    check(self.rope_base > 1, f'model.rope_base={self.rope_base}: must be greater than 1')
    check(self.init_std > 0, f'model.init_std={self.init_std}: must be greater than 0')
    check(self.norm_epsilon > 0, f'model.norm_epsilon={self.norm_epsilon}: must be positive')
    check(self.head_dim or self.embed_dim % self.num_heads == 0,
          f'model.num_heads={self.num_heads}: must divide model.embed_dim={self.embed_dim}; '
          'or set model.head_dim')
    kv_heads = self.num_kv_heads or self.num_heads
    check(self.num_heads % kv_heads == 0,
          f'model.num_kv_heads={kv_heads}: must divide model.num_heads={self.num_heads}; '
          'each kv head serves an equal group')
    check(self.position != 'rope' or self.widths()['head_dim'] % 2 == 0,
          f'model.head_dim={self.widths()["head_dim"]}: must be even for rope positions')
    check(len(self.window) >= 1 and all(w >= 0 for w in self.window),
          f'model.window={self.window}: must be a tuple of at least one size >= 0, as (512, 0)')
    for name in ('window', 'layers'):
      pattern = getattr(self, name)
      check(self.num_layers % len(pattern) == 0,
            f'model.{name}={pattern}: its length must divide model.num_layers='
            f'{self.num_layers}; the pattern repeats over the layers')
    for name in ('key_dim', 'value_dim', 'width', 'conv', 'negative'):
      field, readers = f'mixer_{name}', [m for m in MIXERS if name in MIXERS[m].reads]
      default = type(self).__dataclass_fields__[field].default
      check(getattr(self, field) == default or set(readers) & set(self.layers),
            f'model.{field}={getattr(self, field)}: is read by {", ".join(readers)} only, none of which '
            f'is in model.layers={self.layers}; set model.{field}={default}')
    self.mixer_costs()   # refuses sizes that a mixer cannot have

  def widths(self) -> dict[str, int]:
    """The sizes that 0 leaves to be derived."""
    factor = 4.0 if self.mlp == 'gelu' else 8 / 3
    return dict(num_kv_heads=self.num_kv_heads or self.num_heads,
                head_dim=self.head_dim or self.embed_dim // self.num_heads,
                mlp_dim=self.mlp_dim or 8 * round(factor * self.embed_dim / 8))

  def resolved(self, vocab_size: int) -> 'Config':
    """This config with every derived size written out."""
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size, **self.widths())

  def pattern(self, count: int = 0) -> list[tuple[str, int]]:
    """(mixer, window) of each layer, or of the first `count`; the window of attention alone."""
    layers = [(self.layers[i % len(self.layers)], self.window[i % len(self.window)])
              for i in range(count or self.num_layers)]
    return [(mixer, window if mixer == 'attention' else 0) for mixer, window in layers]

  @property
  def period(self) -> int:
    """After so many layers the pattern begins anew."""
    return math.lcm(len(self.layers), len(self.window))

  def mixer_settings(self) -> Settings:
    return Settings(
        dim=self.embed_dim, num_heads=self.mixer_heads or self.num_heads,
        key_dim=self.mixer_key_dim, value_dim=self.mixer_value_dim, width=self.mixer_width,
        conv=self.mixer_conv, form=self.mixer_form, chunk=self.mixer_chunk,
        negative=self.mixer_negative, num_layers=self.num_layers,
        norm_epsilon=self.norm_epsilon, std=self.init_std, out_std=self.out_std)

  @property
  def out_std(self) -> float:
    """Of what is added to the residual (GPT-2)."""
    return self.init_std / math.sqrt(2 * self.num_layers)

  def mixer_costs(self) -> dict[str, Cost]:
    """The closed forms of the recurrent mixers among the layers."""
    settings = self.mixer_settings()
    return {name: MIXERS[name].cost(settings) for name in dict.fromkeys(self.layers)
            if name != 'attention'}

  def mlp_matrices(self) -> int:
    count = {'swiglu': 3, 'gelu': 2, 'none': 0}[self.mlp]
    return count * self.embed_dim * self.widths()['mlp_dim']

  def attention_matrices(self) -> int:
    w = self.widths()
    return 2 * self.embed_dim * w['head_dim'] * (self.num_heads + w['num_kv_heads'])

  def layer_matrices(self, mixer: str = 'attention') -> int:
    """Weights of one layer that multiply every token: the mixer's and the MLP's."""
    own = (self.attention_matrices() if mixer == 'attention' else
           self.mixer_costs()[mixer].matrices)
    return own + self.mlp_matrices()

  def layer_facts(self, length: int) -> list[LayerFacts]:
    """Of each layer, in rows of `length` tokens; caches count their index as one number a slot."""
    costs, keys = self.mixer_costs(), self.mean_keys(length)
    w = self.widths()
    slot = 2 * w['num_kv_heads'] * w['head_dim'] + 1
    norms = self.embed_dim * (1 if self.mlp == 'none' else 2)

    def facts(mixer: str, window: int) -> LayerFacts:
      if mixer == 'attention':
        own = self.attention_matrices() + (2 * w['head_dim'] if self.qk_norm else 0)
        forward = (2 * self.layer_matrices()
                   + 4 * self.num_heads * w['head_dim'] * keys[window])
        return LayerFacts(f'attention, {window}' if window else 'attention', 'P0',
                          own + self.mlp_matrices() + norms, forward,
                          state=(window - 1) * slot if window else 0, grows=0 if window else slot)
      cost = costs[mixer]
      return LayerFacts(mixer, MIXERS[mixer].dependency,
                        cost.parameters + self.mlp_matrices() + norms,
                        2 * self.layer_matrices(mixer) + cost.flops, cost.state)

    return [facts(*kind) for kind in self.pattern()]

  def num_parameters(self) -> int:
    """Closed form of the parameter count (needs vocab_size)."""
    attention = self.attention_matrices() + (2 * self.widths()['head_dim'] if self.qk_norm else 0)
    costs = self.mixer_costs()
    norms = self.embed_dim * (1 if self.mlp == 'none' else 2)
    tables = self.vocab_size * self.embed_dim * (1 if self.tied else 2)
    learned = self.max_length * self.embed_dim if self.position == 'learned' else 0
    return tables + learned + self.embed_dim + sum(
        (attention if mixer == 'attention' else costs[mixer].parameters)
        + self.mlp_matrices() + norms for mixer, _ in self.pattern())

  @property
  def windows(self) -> tuple[int, ...]:
    """The different windows among the attention layers."""
    return tuple(sorted({window for mixer, window in self.pattern() if mixer == 'attention'}))

  def mean_keys(self, length: int) -> dict[int, float]:
    """window -> keys that a query sees on average, in rows of one document of `length` tokens."""
    seen = {w: min(w or length, length) for w in self.windows}   # by the row's last query
    return {w: n - n * (n - 1) / (2 * length) for w, n in seen.items()}

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward per token of a row of `length` tokens, 2 a multiply-add.

    `mean_keys`: window -> keys that a query sees on average through it; None counts `length` for
    every query (the full convention of PaLM, arXiv:2204.02311 appendix B).
    """
    width = self.num_heads * self.widths()['head_dim']
    costs = self.mixer_costs()
    forward = 2 * self.vocab_size * self.embed_dim
    for mixer, window in self.pattern():
      forward += 2 * self.layer_matrices(mixer)
      if mixer == 'attention':
        forward += 4 * width * (length if mean_keys is None else mean_keys[window])
      else:
        forward += costs[mixer].flops
    return 3.0 * forward
