"The grader against a server that does everything servers do to their clients."
import base64, io, json, math, os, signal, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from torch.testing import assert_close

pytest.importorskip('openai')
from llava_reward_nb.core import InputError
from llava_reward_nb.rewards.grader import ASPECTS, OVERALL, PRICES, RUBRIC, Budget, EndpointError, Grader, ReplyCache, grade_schema
from llava_reward_nb.store import identity

ROOT = Path(__file__).resolve().parent.parent
TOKENS = dict(prompt_tokens=900, completion_tokens=300, total_tokens=1200)


def image(i, size=(8, 6)):
    "An image whose pixels say its number."
    return Image.new('RGB', size, (i % 256, i//256, 7))


def number(im):
    r, g, _ = im.convert('RGB').getpixel((0, 0))
    return r+256*g


def score_of(i, prompt): return (i*7+len(prompt)) % 101/10


def answer(score): return json.dumps({n: dict(explanation=f'{n} is {score}', score=score) for n in [*ASPECTS, OVERALL]})


def completion(content=None, refusal=None, finish='stop', usage=TOKENS, **more):
    message = dict(role='assistant', content=content, refusal=refusal)
    return dict(id='x', object='chat.completion', created=0, model='judge-2026', usage=usage,
                choices=[dict(index=0, finish_reason=finish, message=message)], **more)


class Server:
    """OpenAI-compatible endpoint. `plan` gives, for (image number, prompt, attempt), what to do: None to grade properly, or a
    function of the proper body that returns (status, headers, body). Every request and every grade given out is recorded."""
    def __init__(self, plan=lambda i, prompt, attempt: None):
        self.plan, self.attempts, self.graded, self.requests, self.times, self.lock = plan, Counter(), Counter(), [], [], threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *args): pass
            def do_POST(self): server.reply(self)
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(.05,), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.http.server_port}/v1'

    def reply(self, handler):
        assert handler.path == '/v1/chat/completions'
        request = json.loads(handler.rfile.read(int(handler.headers['Content-Length'])))
        text, picture = request['messages'][1]['content']
        prompt = text['text'].removeprefix('Prompt: ')
        i = number(Image.open(io.BytesIO(base64.b64decode(picture['image_url']['url'].split(',', 1)[1]))))
        with self.lock:
            self.attempts[i, prompt] += 1
            attempt = self.attempts[i, prompt]
            self.requests.append((handler.headers, request))
            self.times.append(time.monotonic())
        good = completion(answer(score_of(i, prompt)))
        act = self.plan(i, prompt, attempt)
        status, headers, body = act(good) if act else (200, {}, good)
        if status is None:
            handler.close_connection = True
            return handler.connection.close()
        if status == 200 and body == good:
            with self.lock: self.graded[i, prompt] += 1
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        try:
            handler.send_response(status)
            for k, v in {'Content-Type': 'application/json', 'Content-Length': str(len(data)), **headers}.items(): handler.send_header(k, v)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError: handler.close_connection = True

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    "Function from a plan to a running server."
    running = []
    def make(*plan):
        running.append(Server(*plan))
        return running[-1]
    yield make
    for s in running: s.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    "No account, no endpoint and no cache of the user's."
    for k in 'OPENAI_API_KEY', 'OPENAI_BASE_URL': monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))


def grader(server, **kw):
    return Grader('judge', **{**dict(base_url=server.url, api_key='secret', cache=None, backoff=.01, timeout=30., retries=3, price=(2.5, 10.)), **kw})


def overall(rows): return [r[OVERALL] for r in rows]


def with_status(status, message='no', headers=(), code=None):
    return lambda good: (status, dict(headers), dict(error=dict(message=message, code=code, type='x')))


def with_body(body): return lambda good: (200, {}, body)


# --- what is sent ---------------------------------------------------------------------------------------------------------

def test_request_on_the_wire(serve):
    s = serve()
    assert overall(grader(s).grade(image(3), 'a red circle')) == [score_of(3, 'a red circle')]
    headers, r = s.requests[0]
    assert headers['Authorization'] == 'Bearer secret'
    assert r['model'] == 'judge' and r['temperature'] == 0 and r['seed'] == 1994
    assert [m['role'] for m in r['messages']] == ['system', 'user'] and r['messages'][0]['content'] == RUBRIC
    assert [c['type'] for c in r['messages'][1]['content']] == ['text', 'image_url']
    assert r['response_format'] == dict(type='json_schema', json_schema=dict(name='grade', strict=True, schema=grade_schema()))
    sent = Image.open(io.BytesIO(base64.b64decode(r['messages'][1]['content'][1]['image_url']['url'].removeprefix('data:image/png;base64,'))))
    assert sent.tobytes() == image(3).tobytes()


