"Every scheduler that diffusers exports: exchanged for one that keeps the model's law, or refused; and the flow sampler in its pipelines."
import copy, inspect, math, pickle, warnings

import diffusers, pytest, torch

from llava_reward_nb.steering.particles import SteeringError
from llava_reward_nb.steering.schedulers import CONSISTENCY, FlowSDEScheduler, check_scheduler, stochastic

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
MEAN, SD = .1, .35       # the images of this test's world: independent normal numbers, well within [-1, 1]


def levels(scheduler):
    "For the old scheduler's model: time step -> (alpha, sigma), as trained."
    c, name = scheduler.config, type(scheduler).__name__
    if name.startswith('EDM'): return lambda t: (1., math.exp(4*t))
    if 'Flow' in name or 'RF' in name or c.get('use_flow_sigmas'): return lambda t: (1-t/1000, t/1000)
    sigmas = ((1-scheduler.alphas_cumprod.double())/scheduler.alphas_cumprod.double())**.5
    def level(t):
        if t>len(sigmas)-1: return level(len(sigmas)-1)
        i = min(int(t), len(sigmas)-2)
        s = (sigmas[i]+(t-i)*(sigmas[i+1]-sigmas[i])).item() if t!=i else sigmas[i].item()
        return (1/math.sqrt(1+s*s), s/math.sqrt(1+s*s)) if math.isfinite(s) else (0., 1.)
    return level


def network(scheduler):
    "The exact network of this world as the old scheduler wants it: (input, time step) -> output."
    level, c, name = levels(scheduler), scheduler.config, type(scheduler).__name__
    kind = c.get('prediction_type', 'epsilon') if 'sigma_data' in c or hasattr(scheduler, 'alphas_cumprod') else 'flow'
    if c.get('use_flow_sigmas'): kind = 'flow'
    def net(x, t):
        a, s = level(float(t))
        x = x.double()
        if name.startswith('EDM'): x = x*math.sqrt(s*s+c.sigma_data**2)
        x0 = MEAN + a*SD**2/(a*a*SD**2+s*s)*(x-a*MEAN)
        if name.startswith('EDM'):
            d = c.sigma_data
            skip, out = d*d/(s*s+d*d), s*d/math.sqrt(s*s+d*d)
            return ((x0-skip*x)/(out if kind=='epsilon' else -out)).float()
        noise = (x-a*x0)/s if s else torch.zeros_like(x)
        return {'epsilon': noise, 'sample': x0, 'v_prediction': a*noise-s*x0, 'flow': noise-x0}[kind].float()
    return net


def draw(scheduler, net, steps=100, n=10_000):
    "Images that a pipeline would make."
    g, kw = torch.Generator().manual_seed(0), {'mu': .7} if scheduler.config.get('use_dynamic_shifting') else {}
    if hasattr(scheduler, 'noise_sampler_seed'): scheduler.noise_sampler_seed = 1
    scheduler.set_timesteps(steps, **kw)
    x = torch.randn(1, 1, 100, n//100, generator=g)*getattr(scheduler, 'init_noise_sigma', 1.)
    names = inspect.signature(scheduler.step).parameters
    more = {**({'generator': g} if 'generator' in names else {}), **({'eta': 1.} if 'eta' in names else {})}
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, 'scale_model_input') else x
        x = scheduler.step(net(inputs, t), t, x, return_dict=False, **more)[0]
    return x.flatten().double()


def all_schedulers():
    for name in sorted(n for n in dir(diffusers) if n.endswith('Scheduler')):
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and name!='SchedulerMixin' and 'Parallel' not in name: yield name, kind


VARIANTS = [{}, dict(timestep_spacing='trailing'), dict(timestep_spacing='leading', steps_offset=1), dict(timestep_spacing='linspace'), dict(prediction_type='v_prediction'),
            dict(prediction_type='sample'), dict(beta_schedule='scaled_linear', beta_start=.00085, beta_end=.012), dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True),
            dict(use_beta_sigmas=True), dict(final_sigmas_type='sigma_min'), dict(set_alpha_to_one=False), dict(rescale_betas_zero_snr=True, prediction_type='v_prediction'),
            dict(rescale_betas_zero_snr=True, timestep_spacing='trailing'), dict(sigma_data=1.), dict(sigma_schedule='exponential'), dict(shift=3.),
            dict(use_dynamic_shifting=True), dict(stochastic_sampling=True), dict(use_flow_sigmas=True, prediction_type='flow_prediction', flow_shift=3.),
            dict(thresholding=True, sample_max_value=2.), dict(clip_sample=False), dict(solver_order=3), dict(algorithm_type='sde-dpmsolver'), dict(timestep_type='continuous', use_karras_sigmas=True)]


