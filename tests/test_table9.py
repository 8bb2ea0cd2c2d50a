"The paper's Table 9 and figures: its numbers, one by one, and the commands that make ours, killed and shared."
import os, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest

from llava_reward_nb import commands
from llava_reward_nb.core import InputError
from llava_reward_nb.evaluation.measures import published_frame
from llava_reward_nb.files import read_table
from llava_reward_nb.tiny.table9 import paper_counts, paper_leads, paper_rows, replication, replication_table

WAYS = {'none': 'none', 'CLIPScore': 'FK by CLIPScore', 'ImageReward': 'FK by ImageReward', 'LLaVA-Reward': 'FK by LLaVA-Reward'}

# arXiv 2507.21391, supplement, as printed
TABLE9 = """
| prompts | model | guidance | HPSv2 | CLIPScore | VQAScore | LLaVA-Reward | ImageReward |
|---|---|---|---|---|---|---|---|
| GenEval | SD v2.1 | none | 0.285 | 0.300 | 0.620 | -0.045 | 0.303 |
| GenEval | SD v2.1 | CLIPScore | 0.292 | 0.314 | 0.663 | 0.018 | 0.660 |
| GenEval | SD v2.1 | ImageReward | 0.298 | 0.312 | 0.737 | 0.078 | 1.179 |
| GenEval | SD v2.1 | LLaVA-Reward | 0.301 | 0.311 | 0.743 | 0.226 | 0.976 |
| GenEval | SDXL | none | 0.307 | 0.303 | 0.681 | 0.180 | 0.677 |
| GenEval | SDXL | CLIPScore | 0.316 | 0.317 | 0.694 | 0.252 | 1.046 |
| GenEval | SDXL | ImageReward | 0.316 | 0.316 | 0.718 | 0.270 | 1.247 |
| GenEval | SDXL | LLaVA-Reward | 0.323 | 0.319 | 0.721 | 0.397 | 1.073 |
| DrawBench | SD v2.1 | none | 0.261 | 0.296 | 0.649 | 0.023 | 0.849 |
| DrawBench | SD v2.1 | CLIPScore | 0.267 | 0.314 | 0.706 | 0.070 | 1.042 |
| DrawBench | SD v2.1 | ImageReward | 0.274 | 0.312 | 0.702 | 0.124 | 1.332 |
| DrawBench | SD v2.1 | LLaVA-Reward | 0.276 | 0.321 | 0.729 | 0.192 | 1.147 |
| DrawBench | SDXL | none | 0.276 | 0.327 | 0.826 | 0.244 | 1.309 |
| DrawBench | SDXL | CLIPScore | 0.282 | 0.348 | 0.890 | 0.308 | 1.540 |
| DrawBench | SDXL | ImageReward | 0.286 | 0.343 | 0.881 | 0.299 | 1.627 |
| DrawBench | SDXL | LLaVA-Reward | 0.288 | 0.350 | 0.887 | 0.352 | 1.542 |
"""

