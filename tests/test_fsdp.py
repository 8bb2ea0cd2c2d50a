"Weights divided among two processes: the loss curve of one, checkpoints that do not depend on who held what, runs that go on."
import json, math, os, shutil

import pytest, torch
from torch.testing import assert_close

import families
from PIL import Image
from llava_reward_nb.data import load_records
from llava_reward_nb.model import RewardModel
from llava_reward_nb.trainer import train_perspective
from llava_reward_nb.weights import MODELS
from llava_reward_nb.guards import checkpoints
from llava_reward_nb.shapes.records import alignment_pairs
from test_training_faults import config, finish_together, log_of, pair_of_processes, same_curve, train, trainer, weights

PLAIN = dict(gradient_accumulation_steps=1, lora_dropout=0., optim='sgd', lr_scheduler_type='constant', warmup_steps=0, learning_rate=.05)


def train_divided(folder, n, size, options, resume=False):
    "A run without dropout whose global batch is size times the number of processes."
    held = load_records(alignment_pairs(5, seed=1))
    measured = train(folder, resume, n, held=held, per_device_train_batch_size=size, per_device_eval_batch_size=size, **{**PLAIN, **options})
    if os.environ.get('RANK', '0') == '0':
        (folder/'measured.json').write_text(json.dumps({k: measured[k] for k in ('eval_accuracy', 'eval_mean_prob', 'eval_loss', 'train_loss')}))


def launched(folder, *args):
    "Train in two processes as if `accelerate launch` had been asked for FSDP2."
    os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_RESHARD_AFTER_FORWARD='true')
    train_divided(folder, *args)


def together(tmp_path, f, *args):
    for done in tmp_path.glob('done-*'): done.unlink()
    for p in (both := pair_of_processes(finish_together, tmp_path, f, tmp_path/'two', *args)): p.join()
    assert [p.exitcode for p in both] == [0, 0]


@pytest.mark.parametrize('f, options', [
    (train_divided, dict(zero_stage=3)),
    (train_divided, dict(zero_stage=2, activation_checkpointing=True)),
    (launched, dict(train_projector=False))], ids=['stage 3', 'stage 2 with checkpointing', 'launched'])
def test_divided_weights_have_the_loss_curve_of_whole_ones(f, options, tmp_path):
    train_divided(tmp_path/'one', 7, 4, {k: v for k, v in options.items() if k != 'zero_stage'})
    together(tmp_path, f, 7, 2, options)
    same_curve(tmp_path/'one', tmp_path/'two')


def accumulated(folder, size, options):
    "Batches of one pair, two or four for an update."
    train_divided(folder, 7, 1, dict(gradient_accumulation_steps=size, **options))


def test_accumulation(tmp_path):
    accumulated(tmp_path/'one', 4, {})
    together(tmp_path, accumulated, 2, dict(zero_stage=3))
    same_curve(tmp_path/'one', tmp_path/'two')


def train_base(folder, base, pairs, size, options):
    "Any base, with pairs of any images."
    torch.set_num_threads(1)
    rm = RewardModel.from_pretrained(base, [], device='cpu', **({'num_crops': 16} if 'tiny' in str(base) else {}))
    kept = config(folder, per_device_train_batch_size=size, save_strategy='no', num_train_epochs=1, **{**PLAIN, **options})
    train_perspective(rm, 'mine', load_records(pairs), kept)


@pytest.mark.parametrize('base', ['tiny', 'qwen3_vl'])
def test_images_of_unlike_sizes_and_other_families(base, tmp_path):
    "Of many crops the tower makes more passes, in one process and not in the other."
    if base != 'tiny': families.FAMILIES[base](tmp_path/base)
    folder = MODELS['tiny']/'base' if base == 'tiny' else tmp_path/base
    sizes = (256, 64, 256, 64) # the first and third pair are of one process
    pairs = [dict(prompt=f'picture {i}', chosen_path=Image.effect_noise((n, n), 50+i).convert('RGB'), reject_path=Image.effect_noise((n, n), 90+i).convert('RGB'))
             for i, n in enumerate(sizes)]
    for i, pair in enumerate(pairs):
        for side in 'chosen_path', 'reject_path':
            pair[side].save(tmp_path/f'{i}{side}.png')
            pair[side] = str(tmp_path/f'{i}{side}.png')
    options = dict(train_sampling_strategy='sequential')
    train_base(tmp_path/'one', folder, pairs, 2, options)
    together(tmp_path, train_base, folder, pairs, 1, dict(options, zero_stage=3))
    for (_, *a), (_, *b) in zip(log_of(tmp_path/'one'), log_of(tmp_path/'two')): assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-5)


