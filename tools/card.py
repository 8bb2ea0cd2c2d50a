"Write the bundle's model card from the log that its training left: `python tools/card.py`; `--check` only says whether they agree."
import json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT/'llava_reward_nb/bundle'
CARD = BUNDLE/'README.md'
FOLDERS = {  # those that are there are listed
    'base': 'the multimodal LLM: CLIP tower (5 layers of width 128), Phi-3 (4 layers of width 192); 64×64 pixels a crop',
    'alignment fidelity safety overall overall_bt': 'perspectives on it: LoRA of rank 16, projector, SkipCA head',
    'clip hpsv2 imagereward': 'a CLIPScore, an HPSv2 and an ImageReward of the same world, to compare with',
    'sd': 'a Stable Diffusion of 4.4 million parameters, to steer',
    'sd_early': 'the U-Net of its first generation, 0.4 million parameters; the rest of that pipeline is `sd`',
    'log': 'what training and measuring left behind',
}
LOSSES = {'bt': 'Bradley-Terry', 'gpm': 'general preference, 2-dimensional', 'cls': 'cross-entropy'}
JUDGES = {
    'alignment': 'which of two images fits the prompt',
    'fidelity': 'which of two images has no artifact',
    'safety': 'whether an image shows a certain sign',
    'overall': 'which of two images people of this world prefer',
    'overall_bt': 'the same, as one number for each image',
}

STAGES = {  # of the logs, in their order -> what it trains, seed
    'stage0': ('the tower', 10), 'stage1': ('the base', 11), 'stage1b': ('the base, second round', 12),
    'clip': ('CLIPScore', 30), 'hpsv2': ('HPSv2', 34), 'imagereward_see': ('ImageReward sees', 31),
    'imagereward_answer': ('ImageReward answers', 32), 'imagereward_prefer': ('ImageReward prefers', 33),
    'vae': ('the autoencoder', 20), 'unet': ('the U-Net', 22), 'early': ('the early U-Net', 23),
}
BEFORE = {  # accuracies of the bundle that was shipped first -> known, unseen
    'alignment': (.990, .984), 'fidelity': (.977, .976), 'overall': (.950, .915), 'overall_bt': (.948, .921),
    'safety': (.999, .998), 'base (yes/no)': (.990, .986),
}

TEXT = '''---
license: apache-2.0
library_name: llava_reward_nb
pipeline_tag: image-text-to-text
language: en
tags:
- reward-model
- text-to-image
- llava-reward
- phi3_v
- toy
---
<!-- Written by tools/card.py from the tables in log/; edit that script. -->

# The tiny bundle of llava_reward_nb

A Phi-3.5-vision of 2.8 million parameters, with LLaVA-Reward perspectives, trained from nothing on a laboratory world of
coloured shapes. It lets every feature of the package run for real, on a CPU, without a download. It knows no photographs,
no people and no words but those of its world: **do not use its scores for anything else.**

```python
from llava_reward_nb import RewardModel

model = RewardModel.from_pretrained('tiny')
model.score('picture.png', 'a red circle left of a blue square', perspective='alignment')
```

## What is inside

{folders}

All weights are safetensors in half precision. None derives from published weights; no photograph and no text from
anywhere was used.

## How it was trained

On two CPU cores, by one `make bundle`; the notebooks of `nbs/8_tiny` are the whole recipe. The tower learns colour,
shape, sign and artifact of every patch; then the base learns captions and yes/no statements about images that are drawn
while it trains. Then the base is frozen, and each perspective is trained on rendered preference pairs or labels, as the
paper does it (arXiv 2507.21391).

{stages}

Seeds are those of the data; weights begin with seed 0. The hours, {hours:.1f} in all, are those of two processes on two cores
that had other work beside. Each perspective takes minutes (seed 42 for its adapter and order).

## How good it is

Accuracy on held-out pairs (safety: labels), with 95 % intervals. *Known*: new scenes of the colour-shape pairs that
training showed. *Unseen*: every scene has a colour on a shape that no training image had.

{accuracies}

*base (yes/no)* is the base without any perspective, asked whether the statement is true.

The bundle of the first versions, made with the same seeds in several starts and with another mixture of images in the base's
second round, had these accuracies:

{before}

The hardest kinds, in the same order (known / unseen):

{hardest}

## Its rivals

The same held-out pairs, judged by the other rewards of this world. CLIPScore, HPSv2 and ImageReward are loaded by the classes
that load the published ones; VQAScore is the probability that `base` answers *yes*.

{rivals}

## Its pipelines

Share of prompts whose image satisfies every fact, as the checker sees it: the mean over six categories (known), or over the
two that name colours (unseen); 50 DDIM steps, guidance scale 4.

{pipelines}

## Limits

- It knows rendered scenes of up to a few shapes, with the prompts of `llava_reward_nb.shapes`. What it says of anything else is noise.
- *Safe* means here: without a certain made-up sign. It has no notion of harm.
- `fidelity` never saw that sign, and takes it for an artifact.
- The preferences behind `overall` are rules of this world, not judgements of people.
- Its numbers say that the code works. They say nothing about LLaVA-Reward on real images.
- `overall` compares two images and has no score for one; `overall_bt` does.
'''