FIGURES = '''
**Figure 4**: "An old photograph of a 1920s airship shaped like a pig, floating over a wheat field."

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.298 | 0.340 | 0.286 | 0.288 |
| CLIPScore | 0.288 | 0.339 | 0.289 | 0.342 |
| VQAScore | 0.427 | 0.739 | 0.519 | 0.909 |
| ImageReward | 1.649 | 1.961 | 1.524 | 1.802 |
| LLM Grader | 7.750 | 8.400 | 7.000 | 8.300 |
| LLaVA-Reward | 0.250 | 0.602 | 0.262 | 0.463 |

**Figure 4**: "a photo of a bench and a snowboard."

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.248 | 0.290 | 0.268 | 0.252 |
| CLIPScore | 0.291 | 0.332 | 0.324 | 0.314 |
| VQAScore | 0.967 | 0.969 | 0.981 | 0.649 |
| ImageReward | 0.121 | 1.775 | 1.540 | -1.009 |
| LLM Grader | 7.950 | 8.050 | 7.750 | 7.500 |
| LLaVA-Reward | 0.337 | 0.566 | 0.291 | 0.279 |

**Figure 4**: "a photo of a black kite and a green bear."

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.312 | 0.345 | 0.286 | 0.285 |
| CLIPScore | 0.275 | 0.337 | 0.291 | 0.311 |
| VQAScore | 0.139 | 0.770 | 0.211 | 0.171 |
| ImageReward | 0.147 | 1.652 | 1.537 | 0.183 |
| LLM Grader | 5.400 | 7.160 | 6.480 | 5.760 |
| LLaVA-Reward | -0.306 | 0.460 | 0.083 | -0.193 |

**Figure 5**: prompt not in the text

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.292 | 0.311 | 0.286 | 0.317 |
| CLIPScore | 0.291 | 0.302 | 0.292 | 0.342 |
| VQAScore | 0.942 | 0.971 | 0.909 | 0.899 |
| ImageReward | 1.696 | 1.798 | 1.729 | 1.740 |
| LLM Grader | 7.880 | 8.040 | 7.480 | 7.560 |
| LLaVA-Reward | 0.412 | 0.512 | 0.503 | 0.299 |

**Figure 5**: prompt not in the text

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.315 | 0.297 | 0.321 | 0.296 |
| CLIPScore | 0.296 | 0.331 | 0.299 | 0.282 |
| VQAScore | 0.904 | 0.888 | 0.909 | 0.971 |
| ImageReward | 1.012 | 1.540 | 0.870 | 0.977 |
| LLM Grader | 7.480 | 7.400 | 6.240 | 6.080 |
| LLaVA-Reward | 0.363 | 0.451 | 0.389 | 0.297 |

**Figure 5**: prompt not in the text

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.266 | 0.295 | 0.275 | 0.276 |
| CLIPScore | 0.273 | 0.312 | 0.311 | 0.328 |
| VQAScore | 0.176 | 0.769 | 0.245 | 0.253 |
| ImageReward | -1.305 | 0.445 | -1.334 | -1.466 |
| LLM Grader | 4.800 | 6.040 | 5.480 | 5.160 |
| LLaVA-Reward | -0.125 | 0.178 | -0.400 | -0.217 |

**Figure 6**: "A storefront with 'Google Brain Toronto' written on it."

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.295 | 0.309 | 0.286 | 0.301 |
| CLIPScore | 0.384 | 0.417 | 0.330 | 0.349 |
| VQAScore | 0.869 | 0.983 | 0.365 | 0.695 |
| ImageReward | 1.757 | 1.765 | 1.697 | 1.694 |
| LLM Grader | 7.000 | 7.320 | 7.000 | 7.080 |
| LLaVA-Reward | 0.330 | 0.490 | 0.279 | 0.230 |

**Figure 6**: "Photo of an athlete cat explaining it's latest scandal at a press conference to journalists."

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.299 | 0.354 | 0.339 | 0.341 |
| CLIPScore | 0.286 | 0.347 | 0.359 | 0.344 |
| VQAScore | 0.565 | 0.626 | 0.531 | 0.614 |
| ImageReward | 1.566 | 1.732 | 1.455 | 1.661 |
| LLM Grader | 8.120 | 8.000 | 7.680 | 7.920 |
| LLaVA-Reward | 0.188 | 0.289 | 0.186 | 0.183 |

**Figure 6**: "McDonalds Church."

| metric | none | LLaVA-Reward | ImageReward | CLIPScore |
|---|---|---|---|---|
| HPSv2 | 0.331 | 0.332 | 0.318 | 0.317 |
| CLIPScore | 0.275 | 0.320 | 0.306 | 0.332 |
| VQAScore | 0.395 | 0.459 | 0.218 | 0.435 |
| ImageReward | 1.738 | 1.909 | 1.576 | 1.560 |
| LLM Grader | 7.720 | 7.960 | 7.480 | 7.880 |
| LLaVA-Reward | -0.007 | 0.254 | -0.098 | 0.159 |
'''


def cells(line): return [c.strip() for c in line.strip().strip('|').split('|')]


def test_table9_has_the_numbers_of_the_paper():
    head, _, *lines = TABLE9.strip().split('\n')
    metrics = cells(head)[3:]
    paper = published_frame('table9').set_index(['prompt_set', 'model', 'guidance'])
    assert len(lines) == len(paper) == 16 and list(paper.columns) == metrics
    for line in lines:
        prompt_set, model, guidance, *numbers = cells(line)
        assert list(paper.loc[(prompt_set, model, WAYS[guidance]), metrics]) == [float(n) for n in numbers], line


def test_figures_have_the_numbers_of_the_paper():
    parts = FIGURES.strip().split('**Figure ')[1:]
    panels = [g for _, g in published_frame('figures').groupby(['figure', 'prompt'], sort=False)]
    assert len(parts) == len(panels) == 9
    for part, panel in zip(parts, panels):
        title, _, head, _, *lines = [line for line in part.split('\n') if line.strip()][0:1]+[''] + [line for line in part.split('\n') if line.startswith('|')]
        figure, _, prompt = title.partition('**: ')
        assert panel.figure.iloc[0] == f'Figure {figure}'
        stated = prompt.strip().strip('"')
        assert panel.prompt.iloc[0].startswith('prompt not stated') if prompt == 'prompt not in the text' else panel.prompt.iloc[0] == stated
        values = panel.set_index('guidance')
        assert len(lines) == 6
        for line in lines:
            metric, *numbers = cells(line)
            assert [values.loc[WAYS[w], metric] for w in cells(head)[1:]] == [float(n) for n in numbers], (title, line)


