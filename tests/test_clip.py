"CLIPScore, PickScore, HPSv2 and the aesthetic score against the numbers of the reference code; files that are not as they should be."
import gc, json, shutil, sys, warnings, zlib

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from llava_reward_nb.rewards.clip import *
from llava_reward_nb.core import CheckpointError, InputError, Reward, open_image
from metrics import checkpoints, maker, numbers, same_pixels
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

GOLDEN = numbers('clip')
PROMPTS = GOLDEN['prompts']
NAMES = dict(clipscore='clip', pickscore='pickscore', hpsv2='hpsv2')
CLASSES = dict(clipscore=CLIPScore, pickscore=PickScore, hpsv2=HPSv2)
EMBEDDING = dict(atol=2e-5, rtol=2e-4)
SCORE = dict(clipscore=2e-6, hpsv2=2e-6, pickscore=2e-4) # pickscore: a cosine times 100
sections = pytest.mark.parametrize('section', CLASSES)


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    "Folder of the toy checkpoints; they are the ones the numbers belong to."
    out = tmp_path_factory.mktemp('metrics')
    got = checkpoints(out, 'clip', 'pickscore', 'hpsv2')
    assert got == {k: GOLDEN['about']['checkpoint_crc32'][k] for k in got} and len(got) == 3
    return out


@pytest.fixture(scope='module')
def rewards(toys): return {k: c.from_pretrained(toys/NAMES[k], device='cpu') for k, c in CLASSES.items()}


def image(name): return maker().make_image(*GOLDEN['images'][name])


# ---- golden values

@sections
def test_tokens(rewards, section):
    r = rewards[section]
    for name, want in GOLDEN[section]['tokens'].items():
        text = clean_text(PROMPTS[name]) if r.cleaned else PROMPTS[name]
        ids = token_ids(r.tokenizer, [text], r.context)[0].tolist()
        assert ids == want['ids']+[0]*(77-want['n']), name


def test_special_ids(rewards):
    want, tok = GOLDEN['hpsv2']['special_ids'], rewards['hpsv2'].tokenizer
    assert (tok.bos_token_id, tok.eos_token_id) == (want['start'], want['end'])


@sections
def test_preprocessing(rewards, section):
    r, n = rewards[section], 0
    for name, want in GOLDEN[section]['preprocess'].items():
        if 'points' not in want: continue # not scoreable in the reference
        x, n = r.preprocess([image(name)])[0], n+1
        same_pixels(x, want, 2e-5 if section == 'hpsv2' else 1e-5)
        if 'uint8_crc32' in want:
            im = crop_image(image(name), r.size, r.rule)
            assert zlib.crc32(np.asarray(im).tobytes()) == want['uint8_crc32'], name
        if 'pad_top_bottom_left_right' in want:
            black = normalise(torch.zeros(3, 1, 1))
            t, b, lt, rt = want['pad_top_bottom_left_right']
            inner = x[:, t:x.shape[1]-b, lt:x.shape[2]-rt]
            assert ((x == black).all(0).sum() >= x[0].numel()-inner[0].numel()) and not (inner == black).all()
            for edge in (x[:, :t], x[:, x.shape[1]-b:], x[:, :, :lt], x[:, :, x.shape[2]-rt:]): assert (edge == black).all()
    assert n >= 10


@sections
def test_embeddings(rewards, section):
    r, g = rewards[section], GOLDEN[section]
    for kind, embed in (('image', lambda k: r.embed_images(image(k))), ('text', lambda k: r.embed_prompts([PROMPTS[k]]))):
        for name, want in g[kind].items():
            assert_close(embed(name)[0, :6], torch.tensor(want['normalised_first6']), **EMBEDDING, msg=lambda m: f'{kind} {name}: {m}')


@sections
def test_scores(rewards, section):
    rows = GOLDEN[section]['scores']
    got = rewards[section]([image(w['image']) for w in rows], [PROMPTS[w['prompt']] for w in rows])
    assert_close(got, torch.tensor([w['score'] for w in rows]), atol=SCORE[section], rtol=0)
    alone = torch.cat([rewards[section](image(w['image']), PROMPTS[w['prompt']]) for w in rows])
    assert_close(got, alone, atol=SCORE[section], rtol=0)


