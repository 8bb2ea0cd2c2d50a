"""Whole rewards against the reference's numbers: LoRA, projector, SkipCA and head on the toy checkpoint in the published layout."""
import json

import pytest, torch
from torch.testing import assert_close

from llava_reward_nb.generic import load_backbone
from llava_reward_nb.core import default_device
from llava_reward_nb.losses import make_loss
from llava_reward_nb.model import RewardModel

DEVICE = default_device()
TOL = dict(atol=2e-5 if DEVICE == 'cpu' else 2e-4, rtol=0) # a GPU adds up in another order
PROB = dict(atol=1e-4 if DEVICE == 'cpu' else 2e-3, rtol=0) # a difference of two rewards, divided by tau = .1
FULL = dict(device=DEVICE, dtype=torch.float32)


@pytest.fixture(scope='module')
def rewards(toy):
    "Toy rewards by (adapter, num_crops, …), loaded once each."
    made = {}
    def get(adapter, num_crops, base=None, **kw):
        key = adapter, num_crops, str(base), json.dumps(kw, default=str)
        if key not in made:
            made[key] = RewardModel.from_pretrained(toy/adapter, base=base or toy/'base', num_crops=num_crops, **{**FULL, **kw})
        return made[key]
    return get


def load(rewards, toy, tmp_path, case):
    "The reward that a golden case was computed with."
    opts, over = case['options'], {}
    if case['mean_hidden_state']: over['pooling'] = 'mean'
    if case['layer_id'] != 32: over['layer'] = case['layer_id']
    base = None
    if 'overrides' in opts:
        base = tmp_path/'base'
        base.mkdir()
        for f in (toy/'base').iterdir(): (base/f.name).symlink_to(f)
        (base/'config.json').unlink()
        (base/'config.json').write_text(json.dumps(json.loads((toy/'base'/'config.json').read_text()) | opts['overrides']))
    dtype = torch.bfloat16 if 'bfloat16' in str(opts.get('dtype')) else torch.float32
    fresh = not case['lora'] or opts.get('ft_projector') is False
    if not fresh: return rewards(case['adapter'], case['num_crops'], base, overrides=over, dtype=dtype)
    rm = RewardModel.from_pretrained(toy/case['adapter'], base=toy/'base', num_crops=case['num_crops'], **FULL)
    with torch.no_grad():
        if not case['lora']:
            for n, p in rm.named_parameters():
                if 'lora_B' in n: p.zero_()
        else: # the base's own projector instead of the finetuned one
            wrapped = rm.backbone.model.img_projection
            for p, q in zip(wrapped.modules_to_save[rm.active].parameters(), wrapped.original_module.parameters()): p.copy_(q)
    return rm


def test_every_forward(golden, toy, rewards, image, tmp_path):
    seen = 0
    for i, case in enumerate(golden['forward']):
        (tmp_path/str(i)).mkdir()
        rm = load(rewards, toy, tmp_path/str(i), case)
        got = rm.embed(image(case['image']), golden['prompts'][case['prompt']])[0]
        tol = dict(atol=2e-2, rtol=0) if 'bf16' in case['name'] else TOL
        assert_close(got, torch.tensor(case['reward']), **tol, msg=lambda m: f"{case['name']}: {m}")
        seen += 1
    assert seen == len(golden['forward']) >= 40


def test_mixed_batches_equal_rows_alone(golden, rewards, image):
    for case in golden['batch_mixed_size_reference_quirk']['cases']:
        images, prompts = zip(*[(image(i), golden['prompts'][p]) for i, p in case['rows']])
        for adapter in 'adapter', 'adapter_flatca', 'adapter_noca':
            got = rewards(adapter, case['num_crops']).embed(list(images), list(prompts))
            assert_close(got, torch.tensor(case[adapter]['alone']), **TOL)


def test_batches_of_equal_size(golden, rewards, image):
    g = golden['batch_equal_size']
    names = dict(bt_skipca=('adapter', {}), bt_noca=('adapter_noca', {}), gpm2_skipca=('adapter_gpm2', {}),
                 bt_skipca_mean=('adapter', dict(overrides=dict(pooling='mean'))))
    prompts = [golden['prompts'][r[2]] for r in g['rows']]
    for name, (adapter, kw) in names.items():
        rm = rewards(adapter, g['num_crops'], **kw)
        for side, column in ('chosen', 0), ('rejected', 1):
            got = rm.embed([image(r[column]) for r in g['rows']], prompts)
            assert_close(got, torch.tensor(g['rewards'][name][f'alone_{side}']), **TOL)


def test_rope_is_chosen_by_the_rows_own_length(golden, toy, rewards, image, tmp_path):
    g = golden['rope_batch_reference_quirk']
    case = dict(adapter='adapter', num_crops=g['num_crops'], options=dict(overrides=dict(original_max_position_embeddings=g['original_max_position_embeddings'])),
                mean_hidden_state=False, layer_id=32, lora=True)
    rm = load(rewards, toy, tmp_path, case)
    got = rm.embed([image(i) for i, _ in g['rows']], [golden['prompts'][p] for _, p in g['rows']])
    assert_close(got, torch.tensor(g['alone']), **TOL)


def test_preference_probabilities(golden, rewards, image):
    want, p0 = golden['pair_probability'], golden['prompts']['p0']
    for name, adapter in ('bt', 'adapter'), ('gpm2', 'adapter_gpm2'):
        got = rewards(adapter, 4).compare(image('sq_a'), image('sq_b'), p0)
        assert_close(got, torch.tensor([want[f'{name} sq_a over sq_b, p0, num_crops 4']]), **PROB)
    for dim in 2, 4:
        rm = rewards(f'adapter_gpm{dim}', 4)
        a, b = rm.embed([image('sq_a'), image('sq_b')], p0).split(1)
        assert_close(make_loss('gpm', dim).loss(a, b).item(), want[f'gpm{dim} loss'], atol=2*PROB['atol'], rtol=0)


def test_records_with_two_prompts_and_labels(golden, rewards, image):
    g = golden['dataset_pair_with_two_prompts']
    rm = rewards('adapter', 4)
    got = rm.embed([image(i) for i in g['images']], [golden['prompts'][p] for p in g['prompts']])
    assert_close(got, torch.tensor(g['rewards']), **TOL)
    g = golden['dataset_unpaired']
    got = rm([image(i) for i, _, _ in g['rows']], [golden['prompts'][p] for _, p, _ in g['rows']])
    assert_close(got, torch.tensor(g['rewards'])[:, 0], **TOL)
    assert_close(make_loss('cls').loss(got[:, None], torch.tensor(g['labels'])).item(), g['bce_loss_float32_labels'], **TOL)


def test_merged_model_meets_the_same_numbers(golden, toy, image):
    rm = RewardModel.from_pretrained(toy/'adapter', base=toy/'base', num_crops=4, **FULL).merge()
    for case in golden['forward'][:4]:
        assert_close(rm.embed(image(case['image']), golden['prompts'][case['prompt']])[0], torch.tensor(case['reward']), **TOL)


def test_crops_default_to_the_authors_16(golden, toy):
    assert load_backbone(toy/'base').num_crops == 16 # not the 4 of the published preprocessor_config
