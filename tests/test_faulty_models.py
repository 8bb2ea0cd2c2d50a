"Perspectives with names, options, files and places that nobody foresaw: honoured, or refused by name."
import json, os, random, re, shlex, shutil, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch, yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from llava_reward_nb.generic import load_backbone
from llava_reward_nb.core import CheckpointError, InputError, load_image
from llava_reward_nb.weights import MODELS
from llava_reward_nb.model import PerspectiveConfig, RewardModel, model_card, name_fault
from llava_reward_nb.phi3v import PatchConv2d, Phi3VModel
from llava_reward_nb.rewards.registry import load_reward
from llava_reward_nb.rewards.llava import LLaVAReward
from llava_reward_nb.skipca import ValueHead

IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (h, w, 3), dtype=np.uint8)) for i, (w, h) in enumerate([(64, 64), (90, 50)])]
PROMPTS = ['a red circle', 'a photo of two stars']


def fresh(**kw): return RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu', **kw)


def spread(rm, seed=0):
    "Weights of perspectives that are not the base's, so that rewards differ."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in rm.named_parameters():
            if 'lora_B' in n or 'value_head' in n: p.copy_(torch.randn(p.shape, generator=g)*.05)
    return rm


# --- options of PEFT's file ----------------------------------------------------------------------------------------------------------

OPTIONS = dict(plain={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True), one_layer=dict(target_modules=['qkv_proj', 'o_proj'], layers_to_transform=[0]),
               ranks=dict(rank_pattern={'qkv_proj': 7, r'layers\.1\.mlp\.down_proj': 3}, alpha_pattern={'down_proj': 2}), some=dict(target_modules=['qkv_proj', 'down_proj']),
               no_projector=dict(modules_to_save=None), left_out=dict(exclude_modules=['o_proj']), orthogonal=dict(init_lora_weights='orthogonal'))