def test_schema_is_strict_and_ordered():
    "What OpenAI's strict mode asks for: every property required, none besides; and reasons come before scores."
    s = grade_schema()
    assert list(s['properties']) == s['required'] == [*ASPECTS, OVERALL] and s['additionalProperties'] is False
    for p in s['properties'].values():
        assert list(p['properties']) == p['required'] == ['explanation', 'score'] and p['additionalProperties'] is False


def test_rubric_file_and_params(serve, tmp_path):
    s = serve()
    (tmp_path/'rubric.txt').write_text('Sei streng.\n', encoding='utf-8')
    grader(s, rubric=tmp_path/'rubric.txt', params=dict(max_completion_tokens=50)).grade(image(0), 'x')
    r = s.requests[0][1]
    assert r['messages'][0]['content'] == 'Sei streng.' and r['max_completion_tokens'] == 50 and 'temperature' not in r


# --- order and attribution -------------------------------------------------------------------------------------------------

class Backwards:
    "Of all questions that can be in flight, the last one is answered first."
    def __init__(self, items, concurrency):
        self.left, self.concurrency = items, concurrency
        self.changed, self.waiting, self.order = threading.Condition(), set(), []

    def __call__(self, i, prompt, attempt):
        def answer(good):
            with self.changed:
                self.waiting.add(i)
                self.changed.notify_all()
                self.changed.wait_for(lambda: i == max(self.waiting) and len(self.waiting) == min(self.concurrency, self.left))
                self.waiting.remove(i)
                self.order.append(i)
                self.left -= 1
                self.changed.notify_all()
            return 200, {}, good
        return answer


def test_answers_out_of_order(serve):
    "Sixty items whose answers come back in almost the opposite order: every row has its own scores and explanations."
    plan = Backwards(60, 8)
    s = serve(plan)
    prompts = [f'item {i}'+'!'*(i % 5) for i in range(60)]
    rows = grader(s, concurrency=8).grade([image(i) for i in range(60)], prompts)
    want = [score_of(i, p) for i, p in enumerate(prompts)]
    assert [r['item'] for r in rows] == list(range(60)) and [r['prompt'] for r in rows] == prompts
    assert overall(rows) == want
    for r, w in zip(rows, want):
        assert r['error'] is None and r['calls'] == 1 and not r['cached'] and r['model'] == 'judge-2026'
        assert all(r[a] == w and r[f'{a}_why'] == f'{a} is {w}' for a in ASPECTS)
    assert max(s.graded.values()) == 1 and len(s.graded) == 60
    assert plan.order[0] == 7 and plan.order[-1] == 0   # the first item was answered last


def test_chaos(serve):
    "Each item meets its own mixture of troubles before the answer; all are graded in the end, and each with its own grade."
    kinds = [with_status(429, headers={'Retry-After': '0.01'}), with_status(500), with_status(503), with_body('{"choices": ['),
             with_body('[]'), with_body(completion('{"accuracy_to_prompt": {"expl')), with_body(completion('Lovely! 8/10')),
             lambda good: (None, {}, ''), with_body(dict(good='day')), with_body(completion(''))]
    s = serve(lambda i, p, a: None if a > 2 else kinds[(i+a*3) % len(kinds)])
    rows = grader(s, concurrency=6, retries=4).grade([image(i) for i in range(40)], [f'p{i}' for i in range(40)])
    assert [r['error'] for r in rows] == [None]*40
    assert overall(rows) == [score_of(i, f'p{i}') for i in range(40)]
    assert [r['calls'] for r in rows] == [3]*40
    assert set(s.graded.values()) == {1}


def test_equal_items_are_asked_once(serve):
    s = serve()
    rows = grader(s).grade([image(1), image(2), image(1), image(1)], ['a', 'a', 'a', 'b'])
    assert overall(rows) == [score_of(1, 'a'), score_of(2, 'a'), score_of(1, 'a'), score_of(1, 'b')]
    assert [r['calls'] for r in rows] == [1, 1, 0, 1] and [r['cached'] for r in rows] == [False, False, True, False]
    assert len(s.requests) == 3


