"The hub's real client against a small server: what is fetched, what is not fetched again, what is said when it cannot be had."
import io
from pathlib import Path

import pytest, torch
from hub import TOKEN, Client, Hub
from PIL import Image
from safetensors.torch import load_file

import llava_reward_nb

IMPORTS = 'import os; from llava_reward_nb.weights import hub_folder, load_pretrained; from llava_reward_nb.generic import load_backbone'
MODEL = 'from llava_reward_nb import RewardModel, load_reward; from llava_reward_nb.published import convert, push_to_hub'
SMALL = {'config.json': b'{"layers": 2}', 'model.safetensors': b'12345', 'sub/dir/config.json': b'{}', 'sub/dir/x.bin': b'x', 'code.py': b'evil()',
         'alignment/llavareward_phi_alignment/reward_config.yaml': b'value_head_dim: 1'}


@pytest.fixture(scope='module')
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    client = Client(hub.url, tmp_path_factory.mktemp('home'), f'{IMPORTS}; {MODEL}')
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


BUNDLE = BASE.parent


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images')/'a.png'
    Image.new('RGB', (64, 64), 'red').save(path)
    return path


def files_of(folder, under=''): return {under+p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def published(name, under):
    "A perspective of the bundle as the authors' trainer writes it."
    source = BUNDLE/name
    lora, head = load_file(source/'adapter_model.safetensors'), load_file(source/'head.safetensors')
    adapter = {n.removeprefix('base_model.model.').replace('language_model.', 'model.'): t for n, t in lora.items() if 'lora_' in n}
    rest = {n.replace('base_model.model.', 'model.vision_embed_tokens.'): t for n, t in lora.items() if 'lora_' not in n}
    out = {}
    for path, tensors in (('lora/adapter_model.bin', adapter), ('pytorch_model.bin', rest | {n.removeprefix('skipca.'): t for n, t in head.items()})):
        file = io.BytesIO()
        torch.save(tensors, file)
        out[under+path] = file.getvalue()
    settings = b'general_preference_tau: 0.1\nvalue_head_dim: 1\nadd_cross_attention: true\nis_general_preference: false\n'
    return out | {f'{under}lora/adapter_config.json': (source/'adapter_config.json').read_bytes(), f'{under}reward_config.yaml': settings}


def test_a_published_perspective_and_its_base_by_their_names(hub, client, image, tmp_path):
    "A folder of a repository with a revision, on a base that is a folder of a repository with another one."
    under = 'alignment/llavareward_phi_alignment/'
    hub.add('authors/rewards', published('safety', 'safety/llavareward_phi_safety/') | {'README.md': b''})
    hub.repos['authors/rewards'].branches['v1'] = hub.repos['authors/rewards'].branches['main'] | published('alignment', under)
    hub.add('authors/base', files_of(BASE, 'phi/tiny/'))
    hub.repos['authors/base'].branches['v2'] = hub.repos['authors/base'].branches['main']
    name, options = f"'authors/rewards/{under[:-1]}", "base='authors/base/phi/tiny@v2', num_crops=1, device='cpu'"
    want = client(f"RewardModel.from_pretrained('tiny', 'alignment', device='cpu')('{image}', 'a red circle').tolist()")
    hub.log.clear()
    for model in (f"RewardModel.from_pretrained({name}@v1', {options})", f"RewardModel.from_pretrained({name}', revision='v1', {options})",
                  f"load_reward('llava-reward:{name[1:]}@v1', {options})"):
        assert client(f"{model}('{image}', 'a red circle').tolist()") == pytest.approx(want, abs=1e-4)
    assert not [path for path, _ in hub.fetched() if path.startswith('safety')]
    assert client(f"list(RewardModel.from_pretrained({name}@v1', {options}).configs)") == ['llavareward_phi_alignment']
    assert client(f"RewardModel.from_pretrained({name}@v1', {options}).config.base") == 'authors/base/phi/tiny@v2'
    assert "has no folder" in client.error(f"RewardModel.from_pretrained({name}', {options})")[1]
    ours = tmp_path/'ours'
    assert client(f"[str(p) for p in convert({name}@v1', '{ours}', 'authors/base/phi/tiny@v2', overrides=dict(num_crops=1))]") == [str(ours)]
    assert f'| converted from | authors/rewards/{under[:-1]}@v1 |' in (ours/'README.md').read_text()
    assert client(f"RewardModel.from_pretrained('{ours}', device='cpu')('{image}', 'a red circle').tolist()") == pytest.approx(want, abs=1e-4)


def test_pushing_and_loading_what_arrived(hub, client, image):
    want = client(f"RewardModel.from_pretrained('tiny', 'safety', device='cpu')('{image}', '').tolist()")
    kind, said = client.error(f"push_to_hub('{BUNDLE/'safety'}', 'me/safety', base='tiny')")
    assert kind == 'InputError' and said.startswith('me/safety: nothing was published: the hub answered 401') and 'hf auth login' in said
    client(f"os.environ.update(HF_TOKEN='{TOKEN}')")
    kind, said = client.error(f"push_to_hub('{BUNDLE/'safety'}', 'you/safety', base='tiny')")
    assert kind == 'InputError' and 'the hub answered 403' in said and 'a token that may do this' in said
    assert client(f"push_to_hub('{BUNDLE/'safety'}', 'me/safety', base='tiny')").startswith(f'{hub.url}/me/safety/commit/')
    main = hub.repos['me/safety'].branches['main']
    assert sorted(main) == ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'checksums.json', 'head.safetensors', 'reward_config.json']
    assert b"from_pretrained('me/safety')" in main['README.md'] and hub.commits == ['Perspective safety']
    assert client(f"RewardModel.from_pretrained('me/safety', device='cpu')('{image}', '').tolist()") == pytest.approx(want, abs=1e-5)
    assert client("list(RewardModel.from_pretrained('me/safety', device='cpu').configs)") == ['safety']

    client("push_to_hub(RewardModel.from_pretrained('tiny', ['alignment', 'safety'], device='cpu'), 'me/both')")
    paths = hub.repos['me/both'].branches['main']
    assert {path.split('/')[0] for path in paths} == {'README.md', 'alignment', 'safety'} and b"from_pretrained('me/both/alignment')" in paths['README.md']
    assert b"from_pretrained('me/both/alignment')" in paths['alignment/README.md']
    assert client("list(RewardModel.from_pretrained('me/both', device='cpu').configs)") == ['alignment', 'safety']
    assert client(f"load_reward('llava-reward:me/both/safety', device='cpu')('{image}', '').tolist()") == pytest.approx(want, abs=1e-5)
    client("os.environ.pop('HF_TOKEN')")
