"Tiny random models of many families, written in the published layout: config.json, weights, tokenizer and image settings."
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEXTS = ['a red circle left of a blue square', 'USER: hello\n ASSISTANT: yes', 'user system model You are a helpful assistant.',
         'a photo of an astronaut riding a green horse on the moon, dramatic light', '0123456789 é ü']


def tokenizer(special, eos, pad, bos=None, begin=False, **extra):
    "A byte-level BPE tokenizer with these special tokens at its end; `begin`: it puts BOS before every text."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if begin: t.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, t.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=eos, pad_token=pad, bos_token=bos, model_max_length=4096, **extra)


def text_sizes(rows, **more):
    return dict(vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, **more)


CLIP = dict(model_type='clip_vision_model', hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=28, patch_size=14, projection_dim=32)
SIGLIP = dict(model_type='siglip_vision_model', hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
              image_size=28, patch_size=7)


def write(folder, config, tok, images, seed, processor=None, template=None):
    "A model folder, files as on the hub."
    folder = Path(folder)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim>1: p.normal_(0, .8/p.shape[-1]**.5)
            elif p.ndim==1: p.add_(.1*torch.randn(p.shape))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    (folder/'preprocessor_config.json').write_text(json.dumps(images))
    if processor: (folder/'processor_config.json').write_text(json.dumps(processor))
    if template: (folder/'chat_template.jinja').write_text(template)
    return folder


def ids(tok, **tokens): return {k: tok.convert_tokens_to_ids(v) for k, v in tokens.items()}


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}IMAGE"
          "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>']


def qwen(folder, kind='qwen2_5_vl', seed=0, **text):
    tok = tokenizer(QWEN, '<|im_end|>', '<|endoftext|>')
    patch = 14 if kind.startswith('qwen2') else 16
    vision = dict(depth=3, hidden_size=32, num_heads=4, patch_size=patch)
    if kind=='qwen2_vl': vision |= dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    else: vision |= dict(out_hidden_size=32, intermediate_size=48)
    if kind=='qwen2_5_vl': vision |= dict(fullatt_block_indexes=[1], window_size=56)
    if kind.startswith('qwen3'): vision |= dict(num_position_embeddings=64)
    if kind.startswith('qwen3_vl'): vision |= dict(deepstack_visual_indexes=[0, 1])
    section = [1, 1, 2] if patch==14 else [2, 1, 1]
    sizes = text_sizes(len(tok), rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=section))
    if kind=='qwen3_vl_moe': sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    if kind=='qwen3_5':
        sizes |= dict(layer_types=['linear_attention', 'linear_attention', 'full_attention'], linear_num_key_heads=2, linear_num_value_heads=4,
                      linear_key_head_dim=8, linear_value_head_dim=8)
        sizes['rope_parameters'] |= dict(partial_rotary_factor=1.)
    config = CONFIG_MAPPING[kind](text_config=sizes|text, vision_config=vision, **ids(
        tok, image_token_id='<|image_pad|>', video_token_id='<|video_pad|>', vision_start_token_id='<|vision_start|>', vision_end_token_id='<|vision_end|>'))
    images = dict(image_processor_type='Qwen2VLImageProcessor', patch_size=patch, merge_size=2, min_pixels=1024, max_pixels=16384)
    return write(folder, config, tok, images, seed, template=CHATML.replace('IMAGE', '<|vision_start|><|image_pad|><|vision_end|>'))


VICUNA = ("{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
          "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}")


def llava_next(folder, seed=0):
    tok = tokenizer(['<unk>', '<s>', '</s>', '<image>', '<pad>'], '</s>', '<pad>', '<s>', begin=True)
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    config = CONFIG_MAPPING['llava_next'](
        text_config=text_sizes(len(tok), model_type='llama'), vision_config=CLIP, image_grid_pinpoints=pinpoints,
        image_token_index=tok.convert_tokens_to_ids('<image>'), vision_feature_layer=-2)
    images = dict(image_processor_type='LlavaNextImageProcessor', size=dict(shortest_edge=28), crop_size=dict(height=28, width=28), image_grid_pinpoints=pinpoints)
    processor = dict(processor_class='LlavaNextProcessor', patch_size=14, vision_feature_select_strategy='default', num_additional_image_tokens=1)
    return write(folder, config, tok, images, seed, processor, VICUNA)


