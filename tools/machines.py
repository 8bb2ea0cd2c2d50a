"Run every notebook and the numeric tests as other machines would compute them: with each instruction set this CPU has, on one thread and on two."
import os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SETS = ('default', 'avx2', 'avx512')  # values of ATEN_CPU_CAPABILITY
NOT_NUMERIC = ('project', 'wheel', 'readme', 'cli', 'commands')  # they compare files and start commands


def instruction_sets():
    "Those of `SETS` this CPU has."
    ask = 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())'
    env = {k: v for k, v in os.environ.items() if k != 'ATEN_CPU_CAPABILITY'}
    best = subprocess.run([sys.executable, '-c', ask], env=env, text=True, capture_output=True, check=True).stdout.strip()
    return SETS[:SETS.index(best)+1] if best in SETS else SETS[:1]


def parts():
    "Name and command of each part."
    tests = sorted(p for p in (ROOT/'tests').glob('test_*.py') if p.stem.removeprefix('test_') not in NOT_NUMERIC)
    return dict(notebooks=[BIN/'nbdev_test', '--n_workers', '0', '--do_print'],
                tests=[sys.executable, '-m', 'pytest', '-q', '--tb=short', *tests])


def main():
    logs, failed, had = Path(tempfile.mkdtemp(prefix='machines_')), [], instruction_sets()
    for capability in SETS:
        for threads in (1, 2):
            machine = f'{capability}, {threads} thread' + 's'*(threads > 1)
            if capability not in had:
                print(f'{machine}: left out, this CPU has no {capability}')
                continue
            env = os.environ | dict(ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE='1')
            for name, command in parts().items():
                start, log = time.monotonic(), logs/f'{capability}_{threads}_{name}.txt'
                with open(log, 'w', encoding='utf-8') as f:
                    code = subprocess.run([str(c) for c in command], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT).returncode
                said = 'passed' if code == 0 else f'FAILED, see {log}'
                print(f'{machine}, {name}: {said} ({(time.monotonic()-start)/60:.0f} min)', flush=True)
                if code: failed.append(log)
    sys.exit(len(failed) > 0)


if __name__ == '__main__': main()