@sections
def test_batches(rewards, section):
    for key in ('batch', 'one_prompt_many_images'):
        if key not in GOLDEN[section]: continue
        b = GOLDEN[section][key]
        prompts = [PROMPTS[p] for p in b['prompts']] if 'prompts' in b else PROMPTS[b['prompt']]
        assert_close(rewards[section]([image(i) for i in b['images']], prompts), torch.tensor(b['scores']), atol=SCORE[section], rtol=0)


def test_diversity(rewards):
    b = GOLDEN['clipscore']['batch']
    assert abs(diversity(rewards['clipscore'].embed_images([image(i) for i in b['images']]))-b['diversity']) < 1e-6


def test_preference(rewards):
    g = GOLDEN['pickscore']
    assert abs(rewards['pickscore'].scale().item()-g['logit_scale_exp']) < 1e-3
    p = g['preference']
    got = rewards['pickscore'].preference([image(i) for i in p['images']], PROMPTS[p['prompt']])
    assert_close(got, torch.tensor(p['probabilities']), atol=1e-5, rtol=0)
    for w in g['rgba_image']['scores']: assert abs(rewards['pickscore'](image(w['image']), PROMPTS[w['prompt']]).item()-w['score']) < 2e-5


def test_hpsv2_on_images_the_reference_fails_on(rewards):
    for w in GOLDEN['hpsv2']['derived']: assert abs(rewards['hpsv2'](image(w['image']), PROMPTS[w['prompt']]).item()-w['score']) < 2e-6
    assert abs(rewards['hpsv2'].model.logit_scale.exp().item()-GOLDEN['hpsv2']['logit_scale_exp']) < 1e-3


def test_where_the_processors_of_transformers_differ(rewards):
    other = lambda k: not torch.equal(*(to_floats([crop_image(image(k), 112, rule)]) for rule in ('even', 'down')))
    assert [k for k in GOLDEN['images'] if other(k)] == GOLDEN['clipscore']['images_where_hf_processor_differs']
    tok = rewards['clipscore'].tokenizer
    raw = {k for k, p in PROMPTS.items() if tok(p, truncation=True, max_length=77).input_ids != tok(clean_text(p), truncation=True, max_length=77).input_ids}
    assert raw == GOLDEN['clipscore']['prompts_where_hf_4.45_tokenizer_differs'].keys()


# ---- the same from files, tensors and half precision

def test_paths_and_tensors_give_the_score_of_the_image(rewards, tmp_path):
    names = ['land', 'pal', 'gray', 'alpha']
    for n in names: image(n).save(tmp_path/f'{n}.png')
    for k, r in rewards.items():
        assert isinstance(r, Reward)
        assert_close(r([tmp_path/f'{n}.png' for n in names], 'a dog'), r([image(n) for n in names], 'a dog'), atol=SCORE[k], rtol=0)
        t = torch.from_numpy(np.array(image('land'))).permute(2, 0, 1)/255
        assert_close(r(t, 'a dog'), r(image('land'), 'a dog'), atol=SCORE[k], rtol=0)


@sections
def test_bfloat16(toys, rewards, section):
    half = CLASSES[section].from_pretrained(toys/NAMES[section], device='cpu', dtype=torch.bfloat16)
    a, b = (r([image('sq'), image('wide')], 'a dog') for r in (half, rewards[section]))
    assert a.dtype == torch.float32 and (a-b).abs().max() < .03*rewards[section].scale()
    assert half.model.logit_scale.dtype == torch.float32


