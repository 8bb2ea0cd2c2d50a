"What a training survives: SIGKILL at any file operation, SIGTERM, a full disk, damaged checkpoints, broken images and numbers; and several processes as one."
import contextlib, errno, json, math, multiprocessing, os, shutil, signal, socket, sys, time, warnings
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
from llava_reward_nb.store import file_hash, folder_lock
from llava_reward_nb.trainer import RewardTrainer, train_perspective
from llava_reward_nb.config import RewardConfig
from llava_reward_nb.weights import MODELS

# processes that have imported everything before they are forked, and have computed nothing
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['pytest', 'peft', 'llava_reward_nb.trainer', 'llava_reward_nb.shapes.records'])
signals = pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')


def config(folder, **kw):
    "A recipe of six updates in two epochs, with dropout, accumulation and three checkpoints."
    small = dict(use_cpu=True, disable_tqdm=True, per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=2, lora_rank=4,
                 lora_alpha=8, lora_dropout=.05, logging_steps=1, learning_rate=1e-3, save_strategy='steps', save_steps=2)
    return RewardConfig(**{**small, 'output_dir': str(folder), **kw})


def train(folder, resume=False, n=6, pairs=None, held=None, callbacks=(), **kw):
    "Train the tiny model on a few pairs; the same weights whenever nothing else is said."
    torch.set_num_threads(1)
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu')
    pairs = pairs or load_records(alignment_pairs(n, seed=3))
    return train_perspective(rm, 'mine', pairs, config(folder, **kw), eval_records=held, resume=resume, callbacks=list(callbacks))


def trainer(folder, callbacks=(), held=None, **kw):
    torch.manual_seed(0)
    rm = RewardModel.from_pretrained(MODELS['tiny']/'base', device='cpu').add_perspective('mine', lora_rank=4, lora_dropout=.05)
    return RewardTrainer(rm, config(folder, **kw), load_records(alignment_pairs(6, seed=3)), held, callbacks=list(callbacks))


def weights(folder): return {f'{f}/{k}': v for f in ('adapter_model', 'head') for k, v in load_file(Path(folder)/f'{f}.safetensors').items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tree(folder): return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(Path(folder).rglob('*')) if p.is_file() and p.name != '.lock'}


def names(folder): return [p.name for p in checkpoints(folder)]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "A run's folder, and what its folder was at each file operation on the way."
    folder, seen = tmp_path_factory.mktemp('uninterrupted')/'run', tmp_path_factory.mktemp('moments')
    folder.mkdir()
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
    assert train(copy, resume=True)['train_loss'] > 0 # a run that is done is left as it is
    assert same(weights(copy/'mine'), weights(run/'mine'))


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


def train_alike(folder, n, size, resume=False):
    "A run without dropout whose global batch is size times the number of processes; SGD shows gradients as weights."
    steps = dict(save_steps=3, max_steps=4) if n > 5 else {}
    held = load_records(alignment_pairs(5, seed=1))
    measured = train(folder, resume, n, held=held, per_device_train_batch_size=size, gradient_accumulation_steps=1, lora_dropout=0., optim='sgd',
                     lr_scheduler_type='constant', warmup_steps=0, learning_rate=.05, per_device_eval_batch_size=size, **steps)
    (folder/'measured.json').write_text(json.dumps({k: measured[k] for k in ('eval_accuracy', 'eval_mean_prob', 'eval_loss', 'train_loss')}))


def log_of(folder): return [(e['step'], e['loss'], e['grad_norm']) for e in json.loads((folder/'trainer_state.json').read_text())['log_history'] if 'loss' in e]


def same_curve(one, two):
    assert [s for s, *_ in log_of(one)] == [s for s, *_ in log_of(two)]
    for (_, *a), (_, *b) in zip(log_of(one), log_of(two)): assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-6)
    a, b = weights(one/'mine'), weights(two/'mine')
    for k in a: assert_close(a[k], b[k], rtol=0, atol=1e-6)
    a, b = (json.loads((f/'measured.json').read_text()) for f in (one, two))
    for k in a: assert math.isclose(a[k], b[k], rel_tol=1e-3), k


@pytest.mark.parametrize('n', [5, 7])
def test_two_processes_have_the_loss_curve_of_one(n, tmp_path):
    "Of seven pairs the last batch of two and two has three; of five it has one, and one process has none."
    train_alike(tmp_path/'one', n, 4)
    for p in (both := pair_of_processes(finish_together, tmp_path, train_alike, tmp_path/'two', n, 2)): p.join()
    assert [p.exitcode for p in both] == [0, 0]
    same_curve(tmp_path/'one', tmp_path/'two')
    if n != 7: return
    shutil.rmtree(tmp_path/'two'/'checkpoint-4')  # as if killed in the second epoch, after a checkpoint in the middle of it
    shutil.rmtree(tmp_path/'two'/'mine')
    for f in tmp_path.glob('done-*'): f.unlink()
    for p in (both := pair_of_processes(finish_together, tmp_path, train_alike, tmp_path/'two', n, 2, True)): p.join()
    assert [p.exitcode for p in both] == [0, 0]
    same_curve(tmp_path/'one', tmp_path/'two')