@pytest.mark.parametrize('layout', ['ours', 'published'])
@pytest.mark.parametrize('kind', OPTIONS)
def test_options_mean_what_peft_means(kind, layout, tmp_path):
    "An adapter that PEFT made and saved, read by PEFT alone on the bare base, and by us."
    from peft import LoraConfig, PeftModel
    options = OPTIONS[kind]
    b, head = load_backbone('tiny'), ValueHead(192)
    lora = LoraConfig(**{**dict(r=4, lora_alpha=12, lora_dropout=.1, target_modules=b.lora_targets, modules_to_save=['img_projection'], init_lora_weights='gaussian'), **options})
    model = PeftModel(b.model, lora).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if 'lora_B' in n or 'modules_to_save' in n: p.add_(torch.randn(p.shape)*.05)
    nn.init.normal_(head.value_head.weight)
    with torch.no_grad():
        h, visual, mask = b(b.encode(IMAGES, PROMPTS))
        want = head(h[:, -1], visual, mask)[:, 0]
    model.save_pretrained(tmp_path/'peft')
    weights, config = load_file(tmp_path/'peft'/'adapter_model.safetensors'), json.loads((tmp_path/'peft'/'adapter_config.json').read_text())
    folder = tmp_path/'mine'
    folder.mkdir()
    if layout == 'ours':
        (folder/'adapter_config.json').write_text(json.dumps(config))
        save_file(weights, folder/'adapter_model.safetensors')
        save_file(head.state_dict(), folder/'head.safetensors')
        (folder/'reward_config.json').write_text(json.dumps(dict(loss='bt', num_crops=1)))
    else:
        (folder/'lora').mkdir()
        lora_keys = {k.removeprefix('base_model.model.').replace('language_model.', 'model.'): v for k, v in weights.items() if 'lora_' in k}
        save_file(lora_keys, folder/'lora'/'adapter_model.safetensors')
        rename = lambda v: {rename(k): n for k, n in v.items()} if isinstance(v, dict) else v.replace('language_model', 'model') if isinstance(v, str) else v
        (folder/'lora'/'adapter_config.json').write_text(json.dumps({k: rename(v) for k, v in config.items()} | dict(modules_to_save=None)))
        projector = {k.replace('base_model.model.', 'model.vision_embed_tokens.'): v for k, v in weights.items() if 'img_projection' in k}
        torch.save({**{k.removeprefix('skipca.'): v for k, v in head.state_dict().items()}, **projector}, folder/'pytorch_model.bin')
        (folder/'reward_config.yaml').write_text('general_preference_tau: 0.1\nadd_cross_attention: true\nnum_crops: 1\n')
    rm = RewardModel.from_pretrained(folder, base='tiny', device='cpu')
    assert_close(rm(IMAGES, PROMPTS), want, atol=2e-5, rtol=1e-5)
    rm.save_perspective('mine', tmp_path/'again')        # and what was honoured is kept
    assert_close(RewardModel.from_pretrained(tmp_path/'again', base='tiny', device='cpu')(IMAGES, PROMPTS), want, atol=2e-5, rtol=1e-5)
    assert_close(rm.merge()(IMAGES, PROMPTS), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize('layout', ['ours', 'published'])
@pytest.mark.parametrize('change, says', [
    (dict(lora_alpha='gone'), 'lacks lora_alpha'), (dict(r='gone'), 'lacks r'), (dict(r=0), 'rank is 0'), (dict(lora_alpha=None), 'lora_alpha is None'), (dict(lora_dropout=3), 'lora_dropout is 3'),
    (dict(bias='lora_only'), 'bias'), (dict(peft_type='IA3'), 'peft_type'), (dict(init_lora_weights='olora'), 'init_lora_weights'), (dict(modules_to_save=['norm']), 'modules_to_save'),
    (dict(layer_replication=[[0, 2]]), 'layer_replication'), (dict(fan_in_fan_out=True), 'fan_in_fan_out'), (dict(target_parameters=['a']), 'target_parameters'),
    (dict(use_qalora=True), 'use_qalora'), (dict(lora_bias=True), 'lora_bias'), (dict(loftq_config=dict(loftq_bits=4)), 'loftq_config'), (dict(option_of_tomorrow=1), 'option_of_tomorrow'),
    (dict(rank_pattern={'nowhere': 2}), 'nowhere'), (dict(rank_pattern={'(': 2}), 'adapter_config.json'), (dict(rank_pattern=[1]), 'adapter_config.json'), (dict(target_modules=[]), 'no linear layer'),
    (dict(target_modules=['q_proj']), 'all perspectives share'), (dict(target_modules='all-linear'), 'no linear layer'), (dict(target_modules=3), 'adapter_config.json')])
def test_options_that_are_refused(layout, change, says, tmp_path):
    folder = tmp_path/'mine'
    if layout == 'ours': shutil.copytree(MODELS['tiny']/'safety', folder); file = folder/'adapter_config.json'
    else:
        published(spread(fresh().add_perspective('mine', PerspectiveConfig(num_crops=1), lora_rank=2)), folder)
        file = folder/'lora'/'adapter_config.json'
    d = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in d.items() if v != 'gone'}))
    with pytest.raises(CheckpointError, match=says): RewardModel.from_pretrained(folder, base='tiny', device='cpu')


def published(rm, folder):
    "The active perspective as the authors' trainer would have written it."
    tmp = folder.parent/'tmp'
    rm.save_perspective(rm.active, tmp)
    sd, head = load_file(tmp/'adapter_model.safetensors'), load_file(tmp/'head.safetensors')
    (folder/'lora').mkdir(parents=True)
    save_file({k.removeprefix('base_model.model.').replace('language_model.', 'model.'): v for k, v in sd.items() if 'lora_' in k}, folder/'lora'/'adapter_model.safetensors')
    shutil.copy(tmp/'adapter_config.json', folder/'lora')
    torch.save({k.removeprefix('skipca.'): v for k, v in head.items()}, folder/'pytorch_model.bin')
    (folder/'reward_config.yaml').write_text('general_preference_tau: 0.1\nadd_cross_attention: true\nnum_crops: 1\n')


