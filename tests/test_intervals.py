"""Every mask's constructor against its sentence, token by token; intersections; refusals."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.attention import intervals as m
from longctx.draw import mask as draw

B, T = 2, 13
IDS = np.array([[1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4], [7] * 13])
PREFIX = np.array([4, 20])
VALID = np.arange(T)[None] < np.array([[9], [0]])


def table(rule):
  """[B, T, T] of rule(b, query, key)."""
  return np.array([[[rule(b, t, s) for s in range(T)] for t in range(T)] for b in range(B)])


same = lambda b, t, s: IDS[b, t] == IDS[b, s]
CASES = {
    'causal': (m.causal(B, T), lambda b, t, s: s <= t),
    'bidirectional': (m.bidirectional(B, T), lambda b, t, s: True),
    'packed': (m.packed(jnp.asarray(IDS)), lambda b, t, s: same(b, t, s) and s <= t),
    'packed, both ways': (m.packed(jnp.asarray(IDS), causal=False), same),
    'window': (m.sliding_window(B, T, 4), lambda b, t, s: 0 <= t - s < 4),
    'window of one': (m.sliding_window(B, T, 1), lambda b, t, s: t == s),
    'chunks': (m.chunked(B, T, 5), lambda b, t, s: s <= t and s // 5 == t // 5),
    'prefix': (m.prefix_lm(jnp.asarray(PREFIX), T), lambda b, t, s: s <= t or s < PREFIX[b]),
    'padding': (m.padding(jnp.asarray(VALID)), lambda b, t, s: VALID[b, t] and VALID[b, s]),
    'sinks': (m.with_sinks(m.sliding_window(B, T, 3), 2),
              lambda b, t, s: s <= t and (t - s < 3 or s < 2)),
}


@pytest.mark.parametrize('name', CASES)
def test_a_mask_is_what_its_sentence_says(name):
  mask, rule = CASES[name]
  assert (np.asarray(m.sees(mask)) == table(rule)).all()


@pytest.mark.parametrize('first', [n for n in CASES if n != 'sinks'])
@pytest.mark.parametrize('second', ['packed', 'window', 'padding', 'prefix'])
def test_the_intersection_sees_what_both_see(first, second):
  (a, _), (b, _) = CASES[first], CASES[second]
  both = m.intersect(a, b)
  assert (np.asarray(m.sees(both)) == np.asarray(m.sees(a)) & np.asarray(m.sees(b))).all()


def test_what_is_known_beforehand_is_true():
  """`kind` and `reach` are promises that kernels act on."""
  masks = [mask for mask, _ in CASES.values()]
  masks += [m.intersect(a, b) for a in masks for b in masks if not (a.has_sinks or b.has_sinks)]
  kinds = set()
  for mask in masks:
    sees, kind = np.asarray(m.sees(mask)), mask.kind
    kinds.add(kind)
    slots = np.arange(T)
    if kind == 'full':
      assert sees.all()
    if kind == 'causal':
      assert (sees == ((slots[None] <= slots[:, None]) &
                       (slots[:, None] - slots[None] < (mask.reach or T)))).all()
    if kind == 'ordered':
      assert (sees.argmax(-1) + sees.sum(-1) == slots + 1).all()
    if mask.reach and not mask.has_sinks:
      assert not sees[:, slots[:, None] - slots[None] >= mask.reach].any()
  assert kinds == set(m.KINDS)


def test_masks_pass_through_jit_and_are_cut_with_the_batch():
  mask, rule = CASES['packed']
  inside = jax.jit(lambda mask: m.sees(mask))(mask)
  assert (np.asarray(inside) == table(rule)).all()
  row = jax.tree.map(lambda x: x[:1], mask)
  assert (np.asarray(m.sees(row)) == table(rule)[:1]).all()


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_packed_windows_of_any_lengths(lengths, window):
  ids = np.repeat(np.arange(len(lengths)), lengths)[None]
  mask = m.intersect(m.packed(jnp.asarray(ids)), m.sliding_window(1, ids.shape[1], window))
  t, s = np.indices((ids.shape[1],) * 2)
  assert (np.asarray(m.sees(mask))[0] == ((ids[0][t] == ids[0][s]) & (s <= t) & (t - s < window))
          ).all()


def test_what_makes_no_sense_is_refused():
  with pytest.raises(ValueError, match='window=0: must be at least 1'):
    m.sliding_window(1, 4, 0)
  with pytest.raises(ValueError, match='chunk=0: must be at least 1'):
    m.chunked(1, 4, 0)
  sinks = CASES['sinks'][0]
  with pytest.raises(ValueError, match='intersect first'):
    m.intersect(sinks, m.causal(B, T))
  with pytest.raises(ValueError, match='has sinks already'):
    m.with_sinks(sinks, 2)
  with pytest.raises(ValueError, match='of the same queries and keys'):
    m.intersect(m.causal(B, T), m.causal(B, T + 1))


def test_a_mask_is_drawn(tmp_path):
  text = draw.mask_text(CASES['packed'][0])
  assert text.splitlines()[:5] == ['#............', '##...........', '..#..........',
                                   '..##.........', '..###........']
  laid = jax.tree.map(lambda x: x[:, ::-1], CASES['sinks'][0])
  assert draw.mask_text(laid).splitlines()[0] == '###........##'
  path = draw.mask_figure({'packed': CASES['packed'][0], 'sinks': CASES['sinks'][0]},
                          tmp_path / 'masks.png')
  import matplotlib.image
  picture = matplotlib.image.imread(path)
  assert picture.shape[1] > picture.shape[0] > 100
  assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 2
  with pytest.raises(ValueError, match='row=2: the mask has 2 rows'):
    draw.mask_text(CASES['packed'][0], row=2)
