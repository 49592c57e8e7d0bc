"""Held-out examples scored as they are trained on: loss, and how many targets and rows are right.

For data whose rows are examples (data.form 'pairs', 'labels') or hidden tokens ('masked'): the loss of the
targets, the share of targets that the model finds likeliest, and the share of rows with all of them so. For
pairs that last share is the exact match of greedy decoding: token by token, a right answer was decoded from
the same tokens before it. Of classes it is the accuracy. All rows of the split are scored once, or the
first perplexity.max_tokens targets; of perplexity's settings batch_size, split and use_ema are read besides.
The interval is Wilson's, 95 %. Sums are float64 on the host.
Held by: tests/test_encoder.py.

B batch  T tokens  V vocab
"""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import progress
from longctx.data import stream
from longctx.evaluation import course, perplexity, records
from longctx.parallel import mesh
from longctx.training import step

FORMS = ('masked', *stream.EXAMPLES)
SEED = 0   # of the rows, whatever a run's is: two runs are scored on the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """Sums over a split."""

  form: str
  split: str
  nats: float
  targets: int
  bytes: int               # that the targets stand for; a class stands for one
  right: int               # targets that are the likeliest
  rows: int
  right_rows: int          # rows all of whose targets are
  seconds: float
  majority: int = 0        # rows of the class that most have; 0: targets are tokens

  @property
  def loss(self) -> float:
    return self.nats / self.targets if self.targets else math.nan

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

  def scalars(self) -> dict[str, float]:
    """For metrics.jsonl."""
    return dict(validation_loss=self.loss, validation_right=self.right / max(1, self.targets),
                validation_right_rows=self.right_rows / max(1, self.rows))

  def line(self) -> str:
    right, rows = 100 * self.right / max(1, self.targets), 100 * self.right_rows / max(1, self.rows)
    if self.form == 'labels':
      return f'{self.loss:.4f} nats, {rows:.2f} % of {self.rows:,} right'
    of_rows = f', {rows:.2f} % of rows wholly' if self.form == 'pairs' else ''
    return f'{self.loss:.4f} nats per target, {right:.2f} % of {self.targets:,} right{of_rows}'

  def table(self) -> str:
    low, high = records.wilson(self.right_rows / max(1, self.rows), self.rows)
    lines = [f'{self.split}: {self.line()}']
    if self.form != 'masked':
      lines.append(f'rows right: {self.right_rows:,} of {self.rows:,}, {100 * low:.1f} to '
                   f'{100 * high:.1f} % with 95 % confidence')
    if self.majority:
      lines.append(f'the largest class alone: {100 * self.majority / self.rows:.2f} %')
    return '\n'.join([*lines, f'rows a second: {self.rows / self.seconds:,.1f}'])

  def to_json(self) -> dict[str, Any]:
    """Plain values; a loss that is not finite is null."""
    finite = lambda x: float(x) if math.isfinite(x) else None
    low, high = records.wilson(self.right_rows / max(1, self.rows), self.rows)
    found = {name: getattr(self, name) for name in ('form', 'split', 'targets', 'rows', 'seconds')}
    return found | dict(
        loss=finite(self.loss), bits_per_byte=finite(self.bits_per_byte),
        right=self.right / max(1, self.targets), right_rows=self.right_rows / max(1, self.rows),
        right_rows_low=low, right_rows_high=high,
        **(dict(majority=self.majority / self.rows) if self.majority else {}))


def open_rows(data: stream.Config, config: perplexity.Config, layout: mesh.Layout,
              builders: tuple[int, int] = (0, 1)) -> Any:
  """This host's rows of the split, in batches of perplexity.batch_size; `content` identifies what they hold.

  `builders`: (index, count) of the processes that tokenise a corpus together.
  """
  index, count = layout.host_rows(config.batch_size)
  rows, content, _ = stream.open_rows(dataclasses.replace(data, batch_size=config.batch_size), split=config.split,
                                      seed=SEED, host_index=index, num_hosts=count, builders=builders)
  rows.content = content
  return rows


def evaluate(graphdef: nnx.GraphDef, params: Any, rows: Any, data: stream.Config, tokenizer: Any,
             config: perplexity.Config, *, layout: mesh.Layout, loss_chunk: int = 512,
             kept: course.Course | None = None) -> Result:
  """Scores `rows`, of `open_rows`; all processes of a run call it alike. `kept`: as perplexity.evaluate has it."""
  size = config.batch_size
  score = _program(graphdef, layout, loss_chunk)
  host, hosts = layout.host_rows(size)
  bytes_V = tokenizer.num_bytes(np.arange(tokenizer.vocab_size))
  kept = kept or course.Course()
  kept.begin(rows.num_rows, 'rows')
  begun, before = kept.before(0)
  sums, classes = before.get('sums', np.zeros(5)), before.get('classes', np.zeros(0, int)).tolist()
  count_bytes, start = int(before.get('bytes', 0)), time.perf_counter() - float(before.get('seconds', 0))
  full = lambda: bool(config.max_tokens) and sums[1] >= config.max_tokens
  for i in range(begun, -(-rows.num_rows // size)):
    if full():
      break
    batch = rows[i]
    # Rows after the last are of the next epoch: they are not scored again.
    batch['loss_mask'][max(0, rows.num_rows - i * size - host * size // hosts):] = 0
    nll_BT, right_BT, targets_BT, mask_BT = map(np.asarray, score(params, layout.place(batch, size)))
    progress.moved()
    where = mask_BT > 0
    each = where.any(axis=1)
    sums += (nll_BT[where].astype(np.float64).sum(), where.sum(), right_BT[where].sum(), each.sum(),
             (right_BT | ~where).all(axis=1)[each].sum())
    if data.form == 'labels':
      classes += targets_BT[where].tolist()
    else:
      count_bytes += int(bytes_V[targets_BT[where]].sum())
    kept.read(0, i + 1, config.split, min(size, rows.num_rows - i * size), sums=sums, classes=classes,
              bytes=count_bytes, seconds=time.perf_counter() - start)
  nats, *counts = sums.tolist()
  targets, right, num_rows, right_rows = map(int, counts)
  return Result(form=data.form, split=config.split, nats=nats, targets=targets, right=right,
                bytes=count_bytes or len(classes), rows=num_rows, right_rows=right_rows,
                seconds=time.perf_counter() - start,
                majority=int(np.bincount(classes).max()) if classes else 0)


@functools.lru_cache(maxsize=4)
def _program(graphdef: nnx.GraphDef, layout: mesh.Layout, chunk: int) -> Any:
  """(params, batch) -> nll, whether the target is the likeliest, targets, mask; whole everywhere."""
  def score(params, batch):
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model(batch['tokens'], None, **step.model_inputs(batch))
    nll, right = [], []
    for low in range(0, hidden_BTD.shape[1], chunk or hidden_BTD.shape[1]):
      part = slice(low, low + (chunk or hidden_BTD.shape[1]))
      logits_BCV, target_BC = model.logits(hidden_BTD[:, part]), batch['targets'][:, part]
      label_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], -1, mode='clip')[..., 0]
      nll.append(jax.nn.logsumexp(logits_BCV, -1) - label_BC)
      right.append(jnp.argmax(logits_BCV, -1) == target_BC)
    return (jnp.concatenate(nll, 1), jnp.concatenate(right, 1), batch['targets'], batch['loss_mask'])

  return jax.jit(mesh.under(layout, score), out_shardings=layout.sharding())