def llava(folder, seed=0):
    tok = tokenizer(['<unk>', '<s>', '</s>', '<image>', '<pad>'], '</s>', '<pad>', '<s>', begin=True)
    config = CONFIG_MAPPING['llava'](text_config=text_sizes(len(tok), model_type='llama'), vision_config=CLIP,
                                     image_token_index=tok.convert_tokens_to_ids('<image>'), vision_feature_layer=-2)
    images = dict(image_processor_type='CLIPImageProcessor', size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    processor = dict(processor_class='LlavaProcessor', patch_size=14, vision_feature_select_strategy='default', num_additional_image_tokens=1)
    return write(folder, config, tok, images, seed, processor, VICUNA)


GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>"
         "{% else %}{{ c.text | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}")


def gemma3(folder, seed=0):
    tok = tokenizer(['<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>', '<start_of_image>', '<end_of_image>', '<image_soft_token>'], '<eos>', '<pad>', '<bos>',
                    extra_special_tokens=dict(boi_token='<start_of_image>', eoi_token='<end_of_image>', image_token='<image_soft_token>'))
    config = CONFIG_MAPPING['gemma3'](text_config=text_sizes(len(tok), model_type='gemma3_text', sliding_window=8), vision_config=SIGLIP, mm_tokens_per_image=4, **ids(
        tok, image_token_index='<image_soft_token>', boi_token_index='<start_of_image>', eoi_token_index='<end_of_image>'))
    images = dict(image_processor_type='Gemma3ImageProcessor', size=dict(height=28, width=28), image_mean=[.5]*3, image_std=[.5]*3, do_pan_and_scan=None)
    return write(folder, config, tok, images, seed, dict(processor_class='Gemma3Processor', image_seq_length=4), GEMMA)


def internvl(folder, seed=0):
    tok = tokenizer(['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>', '<video>'], '<|im_end|>', '<|endoftext|>', extra_special_tokens=dict(
        start_image_token='<img>', end_image_token='</img>', context_image_token='<IMG_CONTEXT>', video_token='<video>'))
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=[28, 28], patch_size=[7, 7])
    config = CONFIG_MAPPING['internvl'](text_config=text_sizes(len(tok), model_type='qwen2'), vision_config=vision, downsample_ratio=.5, image_seq_length=4,
                                        image_token_id=tok.convert_tokens_to_ids('<IMG_CONTEXT>'))
    images = dict(image_processor_type='GotOcr2ImageProcessor', size=dict(height=28, width=28), crop_to_patches=True, min_patches=1, max_patches=4)
    return write(folder, config, tok, images, seed, dict(processor_class='InternVLProcessor', image_seq_length=4), CHATML.replace('IMAGE', '<IMG_CONTEXT>\n'))


def paligemma(folder, seed=0):
    tok = tokenizer(['<pad>', '<eos>', '<bos>', '<image>'], '<eos>', '<pad>', '<bos>')
    config = CONFIG_MAPPING['paligemma'](text_config=text_sizes(len(tok)+1152, model_type='gemma'), vision_config=SIGLIP|dict(projection_dim=32), projection_dim=32,
                                         image_token_index=tok.convert_tokens_to_ids('<image>'))
    images = dict(image_processor_type='SiglipImageProcessor', size=dict(height=28, width=28), image_seq_length=16)
    return write(folder, config, tok, images, seed, dict(processor_class='PaliGemmaProcessor'))


MISTRAL = ("{{ bos_token }}{% for m in messages %}[INST]{% for c in m.content %}{% if c.type == 'image' %}[IMG]{% else %}{{ c.text }}{% endif %}{% endfor %}[/INST]{% endfor %}")


def mistral3(folder, seed=0):
    tok = tokenizer(['<unk>', '<s>', '</s>', '[INST]', '[/INST]', '[IMG]', '[IMG_BREAK]', '[IMG_END]', '<pad>'], '</s>', '<pad>', '<s>')
    vision = dict(model_type='pixtral', hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=7, head_dim=8)
    config = CONFIG_MAPPING['mistral3'](text_config=text_sizes(len(tok), model_type='mistral', sliding_window=None), vision_config=vision, spatial_merge_size=2,
                                        image_token_index=tok.convert_tokens_to_ids('[IMG]'), vision_feature_layer=-1)
    images = dict(image_processor_type='PixtralImageProcessor', size=dict(longest_edge=56), patch_size=dict(height=7, width=7))
    return write(folder, config, tok, images, seed, dict(processor_class='PixtralProcessor', patch_size=7, spatial_merge_size=2), MISTRAL)


IDEFICS = ("<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{% for c in m.content %}{% if c.type == 'image' %}<image>"
           "{% else %}{{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}")


