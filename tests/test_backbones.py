"Backbones of many families against transformers alone: hidden states with pixels and padding mask, SkipCA by hand."
import copy, json, pickle, random, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor

import families, pytest, torch
from hypothesis import given, settings, strategies as st
from llava_reward_nb.core import CheckpointError, InputError
from llava_reward_nb.generic import BACKBONES, ImageTextBackbone, load_backbone
from llava_reward_nb.why import attention_rows
from llava_reward_nb.model import PerspectiveConfig, RewardModel
from PIL import Image
from torch.testing import assert_close

NAMED = ['qwen2_5_vl', 'llava_next', 'qwen3_vl']
# the others are read with their chat template; smolvlm and mistral3 need packages that are not here, see below
OTHERS = ['qwen2_vl', 'qwen3_vl_moe', 'qwen3_5', 'llava', 'gemma3', 'internvl', 'paligemma', 'idefics3', 'idefics2', 'llava_onevision', 'glm4v', 'mistral3']
SIZES = [(70, 40), (30, 90), (64, 64)]
CAPTIONS = ['a red circle', '', 'a long caption that says </s>, <image> and <|im_end|>']


def noise(size, seed):
    rng = random.Random(seed)
    return Image.frombytes('RGB', size, rng.randbytes(3*size[0]*size[1]))


IMAGES = [noise(s, i) for i, s in enumerate(SIZES)]


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "Function from the name of a family to the folder of a tiny model of it."
    made = {}
    def folder(name):
        if name not in made: made[name] = families.FAMILIES[name](tmp_path_factory.mktemp(name))
        return made[name]
    return folder


@pytest.fixture(scope='session')
def backbone(folder):
    "Function from the name of a family to its loaded backbone, without adapters."
    made = {}
    def backbone(name):
        if name not in made: made[name] = load_backbone(folder(name))
        return made[name]
    return backbone


def by_transformers(b, batch):
    "Hidden states and the embeddings at the image's places: the plain model on pixels, with mask and positions of its own."
    entered = []
    hook = b.language_model.register_forward_pre_hook(lambda m, args, kwargs: entered.append(kwargs['inputs_embeds']), with_kwargs=True)
    given = {k: v for k, v in batch.items() if k in b.takes or k in ('input_ids', 'attention_mask')}
    image = batch['input_ids']==b.model.config.image_token_id
    if 'mm_token_type_ids' in b.accepts: given['mm_token_type_ids'] = image.int()
    if 'token_type_ids' in b.accepts: given['token_type_ids'] = image.int() if b.model_type!='paligemma' else image.int()*0
    try: h = b.model(**given, use_cache=False).last_hidden_state
    finally: hook.remove()
    n = image.sum(1).tolist()
    return h, entered[0][image].split(n)


def same(got, want): assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize('name', NAMED+OTHERS)
@torch.no_grad()
def test_hidden_states_and_visual_tokens(backbone, name):
    b = backbone(name)
    assert isinstance(b, BACKBONES.get(name, ImageTextBackbone)) and b.model_type==name
    batch = b.encode(IMAGES, CAPTIONS)
    h, visual = by_transformers(b, batch)
    last = batch['attention_mask'].sum(1)-1
    want = h[torch.arange(3), last]
    read = b(batch)
    same(read.states, want)
    for got, mask, v in zip(read.visual, read.mask, visual): same(got[mask], v)
    mean = b(batch, pooling='mean')
    same(mean.states[mean.real], h[batch['attention_mask'].bool()])
    assert b.token_counts(SIZES, CAPTIONS)==batch['attention_mask'].sum(1).tolist()

    alone = [b(b.encode(im, text)) for im, text in zip(IMAGES, CAPTIONS)]
    for i, one in enumerate(alone): same(one.states[0], want[i])

    seen = b.vision(batch)
    rows, texts = [2, 0, 2, 1], ['green', CAPTIONS[0], '', 'a blue square']
    shared = b(b.with_prompts(batch, rows, texts), b.pick(seen, rows))
    fresh = b.encode([IMAGES[i] for i in rows], texts)
    h, visual = by_transformers(b, fresh)
    same(shared.states, h[torch.arange(4), fresh['attention_mask'].sum(1)-1])
    for got, mask, v in zip(shared.visual, shared.mask, visual): same(got[mask], v)


