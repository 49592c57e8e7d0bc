"""Tokenizers: bytes <-> token ids, without loss, with the bytes that each token stands for.

Both promise: `decode(encode(x)) == x`, `num_bytes(encode(x)).sum() == len(x)` (so that losses can
be given in bits per byte, exactly), and that no text whatever produces the `separator` id, which
stands between documents.

SentencePiece: Kudo and Richardson 2018, arXiv:1808.06226. Differs from the library: ids are decoded
by a table of bytes, and U+2581, with which SentencePiece writes a space, is spelt in byte tokens
when the text itself has it; the library would give a space back.
Held by: tests/test_data_tokenizer.py.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from longctx import files
from longctx.errors import ConfigError, check, nearest

SPACE = '\u2581'  # SentencePiece's visible space


class Bytes:
  """One token a byte, and the separator."""

  vocab_size = 257
  separator = 256
  fingerprint = 'bytes'

  def encode(self, data: bytes, name: str = 'the text') -> np.ndarray:
    del name  # every string of bytes is in the language
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: np.ndarray) -> bytes:
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes()

  def num_bytes(self, ids: np.ndarray) -> np.ndarray:
    return (np.asarray(ids) < 256).astype(np.int32)


class SentencePiece:
  """A SentencePiece model that falls back to bytes."""

  def __init__(self, path: str):
    import sentencepiece
    from google.protobuf import message
    from sentencepiece import sentencepiece_model_pb2
    try:
      model = files.patiently(f'data.tokenizer={path!r}', pathlib.Path(path).expanduser().read_bytes)
    except OSError as e:
      raise ConfigError(f'data.tokenizer={path!r}: cannot be read: {e.strerror}') from e
    # Settings that only add or squeeze spaces can be undone; a lossy character map cannot.
    proto = sentencepiece_model_pb2.ModelProto()
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      proto.ParseFromString(model)
      proto.normalizer_spec.add_dummy_prefix = False
      proto.normalizer_spec.remove_extra_whitespaces = False
      self._processor.LoadFromSerializedProto(proto.SerializeToString())
    except (RuntimeError, message.DecodeError) as e:
      raise ConfigError(f'data.tokenizer={path!r}: is not a SentencePiece model') from e
    self.fingerprint = hashlib.sha256(model).hexdigest()
    self.is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    self.vocab_size = self._processor.vocab_size()
    self.separator = next((i for i in (self._processor.bos_id(), self._processor.eos_id())
                           if i >= 0), -1)
    check(self.separator >= 0, f'data.tokenizer={path!r}: has neither a begin nor an end symbol to '
          'separate documents; train one with python -m longctx.train_tokenizer')
    self._bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
    self._num_bytes = np.array([len(b) for b in self._bytes], np.int32)
    self._space_ids = [self._processor.piece_to_id(f'<0x{b:02X}>') for b in SPACE.encode()]
    self._check_lossless(path)

  def _bytes_of(self, i: int) -> bytes:
    if self._processor.is_byte(i):
      return bytes([int(self._processor.id_to_piece(i)[1:-1], 16)])
    if self._processor.is_control(i) or self._processor.is_unknown(i):
      return b''
    return self._processor.id_to_piece(i).replace(SPACE, ' ').encode()

  def merges(self) -> dict[str, float]:
    """{piece: score} of those that stand for text, in SentencePiece's spelling.

    Of a BPE model: of two neighbours that make a piece, those of the largest score are joined first.
    """
    p = self._processor
    return {p.id_to_piece(i): p.get_score(i) for i in range(self.vocab_size)
            if not (p.is_byte(i) or p.is_control(i) or p.is_unknown(i))}

  def pieces(self) -> list[str]:
    """Of every id, in SentencePiece's spelling."""
    return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

  def _check_lossless(self, path: str) -> None:
    num_byte_tokens = sum(self._processor.is_byte(i) for i in range(self.vocab_size))
    check(num_byte_tokens == 256, f'data.tokenizer={path!r}: has no byte tokens, so it cannot '
          'write every text; train one with python -m longctx.train_tokenizer')
    # what NFKC, case folding and cleaning of white space would change
    probe = (' a  b\t\r\n\n Ａ１ﬁ①\u00a0e\u0301\u00e9\u200b한\u1112\u1161'
             '\U0001f600\ufeff\u2581Z ')
    check(self.decode(self._ids(probe)) == probe.encode(), f'data.tokenizer={path!r}: changes the '
          'text (a normaliser such as nmt_nfkc), so that bits per byte would be wrong; train one '
          'with python -m longctx.train_tokenizer')

  def encode(self, data: bytes, name: str = 'the text') -> np.ndarray:
    try:
      text = data.decode('utf-8')
    except UnicodeDecodeError as e:
      raise ConfigError(f'{name}: byte {e.start} ({data[e.start]:#04x}) is not UTF-8, which a '
                        "SentencePiece tokenizer needs; use data.tokenizer='bytes'") from e
    ids = self._ids(text)
    check(self.num_bytes(ids).sum() == len(data), f'{name}: the SentencePiece tokenizer loses part '
          "of this text; use data.tokenizer='bytes'")
    return ids

  def _ids(self, text: str) -> np.ndarray:
    first, *rest = text.split(SPACE)
    ids = self._processor.encode(first)
    for part in rest:
      ids += self._space_ids
      ids += self._processor.encode(part)
    return np.array(ids, np.int32)

  def decode(self, ids: np.ndarray) -> bytes:
    return b''.join(self._bytes[i] for i in np.asarray(ids).tolist())

  def num_bytes(self, ids: np.ndarray) -> np.ndarray:
    return self._num_bytes[np.asarray(ids)]


