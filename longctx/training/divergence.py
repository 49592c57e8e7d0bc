"""Compares what the devices of a run should hold alike, and names the parameter that differs.

Held by: tests/test_replicas.py.
"""

from typing import Any

import jax
import numpy as np

from longctx.errors import RunError
from longctx.parallel import replicas
from longctx.parallel.mesh import Layout
from longctx.training.optim import path_name


class Comparison:
  """Of one tree of parameters, whose arrays (or their abstract stand-ins) have named shardings."""

  def __init__(self, params: Any, layout: Layout):
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params))
    self.names = [path_name(path) for path in paths]
    self.specs = [leaf.sharding.spec for leaf in leaves]
    self.mesh = layout.mesh
    self.sums = replicas.make_checksums(layout.mesh, self.specs)
    self.agreed = 0   # the last step at which all was alike

  def check(self, step: int, params: Any) -> None:
    """RunError, in all processes alike, where a replica of a part is not as the others."""
    found = replicas.first_difference(np.asarray(self.sums(jax.tree.leaves(params))), self.specs)
    if found is None:
      self.agreed = step
      return
    at, device = found[0], self.mesh.devices[found[1]]
    raise RunError(
        f'step {step}: parameter {self.names[at]} of device {device.id} (process {device.process_index}) has '
        f'other bits than its replicas; they agreed at step {self.agreed}. Checkpoints after that step may '
        f'hold either: remove them, look at the machine, and give the same command, which carries on')