@sections
def test_old_and_new_files(toys, tmp_path, rewards, section):
    "A .bin with position numbers, or half precision under `state_dict`, is the same model."
    shutil.copytree(toys/NAMES[section], tmp_path/'old')
    if section == 'hpsv2':
        f = tmp_path/'old'/'HPS_v2.1_compressed.pt'
        sd = torch.load(f, weights_only=True)['state_dict']
        torch.save({'state_dict': {k: v.half() for k, v in sd.items()}, 'epoch': 3}, f)
    else:
        f = tmp_path/'old'/'model.safetensors'
        sd = load_file(f) | {f'{t}_model.embeddings.position_ids': torch.arange(9)[None] for t in ('text', 'vision')}
        torch.save(sd, tmp_path/'old'/'pytorch_model.bin')
        f.unlink()
    old = CLASSES[section].from_pretrained(tmp_path/'old', device='cpu')
    assert_close(old(image('sq'), 'a dog'), rewards[section](image('sq'), 'a dog'), atol=1e-3 if section == 'hpsv2' else SCORE[section], rtol=0)


def test_hpsv2_needs_its_own_version(toys):
    with pytest.raises(CheckpointError, match='HPS_v2_compressed.pt'): HPSv2.from_pretrained(toys/'hpsv2', version='2.0')
    with pytest.raises(ValueError, match='2.0, 2.1'): HPSv2.from_pretrained(toys/'hpsv2', version=2.1)


# ---- gradients

@sections
def test_gradient_is_the_slope(toys, section):
    r = CLASSES[section].from_pretrained(toys/NAMES[section], device='cpu', dtype=torch.float64)
    torch.manual_seed(0)
    x = (.1+.8*torch.rand(2, 3, 40, 50, dtype=torch.float64)).requires_grad_()
    (g,) = torch.autograd.grad(r.score_pixels(x, ['a dog', 'a red cube']).sum(), x)
    assert g.isfinite().all() and (g.flatten(1).norm(dim=1) > 0).all()
    u = .3*torch.randn_like(x)/x[0].numel()**.5
    with torch.no_grad(): a, b = (r.score_pixels(x+s*u, ['a dog', 'a red cube']).sum() for s in (1, -1))
    assert_close(((a-b)/2).item(), (g*u).sum().item(), rtol=2e-2, atol=1e-5)
    assert not any(p.requires_grad for p in r.model.parameters())


@sections
def test_pixels_score_as_images(rewards, section):
    r = rewards[section]
    ims = [image('sq224'), image('sq')]
    got = torch.cat([r.score_pixels(to_floats([im]), 'a dog') for im in ims])
    assert_close(got, r(ims, 'a dog'), atol=2e-2*float(r.scale()), rtol=0)
    if section == 'hpsv2': assert_close(got, r(ims, 'a dog'), atol=1e-6, rtol=0)


# ---- aesthetic score

@pytest.fixture
def aesthetic(toys, tmp_path):
    "Both layouts of one model: LAION's head beside a CLIP, and the hub's whole."
    torch.manual_seed(0)
    head = {f'layers.{k}': v.clone() for k, v in reward_mlp(48).state_dict().items()}
    torch.save(head, tmp_path/'head.pth')
    hub = tmp_path/'hub'
    hub.mkdir()
    clip = load_file(toys/'clip'/'model.safetensors')
    save_file({k: v for k, v in clip.items() if k.startswith('vision_model') or k == 'visual_projection.weight'} | head, hub/'model.safetensors')
    config = json.loads((toys/'clip'/'config.json').read_text())
    (hub/'config.json').write_text(json.dumps(config['vision_config'] | dict(architectures=['AestheticsPredictorV2Linear'])))
    return tmp_path/'head.pth', hub, head


def test_aesthetic_layouts(toys, aesthetic, rewards):
    path, folder, head = aesthetic
    laion = AestheticScore.from_pretrained(path, device='cpu', clip=toys/'clip')
    hub = AestheticScore.from_pretrained(folder, device='cpu')
    def by_hand(v):
        for i in (0, 2, 4, 6, 7): v = v@head[f'layers.{i}.weight'].T+head[f'layers.{i}.bias']
        return v[:, 0]
    ims = [image(k) for k in ('sq', 'land', 'pal')]
    assert_close(laion(ims), by_hand(rewards['clipscore'].embed_images(ims)), atol=1e-6, rtol=0)
    assert_close(hub(ims, 'x')[:1], laion(ims)[:1], atol=1e-6, rtol=0) # a square needs no crop
    assert abs(hub(ims)-laion(ims))[1:].min() > 1e-6
    assert_close(torch.cat([hub(im) for im in ims]), hub(ims, batch_size=2), atol=1e-6, rtol=0)


