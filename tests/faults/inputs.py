"Small inputs on which commands once failed or gave wrong numbers: pictures and tables, written into a folder."
import io, json, sys
from pathlib import Path

import pyarrow as pa, pyarrow.parquet as pq
from PIL import Image, ImageDraw

ORIENTATION = 0x0112 # EXIF tag


def scene():
    "A red circle left of a blue square, as the embedded models draw it."
    im = Image.new('RGB', (64, 64), (236, 236, 240))
    draw = ImageDraw.Draw(im)
    draw.ellipse((6, 22, 26, 42), fill=(214, 38, 38))
    draw.rectangle((38, 22, 58, 42), fill=(38, 70, 214))
    return im


def turned(im, folder):
    "A JPEG stored on its side, which its EXIF block turns back: viewers show it as they show `upright.png`."
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    im.transpose(Image.Transpose.ROTATE_90).save(folder/'exif6.jpg', quality=98, exif=exif)


def as_bytes(im):
    "The PNG of an image."
    buffer = io.BytesIO()
    im.save(buffer, 'png')
    return buffer.getvalue()


def write_inputs(folder):
    "Everything below a folder, which is made if needed."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    im = scene()
    for name in ('upright', 'a', 'b', 'c'): im.save(folder/f'{name}.png')
    turned(im, folder)
    clear = im.copy()
    clear.putalpha(0)
    clear.save(folder/'invisible.png')
    Image.new('RGB', (3000, 2), 'red').save(folder/'thin.png')
    (folder/'ragged_pairs.csv').write_text('prompt,chosen_path,reject_path\nx,a.png,b.png,c.png\ny,b.png,a.png,c.png\n')
    (folder/'old.csv').write_text('image,prompt,alignment,error\na.png,a red circle,456.0,was broken last week\n'
                                  'missing.png,a red circle,789.0,\n')
    (folder/'bom.json').write_bytes(b'\xef\xbb\xbf'+json.dumps([dict(image='a.png', prompt='a red circle')]).encode())
    (folder/'thin.csv').write_text('image,prompt\na.png,a red circle\nthin.png,a red circle\n')
    pq.write_table(pa.table(dict(image=[dict(bytes=as_bytes(im), path='a.png')], prompt=['a red circle'])), folder/'hub.parquet')
    pq.write_table(pa.table(dict(image=['a.png', 'b.png'], prompt=['x', 'y'], ranking=[[1, 2, 3], [2, 1]])), folder/'lists.parquet')
    return folder


if __name__ == '__main__': write_inputs(sys.argv[1] if len(sys.argv) > 1 else '.')