@signals
def test_one_run_in_a_folder(tmp_path):
    process = start(train_and_wait, tmp_path, 2)
    wait_for(tmp_path/'here-0')
    with pytest.raises(InputError, match='another process is at work'): trainer(tmp_path/'run').train(True)
    process.kill()
    process.join()
    assert names(tmp_path/'run') == ['checkpoint-2']
    with folder_lock(tmp_path/'run', wait=False): pass # it went with its process


# A full disk

def fill_up(folder):
    "After the first checkpoint no file may have more than 20 kB, as on a disk without room."
    import resource
    class Full(TrainerCallback):
        def on_save(self, args, state, control, **kw): resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try: train(folder/'run', callbacks=[Full()])
    except InputError as e: os.write(os.open(folder/'said', os.O_CREAT | os.O_WRONLY), str(e).encode())


@signals
def test_a_full_disk_leaves_the_last_checkpoint(uninterrupted, tmp_path):
    process = start(fill_up, tmp_path)
    process.join()
    said, run = (tmp_path/'said').read_text(), tmp_path/'run'
    assert f'{run}/checkpoint-4: cannot be written' in said and 'MB are free there' in said and f'the last good checkpoint is {run}/checkpoint-2' in said
    assert {p.name for p in run.iterdir()} == {'.lock', 'checkpoint-2'}
    assert last_checkpoint(run) == run/'checkpoint-2'
    train(run, resume=True)
    assert same(weights(run/'mine'), weights(uninterrupted[0]/'mine'))


def test_a_disk_that_is_full_at_any_file_operation(tmp_path):
    "Every checkpoint that cannot be written leaves the folder as it was, also one of the same update, and says so."
    t, run = trainer(tmp_path/'run', max_steps=2), tmp_path/'run'
    t.train()
    with at_each_file_operation(run, lambda k: shutil.copytree(run, tmp_path/f'{k:03d}', symlinks=True)) as watched: t._save_checkpoint(t.model, None)
    needed, before = watched['count'], tree(run)
    assert needed > 15 and names(run) == ['checkpoint-2']
    for k in range(needed): # as if killed there
        clear_drafts(moment := tmp_path/f'{k:03d}')
        assert last_checkpoint(moment) == moment/'checkpoint-2' and [p.name for p in moment.iterdir() if p.name != '.lock'] == ['checkpoint-2']
    for k in range(needed):
        def full(at):
            if at == k: raise OSError(errno.ENOSPC, 'No space left on device')
        with at_each_file_operation(run, full):
            try: t._save_checkpoint(t.model, None)
            except InputError as e: assert 'No space left on device' in str(e) and 'the last good checkpoint is' in str(e)
        clear_drafts(run) # what could not be removed: the next run does it
        assert {name: h for name, h in tree(run).items() if name.split('/')[-1] not in DATED} == {
            name: h for name, h in before.items() if name.split('/')[-1] not in DATED}, k
        assert last_checkpoint(run) == run/'checkpoint-2'


DATED = ('README.md', 'trainer_state.json', 'files.json')  # may differ between two checkpoints of one update


# Damaged checkpoints

