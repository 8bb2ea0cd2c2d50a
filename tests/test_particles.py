"The published mode against trajectories of the public FK code."
import json
from pathlib import Path

import pytest, torch
from llava_reward_nb.steering.particles import PublishedParticles, SteeringError, resample_steps

GOLDEN = json.loads((Path(__file__).resolve().parent/'golden'/'steering.json').read_text(encoding='utf-8'))
KINDS = dict(max='max', diff='difference', add='sum', rt='reward')


def numbers(xs):
    "Golden files write nan and infinities as strings."
    return torch.tensor([float(x) for x in xs])


@pytest.mark.parametrize('case', GOLDEN['fk_steering'], ids=lambda c: c['name'])
def test_published_trajectory(case):
    g = torch.Generator().manual_seed(case['seed'])
    ps = PublishedParticles(1, case['k'], case['lambda'], KINDS[case['potential']], case['reward_min_value'] or 0.)
    ess_min = .5 if case['adaptive'] else 1.
    none = case['start'] > case['end']
    steps = resample_steps(case['steps'], steps=[]) if none else resample_steps(case['steps'], case['start'], case['end'], case['every'])
    particles = torch.arange(case['k'])
    error = case.get('error')
    assert steps[:len(case['result'])] == [r['index'] for r in case['result']]
    for i, want in zip(steps, case['result']):
        r = numbers(want['rewards'])
        ps.weigh(r[None], i == steps[-1])
        torch.testing.assert_close(ps.weights[0], numbers(want['weights']), rtol=1e-5, atol=0)
        (a,), (resampled,), (ess,) = ps.resample([g], ess_min)
        torch.testing.assert_close(ess, torch.tensor(float(want['ess'])), rtol=1e-5, atol=0, equal_nan=True)
        assert resampled.item() == want['resampled']
        assert a.tolist() == (want['ancestors'] if resampled else list(range(case['k'])))
        particles = particles[a]
        assert particles.tolist() == want['particles']
        torch.testing.assert_close(ps.memory[0], numbers(want['population_rewards']), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ps.product[0], numbers(want['product_of_potentials']), rtol=1e-5, atol=0)
    if error:
        i = len(case['result'])
        ps.weigh(numbers(case['rewards'][i])[None], steps[i] == steps[-1])
        with pytest.raises(SteeringError, match='every weight is zero'): ps.resample([g], ess_min)
    else: assert abs(torch.rand(1, generator=g).item()-case['next_rand']) < 1e-6  # as much of the generator was used