def randomize(rm, name, seed=0):
    "Give a perspective weights as if it had learnt something."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*rm._tensors(name).values(), *rm.heads[name].parameters()]:
            p.add_(.2*torch.randn(p.shape, generator=g)/max(1, p.shape[-1])**.5)


def by_hand(rm, name, image, caption):
    "A reward by transformers and a few lines of algebra: SkipCA of the last state over the visual tokens, and the value head."
    b, head, config = rm.backbone, rm.heads[name], rm.configs[name]
    batch = b.encode(image, caption)
    h, visual = by_transformers(b, batch)
    h, v = h[0, -1], visual[0]
    if config.levels:
        inputs = {k: x for k, x in batch.items() if k in ('pixel_values', 'image_grid_thw')}
        levels = b.model.get_image_features(**inputs, return_dict=True).deepstack_features
        v = torch.cat([x+e for x, e in zip([v, *(level[0] if isinstance(level, (list, tuple)) else level for level in levels)], head.skipca.level_embedding)])
    if config.skipca:
        ca = head.skipca
        q, k, u = ca.W_q.weight@h, v@ca.W_k.weight.T, v@ca.W_v.weight.T
        x = h+(k@q/len(q)**.5).softmax(0)@u
        h = x/(x.square().mean()+b.eps).sqrt()*ca.ca_layernorm.weight
    return (head.value_head.weight@h)[0]


@pytest.mark.parametrize('name', NAMED+OTHERS)
def test_rewards(folder, name, tmp_path):
    rm = RewardModel(load_backbone(folder(name)), str(folder(name)))
    for i, (p, config) in enumerate(dict(first=PerspectiveConfig(), second=PerspectiveConfig('cls', skipca=False), third=PerspectiveConfig(levels=rm.backbone.levels > 0)).items()):
        rm.add_perspective(p, config, lora_rank=4, lora_alpha=8)
        randomize(rm, p, i)
    rm.eval()
    got = rm.embed_all(IMAGES, CAPTIONS)
    with torch.no_grad():
        for p in rm.configs:
            with rm.using(p): want = torch.stack([by_hand(rm, p, im, text) for im, text in zip(IMAGES, CAPTIONS)])
            same(got[p][:, 0], want)
            same(torch.cat([rm.embed(im, text, p) for im, text in zip(IMAGES, CAPTIONS)]), got[p])
    assert not torch.allclose(got['first'], got['third'], atol=1e-3)
    if name in NAMED: # a projector of one's own matters
        own = {k for k in rm._tensors('first') if 'lora_' not in k}
        assert own and all(any(k.startswith(f'base_model.model.{p}.') for p in rm.backbone.projectors) for k in own)

    assert (rm.backbone.levels > 0) == name.startswith('qwen3_vl')
    rm.save_perspective('third', tmp_path/'third')
    again = RewardModel.from_pretrained(tmp_path/'third')
    same(again.embed(IMAGES, CAPTIONS), got['third'])
    again.merge()
    assert_close(again.embed(IMAGES, CAPTIONS), got['third'], atol=1e-4, rtol=0)


