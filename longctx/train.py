"""The run, top to bottom: a config and a workdir in, checkpoints, metrics and a table out.

Killing the process at any instant and starting the same command carries on from the last
checkpoint, with the same losses bit for bit on the same mesh: parameters, optimiser, carried
state, seeds and the position in the data are saved together.
Held by: tests/test_train.py, tests/test_faults.py, tests/test_distributed.py.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from longctx import assembly, examine, progress, retrofit
from longctx.assembly import Assembly
from longctx.data import stream
from longctx.errors import ConfigError, check
from longctx.evaluation import again, course, held_out, perplexity, publish, result
from longctx.parallel import mesh
from longctx.training import badput, divergence, optim, processes, step, watchdog, workdir
from longctx.training import metrics as metrics_lib
from longctx.training.backoff import Backoff
from longctx.training.checkpoint import Checkpoints

MODES = ('train', 'eval')
ASK_EVERY = 10.0  # seconds between two questions to all processes whether one was asked to stop
MAX_RETURNS = 3   # to one checkpoint, by run.rollback_after


def run(config: Any, folder: str, *, mode: str = 'train', allow_config_change: str = '',
        checkpoint: str = 'newest') -> int:
  """Trains, or evaluates a checkpoint of, the workdir `folder`; 1 where what it made is lost."""
  if mode == 'eval':
    return evaluate_workdir(config, folder, allow_config_change, checkpoint)
  with contextlib.ExitStack() as exits:
    agree = functools.partial(workdir.agree, folder, config, allow_config_change)
    # Whose file is not opened before the workdir is this run's alone.
    with watchdog.watch(badput.Ledger(folder, enabled=False), config.run.watchdog_seconds):
      a = processes.together(lambda: assembly.assemble(config))
      processes.together(lambda: exits.enter_context(workdir.lock(folder)))
      processes.together(lambda: agree(record=False))
    return Trainer(a, folder, exits, agree, functools.partial(_about, a, config, folder)).run()


def evaluate_workdir(config: Any, folder: str, allow_config_change: str = '',
                     checkpoint: str = 'newest') -> int:
  """--mode=eval: puts a checkpoint to tasks, or else scores held-out text; see examine, publish."""
  ledger = badput.Ledger(folder, enabled=False)   # W's is of its training
  with (watchdog.watch(ledger, config.run.watchdog_seconds), progress.told(ledger.tick),
        ledger.doing('evaluation')):
    workdir.load_config(folder)   # a workdir without a run is refused by name
    a = assembly.assemble(config)
    # Another window, base or split of the text would be scored without an error.
    workdir.agree(folder, config, allow_config_change, record=False,
                  free=workdir.EVALUATED)
    if a.parts.eval.tasks:
      examine.run(a, config, folder, checkpoint)
      return 0
    at, params = assembly.load_parameters(a, folder, use_ema=a.parts.perplexity.use_ema,
                                          checkpoint=checkpoint)
    documents = assembly.open_documents(a)
    main = jax.process_index() == 0
    about = _about(a, config, folder, at, documents) if main else {}
    kept = course.Course(folder, processes.of_first(_depends_on(a, about) if main else None))
    written = publish.publish(evaluate(a, params, documents, kept), folder, at, about)
    if written:
      kept.end()
    return 0 if written else 1


def _about(a: Assembly, config: Any, folder: str, at: int, documents: Any) -> dict[str, Any]:
  """What evaluation.json tells of the model and the text, to know them again; its config is kept."""
  again.keep(folder, config)
  return dict(examine.about(a, config, folder, at), content=documents.content)


def _depends_on(a: Assembly, about: dict[str, Any]) -> list:
  """All that an evaluation's sums depend on: the model, how it is read, and the text."""
  text = dataclasses.asdict(a.parts.data) | dict(batch_size=0)
  return [*(about[name] for name in ('checkpoint', 'model', 'tokenizer', 'content')), dataclasses.asdict(a.parts.perplexity),
          {name: str(value) for name, value in text.items()}]