# --- names ---------------------------------------------------------------------------------------------------------------------------

def test_every_component_of_a_path_is_refused():
    "Whatever the base's modules and PEFT's are called, no perspective is."
    rm = fresh().add_perspective('good', lora_rank=2)
    parts = {part for n in rm.backbone.model.state_dict() for part in n.split('.')} - {'good'}
    assert {'mlp', 'layers', '0', 'weight', 'lora_A', 'base_layer', 'modules_to_save'} <= parts
    for name in sorted(parts | set(dir(nn.ModuleDict())) | {'base', 'lora', 'con', 'AUX', 'checkpoint-1', '.', '..', 'lora_x', 'a/b', 'a b', '', 'x'*300, 'v1.', 'Good', 'good', 'image', 'prompt'}):
        with pytest.raises(ValueError, match='not usable|taken'): rm.add_perspective(name, lora_rank=2)
    assert list(rm.configs) == ['good']


def test_what_is_saved_is_whole_whatever_the_names(tmp_path):
    "Names that are parts of other names and of paths: each perspective saves all it has, and loads back alone and with the others."
    names = ['a', 'r', 'e', 'm', 'proj', 'al', 'alignment', 'alignment-2', 'default', 'layer', 'self', 'qkv', 'ward', '赤']
    assert not any(map(name_fault, names))
    rm = fresh()
    for i, n in enumerate(names): rm.add_perspective(n, lora_rank=2+i % 2)
    spread(rm)
    want = rm.embed_all(IMAGES, PROMPTS)
    rm.save_pretrained(tmp_path)
    shutil.copytree(MODELS['tiny']/'base', tmp_path/'base')
    sizes = {len(load_file(tmp_path/n/'adapter_model.safetensors')) for n in names}
    assert len(sizes) == 1                         # the same number of tensors each
    again = RewardModel.from_pretrained(tmp_path, device='cpu').embed_all(IMAGES, PROMPTS)
    for n in names:
        assert_close(again[n], want[n], atol=0, rtol=0)
    alone = RewardModel.from_pretrained(tmp_path/'m', device='cpu')
    assert_close(alone.embed(IMAGES, PROMPTS), want['m'], atol=1e-6, rtol=0)


def test_a_save_that_loses_a_tensor_is_an_error(tmp_path, monkeypatch):
    rm, real = fresh().add_perspective('good', lora_rank=2), RewardModel._tensors
    monkeypatch.setattr(RewardModel, '_tensors', lambda self, name: dict(list(real(self, name).items())[1:]))
    with pytest.raises(CheckpointError, match='tensors of .good. were to be saved'): rm.save_perspective('good', tmp_path/'good')
    assert not (tmp_path/'good').exists()


# --- files ---------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    "Folders of each kind, small, with a function that loads and uses each."
    out = tmp_path_factory.mktemp('kinds')
    rm = spread(fresh().add_perspective('mine', PerspectiveConfig(num_crops=1), lora_rank=2))
    rm.save_perspective('mine', out/'ours')
    published(rm, out/'published')
    shutil.copytree(MODELS['tiny']/'base', out/'base')
    backbone = load_backbone('tiny')
    def use(folder):                               # on a base that is loaded already: only the perspective's files count
        m = RewardModel(backbone_copy(backbone), 'tiny')
        return m.load_perspective(folder, 'mine')
    return dict(ours=(out/'ours', use), published=(out/'published', use), base=(out/'base', load_backbone))


def backbone_copy(b):
    import copy
    return copy.deepcopy(b)


