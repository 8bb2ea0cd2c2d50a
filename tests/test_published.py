"""Published adapters of the three backbones, in spellings of three ages, against an independent computation: the same update added to
the base's own files, SkipCA by hand."""
import json, shutil
from dataclasses import dataclass
from pathlib import Path

import families, pytest, torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

import llava_reward_nb
from llava_reward_nb.core import CheckpointError
from llava_reward_nb.generic import load_backbone
from llava_reward_nb.layouts import PROJECTORS, origin_of
from llava_reward_nb.model import RewardModel, saved_config
from llava_reward_nb.published import convert
from llava_reward_nb.weights import read_json, read_tensors, weight_files

RANK, ALPHA = 2, 6
IMAGES = [Image.linear_gradient('L').resize(size).convert('RGB') for size in ((70, 40), (30, 90), (64, 64))]
PROMPTS = ['a red circle', '', 'a photo of two stars']
TINY = Path(llava_reward_nb.__file__).parent/'bundle'/'base'


@dataclass
class Kind:
    "A backbone of the paper; names are those of its published base files, which the authors' adapters use too."
    decoder: str    # before `layers`
    projector: str  # path of the projector
    targets: list   # linear layers that get LoRA
    new: dict       # how today's transformers begins these names


ATTENTION = [f'self_attn.{x}_proj' for x in 'qkvo']
MLP = [f'mlp.{x}_proj' for x in ('gate', 'up', 'down')]
KINDS = dict(
    phi3_v=Kind('model', 'model.vision_embed_tokens.img_projection', ['self_attn.qkv_proj', 'self_attn.o_proj', 'mlp.gate_up_proj', 'mlp.down_proj'],
                {'model.layers': 'model.language_model.layers', 'model.vision_embed_tokens.img_projection': 'model.img_projection'}),
    qwen2_5_vl=Kind('model', 'visual.merger', ATTENTION+MLP, {'model.layers': 'model.language_model.layers', 'visual.merger': 'model.visual.merger'}),
    llava_next=Kind('language_model.model', 'multi_modal_projector', ATTENTION+MLP,
                    {'language_model.model.layers': 'model.language_model.layers', 'multi_modal_projector': 'model.multi_modal_projector'}))
SPELLINGS = dict(published=lambda kind, name: name,
                 peft=lambda kind, name: 'base_model.model.'+named(name),
                 today=lambda kind, name: renewed(kind, name),
                 wrapped=lambda kind, name: 'module.base_model.model.'+named(renewed(kind, name)))


def named(name): return name.replace('.lora_A.', '.lora_A.default.').replace('.lora_B.', '.lora_B.default.')


def renewed(kind, name):
    "A name as today's transformers writes it."
    for old, new in kind.new.items():
        if name.startswith(old): return new+name.removeprefix(old)
    return name


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "Function from a model type to the folder of a tiny base."
    made = {'phi3_v': TINY}
    def base(kind):
        if kind not in made: made[kind] = families.FAMILIES[kind](tmp_path_factory.mktemp(kind))
        return made[kind]
    return base


def tensors_of(folder): return {name: tensor.float() for file in weight_files(folder) for name, tensor in read_tensors(file)}


def random_tensors(kind, base, dim=1, skipca=True):
    "LoRA, and head with projector, of a published checkpoint; names as the authors write them."
    torch.manual_seed(3)
    stored = tensors_of(base)
    lora, rest = {}, {}
    for name, weight in stored.items():
        if name.startswith(f'{kind.decoder}.layers.') and any(name.endswith(f'.{t}.weight') for t in kind.targets):
            out, width = weight.shape
            stem = name.removesuffix('.weight')
            lora |= {f'{stem}.lora_A.weight': .3*torch.randn(RANK, width), f'{stem}.lora_B.weight': .1*torch.randn(out, RANK)}
        if name.startswith(f'{kind.projector}.'): rest[name] = weight+.05*torch.randn_like(weight)
    width = len(stored[f'{kind.decoder}.norm.weight'])
    rest['value_head.weight'] = torch.randn(dim, width)
    if skipca:
        for name in 'W_q', 'W_k', 'W_v': rest[f'{name}.weight'] = torch.randn(width, width)/width**.5
        rest['ca_layernorm.weight'] = 1+.1*torch.randn(width)
    assert len(lora) >= 8 and len(rest) >= 5
    return lora, rest