# --- failures ---------------------------------------------------------------------------------------------------------------

FAILURES = {
    'status 500': (with_status(500, 'out of memory'), 'out of memory', 4),
    'status 400': (with_status(400, 'image too large'), 'HTTP 400', 1),
    'always busy': (with_status(429, 'slow down', {'Retry-After': '0'}), 'slow down', 4),
    'HTTP body is no JSON': (with_body('{"id": "x", "choi'), 'reply is not JSON', 4),
    'no choices': (with_body(dict(id='x', choices=[])), 'no message', 4),
    'half a JSON': (with_body(completion('{"accuracy_to_prompt": {"explanation": "red')), 'answer is not JSON', 2), # the same reply twice at temperature 0
    'prose': (with_body(completion('A fine 7.')), 'answer is not JSON', 2),
    'an aspect missing': (with_body(completion(json.dumps({OVERALL: dict(explanation='', score=9)}))), 'no score for accuracy_to_prompt', 2),
    'score out of range': (with_body(completion(answer(11))), 'is 11, not a number from 0 to 10', 2),
    'score a string': (with_body(completion(answer('9'))), "is '9'", 2),
    'score NaN': (with_body(completion(answer(math.nan))), 'is nan', 2),
    'two drafts': (with_body(completion(answer(3)+' or '+answer(4))), 'holds 2 JSON objects', 2),
    'content null': (with_body(completion(None)), 'holds no text', 2),
    'content a number': (with_body(completion(7)), 'holds no text', 2),
    'content of pictures': (with_body(completion([dict(type='image_url', image_url='x')])), 'holds no text', 2),
    'a tool is called': (with_body(completion(None, finish='tool_calls')), 'calls a tool', 2),
    'refusal as a chunk': (with_body(completion([dict(type='refusal', refusal='I am sorry.')])), 'refused: I am sorry.', 1),
    'error under 200': (with_body(dict(error=dict(message='overloaded', code=502))), 'overloaded', 4),
    'choices a word': (with_body(dict(id='x', choices='no')), 'no message', 4),
    'cut off': (with_body(completion('{"acc', finish='length')), 'raise max_tokens', 1),
    'refusal': (with_body(completion(refusal='I am sorry.')), 'refused: I am sorry.', 1),
    'content filter': (with_body(completion('', finish='content_filter')), 'refused: stopped by the content filter', 1),
    'wait an hour': (with_status(429, 'later', {'Retry-After': '3600'}), 'asks to wait 3600 s', 1),
}


@pytest.mark.parametrize('kind', FAILURES)
def test_failure_is_reported_and_never_scored(serve, kind):
    "The bad item has its reason and NaN everywhere; its neighbours have their grades."
    act, says, calls = FAILURES[kind]
    s = serve(lambda i, p, a: act if i == 1 else None)
    g = grader(s)
    rows = g.grade([image(i) for i in range(3)], 'a star')
    assert rows[1]['error'] and says in rows[1]['error'], rows[1]['error']
    assert all(math.isnan(rows[1][n]) for n in [*ASPECTS, OVERALL])
    assert [r['calls'] for r in rows] == [1, calls, 1] and s.attempts[1, 'a star'] == calls
    assert [r['error'] for r in rows[::2]] == [None, None] and overall(rows)[::2] == [score_of(0, 'a star'), score_of(2, 'a star')]
    with pytest.warns(UserWarning, match='1 of 3 images have no grade'): scores = g([image(i) for i in range(3)], 'a star')
    assert_close(scores, torch.tensor([score_of(0, 'a star'), math.nan, score_of(2, 'a star')]), equal_nan=True)
    assert scores.dtype == torch.float32 and scores.device.type == 'cpu'


def test_time_out(serve):
    "The first call of an item hangs, the second is answered; another item hangs for ever. The rest does not wait for them."
    woken = threading.Event()
    def hang(good):
        woken.wait()
        return 200, {}, good
    s = serve(lambda i, p, a: hang if i == 2 or (i == 1 and a == 1) else None)
    rows = grader(s, timeout=2., retries=1).grade([image(i) for i in range(4)], 'x')
    assert [r['calls'] for r in rows] == [1, 2, 2, 1]
    assert 'no answer within 2.0 s' in rows[2]['error'] and [r['error'] for r in rows[:2]+rows[3:]] == [None]*3
    assert overall(rows[:2]+rows[3:]) == [score_of(i, 'x') for i in (0, 1, 3)]
    woken.set()


