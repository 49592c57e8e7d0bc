"""Ahead-of-time compilation: topologies, the report, --mode=compile on CPU and for TPUs."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx import assembly, configuration, main, train
from longctx.errors import ConfigError
from longctx.parallel import aot, chips, hlo, hlo_work

SMALL = ['--config=configs/quickstart.py:debug', '--mode=compile', '--config.mesh.layout=sequence',
         '--config.mesh.data=2', '--config.mesh.seq=2', '--config.mesh.model=2']


# Topologies.


@pytest.mark.parametrize('name, chip, count', [
    ('v5e:8x8', 'v5e', 64), ('v5p:2x2x2', 'v5p', 8), ('v6e:4x4', 'v6e', 16), ('v5e:1x1', 'v5e', 1)])
def test_a_topology_names_chip_and_number(name, chip, count):
  found, number = aot.check_topology(name)
  assert (found.name, number) == (chip, count)


@pytest.mark.parametrize('name', ['v5e:3x3', 'v5e', 'v5e:2x2x2', 'v5p:4x4', 'h100:8', 'v5e:8×8',
                                  'v5p2x2x2', 'V5E:2x2', 'v5e:02x2', 'v5e:2x2,v5e:2x2'])
def test_an_unknown_topology_is_refused_with_those_there_are(name):
  with pytest.raises(ConfigError, match=r'no such topology.*v5e: 1x1, 2x2.*v5p: 2x2x1') as e:
    aot.check_topology(name)
  assert str(e.value).startswith(f'--topology={name}: ') and '\n' not in str(e.value)


def test_the_nearest_topology_is_named():
  with pytest.raises(ConfigError, match=r'did you mean "v5e:8x8"'):
    aot.check_topology('v5e:8x9')


def test_a_missing_libtpu_is_told_with_the_remedy(monkeypatch):
  monkeypatch.setattr(aot.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='pip install libtpu'):
    aot.topology_devices('v5e:2x2')


def test_a_libtpu_that_does_not_load_is_told_in_one_line(monkeypatch):
  from jax.experimental import topologies
  def fail(**_):
    raise RuntimeError('wrong glibc')
  monkeypatch.setattr(aot.importlib.util, 'find_spec', lambda name: True)
  monkeypatch.setattr(topologies, 'get_topology_desc', fail)
  with pytest.raises(ConfigError, match=r'libtpu cannot be loaded: wrong glibc; pip install'):
    aot.topology_devices('v5e:2x2')


def test_every_topology_is_of_a_chip_in_the_table():
  assert set(aot.TOPOLOGIES) <= {chip.name for chip in chips.CHIPS}
  for chip in chips.CHIPS:   # all of a chip is known, or the chip is none
    known = {chip.flops > 0, chip.memory > 0, chip.bandwidth > 0}
    assert len(known) == 1, chip


@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x4'])
def test_the_compiler_has_the_topologies_of_the_table(name, tpu_devices):
  devices = tpu_devices(name)
  chip, count = aot.check_topology(name)
  assert len(devices) == count
  assert chips.chip_of(devices[0].device_kind) is chip


# The report.


def test_a_report_of_a_known_program():
  """One product of [1024, 512] by [512, 256], summed over 8 devices."""
  mesh = jax.make_mesh((8,), ('seq',))
  def run(x, w):
    return jax.lax.psum(x @ w, 'seq')
  args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
          for s, spec in (((8192, 512), P('seq')), ((512, 256), P()))]
  mapped = jax.shard_map(run, mesh=mesh, in_specs=(P('seq'), P()), out_specs=P())
  compiled = jax.jit(mapped).lower(*args).compile()
  chip = next(c for c in chips.CHIPS if c.name == 'v5e')
  found = aot.report(compiled, dict(mesh.shape), model_flops=1e9, chip=chip)
  out = 1024 * 256 * 4
  assert found['memory']['arguments'] == (1024 * 512 + 512 * 256) * 4
  assert found['memory']['outputs'] == out
  assert found['memory']['chip'] == 16 * 2**30
  assert found['memory']['total'] == sum(
      found['memory'][name] for name in ('arguments', 'outputs', 'temporary', 'code'))
  assert found['flops']['counted'] == 2 * 1024 * 512 * 256
  assert found['wire_bytes'] == 2 * out * 7 // 8
  assert [x['kind'] for x in found['largest_exposed']] == ['all-reduce']
  assert found['exchanges'] == [dict(
      kind='all-reduce', axis='seq', count=1, turns=1, bytes=2 * out * 7 // 8, exposed=1,
      exposed_bytes=2 * out * 7 // 8, largest_exposed=2 * out * 7 // 8)]
  seconds = found['roofline']['seconds']
  assert seconds['compute'] == 2 * 1024 * 512 * 256 / 197e12
  assert seconds['wire'] == found['wire_bytes'] / 45e9
  assert seconds['memory'] == found['traffic_bytes'] / 819e9
  assert found['roofline']['binds'] == 'wire' and found['fits'] is True
  json.dumps(found)
  text = aot.table(found)
  assert 'of 16 GiB: fits' in text and 'all-reduce' in text and 'wire binds' in text


def test_arguments_that_are_donated_count_once():
  compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(
      jax.ShapeDtypeStruct((1024,), jnp.float32)).compile()
  memory = aot.memory_of(compiled)
  assert (memory.arguments, memory.outputs) == (4096, 0)
  assert memory.total == 4096 + memory.temporary + memory.code


def test_what_is_larger_than_the_chip_does_not_fit():
  compiled = jax.jit(lambda x: x * 2).lower(
      jax.ShapeDtypeStruct((5 * 2**28,), jnp.float32)).compile()   # 5 GiB in, 5 GiB out
  fits = {chip.name: aot.report(compiled, {'data': 1}, model_flops=1.0, chip=chip)['fits']
          for chip in chips.CHIPS if chip.memory}
  assert fits == {chip.name: chip.memory > 10 for chip in chips.CHIPS if chip.memory}
  assert not fits['v2'] and fits['v5e']


@dataclasses.dataclass
class Refusing:
  said: str

  def compile(self, options):
    raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {self.said}')


@pytest.mark.parametrize('said', [
    'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G '
    'hbm. Exceeded hbm capacity by 4.75G.',
    'E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
    'temporaries (20.50G) exceeds available HBM (15.75G). HLO module: jit_wrapped.'])
def test_the_compilers_refusal_is_read(said):
  with pytest.raises(aot.DoesNotFitError) as e:
    aot.compile_lowered(Refusing(said))
  assert (e.value.used, e.value.limit) == (int(20.5 * 2**30), int(15.75 * 2**30))


def test_another_error_of_the_compiler_is_not():
  with pytest.raises(jax.errors.JaxRuntimeError, match='no such option'):
    aot.compile_lowered(Refusing('no such option'))


def test_the_text_that_the_compiler_writes_is_the_programs_own():
  """Where a program can be read back, both ways agree."""
  lowered = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(
      jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32))
  compiled, text = aot.compile_to_read(lowered)
  programs = [hlo.parse(t) for t in (text, compiled.as_text())]
  assert hlo_work.work(programs[0]) == hlo_work.work(programs[1]) == (2 * 8 * 16 * 4, 0, 0)
  shapes = [[(x.opcode, x.shape) for x in p.computations[p.entry]] for p in programs]
  assert shapes[0] == shapes[1]


# The command.


def test_compile_mode_writes_its_report_beside_the_run(tmp_path, capsys):
  assert main.main(['main', *SMALL, f'--workdir={tmp_path}/w']) == 0
  found = json.loads((tmp_path / 'w' / 'compile.json').read_text())
  printed = capsys.readouterr().out
  config = configuration.base()
  assert found['mesh'] == dict(data=2, seq=2, model=2) and found['devices'] == 8
  assert found['fits'] is None   # a CPU's memory is not in the table
  assert found['flops']['model'] > 0 and found['num_exchanges'] == found['exposed'] > 0
  assert 'memory of a device' in printed and str(tmp_path / 'w' / 'compile.json') in printed
  assert os.listdir(tmp_path / 'w') == ['compile.json']   # no run was begun
  assert config.seed == 0


def test_compile_mode_counts_the_state_as_arguments(tmp_path):
  """Parameters and moments of one device, of which a step takes no copy."""
  config = configuration.base()
  config.model.update(dict(num_layers=1, embed_dim=32, vocab_size=300))
  config.data.length = config.model.max_length = 64
  config.mesh.layout, config.mesh.data = 'fsdp', 4
  config.data.batch_size = 4
  a = assembly.assemble(config, jax.devices()[:4])
  compiled = train.jit_step(a).lower(a.abstract, a.abstract_batch()).compile()
  memory = aot.memory_of(compiled)
  share = lambda x: x.sharding.shard_shape(x.shape)
  state = sum(int(jnp.prod(jnp.array(share(x)))) * 4 for x in jax.tree.leaves(a.abstract)
              if x.dtype == jnp.float32)
  batch = 64 * (5 * 4 + 1)
  assert memory.arguments == pytest.approx(state + batch, abs=64)
  assert memory.outputs < 4096


@pytest.mark.parametrize('args, said', [
    (['--mode=compile', '--topology=v5e:9x9'], '--topology=v5e:9x9: no such topology'),
    (['--mode=train', '--workdir=w', '--topology=v5e:2x2'],
     '--topology=v5e:2x2: does nothing with --mode=train; give --mode=describe, '
     '--mode=plan or --mode=compile'),
    (['--mode=compile', '--config.mesh.seq=3'], 'mesh.seq=3'),
    (['--mode=compile', '--config.model.remat=offload'],
     "model.remat='offload': layer inputs go to the memory of the host, and these devices")])
def test_mistakes_end_in_one_line(args, said, capsys):
  assert main.main(['main', '--config=configs/quickstart.py:debug', *args]) == 2
  line = capsys.readouterr().err
  assert said in line and line.count('\n') == 1


def test_compile_mode_for_a_tpu_slice_that_is_not_here(tmp_path, tpu_devices):
  """In a process of its own: neither the platform nor libtpu stay with this one."""
  tpu_devices('v5e:2x2')
  code = subprocess.run(
      [sys.executable, '-m', 'longctx.main', '--config=configs/quickstart.py:debug',
       '--mode=compile', '--topology=v5e:2x2', f'--workdir={tmp_path}',
       '--config.mesh.layout=fsdp', '--config.model.dtype=bfloat16', '--config.data.batch_size=4'],
      capture_output=True, text=True, check=False)
  assert code.returncode == 0, code.stderr
  found = json.loads((tmp_path / 'compile.json').read_text())
  assert (found['chip'], found['devices'], found['fits']) == ('v5e', 4, True)
  assert found['memory']['chip'] == 16 * 2**30
  kinds = {row['kind']: row for row in found['exchanges']}
  assert {'all-gather', 'all-reduce'} & set(kinds)
  assert all(row['axis'] == 'data' for row in found['exchanges'])
  assert found['roofline']['least'] > 0
  assert 'WARNING' not in code.stderr


def test_a_step_that_does_not_fit_exits_with_1(tmp_path, monkeypatch, capsys):
  from longctx import compile as compile_mode
  def refuse(lowered, options=None):
    raise aot.DoesNotFitError(20 * 2**30, 16 * 2**30)
  monkeypatch.setattr(compile_mode.aot, 'compile_to_read', refuse)
  assert main.main(['main', *SMALL, f'--workdir={tmp_path}']) == 1
  found = json.loads((tmp_path / 'compile.json').read_text())
  assert found['fits'] is False and found['memory']['total'] == 20 * 2**30
  assert 'DOES NOT FIT' in capsys.readouterr().out
