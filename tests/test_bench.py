"The benchmark of speed: its yardstick against golden rewards, any backbone, drift of half precision, the command, and the script for a GPU."
import importlib.util, json, os, shlex, subprocess
from dataclasses import replace

import families, pytest, torch
from project import ROOT
from torch.testing import assert_close

from llava_reward_nb.bench import STAGES, Case, llava_reward_bench, measure_case, measure_drift
from llava_reward_nb.model import RewardModel
from llava_reward_nb.quantize import drift
from llava_reward_nb.reference import ReferenceLike
from llava_reward_nb.shapes.records import alignment_pairs

TOL = dict(atol=2e-5, rtol=0)


@pytest.fixture(scope='module')
def yardstick(toy):
    "Function from an adapter and crops to `ReferenceLike`; models are loaded once."
    made = {}
    def get(adapter, num_crops, attention='eager', **reading):
        if adapter not in made: made[adapter] = RewardModel.from_pretrained(toy/adapter, base=toy/'base', device='cpu', dtype=torch.float32)
        rm = made[adapter]
        rm.backbone.processor.image_processor.num_crops = num_crops
        reference = ReferenceLike(rm, attention=attention)
        reference.reading = replace(reference.reading, **reading)
        return reference
    return get


def test_the_yardstick_gives_the_golden_rewards(golden, yardstick, image):
    "It does the public code's work, so it gives the public code's numbers."
    names = ['bt_skipca/sq_a/p0/1', 'bt_skipca/odd/p0/1', 'bt_skipca_layer2/sq_a/p0/1', 'bt_skipca/port/p0/4', 'bt_skipca/tall/p1/4',
             'bt_skipca_mean/port/p0/4', 'gpm2_skipca/land/p0/4']
    cases = [c for c in golden['forward'] if c['name'] in names]
    assert len(cases) == len(names)
    for case in cases:
        reading = {'pooling': 'mean'} if case['mean_hidden_state'] else {} if case['layer_id'] == 32 else {'layer': case['layer_id']}
        got = yardstick(case['adapter'], case['num_crops'], **reading)(image(case['image']), golden['prompts'][case['prompt']])[0]
        assert_close(got, torch.tensor(case['reward']), **TOL, msg=lambda m: f"{case['name']}: {m}")


@pytest.mark.parametrize('attention', ['eager', 'flash'])
def test_the_yardstick_in_mixed_batches(golden, yardstick, image, attention):
    "Padding of batch mates changes nothing, unlike in the public code."
    case = min(golden['batch_mixed_size_reference_quirk']['cases'], key=lambda c: (c['num_crops'], len(c['rows'])))
    images, prompts = zip(*[(image(i), golden['prompts'][p]) for i, p in case['rows']])
    got = yardstick('adapter', case['num_crops'], attention)(list(images), list(prompts))
    assert_close(got, torch.tensor(case['adapter']['alone']), **TOL)


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'llava_next'])
def test_any_backbone_is_measured(name, tmp_path):
    "A base without perspectives gets a random one; what it needs is counted by PyTorch."
    folder = families.FAMILIES[name](tmp_path)
    case = Case(name, '', str(folder), image_size='64x48', images=3, batch=2, repeats=1)
    m = measure_case(case, 'ours', threads=1)
    assert set(STAGES) >= set(m.stages) >= {'preprocessing', 'tower', 'language', 'head'}
    assert m.work > 0 and m.ceiling > 0 and len(m.vectors['p0']) == 3
    with pytest.raises(ValueError, match="known for Phi-3.5-vision.*this base is"): measure_case(case, 'reference-like', threads=1)


def test_half_precision_keeps_the_order_of_500_scores():
    records = alignment_pairs(250, seed=11, split='unseen')
    images = [r[k] for r in records for k in ('chosen_path', 'reject_path')]
    prompts = [r['prompt'] for r in records for _ in range(2)]
    names = ['fidelity']
    exact, half = [RewardModel.from_pretrained('tiny', names, device='cpu', dtype=t).embed_all(images, prompts) for t in (torch.float32, torch.bfloat16)]
    for name in names:
        moved = drift(exact[name][:, 0], half[name][:, 0])
        assert moved.n == 500 and moved.tau >= .98, f'{name}: {moved}'
        assert 0 < moved.largest < .25*moved.spread, f'{name}: {moved}'


