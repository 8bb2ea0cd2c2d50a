"Recipes: from every source to a scored perspective by one command, the files of the package, the plan against what really runs."
import csv, json

import families, pytest
from llava_reward_nb.commands.score import llava_reward_score
from llava_reward_nb.commands.train import llava_reward_train
from llava_reward_nb.core import InputError
from llava_reward_nb.generic import load_backbone
from llava_reward_nb.model import PerspectiveConfig, RewardModel
from llava_reward_nb.recipes import files, plan
from llava_reward_nb.config import RewardConfig
from PIL import Image
from test_sources import homes  # noqa: F401

SMALL = dict(device='cpu', lora_rank=2, batch_size=2, accumulation=1)


def command(capsys, *args):
    "What the console command prints; its exit code."
    capsys.readouterr()
    try: llava_reward_train.main(list(map(str, args)), 'llava_reward train')
    except SystemExit as e: return e.code, capsys.readouterr()
    return 0, capsys.readouterr()


@pytest.fixture
def sources(homes):  # noqa: F811
    "What is typed for each public source, and for tables of one's own."
    folder = homes['folder']
    ranked = folder.parent/'ranked'/'mine.jsonl'
    ranked.parent.mkdir()
    ranked.write_text(''.join(json.dumps(dict(prompt=f'{n} signs', images=[f'{folder}/{i}.png' for i in range(3)], ranks=[1, 2, 2]))+'\n' for n in (2, 3)))
    pairs = folder.parent/'pairs'/'mine.csv'
    pairs.parent.mkdir()
    pairs.write_text('prompt,chosen_path,reject_path\n'+''.join(f'{n} signs,{folder}/0.png,{folder}/1.png\n' for n in (2, 3)))
    typed = {name: f'{name}:{home}' for name, home in homes.items() if name != 'folder'}
    return dict(typed, labels=folder, pairs=pairs, ranked=ranked)


@pytest.mark.parametrize('name', ['imagereward', 'pickapic', 'hpdv2', 'hpdv3', 'unsafebench', 'llava', 'labels', 'pairs', 'ranked'])
def test_from_each_source_to_a_score(sources, homes, name, tmp_path, capsys):  # noqa: F811
    run = tmp_path/'run'
    code, said = command(capsys, sources[name], '--name', 'mine', '--out', run, '--device', 'cpu', '--lora-rank', 2, 'max_steps=2', '--batch-size', 2)
    assert code == 0, said.err
    assert json.loads((run/'mine'/'reward_config.json').read_text())['loss'] == dict(unsafebench='cls', labels='cls', ranked='pl').get(name, 'bt')
    about = json.loads((run/'run.json').read_text())
    assert 'hash' in about['records']['train']['identity'] and about['versions']['torch'] and about['plan']['updates'] == 2
    usage = next(line for line in said.out.splitlines() if line.startswith('use it: llava_reward_score '))
    assert usage.endswith(f'--model {run}')
    llava_reward_score([homes['folder']/'0.png'], 'a sign', model=run, device='cpu', out=tmp_path/'scores.csv')
    assert all(abs(float(row['mine'])) < 1e6 for row in csv.DictReader(open(tmp_path/'scores.csv'))), (tmp_path/'scores.csv').read_text()


def test_kinds_of_records_do_not_mix(sources, tmp_path, capsys):
    for words, why in (([sources['ranked'], f"data.eval={sources['pairs']}"], 'records of several kinds'), ([sources['ranked'], '--loss', 'bt'], "'pl' from rankings"),
                       ([sources['pairs'], '--loss', 'pl'], "'pl' from rankings")):
        code, said = command(capsys, *words, '--name', 'mine', '--out', tmp_path/'run')
        assert code == 1 and why in said.err, said.err


