"Training against the reference's numbers; and a run that is killed and goes on, bit for bit."
import json, math, multiprocessing, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from torch.testing import assert_close
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import integration_utils

from llava_reward_nb.core import CheckpointError, InputError
from llava_reward_nb.weights import MODELS
from llava_reward_nb.files import read_table
from llava_reward_nb.data import load_records
from llava_reward_nb.model import PerspectiveConfig, RewardModel
from llava_reward_nb.phi3v import Phi3VModel
from llava_reward_nb.shapes.records import alignment_pairs, safety_labels, write_records
from llava_reward_nb.trainer import RewardTrainer, train_perspective
from llava_reward_nb.config import RewardConfig, planned_updates
from llava_reward_nb.batches import label_metrics, pairwise_accuracy
from llava_reward_nb.guards import checkpoints

TOL = dict(atol=2e-5, rtol=0)


def config(folder, **kw):
    "A small recipe on the CPU, quiet, without checkpoints."
    small = dict(use_cpu=True, disable_tqdm=True, save_strategy='no', per_device_train_batch_size=4, gradient_accumulation_steps=1,
                 lora_rank=8, lora_alpha=16, logging_steps=1, learning_rate=1e-3)
    return RewardConfig(**{**small, 'output_dir': str(folder), **kw})


def ours(name, perspective):
    "Our parameter for one that the reference names."
    name = name.removeprefix('model.')
    if name.startswith('vision_embed_tokens.img_projection.'):
        return name.replace('vision_embed_tokens.img_projection.', f'backbone.model.img_projection.modules_to_save.{perspective}.')
    if name.startswith('layers.'):
        return f'backbone.model.language_model.{name}'.replace('.default.', f'.{perspective}.')
    return f'heads.{perspective}.' + ('' if name.startswith('value_head') else 'skipca.') + name


@pytest.fixture
def toy_run(toy, golden, image, tmp_path):
    "Function from num_crops to a trainer of the toy reward on the golden pair, with the recipe's optimizer and a constant rate."
    def make(num_crops, **kw):
        rm = RewardModel.from_pretrained(toy/'adapter', base=toy/'base', device='cpu', num_crops=num_crops)
        pair = dict(prompt=golden['prompts']['p0'], chosen_path=image('sq_a'), reject_path=image('sq_b'))
        return RewardTrainer(rm, config(tmp_path/'run', learning_rate=2e-4, lr_scheduler_type='constant', warmup_steps=0, max_steps=1, **kw), [pair])
    return make


@pytest.mark.parametrize('num_crops', [1, 4])
def test_loss_and_gradients(toy_run, golden, num_crops):
    want, t = golden['gradients'][f'num_crops_{num_crops}'], toy_run(num_crops)
    rm = t.model.train()
    loss, vectors = t.compute_loss(rm, t.data_collator(t.train_dataset[:1]), return_outputs=True)
    assert_close(vectors, torch.tensor(want['rewards']), **TOL)
    assert_close(t.loss.prob(*vectors.chunk(2)).item(), want['prob'], **TOL)
    assert_close(loss.item(), want['loss'], **TOL)
    loss.backward()
    mine = {n: p.grad for n, p in rm.named_parameters() if p.requires_grad}
    assert {ours(n, rm.active) for n in want['grad_norm']} == set(mine)
    for n, norm in want['grad_norm'].items(): assert_close(mine[ours(n, rm.active)].norm().item(), norm, rtol=1e-4, atol=0, msg=lambda m: f'{n}: {m}')
    for n, first in want['grad_first4'].items():
        g = mine[ours(n, rm.active)]
        assert_close(g.flatten()[:4], torch.tensor(first), rtol=1e-4, atol=1e-5*g.abs().max().item(), msg=lambda m: f'{n}: {m}')
    assert_close(torch.stack([g.norm() for g in mine.values()]).norm().item(), want['global_grad_norm'], rtol=1e-4, atol=0)


