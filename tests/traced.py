"""What a traced program sends: bytes by primitive, with the lengths of the scans taken into account."""

import collections

import jax
import numpy as np


def sends(function, *arguments, axis_size):
  """{primitive: (times, bytes that one device sends)} of a function of a whole mesh."""
  found = collections.defaultdict(lambda: [0, 0])
  _walk(jax.make_jaxpr(function)(*arguments).jaxpr, 1, axis_size, found)
  return {name: tuple(x) for name, x in found.items()}


def _walk(jaxpr, times, axis_size, found):
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    groups = eqn.params.get('axis_index_groups')
    size = len(groups[0]) if groups else axis_size
    if name in ('ppermute', 'all_gather', 'all_to_all', 'reduce_scatter'):
      for x in eqn.invars:
        held = int(np.prod(x.aval.shape)) * x.aval.dtype.itemsize
        found[name][0] += times
        found[name][1] += times * (held if name == 'ppermute' else
                                   held * (size - 1) if name == 'all_gather' else
                                   held * (size - 1) // size)
    inner = times * eqn.params.get('length', 1) if name == 'scan' else times
    for value in eqn.params.values():
      for each in value if isinstance(value, (tuple, list)) else (value,):
        closed = getattr(each, 'jaxpr', each)
        if hasattr(closed, 'eqns'):
          _walk(closed, inner, axis_size, found)
