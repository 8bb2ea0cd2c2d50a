"Steering of tiny random pipelines of every family, of every supported scheduler, and exactness on Gaussian mixtures."
import contextlib, copy, inspect, math, threading

import diffusers, numpy as np, pytest, torch
from PIL import Image
from scipy import stats
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from llava_reward_nb.steering.particles import POTENTIALS, RESAMPLERS, SteeringError, family_se
from llava_reward_nb.steering.schedulers import FlowSDEScheduler, stochastic
from llava_reward_nb.steering.previews import decode_latents
from llava_reward_nb.steering.worlds import FlowMixturePipeline, Mixture, MixturePipeline
from llava_reward_nb.steering.hook import steer
from llava_reward_nb.steering.pipelines import fk_steer

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
    a = res.trace.looks[-1].ancestors
    assert res.trace.looks[-1].resampled.all()
    for p in range(2):
        for i in range(4): assert same(res.images[p][i], seen['last'][4*p+a[p, i]])


def test_copies_are_copies(pipe):
    "A reward that only likes particle 2 at every look: all images descend from slot 2, and the last look makes them equal."
    def favourite(images, prompts): return torch.tensor([0., 0., 1., 0.]*(len(images)//4))
    res = fk_steer(pipe, 'red circle', favourite, n_particles=4, lam=100., potential='reward', steps=[2], ess_min=1., seed=3, **pipe.kw)
    assert res.trace.roots.tolist() == [[2]*4] or res.trace.looks[0].ancestors.tolist() == [[2]*4]
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
    assert [l.step for l in res.trace.looks] == [1, 3, 4, 6, 7] and res.trace.n_steps == 8
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
    assert fk.trace.n_steps==4 and [l.step for l in fk.trace.looks]==[1, 3]


def test_tiny_autoencoder_previews(sd):
    taesd = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4, num_encoder_blocks=(1,)*4, num_decoder_blocks=(1,)*4).eval()
    res = fk_steer(sd, 'a', brightness, vae=taesd, n_particles=2, num_inference_steps=5)
    assert res.trace.looks[0].thumbs[0][0].size == (64, 64)


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
    assert res.trace.looks[0].ancestors.tolist()[0] == [1, 1]
    with pytest.raises(SteeringError, match="held-out reward 'b'"): fk_steer(sd, 'a', brightness, held_out=dict(b=lambda i, p: 3.), n_particles=2, num_inference_steps=5)
    assert 'step' not in vars(sd.scheduler)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_finished_batches_come_with_the_error(sd, error):
    "Two of three prompts are done when the reward fails: their images, rewards and trace are those of a run of two."
    def fails_at_a(images, prompts):
        if 'a' in prompts: raise error('enough')
        return brightness(images, prompts)
    kw = dict(n_particles=2, num_inference_steps=4, batch_prompts=1)
    with pytest.raises(error, match='enough') as caught: fk_steer(sd, ['red', 'blue', 'a'], fails_at_a, **kw)
    finished, two = caught.value.finished, fk_steer(sd, ['red', 'blue'], brightness, **kw)
    assert finished.trace.prompts == ['red', 'blue'] and finished.trace.settings['seed'] == 0
    assert torch.allclose(finished.rewards, two.rewards, atol=2/255)
    for ours, theirs in zip(finished.images, two.images): assert all(same(a, b) for a, b in zip(ours, theirs))
    with pytest.raises(error, match='enough') as caught: fk_steer(sd, 'a', fails_at_a, n_particles=2, num_inference_steps=4)
    assert not hasattr(caught.value, 'finished')


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
    assert [l.step for l in pub.trace.looks]==[2, 4, 6, 8, 9] and all(l.resampled.all() for l in pub.trace.looks[:-1])
    assert torch.allclose(brightness(pub.images[0], None).double(), pub.rewards[0], atol=2/255)
    # the same draws as the public code would make from one generator: initial latents, then noise and multinomials in turn
    beam = fk_steer(sd, 'red', brightness, method='beam', keep=1, **kw)
    for l in beam.trace.looks[:-1]: assert (l.ancestors==l.rewards.argmax()).all()
    assert len(set(beam.trace.looks[-1].ancestors[0].tolist()))==4


# ---- what goes with a prompt ----

PROMPTS, K = ['red', 'blue', 'a'], 2


def picture(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def mask(part):
    m = np.zeros((64, 64), dtype=np.uint8)
    m[:part] = 255
    return Image.fromarray(m)


def embeds(sd, text): return torch.cat([sd.encode_prompt(t, 'cpu', 1, False)[0] for t in text]).detach()


def per_prompt(sd):
    "For each case: the kind of pipeline, and arguments for all prompts."
    pics, latents = [picture(i) for i in range(3)], torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    from_image = dict(image=pics, strength=.8)
    tensors = torch.stack([torch.from_numpy(np.array(im)).permute(2, 0, 1).float()/127.5-1 for im in pics])
    return dict(
        negative_string=('', dict(negative_prompt='blue')), negative_list=('', dict(negative_prompt=['b', 'c', 'd'])),
        embeddings=('', dict(prompt_embeds=embeds(sd, PROMPTS), negative_prompt_embeds=embeds(sd, ['', 'b', 'c']))),
        latents=('', dict(latents=latents)), images=('Img2Img', from_image), one_image=('Img2Img', dict(image=pics[0], strength=.8)),
        image_tensor=('Img2Img', dict(image=tensors, strength=.8)), image_arrays=('Img2Img', dict(image=[np.asarray(im, dtype=np.float32)/255 for im in pics], strength=.8)),
        inpaint=('Inpaint', dict(from_image, mask_image=[mask(16), mask(32), mask(48)], height=64, width=64)),
        inpaint_one=('Inpaint', dict(image=pics[0], mask_image=mask(32), strength=.8, height=64, width=64)))


def tiny_pipe(sd, kind):
    p = getattr(diffusers, f'StableDiffusion{kind}Pipeline')(**sd.components, requires_safety_checker=False)
    p.set_progress_bar_config(disable=True)
    return p


@pytest.mark.parametrize('case', ['negative_string', 'negative_list', 'embeddings', 'latents', 'images', 'one_image', 'image_tensor', 'image_arrays', 'inpaint', 'inpaint_one'])
def test_arguments_go_with_their_prompts(sd, case):
    "One prompt at a time, two, or all: the same images; and a prompt alone with what is its own gives them too."
    kind, kw = per_prompt(sd)[case]
    p, common = tiny_pipe(sd, kind), dict(n_particles=K, num_inference_steps=4, guidance_scale=3., lam=50., steps=[])
    with pytest.warns(UserWarning) if kind=='Inpaint' else contextlib.nullcontext():
        runs = [fk_steer(p, PROMPTS, brightness, batch_prompts=b, **common, **kw) for b in (1, 2, None)]
        own = {n: v if isinstance(v, (str, int, float, Image.Image)) else v[4:6] if n=='latents' else v[2:3] for n, v in kw.items()}
        alone = fk_steer(p, PROMPTS[2], brightness, **common, **own)
    for run in runs[1:]:
        for a, b in zip(runs[0].images, run.images): assert all(same(x, y) for x, y in zip(a, b))
        assert torch.allclose(run.rewards, runs[0].rewards, atol=2/255)
    assert all(same(x, y) for x, y in zip(alone.images[0], runs[0].images[2]))
    for ims, r in zip(runs[2].images, runs[2].rewards): assert torch.allclose(brightness(ims, None).double(), r, atol=2/255)


def test_start_images_stand_with_their_prompts(sd):
    "Almost without noise, three particles of two prompts show r r r b b b."
    red, blue = (Image.new('RGB', (64, 64), c) for c in ('red', 'blue'))
    p, seen = tiny_pipe(sd, 'Img2Img'), []
    encode = p.vae.encode
    def spy(x, *a, **kw):
        seen.append(int(x[0, 0].mean()>x[0, 2].mean()))
        return encode(x, *a, **kw)
    p.vae.encode = spy
    try: fk_steer(p, ['red', 'blue'], brightness, image=[red, blue], strength=.5, n_particles=3, num_inference_steps=4, steps=[])
    finally: del p.vae.encode
    assert seen==[1, 1, 1, 0, 0, 0]


def test_wrong_lengths_are_refused_by_name(sd):
    go = lambda kind='', **kw: fk_steer(tiny_pipe(sd, kind), ['red', 'a'], brightness, n_particles=3, num_inference_steps=4, **kw)
    with pytest.raises(SteeringError, match='negative_prompt: 3 for 2 prompts; needed: one for each prompt, 2'): go(negative_prompt=['a']*3)
    with pytest.raises(SteeringError, match='image: 3 for 2 prompts'): go('Img2Img', image=[picture(0)]*3)
    with pytest.raises(SteeringError, match='latents: 2 for 2 prompts with 3 particles each; needed: one for each particle, 6'): go(latents=torch.zeros(2, 4, 8, 8))
    with pytest.raises(SteeringError, match='prompt_embeds: 1 for 2'): go(prompt_embeds=torch.zeros(1, 16, 32))


# ---- changed at the end, interrupted ----

def test_inpainting_reports_the_returned_images(sd):
    "A U-Net of four channels pastes the known part back after the step: the last look's image is not the one returned."
    p = tiny_pipe(sd, 'Inpaint')
    kw = dict(image=[picture(0), picture(1)], mask_image=mask(32), height=64, width=64, n_particles=3, num_inference_steps=5, lam=20., seed=1)
    with pytest.warns(UserWarning, match='were changed after the last step'): res = fk_steer(p, ['red', 'a'], brightness, held_out=dict(again=brightness), **kw)
    now = torch.stack([brightness(ims, None).double() for ims in res.images])
    assert torch.allclose(now, res.rewards, atol=2/255) and torch.allclose(res.trace.held_out['again'], res.rewards)
    assert res.trace.rescored and res.trace.log_w.abs().max()>0


def test_a_callback_that_changes_latents(sd):
    def brighter(pipe, i, t, kw): return dict(latents=kw['latents']+.5*(i==4))
    with pytest.warns(UserWarning, match='6 of 6 images were changed'): res = fk_steer(sd, ['red', 'a'], brightness, n_particles=3, num_inference_steps=5, callback_on_step_end=brighter)
    plain = fk_steer(sd, ['red', 'a'], brightness, n_particles=3, num_inference_steps=5)
    assert plain.trace.rescored==0 and plain.trace.log_w.abs().max()==0
    for ims, r in zip(res.images, res.rewards): assert torch.allclose(brightness(ims, None).double(), r, atol=2/255)
    assert torch.allclose(res.trace.log_w, 10*(res.rewards-plain.rewards), atol=.2)
    assert torch.allclose(res.trace.log_z, plain.trace.log_z+res.trace.log_w.logsumexp(1)-math.log(3), atol=.2)
    for kind in ('np', 'pt', 'latent'): # other outputs are compared too
        out = fk_steer(sd, ['red', 'a'], brightness, n_particles=3, num_inference_steps=5, output_type=kind)
        assert out.trace.rescored==0 and torch.allclose(out.rewards, plain.rewards, atol=2/255)
    with pytest.warns(UserWarning, match='changed latents after a step'), steer(sd, brightness, ['red', 'a'], n_particles=3) as fk:
        sd(**fk.pipe_kwargs, num_inference_steps=5, callback_on_step_end=lambda pipe, i, t, kw: dict(latents=kw['latents']+.5))


def test_interrupted(sd):
    def stop(pipe, i, t, kw):
        pipe._interrupt = i==2
        return kw
    with pytest.warns(UserWarning, match='stopped after 3 of 6 steps'): res = fk_steer(sd, ['red', 'a'], brightness, n_particles=2, num_inference_steps=6, callback_on_step_end=stop)
    assert res.trace.stopped=='after 3 of 6 steps'
    for ims, r in zip(res.images, res.rewards): assert torch.allclose(brightness(ims, None).double(), r, atol=2/255)
    def fail(pipe, i, t, kw):
        if i==2: raise KeyError('lost')
        return kw
    fk = steer(sd, brightness, 'a', n_particles=2)
    with pytest.raises(KeyError): fk(num_inference_steps=6, callback_on_step_end=fail)
    assert fk.trace.stopped=="after 3 of 6 steps (KeyError: 'lost')" and fk.trace.rewards.isnan().all() and 'step' not in vars(sd.scheduler)


def test_two_threads_cannot_steer_one_pipeline(sd):
    inside, go = threading.Event(), threading.Event()
    def first():
        with steer(sd, brightness, 'a', n_particles=2):
            inside.set()
            go.wait(20)
    t = threading.Thread(target=first)
    with pytest.warns(UserWarning, match='nothing was steered'):
        t.start()
        assert inside.wait(20)
        with pytest.raises(SteeringError, match='being steered already'): fk_steer(sd, 'a', brightness, n_particles=2, num_inference_steps=4)
        go.set()
        t.join()
    assert 'step' not in vars(sd.scheduler)


# ---- flow models ----

def test_flow_scheduler_in_pipelines(clip_tokenizer, t5_tokenizer, tmp_path):
    "Saved and loaded with the pipeline; dynamic shift; custom sigmas."
    p = tiny_sd3(clip_tokenizer)
    p.scheduler = stochastic(p.scheduler)
    assert type(p.scheduler) is FlowSDEScheduler and p.scheduler.config.shift==3.
    p.save_pretrained(tmp_path)
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler).__name__=='FlowSDEScheduler' and again.scheduler.config.noise_level==.7
    res = fk_steer(again, ['red', 'a'], brightness, n_particles=2, num_inference_steps=4, height=64, width=64, sigmas=[1., .7, .4, .1])
    assert res.trace.n_steps==4
    p = tiny_flux(clip_tokenizer, t5_tokenizer)
    p.set_progress_bar_config(disable=True)
    p.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(p.scheduler.config, stochastic_sampling=True)
    go = lambda: fk_steer(p, ['red', 'a'], brightness, n_particles=2, num_inference_steps=4, **CALLS['flux'])
    with pytest.raises(SteeringError, match='loses the model'): go()
    p.scheduler = stochastic(p.scheduler)
    assert type(p.scheduler) is FlowSDEScheduler and p.scheduler.config.use_dynamic_shifting
    for ims, r in zip((res := go()).images, res.rewards): assert torch.allclose(brightness(ims, None).double(), r, atol=2/255)


# ---- exactness ----

ALONG, DIAGONAL, LAM = torch.tensor([1.]), torch.tensor([.8, .6]), .7
ON_A_LINE = dict(mu=[[-1.5], [1.]], s=[.4, .6], w=[.7, .3])
IN_A_PLANE = dict(mu=[[-1., -1.], [1., -.5], [0., 1.2]], s=[.4, .5, .3], w=[.5, .3, .2])
PLANE_PAIRS = list(zip(POTENTIALS, RESAMPLERS))
ALL_PAIRS = [(p, r) for p in POTENTIALS for r in RESAMPLERS]
FLOW_PAIRS = [(p, 'systematic') for p in POTENTIALS]+[('difference', r) for r in RESAMPLERS if r!='systematic']


def cases(on_a_line, in_a_plane):
    "Parameters: a mixture, the direction of its reward, potential and resampler."
    line = [pytest.param(ON_A_LINE, ALONG, p, r, id=f'1d-{p}-{r}') for p, r in on_a_line]
    return line + [pytest.param(IN_A_PLANE, DIAGONAL, p, r, id=f'2d-{p}-{r}') for p, r in in_a_plane]


@pytest.mark.parametrize('mixture,a,potential,resampler', cases(ALL_PAIRS, PLANE_PAIRS))
def test_exact(mixture, a, potential, resampler): exact(MixturePipeline(**mixture), a, 500, [150, 300], potential=potential, resampler=resampler)


@pytest.mark.parametrize('mixture,a,potential,resampler', cases(FLOW_PAIRS, PLANE_PAIRS))
def test_exact_flow(mixture, a, potential, resampler): exact(FlowMixturePipeline(**mixture), a, 300, [90, 180], potential=potential, resampler=resampler)


def exact(pipeline, a, n_steps, looks, **settings):
    "Steered particles follow the mixture tilted by exp(lam*a·x), whose moments and density are known."
    def along(x, prompts): return x@a
    fk = steer(pipeline, along, ['x'], decode=lambda z: z, batch_size=10**6, thumbnail=0, n_particles=20_000, lam=LAM, steps=looks, ess_min=1., **settings)
    x = fk(num_inference_steps=n_steps).images
    target, Z = Mixture(pipeline.mu, pipeline.s, pipeline.w).tilted(a, LAM)
    mean, variance = target.moments()
    roots, reference = fk.trace.roots[0], target.draw(200_000, torch.Generator().manual_seed(99))
    for c in range(x.shape[1]):
        y = x[:, c].double()
        squared = (y-mean[c])**2
        assert abs(y.mean()-mean[c]) < 3*family_se(y, roots)
        assert abs(squared.mean()-variance[c]) < 3*family_se(squared, roots)
        n = y.var().item()/family_se(y, roots)**2
        distance = stats.ks_2samp(y.numpy(), reference[:, c].numpy()).statistic
        assert stats.kstwobign.sf(distance*math.sqrt(n*2e5/(n+2e5))) > .01
    assert abs(fk.trace.log_z.exp().item()-Z) < .05*Z