def test_one_step_of_the_recipe(toy_run, golden):
    want, t = golden['gradients']['one_adamw_step_all_trainable'], toy_run(1)
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.train()
    log = t.state.log_history[0]
    assert_close(log['grad_norm'], want['norm_before_clip'], rtol=1e-4, atol=0)
    assert log['learning_rate'] == want['lr']
    after = torch.tensor(want['rewards_after'])
    pair = t.train_dataset[0]
    got = t.model.embed([pair['chosen_path'], pair['reject_path']], pair['prompt'])
    assert_close(got, after, **TOL)
    assert_close(t.loss.loss(*got.chunk(2)).item(), want['loss_after'], **TOL)
    stayed = [n for n, p in t.model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    moved = [n for n, p in t.model.named_parameters() if not p.requires_grad and not torch.equal(p, before[n])]
    assert not stayed and not moved


def test_schedule(golden, tmp_path):
    want = golden['schedule']
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu').add_perspective('mine', lora_rank=2)
    t = RewardTrainer(rm, RewardConfig(str(tmp_path), use_cpu=True), load_records(alignment_pairs(1, seed=0)))
    t.create_optimizer_and_scheduler(want['max_steps'])
    used = []
    for _ in range(want['max_steps']):
        used.append(t.lr_scheduler.get_last_lr()[0])
        t.optimizer.step(); t.lr_scheduler.step()
    assert t.args.get_warmup_steps(want['max_steps']) == want['warmup']
    assert_close(torch.tensor(used), torch.tensor(want['lr_used_at_step']), rtol=1e-6, atol=1e-12)
    assert_close(t.lr_scheduler.get_last_lr()[0], want['lr_after_last'], rtol=0, atol=1e-12)


def test_metrics(golden):
    g = golden['metrics']
    m = pairwise_accuracy(g['pairwise_probs'])
    assert (m['accuracy'], m['accuracy_without_ties']) == (g['accuracy_all'], g['accuracy_without_ties'])
    m = label_metrics(torch.tensor(g['unpaired_rewards']).sigmoid(), g['labels'])
    assert m == {k: g[k] for k in ('accuracy', 'f1', 'recall')}


def weights(folder):
    "All trained tensors of a saved perspective."
    from safetensors.torch import load_file
    return {f'{f}/{k}': v for f in ('adapter_model', 'head') for k, v in load_file(Path(folder)/f'{f}.safetensors').items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tiny(**kw): return RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu', **kw)


def test_base_in_bfloat16_leaves_what_is_trained_in_float32(tmp_path):
    pairs, rm = load_records(alignment_pairs(8, seed=0)), tiny(dtype=torch.bfloat16)
    m = train_perspective(rm, 'mine', pairs, config(tmp_path, num_train_epochs=4), eval_records=pairs)
    kinds = {n: p.dtype for n, p in rm.named_parameters()}
    assert {d for n, d in kinds.items() if rm.get_parameter(n).requires_grad} == {torch.float32}
    assert kinds['backbone.model.language_model.embed_tokens.weight'] == torch.bfloat16
    assert {v.dtype for v in weights(tmp_path/'mine').values()} == {torch.float32}
    log = [l['loss'] for l in json.loads((tmp_path/'trainer_state.json').read_text())['log_history'] if 'loss' in l]
    assert sum(log[-2:]) < sum(log[:2]) and m['eval_loss'] < log[0]


def test_best_checkpoint_comes_back(tmp_path):
    pairs, held = load_records(alignment_pairs(12, seed=0)), load_records(alignment_pairs(8, seed=1))
    rm = tiny().add_perspective('mine', lora_rank=8)
    t = RewardTrainer(rm, config(tmp_path, num_train_epochs=2, learning_rate=5e-3, eval_strategy='epoch', save_strategy='epoch', load_best_model_at_end=True), pairs, held)
    t.train()
    best = min(l['eval_loss'] for l in t.state.log_history if 'eval_loss' in l)
    assert_close(t.evaluate()['eval_loss'], best, rtol=1e-5, atol=0)
    now = weights(rm.save_perspective('mine', tmp_path/'now'))
    assert same(now, weights(Path(t.state.best_model_checkpoint)/'mine'))


def test_the_best_weights_are_never_replaced_by_others(tmp_path):
    "A run whose best checkpoint is missing is refused; a card tells of the best update."
    pairs, held = load_records(alignment_pairs(12, seed=0)), load_records(alignment_pairs(8, seed=1))
    class Worse(RewardTrainer):
        def evaluate(self, *args, **kw):
            metrics = super().evaluate(*args, **kw)
            metrics['eval_loss'] = float(self.state.global_step) # best at the first evaluation
            return metrics
    def make(save, last, **kw):
        args = config(tmp_path/'run', max_steps=last, eval_strategy='steps', eval_steps=1, save_strategy='steps', save_steps=save, logging_steps=1,
                      metric_for_best_model='loss', **kw)
        return Worse(tiny().add_perspective('mine', lora_rank=8), args, pairs, held)
    plain = make(2, 4)
    plain.train()
    assert plain.state.best_global_step == 1 and plain.state.best_model_checkpoint is None
    with pytest.raises(CheckpointError, match='checkpoint-1: the best checkpoint is not there'): make(1, 4, load_best_model_at_end=True).train(True)
    shutil.rmtree(tmp_path/'run')
    best = make(1, 2, load_best_model_at_end=True)
    best.train()
    facts, first = best.facts(), [entry for entry in best.state.log_history if 'loss' in entry][0]
    assert facts.settings['updates'] == 1 and facts.metrics['training loss'] == f"{first['loss']:.4g}, logged at update 1"


@pytest.mark.parametrize('kind,dim,gate', [('bt', 1, False), ('gpm', 2, False), ('gpm', 4, True)])
@pytest.mark.parametrize('skipca', [True, False])
def test_every_head_learns_all_its_weights(kind, dim, gate, skipca, tmp_path):
    rm = tiny().add_perspective('mine', PerspectiveConfig(kind, dim, skipca=skipca, gate=gate), lora_rank=4)
    before = {n: p.detach().clone() for n, p in rm.named_parameters()}
    RewardTrainer(rm, config(tmp_path, max_steps=2, lr_scheduler_type='constant', warmup_steps=0), load_records(alignment_pairs(4, seed=0))).train()
    moved = {n for n, p in rm.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in rm.named_parameters() if p.requires_grad}
    assert any('.gate.' in n for n in moved) == gate and any('skipca' in n for n in moved) == skipca


@pytest.mark.parametrize('n', [12, 17, 32])
def test_the_default_recipe_teaches_whatever_its_length(n, tmp_path):
    rm = tiny().add_perspective('mine')
    before = {k: p.detach().clone() for k, p in rm.named_parameters() if p.requires_grad}
    t = RewardTrainer(rm, RewardConfig(str(tmp_path), use_cpu=True, save_strategy='no', logging_steps=1), load_records(alignment_pairs(n, seed=0)))
    t.train()
    rates = [l['learning_rate'] for l in t.state.log_history if 'loss' in l]
    assert len(rates) == t.state.max_steps == (1 if n == 12 else 2) and min(rates) > 0 and rates[0] == 2e-4
    stayed = {k for k, p in rm.named_parameters() if p.requires_grad and torch.equal(p, before[k])}
    # B is 0 before the first update, and the gradient of A is a product with B
    assert stayed == ({k for k in before if 'lora_A' in k} if n == 12 else set())


def test_partial_accumulation_is_an_update(tmp_path):
    rm = tiny().add_perspective('mine', lora_rank=4)
    t = RewardTrainer(rm, config(tmp_path, gradient_accumulation_steps=8, max_steps=-1), load_records(alignment_pairs(6, seed=0)))
    t.train()
    assert t.state.global_step == planned_updates(t.args, 6) == 1


@pytest.mark.parametrize('records,why', [
    (lambda: [{**r, 'c_rate': 3, 'r_rate': 3} for r in alignment_pairs(3, seed=0)], 'ties'),
    (lambda: [{**r, 'reject_path': r['chosen_path']} for r in alignment_pairs(3, seed=0)], 'both images are the same'),
    (lambda: [{**r, 'label': False} for r in safety_labels(3, seed=0)], 'labels are 0')])
def test_records_that_teach_nothing(records, why, tmp_path):
    rm = tiny()
    with pytest.raises(ValueError, match=why): train_perspective(rm, 'mine', records(), config(tmp_path/'run'))
    assert not rm.configs and not (tmp_path/'run').exists()


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    grads = {}
    for name in 'plain', 'saving':
        torch.manual_seed(0)
        rm = tiny().add_perspective('mine', lora_rank=4, lora_dropout=.1)
        t = RewardTrainer(rm, config(tmp_path), load_records(alignment_pairs(4, seed=0)))
        if name == 'saving': rm.activation_checkpointing_enable()
        rm.train()
        torch.manual_seed(1)
        t.compute_loss(rm, t.data_collator(t.train_dataset[:4])).backward()
        grads[name] = {n: p.grad for n, p in rm.named_parameters() if p.requires_grad}
    for n, g in grads['plain'].items(): assert_close(grads['saving'][n], g, rtol=1e-4, atol=1e-6*float(g.abs().max()), msg=lambda m: f'{n}: {m}')
    assert any(g.abs().max() > 0 for g in grads['plain'].values())


def test_spawned_workers_give_the_same_weights(tmp_path):
    pairs, out = load_records(write_records(alignment_pairs(8, seed=0), tmp_path/'pairs')), {}
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method('spawn', force=True)
    try:
        for workers in 0, 1:
            train_perspective(tiny(), 'mine', pairs, config(tmp_path/str(workers), max_steps=2, dataloader_num_workers=workers))
            out[workers] = weights(tmp_path/str(workers)/'mine')
    finally: multiprocessing.set_start_method(usual, force=True)
    assert out[0].keys() == out[1].keys()
    for k in out[0]: assert_close(out[0][k], out[1][k], rtol=1e-5, atol=1e-7)


def test_a_file_that_vanishes_is_named_by_a_worker(tmp_path):
    pairs = load_records(write_records(alignment_pairs(8, seed=0), tmp_path/'pairs'))
    gone = pairs[5]['chosen_path']
    rm = tiny().add_perspective('mine', lora_rank=4)
    t = RewardTrainer(rm, config(tmp_path/'run', dataloader_num_workers=1), pairs)
    recipe, t.recipe = t.recipe(), lambda: recipe
    gone.unlink()
    with pytest.raises(InputError) as e: t.train()
    assert str(e.value).startswith(f'record 5, chosen_path: {gone}: no such file') and 'no checkpoint yet' in str(e.value)


def test_a_half_precision_base_whose_tower_gives_float32(tmp_path, monkeypatch):
    "As on a GPU, where autocast runs layer norms in float32; the CPU's does not."
    crops = Phi3VModel.crop_features
    monkeypatch.setattr(Phi3VModel, 'crop_features', lambda self, x: crops(self, x).float())
    rm = tiny(dtype=torch.bfloat16).add_perspective('mine', lora_rank=4)
    before = {k: p.detach().clone() for k, p in rm.named_parameters() if p.requires_grad}
    t = RewardTrainer(rm, config(tmp_path, bf16=True, max_steps=2), load_records(alignment_pairs(4, seed=0)))
    t.train()
    losses = [l['loss'] for l in t.state.log_history if 'loss' in l]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(not torch.equal(p, before[k]) for k, p in rm.named_parameters() if p.requires_grad)
    assert {p.dtype for p in rm.parameters() if p.requires_grad} == {torch.float32}
    x = t.train_dataset[0]
    assert rm(x['chosen_path'], x['prompt']).isfinite().all()


@pytest.mark.parametrize('change', ['image', 'prompt', 'order', 'base', 'dropout'])
def test_resume_knows_its_run(change, tmp_path):
    rows = read_table(write_records(alignment_pairs(8, seed=0), tmp_path/'pairs'))
    def run(rows, resume, base=None, dropout=.05):
        rm = tiny()
        if base: rm.backbone.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] += .01
        args = config(tmp_path/'run', max_steps=2, save_strategy='steps', save_steps=1, lora_dropout=dropout)
        return train_perspective(rm, 'mine', load_records(rows, folder=tmp_path/'pairs'), args, resume=resume)
    run(rows, False)
    shutil.rmtree(tmp_path/'run'/'checkpoint-2')
    if change == 'image': # the same name, another picture
        path = tmp_path/'pairs'/rows[3]['chosen_path']
        path.write_bytes((tmp_path/'pairs'/rows[3]['reject_path']).read_bytes())
    if change == 'prompt': rows[2]['prompt'] += ' '
    if change == 'order': rows = rows[::-1]
    why = dict(base='base ', dropout='lora_dropout ').get(change, 'records ')
    with pytest.raises(CheckpointError, match=f'another run \\({why}'):
        run(rows, True, base=change == 'base', dropout=.1 if change == 'dropout' else .05)


def test_ctrl_c_keeps_the_last_checkpoint_and_says_how_to_go_on(tmp_path):
    pairs = write_records(alignment_pairs(16, seed=0), tmp_path/'pairs')
    command = [sys.executable, '-c', 'from llava_reward_nb.commands.train import llava_reward_train; llava_reward_train()', str(pairs), '--name', 'mine', '--out', str(tmp_path/'run'),
               '--batch-size', '1', '--accumulation', '1', '--lora-rank', '4', '--device', 'cpu', '--save-steps', '2', '--epochs', '200']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not checkpoints(tmp_path/'run') and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    kept = list(checkpoints(tmp_path/'run'))
    assert process.returncode == 130 and kept, said
    assert f'{kept[-1]} is kept: the same command with --resume goes on' in said and said.endswith('interrupted\n')


def test_a_trained_perspective_is_trained_further(tmp_path):
    pairs = load_records(alignment_pairs(8, seed=0))
    train_perspective(tiny(), 'mine', pairs, config(tmp_path/'one'))
    old = weights(tmp_path/'one'/'mine')
    rm = RewardModel.from_pretrained(tmp_path/'one', base=MODELS['tiny']/'base', device='cpu')
    train_perspective(rm, 'mine', pairs, config(tmp_path/'two', learning_rate=1e-6))
    new = weights(tmp_path/'two'/'mine')
    assert same(weights(tmp_path/'one'/'mine'), old) and not same(new, old)
    for k in old: assert_close(new[k], old[k], rtol=0, atol=1e-5) # it began where the other ended
    rm = RewardModel.from_pretrained(tmp_path/'one', base=MODELS['tiny']/'base', device='cpu')
    RewardTrainer(rm, config(tmp_path/'three', learning_rate=1e-6), pairs).train() # the same, without train_perspective
    for k, v in weights(rm.save_perspective('mine', tmp_path/'a3')).items(): assert_close(v, new[k], rtol=0, atol=1e-7)


def card(folder): return (folder/'README.md').read_text()


def test_a_card_tells_only_what_was_measured_on_its_weights(tmp_path):
    pairs, held = load_records(alignment_pairs(12, seed=0)), load_records(alignment_pairs(8, seed=1))
    args = config(tmp_path, max_steps=4, learning_rate=5e-3, eval_strategy='steps', eval_steps=2, save_strategy='steps', save_steps=1, save_total_limit=9)
    t = RewardTrainer(tiny().add_perspective('mine', lora_rank=8), args, pairs, held)
    t.train()
    log = {l['step']: l for l in t.state.log_history if 'eval_loss' in l}
    for step in range(1, 5):
        text = card(tmp_path/f'checkpoint-{step}'/'mine')
        assert f'| updates | {step} |' in text and 'Learnt from records: 12 pairs, hash' in text and '| lora_rank | 8 |' in text
        if step % 2: assert 'eval_' not in text and 'training loss' in text
        else: assert f"| eval_loss | {log[step]['eval_loss']:.4g} on records (8 pairs) |" in text and 'runtime' not in text
    t._load_from_checkpoint(str(tmp_path/'checkpoint-2'))
    assert not any('eval' in k for k in t.facts().metrics)
    t.evaluate()
    t.save_model()
    assert f"| eval_accuracy | {log[2]['eval_accuracy']:.4g} on records (8 pairs) |" in card(tmp_path/'mine')


def test_an_edited_card_neither_stops_a_run_nor_is_lost(tmp_path):
    pairs, args = load_records(alignment_pairs(8, seed=0)), dict(max_steps=4, save_strategy='steps', save_steps=2)
    train_perspective(tiny(), 'mine', pairs, config(tmp_path, **args), eval_records=pairs)
    shutil.rmtree(tmp_path/'checkpoint-4')
    for folder in 'checkpoint-2/mine', 'mine': (tmp_path/folder/'README.md').write_text(f'# My notes on {folder}\n')
    want = weights(tmp_path/'mine')
    train_perspective(tiny(), 'mine', pairs, config(tmp_path, **args), eval_records=pairs, resume=True)
    assert same(weights(tmp_path/'mine'), want)
    assert card(tmp_path/'mine') == '# My notes on mine\n'
    assert 'eval_' not in card(tmp_path/'checkpoint-4'/'mine') and '| updates | 4 |' in card(tmp_path/'checkpoint-4'/'mine')


def test_a_card_names_files_without_their_folders(tmp_path):
    files = [write_records(alignment_pairs(4, seed=k), tmp_path/f'pairs {k}') for k in range(2)]
    pairs = load_records(files[0])+load_records(files[1])
    train_perspective(tiny(), 'mine', pairs, config(tmp_path/'run', max_steps=1))
    text = card(tmp_path/'run'/'mine')
    assert f'Learnt from {files[0].name} + {files[1].name}: 8 pairs, hash' in text and str(tmp_path) not in text.split('## Training')[1]


@pytest.mark.parametrize('prob, label, error', [([.2, math.nan], [0, 1], 'NaN'), ([.2, .7], [0, 2], '0 or 1'), ([.2], [0, 1], '1 probabilities and 2 labels')])
def test_metrics_of_what_cannot_be_measured(prob, label, error):
    with pytest.raises(ValueError, match=error): label_metrics(prob, label)
    if math.nan in prob:
        with pytest.raises(ValueError, match=error): pairwise_accuracy(prob)


def stops_after(step):
    "A callback that ends a run in the middle."
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): control.should_training_stop = state.global_step >= step
    return Stop()


