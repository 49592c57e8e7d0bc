"""A context as one file: a safetensors file whose metadata are a JSON header, with a checksum of all.

  8 bytes: length of the header     {"__metadata__": {"longctx": "{...}"}, name: type, shape, place}     arrays

The header begins with the SHA-256 of the whole file, header included, taken with zeros in the
checksum's own place. Any safetensors reader opens the file. `NAME.lcm`; an encrypted one is this file
inside store/seal.py's.
Held by: tests/test_store.py (every kind of damage is refused).
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from longctx import files
from longctx.errors import ConfigError, check
from longctx.store import seal
from longctx.store.context import Context, Header
from longctx.store.identity import Identity, check_same

SUFFIX = '.lcm'
VERSION = 1
MARK = rb'{"__metadata__":{"longctx":"{\"sha256\":\"'   # how such a file's header begins
DIGITS = 64
START = 8 + len(MARK)   # where the checksum stands
MAX_HEADER = 100_000_000   # of the safetensors format
DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
          'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'I64': np.int64,
          'U64': np.uint64, 'I32': np.int32, 'U32': np.uint32, 'I16': np.int16, 'U16': np.uint16,
          'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_, 'C64': np.complex64}


@dataclasses.dataclass(frozen=True)
class Sealed:
  """All that is known of an encrypted file without its key."""

  version: int
  key: str   # id of the key it needs


def encode(context: Context) -> bytes:
  from safetensors.numpy import save
  h = context.header
  header = {'sha256': '0' * DIGITS, 'format': 'longctx context', 'version': VERSION,
            'model': h.identity.model, 'config': h.identity.config,
            'config_sha256': h.identity.config_hash, 'parameters': h.identity.parameters,
            'tokenizer': h.identity.tokenizer, 'capacity': h.capacity, 'tokens': h.tokens,
            'tail': list(h.tail), 'dtype': h.dtype, 'created': h.created}
  data = save(context.arrays, {'longctx': json.dumps(header, separators=(',', ':'))})
  if data[8:START] != MARK:
    raise ValueError(f'safetensors wrote a header that begins {data[8:START]!r}')
  return b''.join([data[:START], _checksum(data), memoryview(data)[START + DIGITS:]])


def _checksum(data: bytes) -> bytes:
  view = memoryview(data)
  digest = hashlib.sha256(view[:START])
  digest.update(b'0' * DIGITS)
  digest.update(view[START + DIGITS:])
  return digest.hexdigest().encode()


def check_whole(data: bytes, where: str) -> None:
  """ConfigError unless every byte is as it was saved."""
  check(data[8:START] == MARK, f'{where}: is not a context, or its beginning is damaged; restore it '
        'from a copy, or delete it')
  check(data[START:START + DIGITS] == _checksum(data), f'{where}: is damaged or cut short '
        f'({len(data)} bytes, whose SHA-256 differs from the one in it); restore it from a copy, or '
        'delete it')


def decode(data: bytes, where: str) -> Context:
  """The context in these bytes; ConfigError unless all are as they were saved."""
  from safetensors import deserialize
  check_whole(data, where)
  header = _header(data, where)
  arrays = {name: np.frombuffer(x['data'], DTYPES[x['dtype']]).reshape(x['shape'])
            for name, x in deserialize(data)}
  return Context(header, arrays)


def _header(data: bytes, where: str) -> Header:
  """The header of a file's beginning; nothing says yet that it is as it was saved."""
  try:
    length = int.from_bytes(data[:8], 'little')
    text = json.loads(data[8:8 + length])['__metadata__']['longctx']
    h = json.loads(text)
    version = h['version']
    check(version == VERSION, f'{where}: has format version {version}, and this longctx knows '
          f'{VERSION}; load it with the longctx that saved it')
    identity = Identity(model=h['model'], config=h['config'], parameters=h['parameters'],
                        tokenizer=h['tokenizer'])
    return Header(identity=identity, capacity=h['capacity'], tokens=int(h['tokens']),
                  tail=tuple(h['tail']), dtype=h['dtype'], created=int(h['created']))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    if isinstance(e, ConfigError):
      raise
    raise ConfigError(f'{where}: is damaged (its header cannot be read); restore it from a copy, or '
                      'delete it') from e


def name_of(path: str | os.PathLike) -> str:
  return Path(path).name.removesuffix(SUFFIX)


def dump(context: Context, path: str | os.PathLike, key: bytes | None = None) -> bytes:
  """The bytes of the file `path`, encrypted for it where there is a key."""
  data = encode(context)
  return data if key is None else seal.seal(data, key, name_of(path))


def read(path: str | os.PathLike) -> bytes:
  try:
    return Path(path).read_bytes()
  except FileNotFoundError as e:
    raise ConfigError(f'{path}: no such context') from e
  except OSError as e:
    raise ConfigError(f'{path}: cannot be read: {e.strerror}') from e


def unseal(data: bytes, path: str | os.PathLike, key: bytes | None) -> bytes:
  """The plain file; with a key only an encrypted one is trusted."""
  if seal.is_sealed(data):
    return seal.open_sealed(data, key, name_of(path), str(path))
  check(key is None, f'{path}: is not encrypted, so anybody may have written it, and a key was given; '
        f'leave the key out, or encrypt it: python -m longctx.contexts encrypt {name_of(path)} '
        '--store=... --key_file=...')
  return data


def save(path: str | os.PathLike, context: Context, key: bytes | None = None) -> int:
  """Writes the context whole or not at all; returns its bytes. OSError where the disk is full."""
  data = dump(context, path, key)
  files.atomic_write(path, data)
  return len(data)


def load(path: str | os.PathLike, identity: Identity | None = None, key: bytes | None = None
         ) -> Context:
  """The context; ConfigError if it is damaged, or of another model than `identity` (None: any)."""
  context = decode(unseal(read(path), path, key), str(path))
  if identity is not None:
    check_same(context.header.identity, identity, str(path))
  return context


def fork(source: str | os.PathLike, target: str | os.PathLike, key: bytes | None = None) -> int:
  """A copy that shares nothing with its source, which is checked whole; returns its bytes."""
  data = unseal(read(source), source, key)
  check_whole(data, str(source))
  data = data if key is None else seal.seal(data, key, name_of(target))
  files.atomic_write(target, data)
  return len(data)


def inspect(path: str | os.PathLike) -> Header | Sealed:
  """What a file's beginning says of it, unchecked and quick."""
  try:
    with open(path, 'rb') as file:
      data = file.read(seal.HEAD)
      if seal.is_sealed(data):
        check(len(data) == seal.HEAD, f'{path}: is cut short ({len(data)} bytes)')
        return Sealed(*seal.described(data))
      length = int.from_bytes(data[:8], 'little')
      data += file.read(min(length, MAX_HEADER) + 8 - len(data))
  except OSError as e:
    raise ConfigError(f'{path}: cannot be read: {e.strerror}') from e
  check(data[8:START] == MARK, f'{path}: is not a context, or its beginning is damaged; restore it '
        'from a copy, or delete it')
  return _header(data, str(path))


def facts(header: Header) -> dict[str, Any]:
  """The header in the order in which a reader asks."""
  i = header.identity
  return {'model': i.model, 'tokens': header.tokens + len(header.tail), 'tail': len(header.tail),
          'capacity': header.capacity, 'dtype': header.dtype, 'parameters': i.parameters,
          'tokenizer': i.tokenizer, 'config_sha256': i.config_hash, 'config': i.config}