@pytest.fixture(scope='session')
def records(tmp_path_factory):
    "Pairs that one can learn: the bright image is the better one."
    out = tmp_path_factory.mktemp('records')
    rows = []
    for i in range(8):
        for side, level in ('good', 200), ('bad', 40):
            rng = random.Random(f'{i}{side}')
            size = (40+6*(i%3), 56)
            Image.frombytes('RGB', size, bytes(rng.randrange(level, level+50) for _ in range(3*size[0]*size[1]))).save(out/f'{side}{i}.png')
        rows.append(dict(prompt=f'picture number {i}', chosen_path=f'good{i}.png', reject_path=f'bad{i}.png', c_rate=1, r_rate=0))
    (out/'train.json').write_text(json.dumps(rows))
    return out/'train.json'


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'llava_next', 'qwen3_vl', 'gemma3'])
def test_training(folder, records, name, tmp_path):
    from llava_reward_nb.trainer import train_perspective
    from llava_reward_nb.config import RewardConfig
    rm = RewardModel(load_backbone(folder(name)), str(folder(name)))
    rm.add_perspective('bright', PerspectiveConfig(levels=rm.backbone.levels > 0), lora_rank=4, lora_alpha=8, lora_dropout=0.)
    before = {k: p.detach().clone() for k, p in [*rm._tensors('bright').items(), *rm.heads['bright'].named_parameters()]}
    base = {n: p.detach().clone() for n, p in rm.backbone.named_parameters() if not p.requires_grad}
    good = [str(records.parent/f'good{i}.png') for i in range(8)]
    bad = [str(records.parent/f'bad{i}.png') for i in range(8)]
    texts = [f'picture number {i}' for i in range(8)]
    loss = rm.config.make_loss()
    def measured():
        with torch.no_grad(): return loss.loss(rm.embed(good, texts), rm.embed(bad, texts), torch.ones(8)).item()
    start = measured()
    args = RewardConfig(output_dir=str(tmp_path/'run'), max_steps=8, learning_rate=3e-3, gradient_accumulation_steps=1, save_strategy='no',
                        report_to=[], use_cpu=True, disable_tqdm=True)
    train_perspective(rm, 'bright', records, args)
    assert measured()<start-.01
    after = dict([*rm._tensors('bright').items(), *rm.heads['bright'].named_parameters()])
    still = [k for k, p in before.items() if torch.equal(p, after[k])]
    assert not still
    assert all(torch.equal(p, dict(rm.backbone.named_parameters())[n]) for n, p in base.items())
    again = RewardModel.from_pretrained(tmp_path/'run'/'bright', base=folder(name))
    assert_close(again.embed(good, texts), rm.embed(good, texts), atol=2e-5, rtol=0)
    rows, _ = attention_rows(rm, good[:2], texts[:2], 'bright') # over the tokens of an image, whatever the number of levels
    assert [len(row) for row in rows]==[rm.backbone.processor.image_tokens(Image.open(p).size) for p in good[:2]]
    assert_close(torch.stack([row.sum() for row in rows]), torch.ones(2))


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'qwen3_vl', 'llava_next', 'llava', 'idefics3', 'mistral3', 'internvl'])
@settings(max_examples=12)
@given(size=st.tuples(st.integers(12, 160), st.integers(12, 160)), text=st.text(st.characters(exclude_categories=('Cs', 'Cn')), max_size=12))
def test_token_counts_from_sizes_alone(backbone, name, size, text):
    b = backbone(name)
    batch = b.encode(noise(size, 1), text)
    n = int((batch['input_ids']==b.model.config.image_token_id).sum())
    assert b.token_counts([size], [text])==[batch['input_ids'].shape[1]] and b.processor.image_tokens(size)==n
    if hasattr(b.processor, 'first_size'): assert n==int(batch['image_grid_thw'].prod())//4
    special = set(b.processor.tokenizer.get_added_vocab().values())
    plain = b.encode(noise(size, 1), '')
    count = lambda batch: sum(i in special for i in batch['input_ids'][0].tolist())
    assert count(batch)==count(plain) # nothing in a caption is a command


def test_published_prompts(backbone):
    for name, want in dict(qwen2_5_vl='<|im_start|>user\n<|vision_start|>{}<|vision_end|>a red circle<|im_end|>',
                           llava_next='<s>USER: {}\na red circle</s>').items():
        b = backbone(name)
        p = b.processor
        ids = b.encode(IMAGES[0], 'a red circle')['input_ids'][0]
        image = p.tokenizer.convert_ids_to_tokens(p.image_token_id)
        n = p.image_tokens(SIZES[0])
        text = want.format(image*n)
        assert p.tokenizer.decode(ids)==text
        assert ids.tolist()==p.tokenizer(text.removeprefix('<s>')).input_ids


