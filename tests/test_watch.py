"""Watching a model changes nothing of it: no value, and not a letter of its program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx import watch
from longctx.attention import attention, intervals
from longctx.memory import armt, caching, infini, memorizing

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)


def attend():
  return attention(draw(1, 6, 2, 4), draw(1, 6, 2, 4), draw(1, 6, 2, 4), intervals.causal(1, 6))


def read_infini():
  return infini.read(infini.State(draw(1, 2, 4, 4), abs(draw(1, 2, 4))), draw(1, 3, 2, 4))


def read_memorizing():
  state = memorizing.write(memorizing.empty(1, 8, 2, 4, jnp.float32), draw(1, 5, 2, 4),
                           draw(1, 5, 2, 4), jnp.ones((1, 5), bool))
  return memorizing.read(state, draw(1, 3, 2, 4), jnp.ones(2), 2, approximate=False)


def read_armt():
  return armt.read(armt.State(draw(1, 24, 5), abs(draw(1, 24))), draw(1, 3, 4))


def read_caching():
  state = caching.State(draw(1, 3, 2, 4, 4), draw(1, 3, 5), jnp.array([2]))
  return caching.gates(state, draw(1, 4, 5), draw(1, 4, 5))


PARTS = {
  'attention': attend,
  'infini': read_infini,
  'memorizing': read_memorizing,
  'armt': read_armt,
  'memory_caching': read_caching,
}


@pytest.mark.parametrize('name', PARTS)
def test_the_program_is_the_same_whether_or_not_it_could_be_watched(name, monkeypatch):
  def program():
    global rng
    rng = np.random.default_rng(1)
    return str(jax.make_jaxpr(lambda: PARTS[name]())())   # a new function: traces are kept by it
  with_tell = program()
  with watch.told() as calls:
    watched = program()
  monkeypatch.setattr(watch, 'tell', lambda *_, **__: None)
  assert program() == with_tell == watched
  assert [call.name for call in calls] == [name]


def test_nobody_hears_what_is_told_to_another():
  watch.tell('before')
  with watch.told() as outer:
    watch.tell('one', x=1)
    with watch.told() as inner:
      watch.tell('two')
    watch.tell('three')
  watch.tell('after')
  assert outer == [watch.Told('one', {'x': 1}), watch.Told('three', {})]
  assert inner == [watch.Told('two', {})]


def test_a_listener_is_gone_after_an_error():
  with pytest.raises(RuntimeError), watch.told() as calls:
    raise RuntimeError
  watch.tell('after')
  assert not calls
