"A reward behind a service, against a service that misbehaves and against the real one."
import asyncio, base64, json, os, pickle, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close

from llava_reward_nb import client as client_module
from llava_reward_nb.client import RemoteReward, flow_grpo_reward, image_payload, trl_reward
from llava_reward_nb.core import InputError, load_image
from llava_reward_nb.rewards import load_reward, score_all
from llava_reward_nb.rewards.grader import EndpointError
from llava_reward_nb.store import identity


class Stub(BaseHTTPRequestHandler):
    "A service whose score is the first pixel's red; `moods` are what it does first, one for each request."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, body, headers=(), cut=0):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in dict(headers).items(): self.send_header(k, v)
        self.send_header('Content-Length', str(len(data)+cut))
        self.end_headers()
        self.wfile.write(data)
        if cut: self.hang_up()

    def do_GET(self):
        self.answer(200, dict(rewards=self.server.rewards))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with self.server.lock:
            self.server.seen.append((asked, self.headers.get('Authorization')))
            mood = self.server.moods.pop(0) if self.server.moods else None
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
        time.sleep(self.server.delay)
        scores = [float(np.asarray(load_image(base64.b64decode(x)))[0, 0, 0]) for x in asked['images']]
        errors = [None]*len(scores)
        for i, p in enumerate(asked['prompts']):
            if p=='bad': scores[i], errors[i] = None, 'cannot be scored'
        said = dict(rewards={name: scores for name in asked['rewards']}, errors=errors)
        with self.server.lock: self.server.inside -= 1
        if mood=='hang up': return self.hang_up()
        if mood=='cut': return self.answer(200, said, cut=10)
        if mood=='sleep': time.sleep(.6)
        if isinstance(mood, tuple): return self.answer(*mood)
        self.answer(200, said)


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Stub)
    server.rewards = dict(red=dict(identity='Red-1', range='0 to 255'), **{'team/red': dict(identity='Red-2')})
    server.seen, server.moods, server.lock, server.delay, server.inside, server.most = [], [], threading.Lock(), 0., 0, 0
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=[.01], daemon=True).start()  # seconds until it notices its end
    yield server
    server.shutdown()
    server.server_close()


def remote(stub, **kw): return RemoteReward(f'{stub.url}/red', **dict(dict(backoff=.01, retries=3, timeout=10), **kw))


def greys(n): return [Image.new('RGB', (6, 6), (k, k, k)) for k in range(n)]


def both(reward, images, prompts):
    "The same by both ways, which must agree."
    scores = reward(images, prompts)
    assert_close(asyncio.run(reward.score_async(images, prompts)), scores, rtol=0, atol=0)
    return scores.tolist()


PASSING = ['hang up', 'cut', (429, {}, {'Retry-After': '0'}), (500, b'oops'), (502, b'<html>'), (503, {}, {'Retry-After': '0'}), (504, {})]


@pytest.mark.parametrize('mood', PASSING, ids=str)
@pytest.mark.parametrize('way', ['sync', 'async'])
def test_what_passes_is_tried_again(stub, mood, way):
    reward = remote(stub)
    stub.moods[:] = [mood]*3
    scores = reward(greys(2), 'a') if way=='sync' else asyncio.run(reward.score_async(greys(2), 'a'))
    assert scores.tolist()==[0, 1] and len(stub.seen)==4
    stub.moods[:] = [mood]*4
    with pytest.raises(EndpointError, match='4 requests failed, the last with .*; is the service running'):
        reward(greys(2), 'a') if way=='sync' else asyncio.run(reward.score_async(greys(2), 'a'))
    assert len(stub.seen)==8


LASTING = [(400, dict(detail='no'), InputError), (401, {}, EndpointError), (403, {}, EndpointError), (404, {}, EndpointError),
           (413, {}, InputError), (422, dict(detail=[dict(msg='field required')]), InputError), (302, {}, EndpointError), (418, {}, EndpointError)]


