"""--mode=plan against compiled programs, and against what is known without one."""

import functools
import json
import math

import jax
import pytest

from longctx import assembly, configuration, main, plan, train
from longctx.parallel import aot, chips

MIB = 2**20


def config_of(**fields):
  """d 512, 8 layers, 2 rows of 4096 tokens; fields as model__remat='full'."""
  config = configuration.base()
  config.data.length, config.data.batch_size = 4096, 2
  config.model.update(dict(num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=2,
                           vocab_size=8192))
  config.mesh.layout = 'single'
  for name, value in fields.items():
    section, field = name.split('__')
    config[section][field] = value
  config.model.max_length = config.data.length
  return config


LONG = dict(data__length=16384, data__batch_size=1, mesh__seq=8, model__remat='full')
QUICK = [(1, dict(model__remat='full'))]
CONFIGS = [
    (1, dict(model__num_layers=1, model__vocab_size=65536)),   # the loss needs most
    (1, dict()),
    (1, dict(model__remat='dots', data__batch_size=1)),
    (1, dict(model__remat='full', model__mlp='gelu', model__num_heads=16, model__num_kv_heads=16)),
    (1, dict(model__remat='full', model__embed_dim=1024, data__length=2048)),
    (1, dict(model__num_layers=1, model__vocab_size=65536, loss__chunk=128)),
    (1, dict(model__num_layers=1, model__vocab_size=65536, loss__chunk=128, model__tied=False)),
    (8, dict(model__remat='full', data__length=2048, data__batch_size=16, mesh__layout='fsdp')),
    (8, dict(LONG, mesh__layout='sequence')),
    (8, dict(LONG, mesh__layout='sequence', model__remat='none')),
    (8, dict(LONG, mesh__layout='sequence_fsdp')),
    (8, dict(LONG, mesh__layout='sequence_fsdp', mesh__strategy='allgather')),
    (8, dict(LONG, mesh__layout='sequence', mesh__strategy='ulysses', mesh__seq=4, mesh__data=2,
             data__batch_size=2, model__num_kv_heads=4)),
    (8, dict(LONG, mesh__layout='sequence_fsdp', model__mlp_block=256)),
    (1, dict(model__remat='full', model__mlp_block=512)),
    (1, dict(model__remat='full', model__dtype='bfloat16')),
    (8, dict(LONG, mesh__layout='sequence_fsdp', model__vocab_size=65536, model__tied=False)),
]


def check_prediction(devices: list, fields: dict) -> None:
  config = config_of(**fields)
  a = assembly.assemble(config, devices)
  lowered = train.jit_step(a).lower(a.abstract, a.abstract_batch())
  # Memory is settled before code is made of it: less care with the code, a third of the time.
  compiled = lowered.compile({'xla_backend_optimization_level': 0,
                              'xla_llvm_disable_expensive_passes': True}
                             if devices[0].platform == 'cpu' else None)
  found = plan.plan(config, devices)
  _, total = plan.peak(found)
  assert total == pytest.approx(aot.memory_of(compiled).total, rel=0.1)
  stays = sum(p.bytes for p in found if p.name in ('parameters', 'optimiser', 'batch'))
  assert stays == pytest.approx(aot.memory_of(compiled).arguments, rel=1e-3)


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('devices, fields', QUICK)
def test_the_plan_is_within_a_tenth_of_the_program(devices, fields):
  check_prediction(jax.devices()[:devices], fields)


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('devices, fields', CONFIGS)
def test_the_plan_of_every_layout_is_within_a_tenth_of_the_program(devices, fields):
  check_prediction(jax.devices()[:devices], fields)


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
def test_the_plan_of_a_tpu_slice_is_within_a_tenth_of_the_program(tpu_devices):
  check_prediction(tpu_devices('v5e:2x2'), dict(
      data__length=65536, data__batch_size=1, model__num_layers=4, model__embed_dim=2048,
      model__num_heads=16, model__num_kv_heads=4, model__mlp_dim=7168, model__vocab_size=1024,
      model__dtype='bfloat16', model__remat='full', mesh__layout='sequence_fsdp', mesh__seq=4,
      mesh__order='zigzag'))


@functools.cache
def bytes_of(**fields) -> dict[str, int]:
  devices = fields.pop('devices', 1)
  return {p.name: p.bytes for p in plan.plan(config_of(**fields), jax.devices()[:devices])}


SMALL = dict(model__num_layers=2, data__length=512)


def test_parameters_moments_and_gradients_by_the_closed_form():
  found = bytes_of(**SMALL)
  count = assembly.assemble(config_of(**SMALL)).model_config.num_parameters()
  assert found['parameters'] == found['gradients'] == 4 * count
  assert found['optimiser'] == pytest.approx(8 * count, abs=64)
  averaged = bytes_of(**SMALL, optimizer__ema=0.9)
  assert averaged['averaged parameters'] == 4 * count