def evaluate(a: Assembly, params: Any, documents: Any, kept: course.Course | None = None
             ) -> result.Result | held_out.Result:
  """Bits per byte of the held-out split by context position; of examples, how many are right."""
  if a.parts.data.form in held_out.FORMS:
    return held_out.evaluate(a.graphdef, params, documents, a.parts.data, a.tokenizer,
                             a.parts.perplexity, layout=a.layout, loss_chunk=a.parts.loss.chunk, kept=kept)
  return perplexity.evaluate(
      a.graphdef, params, documents, a.tokenizer, a.parts.perplexity,
      layout=a.layout, loss_chunk=a.parts.loss.chunk, kept=kept)


def jit_step(a: Assembly) -> Any:
  """The jitted update (state, batch) -> (state, scalars) that a run of `a` takes."""
  update = functools.partial(step.train_step, a.graphdef, a.tx, a.parts.loss,
                             a.parts.run.accumulate, a.parts.optimizer.ema,
                             aligned=a.parts.data.align and hasattr(a.model_config, 'segment'),
                             spike_sigmas=a.parts.run.spike_sigmas)
  shardings = jax.tree.map(lambda x: x.sharding, a.abstract)
  return jax.jit(mesh.under(a.layout, update), donate_argnums=0,
                 out_shardings=(shardings, a.layout.sharding()),
                 compiler_options=mesh.compiler_options(a.layout))


def shorter_rows(batch: stream.Batch, pieces: int) -> stream.Batch:
  """The same tokens, each row cut into so many: [B, T] -> [B * pieces, T / pieces]."""
  return {name: x.reshape(x.shape[0] * pieces, -1) for name, x in batch.items()}


class _StoppedError(Exception):
  """An evaluation that gives way to the end of the run."""


class Questions:
  """What the processes ask each other now and then, all at the same counts of what they do."""

  def __init__(self, at: int, most: int):
    self.most = most   # of what is counted, between two questions
    self.begin(at, time.monotonic())

  def begin(self, at: int, now: float) -> None:
    self.asked, self.next = (at, now), at

  def ask(self, at: int, *own: Callable[[float], bool]) -> list[bool]:
    """Whether it is so in any process; False where it is not time. Each of `own` is asked at a time."""
    if jax.process_count() > 1 and at < self.next:
      return [False] * len(own)
    now, (before, then) = time.monotonic(), self.asked
    *answers, seconds = zip(*processes.gather([*(one(now) for one in own), (now - then) / max(1, at - before)]))
    # The first process's seconds, so that all ask at the same count.
    self.begin(at, now)
    # Before anything was counted there is no pace.
    self.next += 1 if at == before else max(1, min(self.most, int(ASK_EVERY / max(seconds[0], 1e-3))))
    return list(map(any, answers))