def test_ones_own_folder(tmp_path, capsys):
    "A folder of images and a CSV, a recipe copied and changed, words in any order."
    for i, color in enumerate(('red', 'blue', 'green', 'gold')): Image.new('RGB', (20,20), color).save(tmp_path/f'{i}.png')
    with open(tmp_path/'mine.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('prompt', 'chosen_path', 'reject_path'), *((f'wall {i}', '0.png', f'{i}.png') for i in (1, 2, 3)), ('a blue wall', '1.png', '0.png')])
    text = files.recipe_file('tiny-alignment-bt').read_text().replace('train: shapes:alignment:32', f'train: {tmp_path}/mine.csv').replace('eval: shapes:alignment:16', 'holdout: .25')
    (tmp_path/'mine.yaml').write_text(text)
    code, said = command(capsys, tmp_path/'mine.yaml', '--out', tmp_path/'run', 'eval_steps=1', '--lora-rank', '2', 'num_train_epochs=2')
    assert code == 0, said.err
    assert '3 pairs' in said.out and 'held out: 1 pairs' in said.out and (tmp_path/'run'/'alignment'/'README.md').is_file()
    again = files.read_recipe(tmp_path/'run'/'recipe.yaml')
    assert (again.training.num_train_epochs, again.training.lora_rank, again.training.lora_alpha, again.data.holdout) == (2, 2, 4, .25)


def test_own_records_are_measured_on_their_own(sources, tmp_path, capsys):
    "A recipe that measures on the world of shapes does not do so with other records."
    code, said = command(capsys, 'tiny-alignment-bt', sources['pairs'], '--out', tmp_path/'run', '--dry-run')
    assert code == 0 and '1 held-out pairs; 0.1 of the records' in said.out, said.out+said.err
    code, said = command(capsys, 'tiny-safety-cls', f"data.train={sources['labels']}", 'data.eval=[]', 'eval_strategy=no', '--dry-run')
    assert code == 0 and 'measures   nothing' in said.out, said.out+said.err


@pytest.mark.parametrize('args,why', [
    (['phi-alignment-bd'], "did you mean 'phi-alignment-bt'?"), (['tiny-alignment-bt', 'perspective.los=gpm'], "did you mean 'perspective.loss'?"),
    (['tiny-alignment-bt', 'training.bf16=maybe'], 'needed: true or false'), (['tiny-alignment-bt', 'lora_rank=1.5'], 'needed: a whole number'),
    (['tiny-alignment-bt', 'data.train=nowhere.csv'], 'nowhere.csv: no such file'), (['tiny-alignment-bt', 'data.eval=shapes:safety:4'], 'train them apart'),
    (['tiny-safety-cls', 'loss=gpm'], "'cls' from labels"), (['tiny-alignment-bt', 'data.eval=[]'], 'no records to measure on'),
    (['tiny-alignment-bt', 'zero_stage=3'], 'this run has one process'), (['tiny-alignment-bt', 'base=nowhere/at/all'], 'no such folder'),
    (['tiny-alignment-bt', 'start=tiny/alignment'], 'start keeps what'), (['tiny-alignment-bt', 'report_to=nobody'], 'no tracker'),
    (['nowhere.yaml'], 'nowhere.yaml: no such file'), (['tiny-alignment-bt', 'eval_strategy=never'], 'eval_strategy is '), (['tiny-alignment-bt', 'without=[nowhere.txt]'], 'nowhere.txt')])
def test_what_is_wrong_is_said_before_anything_is_loaded(args, why, tmp_path, capsys, monkeypatch):
    def loaded(*_, **__): raise AssertionError('a model was loaded')
    monkeypatch.setattr(RewardModel, 'from_pretrained', loaded)
    code, said = command(capsys, *args, '--out', tmp_path/'run')
    assert code in (1, 2) and why in said.err and said.err.strip().count('\n') == 0, said.err
    assert not (tmp_path/'run').exists()


def test_the_package_has_its_recipes_whole():
    names = files.recipe_names()
    assert {'phi-alignment-bt', 'phi-alignment-gpm', 'phi-fidelity-bt', 'phi-safety-cls', 'phi-overall-bt'} <= set(names)
    for name in names:
        recipe = files.read_recipe(name, elsewhere=True)
        text = files.recipe_file(name).read_text()
        assert recipe.about and text.startswith('# ') and f'llava_reward train {name}' in text
        if not name.startswith('tiny'): assert files.read_accelerate(recipe.accelerate).processes == 4
    layouts = {name: files.read_accelerate(name) for name in files.accelerate_names()}
    assert {layout.kind for layout in layouts.values()} == {'NO', 'MULTI_GPU', 'FSDP', 'DEEPSPEED'}


def test_the_papers_values():
    for name, loss, dim in (('phi-alignment-bt', 'bt', 1), ('phi-alignment-gpm', 'gpm', 2), ('phi-safety-cls', 'cls', 1)):
        r = files.read_recipe(name, elsewhere=True)
        t = r.training
        assert (t.learning_rate, t.lora_rank, t.lora_alpha, t.lora_dropout, t.num_train_epochs, t.warmup_steps) == (2e-4, 128, 256, .05, 1, .03)
        assert (t.per_device_train_batch_size, t.gradient_accumulation_steps, t.adam_beta2, t.max_grad_norm, t.weight_decay) == (8, 4, .95, 1, 0)
        assert (r.perspective.loss, r.perspective.dim, r.perspective.tau, r.perspective.skipca, r.num_crops) == (loss, dim, .1, True, 16)


@pytest.mark.parametrize('name', ['qwen2_5_vl', 'qwen3_vl', 'llava_next'])
def test_a_rehearsal_counts_what_runs(name, tmp_path):
    "Groups and operations as of the real model, memory within a few percent, for backbones of other makers."
    folder = families.FAMILIES[name](tmp_path/name)
    args = RewardConfig(str(tmp_path/'run'), use_cpu=True, lora_rank=4, lora_alpha=8, gradient_accumulation_steps=1)
    config = PerspectiveConfig(num_crops=None)
    ghost = plan.hollow_model(folder, config, args)
    real = RewardModel(load_backbone(folder))
    real.add_perspective('planned', config, 4, 8, .05)
    assert plan.trainable_groups(ghost) == plan.trainable_groups(real)
    images = [Image.new('RGB', size) for size in ((70,40), (64,64))]
    of_ghost, of_real = (plan.rehearse(m, m.backbone.encode(images, ['a red circle', 'a']), args) for m in (ghost, real))
    assert (of_ghost.weights, of_ghost.optimizer, of_ghost.tokens) == (of_real.weights, of_real.optimizer, of_real.tokens)
    assert of_ghost.flops == pytest.approx(of_real.flops, rel=.02) and of_ghost.activations == pytest.approx(of_real.activations, rel=.1)


def test_a_base_that_cannot_be_rehearsed_is_said_so(tmp_path):
    folder = families.FAMILIES['idefics3'](tmp_path/'base')
    found = plan.make_plan(folder, PerspectiveConfig(num_crops=None), RewardConfig(str(tmp_path/'run'), use_cpu=True, lora_rank=4))
    assert found.memory is None and found.flops is None and any('unknown: idefics3 cannot be rehearsed' in line for line in plan.plan_lines(found))


@pytest.mark.parametrize('key', ['learning_rate', 'tau', 'holdout'])
@pytest.mark.parametrize('text', ['1e-2', '0.01', '.01', '1.0e-2'])
def test_numbers_as_people_write_them(key, text, tmp_path):
    section, name = files.find_key(key)
    (tmp_path/'r.yaml').write_text(f'{section}: {{{name}: {text}}}')
    for recipe in files.read_recipe(tmp_path/'r.yaml'), files.read_recipe(None, [f'{key}={text}']): assert getattr(getattr(recipe, section), name) == .01


def test_the_same_file_twice_is_an_error(tmp_path):
    (tmp_path/'r.yaml').write_text('data: {limit: 3, limit: 4}')
    with pytest.raises(InputError, match="'limit' is there twice"): files.read_recipe(tmp_path/'r.yaml')