def test_remat_keeps_a_layers_input_and_nothing_else():
  """Of each layer; besides, what the model keeps once: the last layer's output, normed, angles."""
  tokens, D, H = 2 * 512, 512, 64
  row = tokens * 4
  found = bytes_of(**SMALL, model__remat='full')['kept from forward to backward']
  once = 2 * D * row + 2 * (H // 2) * row
  assert found == pytest.approx(2 * D * row + once, rel=0.02)


def test_no_remat_keeps_what_a_layers_products_and_norms_need():
  row = 2 * 512 * 4
  D, F, K, N, H = 512, 1368, 2, 8, 64
  kept = [bytes_of(**SMALL | dict(model__num_layers=n))['kept from forward to backward']
          for n in (2, 3)]
  # Of each norm: its input, the same divided by its rms, the result. Of attention: q, k, v, out
  # twice (as the kernel has it and as the product has it), lse. Of the MLP: gate, input, product.
  expected = row * (6 * D + 3 * N * H + 2 * K * H + N + 3 * F + 2)
  assert kept[1] - kept[0] == pytest.approx(expected, rel=0.05)


def test_what_the_mesh_cuts_is_smaller_by_as_much():
  one = bytes_of(**SMALL)
  eight = bytes_of(**SMALL | dict(data__batch_size=16), mesh__layout='fsdp', devices=8)
  assert eight['parameters'] == pytest.approx(one['parameters'] / 8, rel=0.01)
  assert eight['optimiser'] == pytest.approx(one['optimiser'] / 8, rel=0.01)
  same = ('kept from forward to backward', 'one layer, forward and backward')
  for name in same:   # 2 rows a device still, and the lookup keeps the tokens of all
    assert eight[name] == pytest.approx(one[name], rel=1e-3)
  cut = bytes_of(**SMALL, mesh__layout='sequence', mesh__seq=8, devices=8)
  for name in same:
    assert cut[name] == pytest.approx(one[name] / 8, rel=0.02)
  assert cut['parameters'] == one['parameters']


def test_layer_inputs_on_the_host_are_not_the_devices():
  """All but two layers' that are on their way."""
  chip, count = aot.check_topology('v5e:2x2')
  def parts(remat):
    config = config_of(**SMALL | dict(model__num_layers=6), model__remat=remat)
    return {p.name: p for p in plan.plan(config, aot.stand_ins(chip, count)[:1])}
  here, away = parts('full'), parts('offload')
  name, moved = 'kept from forward to backward', 4 * 2 * 512 * 512 * 4
  assert here[name].bytes - away[name].bytes == away['on the host'].bytes == moved
  assert not away['on the host'].moments and 'not of the device' in plan.table([*away.values()])


def test_blocks_hold_a_block_and_the_sums_of_the_weights_gradients():
  found = bytes_of(**SMALL, model__mlp_block=128)
  D, F = 512, 1368
  assert found['a block of the feed-forward layer'] == 2 * 128 * F * 6 * 4 + 3 * D * F * 4
  whole = bytes_of(**SMALL)
  layer = 'one layer, forward and backward'
  assert whole[layer] - found[layer] > 1.3 * 2 * 512 * 2 * F * 4   # gate, input, product are gone
  assert 'a block of the feed-forward layer' not in whole


def test_microbatches_divide_what_is_kept():
  one, four = bytes_of(**SMALL | dict(data__batch_size=4)), bytes_of(
      **SMALL | dict(data__batch_size=4), run__accumulate=4)
  name = 'kept from forward to backward'
  assert four[name] == pytest.approx(one[name] / 4, rel=0.01)
  assert four['gradients summed before'] == four['gradients']


def test_the_peak_is_of_the_moment_that_needs_most():
  found = [plan.Part('a', 5, plan.MOMENTS), plan.Part('b', 3, ('loss',)),
           plan.Part('c', 4, ('backward',)), plan.Part('d', 2, ('backward', 'update'))]
  assert plan.peak(found) == ('backward', 11)
  assert 'in the loss: not counted' in plan.table(found)


def test_what_does_not_fit_is_told_what_to_turn():
  chip = next(c for c in chips.CHIPS if c.name == 'v5e')
  found = [plan.Part('kept', 14 * 2**30, plan.MOMENTS, "model.remat='full'"),
           plan.Part('logits', 3 * 2**30, ('loss',), 'loss.chunk smaller')]
  lines = plan.table(found, chip).splitlines()
  assert 'DOES NOT FIT' in lines[3]
  assert lines[5:] == ["  kept: model.remat='full'", '  logits: loss.chunk smaller']
  assert plan.table(found[:1], chip).endswith('of 16 GiB: fits')


def test_plan_mode_needs_neither_workdir_nor_libtpu(tmp_path, monkeypatch, capsys):
  root = __file__.rsplit('/', 2)[0]
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(aot.importlib.util, 'find_spec', lambda name: None)
  assert main.main(['main', f'--config={root}/configs/ring_1m_v5e.py', '--mode=plan',
                    '--topology=v5e:8x8']) == 0
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert found['fits'] is True and found['chip'] == 16 * 2**30
  params = next(p for p in found['parts'] if p['name'] == 'parameters')
  norms = 65 * 4096   # which every device has whole
  assert params['bytes'] == 4 * ((8_030_261_248 - norms) // 64 + norms)
  assert math.isclose(found['total'], sum(
      p['bytes'] for p in found['parts'] if found['moment'] in p['moments']))
  assert 'of 16 GiB: fits' in capsys.readouterr().out


def test_plan_mode_exits_with_1_where_it_does_not_fit(tmp_path, capsys):
  assert main.main(['main', '--config=configs/ring_1m_v5e.py', '--mode=plan',
                    '--topology=v5e:8x8', f'--workdir={tmp_path}',
                    '--config.model.remat=none']) == 1
  out = capsys.readouterr().out
  assert 'DOES NOT FIT' in out and "model.remat='full'" in out
