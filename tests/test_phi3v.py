"Phi-3.5-vision against the numbers of the reference code: files, tokens, crops, features and hidden states."
import hashlib, json

import numpy as np, pytest, torch
from llava_reward_nb.phi3v import *
from llava_reward_nb.phi3v import load_tokenizer
from llava_reward_nb.core import CLIP_MEAN, CLIP_STD
from safetensors import safe_open
from torch.testing import assert_close

TOL = dict(atol=2e-5, rtol=0)


def sha(x): return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def check_ids(ids, want):
    "A row of token ids against its description."
    ids = np.asarray(ids, dtype=np.int64)
    at = np.flatnonzero(ids < 0)
    assert len(ids) == want['length'] and len(at) == want['num_image_positions']
    assert ids[:at[0]].tolist() == want['before_image'] and ids[at[-1]+1:].tolist() == want['after_image']
    assert (np.diff(at) == 1).all() and (ids[at] == -1).all() and sha(ids) == want['sha256_int64']


@pytest.fixture(scope='module')
def model(toy): return Phi3VModel.from_pretrained(toy/'base')


@pytest.fixture(scope='module')
def processor(toy):
    "Function from a number of crops to a processor."
    return lambda n: Phi3VProcessor.from_pretrained(toy/'base', num_crops=n)


def run(model, inputs):
    "Features before the projector, projected tokens, last hidden state and the states of all layers."
    with torch.no_grad():
        features, _ = model.vision_features(inputs['pixel_values'], inputs['image_sizes'])
        visual = model.project(features)
        def read(layer): return model(inputs['input_ids'], inputs['attention_mask'], visual, layer)
        states = [read(k) for k in range(model.config.num_hidden_layers+1)]
        return features, visual, read(None), states


# ---- files

def test_checkpoint_is_the_one_the_numbers_belong_to(toy, golden):
    with safe_open(toy/'base'/'model.safetensors', framework='np') as f:
        h = hashlib.sha256()
        for k in sorted(f.keys()): h.update(k.encode()+np.ascontiguousarray(f.get_tensor(k)).tobytes())
        for k, v in golden['checkpoint']['probe'].items(): np.testing.assert_allclose(f.get_tensor(k).ravel()[:4], v, rtol=1e-6)
    assert h.hexdigest() == golden['checkpoint']['base_sha256_of_sorted_name_and_bytes']


def test_every_weight_is_loaded(toy, model):
    unused = []
    with safe_open(toy/'base'/'model.safetensors', framework='pt') as f:
        keys = {published_name(k): v for k, v in model.state_dict().items()}
        for k in f.keys():
            if k in keys: assert_close(keys.pop(k), f.get_tensor(k), atol=0, rtol=0)
            else: unused.append(k)
    assert not keys
    assert all('encoder.layers.2.' in k or 'post_layernorm' in k or k == 'lm_head.weight' for k in unused) and len(unused) == 19


def test_images_are_the_ones_the_numbers_belong_to(image, golden):
    for name, want in golden['image_sha256_rgb_bytes'].items(): assert sha(np.asarray(image(name))) == want, name


# ---- tokens

@pytest.mark.parametrize('bos,key', [(True, 'ids'), (False, 'ids_variant_no_bos_no_rstrip')])
def test_tokenizer(tmp_path, make_checkpoint, golden, bos, key):
    make_checkpoint.write_tokenizer(tmp_path, add_bos=bos, rstrip=bos)
    tok = load_tokenizer(tmp_path)
    for text, ids in golden['tokenizer'][key].items(): assert tok(text).input_ids == ids, text
    if bos: assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == tuple(golden['tokenizer']['special'][k] for k in ('bos', 'eos', 'pad'))
    for prompt in golden['prompts'].values(): # an ordinary caption comes out as if special strings had been looked for
        assert plain_ids(tok, '\n'+prompt)+[tok.eos_token_id] == tok(f'\n{prompt}<|endoftext|>').input_ids


def test_prompt_ids(processor, golden):
    p = processor(1)
    for k, want in golden['prompt_ids'].items(): check_ids(p.prompt_ids(golden['prompts'][k], want['num_image_positions']), want)


def test_captions_are_plain_text(processor):
    p = processor(1)
    for text in ('<|end|>', '<|image_1|>', '</s>', 'a <|endoftext|> b', '<s><|user|>', '<unk>'):
        ids = p.prompt_ids(text, 3)
        assert ids[:6] == [1, 522, -1, -1, -1, 1] and ids[-1] == 512 and all(2 < i < 512 for i in ids[6:-1]), text
        assert p.tokenizer.decode(ids[6:-1]).strip() == text


# ---- images

