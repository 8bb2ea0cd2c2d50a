"The reward service as people start it: what it answers, what it withstands, and how it ends."
import asyncio, base64, io, json, os, pickle, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np, pytest
from PIL import Image
from project import ROOT

httpx = pytest.importorskip('httpx', reason='the service needs the [serve] extra')
for needed in ('fastapi', 'uvicorn', 'multipart', 'prometheus_client'): pytest.importorskip(needed, reason='the service needs the [serve] extra')
from llava_reward_nb.batcher import RewardFamily  # noqa: E402
from llava_reward_nb.serve import LocalServer, ServeConfig, Service, load  # noqa: E402

NAMES = ['tiny/alignment', 'tiny/fidelity']
WORDS = ['a red circle', 'two blue squares', 'a photo of a yellow star left of a green triangle']
HEADERS = {'Authorization': 'Bearer secret'}


def png(im):
    stream = io.BytesIO()
    im.save(stream, 'png')
    return stream.getvalue()


def picture(k):
    "A picture of its own for each number."
    rng = np.random.default_rng(k)
    return png(Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.NEAREST))


N = 40  # more than the largest pass holds
PICTURES = [picture(k) for k in range(N)]
FILES = [base64.b64encode(p).decode() for p in PICTURES]
PROMPTS = [WORDS[k % 3] for k in range(N)]


@contextmanager
def started(*args):
    "A server in a process of its own: process, address of the service, address for pickles."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'LLAVA_REWARD_TOKEN')}
    env |= dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', 'from llava_reward_nb.commands import llava_reward; llava_reward()', 'serve', '--device', 'cpu', '--reward', *NAMES]
    p = subprocess.Popen([*command, '--token', 'secret', '--port', '0', '--pickle-port', '0', *args], env=env, text=True, stdout=subprocess.PIPE)
    try: yield p, *(re.search(r'http://\S+', p.stdout.readline())[0] for _ in range(2))
    finally:
        p.kill()
        p.wait()


@pytest.fixture(scope='module')
def server():
    with started() as found: yield found


@pytest.fixture(scope='module')
def ask(server):
    "Function: a request to the shared server."
    with httpx.Client(base_url=server[1], headers=HEADERS, timeout=120, trust_env=False) as client:
        yield lambda path='/v1/rewards', **kw: client.post(path, **kw)


@pytest.fixture(scope='module')
def known(ask):
    "The scores of all pictures, each asked for alone."
    replies = [ask(json=dict(prompts=p, images=[f])).json() for p, f in zip(PROMPTS, FILES)]
    assert all(r['errors'] == [None] for r in replies)
    return [{n: r['rewards'][n][0] for n in NAMES} for r in replies]


def test_scores_are_those_of_the_model(known):
    from llava_reward_nb.model import RewardModel
    rm = RewardModel.from_pretrained('tiny', NAMES[0].split('/')[1], device='cpu')
    want = rm.score([Image.open(io.BytesIO(p)) for p in PICTURES], PROMPTS)
    assert np.allclose([k[NAMES[0]] for k in known], want, atol=1e-4)
    assert len({k[NAMES[0]] for k in known}) == N, 'each picture has a score of its own'


def test_any_company_gives_the_same_bits(ask, known):
    order = list(np.random.default_rng(1).permutation(N))
    answer = ask(json=dict(prompts=[PROMPTS[k] for k in order], images=[FILES[k] for k in order])).json()
    assert answer['errors'] == [None]*N
    for n in NAMES: assert answer['rewards'][n] == [known[k][n] for k in order]
    one = ask(json=dict(prompts=[PROMPTS[3]], images=[FILES[3]], rewards=[NAMES[1]])).json()
    assert one['rewards'] == {NAMES[1]: [known[3][NAMES[1]]]}, 'other rewards do not matter either'


def test_many_clients(server, known):
    "No answer is lost, swapped or doubled; the benchmark runs longer."
    items = [(p, f, k[NAMES[0]]) for p, f, k in zip(PROMPTS, FILES, known)]
    seen = asyncio.run(load(server[1], items, NAMES[0], clients=64, seconds=2, token='secret'))
    assert (seen.wrong, seen.failed) == (0, 0)
    assert seen.answered >= 64


