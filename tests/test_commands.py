"The evaluation commands as people start them: output, exit codes, and runs that go on after they were killed."
import os, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd, pytest

from llava_reward_nb.commands import evaluate as commands
from llava_reward_nb.evaluation.benchmarks import SPECS
from llava_reward_nb.evaluation.runs import Run


def environment():
    "Of a process that imports this tree, offline."
    ours = dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(commands.__file__).parents[2]))
    return {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | ours


def start(command, *args):
    "A command in a process of its own, as the console script starts it."
    code = f'from llava_reward_nb.commands.evaluate import {command}; {command}()'
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(command, *args):
    "Exit code, stdout and stderr."
    p = start(command, *args)
    out, err = p.communicate(timeout=900)
    return p.returncode, out, err


@pytest.fixture
def here(monkeypatch, capsys):
    "The same in this process, which has imported everything already."
    def run(command, *args):
        monkeypatch.setattr(sys, 'argv', [command, *map(str, args)])
        try: exec(f'{command}()', {'__name__': '__main__', command: getattr(commands, command)}); code = 0
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return run


def test_every_twin_and_every_table(tmp_path):
    "One command fills all benchmarks on the offline twins, and each has a table in every form."
    code, out, err = run('llava_reward_eval', 'all', '--reward', 'checker', 'tiny/alignment', '--limit', 4, '--out', tmp_path/'runs')
    assert code == 0, err
    assert {p.name for p in (tmp_path/'runs').iterdir()} == set(SPECS)
    for name in SPECS:
        assert {'checker', 'tiny/alignment'} <= set(Run(tmp_path/'runs'/name).scores().columns), name
        for suffix in ('md', 'tex', 'html', 'csv'):
            commands.llava_reward_table(name, [str(tmp_path/'runs'/name)], out=str(tmp_path/f'{name}.{suffix}'))
            assert ('apprentice' if name == 'geneval' else 'checker') in (tmp_path/f'{name}.{suffix}').read_text() # GenEval judges painters, not rewards


def test_killed_run_goes_on(tmp_path):
    "SIGKILL in the middle; the same command finishes, and the scores are those of a run that was left alone."
    args = ('imagereward', '--reward', 'tiny/alignment', '--limit', 40, '--batch-size', 1)
    assert run('llava_reward_eval', *args, '--out', tmp_path/'whole')[0] == 0
    p = start('llava_reward_eval', *args, '--out', tmp_path/'cut')
    for _ in range(600):
        if (tmp_path/'cut'/'run.json').exists() or p.poll() is not None: break
        time.sleep(.1)
    time.sleep(1)
    p.send_signal(signal.SIGKILL); p.wait()
    code, out, err = run('llava_reward_eval', *args, '--out', tmp_path/'cut')
    assert code == 0, err
    pd.testing.assert_frame_equal(Run(tmp_path/'cut').scores(), Run(tmp_path/'whole').scores())


def test_a_reward_is_added(here, tmp_path):
    "A second call with another reward adds its column and leaves the first alone."
    for r in 'checker', 'tiny/fidelity': assert here('llava_reward_eval', 'hpdv2', '--reward', r, '--limit', 3, '--out', tmp_path/'r')[0] == 0
    assert Run(tmp_path/'r').scores().notna().all().all() and list(Run(tmp_path/'r').scores().columns) == ['checker', 'tiny/fidelity']


@pytest.mark.parametrize('args,code,says', [
    (['mjbanch', '--reward', 'tiny'], 2, 'mjbench'),
    (['mjbench'], 2, '--reward'),
    (['mjbench', '--reward', 'imagreward'], 1, "did you mean 'imagereward'"),
    (['mjbench', '--reward', 'checker', '--data', 'no/such/folder'], 1, 'no such file or folder'),
    (['tifa160', '--reward', 'checker', '--limit', '0'], 2, 'at least 1'),
    (['smid', '--reward', 'checker', '--data', 'hub'], 1, 'local copy')])
def test_bad_calls(here, tmp_path, args, code, says):
    got, out, err = here('llava_reward_eval', *args, '--out', tmp_path/'x')
    assert got == code and says in err and 'Traceback' not in err, err
    assert not (tmp_path/'x').exists()


def test_a_terminal_hears_at_once():
    "Before anything heavy is imported there is a line on a terminal, and none in a log file."
    pty = pytest.importorskip('pty')
    code = "import sys; from llava_reward_nb.commands import llava_reward; llava_reward(['table', 'none'])"
    ours, theirs = pty.openpty()
    p = subprocess.Popen([sys.executable, '-c', code], env=environment(), stderr=theirs)
    os.close(theirs)
    with os.fdopen(ours, 'rb', buffering=0) as terminal:
        assert terminal.read(100).startswith('loading …'.encode())
        assert p.wait(300) == 2
    log = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
    assert log.returncode == 2 and log.stderr.startswith("llava_reward table: error: table 'none'"), log.stderr


def test_loading_is_announced(tmp_path):
    "On a terminal each reward before it is loaded; in a log file an error stays the only line."
    pty = pytest.importorskip('pty')
    code = ("import sys; sys.argv = ['llava_reward_latency', '--reward', 'tiny/fidelity', 'checker', '--repeats', '1', '--out', 't.csv']; "
            "from llava_reward_nb.commands import llava_reward_latency; llava_reward_latency()")
    ours, theirs = pty.openpty()
    p = subprocess.Popen([sys.executable, '-c', code], env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    heard = b''
    with os.fdopen(ours, 'rb', buffering=0) as terminal:
        try:
            while piece := terminal.read(1000): heard += piece
        except OSError: pass  # how Linux tells that the other side has closed
    assert p.wait(300) == 0, heard
    lines = [line for line in heard.decode().splitlines() if line.startswith('loading')]
    assert lines == ['loading tiny/fidelity …', 'loading checker …'], heard
    log = subprocess.run([sys.executable, '-c', code.replace('tiny/fidelity', 'tiny/fidelty')], env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert log.returncode and log.stderr.count('\n') == 1, log.stderr


def test_table_of_two_runs(here, tmp_path):
    for r in 'checker', 'tiny/safety': assert here('llava_reward_eval', 'pickapic', '--reward', r, '--limit', 2, '--out', tmp_path/r.replace('/', '-'))[0] == 0
    code, out, err = here('llava_reward_table', 'pickapic', tmp_path/'checker', tmp_path/'tiny-safety', '--intervals', '--out', tmp_path/'t.md')
    assert code == 0 and 'checker' in out and 'tiny/safety' in out and (tmp_path/'t.md').is_file(), err


def test_table_of_nothing(here, tmp_path):
    code, _, err = here('llava_reward_table', 'tifa160', tmp_path/'none')
    assert code == 1 and 'llava_reward_eval tifa160' in err
    code, _, err = here('llava_reward_table', 'table9', tmp_path/'none')
    assert code == 1 and 'llava_reward_steer' in err


def test_the_table_is_where_the_run_was_put(here, tmp_path, monkeypatch):
    "Without --out a run lies where llava_reward_table looks, one benchmark or all of them."
    monkeypatch.chdir(tmp_path)
    assert here('llava_reward_eval', 'tifa160', '--reward', 'checker', '--limit', 2)[0] == 0
    code, out, err = here('llava_reward_table', 'tifa160')
    assert code == 0 and 'checker' in out, err
    assert [p.name for p in tmp_path.iterdir()] == ['runs'] and [p.name for p in (tmp_path/'runs').iterdir()] == ['tifa160']
