"""What a decoder with a segment memory is: every size and choice, checked, and its costs.

Held by: tests/test_models.py (counts), tests/test_memory_laws.py (state), tests/test_mistakes.py.
"""

import dataclasses
import math
from collections.abc import Mapping

from longctx.attention import IMPLEMENTATIONS
from longctx.errors import check, check_choice, check_range
from longctx.models.decoder_config import REMAT
from longctx.models.facts import LayerFacts
from longctx.models.layers import DTYPES
from longctx.models.memories import MEMORIES
from longctx.models.memories.base import NO_COST, Cost, Settings

SCHEDULES = ('auto', 'sequential', 'parallel', 'wavefront')
# What the config calls the fields of Settings that mean something to some memories alone.
OWN = ('variant', 'tokens', 'size', 'width', 'depth', 'chunk', 'rate', 'top')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Shape and arithmetic of a decoder with a segment memory. 0 and '': derived, or as published."""

  name: str = 'memory'
  vocab_size: int = 0           # 0: the tokenizer's
  max_length: int = 0           # 0: no limit; the state does not grow
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 0         # 0: num_heads
  head_dim: int = 0             # 0: embed_dim / num_heads
  mlp: str = 'swiglu'           # swiglu | gelu | none
  mlp_dim: int = 0
  segment: int = 256            # tokens that are read at once
  short_term: int = 0           # tokens before the segment kept exactly (Transformer-XL)
  long_term: str = 'none'       # none, or one of models/memories
  memory_layers: tuple[int, ...] = ()   # which layers have the long-term memory; (): all
  memory_variant: str = ''      # what these mean says the memory's file; '' and 0: as published
  memory_tokens: int = 0
  memory_size: int = 0
  memory_width: int = 0
  memory_depth: int = 0
  memory_chunk: int = 0
  memory_rate: float = 0.0
  memory_top: int = 0
  gate: str = 'sigmoid'         # of a memory read by heads: sigmoid | tanh (closed at first); of one that is
                                #   added to attention: none | tanh
  schedule: str = 'auto'        # of whole rows: auto | sequential | parallel | wavefront
  truncate: int = 0             # segments that gradients go back through; 0: all of a call
  position: str = 'rope'        # rope | relative (Transformer-XL's) | none
  rope_base: float = 10_000.0
  qk_norm: bool = False
  tied: bool = True
  dropout: float = 0.0
  norm_epsilon: float = 1e-6
  init_std: float = 0.02
  dtype: str = 'float32'        # of the arithmetic; parameters and sums that are kept are float32
  attention: str = 'auto'
  remat: str = 'full'           # of a segment: none | full | dots | dots_no_batch

  def __post_init__(self):
    for name in ('num_layers', 'embed_dim', 'num_heads', 'segment'):
      check_range(f'model.{name}', getattr(self, name), 1)
    for name in ('vocab_size', 'max_length', 'num_kv_heads', 'head_dim', 'mlp_dim', 'short_term',
                 'truncate', *(f'memory_{n}' for n in OWN if n != 'variant')):
      check_range(f'model.{name}', getattr(self, name), 0)
    check_choice('model.mlp', self.mlp, ('swiglu', 'gelu', 'none'))
    check_choice('model.long_term', self.long_term, MEMORIES)
    check_choice('model.gate', self.gate, ('sigmoid', 'tanh'))
    check_choice('model.schedule', self.schedule, SCHEDULES)
    check_choice('model.position', self.position, ('rope', 'relative', 'none'))
    check_choice('model.dtype', self.dtype, DTYPES)
    check_choice('model.attention', self.attention, ('auto', *IMPLEMENTATIONS))
    check_choice('model.remat', self.remat, [r for r in REMAT if r != 'offload'])
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
    widths = self.widths()
    check(self.position != 'rope' or widths['head_dim'] % 2 == 0,
          f'model.head_dim={widths["head_dim"]}: must be even for rope positions')
    check(self.position != 'relative' or self.embed_dim % 2 == 0,
          f'model.embed_dim={self.embed_dim}: must be even for relative positions')
    for layer in self.memory_layers:
      check(0 <= layer < self.num_layers, f'model.memory_layers={self.memory_layers}: must be layers '
            f'from 0 to {self.num_layers - 1}')
    check(not self.memory_layers or self.long_term != 'none', f'model.memory_layers='
          f"{self.memory_layers}: is not read with model.long_term='none'; name a memory there")
    self._check_own()
    front, _ = MEMORIES[self.long_term].extra_tokens(self.settings())
    check(not front or not self.memory_layers, f'model.memory_layers={self.memory_layers}: is not read '
          f'with model.long_term={self.long_term!r}, whose tokens pass through all layers; leave it out')
    kind, schedule = MEMORIES[self.long_term], self.schedule
    check(schedule != 'parallel' or kind.dependency in ('P0', 'P1'), f'model.schedule={schedule!r}: '
          f'{self.long_term} needs each segment before the next (dependency class {kind.dependency}); '
          f"set model.schedule='auto'")
    check(schedule != 'wavefront' or (kind.dependency == 'P2' and len(self.kinds()) == 1),
          f'model.schedule={schedule!r}: serves memories of dependency class P2 that all layers have, '
          f"not {self.long_term} ({kind.dependency}); set model.schedule='auto'")
    self.memory_cost()   # refuses sizes that a memory cannot have

  def _check_own(self) -> None:
    reads = MEMORIES[self.long_term].reads
    for name in OWN:
      value = getattr(self, f'memory_{name}')
      readers = ', '.join(m for m, kind in MEMORIES.items() if name in kind.reads)
      check(not value or name in reads, f'model.memory_{name}={value!r}: is not read with '
            f'model.long_term={self.long_term!r}, but with {readers or "no memory"}')
    gated = [m for m, kind in MEMORIES.items() if 'gate' in kind.reads]
    check(self.gate == 'sigmoid' or self.long_term in gated, f'model.gate={self.gate!r}: is not read '
          f"with model.long_term={self.long_term!r}, but with {', '.join(gated)}; set model.gate='sigmoid'")

  def widths(self) -> dict[str, int]:
    """The sizes that 0 leaves to be derived."""
    factor = 4.0 if self.mlp == 'gelu' else 8 / 3
    return dict(num_kv_heads=self.num_kv_heads or self.num_heads,
                head_dim=self.head_dim or self.embed_dim // self.num_heads,
                mlp_dim=self.mlp_dim or 8 * round(factor * self.embed_dim / 8))

  def resolved(self, vocab_size: int) -> 'Config':
    """This config with every derived size written out."""
    return dataclasses.replace(self, vocab_size=self.vocab_size or vocab_size, **self.widths())

  def settings(self) -> Settings:
    return Settings(
        dim=self.embed_dim, num_heads=self.num_heads, segment=self.segment,
        short_term=self.short_term, position=self.position, rope_base=self.rope_base,
        qk_norm=self.qk_norm, mlp=self.mlp, num_layers=self.num_layers, dropout=self.dropout,
        norm_epsilon=self.norm_epsilon, std=self.init_std, out_std=self.out_std, dtype=self.dtype,
        attention=self.attention, gate=self.gate,
        **{name: getattr(self, f'memory_{name}') for name in OWN}, **self.widths())

  @property
  def out_std(self) -> float:
    """Of what is added to the residual (GPT-2)."""
    return self.init_std / math.sqrt(2 * self.num_layers)

  def kind(self, layer: int) -> str:
    """The memory of a layer: long_term, or 'none'."""
    return self.long_term if not self.memory_layers or layer in self.memory_layers else 'none'

  def kinds(self) -> set[str]:
    return {self.kind(i) for i in range(self.num_layers)}

  def memory_cost(self) -> Cost:
    return MEMORIES[self.long_term].cost(self.settings())

  def layer_matrices(self, attends: bool = True) -> int:
    """Weights of a layer besides its memory that multiply every token."""
    w = self.widths()
    return (attends * 2 * self.embed_dim * w['head_dim'] * (self.num_heads + w['num_kv_heads'])
            + {'swiglu': 3, 'gelu': 2, 'none': 0}[self.mlp] * self.embed_dim * w['mlp_dim'])

  def layer_parameters(self, attends: bool = True) -> int:
    """Of a layer besides its memory."""
    w, D = self.widths(), self.embed_dim
    relative = (2 + D) * self.num_heads * w['head_dim'] if self.position == 'relative' else 0
    return (self.layer_matrices(attends) + D * (1 if self.mlp == 'none' else 2)
            + (2 * w['head_dim'] if self.qk_norm else 0) + relative)

  def layer_facts(self, length: int) -> list[LayerFacts]:
    """Of each layer, in rows of `length` tokens."""
    own, w = self.memory_cost(), self.widths()
    segment = min(length, self.segment)
    front, back = MEMORIES[self.long_term].extra_tokens(self.settings())
    # Of a segment's extra tokens too: they pass through every layer beside its own.
    more = 1 + (front + back) / segment
    keys = (segment + 1) / 2 + front + min(self.short_term, max(0, length - segment))
    forward = lambda attends: more * (2 * self.layer_matrices(attends)
                                      + attends * 4 * self.num_heads * w['head_dim'] * keys)
    past = self.short_term * self.embed_dim + (1 if self.short_term else 0)

    def facts(kind: str, carried: int) -> LayerFacts:
      cost = NO_COST if kind == 'none' else own
      return LayerFacts(self.layer_name(kind), MEMORIES[kind].dependency,
                        self.layer_parameters(cost.attends) + cost.parameters,
                        forward(cost.attends)
                        + 2 * cost.matrices + cost.flops, past + cost.state + carried)
    # What memory tokens say in the last layer is kept for the first.
    return [facts(self.kind(i), 0 if i else front * self.embed_dim) for i in range(self.num_layers)]

  def layer_name(self, kind: str) -> str:
    """With a window, also what is written into the long-term memory."""
    name = 'attention' if kind == 'none' else kind
    if not self.short_term:
      return name
    if kind != 'none':
      name += ' of what falls out' if MEMORIES[kind].falls else ' of each segment'
    return f'{name}, {self.short_term} kept'

  def num_parameters(self) -> int:
    """Closed form of the parameter count (needs vocab_size)."""
    tables = self.vocab_size * self.embed_dim * (1 if self.tied else 2)
    front, back = MEMORIES[self.long_term].extra_tokens(self.settings())
    return (tables + self.embed_dim + max(front, back) * self.embed_dim
            + sum(f.parameters for f in self.layer_facts(self.segment)))

  windows = ()   # no layer's keys are counted by its window

  def mean_keys(self, length: int) -> dict[int, float]:
    del length
    return {}

  def flops_per_token(self, length: int, mean_keys: Mapping[int, float] | None = None) -> float:
    """FLOPs of forward and backward per token of a row of `length` tokens, 2 a multiply-add."""
    del mean_keys
    forward = 2 * self.vocab_size * self.embed_dim + sum(f.flops for f in self.layer_facts(length))
    return 3.0 * forward
