"""Carries saved contexts on in a process of their own: FOLDER NAME NAME ...

Reads `AFTER` with the model NAME of tests/test_store.py from where FOLDER/NAME.lcm stands, and writes the
hidden states and the state to FOLDER/NAME.npz.
"""

import sys

import jax
import numpy as np

if __name__ == '__main__':
  import tests.conftest  # noqa: F401  (the settings under which the other process computed)
  from longctx import store
  from tests.test_store import AFTER, call, identity_of, made
  folder, *names = sys.argv[1:]
  for name in names:
    model, _ = made(name)
    context = store.load(f'{folder}/{name}.lcm', identity_of(name))
    state = store.state_of(context, model.init_state)
    hidden, state = call(name)(AFTER, state)
    np.savez(f'{folder}/{name}.npz', hidden, *jax.tree.leaves(state))
