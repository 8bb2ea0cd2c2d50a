"""What `tools/gpu_bench.sh` measured against what is wanted: `python tools/gpu_report.py FOLDER` prints the table.

A target is met or not on an H100 at full size only; elsewhere the figures are printed and not judged. `--step DEVICE`
measures a training step first (the script calls it so) and writes FOLDER/step.json; `--qlora DEVICE` one in 4 bits."""
import argparse, json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Target:
    "A figure, and what it should be."
    what: str        # in the table
    piece: str       # the file it comes from
    wanted: str      # in the table
    value: object    # number, or None if it was not measured
    met: object      # number -> bool; None: no target, only a figure
    unit: str = '{:.2f}'


def read(folder, name):
    "A piece, or {} if there is none."
    path = Path(folder)/f'{name}.json'
    return json.loads(path.read_text()) if path.exists() else {}


def row(folder, name, path='ours'):
    "The row of one way in a piece, or {}."
    found = [r for r in read(folder, name).get('rows', []) if r['path'] == path]
    return found[0] if found else {}


def least(n): return lambda x: x >= n
def most(n): return lambda x: x <= n


def milliseconds(seconds): return None if seconds is None else 1000*seconds


def ratio(a, b): return a/b if a and b else None


def best(folder, names, key, take):
    "The best figure of several pieces, and the piece it comes from."
    have = [(r[key], name) for name in names if (r := row(folder, name)).get(key) is not None]
    return take(have) if have else (None, names[0])


def scoring(folder):
    "Targets of scoring."
    square, reference, four, fp8 = (row(folder, *name) for name in (['square'], ['square', 'reference-like'], ['four'], ['fp8']))
    share, from_share = best(folder, ['square', 'compiled'], 'share of ceiling', max)
    mixed, from_mixed = best(folder, ['mixed', 'compiled_mixed'], 'share of ceiling', max)
    wall, from_wall = best(folder, ['square', 'compiled'], 'wall over device', min)
    image, from_image = best(folder, ['square', 'compiled'], 's/image', min)
    alone, from_alone = best(folder, ['square', 'compiled'], 'one image p50', min)
    moved = (read(folder, 'fp8').get('drift') or [{}])[0]
    return [
        Target('share of the matmul ceiling on the device, one size', from_share, '>= 0.70', share, least(.7)),
        Target('share of the matmul ceiling on the device, mixed sizes', from_mixed, '>= 0.60', mixed, least(.6)),
        Target('time by the clock over time on the device', from_wall, '<= 1.15', wall, most(1.15)),
        Target('ms an image', from_image, '<= 53', milliseconds(image), most(53), '{:.1f}'),
        Target('times as fast as the reference-like path', from_image, '>= 2.2', ratio(reference.get('s/image'), image), least(2.2)),
        Target('the reference-like path, ms an image', 'square', '', milliseconds(reference.get('s/image')), None, '{:.1f}'),
        Target('one image alone, ms', from_alone, '<= 100', milliseconds(alone), most(100), '{:.1f}'),
        Target('four perspectives over one', 'four', '<= 3.4', ratio(four.get('s/image'), square.get('s/image')), most(3.4)),
        Target('peak memory above the model, GiB', 'square', '', ratio(square.get('peak MiB'), 1024), None, '{:.1f}'),
        Target('model, GiB', 'square', '', ratio(square.get('loaded MiB'), 1024), None, '{:.1f}'),
        Target('8 bits: times as fast as bfloat16', 'fp8', '', ratio(square.get('s/image'), fp8.get('s/image')), None),
        Target("8 bits: Kendall's tau of the scores", 'fp8', '', moved.get('tau'), None, '{:.4f}'),
    ]