def test_aesthetic_is_strict(toys, aesthetic):
    path, folder, head = aesthetic
    with pytest.raises(CheckpointError, match='lacks layers'): AestheticScore.from_pretrained(toys/'clip', device='cpu')
    for change, say in ((dict(more=torch.ones(1)), 'unknown tensors more'), ({'layers.7.bias': torch.tensor([torch.inf])}, 'layers.7.bias'),
                        ({'layers.0.weight': torch.ones(1024, 768)}, r'\(1024, 768\)')):
        torch.save(head | change, path)
        with pytest.raises(CheckpointError, match=say): AestheticScore.from_pretrained(path, device='cpu', clip=toys/'clip')


# ---- bad input

def test_files_are_closed(tmp_path):
    "Whatever the mode, one frame or two, whole or not: no file stays open."
    im = image('sq').convert('RGB')
    for mode in ('RGB', 'P', 'L', 'LA', 'RGBA'): im.convert(mode).save(tmp_path/f'{mode}.png')
    im.save(tmp_path/'two.gif', save_all=True, append_images=[im.rotate(90)]); im.save(tmp_path/'a.jpg')
    (tmp_path/'cut.png').write_bytes((tmp_path/'P.png').read_bytes()[:-99])
    gc.collect() # what other tests have left open is not counted
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always', ResourceWarning)
        modes = {f.name: open_image(f).mode for f in tmp_path.iterdir() if f.name != 'cut.png'}
        with pytest.raises(InputError, match='damaged'): open_image(tmp_path/'cut.png')
        gc.collect()
    assert not [w for w in said if issubclass(w.category, ResourceWarning) and str(tmp_path) in str(w.message)]
    assert {n: m for n, m in modes.items() if n.endswith('png')} == {f'{m}.png': m for m in ('RGB', 'P', 'L', 'LA', 'RGBA')}


@sections
def test_bad_input(rewards, section):
    r, ok = rewards[section], image('tiny')
    for images, prompts, say in (([], 'a', 'no images'), ([ok, 'none.png'], 'a', 'none.png: no such file'), ([ok, None], 'a', 'image 1'),
                                 ([ok], ['a', 'b'], '2 prompts for 1'), (ok, 3, 'pass a string'), (ok, [None], 'prompt 0'),
                                 (ok, 'a \ud800', 'not valid Unicode')):
        with pytest.raises(InputError, match=say): r(images, prompts)
    with pytest.raises(InputError, match='needed: float tensor'): r.score_pixels(torch.zeros(3, 8, 8), 'a')


@sections
@pytest.mark.parametrize('fault', ['missing', 'extra', 'shape', 'nan', 'cut', 'gone', 'pickle'])
def test_bad_checkpoints(toys, tmp_path, section, fault):
    shutil.copytree(toys/NAMES[section], tmp_path/'bad')
    hps = section == 'hpsv2'
    f = tmp_path/'bad'/('HPS_v2.1_compressed.pt' if hps else 'model.safetensors')
    sd = torch.load(f, weights_only=True)['state_dict'] if hps else load_file(f)
    name = 'visual.ln_post.weight' if hps else 'vision_model.post_layernorm.weight'
    say = 'post_layernorm.weight'
    if fault == 'missing': del sd[name]
    if fault == 'extra': sd['surplus'], say = torch.ones(1), 'surplus'
    if fault == 'shape': sd[name] = sd[name][1:].clone()
    if fault == 'nan': sd[name][3] = torch.nan
    if hps: torch.save({'state_dict': sd}, f)
    else: save_file(sd, f)
    if fault == 'cut': f.write_bytes(f.read_bytes()[:5000]); say = 'cannot be read'
    if fault == 'gone': f.unlink(); say = 'holds no'
    if fault == 'pickle':
        f.unlink()
        torch.save({'state_dict': print} if hps else {'a': print}, f if hps else f.with_name('pytorch_model.bin'))
        say = 'cannot be read'
    with pytest.raises(CheckpointError, match=say): CLASSES[section].from_pretrained(tmp_path/'bad', device='cpu')