def write(folder, kind, lora, rest, spelling='published', safe=False, **config):
    "A folder in the authors' layout."
    spell = lambda tensors: {SPELLINGS[spelling](kind, name): tensor for name, tensor in tensors.items()}
    (folder/'lora').mkdir(parents=True)
    if safe:
        save_file(spell(lora), folder/'lora'/'adapter_model.safetensors')
        save_file(spell(rest), folder/'model.safetensors')
    else:
        torch.save(spell(lora), folder/'lora'/'adapter_model.bin')
        torch.save(spell(rest), folder/'pytorch_model.bin')
    targets = sorted({SPELLINGS[spelling](kind, name).split('.lora_')[0].removeprefix('module.').removeprefix('base_model.model.') for name in lora})
    options = dict(peft_type='LORA', r=RANK, lora_alpha=ALPHA, lora_dropout=.05, bias='none', target_modules=targets, init_lora_weights='gaussian')
    (folder/'lora'/'adapter_config.json').write_text(json.dumps(options))
    settings = dict(general_preference_tau=.1, value_head_dim=1, add_cross_attention=True, is_general_preference=False) | config
    (folder/'reward_config.yaml').write_text('\n'.join(f'{k}: {json.dumps(v)}' for k, v in settings.items()))
    return folder


def merged(base, kind, lora, rest, folder):
    "The base with the update in its own files."
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns('*.safetensors*', '*.bin*'))
    tensors = {name: tensor.clone() for name, tensor in tensors_of(base).items()}
    for name, weight in tensors.items():
        stem = name.removesuffix('.weight')
        if f'{stem}.lora_A.weight' in lora: weight += ALPHA/RANK*lora[f'{stem}.lora_B.weight']@lora[f'{stem}.lora_A.weight']
        if name in rest: weight.copy_(rest[name])
    save_file(tensors, folder/'model.safetensors', metadata={'format': 'pt'})
    images = json.loads((folder/'preprocessor_config.json').read_text())
    if 'min_pixels' in images: images |= dict(min_pixels=256*28*28, max_pixels=1280*28*28)  # of the authors' scripts
    (folder/'preprocessor_config.json').write_text(json.dumps(images))
    return folder


def crops(base):
    "One crop, where the base asks for a number of them."
    return 1 if read_json(base/'config.json')['model_type'] == 'phi3_v' else None


def rewards_by_hand(folder, head, skipca=True):
    "The value head on h, or on RMSNorm(h + softmax(q k / sqrt d) v), of each row alone (paper, section 3.1)."
    b = load_backbone(folder, num_crops=crops(folder))
    rewards = []
    with torch.no_grad():
        for image, prompt in zip(IMAGES, PROMPTS):
            r = b(b.encode([image], [prompt]))
            h, visual = r.states[0], r.visual[0][r.mask[0]]
            if skipca:
                q, k, v = head['W_q.weight']@h, visual@head['W_k.weight'].T, visual@head['W_v.weight'].T
                x = h+torch.softmax(k@q/len(h)**.5, 0)@v
                h = x*torch.rsqrt((x*x).mean()+b.eps)*head['ca_layernorm.weight']
            rewards.append(head['value_head.weight']@h)
    return torch.cat(rewards)


@pytest.mark.parametrize('name', KINDS)
def test_rewards_of_published_adapters(base, tmp_path, name):
    "All spellings, both file formats, give the rewards of an independent computation, and so does the converted folder."
    kind = KINDS[name]
    lora, rest = random_tensors(kind, base(name))
    want = rewards_by_hand(merged(base(name), kind, lora, rest, tmp_path/'merged'), rest)
    model = None
    for i, spelling in enumerate(SPELLINGS):
        folder = write(tmp_path/spelling, kind, lora, rest, spelling, safe=i % 2 == 1)
        if model is None: model = RewardModel.from_pretrained(folder, base=base(name), num_crops=crops(base(name)), device='cpu', dtype=torch.float32)
        else: model.load_perspective(folder)
        got = model(IMAGES, PROMPTS, spelling)
        assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert model.configs['published'].loss == 'bt' and origin_of(tmp_path/'published').projector in model.backbone.projectors[0]
    assert (want-want.mean()).abs().max() > .1

    ours, = convert(tmp_path/'published', tmp_path/'ours', base(name), overrides=dict(num_crops=1) if name == 'phi3_v' else None)
    again = RewardModel.from_pretrained(ours, base=base(name), device='cpu', dtype=torch.float32)
    assert_close(again(IMAGES, PROMPTS), model(IMAGES, PROMPTS, 'published'), atol=1e-6, rtol=1e-6)
    assert saved_config(ours).num_crops == (1 if name == 'phi3_v' else None)
    card = (ours/'README.md').read_text()
    assert ('crops' in card) == (name == 'phi3_v') and 'converted from | published' in card


