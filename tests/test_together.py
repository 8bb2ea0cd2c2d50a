"Several perspectives in one run, in two processes: the loss curves of one, also where a process has no record of a perspective."
import shutil

import pytest, torch
from torch.testing import assert_close

from llava_reward_nb.data import load_records
from llava_reward_nb.model import RewardModel
from llava_reward_nb.shapes.records import alignment_pairs, safety_labels
from llava_reward_nb.together import train_together
from llava_reward_nb.weights import MODELS
from test_training_faults import config, finish_together, pair_of_processes, weights
import json

PLAIN = dict(gradient_accumulation_steps=1, lora_dropout=0., optim='sgd', lr_scheduler_type='constant', warmup_steps=0, learning_rate=.05, num_train_epochs=2)


def train_both(folder, size, resume=False):
    "Five pairs and two labels: with one item in each batch, most updates lack labels in one process, and some in both."
    torch.set_num_threads(1)
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu')
    sets = dict(alignment=load_records(alignment_pairs(5, seed=3)), safety=load_records(safety_labels(2, seed=3)))
    held = dict(alignment=load_records(alignment_pairs(3, seed=5)), safety=load_records(safety_labels(3, seed=5)))
    train_together(rm, sets, config(folder, per_device_train_batch_size=size, per_device_eval_batch_size=size, **{**PLAIN, 'save_steps': 4}), eval_records=held, resume=resume)


def log_of(folder):
    return [{k: v for k, v in e.items() if k in ('step', 'loss', 'grad_norm', 'alignment_loss', 'safety_loss', 'eval_alignment_loss', 'eval_safety_loss')}
            for e in json.loads((folder/'trainer_state.json').read_text())['log_history']]


@pytest.mark.parametrize('size', [1, 2])
def test_two_processes_have_the_loss_curves_of_one(size, tmp_path):
    train_both(tmp_path/'one', 2*size)
    for resume in (False, True)[:3-size]: # from a checkpoint too
        for done in tmp_path.glob('done-*'): done.unlink()
        for p in (both := pair_of_processes(finish_together, tmp_path, train_both, tmp_path/'two', size, resume)): p.join()
        assert [p.exitcode for p in both] == [0, 0]
        one, two = log_of(tmp_path/'one'), log_of(tmp_path/'two')
        assert [e.keys() for e in one] == [e.keys() for e in two]
        for a, b in zip(one, two): assert_close(torch.tensor(list(a.values())), torch.tensor(list(b.values())), rtol=1e-3, atol=1e-5)
        for name in 'alignment', 'safety':
            a, b = weights(tmp_path/'one'/name), weights(tmp_path/'two'/name)
            for k in a: assert_close(a[k], b[k], rtol=0, atol=1e-5)
        for found in [p for p in (tmp_path/'two').glob('checkpoint-*') if p.name != 'checkpoint-4']: shutil.rmtree(found)
