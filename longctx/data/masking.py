"""Masked tokens to guess, as BERT is trained: rows of text, some of whose tokens are hidden.

Of the tokens of text a part (data.mask_rate, 15 %) is to be guessed. Of these 80 % are the mask, the
symbol after the tokenizer's last, 10 % are any other token, and 10 % stand as they are. Which, is a pure
function of the seed and of the row's number from the first batch's first row on, whatever the hosts and the
batch size: held-out rows are scored on the same hidden tokens in batches of any size.
Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1. Differs: each token is drawn by itself and at
every visit anew (their data was drawn ten times beforehand).
Held by: tests/test_data_examples.py.

B batch  T tokens
"""

from typing import Any

import numpy as np

from longctx.data.tasks.example import generator
from longctx.data.tokenizer import Tokenizer

MASKED, RANDOM = 0.8, 0.1   # of those to guess; the rest stand as they are


def mask_symbol(tokenizer: Tokenizer) -> int:
  return tokenizer.vocab_size


def masked(tokens_T: np.ndarray, is_text_T: np.ndarray, rate: float, tokenizer: Tokenizer,
           rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """(tokens with some hidden, which are to be guessed)."""
  chosen_T = (rng.random(len(tokens_T)) < rate) & is_text_T & (tokens_T != tokenizer.separator)
  how_T = rng.random(len(tokens_T))
  any_T = rng.integers(0, tokenizer.vocab_size - 1, len(tokens_T))
  any_T += any_T >= tokenizer.separator   # a separator is never drawn
  hidden_T = np.where(how_T < MASKED, mask_symbol(tokenizer),
                      np.where(how_T < MASKED + RANDOM, any_T, tokens_T))
  return np.where(chosen_T, hidden_T, tokens_T).astype(tokens_T.dtype), chosen_T


class MaskedRows:
  """The batches of another source, some of whose tokens are hidden and are the targets."""

  def __init__(self, rows: Any, tokenizer: Tokenizer, rate: float, seed: int, batch_size: int):
    """`batch_size`: rows of a batch, of all hosts."""
    self._rows, self._tokenizer, self._rate, self._seed, self._size = rows, tokenizer, rate, seed, batch_size
    self.num_rows = rows.num_rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    batch = self._rows[i]
    batch['targets'] = batch['tokens'].copy()
    for local, row in enumerate(self._rows.rows):
      rng = generator('mask', self._seed, i * self._size + row)
      batch['tokens'][local], chosen_T = masked(
          batch['tokens'][local], batch['segment_ids'][local] > 0, self._rate, self._tokenizer, rng)
      batch['loss_mask'][local] = chosen_T
    return batch

  def accounting(self) -> dict:
    return self._rows.accounting()