@pytest.mark.parametrize('status,body,error', LASTING, ids=[str(s) for s, *_ in LASTING])
@pytest.mark.parametrize('way', ['sync', 'async'])
def test_what_lasts_is_not_tried_again(stub, status, body, error, way):
    reward = remote(stub)
    stub.moods[:] = [(status, body)]
    with pytest.raises(error): reward(greys(1), 'a') if way=='sync' else asyncio.run(reward.score_async(greys(1), 'a'))
    assert len(stub.seen)==1


GARBAGE = [b'', b'<html>', b'[]', b'{}', b'{"rewards": {}}', b'{"rewards": {"red": [1]}}', b'{"rewards": {"red": [1, 2, 3]}}', b'{"rewards": {"red": ["1", 2]}}',
           b'{"rewards": {"red": [true, 2]}}', b'{"rewards": {"red": 1}}', b'{"rewards": {"red": [1, 2]}, "errors": ["x"]}', b'{"rewards": {"blue": [1, 2]}}', b'\xff']


@pytest.mark.parametrize('body', GARBAGE)
def test_an_answer_that_is_none_is_an_error(stub, body):
    reward = remote(stub)
    stub.moods[:] = [(200, body)]
    with pytest.raises(EndpointError): reward(greys(2), 'a')
    assert len(stub.seen)==1


@pytest.mark.parametrize('number', [b'NaN', b'Infinity', b'null'])
def test_no_number_is_a_missing_score(stub, number):
    reward, lenient = remote(stub), remote(stub, missing='nan')
    body = b'{"rewards": {"red": [1, '+number+b']}, "errors": [null, null]}'
    stub.moods[:] = [(200, body), (200, body)]
    with pytest.raises(InputError, match='1 of 2 scores are missing: image 1: the service gave no score'): reward(greys(2), 'a')
    with pytest.warns(UserWarning, match='image 1'): assert lenient(greys(2), 'a').isnan().tolist()==[False, True]


def test_a_server_that_sleeps_is_given_up(stub):
    reward = remote(stub, timeout=.2, retries=1)
    stub.moods[:] = ['sleep', 'sleep']
    with pytest.raises(EndpointError, match='2 requests failed, the last with ReadTimeout'): reward(greys(1), 'a')
    assert reward(greys(1), 'a').tolist()==[0]


def test_waits_as_long_as_asked(stub, monkeypatch):
    waited = []
    monkeypatch.setattr(client_module.time, 'sleep', waited.append)
    reward = remote(stub)
    monkeypatch.setattr(Stub, 'do_POST', lambda self: (self.rfile.read(int(self.headers['Content-Length'])), self.answer(429, {}, {'Retry-After': '7'})))
    with pytest.raises(EndpointError): reward(greys(1), 'a')
    assert waited==[7, 7, 7]
    monkeypatch.setattr(Stub, 'do_POST', lambda self: (self.rfile.read(int(self.headers['Content-Length'])), self.answer(429, {}, {'Retry-After': '7000'})))
    with pytest.raises(EndpointError, match='asks for 7000 s of patience'): reward(greys(1), 'a')


def test_chunks_in_order_and_together(stub):
    reward = remote(stub, chunk=4, concurrency=3)
    stub.delay = .05
    stub.moods[:] = [None, 'hang up', (503, {})]
    assert both(reward, greys(30), 'a')==list(range(30))
    assert {len(asked['images']) for asked, _ in stub.seen}=={4, 2}
    assert 1<stub.most<=3


def test_an_error_in_one_chunk_ends_the_call(stub):
    reward = remote(stub, chunk=1)
    with pytest.raises(InputError, match='1 of 6 scores are missing: image 4: cannot be scored'): reward(greys(6), ['a']*4+['bad', 'a'])
    stub.moods[:] = [None, (401, {})]
    with pytest.raises(EndpointError, match='401'): asyncio.run(reward.score_async(greys(6), 'a'))