def test_hd_table(golden):
    assert golden['hd_table']['columns'] == ['num_crops', 'width', 'height', 'padded_width', 'padded_height', 'num_img_tokens']
    for n, w, h, W, H, tokens in golden['hd_table']['rows']:
        assert hd_shape(w, h, n) == (H, W) and num_image_tokens(H//336, W//336) == tokens, (n, w, h)


def test_processor(golden, image, processor):
    for g in golden['processor']:
        n, im = g['num_crops'], image(g['image'])
        hd = hd_transform(im, n)
        assert sha(hd) == g['hd_uint8_sha256'] and int(hd.sum()) == g['hd_uint8_sum']
        out = processor(n)(im, golden['prompts']['p0'])
        check_ids(out['input_ids'][0], g['ids'])
        assert out['image_sizes'].tolist() == [g['image_sizes_h_w']]
        pixels = out['pixel_values']
        if len(pixels) == 1: pixels = torch.cat([pixels, pixels]) # the reference keeps a second copy of a single tile
        x = torch.cat([pixels, torch.zeros(n+1-len(pixels), *pixels.shape[1:])])
        assert list(x[None].shape) == g['pixel_values_shape']
        near = lambda a, key: np.testing.assert_allclose(a, g[key], atol=1e-5)
        near(x[0, 0, 100, 100:104], 'global_slice_c0_r100_c100:104')
        near(x[0, 2, 300, 4:8], 'global_slice_c2_r300_c4:8')
        near(x[1, 1, 17, 33:37], 'crop1_c1_r17_c33:37')
        near(pixels[-1, 2, 200, 330:334], 'last_used_crop_c2_r200_c330:334')
        np.testing.assert_allclose(x.double().sum((1, 2, 3))[:len(g['crop_sums'])], g['crop_sums'], rtol=1e-6, atol=0.1)
        flat = (hd/255 - np.array(CLIP_MEAN))/np.array(CLIP_STD) # every pixel of every tile, in float64
        tiles = flat.reshape(hd.shape[0]//336, 336, hd.shape[1]//336, 336, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 336, 336)
        np.testing.assert_allclose(x[1:1+len(tiles)], tiles, rtol=0, atol=1e-6)


# ---- hidden states

def adapted(toy, entry, config=None):
    "The base with an adapter's projector, and its LoRA merged by hand."
    folder = toy/entry['adapter']
    model = Phi3VModel.from_pretrained(toy/'base')
    state = model.state_dict()
    if entry['options'].get('ft_projector', True):
        for k, v in torch.load(folder/'pytorch_model.bin', weights_only=True).items():
            if 'img_projection' in k: state['img_projection'+k.split('img_projection')[1]].copy_(v)
    if not entry['lora']: return model
    c = json.loads((folder/'lora'/'adapter_config.json').read_text())
    with safe_open(folder/'lora'/'adapter_model.safetensors', framework='pt') as f:
        for k in f.keys():
            if 'lora_A' not in k: continue
            target = 'language_model.'+k.split('model.', 1)[1].replace('.lora_A', '')
            state[target] += c['lora_alpha']/c['r']*f.get_tensor(k.replace('lora_A', 'lora_B'))@f.get_tensor(k)
    return model


DETAILED = ('bt_skipca/sq_a/p0/4', 'bt_skipca/land/p0/4', 'bt_skipca/port/p0/4', 'bt_skipca/wide/p1/4', 'bt_skipca/sq_a/p0/1',
            'bt_skipca/sq_a/p0/16', 'bt_skipca/land/p0/16', 'bt_noca/sq_a/p0/4', 'bt_skipca_nolora/sq_a/p0/4', 'rope_long/orig330/sq_a/p0/1')


def test_all_detailed_entries_are_checked(golden): assert {f['name'] for f in golden['forward'] if 'detail' in f} == set(DETAILED)


@pytest.mark.parametrize('name', DETAILED)
def test_hidden_states(name, toy, golden, image, processor):
    entry, = (f for f in golden['forward'] if f['name'] == name)
    d, model = entry['detail'], adapted(toy, entry)
    if over := entry['options'].get('overrides'):
        for k, v in over.items(): setattr(model.config, k, v)
        model.language_model.rotary_emb = LongRope(model.config)
    inputs = processor(entry['num_crops'])(image(entry['image']), golden['prompts'][entry['prompt']])
    outs, worst = [], {}
    features, visual, last, states = run(model, inputs)
    hooks = [layer.register_forward_hook(lambda m, a, o: outs.append(o)) for layer in model.language_model.layers]
    with torch.no_grad(): model(inputs['input_ids'], inputs['attention_mask'], visual)
    for hook in hooks: hook.remove()

    def near(key, got, want, atol=2e-5):
        want = torch.tensor(want)
        worst[key] = max(worst.get(key, 0), float((got-want).abs().max()))
        assert_close(got, want, atol=atol, rtol=0, msg=lambda m: f'{key}: {m}')

    assert inputs['input_ids'].shape == (1, d['seq_len'])
    p = d['projector_input']
    h, w = (inputs['image_sizes'][0]//336).tolist()
    assert list(features.shape) == p['shape']
    near('features', features[0, :4], p['row0_first4'])
    near('features', features[0, 1024:1028], p['row0_1024:1028'])
    assert torch.equal(features[-1], model.sub_GN.flatten()) and torch.equal(features[12*w], model.sub_GN.flatten())
    assert torch.equal(features[p['glb_GN_row']], model.glb_GN.flatten()) and p['glb_GN_row'] == 12*h*(12*w+1)
    v = d['visual_tokens']
    assert [1, *visual.shape] == v['shape']
    for i, want in v['first8_of_token'].items(): near('visual', visual[int(i), :8], want)
    np.testing.assert_allclose([visual.double().sum(), visual.double().abs().sum()], [v['sum_f64'], v['abs_sum_f64']], rtol=1e-6, atol=5e-3)
    with torch.no_grad(): first = model.vision_tower(inputs['pixel_values'][:1], output_hidden_states=True).hidden_states[0]
    near('tower input', first[0, 1, :4], d['clip_prenorm_crop0_token1_first4'])
    near('embedding', states[0][0, -1, :4], d['embeds_eos_first4'])
    for i, want in enumerate(d['decoder_layer_out_at_eos_first4']): near('layers', outs[i][0, -1, :4], want)
    near('hidden', last[0, -1], d['eos_hidden_after_final_norm'])
    print(name, {k: f'{v:.1e}' for k, v in worst.items()})


def test_hidden_states_are_the_layers_outputs(model, image, processor):
    *_, last, states = run(model, processor(1)(image('tiny'), 'a red cube'))
    assert len(states) == 1+model.config.num_hidden_layers and torch.equal(states[-1], last)


def test_batch_layout(golden, image, processor):
    b = golden['batch_equal_size']
    images, prompts = [image(r[0]) for r in b['rows']], [golden['prompts'][r[2]] for r in b['rows']]
    out, want = processor(b['num_crops'])(images, prompts), b['layout_chosen']
    assert list(out['input_ids'].shape) == want['input_ids_shape']
    for ids, mask, pad, row, digest in zip(out['input_ids'].numpy(), out['attention_mask'].numpy(), want['left_pad'], want['ids'],
                                           want['row_sha256_int64_with_padding']):
        n = len(ids)-pad # the reference pads on the left, we on the right
        assert (ids[n:] == want['pad_id']).all() and mask.tolist() == [1]*n+[0]*pad and sha(np.roll(ids, pad)) == digest
        check_ids(ids[:n], row)


def check_rows_alone(model, p, images, prompts):
    "Each row of a batch has the hidden states it has alone."
    *_, last, states = run(model, p(images, prompts))
    assert last.isfinite().all()
    for i, (im, t) in enumerate(zip(images, prompts)):
        *_, alone, _ = run(model, p(im, t))
        assert_close(last[i:i+1, :alone.shape[1]], alone, **TOL)


def test_mixed_batch_equals_rows_alone(model, golden, image, processor):
    names = ('sq_a', 'wide', 'tiny', 'port')
    check_rows_alone(model, processor(4), [image(n) for n in names], [golden['prompts'][f'p{i}'] for i in range(4)])


def test_rope_regime_is_the_rows_own(toy, golden, image, processor):
    q = golden['rope_batch_reference_quirk']
    model = Phi3VModel.from_pretrained(toy/'base')
    model.config.original_max_position_embeddings = q['original_max_position_embeddings']
    model.language_model.rotary_emb = LongRope(model.config)
    p, images, prompts = processor(q['num_crops']), [image(r[0]) for r in q['rows']], [golden['prompts'][r[1]] for r in q['rows']]
    assert p(images, prompts)['attention_mask'].sum(1).tolist() == q['lengths']
    check_rows_alone(model, p, images, prompts)


# ---- adapters

def test_peft_wraps_the_decoder_alone(toy, image, processor):
    from peft import LoraConfig, get_peft_model
    targets = ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj']
    model, inputs = Phi3VModel.from_pretrained(toy/'base'), processor(1)(image('tiny'), 'a red cube')
    before = run(model, inputs)[2]
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=['img_projection']))
    trained = [k for k, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) == 2*4*model.config.num_hidden_layers + 4
    assert all('.language_model.layers.' in k or '.img_projection.' in k for k in trained)
    assert torch.equal(run(model, inputs)[2], before) # B is zero at first
    features, _ = model.vision_features(inputs['pixel_values'], inputs['image_sizes'])
    assert not features.requires_grad
    out = wrapped(input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask'], visual=model.project(features), last=True)
    out.sum().backward()
    parameters = dict(wrapped.named_parameters())
    assert all(parameters[k].grad is not None for k in trained)