def mutated(data, rng):
    "Cut, bits flipped, bytes replaced, a piece repeated or taken out."
    data, kind = bytearray(data), rng.choice(['cut', 'flip', 'bytes', 'repeat', 'hole', 'digits'])
    at = rng.randrange(len(data))
    if kind == 'cut': return bytes(data[:at])
    if kind == 'flip': data[at] ^= 1 << rng.randrange(8)
    if kind == 'bytes': data[at:at+4] = rng.randbytes(4)
    if kind == 'repeat': data[at:at] = data[max(0, at-20):at]
    if kind == 'hole': del data[at:at+rng.randrange(1, 20)]
    if kind == 'digits':
        digits = [i for i, c in enumerate(data[:5000]) if chr(c).isdigit()]
        if digits: data[rng.choice(digits)] = ord(rng.choice('0123456789-.e'))
    return bytes(data)


@pytest.mark.parametrize('kind, cases', [('ours', 50), ('published', 40), ('base', 40)])
def test_damaged_files_of_every_kind(kinds, kind, cases, tmp_path):
    "Random damage, fixed seed: one clear error, or, where nothing can tell, a model that loads."
    source, use = kinds[kind]
    files = sorted(p.relative_to(source) for p in source.rglob('*') if p.is_file())
    folder, rng, seen = tmp_path/'m', random.Random(0), 0
    shutil.copytree(source, folder)
    for case in range(cases):
        name = files[case % len(files)]
        whole = (source/name).read_bytes()
        bad = mutated(whole, rng)
        (folder/name).write_bytes(bad)
        try: use(folder)
        except (CheckpointError, InputError) as e:
            seen += 1
            assert str(folder) in str(e) or name.name in str(e), e
        else: assert kind != 'ours' or bad == whole or name.name in ('checksums.json', 'README.md'), f'{name}: damage went unnoticed'
        (folder/name).write_bytes(whole)
    assert seen > cases/4
    use(folder)


@pytest.mark.parametrize('data', [b'', b'\x80', b'{', b'[]', b'3', b'null', b'"x"', b'{"a": 1}', b'\xff\xfe{\x00}\x00', b'[' * 50_000])
@pytest.mark.parametrize('kind, name', [('ours', 'adapter_config.json'), ('ours', 'reward_config.json'), ('published', 'lora/adapter_config.json'), ('published', 'reward_config.yaml'),
                                        ('base', 'config.json'), ('base', 'tokenizer.json'), ('base', 'tokenizer_config.json'), ('base', 'preprocessor_config.json')])
def test_settings_that_are_something_else(kinds, kind, name, data, tmp_path):
    source, use = kinds[kind]
    shutil.copytree(source, tmp_path/'m')
    (tmp_path/'m'/name).write_bytes(data)
    harmless = name == 'preprocessor_config.json' and data == b'{"a": 1}' or name == 'reward_config.yaml' and data in (b'{"a": 1}',)
    if harmless: return
    with pytest.raises(CheckpointError, match=Path(name).name.split('.')[0]): use(tmp_path/'m')


@pytest.mark.parametrize('change', [dict(loss='xx'), dict(loss=None), dict(dim='2'), dict(dim=3), dict(tau=-1), dict(tau=None), dict(skipca='yes'), dict(pooling='max'), dict(layer='last'),
                                    dict(layer=77), dict(num_crops=0), dict(num_crops='16'), dict(base=5), dict(fingerprint='x'), dict(fingerprint=[1]), dict(fingerprint=['a']*16), dict(nothing=1)])
def test_wrong_types_in_reward_config(kinds, change, tmp_path):
    source, use = kinds['ours']
    shutil.copytree(source, tmp_path/'m')
    file = tmp_path/'m'/'reward_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError): use(tmp_path/'m')


