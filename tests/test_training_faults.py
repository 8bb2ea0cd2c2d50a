"What a training survives: SIGKILL at any file operation, SIGTERM, a full disk, damaged checkpoints, broken images and numbers; and several processes as one."
import contextlib, errno, math, multiprocessing, os, shutil, signal, socket, sys, time, warnings
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from llava_reward_nb.core import InputError
from llava_reward_nb.data import load_records
from llava_reward_nb.guards import checkpoints, clear_drafts, last_checkpoint
from llava_reward_nb.model import RewardModel
from llava_reward_nb.shapes.records import alignment_pairs, write_records
from llava_reward_nb.store import file_hash
from llava_reward_nb.trainer import RewardConfig, RewardTrainer, train_perspective
from llava_reward_nb.weights import MODELS

# processes that have imported everything before they are forked, and have computed nothing
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['test_training_faults'])
signals = pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')


def config(folder, **kw):
    "A recipe of six updates in two epochs, with dropout and three checkpoints."
    small = dict(use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, gradient_accumulation_steps=1, num_train_epochs=2, lora_rank=4,
                 lora_alpha=8, lora_dropout=.05, logging_steps=1, learning_rate=1e-3, save_strategy='steps', save_steps=2)
    return RewardConfig(**{**small, 'output_dir': str(folder), **kw})


def train(folder, resume=False, n=6, pairs=None, callbacks=(), **kw):
    "Train the tiny model on a few pairs; the same weights whenever nothing else is said."
    torch.set_num_threads(1)
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu')
    pairs = pairs or load_records(alignment_pairs(n, seed=3))
    return train_perspective(rm, 'mine', pairs, config(folder, **kw), resume=resume, callbacks=list(callbacks))


def trainer(folder, callbacks=(), **kw):
    torch.manual_seed(0)
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu').add_perspective('mine', lora_rank=4, lora_dropout=.05)
    return RewardTrainer(rm, config(folder, **kw), load_records(alignment_pairs(6, seed=3)), callbacks=list(callbacks))


def weights(folder): return {f'{f}/{k}': v for f in ('adapter_model', 'head') for k, v in load_file(Path(folder)/f'{f}.safetensors').items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tree(folder): return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(Path(folder).rglob('*')) if p.is_file() and p.name != '.lock'}


def names(folder): return [p.name for p in checkpoints(folder)]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "A run's folder, and what its folder was at each file operation on the way."
    folder, seen = tmp_path_factory.mktemp('uninterrupted')/'run', tmp_path_factory.mktemp('moments')
    with at_each_file_operation(folder, lambda k: shutil.copytree(folder, seen/f'{k:03d}', symlinks=True)): train(folder)
    return folder, sorted(seen.iterdir())


# File operations: Python tells of each before it is done

_watched = dict(folder=None, do=None, count=0)


def _hook(event, args):
    if _watched['folder'] is None or event not in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir'): return
    if event == 'open' and isinstance(args[1], str) and not set(args[1]) & set('wax+'): return
    if not isinstance(args[0], (str, os.PathLike)) or not str(args[0]).startswith(_watched['folder']): return
    do, _watched['folder'] = _watched['do'], None # what is done now is not watched
    folder = at_each_file_operation.folder
    try: do(_watched['count'])
    finally: _watched.update(folder=folder, count=_watched['count']+1)


@contextlib.contextmanager
def at_each_file_operation(folder, do):
    "Call do(0), do(1), … before each creation, renaming or removal below a folder; an exception of it stops the operation."
    if not hasattr(at_each_file_operation, 'added'): sys.addaudithook(_hook)
    at_each_file_operation.added, at_each_file_operation.folder = True, str(folder)
    _watched.update(folder=str(folder), do=do, count=0)
    try: yield _watched
    finally: _watched['folder'] = None


