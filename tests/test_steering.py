"Steering of tiny random pipelines of every family, of every supported scheduler, and exactness on Gaussian mixtures."
import copy, inspect, math
from types import SimpleNamespace

import diffusers, numpy as np, pytest, torch
from PIL import Image
from scipy import stats
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from llava_reward_nb.particles import POTENTIALS, RESAMPLERS, SteeringError, family_se
from llava_reward_nb.steering import decode_latents, fk_steer, steer, stochastic

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()


def brightness(images, prompts):
    "Mean brightness, a reward that can be checked by hand."
    return torch.tensor([np.asarray(im, dtype=np.float32).mean()/255 for im in images])


# ---- tiny pipelines with random weights ----

@pytest.fixture(scope='session')
def clip_tokenizer():
    "Letters as tokens."
    letters = list('abcdefghijklmnopqrstuvwxyz')
    vocab = {t: i for i, t in enumerate(['<|startoftext|>', '<|endoftext|>'] + letters + [c+'</w>' for c in letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


@pytest.fixture(scope='session')
def t5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel({'<pad>': 0, '</s>': 1, '<unk>': 2, 'a': 3, 'red': 4, 'circle': 5}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', model_max_length=16)


def text_encoder(cls=CLIPTextModel, hidden=32):
    return cls(CLIPTextConfig(vocab_size=54, hidden_size=hidden, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
                              max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval()


def tiny_vae(channels=4, **kw):
    "Eight times smaller latents, as the real ones."
    return diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=channels, down_block_types=('DownEncoderBlock2D',)*4,
                                   up_block_types=('UpDecoderBlock2D',)*4, **kw).eval()


def tiny_sd(tok):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=2,
                                          down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'))
    sch = diffusers.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(vae=tiny_vae(), text_encoder=text_encoder(), tokenizer=tok, unet=unet, scheduler=sch, safety_checker=None,
                                             feature_extractor=None, requires_safety_checker=False)


def tiny_sdxl(tok):
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=64, attention_head_dim=2,
                                          down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), addition_embed_type='text_time',
                                          addition_time_embed_dim=8, projection_class_embeddings_input_dim=32+6*8, transformer_layers_per_block=1)
    sch = diffusers.EulerDiscreteScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', timestep_spacing='leading', steps_offset=1)
    return diffusers.StableDiffusionXLPipeline(vae=tiny_vae(), text_encoder=text_encoder(), text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer=tok,
                                               tokenizer_2=tok, unet=unet, scheduler=sch, add_watermarker=False)


def tiny_sd3(tok):
    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel(sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
                                          caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=16)
    return diffusers.StableDiffusion3Pipeline(transformer=net, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.), vae=tiny_vae(scaling_factor=1.5, shift_factor=.06),
                                              text_encoder=text_encoder(CLIPTextModelWithProjection), tokenizer=tok, text_encoder_2=text_encoder(CLIPTextModelWithProjection),
                                              tokenizer_2=tok, text_encoder_3=None, tokenizer_3=None)


def tiny_t5(): return T5EncoderModel(T5Config(vocab_size=16, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, decoder_start_token_id=0)).eval()


def tiny_flux(tok, t5):
    torch.manual_seed(0)
    net = diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                                           pooled_projection_dim=32, axes_dims_rope=(4, 4, 8))
    return diffusers.FluxPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True), vae=tiny_vae(scaling_factor=.36, shift_factor=.11),
                                  text_encoder=text_encoder(), tokenizer=tok, text_encoder_2=tiny_t5(), tokenizer_2=t5, transformer=net)


def tiny_pixart(tok, t5):
    torch.manual_seed(0)
    net = diffusers.PixArtTransformer2DModel(sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32, in_channels=4,
                                             cross_attention_dim=24, out_channels=8, norm_num_groups=3)
    return diffusers.PixArtAlphaPipeline(tokenizer=t5, text_encoder=tiny_t5(), vae=tiny_vae(), transformer=net, scheduler=diffusers.DPMSolverMultistepScheduler())


