"Bulk scoring: killed, shared and started by a launcher, each row is scored once; memory stays flat; the hub is streamed."
import importlib.util, io, json, os, signal, subprocess, sys, tarfile, time
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from hub import Client, Hub
from project import ROOT

ENV = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT))


def png(k):
    "A small image whose red value is k."
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8), (k % 256, 0, 0)).save(buffer, 'png')
    return buffer.getvalue()


def write_tar(path, n):
    with tarfile.open(path, 'w') as tar:
        for k in range(n):
            for suffix, content in ('png', png(k)), ('txt', f'prompt {k}'.encode()):
                member = tarfile.TarInfo(f'{k:06}.{suffix}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Two tars and a table, 131 rows; the last one has no image."
    folder = tmp_path_factory.mktemp('data')
    write_tar(folder/'a.tar', 70)
    write_tar(folder/'b.tar', 50)
    rows = [dict(key=f'own {k}', image=dict(bytes=png(k), path=None), caption=f'prompt {k}') for k in range(10)]
    rows += [dict(key='none', image=dict(bytes=b'', path=None), caption='prompt 10')]
    pd.DataFrame(rows).to_parquet(folder/'c.parquet')
    return folder


# a reward that knows the answer: the red value of the image, and the number in the prompt; slow enough to be killed
SCRIPT = '''
import sys, time
import torch
from llava_reward_nb import bulk
bulk.PIECE, bulk.MOST = 8, 3
class Red:
    identity = 'red-1'
    def __call__(self, images, prompts):
        time.sleep(float(sys.argv[3]))
        return torch.tensor([im.convert('RGB').getpixel((0,0))[0] for im in images])
class Number(Red):
    identity = 'number-1'
    def __call__(self, images, prompts): return torch.tensor([float(p.split()[1]) for p in prompts])
print(bulk.score_sources(sys.argv[1], dict(red=Red(), number=Number()), sys.argv[2]), flush=True)
'''


def start(data, out, seconds):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(data), str(out), str(seconds)], env=ENV, stdout=subprocess.PIPE, text=True)


def parts(out): return sorted(Path(out).glob('part-*.parquet'))


def wait_for_parts(out, n, *processes):
    "Wait until there are n parts."
    end = time.monotonic()+120
    while len(parts(out)) < n:
        assert all(p.poll() is None for p in processes), 'a process has ended early'
        assert time.monotonic() < end, 'no parts appear'
        time.sleep(.01)


def check(out, data):
    "Every row once, with its own scores."
    table = pd.read_parquet(out)
    assert list(table.columns) == ['key', 'prompt', 'red', 'number', 'error']
    keys = [f'{data.name}/a.tar/{k:06}' for k in range(70)]+[f'{data.name}/b.tar/{k:06}' for k in range(50)]+[f'own {k}' for k in range(10)]+['none']
    assert sorted(table.key) == sorted(keys)
    good = table[table.key != 'none']
    assert (good.error == '').all()
    numbers = good.prompt.str.split().str[1].astype(float)
    assert (good.red == numbers).all() and (good.number == numbers).all()
    bad, = table[table.key == 'none'].to_dict('records')
    assert pd.isna(bad['red']) and pd.isna(bad['number']) and bad['error'] == 'no image'
    assert json.loads((Path(out)/'_summary.json').read_text())['reasons']['no image']['count'] == 1
    assert not list(Path(out).glob('.*.tmp'))


def test_killed_runs_go_on(data, tmp_path):
    out = tmp_path/'out'
    for n in 2, 7:
        process = start(data, out, .05)
        wait_for_parts(out, n, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {p: p.stat().st_mtime_ns for p in parts(out)}
    process = start(data, out, 0)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and said.startswith('131 rows: 130 scored, 1 with an error')
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())  # what was finished is not done again
    check(out, data)


def test_two_processes_share_and_one_is_killed(data, tmp_path):
    out = tmp_path/'out'
    one, two = start(data, out, .02), start(data, out, .02)
    wait_for_parts(out, 3, one, two)
    one.send_signal(signal.SIGKILL)
    one.wait()
    two.communicate(timeout=120)
    assert two.returncode == 0
    check(out, data)