def training(folder):
    "Targets of a training step."
    step = read(folder, 'step')
    ours, plain = (step.get(way, {}) for way in ('ours', 'plain'))
    whole = step.get('peak GiB in all')
    qlora = read(folder, 'qlora').get('peak GiB in all')
    return [
        Target('a step of 8 pairs as 2 x 4: pairs/s', 'step', '', ours.get('pairs/s'), None),
        Target('a step: times as fast as the straightforward loop', 'step', '>= 2', ours.get('times as fast'), least(2)),
        Target('a step: share of the matmul ceiling', 'step', '', ours.get('of ceiling'), None),
        Target('a step: peak memory, GiB (80 GB card)', 'step', '<= 74', whole, most(74), '{:.1f}'),
        Target('a step: peak memory, GiB (48 GB card)', 'step', '<= 44', whole, most(44), '{:.1f}'),
        Target('a step: planned over measured memory', 'step', '0.9 to 1.1', step.get('planned over measured'), lambda x: .9 <= x <= 1.1),
        Target('QLoRA, a step of 2 pairs: peak memory, GiB (24 GB card)', 'qlora', '<= 22', qlora, most(22), '{:.1f}'),
        Target('the straightforward loop: pairs/s', 'step', '', plain.get('pairs/s'), None),
    ]


def table(folder):
    "The table as text."
    machine = next((m for name in ('square', 'mixed', 'four') if (m := read(folder, name).get('machine'))), {})
    device = machine.get('device', 'nothing measured')
    judged = 'H100' in device
    lines = [('target', 'wanted', 'measured', 'met?', 'piece')]
    for t in [*scoring(folder), *training(folder)]:
        measured = 'not measured' if t.value is None else t.unit.format(t.value)
        met = '' if t.met is None or t.value is None or not judged else 'yes' if t.met(t.value) else 'NO'
        lines.append((t.what, t.wanted, measured, met, t.piece))
    widths = [max(len(line[k]) for line in lines) for k in range(5)]
    text = '\n'.join('  '.join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)
    note = '' if judged else '\nThe targets were set for an H100 at full size; on this device nothing is judged.'
    return f"{device}, torch {machine.get('torch', '?')}\n{text}{note}"


def measure_step(folder, device):
    "The paper's recipe on one device: pairs 4 at a time, 16 crops, checkpointing; tiny and short on a CPU."
    from llava_reward_nb.stepbench import StepSetup, compare_steps
    full = device == 'cuda'
    tiny = dict(size='tiny', image_size='90x60', crops=2, pairs=1, rank=4, threads=1)
    paper = dict(size='full', image_size='512x512', pairs=4, precision='bfloat16', checkpointing=True, attention='flash', device=device)
    setup = StepSetup(**paper if full else tiny)
    report = compare_steps(setup, 2, told=lambda line: print(f'   {line}', flush=True))
    result = {r['way']: r for r in report.rows()}
    loaded = model_gib(setup) if full else 0
    result |= {'setup': asdict(setup), 'planned over measured': report.planned/report.memory['ours'],
               'peak GiB in all': loaded+report.memory['ours']/1024}
    (Path(folder)/'step.json').write_text(json.dumps(result, indent=1)+'\n')


def measure_qlora(folder, device):
    "The most that a step with a decoder in 4 bits takes: two pairs, 16 crops, checkpointing; tiny on a CPU."
    from llava_reward_nb.stepbench import StepSetup, memory_apart
    full = device == 'cuda'
    paper = dict(size='full', image_size='512x512', pairs=2, precision='bfloat16', checkpointing=True, device=device)
    setup = StepSetup(**paper if full else dict(size='tiny', image_size='90x60', crops=2, rank=4, threads=1), four_bits=True)
    above = memory_apart(setup)
    loaded = model_gib(setup) if full else 0
    result = {'setup': asdict(setup), 'MiB': above, 'peak GiB in all': loaded+above/1024}
    (Path(folder)/'qlora.json').write_text(json.dumps(result, indent=1)+'\n')


def model_gib(setup):
    "What the loaded model takes, on the device."
    import torch
    from llava_reward_nb.stepbench import step_model
    step_model(setup)
    return torch.cuda.memory_allocated()/2**30


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder')
    parser.add_argument('--step', metavar='DEVICE', help='measure a training step first')
    parser.add_argument('--qlora', metavar='DEVICE', help='measure a training step in 4 bits first')
    asked = parser.parse_args()
    if asked.qlora: measure_qlora(asked.folder, asked.qlora)
    elif asked.step: measure_step(asked.folder, asked.step)
    else: print(table(asked.folder))