CALLS = dict(sd={}, sdxl=dict(height=64, width=64), sd3=dict(height=64, width=64), flux=dict(height=64, width=32, max_sequence_length=16),
             pixart=dict(height=64, width=64, use_resolution_binning=False, max_sequence_length=16))


@pytest.fixture(scope='session', params=list(CALLS))
def pipe(request, clip_tokenizer, t5_tokenizer):
    make = globals()[f'tiny_{request.param}']
    p = make(clip_tokenizer, t5_tokenizer) if request.param in ('flux', 'pixart') else make(clip_tokenizer)
    if request.param=='pixart': p.text_preprocessing = None
    p.scheduler = stochastic(p.scheduler)
    p.set_progress_bar_config(disable=True)
    p.kw = dict(num_inference_steps=8, guidance_scale=3., **CALLS[request.param])
    return p


@pytest.fixture(scope='session')
def sd(clip_tokenizer):
    p = tiny_sd(clip_tokenizer)
    p.set_progress_bar_config(disable=True)
    return p


def same(a, b): return np.abs(np.asarray(a).astype(int)-np.asarray(b)).max() <= 2


# ---- every family ----

def test_brightness_rises(pipe):
    kw = dict(n_particles=8, lam=3000., potential='difference', steps=[3, 5, 6], seed=1, **pipe.kw)
    free = fk_steer(pipe, ['red circle', 'a'], brightness, method='best-of-n', **kw)
    steered = fk_steer(pipe, ['red circle', 'a'], brightness, **kw)
    assert steered.rewards.mean() > free.rewards.mean() + free.rewards.std()/4
    # the rewards are those of the images
    for res in (free, steered):
        for ims, r in zip(res.images, res.rewards): assert torch.allclose(brightness(ims, None).double(), r, atol=2/255)
    # without resampling the images are the pipeline's own
    fk = steer(pipe, brightness, ['red circle', 'a'], n_particles=8, seed=1)
    with torch.no_grad(): plain = pipe(**fk.pipe_kwargs, **({'eta': 1.} if 'eta' in inspect.signature(pipe.__call__).parameters else {}), **pipe.kw).images
    if isinstance(pipe.scheduler, diffusers.DDIMScheduler):
        assert all(same(a, b) for a, b in zip(plain, [i for g in free.images for i in g]))


def test_ancestors_are_the_images(pipe):
    "The images before the last resampling, exchanged by the ancestors that the trace reports, are the images returned."
    seen = {}
    def spy(images, prompts):
        seen['last'] = images
        return brightness(images, prompts)
    res = fk_steer(pipe, ['red circle', 'a'], spy, n_particles=4, lam=300., potential='difference', seed=2, **pipe.kw)
    a = res.trace.looks[-1]['ancestors']
    assert res.trace.looks[-1]['resampled'].all()
    for p in range(2):
        for i in range(4): assert same(res.images[p][i], seen['last'][4*p+a[p, i]])