def test_a_failed_load_leaves_the_model_as_it_was(kinds, tmp_path):
    source, _ = kinds['ours']
    rm = RewardModel.from_pretrained('tiny', ['alignment', 'safety'], device='cpu').set_perspective('alignment')
    want = rm(IMAGES, PROMPTS)
    shutil.copytree(source, tmp_path/'m')
    data = bytearray((tmp_path/'m'/'head.safetensors').read_bytes())
    data[-2] ^= 1
    (tmp_path/'m'/'head.safetensors').write_bytes(data)
    with pytest.raises(CheckpointError, match='checksum'): rm.load_perspective(tmp_path/'m', 'mine')
    assert list(rm.configs) == ['alignment', 'safety'] and rm.active == 'alignment'
    assert_close(rm(IMAGES, PROMPTS), want, atol=1e-6, rtol=0)
    rm.load_perspective(source, 'mine')            # the name is free again
    (tmp_path/'m'/'checksums.json').unlink()       # as the error says: changed on purpose
    rm.load_perspective(tmp_path/'m', 'other')


# --- places --------------------------------------------------------------------------------------------------------------------------

def test_base_is_remembered_as_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODELS['tiny']/'base', 'models/phi')
    shutil.copytree(MODELS['tiny']/'base', 'set/base')
    for base in 'tiny', 'models/phi', './models/phi', 'set', str(tmp_path/'models'/'phi'):
        rm = spread(RewardModel.from_pretrained(base, [] if base == 'tiny' else None, device='cpu').add_perspective('mine', lora_rank=2))
        want = rm(IMAGES, PROMPTS)
        shutil.rmtree('runs', ignore_errors=True)
        rm.save_perspective('mine', 'runs/mine')
        assert json.loads(Path('runs/mine/reward_config.json').read_text())['base'] == base
        assert_close(RewardModel.from_pretrained('runs/mine', device='cpu')(IMAGES, PROMPTS), want, atol=0, rtol=0)
        r = LLaVAReward.from_pretrained('runs/mine', device='cpu')
        assert r.model.base == base
    moved = tmp_path/'elsewhere'
    moved.mkdir()
    shutil.move('models/phi', moved/'phi')
    shutil.move('runs/mine', moved/'mine')
    assert_close(RewardModel.from_pretrained(moved/'mine', device='cpu')(IMAGES, PROMPTS), want, atol=0, rtol=0)
    shutil.move(moved/'phi', tmp_path/'hidden')
    with pytest.raises(CheckpointError, match='there is no such folder; pass base='): RewardModel.from_pretrained(moved/'mine', device='cpu')
    other = load_backbone('tiny')
    with torch.no_grad():
        for n, p in other.model.named_parameters():
            if 'down_proj' in n: p.add_(.01)
    other.save_pretrained(moved/'phi')             # a relative of the base at that place
    with pytest.raises(CheckpointError, match='another base'): RewardModel.from_pretrained(moved/'mine', device='cpu')


@pytest.mark.parametrize('folder, name', [('v1.2', 'v1_2'), ('my reward', 'my_reward'), ('mlp', 'mlp_reward'), ('train', 'train_reward'), ('con', 'con_reward'), ('0', '0_reward'), ('-x', 'x')])
def test_folder_names_become_usable(folder, name, tmp_path, monkeypatch):
    shutil.copytree(MODELS['tiny']/'safety', tmp_path/folder)
    rm = RewardModel.from_pretrained(tmp_path/folder, base='tiny', device='cpu')
    assert list(rm.configs) == [name]
    assert load_reward(str(tmp_path/folder), device='cpu', base='tiny').perspective == name
    monkeypatch.chdir(tmp_path/folder)
    assert list(RewardModel.from_pretrained('.', base='tiny', device='cpu').configs) == [name]


# --- precision, as on a GPU ----------------------------------------------------------------------------------------------------------

def float32_tower(rm):
    "Let the tower of a half-precision base return float32, as it does under CUDA's autocast, where layer norms run in float32."
    return rm.backbone.model.vision_tower.register_forward_hook(lambda m, args, out: setattr(out, 'last_hidden_state', out.last_hidden_state.float()))


