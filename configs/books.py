"""A transformer with windowed and full layers on a folder of books, whole books held out.

Command:  python -m longctx.main --config=configs/books.py --workdir=runs/books
          with --config.data.files='GLOB' where the books lie elsewhere
Debug:    python -m longctx.main --config=configs/books.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.corpus = 'files'
  config.data.files = '../shared/data/books/*.txt'
  config.data.validation_fraction = 0.15
  config.data.test_fraction = 0.1
  config.data.length = config.model.max_length = 2048
  config.data.batch_size = 4
  config.model.num_layers = 6
  config.model.embed_dim = 192
  config.model.num_heads = 6
  config.model.num_kv_heads = 3
  config.model.qk_norm = True
  config.model.window = (256, 256, 0)
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.ema = 0.999
  config.mesh.layout = 'single'
  config.run.num_steps = 2000
  config.run.log_every = 20
  config.run.eval_every = 500
  config.run.checkpoint_every = 250
  config.perplexity.max_tokens = 262_144
  config.perplexity.segment = 512
  config.perplexity.use_ema = True
  if variant == 'debug':
    config.data.length = config.model.max_length = 128
    config.model.num_layers = 2
    config.model.embed_dim = 48
    config.model.window = (32, 0)
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.eval_every = 10
    config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 64
  return config