def test_copies_are_copies(pipe):
    "A reward that only likes particle 2 at every look: all images descend from slot 2, and the last look makes them equal."
    def favourite(images, prompts): return torch.tensor([0., 0., 1., 0.]*(len(images)//4))
    res = fk_steer(pipe, 'red circle', favourite, n_particles=4, lam=100., potential='reward', steps=[2], ess_min=1., seed=3, **pipe.kw)
    assert res.trace.roots.tolist() == [[2]*4] or res.trace.looks[0]['ancestors'].tolist() == [[2]*4]
    assert all(same(im, res.images[0][0]) for im in res.images[0])


def test_same_seed_same_images(pipe):
    "Whatever else is in the batch."
    kw = dict(n_particles=2, lam=100., seed=4, **pipe.kw)
    both = fk_steer(pipe, ['red circle', 'a'], brightness, **kw)
    alone = fk_steer(pipe, ['a'], brightness, **kw)
    assert all(same(a, b) for a, b in zip(both.images[1], alone.images[0]))
    assert torch.allclose(both.rewards[1], alone.rewards[0], atol=2/255)
    split = fk_steer(pipe, ['red circle', 'a'], brightness, batch_prompts=1, batch_size=1, **kw)
    assert torch.allclose(split.rewards, both.rewards, atol=2/255)
    other = fk_steer(pipe, ['a'], brightness, **dict(kw, seed=5))
    assert not same(other.images[0][0], alone.images[0][0])


def test_preview_equals_pipeline_decode(pipe):
    "decode_latents is what the pipeline does at its end."
    kw, size = pipe.kw, (pipe.kw.get('height'), pipe.kw.get('width'))
    free = lambda **k: steer(pipe, brightness, 'a', n_particles=2, method='best-of-n', size=size)(**kw, **k).images
    z, images = free(output_type='latent'), free()
    got = decode_latents(z, pipe, size=size if z.ndim==3 else None)
    for a, b in zip(got, images): assert np.abs((a.permute(1, 2, 0).numpy()*255).round() - np.asarray(b)).max() <= 1


# ---- every scheduler ----

SCHEDULERS = dict(
    ddim=lambda c: diffusers.DDIMScheduler.from_config(c), ddpm=lambda c: diffusers.DDPMScheduler.from_config(c),
    euler_a=lambda c: diffusers.EulerAncestralDiscreteScheduler.from_config(c), lcm=lambda c: diffusers.LCMScheduler.from_config(c),
    dpm_sde=lambda c: diffusers.DPMSolverSDEScheduler.from_config(c), dpm_multi=lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, algorithm_type='sde-dpmsolver++'))


@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers(sd, name):
    if name=='dpm_sde': pytest.importorskip('torchsde')
    p = copy.copy(sd)
    p.scheduler = SCHEDULERS[name](sd.scheduler.config)
    kw = dict(n_particles=4, lam=3000., potential='difference', num_inference_steps=8, seed=1)
    free = fk_steer(p, ['red', 'a'], brightness, method='best-of-n', **kw)
    res = fk_steer(p, ['red', 'a'], brightness, **kw)
    assert res.rewards.mean() > free.rewards.mean()
    assert [l['step'] for l in res.trace.looks] == [1, 3, 4, 6, 7] and res.trace.n_steps == 8
    for ims, r in zip(res.images, res.rewards): assert torch.allclose(brightness(ims, None).double(), r, atol=2/255)
    again = fk_steer(p, ['a'], brightness, **kw)
    assert all(same(a, b) for a, b in zip(res.images[1], again.images[0]))
    assert 'step' not in vars(p.scheduler)


def test_deterministic_refused(sd):
    for s in (diffusers.PNDMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.HeunDiscreteScheduler):
        p = copy.copy(sd)
        p.scheduler = s.from_config(sd.scheduler.config)
        with pytest.raises(SteeringError, match='stochastic'): fk_steer(p, 'a', brightness, num_inference_steps=4)
        p.scheduler = stochastic(p.scheduler)
        fk_steer(p, 'a', brightness, num_inference_steps=4, n_particles=2)
    with pytest.raises(SteeringError, match='eta=1'): fk_steer(sd, 'a', brightness, eta=0.)


# ---- Stable Diffusion in detail ----

def test_context_manager_with_plain_call(sd):
    with steer(sd, brightness, ['red', 'a'], n_particles=2) as fk:
        out = sd(['red', 'a'], num_images_per_prompt=2, num_inference_steps=6, negative_prompt=['a', 'a'])
    assert len(out.images)==4 and fk.trace.n_steps==6
    for im, r in zip(out.images, fk.trace.rewards.flatten()): assert abs(brightness([im], None).item()-r) < 2/255


def test_prompts_that_do_not_divide(sd):
    with pytest.raises(SteeringError, match='batch of 6'), steer(sd, brightness, ['red', 'a'], n_particles=4):
        sd(['red', 'a', 'b'], num_images_per_prompt=2, num_inference_steps=4)
    assert 'step' not in vars(sd.scheduler)


def test_image_to_image(sd):
    "A run that begins in the middle of the schedule counts its own steps."
    p = diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    p.set_progress_bar_config(disable=True)
    fk = steer(p, brightness, 'a', n_particles=2, steps=[1])
    with fk: p(['a'], image=Image.new('RGB', (64, 64)), strength=.5, num_inference_steps=8, num_images_per_prompt=2)
    assert fk.trace.n_steps==4 and [l['step'] for l in fk.trace.looks]==[1, 3]


def test_tiny_autoencoder_previews(sd):
    taesd = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4, num_encoder_blocks=(1,)*4, num_decoder_blocks=(1,)*4).eval()
    res = fk_steer(sd, 'a', brightness, vae=taesd, n_particles=2, num_inference_steps=5)
    assert res.trace.looks[0]['thumbs'][0][0].size == (64, 64)