def test_one_bad_image_costs_no_other(ask, known):
    bomb = base64.b64encode(png(Image.new('1', (6000, 6000)))).decode()
    bad = ['', '?', 'QUJD', base64.b64encode(PICTURES[0][:90]).decode(), bomb, 'http://127.0.0.1/x.png', 'file:///etc/passwd', None, 7, {}, '\ud800']
    body = json.dumps(dict(prompts=PROMPTS[0], images=[FILES[0], *bad]))
    answer = ask(content=body.encode()).json()
    assert answer['rewards'][NAMES[0]] == [known[0][NAMES[0]]] + [None]*len(bad)
    assert answer['errors'][0] is None and all(answer['errors'][1:]), answer['errors']
    assert 'pixels' in answer['errors'][5] and '--allow-host' in answer['errors'][6]


@pytest.mark.parametrize('status, body', [
    (400, b''), (400, b'{"prompts"'), (400, b'[]'), (400, b'{"prompts": NaN}'), (400, b'\xff\xfe'), (400, b'['*50_000),
    (422, b'{}'), (422, b'{"prompts": "x", "images": []}'), (422, b'{"prompts": 3, "images": ["QUJD"]}'), (422, b'{"prompts": ["x", "y"], "images": ["QUJD"]}'),
    (422, b'{"prompts": "x", "images": "QUJD"}'), (404, b'{"prompts": "x", "images": ["QUJD"], "rewards": ["none"]}'), (413, b'{"prompts": "x", "images": [' + b'"QUJD",'*256 + b'"QUJD"]}'),
    (413, b' '*(65 << 20))], ids=lambda x: x if isinstance(x, int) else f'{x[:20]!r}…{len(x)}')
def test_malformed_and_oversized(ask, status, body):
    reply = ask(content=body)
    assert reply.status_code == status and reply.json()['detail']


def test_wrong_tokens(server):
    for address in server[1:]:
        for token in ('', 'Bearer', 'Bearer wrong', 'Basic secret', 'secret', 'Bearer secret2', 'Bearer \xe9'.encode('latin-1')):
            headers = {'Authorization': token} if token else {}
            reply = httpx.post(f'{address}/v1/rewards', content=b'{}', headers=headers, trust_env=False)
            assert reply.status_code == 401 and reply.headers['WWW-Authenticate'] == 'Bearer', token


class Hostile:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)


def test_pickles(server, known, tmp_path):
    def send(body, path=''): return httpx.post(server[2]+path, content=body, headers=HEADERS, timeout=60, trust_env=False)
    good = pickle.dumps(dict(images=PICTURES[:2], prompts=PROMPTS[:2], metadata={}))
    for n, path in ((NAMES[0], '/'), (NAMES[1], f'/{NAMES[1]}')):
        scores = [k[n] for k in known[:2]]
        assert pickle.loads(send(good, path).content) == dict(scores=scores, outputs=scores)
    assert 'image 1' in pickle.loads(send(pickle.dumps(dict(images=[PICTURES[0], b'cut'], prompts=PROMPTS[:2]))).content)['error']
    mark = tmp_path/'ran'
    hostile = [pickle.dumps(Hostile(mark), k) for k in range(pickle.HIGHEST_PROTOCOL+1)]
    hostile += [pickle.dumps(dict(images=[Hostile(mark)], prompts=['x'])), pickle.dumps(dict(images=PICTURES[:1], prompts=np.array(['x']))), b'', b'cos\nsystem\n.', b'\x80\x04r\xff\xff\xff\xff.']
    doubled = b''.join(b'h'+bytes([k])+b'h'+bytes([k])+b'\x86\x940' for k in range(99)) # a tuple of the last one, twice: hashing it would never end
    hostile += [b'\x80\x04}K\x01\x940'+doubled+b'h\x63K\x01s.', pickle.dumps({1: 2}), pickle.dumps({1, 2})]
    for body in hostile:
        reply = send(body)
        assert reply.status_code == 400 and reply.json()['detail']
    assert not mark.exists()
    assert send(good).status_code == 200
    assert httpx.post(f'{server[1]}/', content=good, headers=HEADERS, trust_env=False).status_code in (404, 405), 'pickles have a port of their own'