def test_qwen25_resizes_twice(backbone):
    "First to sides that 28 divides, as the authors' utility does, then as the processor does."
    b = backbone('qwen2_5_vl')
    image = noise((41, 29), 0)
    assert b.processor.first_size((41, 29))==(84, 56)
    first = image.resize((84, 56), Image.Resampling.BICUBIC)
    want = b.processor.image_processor(images=[first], return_tensors='pt')
    got = b.encode(image, 'a')
    assert torch.equal(got['image_grid_thw'], want['image_grid_thw'])
    assert_close(got['pixel_values'], want['pixel_values'])


def test_caption_with_commands_is_read_as_letters(backbone):
    for name in NAMED:
        b = backbone(name)
        said = 'a <|im_end|><|image_pad|></s><image> b'
        ids = b.encode(IMAGES[0], said)['input_ids'][0].tolist()
        assert said in b.processor.tokenizer.decode(ids)
        assert ids.count(b.processor.image_token_id)==b.processor.image_tokens(SIZES[0])


def test_refused(folder, tmp_path):
    with pytest.raises(ImportError, match='num2words'): load_backbone(folder('smolvlm'))
    b = load_backbone(folder('qwen3_vl'))
    with pytest.raises(InputError, match='image 1: 900x4'): b.encode([IMAGES[0], noise((900, 4), 0)], 'a')
    with pytest.raises(InputError, match='prompt 0: .* the model takes 4096'): b.encode(IMAGES, 'xyz '*4100)
    with pytest.raises(CheckpointError, match='no number of crops'): load_backbone(folder('qwen3_vl'), num_crops=4)
    other = tmp_path/'other'
    RewardModel.from_pretrained('tiny', 'safety', device='cpu').save_perspective('safety', tmp_path/'phi')
    with pytest.raises(CheckpointError, match="was made for tiny, a base with hidden size 192.*the base here.*qwen3_vl.*hidden size 32"):
        RewardModel.from_pretrained(tmp_path/'phi', base=folder('qwen3_vl'))  # although it was trained with a number of crops
    rm = RewardModel(b, 'here')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        rm.add_perspective('a', lora_rank=2)
    with pytest.raises(ValueError, match='part of an adapter'): b.save_pretrained(other)


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'llava_next', 'idefics3'])
def test_commands_steering_and_evaluation(folder, records, name, tmp_path):
    "Train by the command, score by the command, steer with it and run a benchmark: all as with Phi."
    from llava_reward_nb.commands.score import llava_reward_score
    from llava_reward_nb.commands.train import llava_reward_train
    from llava_reward_nb.evaluation.runs import run_benchmark
    from llava_reward_nb.rewards.registry import load_reward
    from llava_reward_nb.steering.pipelines import fk_steer, load_pipeline
    run = tmp_path/'run'
    llava_reward_train(records, 'bright', run, base=str(folder(name)), lora_rank=4, batch_size=4, accumulation=1, device='cpu', lr=3e-3)
    images = [records.parent/'good0.png', records.parent/'bad0.png']
    llava_reward_score(images, 'picture number 0', model=str(run), device='cpu', out=tmp_path/'scores.json')
    said = [row['bright'] for row in json.loads((tmp_path/'scores.json').read_text())]

    reward = load_reward(str(run/'bright'), device='cpu')
    assert_close(reward(images, 'picture number 0'), torch.tensor(said), atol=1e-4, rtol=0)
    pipe = load_pipeline('tiny', device='cpu')
    kwargs = dict(n_particles=3, lam=5., steps=[2], num_inference_steps=4, seed=0)
    steered = fk_steer(pipe, ['a red circle'], reward, **kwargs)
    assert_close(steered.rewards[0].float(), reward(steered.images[0], 'a red circle'), atol=1e-4, rtol=0)
    bench = run_benchmark('mjbench', {'mine': reward}, data='tiny', out=tmp_path/'bench', limit=3)
    assert bench.rewards==['mine']


