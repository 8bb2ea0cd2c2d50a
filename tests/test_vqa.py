"VQAScore against the numbers of the reference code: tokens, pixels, image tokens, predictions and scores."
import json, re
from pathlib import Path

import pytest, torch
from conftest import script
from llava_reward_nb.core import CheckpointError
from llava_reward_nb.phi3v import CLIP_L14_336
from llava_reward_nb.rewards.vqa import HPSv3, PYes, VQAScore, _flant5_name, _flant5_unused, hpsv3_name, square_pixels, t5_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, PreTrainedTokenizerFast, Qwen2VLConfig, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

METRICS = Path(__file__).resolve().parent/'golden'/'metrics'
WANT = json.loads((METRICS/'vqascore.json').read_text(encoding='utf-8'))
PROMPTS, SCORES = WANT['prompts'], [(r['image'], r['prompt'], r['score']) for r in WANT['scores']]


@pytest.fixture(scope='module')
def images():
    "Function from a name to that PIL image."
    make = script(METRICS/'make_metric_checkpoints.py').make_image
    return lambda name: make(*WANT['images'][name])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A toy CLIP-FlanT5 in the published layout."
    out, make = tmp_path_factory.mktemp('vqa'), script(METRICS/'make_metric_checkpoints.py')
    make.build_clip_flant5(json.loads((METRICS/'spec_metrics.json').read_text(encoding='utf-8')), str(out))
    return out


@pytest.fixture(scope='module')
def reward(folder): return VQAScore.from_pretrained(folder, device='cpu', dtype=torch.float32)


def close(got, want): assert_close(torch.as_tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=0)


def test_vocabulary_is_cut_to_the_tokenizer(reward):
    assert len(reward.tokenizer) == reward.lm_head.out_features == reward.t5.shared.num_embeddings == WANT['tokenizer_length']
    assert reward.labels == WANT['yes_label_ids'] and not torch.equal(reward.lm_head.weight, reward.t5.shared.weight)


@pytest.mark.parametrize('name', WANT['tokens'])
def test_tokens(reward, name):
    want = WANT['tokens'][name]
    head, tail = reward.pieces(PROMPTS[name])
    ids = head+[-200]+tail
    cut = want['ids'].index('...') if '...' in want['ids'] else len(ids)
    after = len(want['ids'])-cut-1 if '...' in want['ids'] else 0
    assert len(ids) == want['n'] and len(head) == want['sentinel_at'] and head[-1] == 1
    assert ids[:cut] == want['ids'][:cut] and ids[len(ids)-after:] == want['ids'][len(want['ids'])-after:]