def adam(folder, n, size, options, resume=False):
    train_divided(folder, n, size, dict(optim='adamw_torch', learning_rate=1e-3, save_steps=2, max_steps=4, **options), resume)


@pytest.mark.parametrize('first, then', [(0, 3), (3, 0)])
def test_a_run_goes_on_in_pieces_and_out_of_them(first, then, tmp_path):
    "Whole weights write the checkpoint and divided ones go on from it, and the other way round."
    adam(tmp_path/'one', 7, 4, {})
    together(tmp_path, adam, 7, 2, dict(zero_stage=first))
    assert [p.name for p in checkpoints(tmp_path/'two')] == ['checkpoint-2', 'checkpoint-4']
    shutil.rmtree(tmp_path/'two'/'checkpoint-4')
    shutil.rmtree(tmp_path/'two'/'mine')
    together(tmp_path, adam, 7, 2, dict(zero_stage=then), True)
    for (_, *a), (_, *b) in zip(log_of(tmp_path/'one'), log_of(tmp_path/'two')): assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-5)
    one, two = (torch.load(tmp_path/f/'checkpoint-4'/'optimizer.pt', weights_only=True)['state'] for f in ('one', 'two'))
    for k, own in one.items():
        for moment, v in own.items(): assert type(two[k][moment]) is torch.Tensor and v.shape == two[k][moment].shape


def best(folder, n, size, options, resume=False):
    "The first update is the best one: the rate is far too high."
    train_divided(folder, n, size, dict(learning_rate=50., max_steps=3, save_steps=1, eval_steps=1, eval_strategy='steps', load_best_model_at_end=True,
                                        metric_for_best_model='eval_loss', greater_is_better=False, save_total_limit=4, **options), resume)


@pytest.mark.parametrize('options', [{}, dict(train_language_model=True)], ids=['LoRA', 'full'])
def test_the_best_weights_come_back(options, tmp_path):
    together(tmp_path, best, 7, 2, dict(zero_stage=3, **options))
    state = json.loads((tmp_path/'two'/'trainer_state.json').read_text())
    losses = {e['step']: e['eval_loss'] for e in state['log_history'] if 'eval_loss' in e}
    first = min((s for s in losses if s < 4), key=losses.get)
    assert state['best_global_step'] == first < 3
    a, b = weights(tmp_path/'two'/'mine'), weights(tmp_path/'two'/f'checkpoint-{first}'/'mine')
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert math.isclose(json.loads((tmp_path/'two'/'measured.json').read_text())['eval_loss'], losses[first], rel_tol=1e-3)


def full(folder, n, size, options, resume=False):
    "Full fine-tuning with the tower, whose base is written as well."
    train_divided(folder, n, size, dict(train_language_model=True, train_tower=True, learning_rate=1e-3, max_steps=2, save_steps=1, **options), resume)


def test_full_fine_tuning_in_pieces(tmp_path):
    from safetensors.torch import load_file
    full(tmp_path/'one', 7, 4, {})
    together(tmp_path, full, 7, 2, dict(zero_stage=3))
    same_curve(tmp_path/'one', tmp_path/'two')
    a, b = (load_file(tmp_path/f/'base'/'model.safetensors') for f in ('one', 'two'))
    assert a.keys() == b.keys()
    for k in a: assert_close(a[k].float(), b[k].float(), rtol=0, atol=1e-4)
    shutil.rmtree(tmp_path/'two'/'checkpoint-2')
    together(tmp_path, full, 7, 2, dict(zero_stage=3), True)
    same_curve(tmp_path/'one', tmp_path/'two')


def cached(folder, n, size, options, resume=False): train_divided(folder, n, size, dict(vision_cache=str(folder.parent/'features'), **options), resume)


def test_a_vision_cache(tmp_path):
    train_divided(tmp_path/'one', 7, 4, {})
    together(tmp_path, cached, 7, 2, dict(zero_stage=3))
    for (_, *a), (_, *b) in zip(log_of(tmp_path/'one'), log_of(tmp_path/'two')): assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-4)



def test_one_process_cannot_divide(tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    monkeypatch.setenv('FSDP_VERSION', '2')
    with pytest.raises(ValueError, match='this run has one; start several with torchrun'): trainer(tmp_path/'x')
