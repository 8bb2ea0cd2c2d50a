"Hashes that see every change, identities that nobody inherits, and score folders under several processes, kills and foreign files."
import functools, os, signal, subprocess, sys, time
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np, pyarrow.parquet as pq, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from llava_reward_nb import store
from llava_reward_nb.core import InputError
from llava_reward_nb.store import ScoreStore, file_hash, folder_lock, identity, make_identity, tensors_hash, text_hash

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64)


def hashed(t): return tensors_hash([('w', t)])


def some(dtype, n, seed=0): # of all bit patterns
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n*torch.empty((), dtype=dtype).element_size(),), generator=g, dtype=torch.uint8).view(dtype)


# ---- hashes

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('n', [1, 3, 1 << 14, (1 << 17)+5])
def test_any_flipped_bit_is_seen(dtype, n):
    t = some(dtype, n)
    whole, rng = hashed(t), np.random.default_rng(0)
    size = t.element_size()*n
    for at in {0, size-1, *rng.integers(0, size, 12).tolist()}:
        for bit in (0, 3, 7):
            u = t.clone()
            u.view(torch.uint8)[at] ^= 1 << bit
            assert hashed(u) != whole, (at, bit)
    assert hashed(t.clone()) == whole


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_any_swap_is_seen(dtype):
    "Also across pieces, and of values that differ in their sign bits alone."
    t = some(dtype, 40_000)
    seen = [hashed(t)]
    for i, j in ((0, 1), (0, 39_999), (5, 16_389), (2, 2+(1 << 13)), (17_000, 33_384)):
        u = t.clone().view(torch.uint8).view(40_000, -1)
        u[[i, j]] = u[[j, i]]
        if not u[i].equal(u[j]): seen.append(hashed(u.view(-1).view(dtype)))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_signs_do_not_cancel(dtype):
    "Top bits of two words are where sums modulo a power of two are weakest."
    g = torch.Generator().manual_seed(1)
    t = torch.randn(3000, generator=g).to(dtype)
    seen = [hashed(t), hashed(-t), hashed(t.abs()), hashed(-t.abs())]
    for i in range(0, 3000, 41):
        for step in (1, 2, 3, 4, 64):
            u = t.clone()
            u[[i, (i+step) % 3000]] *= -1
            seen.append(hashed(u))
    for rows in (2, 4, 50):
        u = t.clone().view(-1, 30)
        u[:rows] *= -1
        seen.append(hashed(u.view(-1)))
    assert len(set(seen)) == len(seen)


def test_layout_does_not_matter_but_shape_does():
    t = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0))
    assert hashed(t.permute(2, 0, 1)) == hashed(t.permute(2, 0, 1).contiguous()) != hashed(t.reshape(3, 7, 5))
    big = torch.arange(100, dtype=torch.bfloat16)
    assert hashed(big[1:40]) == hashed(big[1:40].clone()) and hashed(big[::3]) == hashed(big[::3].clone()) # not aligned; not contiguous
    assert hashed(torch.zeros(3).expand(4, 3)) == hashed(torch.zeros(4, 3))
    c = torch.randn(4, dtype=torch.complex64)
    assert hashed(c.conj()) == hashed(c.conj().resolve_conj().clone()) != hashed(c)
    shapes = [torch.tensor(0.), torch.zeros(1), torch.zeros(0), torch.zeros(0, 2), torch.zeros(2, 0), torch.zeros(2), torch.zeros(1, 2)]
    assert len({hashed(s) for s in shapes}) == len(shapes)
    kinds = [torch.zeros(4, dtype=d) for d in (*DTYPES, torch.bool)]
    assert len({hashed(k) for k in kinds}) == len(kinds)
    assert hashed(torch.tensor([True, False])) != hashed(torch.tensor([False, True]))


