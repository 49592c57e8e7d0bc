"""What a traced program sends, bytes by primitive, and multiplies; scans count with their lengths."""

import collections
import math

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
    for inner, turns in _inside(eqn):
      _walk(inner, times * turns, axis_size, found)


def _inside(eqn):
  """(jaxpr, how often it runs) of all that an equation holds."""
  turns = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
  for value in eqn.params.values():
    for each in value if isinstance(value, (tuple, list)) else (value,):
      closed = getattr(each, 'jaxpr', each)
      if hasattr(closed, 'eqns'):
        yield closed, turns


def products(function, *arguments):
  """FLOPs of all matrix products of a function, 2 a multiply-add."""
  return _multiplied(jax.make_jaxpr(function)(*arguments).jaxpr)


def _multiplied(jaxpr):
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      (summed, _), _ = eqn.params['dimension_numbers']
      total += 2 * math.prod(out) * math.prod(left[i] for i in summed)
    total += sum(turns * _multiplied(inner) for inner, turns in _inside(eqn))
  return total