class Trainer:
  """One run over one workdir; `run` is its only call."""

  def __init__(self, a: Assembly, folder: str, exits: contextlib.ExitStack, record: Callable[[], None],
               about: Callable[[int, Any], dict] | None = None):
    """`about`: (step, documents) -> what evaluation.json tells besides."""
    self.a, self.folder, self.exits, self.record, self.about = a, folder, exits, record, about
    self.stop = workdir.StopSignal()   # until the first step is done there is nothing to save, and a signal ends all
    self.config = a.parts.run
    self.main = jax.process_index() == 0
    self.progress: metrics_lib.Progress | None = None
    self.programs: dict[int, Any] = {}   # the update, by the segments of run.curriculum (0: all of a row)
    self.backoff = Backoff()
    self.returns: collections.Counter[int] = collections.Counter()   # {step: how often gone back to}
    self.questions = Questions(0, self.config.log_every)
    self.owes_evaluation = False   # of the step it begins with: the run was stopped in it
    self.tokens, self.trained = 0, 0.0   # since the last logged step; seconds of training until then

  # The state, and where it goes.

  def open(self, exits: contextlib.ExitStack) -> step.TrainState:
    """Opens what a run reads and writes, `exits` closes it; the state to begin with."""
    closing = lambda thing: exits.enter_context(contextlib.closing(thing))
    host, hosts = assembly.host_share(self.a)
    self.stream = closing(stream.open_stream(self.a.parts.data, seed=self.a.parts.seed,
                                             host_index=host, num_hosts=hosts, builders=assembly.builders()))
    self.documents = assembly.open_documents(self.a)
    self.checkpoints: Checkpoints = closing(
        assembly.open_checkpoints(self.a.parts, self.folder, read_only=False))
    assembly.check_fits(self.a)
    state = self.begin()
    # Not before: a config that cannot run must not be what the next run has to agree with.
    processes.together(self.record)
    done = int(state.step)
    self.ledger.begin(done)
    self.describe(state)
    self.writer = closing(metrics_lib.MetricsWriter(self.folder, enabled=self.main))
    self.writer.truncate_after(done)
    self.progress = closing(metrics_lib.Progress(self.config.num_steps, done, enabled=self.main))
    return state

  def begin(self) -> step.TrainState:
    """The newest readable checkpoint's state, or a fresh one."""
    restored = self.checkpoints.restore_newest(self.a.abstract)
    if restored is None:
      state = self.a.init()
      if not self.config.init_from:
        return state
      state, line = retrofit.begin_from(self.a, state, self.config.init_from)
      self.say(line)
      return state
    assembly.check_same_tokenizer(self.a.tokenizer, restored.meta)
    check(restored.step <= self.config.num_steps,
          f'run.num_steps={self.config.num_steps}: the workdir has already done '
          f'{restored.step} steps; give more, or another workdir')
    self.stream.restore(restored.stream_state)
    self.owes_evaluation = bool(restored.meta.get('owes_evaluation')) and self.evaluates(restored.step)
    self.say(f'resumed at step {restored.step} from {self.folder}/checkpoints')
    return restored.state

  def save(self, at: int, state: step.TrainState, found: Any = None) -> None:
    import longctx
    meta = dict(tokenizer=self.a.tokenizer.fingerprint, seed=self.a.parts.seed,
                versions=dict(longctx=longctx.__version__, jax=jax.__version__),
                owes_evaluation=self.owes_evaluation)
    scores = {} if found is None else {'validation_loss': found.loss}
    with self.ledger.doing('checkpoints'):
      # A checkpoint of this step without a score gives way to one with it.
      self.checkpoints.save(at, state, stream_state=self.stream.state(), meta=meta, metrics=scores,
                            force=found is not None)

  def save_at_last(self, at: int, state: step.TrainState, found: Any) -> None:
    """Returns when the last state is on disk, or has been refused for run.save_patience seconds."""
    deadline, delay = time.monotonic() + self.config.save_patience, 1.0
    while True:
      self.checkpoints.wait()
      self.tell_failures()
      left = deadline - time.monotonic()
      if processes.of_first(self.checkpoints.has(at) or left <= 0):
        return
      time.sleep(max(0.0, min(delay, left)))   # once more at the very end
      delay *= 2
      self.save(at, state, found)

  def say(self, line: str) -> None:
    if self.main:
      self.progress.say(line) if self.progress else print(line, flush=True)

  def tell_failures(self) -> None:
    """What went wrong with saving since the last call; all processes know the same of it."""
    for failure in self.checkpoints.poll():
      self.say(failure)
      self.ledger.count('failed_saves', why=failure)

  # The loop.

  def run(self) -> int:
    """0, or 1 where the last state or the result is not on disk."""
    self.ledger = badput.Ledger(self.folder, enabled=self.main)
    with watchdog.watch(self.ledger, self.config.watchdog_seconds), progress.told(self.ledger.tick):
      with contextlib.ExitStack() as exits:
        exits.callback(self.ledger.write)
        state = self.open(exits)
        state, done, found = self.loop(state, int(state.step))
      finished = done == self.config.num_steps and not self.owes_evaluation
      written = not finished or self.publish(done, found or self.evaluate(state))
      newest, saved = processes.of_first([self.checkpoints.newest() or 0, self.checkpoints.has(done)])
    lost = not saved
    self.ledger.write(finished=finished and not lost)
    self.say(self.ledger.table())
    if not finished or lost:
      why = 'lost' if finished else self.stop.name or 'another process was stopped'
      self.say(f'{why}: {f"step {done} could not be saved" if lost else f"saved step {done}"}; the '
               f'same command carries on from {f"step {newest}" if lost else "there"}')
    if lost or not written:
      return 1
    return 0 if finished else workdir.STOPPED

  def loop(self, state: step.TrainState, done: int):
    """(state, steps done, evaluation after the last step or None)."""
    c, ledger, found, waiting = self.config, self.ledger, None, None
    profiling = False
    alike = divergence.Comparison(self.a.abstract.params, self.a.layout) if c.check_hosts_every else None
    # While the step compiles.
    if done < c.num_steps:
      threading.Thread(target=_import_slow_packages, args=(self.main,), daemon=True).start()
    if self.owes_evaluation:
      found = self.score(done, state)
      self.save(done, state, found)
    self.questions.begin(done, time.monotonic())
    while done < c.num_steps:
      stop, save_again = self.asked(done)
      if save_again or stop:
        if alike:
          alike.check(done, state.params)
        self.save(done, state)
      if stop:
        break
      update, batch = self.prepare(state, done)
      ledger.turn('steps', hidden=waiting is not None and not waiting[1]['loss'].is_ready())
      if done == c.profile_start:
        jax.profiler.start_trace(f'{self.folder}/profile')
        profiling = True
      state, metrics = update(state, batch)
      done += 1
      ledger.reach(done)
      if profiling and done == c.profile_start + c.profile_steps:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        profiling = False
        self.say(f'profile: {self.folder}/profile')
      # The step before is looked at while this one computes.
      looked, waiting = [waiting] if waiting else [], (done, metrics)
      if self.first_step_seconds is None:
        jax.block_until_ready(metrics['loss'])
        ledger.stepped = True
        self.exits.enter_context(self.stop)
        self.first_step_seconds = metrics_lib.process_seconds()
        self.say(f'first step after {self.first_step_seconds:.1f} s')
      evaluates = self.evaluates(done)
      saves = done % c.checkpoint_every == 0 or (evaluates and c.keep_best) or done == c.num_steps
      if evaluates or saves:
        looked, waiting = [*looked, waiting], None
      too_bad = [at for at, scalars in looked if self.account(at, scalars) == c.rollback_after > 0]
      if too_bad and (back := self.roll_back(too_bad[0] - c.rollback_after, state)):
        state, waiting, done = back, None, int(back.step)
        continue
      if alike and (done % c.check_hosts_every == 0 or saves):   # none of other bits is saved
        alike.check(done, state.params)
      if evaluates or saves:
        found = self.score(done, state) if evaluates else None
        if alike and self.owes_evaluation and not saves:
          alike.check(done, state.params)
        if saves or self.owes_evaluation:
          self.save(done, state, found)
      self.tell_failures()
      if self.owes_evaluation:
        break
    if waiting is not None:
      self.account(*waiting)
    if profiling:
      jax.profiler.stop_trace()
    ledger.turn('checkpoints')
    found = found if done == c.num_steps else None
    self.save_at_last(done, state, found)
    ledger.turn('evaluation')
    return state, done, found

  first_step_seconds: float | None = None

  def prepare(self, state: step.TrainState, done: int) -> tuple[Any, dict]:
    """(the compiled update, the next batch on the devices)"""
    segments, a = self.segments(done), self.a
    carries = a.parts.data.form == 'segments'
    pieces = 1 if carries or not segments else a.parts.data.length // (segments * a.model_config.segment)
    self.ledger.turn('input' if self.programs else 'start')
    batch = a.layout.place(a.layout.lay_out(shorter_rows(next(self.stream), pieces)), a.parts.data.batch_size * pieces)
    if segments not in self.programs:
      # Compiled apart, so that a step's time is a step's; another program is an error.
      with self.ledger.doing('compile'):
        update = jit_step(a.truncated(segments) if carries and segments else a)
        self.programs = {segments: update.lower(state, batch).compile()}
        processes.barrier('compiled')
    return self.programs[segments], batch

  def segments(self, done: int) -> int:
    """What run.curriculum says after `done` steps; 0: all segments of a row.

    Rows of their own are cut into shorter ones. Rows that carry a document on stay whole, since each shorter one
    would begin with what the one before left: gradients alone end where it would.
    """
    stages, stage = self.config.curriculum, done // self.config.curriculum_steps
    segments = stages[stage] if stage < len(stages) else 0
    return segments if segments and segments * self.a.model_config.segment < self.a.parts.data.length else 0

  def asked(self, done: int) -> tuple[bool, bool]:
    """Whether a process was asked to stop, and whether a failed save is due again; all answer alike."""
    stop, save_again = self.questions.ask(
        done, lambda now: self.stop.requested, lambda now: self.backoff.due(self.checkpoints.failing, now))
    return stop, save_again

  def roll_back(self, before: int, state: step.TrainState) -> step.TrainState | None:
    """The newest checkpoint of at most `before` steps, whose run goes on with the data to come.

    What a row remembers is of the data that it has read, and stays. None: there is no such checkpoint.
    """
    with self.ledger.doing('start'):
      restored = self.checkpoints.restore_newest(self.a.abstract, below=before + 1)
    if restored is None:
      self.say(f'run.rollback_after={self.config.rollback_after}: there is no checkpoint before step '
               f'{before + 1} to return to; going on')
      return None
    at = restored.step
    self.questions.begin(at, time.monotonic())
    self.returns[at] += 1
    check(self.returns[at] <= MAX_RETURNS, f'run.rollback_after={self.config.rollback_after}: has returned to '
          f'step {at} {MAX_RETURNS} times, and other data is no better; lower optimizer.learning_rate='
          f'{self.a.parts.optimizer.learning_rate}, or clip (optimizer.clip_norm)')
    self.checkpoints.drop_after(at)
    self.writer.truncate_after(at)
    self.say(f'back to step {at}: {self.config.rollback_after} bad steps in a row from step {before + 1} on; the '
             f'batches since step {at} are passed over')
    self.ledger.roll_back(at, f'bad steps from {before + 1} on')
    return restored.state._replace(memory=state.memory)

  def account(self, at: int, metrics: dict) -> int:
    """Looks at one step's scalars: stops after too many bad steps, logs; the bad ones in a row."""
    bad = int(metrics['bad_in_a_row'])
    self.tokens += int(metrics['tokens'])
    if bad:
      why = self.first_bad(metrics)
      self.say(f'step {at} was skipped: {why}')
      self.ledger.count('skipped_steps', 'skipped', step=at, why=why)
    if bad >= self.config.max_bad_steps and bad != self.config.rollback_after:
      raise ConfigError(
          f'run.max_bad_steps={self.config.max_bad_steps}: {bad} bad steps in a row up to step {at}, at last '
          f'{self.first_bad(metrics)}; lower optimizer.learning_rate='
          f'{self.a.parts.optimizer.learning_rate}, or clip (optimizer.clip_norm)')
    if at % self.config.log_every and at != self.config.num_steps:
      return bad
    trained = self.ledger.training_seconds()
    rate = self.tokens / max(trained - self.trained, 1e-9)
    self.tokens, self.trained = 0, trained
    self.ledger.keep()
    loss, skipped = float(metrics['loss']), int(metrics['skipped'])
    updates = at - skipped - int(metrics['good'])   # before this step
    bytes_per_token = self.bytes_per_token
    self.writer.write(at, dict(
        loss=loss, bits_per_byte=loss / math.log(2) / bytes_per_token,
        grad_norm=float(metrics['grad_norm']), learning_rate=float(self.a.schedule(updates)),
        tokens_per_second=rate, **metrics_lib.utilization(
            self.a.model_config, self.a.layout.mesh.devices, self.a.parts.data.length, rate, metrics['keys']),
        seconds=trained, skipped_steps=skipped,
        **{f'gate_{what}_{i}': float(x) for i, both in metrics['gates'].items()
           for what, x in zip(('mean', 'max'), both)}))
    self.progress.update(at, loss, rate)
    return bad

  def first_bad(self, metrics: dict) -> str:
    """What was wrong with a step: a gradient, by its parameter's name, or a number that leapt."""
    squares = np.asarray(metrics['grad_squares'])
    names = [optim.path_name(path) for path, _ in
             jax.tree_util.tree_leaves_with_path(self.a.abstract.params)]
    bad = [name for name, x in zip(names, squares) if not math.isfinite(x)]
    if bad:
      return f'the gradient of {bad[0]} is not finite'
    loss, norm = float(metrics['loss']), float(metrics['grad_norm'])
    if not math.isfinite(loss):
      return 'the loss is not finite'
    return (f'the loss {loss:.4g} or the gradient norm {norm:.4g} is {self.config.spike_sigmas:g} standard '
            'deviations above those before')

  def evaluate(self, state: step.TrainState) -> result.Result | held_out.Result | None:
    """None, and `owes_evaluation`, where a process was asked to stop meanwhile."""
    use_ema = self.a.parts.perplexity.use_ema
    check(not use_ema or state.ema is not None,
          'perplexity.use_ema=True: this run keeps no averaged parameters; set optimizer.ema')
    questions, pieces = Questions(0, most=1_000_000), itertools.count(1)

    def moved() -> None:   # at the same pieces in all processes
      self.ledger.tick()
      if any(questions.ask(next(pieces), lambda now: self.stop.requested)):
        raise _StoppedError

    self.owes_evaluation = False
    with self.ledger.doing('evaluation'), progress.told(moved):
      try:
        return evaluate(self.a, state.ema if use_ema else state.params, self.documents)
      except _StoppedError:
        self.owes_evaluation = True
        return None

  def publish(self, at: int, found: result.Result | held_out.Result) -> bool:
    told = {}
    with contextlib.suppress(OSError, ConfigError):   # no hash of what could not be saved, no config to compare with
      told = self.about(at, self.documents) if self.about and self.main else {}
    return publish.publish(found, self.folder, at, told)

  def evaluates(self, at: int) -> bool:
    return bool(self.config.eval_every and at % self.config.eval_every == 0) or at == self.config.num_steps

  def score(self, at: int, state: step.TrainState) -> result.Result | held_out.Result | None:
    """`evaluate`, and its result logged."""
    if found := self.evaluate(state):
      self.writer.write(at, found.scalars())
      self.say(f'step {at}: validation {found.line()}')
    return found

  # What a reader wants to know at the start.

  @functools.cached_property
  def bytes_per_token(self) -> float:
    counts = self.stream.accounting
    return counts['bytes'] / counts['tokens']

  def describe(self, state: step.TrainState) -> None:
    if not self.main:
      return
    count = sum(x.size for x in jax.tree.leaves(state.params))
    sizes = ' x '.join(f'{axis} {n}' for axis, n in self.a.layout.mesh.shape.items())
    kind = self.a.layout.mesh.devices.flat[0].device_kind
    print(f'{self.a.model_config.name}: {count:,} parameters on {sizes} ({kind}), layout '
          f'{self.a.parts.mesh.layout!r}')
    if self.a.advice:
      print(self.a.advice)
    print('largest arrays:')
    for line in metrics_lib.largest_arrays(state._asdict()):
      print(f'  {line}')
    counts = self.stream.accounting
    print('data: ' + ', '.join(
        f'{name} {value:,}' if isinstance(value, int) else f'{name} {value:.4g}'
        for name, value in counts.items()))
    if self.config.expect:
      print(f'expect: {self.config.expect}')
    print(end='', flush=True)


def _import_slow_packages(writes: bool) -> None:
  """What the first save and the first logged step would wait for."""
  importlib.import_module('orbax.checkpoint')
  if writes:
    importlib.import_module('tensorboardX.event_file_writer')