def test_half_precision_overflow(sd):
    p = copy.copy(sd)
    p.vae = copy.deepcopy(sd.vae)
    with torch.no_grad(): p.vae.decoder.conv_in.weight.mul_(1e6)
    p.vae.half()
    with pytest.raises(SteeringError, match='overflows in torch.float16'): fk_steer(p, 'a', brightness, n_particles=2, num_inference_steps=5)
    assert 'step' not in vars(p.scheduler)


def test_force_upcast(clip_tokenizer):
    p = tiny_sdxl(clip_tokenizer)
    p.vae = p.vae.half()
    with torch.no_grad(): p.vae.decoder.conv_in.weight.mul_(1e5)
    z = torch.randn(2, 4, 8, 8)
    p.vae.register_to_config(force_upcast=True)
    assert decode_latents(z, p).isfinite().all() and p.vae.dtype==torch.float16
    p.vae.register_to_config(force_upcast=False)
    with pytest.raises(SteeringError, match='overflows'): decode_latents(z.sign()*60, p)


def test_rewards_that_fail(sd):
    go = lambda f: fk_steer(sd, ['red', 'a'], f, n_particles=2, num_inference_steps=5)
    with pytest.raises(SteeringError, match=r'shape \(3,\) for 4 images'): go(lambda i, p: torch.zeros(3))
    with pytest.raises(SteeringError, match='group 0 has a finite reward'), pytest.warns(UserWarning, match='not finite'): go(lambda i, p: torch.full((4,), math.nan))
    with pytest.warns(UserWarning, match='1 of 4 rewards'): res = go(lambda i, p: torch.tensor([math.nan, 1., 1., 1.]))
    assert res.trace.looks[0]['ancestors'].tolist()[0] == [1, 1]
    with pytest.raises(SteeringError, match="held-out reward 'b'"): fk_steer(sd, 'a', brightness, held_out=dict(b=lambda i, p: 3.), n_particles=2, num_inference_steps=5)
    assert 'step' not in vars(sd.scheduler)


def test_errors_before_the_run(sd):
    calls = []
    count = lambda *a: calls.append(1)
    handle = sd.unet.register_forward_pre_hook(count)
    try:
        for kw in (dict(n_particles=1), dict(steps=[9], num_inference_steps=9), dict(start=20, end=80, every=20, num_inference_steps=50), dict(potential='best'), dict(n_particle=4),
                   dict(seed=[1, 2])):
            with pytest.raises(SteeringError): fk_steer(sd, 'a', brightness, **kw)
    finally: handle.remove()
    assert not calls


def test_published_and_beam(sd):
    kw = dict(n_particles=4, lam=10., num_inference_steps=10, seed=0)
    pub = fk_steer(sd, 'red', brightness, published=True, ess_min=1., **kw)
    assert [l['step'] for l in pub.trace.looks]==[2, 4, 6, 8, 9] and all(l['resampled'].all() for l in pub.trace.looks[:-1])
    assert torch.allclose(brightness(pub.images[0], None).double(), pub.rewards[0], atol=2/255)
    # the same draws as the public code would make from one generator: initial latents, then noise and multinomials in turn
    beam = fk_steer(sd, 'red', brightness, method='beam', keep=1, **kw)
    for l in beam.trace.looks[:-1]: assert (l['ancestors']==l['rewards'].argmax()).all()
    assert len(set(beam.trace.looks[-1]['ancestors'][0].tolist()))==4


