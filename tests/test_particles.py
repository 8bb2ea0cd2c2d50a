"The published mode against trajectories of the public FK code; the evaluation script's particle summary."
import json
from pathlib import Path

import pytest, torch
from llava_reward_nb.steering.particles import PublishedParticles, SteeringError, particle_summary, resample_steps

GOLDEN = json.loads((Path(__file__).resolve().parent/'golden'/'steering.json').read_text(encoding='utf-8'))
KINDS = dict(max='max', diff='difference', add='sum', rt='reward')


def numbers(xs):
    "Golden files write nan and infinities as strings."
    return torch.tensor([float(x) for x in xs])


@pytest.mark.parametrize('case', GOLDEN['fk_steering'], ids=lambda c: c['name'])
def test_published_trajectory(case):
    g = torch.Generator().manual_seed(case['seed'])
    ps = PublishedParticles(case['k'], case['lambda'], KINDS[case['potential']], case['adaptive'], case['reward_min_value'] or 0.)
    none = case['start'] > case['end']
    steps = resample_steps(case['steps'], steps=[]) if none else resample_steps(case['steps'], case['start'], case['end'], case['every'])
    particles = torch.arange(case['k'])
    error = case.get('error')
    assert steps[:len(case['result'])] == [r['index'] for r in case['result']]
    for i, want in zip(steps, case['result']):
        r = numbers(want['rewards'])
        a, w, ess = ps.step(r, i == steps[-1], g)
        torch.testing.assert_close(w, numbers(want['weights']), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(ess), torch.tensor(float(want['ess'])), rtol=1e-5, atol=0, equal_nan=True)
        assert (a is not None) == want['resampled'] and (a if a is None else a.tolist()) == want['ancestors']
        if a is not None: particles = particles[a]
        assert particles.tolist() == want['particles']
        torch.testing.assert_close(ps.memory, numbers(want['population_rewards']), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ps.product, numbers(want['product_of_potentials']), rtol=1e-5, atol=0)
    if error:
        i = len(case['result'])
        with pytest.raises(SteeringError, match='every weight is zero'): ps.step(numbers(case['rewards'][i]), steps[i] == steps[-1], g)
    else: assert abs(torch.rand(1, generator=g).item()-case['next_rand']) < 1e-6  # as much of the generator was used


def test_particle_summary():
    want = GOLDEN['particle_summary']
    runs = [particle_summary(p['scores'], want['guidance']) for p in want['prompts']]
    for got, p in zip(runs, want['prompts']):
        assert got['order'] == p['order_by_guidance_descending']
        for m, stats in p['per_metric'].items():
            assert got['metrics'][m] == pytest.approx(stats, rel=1e-5, abs=1e-6)
    for m, final in want['final'].items():
        for stat, v in final.items():
            assert sum(r['metrics'][m][stat] for r in runs)/len(runs) == pytest.approx(v, rel=1e-5)
        assert sum(r['metrics'][m]['best_particle'] for r in runs)/len(runs) == pytest.approx(want['final_best_particle_mean'][m], rel=1e-5)