def test_killed_at_any_file_operation(uninterrupted, tmp_path):
    "What is left is a good checkpoint, never older than the last but one; a few of the moments go on to the same weights."
    run, moments = uninterrupted
    assert len(moments) > 60, 'the run and its three checkpoints need many operations'
    newest = {}
    for moment in moments:
        copy = shutil.copytree(moment, tmp_path/moment.name)
        clear_drafts(copy)
        with warnings.catch_warnings():
            warnings.simplefilter('error') # a kill damages nothing
            newest[moment] = last_checkpoint(copy)
        assert not [p for p in copy.rglob('*') if '.draft' in str(p)]
    found = [p.name if p else '' for p in newest.values()]
    assert found == sorted(found) and set(found) == {'', 'checkpoint-2', 'checkpoint-4', 'checkpoint-6'}
    assert not (moments[-1]/'mine').exists() or tree(moments[-1]/'mine') == tree(run/'mine') # the result, too, is whole or not there
    for name in 'checkpoint-2', 'checkpoint-6':
        moment = [m for m, p in newest.items() if p and p.name == name][-1]
        train(copy := shutil.copytree(moment, tmp_path/name), resume=True)
        assert same(weights(copy/'mine'), weights(run/'mine'))
        assert names(copy) == ['checkpoint-4', 'checkpoint-6'] and not list(copy.glob('.checkpoint*'))


class Kill(TrainerCallback):
    "SIGKILL in the middle of an update."
    def on_pre_optimizer_step(self, args, state, control, **kw):
        if state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder, half_written):
    if half_written:
        save = torch.save
        def dying(thing, path, *args):
            save(thing, path, *args)
            if 'checkpoint-4' in str(path) and 'optimizer' in str(path):
                os.truncate(path, os.path.getsize(path)//2)
                os.kill(os.getpid(), signal.SIGKILL)
        torch.save = dying
    train(folder, callbacks=[] if half_written else [Kill()])


def start(f, *args, env=()):
    process = FORKS.Process(target=_with_env, args=(dict(env), f, args))
    process.start()
    return process


def _with_env(env, f, args):
    os.environ.update(env)
    torch.set_num_threads(1)
    f(*args)


@signals
@pytest.mark.parametrize('half_written', [False, True], ids=['in an update', 'in a file of a checkpoint'])
def test_killed(half_written, uninterrupted, tmp_path):
    process = start(train_and_die, tmp_path/'run', half_written)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path/'run') == ['checkpoint-2'] if half_written else ['checkpoint-2', 'checkpoint-4']
    train(tmp_path/'run', resume=True)
    assert same(weights(tmp_path/'run'/'mine'), weights(uninterrupted[0]/'mine'))


class Wait(TrainerCallback):
    "After an update, say so, and wait for the signal."
    def __init__(self, folder, step, waits=True): self.folder, self.step, self.waits = Path(folder), step, waits
    def on_step_begin(self, args, state, control, **kw):
        if state.global_step != self.step: return
        (self.folder/f'here-{args.process_index}').touch()
        while self.waits and not (self.folder/'sent').exists(): time.sleep(.01)
        time.sleep(.1)


def train_and_wait(folder, step, waits=True): train(folder/'run', callbacks=[Wait(folder, step, waits)], num_train_epochs=2)


def wait_for(*files):
    while not all(f.exists() for f in files): time.sleep(.01)


@signals
def test_sigterm_saves_and_exits_with_143(uninterrupted, tmp_path):
    process = start(train_and_wait, tmp_path, 2)
    wait_for(tmp_path/'here-0')
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path/'sent').touch()
    process.join()
    assert process.exitcode == 143 and names(tmp_path/'run') == ['checkpoint-2', 'checkpoint-3']
    train(tmp_path/'run', resume=True)
    assert same(weights(tmp_path/'run'/'mine'), weights(uninterrupted[0]/'mine'))


def pair_of_processes(f, *args):
    "Two processes as torchrun would start them."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    common = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [start(f, *args, env=dict(common, RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]


def finish_together(folder, f, *args):
    "gloo's threads may abort a process that winds down: all wait for all, then leave at once."
    code = 0
    try: f(*args)
    except SystemExit as e: code = e.code
    rank = os.environ['RANK']
    (folder/f'done-{rank}').touch()
    wait_for(folder/'done-0', folder/'done-1')
    os._exit(code)


@signals
def test_sigterm_to_one_of_two_processes(tmp_path):
    (tmp_path/'two').mkdir()
    both = pair_of_processes(finish_together, tmp_path, train_and_wait, tmp_path/'two', 2)
    wait_for(tmp_path/'two'/'here-0', tmp_path/'two'/'here-1')
    os.kill(both[1].pid, signal.SIGTERM)
    (tmp_path/'two'/'sent').touch()
    for p in both: p.join()
    assert [p.exitcode for p in both] == [143, 143]
    (last,) = list(checkpoints(tmp_path/'two'/'run'))[-1:]
    assert (last/'rng_state_0.pth').exists() and (last/'rng_state_1.pth').exists() and last.name == 'checkpoint-3'
