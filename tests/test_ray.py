"Bulk scoring on Ray: an actor is killed midway, the command has a switch, and each row is scored once."
import os, signal, sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from llava_reward_nb.commands.score import llava_reward_score
from llava_reward_nb.ray_data import score_with_ray

ROWS = 10  # of each shard


@pytest.fixture(scope='module')
def cluster():
    ray = pytest.importorskip('ray.data', reason="Ray is not installed: pip install 'llava_reward_nb[ray]'")
    import ray
    ray.init(num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False, logging_level='ERROR')
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "Five folders of images; the red value is the number of the image."
    top = tmp_path_factory.mktemp('data')
    for k in range(5*ROWS):
        folder = top/f'shard{k//ROWS}'
        folder.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8), (k, 0, 0)).save(folder/f'{k:02}.png')
    return sorted(top.iterdir())


class Deadly:
    "The red value; the first process that sees the 25th image dies of it."
    identity = 'red-1'

    def __init__(self, mark): self.mark = mark

    def __call__(self, images, prompts):
        reds = [im.convert('RGB').getpixel((0, 0))[0] for im in images]
        if 25 in reds and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(reds)


def test_a_killed_actor_is_replaced(cluster, sources, tmp_path):
    summary = score_with_ray(sources, dict(red=Deadly(str(tmp_path/'mark'))), tmp_path/'out', prompt='p', device='cpu')
    assert (tmp_path/'mark').exists()
    assert (summary.rows, summary.scored, summary.repeated_keys) == (5*ROWS, 5*ROWS, 0)
    table = pd.read_parquet(tmp_path/'out').sort_values('key', ignore_index=True)
    assert table.red.tolist() == list(range(5*ROWS))
    assert table.key.tolist() == [f'shard{k//ROWS}/{k:02}.png' for k in range(5*ROWS)]


def test_the_command_has_a_switch(cluster, sources, tmp_path, capsys):
    "Perspectives of a model on two actors; the same command goes on, also without Ray."
    how = dict(prompt='a red circle', perspective=['alignment'], device='cpu', out=f"{tmp_path/'out'}/")
    llava_reward_score(sources[:2], ray=2, **how)
    assert f'{2*ROWS} rows: {2*ROWS} scored' in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('part-*')}
    llava_reward_score(sources[:2], **how)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('part-*')} == before