PAPER_PIXELS = [256*784, 1280*784]


def write_published(rm, name, folder):
    "A perspective in the authors' layout, names as their trainer writes them."
    import yaml
    lora, rest = {}, {'value_head.weight': rm.heads[name].value_head.weight.detach()}
    for key, p in rm._tensors(name).items():
        key = key.removeprefix('base_model.model.')
        if 'lora_' in key: lora[key.replace('language_model.', 'model.')] = p.detach()
        else: rest[f'model.{key}'] = p.detach()
    (folder/'lora').mkdir(parents=True)
    torch.save(lora, folder/'lora'/'adapter_model.bin')
    torch.save(rest, folder/'pytorch_model.bin')
    targets = sorted({k.split('.lora_')[0] for k in lora})
    (folder/'lora'/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=4, lora_alpha=8, target_modules=targets, bias='none')))
    (folder/'reward_config.yaml').write_text(yaml.safe_dump(dict(
        general_preference_tau=.1, value_head_dim=2, add_cross_attention=False, is_general_preference=False)))
    return folder


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'llava_next'])
def test_published_adapters(folder, name, tmp_path):
    "Strictly loaded, read with the bounds of the authors' scripts, and the same in our layout afterwards."
    rm = RewardModel(load_backbone(folder(name)), 'base')
    rm.add_perspective('theirs', PerspectiveConfig(skipca=False), lora_rank=4, lora_alpha=8)
    randomize(rm, 'theirs')
    published = write_published(rm, 'theirs', tmp_path/'alignment'/'theirs')
    is_qwen = name=='qwen2_5_vl'
    if is_qwen: rm.backbone.resize_to(PAPER_PIXELS)
    want = rm.eval().embed(IMAGES, CAPTIONS)

    got = RewardModel.from_pretrained(published, base=folder(name))
    assert got.backbone.pixels==got.config.pixels==(PAPER_PIXELS if is_qwen else None)
    same(got.embed(IMAGES, CAPTIONS), want)
    got.save_perspective('theirs', tmp_path/'ours')
    same(RewardModel.from_pretrained(tmp_path/'ours', base=folder(name)).embed(IMAGES, CAPTIONS), want)

    theirs = torch.load(published/'pytorch_model.bin')
    lost = theirs.pop(next(k for k in theirs if 'value_head' not in k))
    torch.save(theirs, published/'pytorch_model.bin')
    with pytest.raises(CheckpointError, match='lacks'): RewardModel.from_pretrained(published, base=folder(name))
    assert lost.ndim


def test_perspectives_of_other_bounds_do_not_share_a_model(folder, tmp_path):
    rm = RewardModel(load_backbone(folder('qwen3_vl')), 'base')
    rm.add_perspective('small', lora_rank=2)
    rm.save_perspective('small', tmp_path/'small')
    rm = RewardModel(load_backbone(folder('qwen3_vl')), 'base')
    rm.backbone.resize_to([1024, 4096])
    rm.add_perspective('tiny', lora_rank=2)
    with pytest.raises(CheckpointError, match='images of 1024 to 16384 pixels.*1024 to 4096; load them one at a time'):
        rm.load_perspective(tmp_path/'small')
    assert list(rm.configs)==['tiny'] and rm.backbone.pixels==[1024, 4096]


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'qwen3_vl', 'llava_next'])
def test_pixels_with_gradients(folder, name):
    from llava_reward_nb.rewards.llava import LLaVAReward
    rm = RewardModel(load_backbone(folder(name)), 'base').add_perspective('a', lora_rank=4, lora_alpha=8)
    randomize(rm, 'a')
    reward = LLaVAReward(rm.eval())
    image = noise((7, 5), 0).resize((70, 50))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 50, 70, 3).permute(0, 3, 1, 2).float()/255
    pixels.requires_grad_()
    score = reward.score_pixels(pixels, 'a red circle')
    assert_close(score.detach(), reward(image, 'a red circle'), atol=.05, rtol=.05)
    grad, = torch.autograd.grad(score.sum(), pixels)
    assert grad.isfinite().all() and grad.abs().sum()>0