@pytest.mark.parametrize('loss', [dict(loss='bt'), dict(loss='gpm', dim=4, gate=True), dict(loss='cls', pooling='mean')])
def test_training_and_scoring_with_float32_features_on_a_bfloat16_base(loss):
    rm = spread(fresh(dtype=torch.bfloat16).add_perspective('mine', PerspectiveConfig(**loss), lora_rank=2))
    want = rm.embed(IMAGES, PROMPTS)
    float32_tower(rm)
    assert_close(rm.embed(IMAGES, PROMPTS), want, atol=.1, rtol=.1)
    batch = rm.train().backbone.encode(IMAGES, PROMPTS)
    with torch.autocast('cpu', torch.bfloat16): out = rm(**batch)
    out.square().sum().backward()
    got = {n: p.grad for n, p in rm.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in got.values()) and any('lora_A' in n and g.abs().sum() > 0 for n, g in got.items())
    assert any('img_projection' in n and g.abs().sum() > 0 for n, g in got.items())
    if loss['loss'] == 'gpm': return
    x = torch.rand(2, 3, 64, 64).requires_grad_()
    for context in (torch.autocast('cpu', enabled=False), torch.autocast('cpu', torch.bfloat16)):
        with context: score = LLaVAReward(rm, 'mine').score_pixels(x, PROMPTS)
        grad, = torch.autograd.grad(score.sum(), x)
        assert score.isfinite().all() and grad.isfinite().all() and grad.abs().sum() > 0


def test_bare_base_and_merged_model_with_float32_features():
    b = load_backbone('tiny', dtype=torch.bfloat16)
    b.model.vision_tower.register_forward_hook(lambda m, args, out: setattr(out, 'last_hidden_state', out.last_hidden_state.float()))
    with torch.no_grad(): assert b(b.encode(IMAGES, PROMPTS))[0].isfinite().all()
    rm = spread(fresh(dtype=torch.bfloat16).add_perspective('mine', lora_rank=2))
    want = rm(IMAGES, PROMPTS)
    rm.merge()
    float32_tower(rm)
    assert_close(rm(IMAGES, PROMPTS), want, atol=.1, rtol=.1)


def test_no_tower_convolves():
    "The patch embedding of every reward with weights is a matrix product: cuDNN would compute a float32 convolution in TF32."
    for name in 'tiny', 'tiny-clip', 'tiny-hpsv2', 'tiny-imagereward', 'tiny-vqascore':
        r = load_reward(name, device='cpu').model
        convs = [m for m in r.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        assert convs and all(isinstance(m, PatchConv2d) for m in convs)


def test_score_pixels_takes_the_tower_in_chunks(monkeypatch):
    monkeypatch.setattr('llava_reward_nb.phi3v.VISION_CHUNK', 2)
    r, seen = load_reward('tiny/alignment', device='cpu', num_crops=4), []
    x = torch.rand(2, 3, 100, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hook = r.model.backbone.model.vision_tower.register_forward_hook(lambda m, args, kw, out: seen.append(len(kw['pixel_values'])), with_kwargs=True)
    score = r.score_pixels(x, 'a star')
    hook.remove()
    assert seen == [2]*5                           # 2 images of 4 tiles and a global view
    monkeypatch.setattr('llava_reward_nb.phi3v.VISION_CHUNK', 32)
    assert_close(score, r.score_pixels(x, 'a star'), atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(score.sum(), x)[0].abs().sum((1, 2, 3)).min() > 0


def test_old_weights_names(tmp_path):
    "The patch embedding keeps its name and shape."
    m = Phi3VModel.from_pretrained(MODELS['tiny']/'base')
    assert any(n.endswith('embeddings.patch_embedding.weight') for n, _ in m.named_parameters())


# --- more members of these kinds ----------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    "A perspective in our layout, and what it says."
    rm = spread(fresh().add_perspective('mine', lora_rank=2))
    return rm.save_perspective('mine', tmp_path/'mine'), rm(IMAGES, PROMPTS)


def load(folder): return RewardModel.from_pretrained(folder, base='tiny', device='cpu')


def rewrite(path, **changes):
    d = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (d | changes).items() if v != 'remove'}))


