"""Carries a saved context on in a process of its own: FILE NAME OUTPUT.

Reads `AFTER` with the model NAME of tests/test_store.py from where FILE stands, and writes the hidden
states and the state to OUTPUT.npz.
"""

import sys

import jax
import numpy as np

if __name__ == '__main__':
  import tests.conftest  # noqa: F401  (the settings under which the other process computed)
  from longctx import store
  from tests.test_store import AFTER, call, identity_of, made
  path, name, output = sys.argv[1:]
  model, _ = made(name)
  context = store.load(path, identity_of(name))
  state = store.state_of(context, model.init_state)
  hidden, state = call(name)(AFTER, state)
  np.savez(output, hidden, *jax.tree.leaves(state))
