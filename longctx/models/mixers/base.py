"""What every recurrent token mixer of a decoder is given, and what it says of itself.

    mixer = Mixer(settings, rngs=rngs)
    state = mixer.init_state(batch_size)            float32 arrays, batch first
    y_BTD, state = mixer(x_BTD, state, context)     any T; context: models/context.py

The first field of a state is what the recurrence itself carries, the others are inputs that convolutions
saw last. A fourth argument, `run`, runs the recurrence in the place of parallel/state_scan.over_sequence: a
memory that keeps states of the past lets them speak there (models/memories/cached_mixer.py).

Class attributes: `dependency` (P0: its tokens are computed side by side, so the sequence may be cut
over devices; P2: one after the other), `reads` (the settings of its sizes and of its rule that it
looks at). Static method `cost(settings)`: parameters, arithmetic and
state in closed form. The table is MIXERS in longctx/models/mixers/__init__.py.
Held by: tests/test_mixer_laws.py, tests/test_models.py (every law), tests/test_mixers.py (published
layers).
"""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the model's config says of its mixers; 0: as published for the mixer."""

  dim: int
  num_heads: int
  key_dim: int = 0
  value_dim: int = 0
  width: int = 0               # of element-wise recurrences
  conv: int = 4                # width of the short causal convolution; 1: none
  form: str = 'auto'           # auto | sequential | chunked | scan
  chunk: int = 0               # tokens of a chunk; 0: by platform
  negative: bool = False       # delta rules: beta in (0, 2) instead of (0, 1)
  num_layers: int = 1
  norm_epsilon: float = 1e-6
  std: float = 0.02
  out_std: float = 0.02        # of the projection back into the residual


class Cost(NamedTuple):
  """Closed form of one layer. Floats and FLOPs of a row or a token; 2 FLOPs a multiply-add."""

  parameters: int
  matrices: int            # parameters that multiply every token: 2 FLOPs each
  flops: float             # of a token, forward, besides the matrices, at the chunk that is used
  state: int               # floats of state of a row, convolution included
  # float32 numbers (of 4 bytes) of the map that a device sends for a row, forward, to each other
  # device of `seq`. Without the convolution's halo: (W - 1) inputs, in the compute type, to one.
  wire: int
  tail: int                # of `state`, the inputs that convolutions saw last
