"""Figures of one answer, read back from the figure: maps of heads, norms of states."""

import io

import numpy as np
import pytest

from longctx.draw import attention, memory


def test_a_bin_shows_its_largest_weight_and_no_token_is_lost():
  weights = np.zeros((2, 1000))
  weights[0, 7], weights[1, 999] = .9, .4
  shown, edges = attention.binned(weights, bins=64)
  assert shown.shape == (2, 64) and edges[0] == 0 and edges[-1] == 1000
  assert shown[0].max() == .9 and shown[1, -1] == .4 and (shown > 0).sum() == 2
  few, edges = attention.binned(weights[:, :5], bins=64)
  assert few.shape == (2, 5) and edges.tolist() == [0, 1, 2, 3, 4, 5]


def test_heads_stand_below_their_layer_and_spans_above(drawn):
  maps = {'layer 0': np.eye(3, 40), 'layer 2': np.full((2, 40), .1)}
  attention.draw(maps, io.BytesIO(), title='t', marks={'needle': [(5, 9)], 'question': [(36, 40)]})
  axes = drawn[0].axes[0]
  shown = axes.collections[0].get_array()
  np.testing.assert_allclose(np.asarray(shown).reshape(5, 40), np.concatenate(list(maps.values())))
  assert [t.get_text() for t in axes.get_yticklabels()] == ['layer 0', 'layer 2']
  assert axes.get_yticks().tolist() == [1.5, 4]
  assert axes.get_ylim()[0] > axes.get_ylim()[1]   # the first layer at the top
  assert [t.get_text() for t in axes.texts] == ['needle', 'question']
  bars = [line.get_xdata() for line in axes.lines if line.get_linewidth() == 4]
  assert [list(bar) for bar in bars] == [[5, 9], [36, 40]]


def test_a_panel_an_array_and_a_line_a_layer(drawn):
  tokens = np.array([10, 20, 30])
  series = {
    (0, 'M'): np.array([1, 2, 3]),
    (0, 'z'): np.array([5, 6, 7]),
    (1, 'M'): np.array([2, 2, 2]),
  }
  memory.draw(tokens, series, io.BytesIO(), title='state', needles=[(12, 15)])
  panels = [axes for axes in drawn[0].axes if axes.get_visible()]
  assert [axes.get_title() for axes in panels] == ['M', 'z']
  lines = {line.get_label(): line.get_ydata().tolist() for line in panels[0].get_lines()}
  assert lines == {'layer 0': [1, 2, 3], 'layer 1': [2, 2, 2]}
  low, high = (
    panels[1].patches[0].get_extents().transformed(panels[1].transData.inverted()).intervalx
  )
  assert (round(low), round(high)) == (12, 15)
  assert panels[0].get_ylim()[0] == 0


def test_arrays_without_a_panel_are_counted(drawn):
  series = {(0, f'a{i}'): np.ones(1) for i in range(memory.PANELS + 3)}
  memory.draw(np.array([5]), series, io.BytesIO(), title='state')
  assert '3 more arrays are not shown' in drawn[0].get_suptitle()


def test_nothing_to_draw_is_an_error():
  with pytest.raises(ValueError, match='no map'):
    attention.draw({}, io.BytesIO(), title='', marks={})
  with pytest.raises(ValueError, match='no state'):
    memory.draw(np.array([]), {}, io.BytesIO(), title='')