def test_tokenizer_of_another_model(toys, tmp_path):
    clip_tokenizer(['a', 'dog']).save_pretrained(tmp_path/'tok')
    with pytest.raises(CheckpointError, match='the tokenizer has'): CLIPScore.from_pretrained(toys/'clip', device='cpu', tokenizer=tmp_path/'tok')


def test_offline_error_says_what_is_needed(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    for c, need in ((CLIPScore, 'config.json'), (PickScore, 'config.json'), (HPSv2, 'HPS_v2.1_compressed.pt'), (AestheticScore, 'config.json')):
        with pytest.raises(CheckpointError, match=f'cannot be fetched(.|\n)*pass a local copy: a folder that holds {need}'): c.from_pretrained(f'nobody-at-all/{c.name}')


@pytest.mark.parametrize('section', ['pickscore', 'hpsv2'])
def test_tokenizer_of_the_ancestor_where_there_is_none(toys, tmp_path, monkeypatch, section):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    shutil.copytree(toys/NAMES[section], tmp_path/'bare', ignore=shutil.ignore_patterns('tokenizer*', 'vocab*', 'merges*'))
    with pytest.raises(CheckpointError, match='^laion/CLIP-ViT-H-14-laion2B-s32B-b79K: cannot be fetched(.|\n)*tokenizer.json or vocab.json'):
        CLASSES[section].from_pretrained(tmp_path/'bare', device='cpu')
    again = CLASSES[section].from_pretrained(tmp_path/'bare', device='cpu', tokenizer=toys/'clip')
    assert len(again.tokenizer) == again.model.config.text_config.vocab_size


def test_saved_folder_is_read_by_transformers(rewards, toys, tmp_path):
    from transformers import CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    rewards['pickscore'].save_pretrained(tmp_path/'saved')
    model, processor = CLIPModel.from_pretrained(tmp_path/'saved'), CLIPImageProcessorPil.from_pretrained(tmp_path/'saved')
    for k, v in load_file(toys/'pickscore'/'model.safetensors').items(): assert_close(model.state_dict()[k], v, atol=0, rtol=0)
    x = torch.tensor(np.array(processor([image('land'), image('pal')]).pixel_values))
    assert_close(rewards['pickscore'].preprocess([image('land'), image('pal')]), x)
    again = PickScore.from_pretrained(tmp_path/'saved', device='cpu')
    assert_close(again(image('sq'), PROMPTS['curly']), rewards['pickscore'](image('sq'), PROMPTS['curly']), atol=2e-5, rtol=0)


# ---- text

@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=40))
def test_cleaning_without_ftfy_is_cleaning_with_it(s):
    import ftfy, html, re
    assert clean_text(s) == re.sub(r'\s+', ' ', html.unescape(html.unescape(ftfy.fix_text(s)))).strip().lower()


def test_import_without_ftfy(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ftfy', None)
    assert clean_text('A dog') == 'a dog'
    with pytest.raises(ImportError, match='`pip install ftfy`'): clean_text('naïve')


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec='utf-8'), max_size=60))
def test_small_tokenizer_reads_everything(s):
    tok = clip_tokenizer(['a', 'red', 'circle', 'photo'])
    ids = token_ids(tok, [s], 77)[0].tolist()
    assert ids[0] == tok.bos_token_id and tok.eos_token_id in ids and set(ids[ids.index(tok.eos_token_id)+1:]) <= {0, tok.eos_token_id}


def test_small_tokenizer_knows_its_words():
    words = ['three', 'red', 'green', 'tree', 'circles', 'circle', 'a', 'left']
    tok = clip_tokenizer(words)
    for w in words: assert len(tok(w).input_ids) == 3, w
    assert len(tok(' '.join(words)).input_ids) == len(words)+2
