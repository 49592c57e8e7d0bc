"""Encryption at rest: a whole file under AES-256-GCM, bound to its format and name.

  magic [7]  version [1]  id of the key [8]  nonce [12]  the file, encrypted  tag [16]

The nonce is random, anew at each save. What stands before the encrypted part, and the context's name,
are the associated data: a file that was altered, or renamed by hand, does not open. The id says
whether a key is the right one, and is a MAC under it.
Source: NIST SP 800-38D. Held by: tests/test_store.py.
"""

import hmac
import os
import re
from typing import Any

from longctx.errors import ConfigError, check

MAGIC = b'LCMSEAL'
VERSION = 1
KEY_VARIABLE = 'LONGCTX_STORE_KEY'
KEY_ID, NONCE, TAG = 8, 12, 16
HEAD = len(MAGIC) + 1 + KEY_ID + NONCE
MAX_BYTES = 2 ** 36 - 32   # of one message under GCM
PIECE = 2 ** 26            # a call takes less than 2^31
MAKE_ONE = "python -c 'import secrets; print(secrets.token_hex(32))' > FILE makes one"


def read_key(path: str = '') -> bytes | None:
  """The key of a file, or else of the environment, or None: 64 hexadecimal digits or 32 bytes."""
  if path:
    where = f'--key_file={path!r}' if '\0' in path else f'--key_file={path}'
    try:
      with open(path, 'rb') as file:
        data = file.read(1000)
    except (OSError, ValueError) as e:   # ValueError: a path that no file can have
      raise ConfigError(f'{where}: cannot be read: {getattr(e, "strerror", e)}; {MAKE_ONE}') from e
  elif KEY_VARIABLE in os.environ:
    where, data = KEY_VARIABLE, os.environ[KEY_VARIABLE].encode()
    # A secret that was meant to be there, and is not, must not leave contexts plain.
    check(bool(data), f'{where}: is set and empty; unset it to encrypt nothing; {MAKE_ONE}')
  else:
    return None
  if re.fullmatch(rb'\s*[0-9a-fA-F]{64}\s*', data):
    return bytes.fromhex(data.decode())
  check(len(data) == 32, f'{where}: is no key ({len(data)} bytes); must be 64 hexadecimal digits, or '
        f'32 bytes; {MAKE_ONE}')
  return data


def key_id(key: bytes) -> bytes:
  return hmac.digest(key, b'longctx key id', 'sha256')[:KEY_ID]


def is_sealed(data: bytes) -> bool:
  return data[:len(MAGIC)] == MAGIC


def described(data: bytes) -> tuple[int, str]:
  """(version, id of the key) of a sealed file's first HEAD bytes."""
  return data[len(MAGIC)], data[len(MAGIC) + 1:][:KEY_ID].hex()


def check_can_encrypt() -> None:
  """ConfigError where the package that does it is not installed."""
  try:
    import cryptography.hazmat.primitives.ciphers  # noqa: F401
  except ImportError as e:
    raise ConfigError('encrypted contexts need the package cryptography: pip install '
                      'cryptography') from e


def _gcm(key: bytes, nonce: bytes, tag: bytes | None, head: bytes, name: str) -> Any:
  check_can_encrypt()
  from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
  cipher = Cipher(algorithms.AES(key), modes.GCM(nonce, tag))
  worker = cipher.encryptor() if tag is None else cipher.decryptor()
  worker.authenticate_additional_data(head + b'longctx context ' + name.encode())
  return worker


def _by_pieces(worker: Any, data: memoryview) -> list[bytes]:
  return [worker.update(data[i:i + PIECE]) for i in range(0, len(data), PIECE)]


def seal(data: bytes, key: bytes, name: str) -> bytes:
  check(len(data) <= MAX_BYTES, f'{name}: {len(data)} bytes cannot be encrypted in one file; must be '
        f'at most {MAX_BYTES}; save it without a key')
  nonce = os.urandom(NONCE)
  head = MAGIC + bytes([VERSION]) + key_id(key) + nonce
  worker = _gcm(key, nonce, None, head, name)
  pieces = _by_pieces(worker, memoryview(data))
  return b''.join([head, *pieces, worker.finalize(), worker.tag])


def open_sealed(data: bytes, key: bytes | None, name: str, where: str) -> bytes:
  """The file inside; ConfigError without the right key, or where a byte or the name is another."""
  check(len(data) >= HEAD + TAG, f'{where}: is cut short ({len(data)} bytes)')
  version, of = described(data)
  check(version == VERSION, f'{where}: is encrypted in format {version}, and this longctx knows '
        f'{VERSION}; update longctx, or restore the file if it was damaged')
  check(key is not None, f'{where}: is encrypted (key {of}); give --key_file=FILE or set '
        f'{KEY_VARIABLE}')
  mine = key_id(key).hex()
  check(of == mine, f'{where}: is encrypted with key {of}, and the key given is {mine}; give the key '
        'that it was saved with')
  worker = _gcm(key, data[HEAD - NONCE:HEAD], data[-TAG:], data[:HEAD], name)
  from cryptography.exceptions import InvalidTag
  pieces = _by_pieces(worker, memoryview(data)[HEAD:-TAG])
  try:
    return b''.join([*pieces, worker.finalize()])
  except InvalidTag:
    raise ConfigError(f'{where}: was altered, damaged or renamed since it was saved; restore it from '
                      'a copy under the name that it was saved with') from None