def cut(path): path.write_bytes(path.read_bytes()[:-100])
def empty(path): path.write_bytes(b'')
def flip(path): path.write_bytes((b := path.read_bytes())[:len(b)//2]+bytes([b[len(b)//2] ^ 1])+b[len(b)//2+1:])


@pytest.mark.parametrize('file, spoil', [('optimizer.pt', cut), ('mine/head.safetensors', flip), ('trainer_state.json', empty)])
def test_a_damaged_last_checkpoint(file, spoil, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted[0], tmp_path/'run')
    shutil.rmtree(run/'mine')
    spoil(run/'checkpoint-6'/file)
    with pytest.raises(ValueError, match='is not a complete checkpoint'): trainer(run).train(str(run/'checkpoint-6'))
    with pytest.warns(UserWarning, match=f'passed over: .*{file}'): train(run, resume=True)
    assert same(weights(run/'mine'), weights(uninterrupted[0]/'mine'))
    assert names(run) == ['checkpoint-4', 'checkpoint-6'] and (run/'damaged-checkpoint-6').is_dir()


def test_no_good_checkpoint_at_all(uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted[0], tmp_path/'run')
    for step in 4, 6: flip(run/f'checkpoint-{step}'/'optimizer.pt')
    with pytest.raises(ValueError, match='checkpoints of an earlier run'): train(run)
    with pytest.warns(UserWarning, match='passed over') as said: train(run, resume=True)
    assert len([w for w in said if 'passed over' in str(w.message)]) == 2
    assert same(weights(run/'mine'), weights(uninterrupted[0]/'mine'))


def test_damage_never_pushes_out_a_good_checkpoint(tmp_path):
    "A damaged checkpoint of a later update does not count among those that are kept."
    t, run = trainer(tmp_path/'run', max_steps=2, save_total_limit=1), tmp_path/'run'
    t.train()
    shutil.copytree(run/'checkpoint-2', run/'checkpoint-9')
    cut(run/'checkpoint-9'/'optimizer.pt')
    t.state.global_step = 3
    t._save_checkpoint(t.model, None)
    assert names(run) == ['checkpoint-3']


# Images and numbers

def test_broken_images_before_training(tmp_path):
    pairs = load_records(write_records(alignment_pairs(6, seed=3), tmp_path/'pairs'))
    cut(pairs[1]['chosen_path'])
    empty(pairs[4]['reject_path'])
    with pytest.raises(InputError, match=r'2 of 6 records cannot be used:\n  record 1, chosen_path: .*\n  record 4, reject_path: '): train(tmp_path/'run', pairs=list(pairs))
    assert not (tmp_path/'run').exists()
    with pytest.warns(UserWarning, match='left out'): good = load_records(list(pairs), skip_bad=True)
    train(tmp_path/'run', pairs=good, max_steps=1)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_breaks_in_the_middle(workers, uninterrupted, tmp_path):
    "The run stops, names it, and with the image mended goes on to the weights it would have had."
    pairs = load_records(write_records(alignment_pairs(6, seed=3), tmp_path/'pairs'))
    file = pairs[5]['reject_path']
    whole = file.read_bytes()
    class Break(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kw):
            if state.global_step: empty(file)
    with pytest.raises(InputError, match=r'^record 5, reject_path: .*the last good checkpoint is .*checkpoint-\d'):
        train(tmp_path/'run', pairs=pairs, callbacks=[Break()], dataloader_num_workers=workers)
    assert not (tmp_path/'run'/'mine').exists()
    file.write_bytes(whole)
    train(tmp_path/'run', pairs=pairs, resume=True, dataloader_num_workers=workers)
    for k, w in weights(tmp_path/'run'/'mine').items(): assert_close(w, weights(uninterrupted[0]/'mine')[k], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_broken_loss_stops_before_it_reaches_a_weight(bad, tmp_path):
    t = trainer(tmp_path/'run', save_total_limit=None)
    loss, before = t.compute_loss, {}
    def breaks(model, inputs, **kw):
        broken = t.state.global_step == 4
        if broken: before.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return loss(model, inputs, **kw)*(bad if broken else 1)
    t.compute_loss = breaks
    with pytest.raises(ValueError) as e: t.train()
    assert len(t.places) == 1 # the other batch of this update was not computed any more
    assert f'the loss is {bad} at step 5, with record {t.places[0]} of records;' in str(e.value) and str(e.value).endswith('checkpoint-4')
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
    assert names(tmp_path/'run') == ['checkpoint-2', 'checkpoint-4']


def test_float16_may_lose_a_few_updates(tmp_path):
    "Its scaler leaves out an update whose gradient overflows; only a long row of them is an error."
    t = trainer(tmp_path)
    t.accelerator.scaler = object()
    for _ in range(2):
        for _ in range(20): t._get_grad_norm(t.model, math.inf)
        t._get_grad_norm(t.model, 1.)
    for _ in range(20): t._get_grad_norm(t.model, math.nan)
    with pytest.raises(ValueError, match='the norm of the gradient is nan'): t._get_grad_norm(t.model, math.nan)


def test_a_good_checkpoint_is_not_replaced_by_a_bad_one(tmp_path):
    "A run goes on from an older checkpoint and breaks just where a good one lies."
    t, run = trainer(tmp_path/'run', save_total_limit=None), tmp_path/'run'
    t.train()
    before = tree(run)
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 4: next(p for p in kw['model'].parameters() if p.requires_grad).data[0] = math.nan
    with pytest.raises(ValueError, match='no longer finite after step 4'): trainer(run, [Break()], save_total_limit=None).train(str(run/'checkpoint-2'))
    assert tree(run) == before


def test_the_best_checkpoint_survives_a_move(tmp_path):
    "A run that goes on in a folder that was renamed knows its best checkpoint."
    def make(folder, callbacks=()):
        return trainer(folder, callbacks, load_records(alignment_pairs(4, seed=5)), eval_strategy='steps', eval_steps=2, load_best_model_at_end=True,
                       learning_rate=.05, num_train_epochs=3)
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kw): control.should_training_stop = state.global_step == 4
    straight = make(tmp_path/'straight')
    straight.train()
    make(tmp_path/'run', [Stop()]).train()
    (tmp_path/'run').rename(tmp_path/'moved')
    moved = make(tmp_path/'moved')
    moved.train(True)
    assert Path(moved.state.best_model_checkpoint).name == Path(straight.state.best_model_checkpoint).name
    assert all(torch.equal(p, q) for p, q in zip(straight.model.parameters(), moved.model.parameters()))