def smolvlm(folder, kind='idefics3', seed=0):
    places = [f'<row_{i}_col_{j}>' for i in range(1, 7) for j in range(1, 7)]
    tok = tokenizer(['<|im_start|>', '<|im_end|>', '<image>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>', *places], '<|im_end|>', '<|im_end|>', extra_special_tokens=dict(
        image_token='<image>', fake_image_token='<fake_token_around_image>', global_image_token='<global-img>', end_of_utterance_token='<end_of_utterance>'))
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7)
    config = CONFIG_MAPPING[kind](text_config=text_sizes(len(tok), model_type='llama'), vision_config=vision, scale_factor=2, image_token_id=tok.convert_tokens_to_ids('<image>'))
    name = 'Idefics3' if kind=='idefics3' else 'SmolVLM'
    images = dict(image_processor_type=f'{name}ImageProcessor', size=dict(longest_edge=56), max_image_size=dict(longest_edge=28), do_image_splitting=True)
    return write(folder, config, tok, images, seed, dict(processor_class=f'{name}Processor', image_seq_len=4), IDEFICS)


def idefics2(folder, seed=0):
    tok = tokenizer(['<unk>', '<s>', '</s>', '<image>', '<fake_token_around_image>', '<end_of_utterance>', '<pad>'], '</s>', '<pad>', '<s>')
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7)
    perceiver = dict(hidden_size=32, resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=8, num_key_value_heads=2)
    config = CONFIG_MAPPING['idefics2'](text_config=text_sizes(len(tok), model_type='mistral'), vision_config=vision, perceiver_config=perceiver,
                                        image_token_id=tok.convert_tokens_to_ids('<image>'))
    images = dict(image_processor_type='Idefics2ImageProcessor', size=dict(shortest_edge=14, longest_edge=28), do_image_splitting=False)
    return write(folder, config, tok, images, seed, dict(processor_class='Idefics2Processor', image_seq_len=4), IDEFICS.replace('<|im_start|>', ''))


def llava_onevision(folder, seed=0):
    tok = tokenizer(['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<image>', '<video>'], '<|im_end|>', '<|endoftext|>')
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = CONFIG_MAPPING['llava_onevision'](text_config=text_sizes(len(tok), model_type='qwen2'), vision_config=SIGLIP|dict(vision_use_head=False),
        image_grid_pinpoints=pinpoints, vision_aspect_ratio='anyres_max_9', **ids(tok, image_token_index='<image>', video_token_index='<video>'))
    images = dict(image_processor_type='LlavaOnevisionImageProcessor', size=dict(height=28, width=28), image_grid_pinpoints=pinpoints)
    processor = dict(processor_class='LlavaOnevisionProcessor', num_image_tokens=16, vision_feature_select_strategy='full', vision_aspect_ratio='anyres_max_9')
    return write(folder, config, tok, images, seed, processor, CHATML.replace('IMAGE', '<image>\n'))


def glm4v(folder, seed=0):
    tok = tokenizer(['<|endoftext|>', '<|user|>', '<|assistant|>', '<|image|>', '<|video|>', '<|begin_of_image|>', '<|end_of_image|>', '<|begin_of_video|>', '<|end_of_video|>'],
                    '<|endoftext|>', '<|endoftext|>')
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=14, image_size=56, spatial_merge_size=2)
    sizes = text_sizes(len(tok), rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[2, 1, 1], partial_rotary_factor=1.))
    config = CONFIG_MAPPING['glm4v'](text_config=sizes, vision_config=vision, **ids(
        tok, image_token_id='<|image|>', video_token_id='<|video|>', image_start_token_id='<|begin_of_image|>', image_end_token_id='<|end_of_image|>',
        video_start_token_id='<|begin_of_video|>', video_end_token_id='<|end_of_video|>'))
    images = dict(image_processor_type='Glm4vImageProcessor', patch_size=14, merge_size=2, size=dict(shortest_edge=1568, longest_edge=31360))
    template = ("{% for m in messages %}<|{{ m.role }}|>\n{% for c in m.content %}{% if c.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
                "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}")
    return write(folder, config, tok, images, seed, dict(processor_class='Glm4vProcessor'), template)


FAMILIES = dict(
    qwen2_5_vl=qwen, qwen3_vl=lambda f, **k: qwen(f, 'qwen3_vl', **k), llava_next=llava_next,
    qwen2_vl=lambda f, **k: qwen(f, 'qwen2_vl', **k), qwen3_vl_moe=lambda f, **k: qwen(f, 'qwen3_vl_moe', **k),
    qwen3_5=lambda f, **k: qwen(f, 'qwen3_5', **k), llava=llava, gemma3=gemma3, internvl=internvl, paligemma=paligemma,
    mistral3=mistral3, idefics3=smolvlm, smolvlm=lambda f, **k: smolvlm(f, 'smolvlm', **k), idefics2=idefics2,
    llava_onevision=llava_onevision, glm4v=glm4v)