def test_token_goes_in_the_header_and_nowhere_else(stub, monkeypatch):
    reward = remote(stub, token='s3cret')
    reward(greys(1), 'a')
    assert stub.seen[-1][1]=='Bearer s3cret'
    assert 's3cret' not in repr(reward)+repr(reward.server)
    stub.moods[:] = [(401, {})]
    with pytest.raises(EndpointError) as e: reward(greys(1), 'a')
    assert 's3cret' not in str(e.value)
    monkeypatch.setenv('LLAVA_REWARD_TOKEN', 'of the environment')
    remote(stub)(greys(1), 'a')
    assert stub.seen[-1][1]=='Bearer of the environment'


def test_identity_is_the_servers(stub):
    reward = remote(stub)
    assert identity(reward)=='Red-1'
    stub.rewards['red'] = dict(identity='Red-of-other-weights')
    assert identity(reward)=='Red-of-other-weights'
    stub.rewards['red'] = {}
    assert identity(reward) is None  # its scores are never used again


def test_names(stub):
    assert RemoteReward(f'{stub.url}/team/red')(greys(2), 'a').tolist()==[0, 1]
    assert load_reward(f'{stub.url}/team/red').name=='team/red'
    assert load_reward(f'{stub.url}/red', retries=7).server.retries==7
    with pytest.raises(ValueError, match=r"has the rewards red, team/red; name one: 'http.*/red'"): RemoteReward(stub.url)
    with pytest.raises(ValueError, match="has no reward 'blue'; it has red, team/red"): load_reward(f'{stub.url}/blue')
    stub.rewards = {}
    with pytest.raises(ValueError, match='has the rewards none'): RemoteReward(stub.url)


def test_bad_inputs_are_not_sent(stub, tmp_path):
    reward = remote(stub)
    (tmp_path/'empty.png').write_bytes(b'')
    for images in tmp_path/'none.png', tmp_path, tmp_path/'empty.png', 7, None, [], torch.rand(2, 3, 8, 8)*2-1:
        with pytest.raises(InputError): reward(images, 'a')
    for prompts in ['a', 'b'], 7, [None]:
        with pytest.raises(InputError): reward(greys(1), prompts)
    assert not stub.seen


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'I;16'])
def test_pixels_arrive_as_they_left(mode):
    rng = np.random.default_rng(0)
    if mode=='I;16': im = Image.fromarray(rng.integers(0, 65536, (9, 7), dtype=np.uint16))
    else: im = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    got = load_image(base64.b64decode(image_payload(im)))
    assert np.array_equal(np.asarray(got), np.asarray(load_image(im)))


def test_files_travel_as_they_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.effect_noise((20, 10), 80).convert('RGB').save(tmp_path/'phone.jpg', exif=exif)
    got = load_image(base64.b64decode(image_payload(tmp_path/'phone.jpg')))
    assert got.size==(10, 20) and np.array_equal(np.asarray(got), np.asarray(load_image(tmp_path/'phone.jpg')))
    for x in (tmp_path/'phone.jpg').read_bytes(), dict(path=str(tmp_path/'phone.jpg')), dict(bytes=(tmp_path/'phone.jpg').read_bytes()):
        assert image_payload(x)==image_payload(tmp_path/'phone.jpg')


def test_threads_processes_and_loops(stub):
    reward = remote(stub)
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(lambda k: reward(greys(k+1), 'a').tolist()[-1], range(20)))==list(range(20))
    again = pickle.loads(pickle.dumps(reward))
    assert again(greys(2), 'a').tolist()==[0, 1]
    async def many(): return await asyncio.gather(*[reward.score_async(greys(k+1), 'a') for k in range(8)])
    assert [s.tolist()[-1] for s in asyncio.run(many())]==list(range(8))
    reward.server._owner = os.getpid()+1  # as after a fork
    old = reward.server._client
    assert reward(greys(2), 'a').tolist()==[0, 1] and reward.server._client is not old


def test_tables_keep_going(stub):
    with pytest.warns(UserWarning, match='cannot be scored'): table = score_all(dict(red=remote(stub)), greys(3), ['a', 'bad', 'a'], progress=False)
    assert table.red.isna().tolist()==[False, True, False] and table.attrs['failed'][0]['error'].endswith('cannot be scored')


