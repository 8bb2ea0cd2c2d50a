"The hub's real client against a small server: what is fetched, what is not fetched again, what is said when it cannot be had."
from pathlib import Path

import pytest
from hub import TOKEN, Client, Hub

import llava_reward_nb

IMPORTS = 'import os; from llava_reward_nb.weights import hub_folder, load_pretrained; from llava_reward_nb.backbones import load_backbone'
SMALL = {'config.json': b'{"layers": 2}', 'model.safetensors': b'12345', 'sub/dir/config.json': b'{}', 'sub/dir/x.bin': b'x', 'code.py': b'evil()',
         'alignment/llavareward_phi_alignment/reward_config.yaml': b'value_head_dim: 1'}


@pytest.fixture(scope='module')
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    client = Client(hub.url, tmp_path_factory.mktemp('home'), IMPORTS)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def fresh_log(hub): hub.log.clear()


def test_a_repository_is_fetched_once(hub, client):
    hub.add('owner/small', dict(SMALL))
    folder = Path(client("hub_folder('owner/small')"))
    assert {path for path, _ in hub.fetched()} == SMALL.keys()-{'code.py'}
    assert (folder/'model.safetensors').read_bytes() == b'12345' and not (folder/'code.py').exists()
    assert client("hub_folder('owner/small')") == str(folder) and hub.fetched() == []
    hub.repos['owner/small'].branches['main']['config.json'] = b'{"layers": 3}'
    newer = Path(client("hub_folder('owner/small')"))
    assert [path for path, _ in hub.fetched()] == ['config.json'] and (newer/'model.safetensors').read_bytes() == b'12345'


def test_only_the_folder_asked_for_is_fetched(hub, client):
    hub.add('owner/nested', dict(SMALL))
    folder = Path(client("hub_folder('owner/nested/sub/dir')"))
    assert {path for path, _ in hub.fetched()} == {'sub/dir/config.json', 'sub/dir/x.bin'}
    assert folder.parts[-2:] == ('sub', 'dir') and sorted(p.name for p in folder.iterdir()) == ['config.json', 'x.bin']
    client("hub_folder('owner/nested/alignment/llavareward_phi_alignment')")
    assert [path for path, _ in hub.fetched()] == ['alignment/llavareward_phi_alignment/reward_config.yaml']
    client("hub_folder('owner/nested/sub/dir', ['*.bin'])")
    assert hub.fetched() == []
    kind, said = client.error("hub_folder('owner/nested/llavareward_phi_alignment')")
    assert kind == 'CheckpointError' and "no folder 'llavareward_phi_alignment'; it has alignment/llavareward_phi_alignment" in said


def test_revisions(hub, client):
    hub.add('owner/versions', dict(SMALL))
    hub.repos['owner/versions'].branches |= {'v1': {'config.json': b'"one"', 'sub/dir/config.json': b'"deep"'}}
    for call, content in (("'owner/versions@v1'", b'"one"'), ("'owner/versions', revision='v1'", b'"one"'), ("'owner/versions/sub/dir@v1'", b'"deep"'),
                          (f"'owner/versions', revision='{hub.repos['owner/versions'].sha('v1')}'", b'"one"'), ("'owner/versions'", SMALL['config.json'])):
        assert (Path(client(f'hub_folder({call})'))/'config.json').read_bytes() == content
    kind, said = client.error("hub_folder('owner/versions@v2')")
    assert (kind, said.split(';')[0]) == ('CheckpointError', "owner/versions@v2: has no revision 'v2'")
    assert 'leave one out' in client.error("hub_folder('owner/versions@v1', revision='v2')")[1]


BIG = bytes(range(256))*80_000  # 20 MB; the client writes chunks of 10 MB


def test_a_broken_download_goes_on_where_it_broke(hub, client):
    hub.add('owner/big', {'model.safetensors': BIG})
    hub.faults['model.safetensors'] = [15_000_000]
    folder = Path(client("hub_folder('owner/big')"))
    (first, start), (second, resumed) = hub.fetched()
    assert first == second == 'model.safetensors' and start == 0 and 10_000_000 <= resumed <= 15_000_000
    assert (folder/'model.safetensors').read_bytes() == BIG


def test_after_a_failed_download_only_the_rest_is_fetched(hub, client):
    hub.add('owner/two', {'config.json': b'{}', 'model.safetensors': b'56789'})
    hub.faults['model.safetensors'] = [503]
    kind, said = client.error("hub_folder('owner/two')")
    assert kind == 'CheckpointError' and 'owner/two: the hub answered 503' in said and 'try again later: files that came whole are kept' in said
    hub.log.clear()
    folder = Path(client("hub_folder('owner/two')"))
    assert hub.fetched() == [('model.safetensors', 0)] and (folder/'model.safetensors').read_bytes() == b'56789'


def test_what_is_not_there(hub, client):
    kind, said = client.error("hub_folder('owner/none')")
    assert kind == 'CheckpointError' and said.startswith('owner/none: no such model on the hub, or it is private; look at https://huggingface.co/owner/none')
    assert client.error("hub_folder('owner/none', data=True)")[0] == 'InputError'


BASE = Path(llava_reward_nb.__file__).parent/'bundle'/'base'


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_a_base_that_lacks_a_file(hub, client, file):
    "The error names the file and the command that fetches it, and then the base loads."
    hub.add('owner/part', {p.name: p.read_bytes() for p in BASE.iterdir() if p.name != file})
    hub.repos['owner/part'].branches['extra'] = {'notes.txt': file.encode()}  # another commit each time
    kind, said = client.error("load_backbone('owner/part')")
    assert kind == 'CheckpointError' and file in said and f'`hf download owner/part {file}`' in said, said


@pytest.mark.parametrize('call', ["hub_folder('owner/gated')", "load_pretrained(__import__('transformers').CLIPModel, 'owner/gated')"])
def test_a_gated_repository(hub, client, call):
    hub.add('owner/gated', dict(SMALL), gated=True)
    kind, said = client.error(call)
    assert kind == 'CheckpointError' and said.startswith('owner/gated: is gated; accept its terms at https://huggingface.co/owner/gated and log in')


def test_tokens(hub, client):
    hub.add('owner/token', dict(SMALL))
    client("os.environ.update(HF_TOKEN='hf_old')")
    assert 'the hub answered 401 (Invalid credentials in Authorization header); log in with `hf auth login`' in client.error("hub_folder('owner/token')")[1]
    client(f"os.environ.update(HF_TOKEN='{TOKEN}')")
    assert (Path(client("hub_folder('owner/token')"))/'config.json').is_file()
    client("os.environ.pop('HF_TOKEN')")


def test_without_a_network(hub, client):
    "What was fetched serves on; what was not names the command that fetches it elsewhere."
    hub.add('owner/kept', dict(SMALL))
    folder = client("hub_folder('owner/kept/sub/dir')")
    with hub.unreachable():
        assert client("hub_folder('owner/kept/sub/dir')") == folder
        assert client.error("hub_folder('owner/kept')")[0] == 'CheckpointError'
        kind, said = client.error("hub_folder('owner/never/x@v1')")
    assert 'it is not in the cache, and the hub cannot be reached' in said and "`hf download owner/never --revision v1 --include 'x/*' --local-dir DIR`" in said