Tokenizer = Bytes | SentencePiece


def load_tokenizer(spec: str) -> Tokenizer:
  """`spec` is 'bytes' or the path of a SentencePiece .model file."""
  if spec == 'bytes':
    return Bytes()
  path = pathlib.Path(spec).expanduser()
  if not path.is_file():
    raise ConfigError(f"data.tokenizer={spec!r}: must be 'bytes' or the path of a SentencePiece "
                      f'.model file, and no such file is there{nearest(spec, ["bytes"])}')
  return SentencePiece(spec)


def _sentences(texts: Iterable[bytes], max_bytes: int) -> Iterator[str]:
  """Pieces of at most 4096 bytes, that end after a line where they can; drops what is not UTF-8."""
  total = 0
  for text in texts:
    start = 0
    while start < len(text):
      stop = min(start + 4096, len(text))
      if stop < len(text):
        stop = text.rfind(b'\n', start, stop) + 1 or stop
      sentence = text[start:stop].decode('utf-8', 'ignore').replace('\0', '')
      start = stop
      total += len(sentence)
      if total > max_bytes:
        return
      yield sentence


def train_sentencepiece(texts: Iterable[bytes], vocab_size: int, *,
                        max_bytes: int = 100_000_000) -> bytes:
  """A model file's content, trained on the first `max_bytes` of `texts`."""
  import io

  import sentencepiece
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts, max_bytes), model_writer=model,
        vocab_size=vocab_size, model_type='bpe', byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        character_coverage=0.9995, max_sentence_length=4 * 4096,
        unk_id=0, bos_id=1, eos_id=-1, pad_id=-1, num_threads=2, minloglevel=2)
  except RuntimeError as e:
    reason = str(e).strip().splitlines()[-1].split('] ')[-1]
    if 'sentences_' in str(e):
      reason = 'there is none'
    elif found := re.search(r'required_chars\. \d+ vs (\d+)', reason):
      reason = f'its characters and the bytes need at least {found[1]}'
    raise ConfigError(f'vocab_size={vocab_size}: SentencePiece cannot train on this text: '
                      f'{reason}') from e
  return model.getvalue()
