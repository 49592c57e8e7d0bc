"""A decoder with a segment memory on a folder of books: Infini-attention, or another by one flag.

Segments of 512 bytes; a row carries a book on from step to step, gradients go back through four segments. A book
begins a row, so that all segments of a row are read at once where the memory allows it.
Whole held-out books are read from their first byte, however long.

Source:   Munkhdalai et al. 2024, arXiv:2404.07143 (the memory; widths are a small CPU's).
Command:  python -m longctx.main --config=configs/books_memory.py --workdir=runs/books_memory
          with --config.data.files='GLOB' where the books lie elsewhere
          no memory:       --config.model.long_term=none
          Transformer-XL:  --config.model.long_term=none --config.model.short_term=512
Expected: after 400 steps 2.38 bits per byte with Infini, 2.29 without a memory (experiments/03_memories)
Last checked: 72e9460
Debug:    python -m longctx.main --config=configs/books_memory.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('memory')
  config.data.corpus = 'files'
  config.data.files = '../shared/data/books/*.txt'
  config.data.validation_fraction = 0.3   # five of the sixteen
  config.data.test_fraction = 0.1
  config.data.form = 'segments'
  config.data.align = True
  config.data.length = 2048
  config.data.batch_size = 2
  config.model.num_layers = 6
  config.model.embed_dim = 192
  config.model.num_heads = 6
  config.model.segment = 512
  config.model.long_term = 'infini'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 50
  config.optimizer.gate_rate = 30.0   # gates begin half open and would hardly move in so few steps
  config.mesh.layout = 'single'
  config.run.num_steps = 600
  config.run.log_every = 20
  config.run.checkpoint_every = 200
  config.perplexity.modes = ('full',)
  config.perplexity.max_tokens = 600_000   # a book and the begin of another, side by side
  config.perplexity.segment = 2048
  config.perplexity.batch_size = 2
  if variant == 'debug':
    config.data.corpus, config.data.files = 'stdlib', ''
    config.data.length = 64
    config.model.num_layers = 2
    config.model.embed_dim = 48
    config.model.num_heads = 2
    config.model.segment = 16
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 64
  return config