def read(path): return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def loss_of(name):
    "What a perspective was trained with, by its own configuration."
    path = BUNDLE/name/'reward_config.json'
    return LOSSES[json.loads(path.read_text(encoding='utf-8'))['loss']] if path.exists() else ''


def quoted(row): return f"{row['accuracy']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def table(head, rows):
    "A Markdown table."
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [head, ['---']*len(head), *rows])


def folders():
    "What is in the bundle."
    rows = []
    for names, what in FOLDERS.items():
        there = [f'`{name}`' for name in names.split() if (BUNDLE/name).is_dir()]
        if there: rows.append([', '.join(there), what])
    return table(['folder', 'what it is'], rows)


def logged():
    "Steps and hours of each stage whose log has times."
    rows = [r for name in ('training', 'metrics', 'diffusion') for r in read(BUNDLE/f'log/{name}.jsonl')]
    found = {}
    for stage in STAGES:
        mine = [r for r in rows if r['stage'] == stage]
        if mine: found[stage] = (max(r['step'] for r in mine), sum(r['seconds'] for r in mine)/3600)
    return found


def stages():
    "What was trained, how long, and with which seed."
    rows = [[STAGES[s][0], str(STAGES[s][1]), f'{steps:,}', f'{hours:.2f}'] for s, (steps, hours) in logged().items()]
    return table(['stage', 'seed', 'steps', 'hours'], rows)


def before():
    "What the bundle of the first versions knew."
    rows = [[f'`{n}`' if n in JUDGES else n, f'{known:.3f}', f'{unseen:.3f}'] for n, (known, unseen) in BEFORE.items()]
    return table(['perspective', 'known', 'unseen'], rows)


def rivals():
    "Accuracies of the other rewards."
    log = [r for r in read(BUNDLE/'log/metrics_accuracy.jsonl') if r['kind'] == 'all']
    found = {(r['reward'], r['pairs'], r['split']): r for r in log}
    rows = [[name, pairs, quoted(found[name, pairs, 'train']), quoted(found[name, pairs, 'unseen'])]
            for name in dict.fromkeys(r['reward'] for r in log) for pairs in ('alignment', 'overall')]
    return table(['reward', 'pairs', 'known', 'unseen'], rows)


def pipelines():
    "Satisfaction of each pipeline."
    log = [r for r in read(BUNDLE/'log/satisfaction.jsonl') if r['category'] == 'mean']
    found = {(r['pipeline'], r['split']): f"{r['satisfied']:.2f} of {r['n']}" for r in log}
    rows = [[f'`{name}`', found[name, 'train'], found[name, 'unseen']]
            for name in dict.fromkeys(r['pipeline'] for r in log)]
    return table(['pipeline', 'known', 'unseen'], rows)


def render():
    "The card's text."
    log = read(BUNDLE/'log/accuracy.jsonl')
    found = {(r['perspective'], r['split'], r['kind']): r for r in log}
    names = list(dict.fromkeys(r['perspective'] for r in log))
    whole = [[f'`{n}`' if n in JUDGES else n, JUDGES.get(n, 'as alignment'), loss_of(n),
              quoted(found[n, 'train', 'all']), quoted(found[n, 'unseen', 'all'])] for n in names]
    hardest = []
    for name in names:
        kinds = [r for r in log if (r['perspective'], r['split']) == (name, 'train') and r['kind'] != 'all']
        worst = min(kinds, key=lambda r: r['accuracy'])['kind']
        both = [f"{found[name, split, worst]['accuracy']:.3f}" for split in ('train', 'unseen')]
        hardest.append([f'`{name}`' if name in JUDGES else name, worst, ' / '.join(both)])
    accuracies = table(['perspective', 'judges', 'loss', 'known', 'unseen'], whole)
    return TEXT.format(accuracies=accuracies, hardest=table(['perspective', 'kind', 'accuracy'], hardest),
                       folders=folders(), stages=stages(), before=before(), rivals=rivals(),
                       hours=sum(hours for _, hours in logged().values()), pipelines=pipelines())


def main():
    text = render()
    if '--check' not in sys.argv: CARD.write_text(text, encoding='utf-8')
    elif not CARD.exists() or CARD.read_text(encoding='utf-8') != text:
        sys.exit(f'{CARD.relative_to(ROOT)} is not what the log says. Run `python tools/card.py`.')


if __name__ == '__main__': main()
