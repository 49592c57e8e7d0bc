"""How long does a step wait for a checkpoint that is saved beside it?

    python experiments/05_faults/stall.py                # five minutes on 2 idle cores; carries on where it stopped
    python experiments/05_faults/stall.py --tier=smoke   # a small model, seconds

configs/quickstart.py, a checkpoint every 20 steps, at two batch sizes: what saving takes is the same whatever a step
takes. Steps are timed from the dispatch of one to that of the next, as they follow each other without a pause. A save
concerns the steps from its call to the end of its writing; what these took beyond the median of all others is what the
save has cost, and is told in parts of such a median step:

    call      the training's thread is in Checkpoints.save
    cost      all that the steps beside a save took more, in sum
    slower    the same a step: their mean over the median of the others, less one (the goal: under 0.1)

Each run is a line of results/stall.jsonl.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from experiments import shared  # noqa: E402

EVERY = 20   # steps between saves
SKIPPED = 2 * EVERY   # steps at the start: imports and warming caches
TIERS = {
    'smoke': dict(config='configs/quickstart.py:debug', batches=(2,), steps=100, repeats=1),
    'cpu': dict(config='configs/quickstart.py', batches=(2, 16), steps=240, repeats=2),
}


class Clock:
  """When steps were dispatched, and when saves were called, returned and had ended."""

  def __init__(self):
    self.steps: list[float] = []
    self.saves: list[list[float]] = []

  def watch(self) -> None:
    from longctx.training import badput, checkpoint, saving
    reach, save, run = badput.Ledger.reach, checkpoint.Checkpoints.save, saving.Save._run
    def reached(ledger, step):
      self.steps.append(time.perf_counter())
      reach(ledger, step)
    def saved(checkpoints, *args, **kwargs):
      checkpoints.wait()   # for the save before, which is another's cost
      begun = [time.perf_counter()]
      self.saves.append(begun)
      result = save(checkpoints, *args, **kwargs)
      begun.insert(1, time.perf_counter())
      return result
    def ran(one):
      mine = self.saves[-1]
      run(one)
      mine.append(time.perf_counter())
    badput.Ledger.reach, checkpoint.Checkpoints.save, saving.Save._run = reached, saved, ran


def measure(config: str, batch: int, steps: int) -> dict:
  """In a process of its own: one run, and what its saves cost."""
  import jax

  from longctx import main
  clock = Clock()
  clock.watch()
  with tempfile.TemporaryDirectory() as folder:
    flags = dict(data_batch_size=batch, run_num_steps=steps, run_checkpoint_every=EVERY, run_keep_best=False,
                 run_log_every=steps, perplexity_max_tokens=512)
    code = main.main(['stall', f'--config={config}', f'--workdir={folder}',
                      *(f'--config.{name.replace("_", ".", 1)}={value}' for name, value in flags.items())])
  if code:
    raise SystemExit(code)
  return dict(costs(clock.steps, clock.saves), devices=jax.device_count(), cores=len(os.sched_getaffinity(0)))


def costs(steps: list[float], saves: list[list[float]]) -> dict:
  """Times in seconds: of each dispatch, and of each save (call, return, end of the writing)."""
  waits = list(itertools.pairwise(steps))[SKIPPED:]
  saves = [save for save in saves if steps[SKIPPED] <= save[0] and max(save) <= steps[-1]]
  beside = lambda step, save: step[1] > save[0] and step[0] < max(save)
  free = [b - a for a, b in waits if not any(beside((a, b), save) for save in saves)]
  step = statistics.median(free)
  each = [[b - a for a, b in waits if beside((a, b), save)] for save in saves]
  return dict(
      step_seconds=round(step, 5), saves=len(saves), steps_beside=round(statistics.mean(map(len, each)), 1),
      writing_seconds=round(statistics.median(max(save) - save[0] for save in saves), 4),
      call=round(statistics.median(save[1] - save[0] for save in saves) / step, 3),
      cost=round(statistics.median(sum(x) - len(x) * step for x in each) / step, 3),
      slower=round(statistics.median(statistics.mean(x) for x in each) / step - 1, 3))


def in_a_process(*arguments) -> dict:
  """`measure`, whose JAX is new and gone afterwards."""
  import concurrent.futures
  import multiprocessing
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    return pool.submit(measure, *arguments).result()


def runs(tier: dict) -> Iterator[tuple[dict, Callable[[], dict]]]:
  for repeat, batch in itertools.product(range(tier['repeats']), tier['batches']):
    key = dict(config=tier['config'], batch=batch, steps=tier['steps'], repeat=repeat)
    yield key, lambda key=key: in_a_process(key['config'], key['batch'], key['steps']) | shared.provenance()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tier', choices=TIERS, default='cpu')
  parser.add_argument('--out', default=os.path.join(HERE, 'results'))
  args = parser.parse_args()
  os.makedirs(args.out, exist_ok=True)
  shared.carry_on(os.path.join(args.out, 'stall.jsonl'), lambda _: runs(TIERS[args.tier]))


if __name__ == '__main__':
  main()