# ---- exactness ----

class Mixture:
    "Exact score of a mixture of spherical Gaussians, through DDIM."
    def __init__(self, mu, s, w):
        self.mu, self.s, self.w = torch.tensor(mu), torch.tensor(s), torch.tensor(w)
        self.scheduler = diffusers.DDIMScheduler(beta_schedule='squaredcos_cap_v2', clip_sample=False, timestep_spacing='trailing')

    def __call__(self, prompt, num_images_per_prompt=1, num_inference_steps=500, generator=None):
        gs = list(dict.fromkeys(generator))
        draw = lambda: torch.cat([torch.randn(num_images_per_prompt, self.mu.shape[1], generator=g) for g in gs])
        x, sch = draw(), self.scheduler
        sch.set_timesteps(num_inference_steps)
        for t in sch.timesteps:
            ab = sch.alphas_cumprod[int(t)]
            d, v = x[:, None]-ab.sqrt()*self.mu, ab*self.s**2+1-ab
            post = torch.softmax(self.w.log()-d.square().sum(-1)/(2*v)-.5*self.mu.shape[1]*v.log(), -1)
            x = sch.step((1-ab).sqrt()*((post/v)[..., None]*d).sum(1), t, x, variance_noise=draw()).prev_sample
        return SimpleNamespace(images=x)

    def tilt(self, a, lam):
        lw = self.w.log()+lam*self.mu@a+.5*lam**2*self.s**2*a.square().sum()
        t = copy.copy(self)
        t.mu, t.w = self.mu+lam*self.s[:, None]**2*a, torch.softmax(lw, 0)
        return t, lw.exp().sum().item()

    def draw(self, n, g):
        j = torch.multinomial(self.w, n, replacement=True, generator=g)
        return self.mu[j]+self.s[j, None]*torch.randn(n, self.mu.shape[1], generator=g)


LINE = Mixture([[-1.5], [1.]], [.4, .6], [.7, .3]), torch.tensor([1.])
PLANE = Mixture([[-1., -1.], [1., -.5], [0., 1.2]], [.4, .5, .3], [.5, .3, .2]), torch.tensor([.8, .6])
PLANE_PAIRS = list(zip(POTENTIALS, RESAMPLERS))


@pytest.mark.parametrize('world,potential,resampler', [(LINE, p, r) for p in POTENTIALS for r in RESAMPLERS] + [(PLANE, p, r) for p, r in PLANE_PAIRS],
                         ids=[f'1d-{p}-{r}' for p in POTENTIALS for r in RESAMPLERS]+[f'2d-{p}-{r}' for p, r in PLANE_PAIRS])
def test_exact(world, potential, resampler):
    (p, a), lam = world, .7
    fk = steer(p, lambda x, _: x@a, ['x'], decode=lambda z: z, batch_size=10**6, thumbnail=0, n_particles=20_000, lam=lam, steps=[150, 300], potential=potential,
               resampler=resampler, ess_min=1.)
    x = fk().images
    target, Z = p.tilt(a, lam)
    m = target.w@target.mu
    v = target.w@(target.s[:, None]**2+target.mu**2)-m**2
    roots, ref = fk.trace.roots[0], target.draw(200_000, torch.Generator().manual_seed(99))
    for c in range(x.shape[1]):
        y = x[:, c].double()
        assert abs(y.mean()-m[c]) < 3*family_se(y, roots)
        assert abs(((y-m[c])**2).mean()-v[c]) < 3*family_se((y-m[c])**2, roots)
        n = y.var().item()/family_se(y, roots)**2
        d = stats.ks_2samp(y.numpy(), ref[:, c].numpy()).statistic
        assert stats.kstwobign.sf(d*math.sqrt(n*2e5/(n+2e5))) > .01
    assert abs(fk.trace.log_z.exp().item()-Z) < .05*Z
