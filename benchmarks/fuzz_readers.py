"""Coverage-guided fuzzing of the readers of images, masks, COCO files and label maps (Atheris).

    pip install atheris
    python benchmarks/fuzz_readers.py -max_total_time=60 benchmarks/work/corpus

The tests mutate files with Hypothesis everywhere; this finds what only a guided search does, where
Atheris is available (Linux, some versions of Python). Every input goes to one reader; anything but
a result or an InputError stops the run and leaves the input. Further flags are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

OWN = ['segmentation_dataset', 'image_reading', 'mask_reading', 'coco_annotations', 'PIL']
with atheris.instrument_imports(include=OWN):
    from mask_reading import read_label_map
    from segmentation_dataset import COCO_FILE, InputError, list_samples, read_image, read_mask

FOLDER = Path(tempfile.mkdtemp())


def read(content: bytes) -> None:
    """Give an input to the reader that its first byte names."""
    which, rest = content[:1], content[1:]
    try:
        if which < b'U':
            (FOLDER / 'a.png').write_bytes(rest)
            (read_image if which < b'@' else read_mask)(FOLDER / 'a.png')
        elif which < b'f':
            (FOLDER / 'map.txt').write_bytes(rest)
            read_label_map(FOLDER / 'map.txt')
        else:
            (FOLDER / COCO_FILE).write_bytes(rest)
            for sample in list_samples(FOLDER):
                sample.truth()
    except InputError:
        pass


def seeds(corpus: Path) -> None:
    """Write one valid file for each reader, from which the search starts."""
    corpus.mkdir(parents=True, exist_ok=True)
    demo = HERE.parent / 'demo' / 'Dataset_no_preprocessing' / 'test'
    picture = next(demo.glob('*.jpg')).read_bytes()
    coco = b'{"images": [{"id": 1, "file_name": "a", "height": 9, "width": 9}], "annotations": '
    coco += b'[{"id": 1, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}, '
    coco += b'{"id": 2, "image_id": 1, "segmentation": {"size": [9, 9], "counts": "05<"}}]}'
    for name, content in {
        'image': b'0' + picture,
        'mask': b'A' + picture,
        'map': b'a0 = 0, background\n255,0,0 = 1, organ\n#00ff00 = ignore\n',
        'coco': b'g' + coco,
    }.items():
        (corpus / name).write_bytes(content)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    folders = [Path(word) for word in sys.argv[1:] if not word.startswith('-')]
    for folder in folders[:1]:
        seeds(folder)
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
