"""Of which model a context is: its config, its parameters and its tokenizer, as hashes.

Held by: tests/test_store.py.
"""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from longctx.errors import ConfigError

_THREADS = 4   # hashing releases the interpreter lock
_ABSENT = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
  """A state means something to one model alone: the one for which all of these are equal."""

  model: str                # 'decoder', 'lstm', ...
  config: dict[str, Any]    # the resolved config of the model, as JSON gives it back
  parameters: str           # SHA-256
  tokenizer: str            # fingerprint

  @property
  def config_hash(self) -> str:
    return hashlib.sha256(_canonical(self.config)).hexdigest()

  @property
  def hash(self) -> str:
    """One for all: of config, parameters and tokenizer."""
    return hashlib.sha256(_canonical([self.model, self.config_hash, self.parameters,
                                      self.tokenizer])).hexdigest()


def _canonical(value: Any) -> bytes:
  return json.dumps(value, sort_keys=True, separators=(',', ':')).encode()


def identify(config: Any, params: Any, tokenizer: str) -> Identity:
  """Of a model's (resolved) config, a dataclass; its parameters; its tokenizer's fingerprint."""
  fields = json.loads(json.dumps(dataclasses.asdict(config)))
  return Identity(model=fields.get('name', type(config).__module__.rpartition('.')[2]),
                  config=fields, parameters=hash_parameters(params), tokenizer=tokenizer)


def hash_parameters(params: Any) -> str:
  """SHA-256 over the sorted hashes of the leaves: path, type, shape and bytes of each."""
  paths, _ = jax.tree_util.tree_flatten_with_path(params)

  def one(item):
    path, leaf = item
    array = np.ascontiguousarray(leaf)   # fetched one by one: never all beside the device's own
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    digest = hashlib.sha256(f'{name} {array.dtype} {np.shape(leaf)}\n'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()

  with ThreadPoolExecutor(_THREADS) as pool:
    leaves = sorted(pool.map(one, paths))
  return hashlib.sha256(''.join(leaves).encode()).hexdigest()


def differences(has: Identity, wants: Identity) -> list[str]:
  """'model.num_layers: the context has 2, this model has 4', one a field that differs."""
  found = []
  for key in sorted(set(has.config) | set(wants.config)):
    pair = (has.config.get(key, _ABSENT), wants.config.get(key, _ABSENT))
    if _ABSENT in pair or _canonical(pair[0]) != _canonical(pair[1]):
      found.append((f'model.{key}', *('no such field' if x is _ABSENT else json.dumps(x)
                                      for x in pair)))
  if has.model != wants.model and 'name' not in wants.config:
    found.insert(0, ('model', has.model, wants.model))
  for field in ('parameters', 'tokenizer'):
    pair = (getattr(has, field), getattr(wants, field))
    if pair[0] != pair[1]:
      found.append((field, pair[0][:16], pair[1][:16]))
  return [f'{name}: the context has {a}, this model has {b}' for name, a, b in found]


def check_same(has: Identity, wants: Identity, where: str) -> None:
  """ConfigError with every differing field unless both are one model."""
  found = differences(has, wants)
  if found:
    raise ConfigError(f'{where}: is the memory of another model: {"; ".join(found)}; give the '
                      'workdir and checkpoint of the run that made it, or another context')
