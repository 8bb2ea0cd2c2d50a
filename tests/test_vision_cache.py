"Features of a frozen tower on disk: every family of backbones, two processes in one folder, a run that goes on, labels."
import json, shutil

import families
import pytest, torch
from PIL import Image
from test_training_faults import finish_together, log_of, pair_of_processes, same_curve, train, weights
from torch.testing import assert_close

from llava_reward_nb.core import InputError
from llava_reward_nb.data import RewardCollator, load_records
from llava_reward_nb.model import RewardModel
from llava_reward_nb.shapes.records import alignment_pairs, safety_labels, write_records
from llava_reward_nb.vision_cache import CachedVision, fill_cache

FAMILIES = dict(qwen=families.qwen, qwen3=lambda f: families.qwen(f, kind='qwen3_vl'), llava_next=families.llava_next, llava=families.llava, gemma3=families.gemma3)


def model_of(make, folder):
    torch.manual_seed(0)
    return RewardModel.from_pretrained(make(folder), [], device='cpu').add_perspective('mine', lora_rank=2)


@pytest.fixture
def unlike():
    "Pairs of images of unlike sizes."
    pairs = load_records(alignment_pairs(3, seed=0))
    for i, r in enumerate(pairs.rows): r['chosen_path'] = r['chosen_path'].resize((60+40*i, 50))
    return pairs


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_reads_the_same(family, unlike, tmp_path):
    rm = model_of(FAMILIES[family], tmp_path/'base')
    vision = CachedVision(tmp_path/'cache', rm)
    assert fill_cache(vision, unlike) == 6
    usual = RewardCollator(rm.backbone.processor)
    plain, cached = usual(list(unlike)), vision.collator(usual)(list(unlike))
    features = vision.join(cached.pop('features'))
    assert not any('pixel' in k for k in cached) and all(torch.equal(plain[k], t) for k, t in cached.items())
    for batch in plain, cached: batch.pop('target')
    with torch.no_grad(): assert_close(rm(features=features, **cached), rm(**plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('family', ['mistral3', 'idefics2'])
def test_a_family_that_cannot_be_cut_is_refused(family, tmp_path):
    rm = model_of(getattr(families, family), tmp_path/'base')
    with pytest.raises(InputError, match='do not join to those of a batch|not known where the tower'): CachedVision(tmp_path/'cache', rm)


def train_cached(folder, n, size, cache):
    "As `train_alike` of the tests of faults, with a cache."
    measured = train(folder, n=n, per_device_train_batch_size=size, gradient_accumulation_steps=1, lora_dropout=0., optim='sgd', lr_scheduler_type='constant', warmup_steps=0, learning_rate=.05, vision_cache=cache)
    (folder/'measured.json').write_text(json.dumps(measured))


def test_two_processes_fill_one_folder(tmp_path):
    cache = str(tmp_path/'cache')
    for p in (both := pair_of_processes(finish_together, tmp_path, train_cached, tmp_path/'two', 7, 2, cache)): p.join()
    assert [p.exitcode for p in both] == [0, 0]
    (one,) = (tmp_path/'cache').iterdir()
    assert len(list(one.glob('*/*.safetensors'))) == 14 and not [p for p in one.rglob('*') if '.tmp' in p.name]
    train_cached(tmp_path/'one', 7, 4, cache)
    train_cached(tmp_path/'none', 7, 4, None)
    same_curve(tmp_path/'one', tmp_path/'two')
    for (s, *a), (t, *b) in zip(log_of(tmp_path/'one'), log_of(tmp_path/'none')):
        assert s == t
        assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-5)


def test_a_run_with_a_cache_goes_on_to_the_same_weights(tmp_path):
    cache = str(tmp_path/'cache')
    train(tmp_path/'run', vision_cache=cache)
    want = weights(tmp_path/'run'/'mine')
    for name in 'mine', 'checkpoint-6': shutil.rmtree(tmp_path/'run'/name)
    shutil.rmtree(cache)
    train(tmp_path/'run', resume=True, vision_cache=cache)
    assert all(torch.equal(w, want[k]) for k, w in weights(tmp_path/'run'/'mine').items())


def test_labels_and_workers(tmp_path):
    labels = load_records(write_records(safety_labels(6, seed=1), tmp_path/'labels'))
    logs = []
    for name, more in dict(none={}, cached=dict(vision_cache=str(tmp_path/'cache'), dataloader_num_workers=1)).items():
        train(tmp_path/name, pairs=labels, **more)
        logs.append(torch.tensor([loss for _, loss, _ in log_of(tmp_path/name)]))
    assert_close(*logs, rtol=1e-3, atol=1e-5)


def test_an_image_that_changed_is_not_taken_for_the_old_one(tmp_path):
    pairs = load_records(write_records(alignment_pairs(4, seed=3), tmp_path/'pairs'))
    train(tmp_path/'a', pairs=pairs, vision_cache=str(tmp_path/'cache'), max_steps=2)
    Image.new('RGB', (64, 64), 'green').save(pairs[1]['chosen_path'])
    for name, cache in dict(b=str(tmp_path/'cache'), c=None).items(): train(tmp_path/name, pairs=pairs, vision_cache=cache, max_steps=2)
    loss = {name: log_of(tmp_path/name)[0][1] for name in 'abc'}
    assert abs(loss['b']-loss['c']) < 1e-4 and len(list((tmp_path/'cache').glob('*/*/*.safetensors'))) == 9