def test_the_paper_statements_are_recomputed():
    counts = paper_counts()
    assert counts.pop('every guidance raises every metric') == (60, 60)
    assert sorted(counts.values()) == [(3, 4), (3, 4), (3, 4), (4, 4), (4, 4), (4, 4)]
    assert paper_rows() == (42, 54)
    assert all(len(v) == 4 and min(v) > 0 for v in paper_leads().values())


def particles(lift, n=40):
    "Every way lifts every metric as `lift` says, on prompts of different difficulty."
    rows = []
    for p in range(n):
        for way in WAYS.values():
            values = {m: (p % 7)+lift(way, m)+.01*((3*p) % 5) for m in ('HPSv2', 'CLIPScore', 'LLaVA-Reward', 'ImageReward', 'checker')}
            rows.append(dict(prompt_set='s', model='m', prompt=f'{p}', seed=0, particle=0, guidance=way, guidance_score=0. if way != 'none' else float('nan'), **values))
    frame = pd.DataFrame(rows)
    wobble = pd.Series(range(len(frame))).mul(.37) % .05
    return frame.assign(**{m: frame[m]+wobble*(k+1) for k, m in enumerate(('HPSv2', 'CLIPScore', 'LLaVA-Reward', 'ImageReward', 'checker'))})


def test_a_world_like_the_paper_repeats_all_of_it():
    def lift(way, m):
        if way == 'none': return 0.
        if m == 'ImageReward': return 2. if way == 'FK by ImageReward' else 1.
        return 2. if way == 'FK by LLaVA-Reward' else 1.
    table = replication_table(particles(lift)).df
    assert (table.repeated == table['tried here']).all() and not table['not repeated'].any()


def test_a_world_unlike_the_paper_repeats_none_of_it():
    def lift(way, m): return {'none': 3., 'FK by CLIPScore': 2.5, 'FK by ImageReward': 1., 'FK by LLaVA-Reward': 0.}[way]
    table = replication_table(particles(lift)).df
    assert (table['not repeated'] == table['tried here']).all() and not table.repeated.any()


def test_few_prompts_decide_nothing():
    said = replication(particles(lambda way, m: float(way != 'none'), n=3))
    assert set(said.verdict) == {'undecided'}


def test_gaps_cost_prompts_and_not_the_report():
    frame = particles(lambda way, m: float(way != 'none'))
    frame.loc[5, 'HPSv2'] = float('nan')
    said = replication(frame)
    at = (said.metric == 'HPSv2') & (said.statement == 'every guidance raises every metric')
    assert set(said[at].prompts) == {39, 40}
    with pytest.raises(InputError, match='the paper says nothing'): replication(frame.rename(columns={m: m.lower() for m in ('HPSv2', 'CLIPScore', 'LLaVA-Reward', 'ImageReward')}))


# ---- the command

def launched(out, rank=0, world=1):
    "A tiny slice of the table in a process of its own, perhaps one of several as `accelerate launch` starts them."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONPATH=str(Path(commands.__file__).parents[2]))
    if world > 1: env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    words = f'table9 --model tiny --prompts geneval --guidance none clipscore --metrics clipscore --limit 4 --particles 2 --steps 5 --batch-prompts 1 --out {out}'
    code = 'from llava_reward_nb.commands import llava_reward; llava_reward()'
    return subprocess.Popen([sys.executable, '-c', code, *words.split()], env=env, stdout=subprocess.PIPE, text=True)


def test_killed_processes_lose_nothing(tmp_path):
    "Two processes at work in one folder are killed; two others finish, and only the first of them reports."
    table = tmp_path/'tiny-geneval-tiny-sd'/'scores.parquet'
    two = [launched(tmp_path, rank, 2) for rank in (0, 1)]
    while not table.is_file() and any(p.poll() is None for p in two): time.sleep(.01)
    for p in two: p.kill()
    for p in two: p.communicate()
    kept = pd.DataFrame(read_table(table))
    first, second = [launched(tmp_path, rank, 2) for rank in (0, 1)]
    said, silent = first.communicate(timeout=300)[0], second.communicate(timeout=300)[0]
    assert first.returncode == second.returncode == 0
    assert 'in all:' in said and 'by 2 processes' in said and 'Metrics under guidance' in said
    assert silent == ''
    whole = pd.DataFrame(read_table(table))
    assert whole.groupby('guidance').prompt.nunique().to_dict() == {'none': 4, 'FK by CLIPScore': 4, 'best-of-n by CLIPScore at equal compute': 4}
    assert not whole.duplicated(['seed', 'prompt', 'guidance', 'particle']).any()
    same = kept.merge(whole, on=['seed', 'prompt', 'guidance', 'particle'])
    assert len(same) == len(kept) and (same.pixels_x == same.pixels_y).all(), 'what was there stays'
    assert {f.name for f in tmp_path.glob('table9.*')} == {f'table9.{form}' for form in ('md', 'tex', 'html', 'csv', 'txt')}
