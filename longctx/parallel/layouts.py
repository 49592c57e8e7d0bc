"""How the tokens of a row are laid out over the devices that share it.

A causal token sees all before it, so the owner of the last tokens would do most of the work.
`zigzag` gives each device one chunk from the front and its mirror image from the back: balanced for
one document a row. `striped` deals runs of `unit` tokens out in turn, each round beginning one
device further: balanced for packed documents too. The order is applied once, to the batch; every token carries its index, so the model need not
know. Within a device the tokens keep their order.
Sources: zigzag: Llama 3, arXiv:2407.21783, and ring-flash-attention; striped: Striped Attention,
arXiv:2311.09431 (unit 1), here in runs that fit a kernel's tiles.
Held by: tests/test_layouts.py.
"""

import numpy as np

from longctx.errors import check, check_choice, check_range

ORDERS = ('contiguous', 'zigzag', 'striped')
UNIT = 128   # tokens of a stripe
DTYPES = {'index': np.int32, 'start': np.int32}   # what lay_out adds to a batch


def multiple(order: str, size: int, unit: int = UNIT) -> int:
  """A row's length must be a multiple of this."""
  check_choice('mesh.order', order, ORDERS)
  check_range('mesh.unit', unit, 1)
  return {'contiguous': size, 'zigzag': 2 * size, 'striped': size * unit}[order]


def padded_length(length: int, order: str, size: int, unit: int = UNIT) -> int:
  """The length after padding to the order's multiple."""
  return length + -length % multiple(order, size, unit)


def unit_of(order: str, length: int, size: int, unit: int = UNIT) -> int:
  """Tokens of a run that stays together."""
  return {'contiguous': length // size, 'zigzag': length // (2 * size), 'striped': unit}[order]


def device_of(order: str, run: int, size: int) -> int:
  """Which device of the ring holds the run of that number."""
  if order == 'zigzag':
    return run if run < size else 2 * size - 1 - run
  # Each round of the deal begins one device further: else documents of as many runs as devices
  # would always end, and so weigh most, on the same one. Contiguous has one round.
  return (run + run // size) % size


def permutation(order: str, length: int, size: int, unit: int = UNIT) -> np.ndarray:
  """int64 [length]: slot i of the laid-out row holds token permutation[i]."""
  count = multiple(order, size, unit)
  check(length % count == 0, f'length={length}: must be a multiple of {count} to be laid out '
        f'{order} over {size} devices')
  run_length = unit_of(order, length, size, unit)
  if run_length == 0:
    return np.arange(0)
  runs = np.arange(length).reshape(-1, run_length)
  owner = np.array([device_of(order, r, size) for r in range(len(runs))])
  return runs[np.argsort(owner, kind='stable')].reshape(-1)


def sorting(order: str, length: int, size: int, group: int, unit: int = UNIT) -> np.ndarray:
  """Brings the tokens that `group` neighbouring devices hold together into their order.

  int64 [size / group, group * length / size], a row for each group.
  """
  laid = permutation(order, length, size, unit).reshape(size // group, -1)
  return np.argsort(laid, axis=1, kind='stable')


def lay_out(batch: dict[str, np.ndarray], order: str, size: int, unit: int = UNIT
            ) -> dict[str, np.ndarray]:
  """A batch [B, T, ...] padded and put in order, with what attention must know of the old one.

  Adds `index` (each token's place in the row, -1 for padding of this function) and `start` (the
  index of its document's first token in the row), both int32.
  """
  some = next(iter(batch.values()))
  length = some.shape[1]
  missing = padded_length(length, order, size, unit) - length
  index = np.broadcast_to(np.arange(length, dtype=np.int32), (some.shape[0], length))
  if 'segment_ids' in batch:
    ids = batch['segment_ids']
    begins = np.concatenate([np.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
  else:
    begins = index == 0
  start = np.maximum.accumulate(np.where(begins, index, 0), axis=1).astype(np.int32)
  order_of_slots = permutation(order, length + missing, size, unit)

  def one(x, fill=0):
    pad = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, pad, constant_values=fill)[:, order_of_slots]

  return {name: one(x) for name, x in batch.items()} | {'index': one(index, -1),
                                                        'start': one(start)}