def test_other_contracts(ask, known):
    score, turn = known[0][NAMES[0]], dict(text=PROMPTS[0], image_b64=FILES[0])
    part = dict(type='image_url', image_url=dict(url='data:image/png;base64,'+FILES[0]))
    unirl = ask('/score', json=dict(requests=[dict(history=[turn], required_rewards=[NAMES[0]])]*9)).json()
    assert unirl == dict(results=[{NAMES[0]: {NAMES[0]: score}}]*9, errors=[{}]*9)
    assert ask('/compute', json=dict(prompt=[PROMPTS[0]], image=[FILES[0]], video=None, extra={})).json() == dict(rewards=[score])
    assert ask('/classify', json=dict(model=NAMES[0], messages=[dict(role='user', content=[dict(type='text', text=PROMPTS[0]), part])])).json()['data'][0]['probs'] == [score]
    for path in ('/score', '/v1/score'): assert ask(path, json=dict(queries=PROMPTS[0], documents=[dict(content=[part])])).json()['data'][0]['score'] == score


def test_a_restarted_server_says_the_same_and_finishes_what_it_accepted(known):
    "Other requests, in other company, from a new process; then SIGTERM in the middle of many."
    with started() as (p, url, _):
        def score(ks): return httpx.post(f'{url}/v1/rewards', headers=HEADERS, timeout=120, trust_env=False,
                                         json=dict(prompts=[PROMPTS[k] for k in ks], images=[FILES[k] for k in ks])).json()
        groups = [list(range(k, k+5)) for k in range(0, N, 5)]
        with ThreadPoolExecutor(len(groups)) as pool:
            answers = [pool.submit(score, ks) for ks in groups]
            def accepted():
                text = httpx.get(f'{url}/metrics', headers=HEADERS, trust_env=False).text
                is_open = float(re.search(r'open_requests ([\d.]+)', text)[1])-1 # but for this one
                done = re.search(r'requests_total{route="/v1/rewards",status="200"} ([\d.]+)', text)
                return is_open+float(done[1] if done else 0) >= len(groups)
            until(accepted)
            p.send_signal(signal.SIGTERM)
            for ks, answer in zip(groups, answers):
                for n in NAMES: assert answer.result()['rewards'][n] == [known[k][n] for k in ks]
        assert p.wait(60) == 0
        assert p.stdout.read() == 'stopped\n'


@pytest.fixture
def blocked():
    "A service whose model waits until it is let go: (server, the event it waits for, prompts it has seen)."
    go, seen = threading.Event(), []

    def reward(images, prompts):
        seen.extend(prompts)
        go.wait(60)
        return [float(len(p)) for p in prompts]
    with LocalServer(Service([RewardFamily('length', reward)], ServeConfig(drain=1))) as server:
        yield server, go, seen
        go.set()


def until(happened):
    "Wait for an event."
    end = time.monotonic()+60
    while not happened():
        assert time.monotonic() < end
        time.sleep(.005)