def test_a_run_over_batches_of_like_length_goes_on_exactly(tmp_path):
    pairs = load_records([{**r, 'prompt': ' '.join([r['prompt']]*(1+i % 3))} for i, r in enumerate(alignment_pairs(12, seed=0))])
    def run(folder, callbacks=(), resume=None):
        torch.manual_seed(0)
        rm = tiny().add_perspective('mine', lora_rank=4)
        args = config(tmp_path/folder, num_train_epochs=2, train_sampling_strategy='group_by_length', save_strategy='steps', save_steps=2)
        RewardTrainer(rm, args, pairs, callbacks=list(callbacks)).train(resume)
        return {n: p.detach() for n, p in rm.named_parameters() if p.requires_grad}
    straight = run('straight')
    run('stopped', [stops_after(4)])
    shutil.rmtree(tmp_path/'stopped'/'checkpoint-4') # it goes on in the middle of the first epoch
    assert same(run('stopped', resume=True), straight)


def scripted(accuracies, **kw):
    "A trainer that measures what it is told, a number for each update."
    class Scripted(RewardTrainer):
        def metrics(self, seen): return dict(accuracy=accuracies[self.state.global_step-1])
    def make(folder, callbacks=(), **more):
        usual = dict(max_steps=len(accuracies), eval_strategy='steps', eval_steps=1, save_strategy='steps', save_steps=1, save_total_limit=9,
                     metric_for_best_model='accuracy')
        args = config(folder, **{**usual, **kw, **more})
        pairs = load_records(alignment_pairs(8, seed=0))
        return Scripted(tiny().add_perspective('mine', lora_rank=4), args, pairs, pairs[:2], callbacks=list(callbacks))
    return make


