#!/usr/bin/env python
"""Asks a service for rewards from many clients at once, and compares batches with one image at a time.

    python tools/serve_bench.py --clients 64 --seconds 120

Two services run side by side, one of which gives every image a pass of its own. The clients turn from one to the other every few
seconds, so that whatever else the machine does slows both. Every answer must be the score that the image has alone, bit for bit.
"""
import argparse, asyncio, base64, io, os, signal, subprocess, sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

IMAGES = 48   # that differ
SLICE = 60      # seconds until the clients turn to the other service
RATIO = 2     # of the rates that batching must reach
WAYS = dict(single=dict(budget=1), batched={})  # arguments of the batcher


def items():
    "Prompts, and images as base64."
    from llava_reward_nb.shapes.scenes import describe, sample_scene
    from llava_reward_nb.shapes.world import render
    out = []
    for k in range(IMAGES):
        scene, stream = sample_scene(np.random.default_rng(k)), io.BytesIO()
        render(scene).save(stream, 'png')
        out.append((describe(scene), base64.b64encode(stream.getvalue()).decode()))
    return out


def work(way, reward):
    "A service until it is stopped; its first line is its address."
    import torch
    from llava_reward_nb.batcher import load_families
    from llava_reward_nb.serve import Service, bind, serve, url_of
    torch.set_num_threads(1)
    sock = bind('127.0.0.1', 0)
    serve(Service(load_families([reward]), **WAYS[way]), sock, ready=lambda: print(url_of(sock), flush=True))


@dataclass
class Server:
    "A service in a process of its own, and what its clients saw."
    way: str
    reward: str
    took: list = field(default_factory=list)   # seconds of each answer
    seconds: float = 0.
    cpu: float = 0.  # seconds of the service's process
    wrong: int = 0
    failed: int = 0

    def __enter__(self):
        self.process = subprocess.Popen([sys.executable, __file__, '--work', self.way, self.reward], stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        return self

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def alone(self, some):
        "The items with the scores that one client gets, one after the other."
        import httpx
        with httpx.Client(base_url=self.url, timeout=120, trust_env=False) as http:
            said = [http.post('/v1/rewards', json=dict(prompts=[p], images=[im], rewards=[self.reward])).json() for p, im in some]
        return [(p, im, answer['rewards'][self.reward][0]) for (p, im), answer in zip(some, said)]

    def used(self):
        "CPU seconds of the process so far; NaN where the system does not say."
        stat = Path(f'/proc/{self.process.pid}/stat')
        if not stat.exists(): return float('nan')
        user, system = stat.read_text().rpartition(')')[2].split()[11:13]
        return (int(user)+int(system))/os.sysconf('SC_CLK_TCK')

    def load(self, known, clients, seconds):
        from llava_reward_nb.serve import load
        before = self.used()
        point = asyncio.run(load(self.url, known, self.reward, clients, seconds))
        self.cpu += self.used()-before
        self.took += point.took
        self.seconds += point.seconds
        self.wrong += point.wrong
        self.failed += point.failed

    def point(self, clients):
        from llava_reward_nb.serve import load_point
        return load_point(self.took, clients, self.seconds, self.wrong, self.failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--clients', type=int, default=64, help='that ask at the same time')
    parser.add_argument('--seconds', type=float, default=120, help='for each of the two services')
    parser.add_argument('--reward', default='tiny/alignment', help='a reward by name')
    parser.add_argument('--work', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work: return work(*args.work)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the services end, too
    some = items()
    with Server('single', args.reward) as single, Server('batched', args.reward) as batched:
        known = {server.way: server.alone(some) for server in (single, batched)}
        for server in (single, batched): server.load(known[server.way], args.clients, 1)  # the passes that look whether neighbours matter
        for server in (single, batched): server.took, server.seconds, server.cpu = [], 0., 0.
        while batched.seconds < args.seconds:
            for server in (single, batched): server.load(known[server.way], args.clients, min(SLICE, args.seconds))
        for server in (single, batched):
            p = server.point(args.clients)
            print(f'{server.way}: {p.answered:,} answers in {p.seconds:.0f} s, {p.wrong} wrong, {p.failed} failed; {p.rate:.1f} a second, '
                  f'p50 {p.p50:.2f} s, p90 {p.p90:.2f} s, p99 {p.p99:.2f} s; CPU {1000*server.cpu/p.answered:.1f} ms for each', flush=True)
        ratio = batched.point(args.clients).rate/single.point(args.clients).rate
        right = not any(server.wrong or server.failed for server in (single, batched))
        print(f"{args.clients} clients: batches answer {ratio:.2f} x as many; at least {RATIO} x: {'yes' if ratio >= RATIO else 'no'}; "
              f"every answer once and right: {'yes' if right else 'no'}")
    sys.exit(not right or ratio < RATIO)


if __name__ == '__main__': main()