def test_retry_after_is_honoured_by_all_threads(serve):
    "After a 429 with Retry-After nobody calls before the time is over, not even for another item that comes up for its retry."
    s = serve(lambda i, p, a: with_status(429, headers={'Retry-After': '1'}) if a == 1 else None)
    rows = grader(s, concurrency=3).grade([image(i) for i in range(3)], 'x')
    assert overall(rows) == [score_of(i, 'x') for i in range(3)]
    assert sorted(s.times)[3]-sorted(s.times)[0] >= .99


def test_backoff_grows(serve):
    s = serve(lambda i, p, a: with_status(500) if a < 4 else None)
    assert grader(s, backoff=.1).grade(image(0), 'x')[0]['calls'] == 4
    gaps = np.diff(s.times)
    assert gaps[0] >= .05 and gaps[1] >= .1 and gaps[2] >= .2


HOPELESS = {401: 'check the key', 402: 'no credit left', 403: 'may not use', 404: 'check the name of the model', 405: 'check the name of the model'}


@pytest.mark.parametrize('act, remedy', [*((with_status(c, 'no'), r) for c, r in HOPELESS.items()), (with_status(429, 'no', code='insufficient_quota'), 'no credit left')])
def test_hopeless_errors_stop_the_run(serve, act, remedy):
    "A wrong key would fail for every item: calls stop, and every row says why."
    s = serve(lambda i, p, a: act)
    rows = grader(s, concurrency=2).grade([image(i) for i in range(30)], 'x')
    assert len(s.requests) <= 2 and all(r['error'] and 'HTTP 4' in r['error'] and remedy in r['error'] for r in rows)
    with pytest.raises(EndpointError, match=remedy): grader(s)(image(0), 'x')


def test_an_address_without_v1_is_said(serve):
    s = serve(lambda i, p, a: None)
    s.reply = lambda handler: handler.send_error(404)
    g = grader(s, base_url=s.url.removesuffix('/v1'))
    assert f"try base_url='{s.url}'" in g.grade(image(0), 'x')[0]['error'] and g.spent.calls == 1


def test_a_web_page_is_no_endpoint(serve):
    s = serve(lambda i, p, a: lambda good: (200, {'Content-Type': 'text/html'}, '<html>hello</html>'))
    rows = grader(s, concurrency=1).grade([image(i) for i in range(5)], 'x')
    assert len(s.requests) == 1 and all('web page' in r['error'] for r in rows)


def test_replies_of_merely_compatible_servers(serve):
    "Content in chunks, words around the JSON, tokens as strings: graded, and billed by the tokens."
    def chunks(good):
        text = good['choices'][0]['message']['content']
        good['choices'][0]['message']['content'] = [dict(type='thinking', text='Hm {'), dict(type='text', text=text[:99]), dict(type='text', text=text[99:])]
        return 200, {}, {**good, 'usage': dict(prompt_tokens='900', completion_tokens='300')}
    def words(good):
        good['choices'][0]['message']['content'] = 'Here you are:\n```json\n'+good['choices'][0]['message']['content']+'\n```\nAnything else?'
        return 200, {}, {**good, 'usage': 'few'}
    s = serve(lambda i, p, a: (chunks, words)[i])
    rows = grader(s).grade([image(0), image(1)], 'x')
    assert [r['error'] for r in rows] == [None, None] and overall(rows) == [score_of(0, 'x'), score_of(1, 'x')]
    assert rows[0]['dollars'] == pytest.approx(.00525) and .015 < rows[1]['dollars'] < .04


def test_an_answer_that_changes_is_asked_for_again(serve):
    "At temperature 0 the same malformed reply ends it; at another temperature, or if the reply changes, all tries are used."
    same, other = (lambda i, p, a: with_body(completion('hm'))), (lambda i, p, a: with_body(completion('hm'*a)))
    assert [grader(serve(plan), params=dict(temperature=t)).grade(image(0), 'x')[0]['calls'] for plan, t in ((same, 0), (same, 1), (other, 0))] == [2, 4, 4]


def test_no_server():
    g = Grader('judge', base_url='http://127.0.0.1:9/v1', api_key='x', cache=None, backoff=.01, retries=1, concurrency=2)
    rows = g.grade([image(i) for i in range(30)], 'x')
    assert all('cannot reach http://127.0.0.1:9' in r['error'] for r in rows) and g.spent.calls <= 4


