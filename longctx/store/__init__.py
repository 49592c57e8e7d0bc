"""Contexts on disk: what a model remembers in mid-document, saved, restored bit for bit, forked.

    context = take(state, identity, tokens=n, tail=pending)        one row of any model's state
    save(path, context)   load(path, identity)   fork(path, new)   inspect(path)
    merge(a, b, model.merge_states, model.init_state)              where memories add
    Store(folder, key, budget)                                     contexts by name

Knows no model: a state is a pytree of arrays, batch first. longctx.inference.reader is how a model reads
on from one.
"""

from longctx.store.context import (
  Context,
  Header,
  check_finite,
  check_merge,
  merge,
  spoilt,
  state_of,
  take,
)
from longctx.store.directory import Store
from longctx.store.file import Sealed, fork, inspect, load, save
from longctx.store.identity import Identity, check_same, identify
from longctx.store.seal import read_key

__all__ = ['Context', 'Header', 'Identity', 'Sealed', 'Store', 'check_finite', 'check_merge', 'check_same',
           'fork', 'identify', 'inspect', 'load', 'merge', 'read_key', 'save', 'spoilt', 'state_of', 'take']
