"""A two-layer LSTM on the source of Python's standard library, in segments that carry its state.

Each row reads its document on from batch to batch; the state is reset where a document starts and
the gradient is cut at the segment's edge (truncated backpropagation through time).
Command:  python -m longctx.main --config=configs/lstm.py --workdir=runs/lstm
Debug:    python -m longctx.main --config=configs/lstm.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('lstm')
  config.data.form = 'segments'
  config.data.length = 128
  config.data.batch_size = 16
  config.model.num_layers = 2
  config.model.embed_dim = 128
  config.model.hidden_dim = 256
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50
  config.run.num_steps = 1000
  config.run.log_every = 20
  config.run.checkpoint_every = 250
  config.perplexity.max_tokens = 262_144
  config.perplexity.modes = ('full',)
  if variant == 'debug':
    config.data.length = 32
    config.data.batch_size = 8
    config.model.embed_dim = config.model.hidden_dim = 32
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 64
  return config
