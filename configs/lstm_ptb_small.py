"""A two-layer LSTM of embedding 256 and hidden 512, dropout 0.5, 10,000 symbols, Penn Treebank.

Command:  python -m longctx.main --config=configs/lstm_ptb_small.py --workdir=runs/ptb_small
          after python -m longctx.train_tokenizer --config=configs/lstm_ptb_small.py
          --vocab_size=10000 --output=ptb.model; with --config.data.tokenizer=ptb.model (without it
          the model reads bytes), and --config.data.files=PATH where the text lies elsewhere
Debug:    python -m longctx.main --config=configs/lstm_ptb_small.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('lstm')
  config.data.corpus = 'files'
  config.data.files = '../shared/data/ptb.train.txt'
  config.data.split = 'contiguous'
  config.data.form = 'segments'
  config.data.length = 64
  config.data.batch_size = 32
  config.model.vocab_size = 10_000
  config.model.num_layers = 2
  config.model.embed_dim = 256
  config.model.hidden_dim = 512
  config.model.dropout = 0.5
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.clip_norm = 0.5
  config.run.num_steps = 10_000
  config.run.log_every = 50
  config.run.eval_every = config.run.checkpoint_every = 1000
  config.perplexity.modes = ('full',)
  if variant == 'debug':
    config.data.corpus, config.data.files, config.data.split = 'stdlib', '', 'hash'
    config.model.vocab_size = 0
    config.model.embed_dim = config.model.hidden_dim = 32
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.eval_every = config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 64
  return config