def test_memory_is_flat(tmp_path):
    statm = Path('/proc/self/statm')
    if not statm.exists(): pytest.skip('this system has no /proc')
    from llava_reward_nb.bulk import score_sources
    write_tar(tmp_path/'many.tar', 4000)
    seen = []

    def constant(images, prompts):
        seen.append(int(statm.read_text().split()[1])*os.sysconf('SC_PAGE_SIZE'))
        return torch.zeros(len(images))
    assert score_sources(tmp_path/'many.tar', dict(constant=constant), tmp_path/'out').scored == 4000
    assert seen[-1]-seen[3] < 30e6


LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no']


def test_a_launcher_starts_two(data, tmp_path):
    out = tmp_path/'out'
    command = [*LAUNCH, '-m', 'llava_reward_nb', 'score', str(data), '--reward', 'jpeg', '--out', str(out)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('131 rows: 130 scored') == 1  # one of them speaks
    table = pd.read_parquet(out)
    assert len(table) == table.key.nunique() == 131
    assert table.jpeg.isna().sum() == 1


def test_a_launcher_is_killed(data, tmp_path):
    "Its two processes may go on without it; whoever comes then does what is left, and nothing twice."
    out, script = tmp_path/'out', tmp_path/'score.py'
    script.write_text(SCRIPT)
    launcher = subprocess.Popen([*LAUNCH, str(script), str(data), str(out), '.05'], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_parts(out, 2, launcher)
        launcher.kill()
        launcher.wait()
        process = start(data, out, 0)
        process.communicate(timeout=120)
        assert process.returncode == 0
    finally:
        try: os.killpg(launcher.pid, signal.SIGKILL)
        except ProcessLookupError: pass  # all of them have ended
    check(out, data)


def test_the_benchmark_in_small(tmp_path, capsys, monkeypatch):
    "`tools/bulk_bench.py`, without the kill: its figures, and that it notices lost, repeated and wrong rows."
    if not Path('/proc/self/statm').exists(): pytest.skip('this system has no /proc')
    bench = script('bulk_bench')
    monkeypatch.setattr(bench, 'DRAWINGS', 8)
    monkeypatch.setattr(bench, 'SHARD', 600)
    data, out, about = tmp_path/'data', tmp_path/'out', tmp_path/'first.json'
    data.mkdir()
    bench.write_shards(data, 700)
    bench.work(data, 'jpeg', out, about)
    ratio, grown = bench.report('first', about)
    assert ratio >= 1 and grown >= 0 and '700 rows in' in capsys.readouterr().out
    stamps = {p: p.stat().st_mtime_ns for p in bench.parts(out)}
    assert len(stamps) == 3 and bench.check(out, 700, 'jpeg', stamps) == 0
    last, first = sorted(stamps)[-1], sorted(stamps)[0]
    whole = last.read_bytes()
    last.write_bytes(first.read_bytes())
    assert bench.check(out, 700, 'jpeg', {}) == 100+512  # lost and repeated
    last.write_bytes(whole)
    assert bench.check(out, 700, 'jpeg', stamps) == 1  # scored again
    assert bench.growth([(0, 1.), (10, 5.), (50, 9.), (99, 7.)], 100) == 4


def script(name):
    "A script of `tools/`, as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_hub_is_streamed(data, tmp_path):
    server = Hub()
    server.add('me/images', {f'data/{p.name}': p.read_bytes() for p in data.iterdir()})
    client = Client(server.url, tmp_path/'home', 'from llava_reward_nb.shards import Columns, find_shards, shard_rows')
    try:
        rows = client("[[r.key, r.prompt, r.error] for s in find_shards('me/images') for r in shard_rows(s, lambda n: True, Columns())]")
        assert len(rows) == 131 and rows[0] == ['me/images/data/a.tar/000000', 'prompt 0', '']
        assert rows[-1] == ['none', 'prompt 10', 'no image']
        kind, why = client.error("find_shards('me/nothing')")
        assert kind == 'InputError' and 'no such data set on the hub' in why
    finally:
        client.close()
        server.close()


def test_ray_and_fastapi_are_for_those_who_use_them():
    code = 'import sys, llava_reward_nb.commands.score, llava_reward_nb.bulk, llava_reward_nb.shards; sys.exit(len({"ray","fastapi"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], env=ENV).returncode == 0