def raw(server, prompt):
    "A client that sends a request and does not read."
    body = json.dumps(dict(prompts=prompt, images=FILES[:1])).encode()
    sock = socket.create_connection(server.socks[0].getsockname())
    sock.sendall(b'POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
    return sock


def answer_of(sock):
    "The whole answer that a raw client gets; its headers and body may come one after the other."
    reply = sock.makefile('rb')
    headers = b''.join(iter(reply.readline, b'\r\n'))
    size = int(re.search(rb'content-length: (\d+)', headers)[1])
    return (headers+reply.read(size)).decode()


def test_who_leaves_is_not_worked_for(blocked):
    server, go, seen = blocked
    batcher = server.service.batcher
    first = raw(server, 'first')
    until(lambda: seen == ['first'])
    leaving, staying = raw(server, 'leaving'), raw(server, 'staying')
    until(lambda: batcher.left == 3)
    leaving.close()
    until(lambda: sum(row.question.future.cancelled() for lane in batcher.lanes.values() for row in lane.rows) == 1)
    go.set()
    for sock, score in ((first, 5.), (staying, 7.)): assert f'[{score}]' in answer_of(sock)
    assert seen == ['first', 'staying']


def test_a_model_that_hangs_does_not_hold_the_server(blocked):
    "After `drain` seconds whoever still waits is told so."
    server, go, seen = blocked
    waiting = raw(server, 'hangs')
    until(lambda: seen)
    server.running.loop.call_soon_threadsafe(server.running.stop)
    waiting.settimeout(30)
    assert '503' in answer_of(waiting).split('\r\n')[0]


def test_pixels_are_counted_before_they_are_decoded():
    service = Service([RewardFamily('width', lambda images, prompts: [float(im.width) for im in images])], ServeConfig(waiting_pixels=5000))
    with LocalServer(service) as server:
        def send(*files): return httpx.post(f'{server.url}/v1/rewards', json=dict(prompts='x', images=files), trust_env=False, timeout=60)
        assert send(FILES[0], FILES[0]).json() == dict(rewards=dict(width=[64., 64.]), errors=[None, None]), 'the same image is held once'
        assert send(*FILES[:2]).status_code == 413
        turns = [dict(history=[dict(text='x', image_b64=f)], required_rewards=['width']) for f in FILES[:2]]
        assert httpx.post(f'{server.url}/score', json=dict(requests=turns), trust_env=False).status_code == 413, 'all turns are one request'
        assert service.pixels == 0


def test_half_a_request_holds_nobody_up(ask, server, known):
    "A client that stops in the middle of its body, and one in the middle of its headers; others are answered."
    host, port = re.search(r'//(.*):(\d+)', server[1]).groups()
    slow = [socket.create_connection((host, int(port))) for _ in range(20)]
    for sock in slow[:10]: sock.sendall(b'POST /v1/rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 1000\r\n\r\n{"pro')
    for sock in slow[10:]: sock.sendall(b'POST /v1/rewards HTT')
    assert ask(json=dict(prompts=PROMPTS[0], images=FILES[:1])).json()['rewards'][NAMES[0]] == [known[0][NAMES[0]]]
    for sock in slow: sock.close()


def test_addresses_of_allowed_hosts():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if 'away' in self.path else 200 if 'here' in self.path else 404)
            if 'away' in self.path: self.send_header('Location', 'http://127.0.0.1:1/here')
            if 'packed' in self.path: self.send_header('Content-Encoding', 'gzip')
            self.end_headers()
            self.wfile.write(PICTURES[0]*(1000 if 'large' in self.path else 1))

        def log_message(self, *args): pass
    files = HTTPServer(('127.0.0.1', 0), Files)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    here = f'127.0.0.1:{files.server_port}'
    service = Service([RewardFamily('width', lambda images, prompts: [float(im.width) for im in images])], ServeConfig(hosts=(here,), most_bytes=100_000, most_images=1000))
    addresses = [f'http://{here}/here.png', f'http://{here}/away', f'http://{here}/none', f'http://localhost:{files.server_port}/here.png',
                 f'http://{here}/\x01', f'http://{here}/\ud800', 'http://\ud800/', f'http://{here}/'+'a'*70_000, 'http://'+'a'*5000]
    with LocalServer(service) as server:
        def send(images): return httpx.post(f'{server.url}/v1/rewards', content=json.dumps(dict(prompts='x', images=images)), trust_env=False, timeout=60).json()
        answer = send(addresses)
        large = send([f'http://{here}/here-large'])
        packed = send([f'http://{here}/here-packed'])
        many = send([f'http://{here}/here{k}' for k in range(2*100_000//len(PICTURES[0]))])
        surrogate = httpx.post(f'{server.url}/v1/rewards', content=json.dumps(dict(prompts='x', images=['?'], rewards=['\ud800'])), trust_env=False)
    assert answer['rewards']['width'] == [64.]+[None]*8
    for error, text in zip(answer['errors'][1:], ('302', '404', 'not fetched from')): assert text in error
    assert all(len(error) < 700 for error in answer['errors'][1:]), 'an address is not sent back at length'
    assert 'more than 100,000 bytes' in large['errors'][0]
    assert 'sends it packed (gzip)' in packed['errors'][0]
    came = [e is None for e in many['errors']]
    assert any(came) and not all(came), 'the images of a request have one budget'
    assert surrogate.status_code == 404
    files.shutdown()


def test_nothing_heavy_without_a_server():
    code = "import sys, llava_reward_nb.serve, llava_reward_nb.contracts, llava_reward_nb.commands.serve; print([m for m in ('fastapi', 'uvicorn', 'prometheus_client', 'httpx', 'starlette') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == '[]'