def test_trainers(stub):
    reward = remote(stub)
    batch = torch.stack([torch.full((3, 8, 8), k/255) for k in range(4)])
    for scorer in flow_grpo_reward(reward), lambda *a: asyncio.run(flow_grpo_reward(reward, as_coroutine=True)(*a)):
        assert scorer(batch, ['a']*4, [{}]*4)==([0, 1, 2, 3], {})
        assert scorer((batch*255).round().byte().permute(0, 2, 3, 1).numpy(), ('a',)*4)==([0, 1, 2, 3], {})
    talk = [dict(role='user', content='first'), dict(role='assistant', content='no'), dict(role='user', content=[dict(type='image'), dict(type='text', text='last')])]
    fn = trl_reward(reward)
    assert fn(prompts=['a', talk], images=list(batch[:2]), completions=[1, 2], trainer_state=None)==[0, 1]
    assert stub.seen[-1][0]['prompts']==['a', 'last'] and fn.__name__=='red'
    assert asyncio.run(trl_reward(reward, as_coroutine=True)(prompts=['a'], images=[batch[1]]))==[1]
    with pytest.raises(InputError, match='cannot be scored'): fn(prompts=['bad'], images=[batch[0]])
    for wrong in 7, [], [dict(role='assistant', content='x')]:
        with pytest.raises(InputError, match='pass strings'): fn(prompts=[wrong], images=[batch[0]])


@pytest.fixture(scope='module')
def live():
    "The real service with the embedded model."
    pytest.importorskip('fastapi')
    pytest.importorskip('uvicorn')
    from llava_reward_nb.batcher import load_families
    from llava_reward_nb.serve import LocalServer, Service
    with LocalServer(Service(load_families(['tiny/alignment', 'checker'], device='cpu'))) as server: yield server


def test_live_scores_are_those_of_this_process(live):
    remote_one, here = load_reward(f'{live.url}/tiny/alignment'), load_reward('tiny/alignment', device='cpu')
    images = [Image.effect_noise((64, 64), 50+k).convert('RGB') for k in range(5)]
    assert_close(remote_one(images, 'a red circle'), here(images, 'a red circle'), atol=1e-3, rtol=1e-3)
    assert_close(asyncio.run(remote_one.score_async(np.stack(images), 'a red circle')), here(images, 'a red circle'), atol=1e-3, rtol=1e-3)
    assert identity(remote_one)==identity(here)
    with pytest.raises(InputError, match='image 1: '): remote_one([images[0], b'no image'], 'a red circle')
    with pytest.raises(ValueError, match='has no reward .safety.'): load_reward(f'{live.url}/safety')


def test_live_reward_evaluates(live, tmp_path):
    "A run that was begun in this process goes on with the service: the scores are the same reward's."
    from llava_reward_nb.evaluation import run_benchmark
    here = run_benchmark('mjbench', dict(mine=load_reward('checker')), data='tiny', out=tmp_path/'run', limit=2)
    there = load_reward(f'{live.url}/checker')
    there.server.score = lambda *a: pytest.fail('what is known was asked again')
    again = run_benchmark('mjbench', dict(mine=there), data='tiny', out=tmp_path/'run', limit=2)
    assert len(again.records)==len(here.records)
    del there.server.score
    fresh = run_benchmark('mjbench', dict(mine=there), data='tiny', out=tmp_path/'fresh', limit=2)
    assert fresh.records.score.tolist()==pytest.approx(here.records.score.tolist())


def test_settings_with_a_server_that_has_its_own(stub):
    "They would be dropped; an error is better."
    from llava_reward_nb.client import RewardServer
    server = RewardServer(stub.url, token='secret\n')
    assert server.token == 'secret'
    with pytest.raises(ValueError, match='chunk with a RewardServer'): RemoteReward(server, 'red', chunk=1)