@pytest.mark.parametrize('name', ['head.safetensors', 'adapter_config.json'])
def test_checksums_cover_every_file(saved, name):
    folder, _ = saved
    rewrite(folder/'checksums.json', **{name: 'remove'})
    with pytest.raises(CheckpointError, match=f'says nothing of {name}'): load(folder)
    (folder/'checksums.json').write_text('{}')
    with pytest.raises(CheckpointError, match='says nothing of adapter_config.json'): load(folder)


@pytest.mark.parametrize('option', ['use_rslora', 'use_dora'])
def test_options_that_are_texts_instead_of_truth_values(saved, option):
    folder, _ = saved
    (folder/'checksums.json').unlink()
    rewrite(folder/'adapter_config.json', **{option: 'false'})
    with pytest.raises(CheckpointError, match=f"{option} is 'false'; needed: true or false"): load(folder)


def test_our_layout_always_has_a_projector(saved):
    folder, _ = saved
    (folder/'checksums.json').unlink()
    path = folder/'adapter_model.safetensors'
    save_file({k: v for k, v in load_file(path).items() if 'img_projection' not in k}, path)
    with pytest.raises(CheckpointError, match='lacks .*img_projection'): load(folder)


def test_weights_of_eight_bits_are_refused(saved):
    folder, _ = saved
    (folder/'checksums.json').unlink()
    path = folder/'head.safetensors'
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match='float8_e4m3fn; needed: 16, 32 or 64 bit'): load(folder)


def test_settings_with_a_byte_order_mark_are_read(saved):
    folder, want = saved
    (folder/'checksums.json').unlink()
    for name in 'adapter_config.json', 'reward_config.json':
        (folder/name).write_bytes(b'\xef\xbb\xbf' + (folder/name).read_bytes())
    assert_close(load(folder)(IMAGES, PROMPTS), want, atol=0, rtol=0)


@pytest.mark.parametrize('name', ['lora', 'my_lora_2', 'encoder', 'k_proj', 'sub_GN', 'embeddings', '赤'*50])
def test_every_folder_name_leads_to_a_usable_name(saved, name, tmp_path):
    folder, want = saved
    folder.rename(tmp_path/name)
    rm = load(tmp_path/name)
    assert_close(rm(IMAGES, PROMPTS), want, atol=0, rtol=0)
    rm.save_pretrained(tmp_path/'again')
    assert_close(load(tmp_path/'again')(IMAGES, PROMPTS), want, atol=0, rtol=0)


def test_every_part_of_a_path_of_the_base_is_known():
    model = fresh().backbone.model
    parts = {part for n, _ in [*model.named_modules(), *model.named_parameters()] for part in n.split('.') if part}
    assert not [n for n in parts if not name_fault(n)]


def test_the_default_dtype_of_torch_does_not_matter(saved):
    folder, want = saved
    rm = load(folder)
    torch.set_default_dtype(torch.float64)
    try: got = rm(IMAGES, PROMPTS)
    finally: torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_perspectives_may_be_one_name_and_must_be_names(saved):
    rm = load(saved[0])
    assert list(rm.embed_all(IMAGES, PROMPTS, 'mine')) == ['mine']
    with pytest.raises(ValueError, match='no perspective'): rm.score(IMAGES, PROMPTS, ['mine'])


