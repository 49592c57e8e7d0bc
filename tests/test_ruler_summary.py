"""Averages and effective lengths of rows of RULER's published table (its README at c3f5e3b)."""

import pytest

from longctx.errors import ConfigError
from longctx.evaluation.ruler_summary import average, effective_length, weighted_average

LENGTHS = [4096 * 2**i for i in range(6)]
# Model: (scores of 4K to 128K, average, wAvg. (inc), wAvg. (dec), effective length).
TABLE = {
    'Jamba-1.5-large': ((96.7, 96.6, 96.4, 96.0, 95.4, 95.1), 96.0, 95.7, 96.3, 131072),
    'GPT-4-1106-preview': ((96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 91.6, 89.0, 94.1, 65536),
    'Llama3.1 (70B)': ((96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 89.6, 85.5, 93.7, 65536),
    'Command-R-plus-0824': ((96.0, 95.1, 94.0, 92.4, 85.4, 64.6), 87.9, 83.4, 92.4, 32768),
    'MegaBeam-Mistral (7B)': ((93.8, 92.5, 92.0, 89.2, 83.7, 83.7), 89.1, 87.3, 91.0, 32768),
    'GradientAI/Llama3 (8B)': ((92.8, 90.3, 85.7, 79.9, 76.3, 69.5), 82.4, 78.5, 86.3, 16384),
    'Qwen1.5 (72B)': ((94.9, 93.8, 78.0, 67.8, 0.0, 0.0), 55.7, 37.5, 74.0, 8192),
    'InternLM2.5 (7B)': ((88.1, 85.5, 84.5, 82.7, 75.5, 68.9), 80.9, 77.8, 83.9, 4096),
    'LWM (7B)': ((82.3, 78.4, 73.7, 69.1, 68.1, 65.0), 72.8, 69.9, 75.7, None),
}


@pytest.mark.parametrize('model', TABLE)
def test_rows_of_the_published_table(model):
  scores, mean, rising, falling, effective = TABLE[model]
  # In any order of the lengths; scores are published to 0.05, and so are the averages.
  row = dict(reversed([*zip(LENGTHS, scores)]))
  assert average(row) == pytest.approx(mean, abs=0.1)
  assert weighted_average(row, rising=True) == pytest.approx(rising, abs=0.1)
  assert weighted_average(row, rising=False) == pytest.approx(falling, abs=0.1)
  assert effective_length(row) == effective


def test_an_effective_length_reaches_the_threshold_itself():
  row = {4096: 90.0, 8192: 85.6, 16384: 85.5}
  assert effective_length(row) == 8192
  assert effective_length(row, threshold=85.5) == 16384
  assert effective_length({4096: 98.4, 131072: 85.6}) == 131072   # Qwen3-32B's in the table


def test_scores_that_are_none_are_refused():
  with pytest.raises(ConfigError, match='has no score'):
    average({})
  with pytest.raises(ConfigError, match=r'scores_by_length\[4096\]=101: must be at least 0'):
    effective_length({4096: 101})