def test_drift_of_a_precision_that_is_exact():
    moved = measure_drift(Case('tiny', '', 'tiny', crops=1, batch=8), 8, threads=1)
    assert moved.tau == 1 and moved.largest < 1e-5


def test_the_command(tmp_path, capsys):
    "Two processes for the two ways, one for drift; everything is in the file."
    out = tmp_path/'bench.json'
    llava_reward_bench.main(f'--model tiny --image-size 64x64 --crops 1 --images 3 --batch 2 --repeats 1 --precision bfloat16 --drift 12 '
                            f'--against reference-like --device cpu --threads 1 --out {shlex.quote(str(out))}'.split())
    said, kept = capsys.readouterr(), json.loads(out.read_text())
    assert 'one image alone' in said.out and 'Kendall' in said.out and f'written to {out}' in said.out
    assert 'making the model' in said.err and 'timing 1 of 1' in said.err # progress where no bar can be seen
    assert [(r['path'], r['precision']) for r in kept['rows']] == [('ours', 'bfloat16'), ('reference-like', 'bfloat16')]
    ours = kept['rows'][0]
    assert 0 <= ours['max diff'] < .2 and ours['speed-up'] > 0 and ours['share of ceiling'] > 0
    assert kept['drift'][0]['n'] == 12 and kept['machine']['device'].startswith('CPU')
    assert {k['path'] for k in kept['kernels']} == {'ours', 'reference-like'}


def test_the_gpu_script_asks_for_what_there_is(tmp_path):
    "Each of its commands has options that the command knows."
    for dry in '', '1':
        env = os.environ | dict(PYTHON='echo', DRY=dry)
        done = subprocess.run(['bash', 'tools/gpu_bench.sh', str(tmp_path/f'out{dry}')], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
        asked = [shlex.split(line.partition('--size')[1]+line.partition('--size')[2]) for line in done.stdout.splitlines() if '--size' in line]
        assert len(asked) == 9
        for words in asked:
            got = llava_reward_bench.parser().parse_args(words)
            assert got.size == ('tiny' if dry else 'full') and got.out.endswith('.json')
            case = Case('', got.size, precision=got.precision[0])
            assert replace(case).dtype in (torch.float32, torch.bfloat16)


def test_the_gpu_script_judges_what_it_measured(tmp_path):
    "Targets are met or not on an H100 only, and what is missing is said to be missing."
    spec = importlib.util.spec_from_file_location('gpu_report', ROOT/'tools/gpu_report.py')
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    def write(name, device='NVIDIA H100 80GB HBM3', **figures):
        rows = [{'path': 'ours', 's/image': .05, 'share of ceiling': .71, 'wall over device': 1.2, 'one image p50': None, **figures},
                {'path': 'reference-like', 's/image': .117}]
        (tmp_path/f'{name}.json').write_text(json.dumps(dict(machine=dict(device=device, torch='2'), rows=rows, drift=[])))
    def line(start): return next(text for text in report.table(tmp_path).splitlines() if text.startswith(start)).split()
    write('square')
    write('four', **{'s/image': .2})
    assert line('share of the matmul ceiling on the device, one')[-4:] == ['0.70', '0.71', 'yes', 'square']
    assert line('times as fast as the reference')[-3:] == ['2.34', 'yes', 'square']
    assert line('time by the clock')[-3:] == ['1.20', 'NO', 'square']
    assert line('four perspectives')[-3:] == ['4.00', 'NO', 'four']
    for missing in 'one image alone', 'share of the matmul ceiling on the device, mixed', 'a step: times': assert 'not measured' in ' '.join(line(missing))
    write('compiled', **{'s/image': .04, 'wall over device': 1.1})
    assert line('ms an image')[-3:] == ['40.0', 'yes', 'compiled'] and line('time by the clock')[-2:] == ['yes', 'compiled']
    write('square', device='CPU, 1 threads')
    assert not {'yes', 'NO'} & set(report.table(tmp_path).split()) and 'nothing is judged' in report.table(tmp_path)