@pytest.mark.parametrize('name', WANT['preprocess'])
def test_pixels(images, name):
    want, x = WANT['preprocess'][name], square_pixels(images(name).convert('RGB'), 112)
    at = x[:, torch.tensor(want['points_rows'])][:, :, torch.tensor(want['points_cols'])]
    assert list(x.shape) == want['shape']
    assert_close(at, torch.tensor(want['points']), atol=1e-5, rtol=0)
    assert_close(x.mean((1, 2)), torch.tensor(want['channel_mean']), atol=1e-5, rtol=0)
    assert_close(x.flatten(1).std(1, correction=0), torch.tensor(want['channel_std']), atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', WANT['projected_image'])
def test_image_tokens(reward, images, name):
    want = WANT['projected_image'][name]
    v = reward.visual(square_pixels(images(name).convert('RGB'), 112)[None])[0]
    assert list(v.shape) == want['shape']
    assert_close(v[0, :6], torch.tensor(want['first_row_first6']), atol=2e-5, rtol=2e-4)
    assert_close(v[-1, -4:], torch.tensor(want['last_row_last4']), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize('image, prompt, score', SCORES)
def test_scores(reward, images, image, prompt, score): close(reward(images(image), PROMPTS[prompt]), [score])


def test_batches(reward, images):
    close(reward([images(i) for i in WANT['batch']['images']], [PROMPTS[p] for p in WANT['batch']['prompts']]), WANT['batch']['scores'])
    close(reward([images(i) for i, _, _ in SCORES], [PROMPTS[p] for _, p, _ in SCORES], batch_size=7), [s for _, _, s in SCORES])


def test_predictions(reward, images):
    d = WANT['detail']
    z = reward.answer_logits(square_pixels(images(d['image']), 112)[None], [PROMPTS[d['prompt']]])
    assert list(z.shape) == d['logits_shape']
    assert_close(z[0, :, :5], torch.tensor(d['logits_first5_per_position']), atol=2e-5, rtol=2e-4)
    p = z[0].softmax(-1)
    close([p[0, 5], p[1, 1]], [d['prob_yes'], d['prob_eos_after_yes']])


def test_long_prompts_are_cut(reward, images):
    c, prompt = WANT['cut_at_2048'], ' '.join(['a']*2100)
    assert sum(map(len, reward.pieces(prompt)))+1 == 2048 and len(t5_ids(reward.tokenizer, prompt)) > 2048
    close(reward(images(c['image']), prompt), [c['score']])


@pytest.mark.parametrize('kind', ['other_answer', 'other_question', 'other_styles'])
def test_other_words(folder, images, kind):
    for r in WANT[kind]:
        own = VQAScore.from_pretrained(folder, 'cpu', torch.float32, **{k: r[k] for k in ('question', 'answer', 'style') if k in r})
        close(own(images(r['image']), PROMPTS[r['prompt']]), [r['score']])


def test_half_precision_is_near(folder, images):
    r = VQAScore.from_pretrained(folder, 'cpu', torch.bfloat16)
    s = r(images('sq'), PROMPTS['short'])
    assert s.dtype == torch.float32
    assert_close(s, torch.tensor([WANT['scores'][0]['score']]), rtol=.3, atol=0)


def test_gradients_point_uphill(reward, images):
    "A small step along the gradient of the pixels raises the score, about as much as its length says."
    x = torch.rand(1, 3, 90, 120, generator=torch.Generator().manual_seed(0)).mul_(.6).add_(.2).requires_grad_()
    y = reward.score_pixels(x, PROMPTS['short'])
    g, = torch.autograd.grad(y.log().sum(), x)
    step = 1e-3*g/g.norm()
    with torch.no_grad(): rise = float((reward.score_pixels(x+step, PROMPTS['short'])/y).log())
    assert rise == pytest.approx(1e-3*float(g.norm()), rel=.1)


def test_damaged_checkpoints_are_refused(folder, tmp_path):
    for p in folder.iterdir():
        if p.name != 'pytorch_model-00001-of-00002.bin': (tmp_path/p.name).symlink_to(p)
    with pytest.raises(CheckpointError, match='pytorch_model-00001-of-00002.bin'): VQAScore.from_pretrained(tmp_path, 'cpu')
    state = torch.load(folder/'pytorch_model-00001-of-00002.bin', weights_only=True)
    key = next(iter(state))
    torch.save({k: v for k, v in state.items() if k != 'decoder.final_layer_norm.weight'}, tmp_path/'pytorch_model-00001-of-00002.bin')
    with pytest.raises(CheckpointError, match='decoder.final_layer_norm'): VQAScore.from_pretrained(tmp_path, 'cpu')
    torch.save(state | {key: torch.full_like(state[key], float('nan'))}, tmp_path/'pytorch_model-00001-of-00002.bin')
    with pytest.raises(CheckpointError, match='NaN'): VQAScore.from_pretrained(tmp_path, 'cpu')


# ---- P(yes): what transformers itself would generate

def chat_tokenizer(folder, image, extra):
    "Bytes, `Yes` and `No`, control tokens, and a chat template."
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [('Y', 'e'), ('Ye', 's'), ('N', 'o'), ('y', 'e'), ('ye', 's'), ('n', 'o')]
    for a, b in merges: vocab[a+b] = len(vocab)
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=t, eos_token='<|im_end|>', pad_token='<|endoftext|>', extra_special_tokens=extra)
    tok.chat_template = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type']=='image' %}" + image +
                         "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} A: {% endif %}")
    tok.save_pretrained(folder)
    return tok