def test_it_is_known_for_good():
    "The same everywhere and tomorrow: a stored hash is compared with one of another machine."
    t = torch.arange(70_000, dtype=torch.int32)
    by_hand = []
    for k in range(0, 70_000, 1 << 14):
        words = [int(x) for x in t[k:k+(1 << 14)]]
        by_hand.append([sum(x*int(c) for x, c in zip(words, places)) % (1 << 64) for places in store._PLACES])
    assert [[s % (1 << 64) for s in row] for row in store._piece_sums(t).tolist()] == by_hand
    assert hashed(t) == '75a64f09a7b1c0fc'


def test_names_order_and_modules():
    a, b = torch.ones(2), torch.zeros(2)
    assert tensors_hash(dict(a=a, b=b)) == tensors_hash([('a', a), ('b', b)]) != tensors_hash(dict(a=b, b=a))
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert tensors_hash(net) != tensors_hash(net[0]) and tensors_hash([net[0], net[1]]) != tensors_hash([net[1], net[0]])
    assert tensors_hash(net) == tensors_hash([net]) and tensors_hash(()) == tensors_hash([])
    before = tensors_hash(net)
    with torch.no_grad(): net[1].bias[1] = torch.nextafter(net[1].bias[1], torch.tensor(9.))
    assert tensors_hash(net) != before


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_devices_agree(dtype):
    for n in (0, 1, 5, (1 << 14)+1, 1 << 20): assert hashed(some(dtype, n)) == hashed(some(dtype, n).cuda())


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text())
def test_texts(a, b): assert (text_hash(a) == text_hash(b)) == (a == b)


def test_files(tmp_path):
    (tmp_path/'a').write_bytes(b'x'*3_000_000)
    (tmp_path/'b').write_bytes(b'x'*2_999_999+b'y')
    assert file_hash(tmp_path/'a') != file_hash(tmp_path/'b') and file_hash(str(tmp_path/'a')) == file_hash(tmp_path/'a')


# ---- identities

class Base:
    def __init__(self, k=1): self.k = k
    @property
    def identity(self): return make_identity(type(self).__name__, dict(k=self.k))
    def __call__(self, images, prompts): return torch.zeros(len(images))


class Derived(Base): pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.norm = nn.Identity()
    @property
    def identity(self): return make_identity('Net', {}, self)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()


class Broken(nn.Module):
    @property
    def identity(self): return self.not_there


def test_who_has_an_identity():
    assert identity(Base()) == identity(Base()) != identity(Base(2)) and identity(Derived()) != identity(Base())
    a, b = Net(), Net()
    assert identity(a) and identity(a) != identity(b)
    b.load_state_dict(a.state_dict())
    assert identity(a) == identity(b)
    b.half()
    assert identity(a) != identity(b) # another dtype gives other numbers


def test_who_has_none():
    def plain(images, prompts): return torch.zeros(len(images))
    def closure(k): return lambda i, p: k
    class Proxy:
        def __init__(self, r): self.r = r
        def __getattr__(self, k): return getattr(self.r, k)
    class Foreign(Base): __module__ = 'elsewhere'
    for x in (plain, closure(1), functools.partial(plain), functools.partial(Base()), Base().__call__, Base, Proxy(Base()), Mock(), MagicMock(), Named(), Broken(), nn.DataParallel(Net()),
              Foreign(), None, 3, 'x', len):
        assert identity(x) is None, x
    for junk in ('', '  ', None, 3, b'x', ['x'], lambda: 'x'):
        b = Derived()
        b.__dict__['k'] = 1
        plain.identity = junk
        assert identity(plain) is None, junk


def test_copied_identities():
    base = Base()
    base.__dict__['identity_is'] = 1
    def f(images, prompts): return torch.zeros(len(images))
    f.identity = 'f'
    g = functools.wraps(f)(lambda i, p: -f(i, p))
    h = functools.wraps(g)(lambda i, p: -g(i, p))
    p = functools.update_wrapper(functools.partial(f), f)
    assert [identity(x) for x in (f, g, h, p)] == ['f', None, None, None]
    p.identity = 'p'
    assert identity(p) == 'p'