def test_early_stopping_the_most_accurate_update_and_a_tracker(tmp_path, monkeypatch):
    seen = []
    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kw): seen.append(json.loads(model.config.to_json_string()))
        def on_log(self, args, state, control, logs=None, **kw): seen.append(dict(logs, step=state.global_step))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, 'fake', Tracker)
    t = scripted([.5, .9, .7, .6, .95], load_best_model_at_end=True, report_to='fake')(tmp_path, [EarlyStoppingCallback(early_stopping_patience=2)])
    t.train()
    assert (t.state.global_step, t.state.best_global_step) == (4, 2)
    now = weights(t.model.save_perspective('mine', tmp_path/'now'))
    assert same(now, weights(tmp_path/'checkpoint-2'/'mine')) and not same(now, weights(tmp_path/'checkpoint-4'/'mine'))
    assert seen[0]['loss'] == 'bt' and {x['step']: x['eval_accuracy'] for x in seen if 'eval_accuracy' in x} == {1: .5, 2: .9, 3: .7, 4: .6}
    assert [x['step'] for x in seen if 'loss' in x and 'grad_norm' in x] == [1, 2, 3, 4]


def test_a_metric_that_is_never_a_number_is_an_error(tmp_path):
    make = scripted([math.nan]*2)
    with pytest.raises(ValueError, match='eval_accuracy was nan, nan in 2 measurements, so no update is the best; the last good checkpoint is .*checkpoint-2'):
        make(tmp_path, load_best_model_at_end=True).train()
    make(tmp_path).train(True) # as the error says
    with pytest.raises(ValueError, match='no update is the best; the last good checkpoint is .*checkpoint-2'):
        make(tmp_path/'best', load_best_model_at_end=True, save_strategy='best').train()


def test_one_pass_over_both_images_equals_two(tmp_path):
    torch.manual_seed(0)
    rm = tiny().add_perspective('mine', lora_rank=4)
    t = RewardTrainer(rm, config(tmp_path), load_records(alignment_pairs(3, seed=0)))
    rows = t.train_dataset.rows
    grads = []
    for passes in 1, 2:
        rm.zero_grad()
        if passes == 1: loss = t.compute_loss(rm, {k: v for k, v in t.data_collator(rows).items() if k != 'places'})
        else:
            scores = [rm(**rm.backbone.encode([r[side] for r in rows], [r['prompt'] for r in rows])) for side in ('chosen_path', 'reject_path')]
            loss = t.loss.loss(*scores, torch.tensor([float(r['target']) for r in rows]))
        loss.backward()
        grads.append([loss.detach()]+[p.grad.clone() for p in rm.parameters() if p.requires_grad])
    for a, b in zip(*grads): assert_close(a, b, rtol=1e-3, atol=1e-5*float(b.abs().max())+1e-8)
