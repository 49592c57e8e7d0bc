"""Checksums of what devices hold alike: one flipped bit on one of eight devices is found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longctx.errors import RunError
from longctx.parallel import mesh
from longctx.training import divergence

SPECS = {'a_whole': P(), 'b_cut': P(None, 'model'), 'c_shared_by_none': P(('data', 'seq'), 'model')}


@pytest.fixture(scope='module')
def comparison():
  layout = mesh.make_layout(mesh.Config(layout='sequence_fsdp', data=2, seq=2, model=2))
  return divergence.Comparison(jax.tree.map(jnp.asarray, make(layout)), layout), layout


def make(layout, change=None):
  """Three arrays over eight devices; change(name, device, its part) may alter what one device holds."""
  r, found = np.random.default_rng(0), {}
  for name, dtype in (('a_whole', jnp.bfloat16), ('b_cut', jnp.float32), ('c_shared_by_none', jnp.float32)):
    value = np.asarray(r.normal(size=(8, 6)), dtype)
    sharding = jax.sharding.NamedSharding(layout.mesh, SPECS[name])
    parts = []
    for device, index in sharding.devices_indices_map(value.shape).items():
      part = value[index].copy()
      parts.append(jax.device_put(change(name, device, part) if change else part, device))
    found[name] = jax.make_array_from_single_device_arrays(value.shape, sharding, parts)
  return found


def flipped(part, bit, at=(1, 2)):
  words = part.view(np.uint16 if part.dtype.itemsize == 2 else np.uint32)
  words[at] ^= 1 << bit
  return part


def test_equal_replicas_agree(comparison):
  alike, layout = comparison
  alike.check(10, make(layout))
  assert alike.agreed == 10


@pytest.mark.parametrize('name,bit', [('a_whole', 0), ('a_whole', 15), ('b_cut', 0), ('b_cut', 31)])
@pytest.mark.parametrize('device', [0, 5])
def test_one_bit_of_one_device_is_found_and_named(comparison, name, bit, device):
  alike, layout = comparison
  alike.check(20, make(layout))
  wrong = make(layout, lambda n, d, part: flipped(part, bit) if (n, d.id) == (name, device) else part)
  with pytest.raises(RunError, match=rf'step 30: parameter {name} of device {device} \(process 0\) has other '
                     r'bits than its replicas; they agreed at step 20\.'):
    alike.check(30, wrong)


def test_words_that_changed_places_are_found(comparison):
  alike, layout = comparison
  def swap(name, device, part):
    if (name, device.id) == ('b_cut', 3):
      part[[0, 1]] = part[[1, 0]]
    return part
  with pytest.raises(RunError, match='parameter b_cut of device 3 '):
    alike.check(40, make(layout, swap))


def test_the_first_that_differs_is_named_and_what_nobody_shares_is_not_compared(comparison):
  alike, layout = comparison
  change = lambda n, d, part: flipped(part, 3, (0, 0)) if d.id == 6 and n != 'a_whole' else part
  with pytest.raises(RunError, match='parameter b_cut of device 6 '):
    alike.check(50, make(layout, change))
  alone = lambda n, d, part: flipped(part, 3, (0, 0)) if d.id == 6 and n == 'c_shared_by_none' else part
  alike.check(60, make(layout, alone))
