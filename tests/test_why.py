"Heat maps lie on the pixels their tokens saw; deletion, insertion and facts on rewards whose truth is known."
import math

import families
import numpy as np
import pytest, torch
from PIL import Image

from llava_reward_nb.generic import load_backbone
from llava_reward_nb.model import RewardModel
from llava_reward_nb.phi3v import Phi3VImageProcessor, hd_crops, hd_shape, hd_transform, token_order
from llava_reward_nb.why import (Heat, attention_rows, faithfulness, heat, occlusion_map, phi_boxes, score_facts, scorer, shape_facts, spread,
                                 text_facts, token_boxes)

SIZES = [(64, 64), (256, 256), (200, 90), (90, 200), (100, 37), (37, 101), (640, 480), (999, 1000), (300, 40)]


@pytest.fixture(scope='module')
def tiny(): return RewardModel.from_pretrained('tiny')


def picture(size, seed=0): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def with_square(size, box, color=(255, 0, 0)):
    im = Image.new('RGB', size, 'white')
    im.paste(color, box)
    return im


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('crops', [1, 4, 9, 16])
def test_phi_boxes_follow_the_pixels(size, crops):
    "Dark in the picture only where one token's box is: among the cells of the crops, that token's is the darkest (tiles and global view)."
    settings = Phi3VImageProcessor(num_crops=crops, crop_size=64, merged=4, mean=(0., 0., 0.), std=(1., 1., 1.))
    boxes = phi_boxes(settings, size)
    H, W = hd_shape(*size, crops, 64)
    order = token_order(H//64, W//64, 4)
    assert len(boxes) == len(order) and boxes.isnan().any(1).equal(order < 0)
    inside = ((boxes[:, :2] >= 0) & (boxes[:, 2:] <= torch.tensor(size))).all(1)
    wide = ((boxes[:, 2:]-boxes[:, :2]) >= 4).all(1)  # less is blurred away
    chosen = (inside & wide).nonzero().flatten().tolist()
    for k in chosen[::max(1, len(chosen)//6)]:
        box = [round(v) for v in boxes[k].tolist()]
        hd = hd_transform(with_square(size, box, 'black'), crops, 64)
        cells = hd_crops(hd, 64, settings.mean, settings.std).mean(1).unfold(1, 16, 16).unfold(2, 16, 16).mean((-1, -2)).flatten()
        first = order[k].item() < 16 and len(cells) > 16  # a cell of the global view is compared with its own kind
        kind = slice(0, 16) if first else slice(16 if len(cells) > 16 else 0, None)
        assert cells[kind].argmin().item()+kind.start == order[k].item(), (k, box)


def test_attention_on_one_patch_lies_on_that_patch():
    settings = Phi3VImageProcessor(num_crops=4, crop_size=64, merged=4)
    boxes = phi_boxes(settings, (256, 256))
    weights = torch.zeros(len(boxes))
    weights[3*9+5] = 1.  # fourth row of the tiles, sixth cell: 32 pixels each
    drawn = spread(weights, boxes, (256, 256))
    want = torch.zeros(256, 256, dtype=torch.float64)
    want[96:128, 160:192] = 1/1024
    torch.testing.assert_close(drawn, want)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('crops', [1, 4, 16])
def test_all_weight_is_on_pixels_separators_or_padding(size, crops):
    boxes = phi_boxes(Phi3VImageProcessor(num_crops=crops, crop_size=64, merged=4), size)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(boxes), generator=generator).softmax(0)
    total = spread(weights, boxes, size).sum().item()
    separators = weights[boxes.isnan().any(1)].sum().item()
    assert 0 < total <= 1-separators+1e-6
    big = spread(weights, boxes*2, (2*size[0], 2*size[1])).sum().item()
    assert abs(big-total) < 1e-6  # the same in another resolution
    even = torch.where(boxes.isnan().any(1), 0., 1.)
    flat = spread(even, boxes, size)
    assert flat.min() > 0  # every pixel is seen


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bases')
    makers = dict(qwen2_5_vl=lambda f: families.qwen(f), qwen3_vl=lambda f: families.qwen(f, 'qwen3_vl'), llava_next=families.llava_next)
    return {kind: load_backbone(make(folder/kind)) for kind, make in makers.items()}


@pytest.mark.parametrize('kind', ['qwen2_5_vl', 'qwen3_vl', 'llava_next'])
@pytest.mark.parametrize('size', [(64, 64), (112, 56), (57, 113), (200, 90), (60, 100), (100, 37), (333, 222)])
def test_boxes_of_other_families_follow_the_pixels(bases, kind, size):
    "As many boxes as the processor wrote image tokens, and the pixels of a dark box arrive at the patches of its token."
    backbone = bases[kind]
    boxes = token_boxes(backbone, size)
    assert len(boxes) == backbone.processor.image_tokens(size)
    real = ~boxes.isnan().any(1)
    flat = spread(torch.where(real, 1., 0.), boxes, size)
    assert flat.min() > 0
    if kind == 'llava_next': return
    white = backbone.encode(Image.new('RGB', size, 'white'), 'a')['pixel_values']
    merge = backbone.processor.image_processor.merge_size**2
    for k in range(0, len(boxes), max(1, len(boxes)//5)):
        left, top, right, bottom = boxes[k].tolist()
        im = with_square(size, (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)), 'black')
        change = (backbone.encode(im, 'a')['pixel_values']-white).abs().mean(1).view(-1, merge).mean(1)
        assert change.argmax().item() == k


@pytest.mark.parametrize('size', [(56, 56), (112, 56), (50, 113), (84, 30)])
def test_boxes_of_llava_next_follow_the_features(bases, size):
    "Where the features of a patch are its brightness, a dark box darkens its own token most."
    backbone = bases['llava_next']
    boxes = token_boxes(backbone, size)

    def seen(image):
        batch = backbone.encode(image, 'a')
        pixels = batch['pixel_values'].flatten(0, 1)
        cells = pixels.mean(1).unfold(1, 14, 14).unfold(2, 14, 14).mean((-1, -2)).flatten(1)  # (tiles, 4)
        feature, _ = backbone.model.pack_image_features([cells[..., None].expand(-1, -1, 32)], batch['image_sizes'], 'default',
                                                              torch.full((32,), 9.))
        return torch.cat(list(feature))[:, 0]
    white = seen(Image.new('RGB', size, 'white'))
    assert len(white) == len(boxes) and (white == 9).equal(boxes.isnan().any(1))
    for k in (~boxes.isnan().any(1)).nonzero().flatten().tolist():
        left, top, right, bottom = boxes[k].tolist()
        box = max(0, math.floor(left)), max(0, math.floor(top)), min(size[0], math.ceil(right)), min(size[1], math.ceil(bottom))
        if (box[2]-box[0])*(box[3]-box[1]) < .9*(right-left)*(bottom-top): continue  # mostly padding
        change = (white-seen(with_square(size, box, 'black'))).abs()
        part = change[:4] if k < 4 else change[4:]
        assert part.argmax().item() == (k if k < 4 else k-4), (k, box)


@pytest.mark.parametrize('size', [(64, 64), (100, 40), (30, 90), (7, 7)])
def test_attention_rows_sum_to_one(tiny, size):
    for name in tiny.configs:
        rows, vectors = attention_rows(tiny, [picture(size), picture(size, 1)], ['a red circle', 'a photo of two blue stars'], name)
        for row in rows:
            assert row.shape == (len(token_boxes(tiny.backbone, size)),) and row.min() >= 0
            assert abs(row.sum().item()-1) < 1e-4
        shown = heat(tiny, picture(size), 'a red circle', name)
        assert shown.weights.shape == size[::-1] and abs(shown.weights.sum()+shown.elsewhere-1) < 1e-4
        torch.testing.assert_close(rows[0], attention_rows(tiny, [picture(size)], ['a red circle'], name)[0][0], rtol=1e-3, atol=1e-4)


def test_a_map_of_all_families_and_of_mean_pooling(bases):
    from llava_reward_nb.model import PerspectiveConfig
    for kind, backbone in bases.items():
        model = RewardModel(backbone, kind)
        for name, config in dict(last=PerspectiveConfig(), mean=PerspectiveConfig(pooling='mean'), bare=PerspectiveConfig(skipca=False)).items():
            model.add_perspective(f'{kind}-{name}', config, lora_rank=2, lora_alpha=4)
        model.eval()
        for name in ('last', 'mean'):
            shown = heat(model, picture((90, 50)), 'a red circle', f'{kind}-{name}')
            assert shown.weights.shape == (50, 90) and abs(shown.weights.sum()+shown.elsewhere-1) < 1e-4
        with pytest.raises(ValueError, match='has no SkipCA'): heat(model, picture((90, 50)), 'a', f'{kind}-bare')
        assert heat(model, picture((90, 50)), 'a', f'{kind}-bare', 'gradient').weights.sum() > .99


def test_the_model_is_as_before(tiny):
    before = tiny.active, tiny.training, [p.requires_grad for p in tiny.parameters()]
    for by in ('attention', 'gradient', 'occlusion'): heat(tiny, picture((64, 64)), 'a red circle', 'safety', by)
    assert before == (tiny.active, tiny.training, [p.requires_grad for p in tiny.parameters()])
    assert all(p.grad is None for p in tiny.parameters())
    assert not tiny.heads['safety'].skipca._forward_pre_hooks
    with torch.no_grad(): assert heat(tiny, picture((64, 64)), 'a red circle', 'safety', 'gradient').weights.sum() > .99


def test_a_large_picture_is_shrunk_and_keeps_its_sum(tiny):
    shown = heat(tiny, picture((1500, 700)), 'a red circle', 'safety')
    assert shown.image.size == (1024, 478) and shown.weights.shape == (478, 1024)
    assert abs(shown.weights.sum()+shown.elsewhere-1) < 1e-3
    assert abs(shown.score-tiny.score(picture((1500, 700)), 'a red circle', 'safety').item()) < 1e-3
    covered = heat(tiny, picture((1500, 300)), 'a red circle', 'safety', 'occlusion')
    assert covered.image.size == (1024, 205) and abs(covered.weights.sum()-1) < 1e-3


def redness(box):
    "A reward that looks at one box of a 64 x 64 picture."
    def reward(images, prompts):
        x = np.stack([np.asarray(im, np.float32) for im in images])[:, box[1]:box[3], box[0]:box[2]]/255
        return torch.tensor((x[..., 0]-x[..., 1:].mean(-1)).mean((1, 2)))
    return reward


@pytest.mark.parametrize('box', [(0, 0, 16, 16), (20, 8, 44, 24), (40, 40, 64, 64)])
@pytest.mark.parametrize('sign', [1, -1])
def test_deletion_and_insertion_know_the_truth(box, sign):
    "The true map gains, up or down; its complement loses; chance gains nothing."
    image = with_square((64, 64), box)
    reward = redness(box)
    def judge(weights, seed=0):
        map = Heat(image, (weights/weights.sum()).astype(np.float32), '', 0., 'attention', '')
        return faithfulness(lambda images, prompts: sign*reward(images, prompts), map, chances=6, seed=seed)
    truth = np.zeros((64, 64))
    truth[box[1]:box[3], box[0]:box[2]] = 1
    good, bad = judge(truth), judge(1-truth)
    assert min(good.gains.values()) > .2 and max(bad.gains.values()) < -.1
    start = sign*reward([image], [''])[0].item()
    assert abs(good.deletion[0].item()-start) < 1e-6 and abs(good.insertion[-1].item()-start) < 1e-6
    area = (box[2]-box[0])*(box[3]-box[1])/4096
    k = math.ceil(area*16)
    assert abs(good.deletion[k].item()) < 1e-6  # all of the square is gone
    chance = [abs(v) for seed in range(8) for v in judge(np.random.default_rng(seed).random((64, 64)), seed).gains.values()]
    assert np.mean(chance) < .5*min(good.gains.values())


def test_occlusion_finds_what_counts():
    box = (24, 40, 40, 56)
    image = with_square((64, 64), box)
    seen = occlusion_map(scorer(redness((0, 0, 64, 64)), '', image, ''), image)
    y, x = np.unravel_index(seen.argmax(), seen.shape)
    assert box[0] <= x < box[2] and box[1] <= y < box[3]
    assert seen[:20].max() == 0


def test_facts_are_asked_on_one_pass(tiny, monkeypatch):
    images = [picture((64, 64)), picture((64, 64), 1)]
    passes = []
    vision = type(tiny.backbone).vision
    monkeypatch.setattr(type(tiny.backbone), 'vision', lambda self, batch: passes.append(len(batch['image_sizes'])) or vision(self, batch))
    told = score_facts(tiny, images, 'a red circle left of a blue square', perspective='alignment')
    assert sum(passes) == 3  # two pictures and the empty canvas, for six prompts
    for j, text in enumerate([*told.facts, told.prompt]):
        torch.testing.assert_close(told.values[:, j], tiny.score(images, text, 'alignment'), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('prompt', ['', ',', 'and', 'a\x00b', '红色的圆，和 蓝色的方块。', 'x, '*5000, 'עיגול אדום, ריבוע', '...'])
def test_any_text_has_facts(prompt):
    facts = text_facts(prompt)
    assert facts and all(isinstance(f, str) for f in facts)


def test_facts_of_all_shapes_prompts():
    from llava_reward_nb.shapes.prompts import parse_prompt
    from llava_reward_nb.shapes.scenes import sample_prompt
    rng = np.random.default_rng(0)
    for _ in range(200):
        prompt = sample_prompt(rng)
        facts = shape_facts(prompt.text)
        claimed = {f for text in facts for f in parse_prompt(text).facts}
        assert {f for f in prompt.facts if f.kind != 'attribute'} <= claimed
        assert len(facts) == len(set(facts))