@pytest.mark.parametrize('name,kind', list(all_schedulers()), ids=[n for n, _ in all_schedulers()])
def test_every_scheduler_keeps_the_law_or_is_refused(name, kind):
    kept, slow = set(), name in ('DPMSolverSDEScheduler', 'KDPM2DiscreteScheduler', 'KDPM2AncestralDiscreteScheduler', 'HeunDiscreteScheduler')
    for settings in ([{}, dict(use_karras_sigmas=True)] if slow else VARIANTS):
        names = inspect.signature(kind.__init__).parameters
        if not set(settings)<=set(names): continue
        try: old = kind(**settings)
        except Exception: continue          # not a scheduler of this library, or a combination that diffusers refuses
        try: new = stochastic(old)
        except SteeringError: continue
        check_scheduler(new)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            x = draw(new, network(old))
        assert abs(x.mean()-MEAN)<.02 and abs(x.std()-SD)<.04, (name, settings, type(new).__name__, x.mean().item(), x.std().item())
        kept.add(str(settings))
    if name in CONSISTENCY: assert not kept


# ---- the flow sampler ----

class Modes:
    "Exact velocity of .3 N(-2, .3^2) + .7 N(2, .3^2)."
    def __call__(self, x, sigma):
        z, var = x.double().flatten()[:, None], (1-sigma)**2*.09+sigma**2
        mu, w = torch.tensor([-2., 2.], dtype=torch.float64), torch.tensor([.3, .7], dtype=torch.float64)
        post = torch.softmax(w.log()-(z-(1-sigma)*mu)**2/(2*var), -1)
        x0 = (post*(mu+(1-sigma)*.09/var*(z-(1-sigma)*mu))).sum(-1)
        return ((z[:, 0]-x0)/sigma).float().view_as(x)

    def law(self, scheduler, seed, n=40_000):
        g = torch.Generator().manual_seed(seed)
        scheduler.set_timesteps(50)
        x = torch.randn(n, 1, 1, 1, generator=g)
        for t in scheduler.timesteps: x = scheduler.step(self(x, float(t)/1000), t, x, generator=g, return_dict=False)[0]
        return (x>0).float().mean().item(), x[x>0].std().item(), x[x<0].std().item()


@pytest.mark.parametrize('seed', range(3))
def test_flow_keeps_the_law(seed):
    "Shares and spreads within .01 of the truth at 50 steps; three standard errors of 40,000 draws are .007 and .006, so chance alone does not fail it."
    old = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert Modes().law(stochastic(old), seed) == pytest.approx((.7, .3, .3), abs=.01)
    share, upper, lower = Modes().law(old, seed)
    assert share>.75 and upper<.25 and lower<.25        # what is replaced loses a third of the spread


def test_flow_scheduler_is_copied_and_pickled():
    s = FlowSDEScheduler(shift=3., noise_level=.5)
    for t in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s), FlowSDEScheduler.from_config(s.config)):
        assert type(t) is FlowSDEScheduler and t.config.noise_level==.5 and t.config.shift==3.


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_flow_in_half_precision_computes_in_float32(dtype):
    "Rounded latents and outputs in, the step itself in float32: nothing but one rounding differs."
    runs = []
    for d in (dtype, torch.float32):
        s, g = FlowSDEScheduler(), torch.Generator().manual_seed(0)
        s.set_timesteps(8)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        out = s.step((.3*x).to(d), s.timesteps[0], x.to(d), generator=g)
        runs.append(out)
        assert out.prev_sample.dtype==d and out.pred_original_sample.dtype==torch.float32
    assert torch.allclose(runs[0].pred_original_sample, runs[1].pred_original_sample, rtol=1e-2, atol=1e-2)
    assert torch.allclose(runs[0].prev_sample.float(), runs[1].prev_sample, rtol=1e-2, atol=1e-2)
