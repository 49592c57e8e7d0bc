"""Recurrent Memory Transformer: what memory tokens say of a segment is read before the next.

  [_; y; mem'] = transformer([mem; x; mem])        mem: m vectors; at first learned, drawn as embeddings
  the next segment's mem = mem'

Read tokens stand before the segment and are seen by all of it; write tokens stand behind it, see all of
it, and are seen by none of it. What is carried is the model's output, after its last norm: the residual
itself would grow from segment to segment. The tokens are the model's (models/memory_decoder.py); the
layers are plain. short_term: its keys stand before the read tokens. What memory tokens say is said of the
segment they stand in, by all layers on its way up; so it is published with Transformer-XL's window too, and
there is no writing of what falls out of one.
memory_tokens: m (0: 10).
Can begin as the plain transformer: no. All tokens of a segment attend to the read tokens as to each other.
Source: Bulatov et al. 2022, arXiv:2207.06881, decoder; carried after the last norm as in the authors'
code for GPT-2.
Differs: rotary positions count the memory's tokens like others, and the write tokens stand behind a
whole segment wherever an unfinished one ends (what they say is dropped there).
Held by: tests/test_models.py, tests/test_rmt.py, tests/test_truncation.py.
"""

from longctx.models.memories.base import Block, Settings

TOKENS = 10


class RMT(Block):
  dependency = 'P3'
  reads = ('tokens',)
  falls = False

  @classmethod
  def identity(cls, settings: Settings) -> bool:
    return False

  @staticmethod
  def extra_tokens(settings: Settings) -> tuple[int, int]:
    m = settings.tokens or TOKENS
    return m, m
