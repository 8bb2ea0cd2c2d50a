"A hub in miniature on the loopback address, and a process that uses the real client against it."
import base64, hashlib, json, os, subprocess, sys, threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from project import ROOT

TOKEN = 'hf_of_the_tests'


@dataclass
class Repo:
    "A repository: branches and their files."
    branches: dict = field(default_factory=lambda: {'main': {}})  # branch -> path -> bytes
    gated: bool = False  # only for those who accepted its terms, and nobody did

    def commit(self, revision):
        "The commit that a branch, or a commit, stands for; None if there is none."
        commits = {name: self.sha(name) for name in self.branches}
        return commits.get(revision, revision if revision in commits.values() else None)

    def sha(self, branch):
        "A name for the content of a branch."
        return hashlib.sha1(b''.join(path.encode()+hashlib.sha1(content).digest() for path, content in self.branches[branch].items())).hexdigest()

    def files(self, commit): return next(files for name, files in self.branches.items() if self.sha(name) == commit)


class Hub:
    "The server. `repos` may be changed at any time, and `log` holds what was asked."
    def __init__(self):
        self.repos, self.log, self.commits = {}, [], []
        self.faults = {}  # path of a file -> what happens to its next transfers: a number of bytes to cut it after, or a status
        self.start(0)
        self.url = f'http://127.0.0.1:{self.port}'

    def start(self, port):
        self.server = ThreadingHTTPServer(('127.0.0.1', port), type('Handler', (_Handler,), {'hub': self}))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def unreachable(self):
        "Connections are refused inside."
        self.close()
        try: yield
        finally: self.start(self.port)

    def add(self, name, files, **kwargs): self.repos[name] = Repo({'main': files}, **kwargs)

    def fetched(self):
        "Files that were sent since the last call, with the byte each began at."
        sent = [what for what in self.log if what[0] == 'GET' and '/resolve/' in what[1]]
        self.log.clear()
        return [(path.split('/resolve/')[1].partition('/')[2], start) for _, path, start in sent]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def answer(self, status, content=b'', **headers):
        "Send an answer; what is not bytes becomes JSON."
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'content-length': len(body), **headers}.items(): self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def refuse(self, status, code, message): self.answer(status, dict(error=message), X_Error_Code=code, X_Error_Message=message)

    def repo(self, name, file=False):
        "A repository that may be read; None after the answer that says why not."
        repo = self.hub.repos.get(name)
        is_known = self.headers.get('authorization') in (None, f'Bearer {TOKEN}')
        if not is_known: self.refuse(401, '', 'Invalid credentials in Authorization header')
        elif repo is None: self.refuse(404, 'RepoNotFound', 'Repository not found')
        elif repo.gated and file: self.refuse(403, 'GatedRepo', f'Access to model {name} is restricted')
        else: return repo

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).replace('/datasets/', '/', 1) if '/resolve/' in self.path else unquote(urlsplit(self.path).path)
        start, _, end = (self.headers.get('range') or 'bytes=0-').split('=')[1].partition('-')
        start = int(start)
        self.end = int(end)+1 if end else None  # of the part that is asked for
        self.hub.log.append((self.command, path, start))
        parts = path.strip('/').split('/')
        if parts[0] == 'api': self.describe('/'.join(parts[2:4]), parts[4:])
        elif 'resolve' in parts: self.send_file('/'.join(parts[:2]), parts[3], '/'.join(parts[4:]), start)
        else: self.answer(404)

    do_HEAD = do_GET

    def describe(self, name, rest):
        "A repository, or the list of its files."
        repo = self.repo(name)
        if repo is None: return
        below = '/'.join(rest[2:])+'/' if rest[:1] == ['tree'] and rest[2:] and not repo.commit('/'.join(rest[1:])) else ''
        revision = rest[1] if below else '/'.join(rest[1:])
        commit = repo.commit(revision if rest else 'main')
        if commit is None: return self.refuse(404, 'RevisionNotFound', 'Invalid rev id')
        files = repo.files(commit)
        if rest and rest[0] == 'tree':
            return self.answer(200, [dict(type='file', path=path, size=len(content), oid=hashlib.sha1(content).hexdigest())
                                     for path, content in files.items() if path.startswith(below)])
        self.answer(200, dict(id=name, modelId=name, sha=commit, private=False, siblings=[dict(rfilename=path) for path in files]))

    def send_file(self, name, revision, path, start):
        "A file from a byte on."
        repo = self.repo(name, file=True)
        if repo is None: return
        commit = repo.commit(revision)
        if commit is None: return self.refuse(404, 'RevisionNotFound', 'Invalid rev id')
        content = repo.files(commit).get(path)
        if content is None: return self.refuse(404, 'EntryNotFound', 'Entry not found')
        headers = dict(ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit, Accept_Ranges='bytes')
        end = min(self.end or len(content), len(content))
        is_part = start or end < len(content)
        if is_part: headers |= dict(content_range=f'bytes {start}-{end-1}/{len(content)}')
        faults = self.hub.faults.get(path) if self.command == 'GET' else None
        fault = faults.pop(0) if faults else None
        if fault == 503: return self.refuse(503, '', 'Service Unavailable')
        if fault: return self.break_off(content[:fault], len(content), headers)
        self.answer(206 if is_part else 200, content[start:end], **headers)

    def break_off(self, content, length, headers):
        "Promise a file, send its beginning, and hang up."
        self.send_response(200)
        for name, value in (headers | {'content-length': length}).items(): self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def do_POST(self):
        "Validate a card, create a repository, take a commit."
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get('content-length') or 0))
        self.hub.log.append((self.command, path, 0))
        if '/paths-info/' in path: return self.tell_paths('/'.join(path.strip('/').split('/')[2:4]), path.split('/paths-info/')[1], body)
        if self.headers.get('authorization') != f'Bearer {TOKEN}': return self.refuse(401, '', 'Invalid username or password.')
        name = '/'.join(path.strip('/').split('/')[2:4])
        if path == '/api/validate-yaml': return self.answer(200, dict(errors=[], warnings=[]))
        if path == '/api/repos/create': return self.create(json.loads(body))
        if '/preupload/' in path: return self.answer(200, dict(files=[
            dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]))
        if '/commit/' in path: return self.take(name, path.split('/commit/')[1], body)
        self.answer(404)

    def tell_paths(self, name, revision, body):
        "What is known of some paths."
        repo = self.repo(name)
        if repo is None: return
        commit = repo.commit(revision)
        if commit is None: return self.refuse(404, 'RevisionNotFound', 'Invalid rev id')
        try: asked = json.loads(body)['paths']
        except ValueError: asked = parse_qs(body.decode())['paths']
        files = repo.files(commit)
        self.answer(200, [dict(type='file', path=path, size=len(files[path]), oid=hashlib.sha1(files[path]).hexdigest())
                          for path in asked if path in files])

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if not name.startswith('me/'): return self.refuse(403, '', f"You don't have the rights to create a model under the namespace \"{asked['organization']}\"")
        if name in self.hub.repos: return self.refuse(409, '', 'You already created this model repo')
        self.hub.add(name, {})
        self.answer(200, dict(url=f'{self.hub.url}/{name}', name=name))

    def take(self, name, branch, body):
        "Add the files of a commit to a branch."
        lines = [json.loads(line) for line in body.decode().splitlines()]
        files = self.hub.repos[name].branches.setdefault(branch, {})
        files |= {line['value']['path']: base64.b64decode(line['value']['content']) for line in lines if line['key'] == 'file'}
        self.hub.commits.append(lines[0]['value']['summary'])
        oid = self.hub.repos[name].sha(branch)
        self.answer(200, dict(success=True, commitOid=oid, commitUrl=f'{self.hub.url}/{name}/commit/{oid}', hookOutput=''))


_WORKER = '''
import json, os, sys
answers = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
names = {}
exec(sys.argv[1], names)
for line in sys.stdin:
    try: said = [None, eval(json.loads(line), names)]
    except Exception as e: said = [type(e).__name__, str(e)]
    print(json.dumps(said, default=str), file=answers, flush=True)
'''


class Client:
    "A process whose hub is ours, with a cache of its own. `client(code)` is the value of an expression, made JSON."
    def __init__(self, url, home, imports, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING')) and not k.lower().endswith('_proxy')}
        own = dict(HF_ENDPOINT=url, HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1', OMP_NUM_THREADS='1')
        self.process = subprocess.Popen([sys.executable, '-c', _WORKER, imports], cwd=ROOT, env=clean | own | env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, code):
        kind, value = self.ask(code)
        assert kind is None, f'{kind}: {value}'
        return value

    def error(self, code):
        "The kind and the text of the error that an expression raises."
        kind, value = self.ask(code)
        assert kind is not None, f'no error, but {value!r}'
        return kind, value

    def ask(self, code):
        print(json.dumps(code), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, 'the client is gone; its errors are above'
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