def test_version_is_part(monkeypatch):
    before = make_identity('a', {})
    monkeypatch.setattr(store, '__version__', '99')
    assert make_identity('a', {}) != before


@pytest.mark.parametrize('bad', [dict(a=torch.zeros(2)), dict(a=np.float32(1)), dict(a={1, 2}), dict(a=object()), {(1, 2): 3}], ids=lambda bad: type([*bad.values()][0]).__name__)
def test_settings_are_plain(bad):
    with pytest.raises(InputError, match='settings of kind'): make_identity('kind', bad)


# ---- folders under several processes

def child(code, *args):
    "Python code in a process of its own."
    root = str(Path(store.__file__).parents[1])
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]))
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(happened, p, seconds=120):
    end = time.time()+seconds
    while not happened() and p.poll() is None and time.time() < end: time.sleep(.01)
    assert happened()


APPEND = '''
import sys, time
from llava_reward_nb.store import ScoreStore
folder, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
with ScoreStore(folder, every=.01) as s:
    for i in range(n):
        s.add([dict(key=f'k{i}', reward='shared', score=i, note=name), dict(key=f'k{i}', reward=name, score=i)])
        if i%10==0: s.flush()
        time.sleep(.002)
'''


def test_two_processes_append(tmp_path):
    p = child(APPEND, tmp_path, 'a', 60)
    wait_for(lambda: store._parts(tmp_path), p)
    with ScoreStore(tmp_path, every=.01) as s:
        for i in range(60):
            s.add([dict(key=f'k{i}', reward=r, score=i) for r in ('shared', 'b')])
            if i % 10 == 0: s.flush()
    assert p.wait(timeout=120) == 0
    df = ScoreStore(tmp_path).records()
    assert len(df) == 180 and not df.duplicated(['key', 'reward']).any()
    for n in ('a', 'b', 'shared'): assert sorted(df[df.reward == n].score) == list(range(60))
    names = [p.name for p in store._parts(tmp_path)]
    assert len(names) > 4 and names == sorted(names)


ENDLESS = '''
import sys, time
from llava_reward_nb.store import ScoreStore
with ScoreStore(sys.argv[1], every=.05) as s:
    for i in range(10**6):
        s.add([dict(key=str(i), reward='r', score=i)])
        print(i, flush=True)
        time.sleep(.002)
'''


def test_sigkill_loses_the_last_moments_only(tmp_path):
    p = child(ENDLESS, tmp_path)
    wait_for(lambda: len(store._parts(tmp_path)) > 5, p)
    p.send_signal(signal.SIGKILL)
    said = len(p.communicate()[0].split())
    kept = ScoreStore(tmp_path).records()
    assert sorted(kept.score) == list(range(len(kept))) # whole parts, none missing between
    assert 0 < len(kept) <= said+1