def test_lora_reaches_the_decoder_only(backbone):
    import re
    for name in NAMED+OTHERS:
        b = backbone(name)
        hit = [n for n, m in b.model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(b.lora_targets, n)]
        inside = {id(m) for m in b.language_model.modules()}
        assert hit and all(id(b.model.get_submodule(n)) in inside for n in hit) and b.projectors
        assert not any(id(m) in inside for p in b.projectors for m in b.model.get_submodule(p).modules())
    assert 'linear_attn' in backbone('qwen3_5').lora_targets


def test_activation_checkpointing_changes_nothing(folder):
    rm = RewardModel(load_backbone(folder('qwen3_vl')), 'base').add_perspective('a', lora_rank=4, lora_alpha=8, lora_dropout=0.)
    randomize(rm, 'a')
    rm.train()
    batch = rm.backbone.encode(IMAGES, CAPTIONS)
    learn = [p for p in rm.parameters() if p.requires_grad]
    plain = torch.autograd.grad(rm(**batch).sum(), learn)
    rm.activation_checkpointing_enable()
    for got, want in zip(torch.autograd.grad(rm(**batch).sum(), learn), plain): assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('name', [*NAMED, 'qwen3_5', 'gemma3', 'mistral3'])
def test_half_precision_and_other_processes(folder, backbone, name):
    "A base in bfloat16 below a float32 projector and head; and a processor that went through pickle, as to a worker."
    got, where = [], folder(name)  # made before the seed: it draws random weights the first time
    for dtype in torch.float32, torch.bfloat16:
        torch.manual_seed(0)
        rm = RewardModel(load_backbone(where, dtype=dtype), 'base').add_perspective('a', lora_rank=4, lora_alpha=8)
        randomize(rm, 'a')
        got.append(rm.eval().embed(IMAGES, CAPTIONS))
    assert_close(got[1], got[0], atol=.06, rtol=0)
    rm.train()
    batch = rm.backbone.to_device(rm.backbone.encode(IMAGES, CAPTIONS), 'cpu')
    grads = torch.autograd.grad(rm(**batch).sum(), [p for p in rm.parameters() if p.requires_grad])
    assert all(g.isfinite().all() for g in grads)

    p = backbone(name).processor
    ours, theirs = p(IMAGES, CAPTIONS), pickle.loads(pickle.dumps(p))(IMAGES, CAPTIONS)
    assert ours.keys()==theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize('name', ['llava_next', 'qwen3_vl', 'gemma3'])
@torch.no_grad()
def test_threads_share_a_tokenizer(folder, name, monkeypatch):
    "Six threads make batches and count tokens with one object, and with copies that share its tokenizer, whose padding is switched slowly."
    text = load_backbone(folder(name)).processor
    kind = type(text.tokenizer)
    switch = kind.set_truncation_and_padding
    def slowly(*args, **kwargs):
        switch(*args, **kwargs)
        time.sleep(.002)
    monkeypatch.setattr(kind, 'set_truncation_and_padding', slowly)
    again, deep = pickle.loads(pickle.dumps(text)), copy.deepcopy(text)
    for other in again, deep: assert other.lock is other.processor.tokenizer.lock is not text.lock
    assert copy.copy(text).lock is text.lock
    want, counts = again(IMAGES, CAPTIONS), again.token_counts(SIZES, CAPTIONS)
    go = threading.Barrier(6)
    def work(k):
        mine = text if k%2 else copy.copy(text)
        go.wait()
        out = []
        for i in range(4):
            if k<2: text.frames.clear() # frames are made anew meanwhile
            out.append((mine(IMAGES, CAPTIONS), mine.token_counts(SIZES, CAPTIONS)))
        return out
    with ThreadPoolExecutor(6) as pool: done = [found for out in pool.map(work, range(6)) for found in out]
    assert len(done)==24
    for batch, found in done:
        assert found==counts
        assert_close(batch, want, atol=0, rtol=0)
