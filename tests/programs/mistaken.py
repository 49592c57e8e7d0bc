"""The config that tests/test_mistakes.py gets wrong: its numbers stand in what the tests expect."""

from longctx.configuration import base


def get_config():
  config = base('decoder')
  config.data.length = config.model.max_length = 64
  config.data.batch_size = 8
  config.model.num_layers = 1
  config.model.embed_dim = 32
  config.model.num_heads = 4
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 3e-3
  config.run.num_steps = 20
  config.run.log_every = 5
  config.run.checkpoint_every = 10
  config.perplexity.segment = 64
  return config
