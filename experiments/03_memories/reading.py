"""A passkey's document, read by one process: FOLDER MODEL SEGMENTS all | first | second.

all      8 rows: asks after 16, 64, ... segments; resident memory after each call
first    one row: reads half, saves the context as FOLDER/half.lcm, reads on to the end, answers
second   one row: reads on from the file to the end, answers

Parameters come from FOLDER/parameters.npz; all.json, or the logits first.npy and second.npy, go there.
Apart from training, so that what training kept of memory does not hide what reading takes.
"""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import passkey  # noqa: E402
from flax import nnx  # noqa: E402

from experiments import far_passkey, small_training  # noqa: E402
from longctx import store  # noqa: E402


def main(folder: str, name: str, segments: str, what: str) -> None:
  config = passkey.config_of(name)
  graphdef, abstract = nnx.split(nnx.eval_shape(
      lambda: small_training.make(config, passkey.SEGMENT, jax.random.key(0))))
  held = np.load(os.path.join(folder, 'parameters.npz'))
  params = jax.tree.structure(abstract).unflatten([jax.numpy.asarray(held[x]) for x in held.files])
  reader = far_passkey.Reader(graphdef, params, passkey.DIGITS)
  if what == 'all':
    with open(os.path.join(folder, 'all.json'), 'w', encoding='utf-8') as file:
      json.dump(passkey.stream(reader, int(segments)), file)
    return
  identity = store.identify(config, params, tokenizer='passkey')
  text, path = passkey.document(1), os.path.join(folder, 'half.lcm')
  calls = int(segments) // passkey.CALL
  middle = calls // 2
  if what == 'first':
    state = reader.fresh(params, 1, 0)
    for i in range(middle):
      state = reader.read(state, text.piece(i))
    store.save(path, store.take(state, identity, tokens=middle * text.first.shape[1]))
  else:
    init_state = nnx.merge(graphdef, params).init_state
    state = jax.tree.map(jax.numpy.array, store.state_of(store.load(path, identity), init_state))
  for i in range(middle, calls):
    state = reader.read(state, text.piece(i))
  np.save(os.path.join(folder, f'{what}.npy'), reader.ask(state, text.question))


if __name__ == '__main__':
  main(*sys.argv[1:])