def test_bad_input_costs_nothing(serve, tmp_path):
    s = serve()
    (tmp_path/'bad.png').write_bytes(b'no')
    with pytest.raises(ValueError, match='image 1'): grader(s).grade([image(0), 7], 'x')
    with pytest.raises(ValueError, match='bad.png'): grader(s).grade([image(0), tmp_path/'bad.png'], 'x')
    with pytest.raises(ValueError, match='2 prompts for 1 images'): grader(s).grade([image(0)], ['x', 'y'])
    with pytest.raises(InputError, match=r'prompt 1: has a lone surrogate \(U\+DC00\)'): grader(s).grade([image(0)]*2, ['x', 'y\udc00'])
    (tmp_path/'file').write_text('x')
    with pytest.raises(InputError, match='answers cannot be kept there'): grader(s, cache=tmp_path/'file'/'c.jsonl').grade(image(0), 'x')
    with pytest.raises(InputError, match='cannot be read'): grader(s, cache=tmp_path).grade(image(0), 'x')
    assert not s.requests


def test_large_images_are_sent_small_and_known_by_what_is_sent(serve, tmp_path):
    s, cache = serve(), tmp_path/'c.jsonl'
    big, small = image(5, (3000, 3000)), image(5, (768, 768))
    rows = [grader(s, cache=cache).grade(x, 'x')[0] for x in (big, small)]
    assert overall(rows) == [score_of(5, 'x')]*2 and [r['cached'] for r in rows] == [False, True] and len(s.requests) == 1


def test_identity(serve, tmp_path):
    "What decides a grade makes another grader; what does not, does not."
    s = serve()
    (tmp_path/'r.txt').write_text('Be kind.')
    one = identity(grader(s))
    assert one and one == identity(grader(s, concurrency=1, retries=0, api_key='other', timeout=1., cache=tmp_path/'c'))
    others = [dict(rubric=tmp_path/'r.txt'), dict(params=dict(temperature=0)), dict(metric=ASPECTS[0]), dict(base_url='http://x/v1')]
    assert len({one, *(identity(grader(s, **kw)) for kw in others), identity(Grader('gpt-4o', base_url=s.url, cache=None))}) == 6


# --- the cache ---------------------------------------------------------------------------------------------------------------

def test_cache_survives_and_tells_questions_apart(serve, tmp_path):
    s, cache = serve(), tmp_path/'a'/'grades.jsonl'
    first = grader(s, cache=cache).grade([image(i) for i in range(5)], 'x')
    again = grader(s, cache=cache, api_key=None).grade([image(i) for i in range(5)], 'x') # no key needed: nothing is asked
    assert overall(again) == overall(first) and all(r['cached'] and r['dollars'] == 0 for r in again) and len(s.requests) == 5
    image(0).save(tmp_path/'0.png')
    assert grader(s, cache=cache).grade(tmp_path/'0.png', 'x')[0]['cached'] # the same pixels from a file
    (tmp_path/'r.txt').write_text('Be kind.')
    for change in dict(rubric=tmp_path/'r.txt'), dict(params=dict(temperature=1)): assert not grader(s, cache=cache, **change).grade(image(0), 'x')[0]['cached']
    assert not grader(s, cache=cache).grade(image(0), 'y')[0]['cached']
    assert not grader(s, cache=cache).grade(image(0, (6, 8)), 'x')[0]['cached']
    assert 'secret' not in cache.read_text()


def test_refusals_are_kept_and_malformed_answers_are_not(serve, tmp_path):
    s = serve(lambda i, p, a: with_body(completion(refusal='no')) if i == 0 else with_body(completion('hm')) if a < 3 else None)
    rows = [grader(s, cache=tmp_path/'c', retries=1).grade([image(0), image(1)], 'x') for _ in range(2)]
    assert [[bool(r['error']) for r in rs] for rs in rows] == [[True, True], [True, False]]
    assert s.attempts == {(0, 'x'): 1, (1, 'x'): 3}