def test_general_preference_without_skipca(base, tmp_path):
    kind = KINDS['qwen2_5_vl']
    lora, rest = random_tensors(kind, base('qwen2_5_vl'), dim=2, skipca=False)
    want = rewards_by_hand(merged(base('qwen2_5_vl'), kind, lora, rest, tmp_path/'merged'), rest, skipca=False).view(-1, 2)
    folder = write(tmp_path/'gpm', kind, lora, rest, is_general_preference=True, value_head_dim=2, add_cross_attention=False)
    model = RewardModel.from_pretrained(folder, base=base('qwen2_5_vl'), device='cpu', dtype=torch.float32)
    assert_close(model.embed(IMAGES, PROMPTS), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('name', KINDS)
def test_each_tensor_is_needed_and_used(base, tmp_path, name):
    kind = KINDS[name]
    lora, rest = random_tensors(kind, base(name))
    model = RewardModel.from_pretrained(base(name), [], device='cpu', dtype=torch.float32)
    projector = next(n for n in rest if n.startswith(kind.projector))
    some = next(iter(lora))
    without = lambda tensors, name: {n: t for n, t in tensors.items() if n != name}
    spare = f'{kind.decoder}.layers.0.self_attn.spare.lora_A.weight'
    tower = 'vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight'
    cases = [(without(lora, some), rest, f"lacks layers.{some.split('layers.')[1]}"), (lora, without(rest, 'W_k.weight'), 'lacks W_k.weight'),
             (lora, without(rest, 'value_head.weight'), 'lacks value_head.weight'), (lora, without(rest, projector), f"lacks {kind.projector.split('.')[-1]}."),
             (lora | {spare: lora[some]}, rest, f'nothing here takes: {spare}'), (lora | {tower: lora[some]}, rest, f'nothing here takes: {tower}'),
             (lora, rest | {'other.weight': lora[some]}, 'nothing here takes: other.weight'), (lora, rest | {'x.value_head.weight': rest['value_head.weight']}, 'several names'),
             (lora | {some: lora[some]*torch.nan}, rest, 'holds NaN'), (lora | {some: lora[some][:, 1:]}, rest, 'this base needs')]
    for i, (first, second, why) in enumerate(cases):
        folder = write(tmp_path/f'x{i}', kind, first, second)
        with pytest.raises(CheckpointError) as e: model.load_perspective(folder, f'x{i}')
        assert why in str(e.value) and str(folder) in str(e.value), (why, str(e.value))
        assert not model.configs
    frozen = {n: t for n, t in rest.items() if not n.startswith(kind.projector)}
    model.load_perspective(write(tmp_path/'frozen', kind, lora, frozen))
    assert list(model.configs) == ['frozen']


def test_an_adapter_on_another_base(base, tmp_path):
    "The error tells what it was made for, what the base is, and what to pass."
    folders = {name: write(tmp_path/name, kind, *random_tensors(kind, base(name))) for name, kind in KINDS.items()}
    model = RewardModel.from_pretrained(base('qwen2_5_vl'), [], device='cpu', dtype=torch.float32)
    for name, size in dict(phi3_v=192, llava_next=32).items():
        with pytest.raises(CheckpointError) as e: model.load_perspective(folders[name])
        projector = KINDS[name].projector.split('.')[-1]
        for part in (f'hidden size {size}', f'like {PROJECTORS[projector]}', 'qwen2_5_vl', "has hidden size 32, and the projector 'merger'", 'as base='): assert part in str(e.value), str(e.value)
    wide = families.qwen(tmp_path/'wide', seed=1)
    config = json.loads((wide/'config.json').read_text())
    assert config['model_type'] == 'qwen2_5_vl'
    other = RewardModel.from_pretrained(wide, [], device='cpu', dtype=torch.float32)
    model.add_perspective('mine', lora_rank=2).save_perspective('mine', tmp_path/'mine')
    with pytest.raises(CheckpointError, match='was trained on another base, .*qwen2_5_vl.*; the one here, .*wide.* has other weights'): other.load_perspective(tmp_path/'mine')
    with pytest.raises(CheckpointError) as e: RewardModel.from_pretrained(folders['llava_next'], device='cpu')
    assert 'does not say which base it belongs to' in str(e.value) and "like llava-hf/llava-v1.6-vicuna-13b-hf" in str(e.value)


def test_nested_folders_as_in_the_authors_readme(base, tmp_path):
    kind = KINDS['phi3_v']
    lora, rest = random_tensors(kind, base('phi3_v'))
    for task in 'alignment', 'safety': write(tmp_path/task/f'llavareward_phi_{task}', kind, lora, rest)
    model = RewardModel.from_pretrained(tmp_path, base=base('phi3_v'), num_crops=1, device='cpu')
    assert list(model.configs) == ['llavareward_phi_alignment', 'llavareward_phi_safety']
    one = RewardModel.from_pretrained(tmp_path/'alignment'/'llavareward_phi_alignment', base=base('phi3_v'), num_crops=1, device='cpu')
    assert_close(one(IMAGES, PROMPTS), model(IMAGES, PROMPTS, 'llavareward_phi_alignment'))
