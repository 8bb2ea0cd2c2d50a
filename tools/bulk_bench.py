#!/usr/bin/env python
"""Scores many small images in tar shards, kills the run in the middle, goes on, and tells what it cost.

    python tools/bulk_bench.py --n 100000 --reward tiny-clip

It prints the time of the run beside the time spent in the reward, how memory grew, and whether each row is there once with its own score.
"""
import argparse, io, json, os, subprocess, sys, tarfile, tempfile, threading, time
from dataclasses import replace
from pathlib import Path

import numpy as np

DRAWINGS = 1000  # that differ; the rows repeat them
SHARD = 5000     # rows of a tar
WARM = .1        # share of the rows after which memory must not grow any more
MOST = 100       # MB that it may grow
RATIO = 1.15     # of the whole run's time to the reward's


def drawings(n):
    "Scenes of the shapes world: images and their prompts."
    from llava_reward_nb.shapes.scenes import describe, sample_scene
    from llava_reward_nb.shapes.world import render
    scenes = [sample_scene(np.random.default_rng(k)) for k in range(n)]
    return [render(s) for s in scenes], [describe(s) for s in scenes]


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, 'png')
    return buffer.getvalue()


def write_shards(folder, n):
    "Row k shows drawing k modulo their number."
    images, prompts = drawings(min(n, DRAWINGS))
    pictures = [png(image) for image in images]
    for start in range(0, n, SHARD):
        with tarfile.open(folder/f'{start//SHARD:05}.tar', 'w') as tar:
            for k in range(start, min(start+SHARD, n)):
                add(tar, f'{k:08}.png', pictures[k % len(pictures)])
                add(tar, f'{k:08}.txt', prompts[k % len(pictures)].encode())


def resident():
    "Megabytes of memory that this process holds."
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages*os.sysconf('SC_PAGE_SIZE')/1e6


class Watch:
    "The time in the reward and the memory of a run."
    def __init__(self, path):
        self.path, self.inside, self.cpu, self.memory = path, 0., 0., []

    def __call__(self, run):
        "Measure a `BulkRun` that is about to start."
        run.rewards = [replace(r, run=self.timed(r.run)) for r in run.rewards]
        self.run = run
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        threading.Thread(target=self.sample, daemon=True).start()

    def timed(self, reward):
        def call(images, prompts):
            began, cpu = time.perf_counter(), time.thread_time()
            try: return reward(images, prompts)
            finally:
                self.inside += time.perf_counter()-began
                self.cpu += time.thread_time()-cpu
        return call

    def sample(self):
        "Every second, how many rows there are and how much memory; and all of it into the file, as long as the process lives."
        while True:
            self.memory.append((self.run.pace.rows, resident()))
            self.save()
            time.sleep(1)

    def save(self):
        about = dict(rows=self.run.pace.rows, wall=time.perf_counter()-self.began, inside=self.inside,
                     process=time.process_time()-self.cpu_began, thread=self.cpu, memory=self.memory)
        new = self.path.with_suffix('.new')
        new.write_text(json.dumps(about))
        new.replace(self.path)


def work(data, reward, out, about):
    "One run; its figures go to the file `about`."
    from llava_reward_nb.bulk import score_sources
    watch = Watch(Path(about))
    print(score_sources(data, reward, out, watch=watch), flush=True)
    watch.memory.append((watch.run.pace.rows, resident()))
    watch.save()


def start(data, reward, out, about):
    return subprocess.Popen([sys.executable, __file__, '--work', str(data), reward, str(out), str(about)])


def parts(out): return sorted(out.glob('part-*.parquet'))


def run_and_kill(data, reward, out, about, n):
    "Run until so many parts are there, then kill the process as nothing can prevent it."
    process = start(data, reward, out, about)
    while len(parts(out)) < n:
        if process.poll() is not None: sys.exit('the run ended before it could be killed')
        time.sleep(.02)
    process.kill()
    process.wait()


def growth(memory, rows):
    "Megabytes by which memory grew after the first of so many rows."
    warm = [held for done, held in memory if done >= WARM*rows]
    return max(warm)-warm[0]


def report(name, about):
    figures = json.loads(about.read_text())
    rows, wall, inside = figures['rows'], figures['wall'], figures['inside']
    print(f"{name}: {rows:,} rows in {wall:,.1f} s ({rows/wall:,.0f} rows/s), of which {inside:,.1f} s in the reward: "
          f"{wall/inside:.3f} x its time; CPU {figures['process']:,.1f} s, {figures['thread']:,.1f} s of it in the reward's thread; "
          f"memory grew by {growth(figures['memory'], rows):.0f} MB after the first {WARM:.0%}, to {max(m for _, m in figures['memory']):,.0f} MB")
    return wall/inside, growth(figures['memory'], rows)


def check(out, n, reward, stamps):
    "What is wrong with the rows; nothing, if each is there once, with its own score, and none was scored again."
    import pyarrow.parquet as pq
    from llava_reward_nb.rewards.registry import load_reward
    table = pq.read_table(parts(out), columns=['key', reward, 'error'])
    keys = table['key'].to_pylist()
    numbers = np.array([int(key.rpartition('/')[2]) for key in keys])
    images, prompts = drawings(min(n, DRAWINGS))
    own = load_reward(reward)(images, prompts).numpy()[numbers % len(images)]
    far = np.abs(table[reward].to_numpy()-own)
    wrong = dict(lost=n-len(set(keys)), repeated=len(keys)-len(set(keys)), errors=sum(e != '' for e in table['error'].to_pylist()),
                 swapped=int((~(far < 1e-3)).sum()), again=sum(p.stat().st_mtime_ns != t for p, t in stamps.items()))
    print(f"{len(keys):,} rows: "+', '.join(f'{v} {k}' for k, v in wrong.items())+f"; {len(stamps)} of {len(parts(out))} parts were there at the kill")
    return sum(wrong.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=100_000, help='images')
    parser.add_argument('--reward', default='tiny-clip', help='a reward by name')
    parser.add_argument('--folder', help='where shards and results go; a temporary one if not given')
    parser.add_argument('--work', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work: return work(*args.work)
    top = Path(args.folder or tempfile.mkdtemp(prefix='bulk_bench_'))
    data, out = top/'data', top/'out'
    if not data.exists():
        data.mkdir(parents=True)
        write_shards(data, args.n)
    expected = sum(-(-min(SHARD, args.n-s)//512) for s in range(0, args.n, SHARD))
    run_and_kill(data, args.reward, out, top/'first.json', expected//2)
    stamps = {p: p.stat().st_mtime_ns for p in parts(out)}
    if start(data, args.reward, out, top/'second.json').wait(): sys.exit('the second run failed')
    figures = [report(name, top/f'{name}.json') for name in ('first', 'second')]
    wrong = check(out, args.n, args.reward, stamps)
    slow = max(ratio for ratio, _ in figures) > RATIO
    grown = max(more for _, more in figures) > MOST
    print(f"wall <= {RATIO} x the reward's time: {'no' if slow else 'yes'}; memory grows by less than {MOST} MB: {'no' if grown else 'yes'}; "
          f"nothing lost or repeated: {'no' if wrong else 'yes'}")
    sys.exit(bool(wrong or slow or grown))


if __name__ == '__main__': main()
