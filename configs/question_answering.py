"""A transformer of 0.2 million parameters on questions about documents.

Each row is some documents about invented towns, a question about one of them, and the answer, which alone is
learned (RULER's first question task on synthetic documents, longctx/data/tasks/ruler_questions.py). Towns and
facts are drawn anew for every row: an answer has to be read. A row holds one document, or two or three.
Command:  python -m longctx.main --config=configs/question_answering.py --workdir=runs/questions
Then:     python -m longctx.main --config=configs/question_answering.py --workdir=runs/questions --mode=eval \
          --config.eval.tasks=ruler_qa_1 --config.eval.samples=200
Debug:    python -m longctx.main --config=configs/question_answering.py:debug --workdir=runs/debug
Expected: 58 % of 200 answers right at 520 tokens (51 to 65 with 95 % confidence; guessing 4.5 %, without the documents
          4 %), some thirteen minutes of two cores. 21 % after 2,500 steps whose rate ended there: it was still learning.
          With more documents than it was trained on it does not read.
"""

from longctx.configuration import base, check_variant


def get_config(variant: str = ''):
  check_variant(variant)
  config = base('decoder')
  config.data.corpus = 'tasks'
  config.data.tasks = ('ruler_qa_1',)
  config.data.length = 520
  config.data.batch_size = 16
  config.model.max_length = 1024
  config.model.num_layers = 2
  config.model.embed_dim = 96
  config.model.num_heads = 3
  config.model.layer_loop = 'unrolled'
  config.optimizer.learning_rate = 1e-3   # at 2e-3 it answers in kind, and by guessing
  config.optimizer.warmup_steps = 50
  config.optimizer.beta2 = 0.98
  config.mesh.layout = 'single'
  config.run.num_steps = 4000
  config.run.log_every = 20
  config.run.checkpoint_every = 250
  config.run.keep_best = False   # held-out loss is of all the text, and the answers alone are learned
  config.perplexity.modes = ('full',)
  config.perplexity.length = 520
  config.eval.lengths = (520,)
  config.eval.batch_size = 32
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