def test_ctrl_c_keeps_all(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"+ENDLESS.replace('every=.05', 'every=1000')
    p = child(code, tmp_path)
    lines = [p.stdout.readline() for _ in range(50)]
    p.send_signal(signal.SIGINT)
    rest = p.communicate()[0]
    assert p.returncode != 0 and len(ScoreStore(tmp_path).records()) >= len(lines)+len(rest.split())


HOLD = '''
import sys, time
from llava_reward_nb.store import folder_lock
with folder_lock(sys.argv[1]):
    print('held', flush=True)
    time.sleep(600)
'''


def test_a_dead_process_holds_no_lock(tmp_path):
    p = child(HOLD, tmp_path)
    assert p.stdout.readline().strip() == 'held'
    with pytest.raises(InputError, match='another process is at work'):
        with folder_lock(tmp_path, wait=False): pass
    p.send_signal(signal.SIGKILL)
    p.communicate()
    with folder_lock(tmp_path, wait=False): pass


COUNT = '''
import sys
from pathlib import Path
from llava_reward_nb.store import folder_lock
f = Path(sys.argv[1])/'n'
print('ready', flush=True)
for _ in range(200):
    with folder_lock(sys.argv[1]): f.write_text(str(int(f.read_text())+1))
'''


def test_processes_take_turns(tmp_path):
    (tmp_path/'n').write_text('0')
    p = child(COUNT, tmp_path)
    assert p.stdout.readline().strip() == 'ready'
    for _ in range(200):
        with folder_lock(tmp_path): (tmp_path/'n').write_text(str(int((tmp_path/'n').read_text())+1))
    p.communicate()
    assert p.returncode == 0 and (tmp_path/'n').read_text() == '400'


def test_foreign_files_are_left_alone(tmp_path):
    with ScoreStore(tmp_path) as s: s.add([dict(key='a', reward='r', score=1.)])
    part = store._parts(tmp_path)[0]
    for n in ('._00000.parquet', f'._{part.name}', '.DS_Store', 'Thumbs.db', f'{part.stem} (1).parquet', f'{part.name}.tmp', f'.{part.name}.x.tmp', 'part-0.parquet', '000000.parquet', 'desktop.ini', f'~{part.name}'):
        (tmp_path/n).write_bytes(b'\x00\x05\x16\x07')
    (tmp_path/'00001.parquet').mkdir()
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub'/part.name).write_bytes(b'x')
    assert len(ScoreStore(tmp_path).records()) == 1
    with ScoreStore(tmp_path) as s: s.add([dict(key='b', reward='r', score=1.)])
    assert len(s.records()) == 2


@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:len(b)//2], lambda b: b'\0'*len(b), lambda b: b[:-8]+b'\0'*8], ids=['empty', 'cut', 'zeros', 'no end'])
def test_a_damaged_part_is_named(tmp_path, damage):
    with ScoreStore(tmp_path) as s: s.add([dict(key='a', reward='r', score=1.)])
    part = store._parts(tmp_path)[0]
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(InputError, match=f'{part.name}: damaged.*delete it'): s.records()
    part.unlink()
    assert not len(s.records())


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    with ScoreStore(tmp_path) as s: s.add([dict(key='a', reward='r', score=1.)])
    monkeypatch.setattr(store.time, 'time_ns', lambda: 5)
    with ScoreStore(tmp_path) as t: t.add([dict(key='a', reward='r', score=2.)])
    assert s.records().score.tolist() == [2.]


def test_what_was_written_reads_back(tmp_path):
    rows = [dict(key='ключ 🙂\n\0', reward='r', identity='i', pixels='p', prompt='q', score=s, note='n', error='', seconds=.5) for s in (1/3, float('inf'), -1e300)]
    for i, r in enumerate(rows): r['key'] += str(i)
    with ScoreStore(tmp_path) as s: s.add(rows)
    assert s.records().to_dict('records') == rows
    assert len(ScoreStore(tmp_path/'empty').records()) == 0 and list(ScoreStore(tmp_path/'empty').records()) == list(store.SCORE_COLUMNS)
    assert pq.ParquetFile(store._parts(tmp_path)[0]).schema_arrow.names == list(store.SCORE_COLUMNS)


def test_rows_wait_for_a_disk_that_was_full(tmp_path, monkeypatch):
    "A part that cannot be written is tried again with the next."
    write, full = pq.write_table, [True]
    def sometimes(*a, **k):
        if full.pop() if full else False: raise OSError(28, 'No space left on device')
        return write(*a, **k)
    monkeypatch.setattr(pq, 'write_table', sometimes)
    with ScoreStore(tmp_path, every=1000) as s:
        s.add([dict(key='a', reward='r', score=1.)])
        with pytest.raises(OSError, match='No space'): s.flush()
        s.add([dict(key='b', reward='r', score=1.)])
    assert len(s.records()) == 2