@pytest.mark.parametrize('kind', ['qwen2_vl', 'qwen2_5_vl', 'qwen3_vl'])
def test_p_yes_of_the_qwen_family(tmp_path, images, kind):
    extra = ['<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>']
    tok = chat_tokenizer(tmp_path, '<|vision_start|><|image_pad|><|vision_end|>', extra)
    start, end, image, video = tok.convert_tokens_to_ids(extra)
    vision = dict(depth=2, hidden_size=32, num_heads=2, patch_size=14)
    vision |= dict(embed_dim=32, mlp_ratio=2) if kind == 'qwen2_vl' else dict(out_hidden_size=32, intermediate_size=48)
    if kind == 'qwen3_vl': vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    text = dict(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                bos_token_id=None, eos_token_id=None, rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[2, 3, 3]))
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
                                  vision_start_token_id=start, vision_end_token_id=end)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for p in model.parameters(): p.data.normal_(0, 1/p.shape[-1]**.5 if p.ndim > 1 else .02).add_(p.ndim == 1)
    model.save_pretrained(tmp_path)
    (tmp_path/'preprocessor_config.json').write_text(json.dumps(dict(min_pixels=56*56, max_pixels=84*84)))
    reward = PYes.from_pretrained(tmp_path, 'cpu')
    pictures, prompts = [images(n) for n in ('land', 'port', 'sq')], ['a cube', 'a red cube on a blue sphere', '']
    both = reward(pictures, prompts)
    alone = torch.cat([reward(i, p) for i, p in zip(pictures, prompts)])
    assert_close(both, alone, rtol=1e-4, atol=0)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts)):
        out = reward.model.generate(**reward.encode([picture], [prompt]), max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        p = out.logits[0][0].softmax(-1)
        yes, no = p[reward.yes].sum(), p[reward.no].sum()
        assert_close(both[i], yes/(yes+no), rtol=1e-4, atol=0)
    assert both.std() > 1e-4


# ---- the published sizes: every parameter has exactly one published name, without any weights

def test_flant5_xxl_names(reward):
    t5 = T5Config(vocab_size=32100, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj='gated-gelu')
    with torch.device('meta'): model = VQAScore(t5, CLIPVisionConfig(**CLIP_L14_336), reward.tokenizer)
    names = [n for n, _ in model.named_parameters()]
    published = [n.removeprefix('t5.').replace('vision_tower.', 'vision_tower.vision_tower.vision_model.', 1) for n in names]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.4e9, rel=.02)
    assert [_flant5_name(k) for k in published] == names and not any(re.fullmatch(_flant5_unused(24), k) for k in published)
    assert {'shared.weight', 'lm_head.weight', 'mm_projector.2.bias', 'decoder.block.23.layer.2.DenseReluDense.wi_1.weight',
            'vision_tower.vision_tower.vision_model.encoder.layers.22.mlp.fc2.bias'} <= set(published)


class Tokens:
    "As much of a tokenizer as `HPSv3` needs to be built."
    def add_tokens(self, *args, **kwargs): pass
    def convert_tokens_to_ids(self, token): return 151657


def test_hpsv3_names():
    rope, sizes = dict(type='mrope', mrope_section=[16, 24, 24]), dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    config = Qwen2VLConfig(model_type='qwen2_vl', **sizes, num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6,
                           rope_scaling=rope, vocab_size=151658, vision_config=dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16))
    with torch.device('meta'): model = HPSv3(config, Tokens(), '')
    names = [n for n, _ in model.named_parameters()]
    old = [n.replace('model.visual.', 'visual.').replace('model.language_model.', 'model.') for n in names]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.75e9, rel=.01)
    assert [hpsv3_name(k) for k in old] == names == [hpsv3_name(k) for k in names]
    assert {'model.embed_tokens.weight', 'model.layers.27.self_attn.q_proj.bias', 'visual.merger.mlp.2.weight', 'rm_head.5.bias'} <= set(old)
