"Toy checkpoints of the metrics in their published layouts, the images, and the numbers that the reference code gave for them."
import json, re, subprocess, sys
from functools import cache
from pathlib import Path

import torch
from conftest import script

FOLDER = Path(__file__).resolve().parent/'golden'/'metrics'


def numbers(name):
    "The golden values in one of the JSON files."
    return json.loads((FOLDER/f'{name}.json').read_text(encoding='utf-8'))


@cache
def maker():
    "The writer of checkpoints and images, as a module."
    return script(FOLDER/'make_metric_checkpoints.py')


def checkpoints(out, *names):
    "Write these toy checkpoints into folders of the same names; their checksums, as printed."
    done = subprocess.run([sys.executable, FOLDER/'make_metric_checkpoints.py', '--spec', FOLDER/'spec_metrics.json', '--out', out,
                           '--only', ','.join(names)], check=True, capture_output=True, text=True)
    return dict(re.findall(r'^(\w+) .* crc32 (\w+)', done.stdout, re.M))


def same_pixels(x, want, atol):
    "Compare one preprocessed image (3,h,w) with its golden moments and samples."
    rows, cols = torch.tensor(want['points_rows']), torch.tensor(want['points_cols'])
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b), atol=atol, rtol=0)
    assert list(x.shape) == want['shape']
    close(x[:, rows][:, :, cols], want['points'])
    close(x.double().mean((1, 2)).float(), want['channel_mean'])
    close(x.double().std((1, 2), unbiased=False).float(), want['channel_std'])
