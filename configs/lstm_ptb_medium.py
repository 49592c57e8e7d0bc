"""Zaremba's medium LSTM for the Penn Treebank: two layers of 650, dropout 0.5, SGD, 20 rows of 35.

Source:   Zaremba et al. 2014, arXiv:1409.2329: perplexity 86.2 valid, 82.7 test, of words. Their loss
          is the sum over 35 steps, ours the mean: so the rate is 35 times theirs, the clipping a 35th.
          An epoch is 1,327 steps; after six the rate falls by 1.2 in each. Differs: no bias at the
          output, one bias a gate; subwords, with bytes for what they do not know, instead of words.
Command:  python -m longctx.main --config=configs/lstm_ptb_medium.py --workdir=runs/ptb
          after python -m longctx.train_tokenizer --config=configs/lstm_ptb_medium.py
          --vocab_size=10000 --output=ptb.model; with --config.data.tokenizer=ptb.model (without it
          the model reads bytes), and --config.data.files=PATH where the text lies elsewhere
Debug:    python -m longctx.main --config=configs/lstm_ptb_medium.py:debug --workdir=runs/debug
"""

from longctx.configuration import base, check_variant

EPOCH = 1327


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('lstm')
  config.data.corpus = 'files'
  config.data.files = '../shared/data/ptb.train.txt'
  config.data.split = 'contiguous'
  config.data.form = 'segments'
  config.data.length = 35
  config.data.batch_size = 20
  config.model.vocab_size = 10_000
  config.model.embed_dim = config.model.hidden_dim = 650
  config.model.dropout = 0.5
  config.model.init_uniform = 0.05
  config.model.forget_bias = 0.0
  config.optimizer.name = 'sgd'
  config.optimizer.momentum = config.optimizer.weight_decay = 0.0
  config.optimizer.learning_rate = 1.0 * 35
  config.optimizer.clip_norm = 5.0 / 35
  config.optimizer.schedule = 'staircase'
  config.optimizer.decay_start = 5 * EPOCH
  config.optimizer.decay_every = EPOCH
  config.optimizer.decay_factor = 1 / 1.2
  config.run.num_steps = 39 * EPOCH
  config.run.log_every = 100
  config.run.eval_every = config.run.checkpoint_every = EPOCH
  config.perplexity.modes = ('full',)
  if variant == 'debug':
    config.data.corpus, config.data.files, config.data.split = 'stdlib', '', 'hash'
    config.model.vocab_size = 0
    config.model.embed_dim = config.model.hidden_dim = 32
    config.optimizer.decay_start, config.optimizer.decay_every = 10, 2
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.eval_every = config.run.checkpoint_every = 10
    config.perplexity.max_tokens = 4096
    config.perplexity.segment = 64
  return config