# --- model cards ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('perspective', ['safety', 'overall'])
def test_what_a_card_says_to_type_works(perspective, tmp_path):
    "The lines of Python and of the terminal, in the folder that holds the perspective; both kinds of head."
    rm = RewardModel.from_pretrained('tiny', perspective, device='cpu')
    card = (rm.save_perspective(perspective, tmp_path/'my reward')/'README.md').read_text()
    for name, image in zip('ab', IMAGES): image.save(tmp_path/f'{name}.png')
    python, shell = re.findall(r'```(?:python|sh)\n(.*?)```', card, re.S)
    command, *args = shlex.split(shell)
    terminal = f'from llava_reward_nb.commands import {command}; {command}()'
    env = os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(Path(__file__).parents[1]))
    said = [subprocess.run([sys.executable, '-c', code, *a], cwd=tmp_path, env=env, capture_output=True, text=True) for code, a in ((python, []), (terminal, args))]
    assert [p.returncode for p in said] == [0, 0], said[0].stderr+said[1].stderr
    images = [load_image(tmp_path/f'{name}.png') for name in 'ab']
    want = rm.compare(*images, 'a red circle') if perspective == 'overall' else rm(images[0], 'a red circle')
    assert_close(float(re.search(r'\[(.*?)\]', said[0].stdout)[1]), want.item(), atol=1e-3, rtol=1e-3)
    printed = [float(x) for x in re.findall(r'-?\d+\.\d+', said[1].stdout)]
    assert any(abs(x-want.item()) < .02 for x in printed), said[1].stdout


@pytest.mark.parametrize('edit', ['note', 'marker', 'bytes', 'empty', 'lost'])
def test_an_edited_card_is_kept_and_means_nothing_to_loading(saved, edit):
    folder, want = saved
    card, rm = folder/'README.md', load(folder)
    text, identity = card.read_text(), rm.identity
    edits = dict(note=text+'\nTried on cats.\n', marker=re.sub('<!--.*-->', '', text)+'mine', empty='')
    if edit == 'lost': card.unlink()
    else: card.write_bytes(b'\xff\x00' if edit == 'bytes' else edits[edit].encode())
    mine = card.read_bytes() if card.exists() else None
    again = load(folder)
    assert again.identity == identity
    assert_close(again(IMAGES, PROMPTS), want, atol=0, rtol=0)
    again.save_perspective('mine', folder)
    assert again.identity == load(folder).identity == identity
    assert card.read_bytes() == (text.encode() if edit == 'lost' else mine)


def test_a_card_of_ours_follows_the_weights(saved):
    folder, _ = saved
    rm, before = load(folder), (folder/'README.md').read_text()
    rm.configs['mine'].tau = .25
    rm.save_perspective('mine', folder)
    assert '| temperature | 0.1 |' in before and '| temperature | 0.25 |' in (folder/'README.md').read_text()


def test_line_ends_of_windows_are_no_edit(saved):
    folder, _ = saved
    card = folder/'README.md'
    text = card.read_bytes()
    card.write_bytes(text.replace(b'\n', b'\r\n'))
    load(folder).save_perspective('mine', folder)
    assert card.read_bytes() == text


@pytest.mark.parametrize('base', ['owner/name', 'a: b', '- x', '"quoted"', "it's", '#1', 'models/phi', 'C:\\models\\phi', 'no', '模型', None])
def test_front_matter_is_yaml_whatever_the_base(base):
    rm = fresh().add_perspective('mine', PerspectiveConfig(base=base), lora_rank=2)
    card = model_card('mine', replace(rm.config, base=base), rm.peft.peft_config['mine'])
    _, front, text = card.split('---\n', 2)
    front = yaml.safe_load(front)
    assert front.get('base_model') == base and front['library_name'] == 'llava_reward_nb' and 'reward-model' in front['tags']
    assert text.count('\n## ') == 3 and 'not recorded' in text


@pytest.mark.parametrize('name', ['', 'llava-reward:', 'clipscore:', 'hpsv2:', 'aesthetic:', 'imagereward:', 'vqascore:', 'pyes:', 'hpsv3:'])
def test_a_home_that_does_not_exist(name):
    with pytest.raises(ValueError, match='~nobody-has-this-name'): load_reward(f'{name}~nobody-has-this-name/x', device='cpu')
