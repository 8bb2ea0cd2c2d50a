"""Train and measure everything in the bundle, and write its card: `python tools/bundle.py`, or `make bundle`.

Killed anywhere and called again, it goes on. `make bundle SHARE=.001` does a small share of all work, in minutes:
a dry run of the whole chain, which leaves a bundle that knows nothing. Run it in a copy of the repository.
"""
import os, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def base(share):
    from llava_reward_nb.tiny.mllm import build_tiny
    build_tiny(share=share)


def rivals(share):
    from llava_reward_nb.tiny.metrics import build_metrics
    build_metrics(share=share)


def pipelines(share):
    from llava_reward_nb.tiny.diffusion import build_diffusion
    build_diffusion(share=share)


def signs(share):
    from llava_reward_nb.evaluation.signs import build_signs
    from llava_reward_nb.tiny.mllm import portion
    build_signs(n=portion(400, share), k=portion(20, share))


def table9(share):
    from llava_reward_nb.tiny.mllm import portion
    from llava_reward_nb.tiny.studies import build_table9
    build_table9(n=portion(300, share, 6))


def ablations(share):
    from llava_reward_nb.tiny.ablations import ablation_study
    from llava_reward_nb.tiny.mllm import portion
    bundle = Path('llava_reward_nb/bundle')
    ablation_study(bundle/'base', 'runs/ablations', bundle/'log/ablations.parquet',
                   n=portion(2000, share, 64), held=portion(1000, share, 64))


def card(share):
    subprocess.run([sys.executable, 'tools/card.py'], check=True)


PIECES = (base, rivals, pipelines, signs, table9, ablations, card)


def main():
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.
    os.chdir(ROOT)  # builders write to runs/tiny and llava_reward_nb/bundle
    for number, piece in enumerate(PIECES, 1):
        print(f'\n== {number}/{len(PIECES)} {piece.__name__}', flush=True)
        start = time.monotonic()
        piece(share)
        print(f'== {piece.__name__} took {time.monotonic()-start:.0f} s', flush=True)


if __name__ == '__main__': main()  # training starts processes that import this file