def test_torn_and_foreign_lines(serve, tmp_path):
    s, cache = serve(), tmp_path/'c.jsonl'
    grader(s, cache=cache, concurrency=1).grade([image(0), image(1)], 'x')
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(lines[0]+lines[1][:50])               # torn in the middle of the second
    rows = grader(s, cache=cache).grade([image(0), image(1)], 'x')
    assert [r['cached'] for r in rows] == [True, False] and overall(rows) == [score_of(0, 'x'), score_of(1, 'x')]
    with pytest.warns(UserWarning, match='1 damaged line'): rows = grader(s, cache=cache).grade([image(0), image(1)], 'x')
    assert all(r['cached'] for r in rows) and len(s.requests) == 3
    other = tmp_path/'notes.txt'
    other.write_text('dear diary\n')
    with pytest.raises(ValueError, match='not a cache of grades'): grader(s, cache=other).grade(image(0), 'x')
    assert other.read_text() == 'dear diary\n'


def test_many_writers_one_cache(tmp_path):
    "Eight threads with an object each: no line is lost or mixed up."
    def write(k):
        c = ReplyCache(tmp_path/'c')
        for j in range(50): c.put(dict(key=f'{k}-{j}', refusal='x'*(j*20)))
    threads = [threading.Thread(target=write, args=(k,)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    c = ReplyCache(tmp_path/'c').refresh()
    assert len(c) == 400 and all(len(c.get(f'{k}-{j}')['refusal']) == j*20 for k in range(8) for j in range(50))


def test_default_cache(serve, tmp_path):
    s = serve()
    grader(s, cache='default').grade(image(0), 'x')
    assert len((tmp_path/'xdg'/'llava_reward_nb'/'grades.jsonl').read_text().splitlines()) == 1


# --- the budget --------------------------------------------------------------------------------------------------------------

def test_call_budget_keeps_what_is_done(serve, tmp_path):
    "A cap of 10 calls with retries among them: 10 requests reach the server, partial results stay, a second run does the rest."
    s = serve(lambda i, p, a: with_status(500) if i == 0 and a == 1 else None)
    items = [image(i) for i in range(25)]
    rows = grader(s, cache=tmp_path/'c', max_calls=10).grade(items, 'x')
    done = [r['item'] for r in rows if not r['error']]
    assert len(s.requests) == 10 and 9 <= len(done) <= 10
    assert all('budget of 10 calls is spent' in r['error'] and math.isnan(r[OVERALL]) for r in rows if r['error'])
    rows = grader(s, cache=tmp_path/'c').grade(items, 'x')
    assert [r['item'] for r in rows if r['cached']] == done and overall(rows) == [score_of(i, 'x') for i in range(25)]
    assert set(s.graded.values()) == {1} and len(s.graded) == 25


def test_dollar_budget_is_never_exceeded(serve):
    "Each answer costs 0.525 cents, a call may cost up to about 3: the run ends within one call of the cap, below it."
    s = serve()
    g = grader(s, max_dollars=.08)
    rows = g.grade([image(i) for i in range(40)], 'x')
    assert g.spent.dollars == pytest.approx(.00525*len(s.requests)) and .045 < g.spent.dollars <= .08
    assert sum(r['dollars'] for r in rows) == pytest.approx(g.spent.dollars)
    assert all('may cost' in r['error'] for r in rows if math.isnan(r[OVERALL]))
    g = grader(s, max_dollars=.001)
    assert 'may cost' in g.grade(image(99), 'x')[0]['error'] and g.spent.calls == 0


def test_answers_that_are_no_use_are_billed_too(serve):
    s = serve(lambda i, p, a: with_body(completion('hm'*a)) if a < 3 else None)
    g = grader(s)
    row = g.grade(image(0), 'x')[0]
    assert row['calls'] == 3 and row['dollars'] == pytest.approx(3*.00525) == g.spent.dollars


def test_without_token_counts_the_most_is_booked(serve):
    s = serve(lambda i, p, a: lambda good: (200, {}, {**good, 'usage': None}))
    assert .015 < grader(s).grade(image(0), 'x')[0]['dollars'] < .04


def test_the_price_must_be_known(serve):
    with pytest.raises(ValueError, match='price of .judge. is not known'): grader(serve(), price=None, max_dollars=1)
    assert Grader(max_dollars=1, cache=None).price == PRICES['gpt-4o']
    with pytest.raises(ValueError, match='max_calls is -1'): Budget(max_calls=-1)


# --- killed and interrupted ----------------------------------------------------------------------------------------------------

RUN = '''
import sys
from PIL import Image
from llava_reward_nb.rewards.grader import Grader
url, cache, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = Grader('judge', base_url=url, api_key='x', cache=cache, concurrency=4).grade(
    [Image.new('RGB', (8,6), (i%256, i//256, 7)) for i in range(n)], [f'p{i}' for i in range(n)])
print(','.join(str(r['overall_score']) for r in rows))
'''


TELL_STOP = '''
import signal
from llava_reward_nb.rewards import grader
signal.signal(signal.SIGINT, signal.default_int_handler) # which a shell may have switched off
stop = grader._Run.stop
def stop_and_tell(run, reason):
    stop(run, reason)
    print('stopped', flush=True)
grader._Run.stop = stop_and_tell
'''


def start(server, cache, n, before=''):
    return subprocess.Popen([sys.executable, '-c', before+RUN, server.url, str(cache), str(n)], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})


class Gate:
    "Lets a stated number of answers out; `drop` ends all calls that wait, unanswered; `entered` counts all calls."
    def __init__(self): self.changed, self.free, self.round, self.entered = threading.Condition(), 0, 0, 0

    def open(self, n):
        with self.changed:
            self.free += n
            self.changed.notify_all()

    def drop(self):
        with self.changed:
            self.round += 1
            self.changed.notify_all()

    def __call__(self, good):
        with self.changed:
            self.entered += 1
            mine = self.round
            self.changed.wait_for(lambda: self.free or self.round != mine)
            if self.round != mine: return None, {}, ''
            self.free -= 1
            return 200, {}, good


def wait_for(condition, run):
    deadline = time.monotonic()+300
    while not condition():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(.02)


def test_kill_9_and_resume(serve, tmp_path):
    "Killed twice with calls in flight: at the end every item has its own grade, and no answer was given out twice."
    n, cache, gate = 40, tmp_path/'c.jsonl', Gate()
    s = serve(lambda i, p, a: gate)
    kept = sent = 0
    for release in 7, 13:
        run = start(s, cache, n)
        gate.open(release)
        kept += release
        sent += release+4                    # four calls are in flight, and have arrived
        wait_for(lambda: len(ReplyCache(cache).refresh()) == kept and gate.entered == sent, run)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        gate.drop()
    assert len(ReplyCache(cache).refresh()) == 20 == sum(s.graded.values()) < sum(s.attempts.values())
    gate.open(n)
    run = start(s, cache, n)
    out, _ = run.communicate(timeout=300)
    assert [float(x) for x in out.split(',')] == [score_of(i, f'p{i}') for i in range(n)]
    assert len(s.graded) == n and set(s.graded.values()) == {1}


def test_two_runs_share_a_cache(serve, tmp_path):
    "Two processes on one file at the same time: both give all grades, and every line of the file can be read."
    s, cache = serve(), tmp_path/'c.jsonl'
    for run in [start(s, cache, 30) for _ in '12']:
        out, _ = run.communicate(timeout=300)
        assert [float(x) for x in out.split(',')] == [score_of(i, f'p{i}') for i in range(30)]
    assert len(ReplyCache(cache).refresh()) == 30 and all(json.loads(line)['key'] for line in cache.read_text().splitlines())


def test_interrupt_keeps_what_is_paid(serve, tmp_path):
    "Ctrl-C: calls in flight are waited for and kept, no new ones begin."
    cache, gate = tmp_path/'c.jsonl', Gate()
    s = serve(lambda i, p, a: gate)
    run = start(s, cache, 40, TELL_STOP)
    gate.open(5)
    wait_for(lambda: len(ReplyCache(cache).refresh()) == 5 and gate.entered == 9, run)
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == 'stopped\n'
    gate.open(40)
    run.communicate(timeout=300)
    assert run.returncode != 0
    assert len(ReplyCache(cache).refresh()) == sum(s.graded.values()) == 9


# --- the reward face -------------------------------------------------------------------------------------------------------------

def test_reward_face(serve):
    s = serve()
    g = grader(s, metric='visual_quality_and_realism')
    scores = g([image(1), image(2)], ['a', 'bb'], batch_size=1)
    assert_close(scores, torch.tensor([score_of(1, 'a'), score_of(2, 'bb')]))
    assert g.name == 'grader' and '0 to 10' in g.range and Grader.from_pretrained('m', device='cpu', cache=None).model == 'm'


def test_missing_package():
    code = "import sys; sys.modules['openai'] = None\nfrom llava_reward_nb.rewards.grader import Grader\nGrader()"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert 'ImportError' in done.stderr and 'pip install openai' in done.stderr
