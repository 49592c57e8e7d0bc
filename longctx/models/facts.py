"""What a model's config says of each of its layers, for --mode=describe."""

from typing import NamedTuple

# Dependency classes: what the runtime may do side by side.
CLASSES = {
    'P0': 'token-parallel: the sequence may be cut over devices (mesh.seq)',
    'P1': 'segments map the memory: all at once, and the sequence may be cut over devices (mesh.seq)',
    'P2': 'each step needs the one before: cut the batch (mesh.data), not the sequence',
    'P3': 'the last layer feeds the first: cut the batch (mesh.data), not the sequence',
}


class LayerFacts(NamedTuple):
  """Closed form of one layer; FLOPs of a token, forward, 2 a multiply-add."""

  name: str
  dependency: str
  parameters: int
  flops: float
  state: int       # numbers of state of a row that do not grow with its length
  grows: int = 0   # and those that each token adds
