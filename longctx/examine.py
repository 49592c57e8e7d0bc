"""A workdir's checkpoint put to the tasks of its config's `eval` section.

Held by: tests/test_eval_tasks.py.
"""

import contextlib
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax

from longctx import assembly, files
from longctx.assembly import Assembly
from longctx.errors import ConfigError, check
from longctx.evaluation import again, report, tasks
from longctx.evaluation.subject import ModelSubject
from longctx.training import manifest, processes

LOCK_FILE = '.tasks.lock'
# Of a model's fields those that say how it learns, and change nothing that it answers.
LEARNS = ('dropout', 'init_std', 'init_uniform', 'remat', 'truncate')


def run(a: Assembly, config: Any, folder: str, checkpoint: str) -> None:
  """Answers what is not answered yet, and prints the table; W/tasks.jsonl, W/tasks.md and W/report.html."""
  e, use_ema = a.parts.eval, a.parts.perplexity.use_ema
  lengths = e.lengths or (a.parts.data.length,)
  check(a.parts.data.form in ('packed', 'segments'), f'eval.tasks={e.tasks}: are put to models that go on '
        f'from a text, and data.form={a.parts.data.form!r} trains another kind; set eval.tasks=()')
  tasks.check_lengths(e, lengths, a.model_config.max_length)
  with contextlib.ExitStack() as exits:
    processes.together(lambda: exits.enter_context(_alone(folder)))
    at, params = assembly.load_parameters(a, folder, use_ema=use_ema, checkpoint=checkpoint)
    subject = ModelSubject(a.graphdef, params, a.tokenizer, layout=a.layout, batch_size=e.batch_size,
                           segment=e.segment)
    again.keep(folder, config)
    told = processes.of_first(about(a, config, folder, at) if jax.process_index() == 0 else {})
    tasks.run(subject, e, folder, told, lengths=lengths)
    if jax.process_index() == 0:
      print(f'report: {report.write(folder)}', flush=True)


def _alone(folder: str) -> files.Lock:
  """Two that append to one file would tear each other's lines."""
  if jax.process_index() != 0:
    return files.Lock(None)
  try:
    return files.patiently(f'--workdir={folder}', files.hold, Path(folder) / LOCK_FILE)
  except files.HeldError as e:
    raise ConfigError(f'--workdir={folder}: another evaluation of tasks is still going there '
                      f'({e.holder}); wait for it or stop it') from None
  except (files.CannotLockError, OSError) as e:
    raise ConfigError(f'--workdir={folder}: cannot write there ({e}); give a folder that you may write '
                      'to') from e


def about(a: Assembly, config: Any, folder: str, at: int) -> dict[str, Any]:
  """What each line tells of the model: enough to know it again, and to make it again."""
  import longctx
  return dict(identity(a.model_config, folder, at, a.parts.perplexity.use_ema),
              tokenizer=a.tokenizer.fingerprint[:16], **again.about(folder, config),
              versions=dict(longctx=longctx.__version__, jax=jax.__version__), commit=again.commit())


def identity(model_config: Any, folder: str, at: int, use_ema: bool) -> dict[str, Any]:
  """Which parameters are read, and by what model."""
  sums = (Path(folder) / 'checkpoints' / str(at) / manifest.NAME).read_bytes()
  return dict(step=at, use_ema=use_ema, model=_model(model_config),
              checkpoint=hashlib.sha256(sums + str(use_ema).encode()).hexdigest()[:16])


def _model(config: Any) -> str:
  """The hash of how a model reads.

  A checkpoint may be read by one of another window or memory, where --allow_config_change says so.
  """
  fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in LEARNS}
  return hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:16]
