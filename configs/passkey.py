"""A transformer of 0.2 million parameters that finds a passkey; or a recurrent memory in its place.

Each row is one example of the task (five digits in repeated noise); its answer alone is learned.
Command:  python -m longctx.main --config=configs/passkey.py --workdir=runs/passkey
Then:     python -m longctx.main --config=configs/passkey.py --workdir=runs/passkey --mode=eval \
          --config.eval.tasks=passkey --config.eval.samples=1000 --config.eval.depths=10
Memory:   the same with --config=configs/passkey.py:memory, layers of DeltaNet (arXiv:2406.06484),
          --workdir=runs/memory and, of the second, --config.eval.lengths='(320,1280,5120)'
Debug:    python -m longctx.main --config=configs/passkey.py:debug --workdir=runs/debug
Expected: all of 300 passkeys at 320 tokens, nothing without their context, in four minutes of two cores. The loss
          stays at guessing for the first 250 steps or more. Memory, in some sixteen minutes of two cores:
          300 of 300 at 320 and at 1,280 tokens, 299 of 300 at 5,120, sixteen times what it was trained on.
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant, ('', 'memory', 'debug'))
  config = base('decoder')
  config.data.corpus = 'tasks'
  config.data.tasks = ('passkey',)
  config.data.length = 320
  config.data.batch_size = 16
  config.model.max_length = 512
  config.model.num_layers = 2
  config.model.embed_dim = 96
  config.model.num_heads = 3
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 50
  config.optimizer.beta2 = 0.99
  config.mesh.layout = 'single'
  config.run.num_steps = 1500
  config.run.log_every = 20
  config.run.checkpoint_every = 200
  config.run.keep_best = False   # held-out loss is of all the text, and the answers alone are learned
  config.perplexity.modes = ('full',)
  config.perplexity.length = 320
  config.eval.batch_size = 32
  if variant == 'memory':
    config.model.layers = ('delta_net',)
    config.model.max_length = 65_536
    config.model.embed_dim = 192
    config.model.num_heads = 2
    config.model.mixer_key_dim = 192   # wide keys: what is written later does less to what is there
    config.model.mixer_value_dim = 96
    config.data.task_lengths = (256, 288, 320)
    config.run.num_steps = 600
  if variant == 'debug':
    config.data.task_loss = 'all'   # so that a few steps show
    config.data.batch_size = 4
    config.model.num_layers = 1
    config.model.embed_dim = 24
    config.optimizer.warmup_steps = 5
    config.run.num_steps = 20
    config.run.log_every = 5
    config.run.checkpoint_every = 10
  return config
