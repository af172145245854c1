"""Coverage-guided fuzzing (Atheris) of the readers of images, scans, masks and datasets.

    pip install atheris
    python benchmarks/fuzz_readers.py -atheris_runs=20000 -rss_limit_mb=2048 -timeout=10 \\
        benchmarks/work/corpus

The tests mutate files with Hypothesis on all systems. This program finds faults that only a guided
search finds; it needs Atheris (Linux, some versions of Python). Each input goes to the reader that
its first byte names. An exception other than InputError stops the run, and the input is saved.
Other flags are those of libFuzzer.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent

READERS = ['igseg', 'PIL', 'pydicom', 'nibabel']  # packages whose coverage guides the mutations
with atheris.instrument_imports(include=READERS):
    import nibabel
    import numpy as np
    from pydicom import examples

    from igseg.data.layouts import COCO_FILE
    from igseg.data.masks import read_mask
    from igseg.data.pixels import read_image
    from igseg.data.samples import list_samples
    from igseg.data.truth import read_label_map
    from igseg.errors import InputError

FOLDER = Path(tempfile.mkdtemp())


def dataset(path: str) -> Callable[[bytes], None]:
    """A reader of a dataset, which writes its input to a file of the dataset."""

    def read(content: bytes) -> None:
        root = FOLDER / path.split('/')[0]
        (FOLDER / path).write_bytes(content)
        for sample in list_samples(root):
            if not sample.image_path.resolve().is_relative_to(FOLDER.resolve()):
                raise AssertionError(f'{sample.image_path} lies outside of its dataset')
            sample.truth()
            sample.names_of_classes()

    return read


def file(name: str, *readers: Callable[[Path], object]) -> Callable[[bytes], None]:
    """A reader that gives a file to several functions; each of them may refuse it."""

    def read(content: bytes) -> None:
        path = FOLDER / name
        path.write_bytes(content)
        for reader in readers:
            try:
                reader(path)
            except InputError:
                continue

    return read


READERS: dict[bytes, Callable[[bytes], None]] = {
    b'p': file('a.png', read_image, read_mask),
    b't': file('a.tif', read_image, read_mask),
    b'd': file('a.dcm', read_image, read_mask),
    b'n': file('a.nii', read_image, read_mask),
    b'm': file('map.txt', read_label_map),
    b'c': dataset(f'coco/{COCO_FILE}'),
    b'y': dataset('yolo/labels/a.txt'),
    b'Y': dataset('yolo/data.yaml'),
    b'v': dataset('voc/SegmentationClass/a.png'),
    b'V': dataset('voc/ImageSets/Segmentation/val.txt'),
    b'N': dataset('nnunet/dataset.json'),
    b'r': dataset('roboflow/_classes.csv'),
}


def read(content: bytes) -> None:
    """Give an input to the reader that it names; if it names none, to any reader."""
    which = content[:1]
    if which not in READERS:
        which = list(READERS)[(which or b'\0')[0] % len(READERS)]
    with contextlib.suppress(InputError):
        READERS[which](content[1:])


def lay_datasets(picture: bytes, mask: bytes) -> None:
    """The files of the datasets that are not mutated."""
    for path in ('coco/a', 'yolo/images/a.jpg', 'voc/JPEGImages/a.jpg',
                 'nnunet/imagesTs/a_0000.jpg', 'roboflow/a.jpg'):  # fmt: skip
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_bytes(picture)
    for path in ('yolo/labels/a.txt', 'voc/ImageSets/Segmentation/val.txt',
                 'voc/SegmentationClass/a.png', 'nnunet/labelsTs/a.png',
                 'roboflow/a_mask.png'):  # fmt: skip
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_bytes(mask if path.endswith('.png') else b'a\n')


def seeds(corpus: Path, picture: bytes, mask: bytes) -> None:
    """Write one valid file for each reader, from which the search starts."""
    corpus.mkdir(parents=True, exist_ok=True)
    coco = b'{"images": [{"id": 1, "file_name": "a", "height": 9, "width": 9}], "annotations": '
    coco += b'[{"id": 1, "image_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}, '
    coco += b'{"id": 2, "image_id": 1, "segmentation": {"size": [9, 9], "counts": "05<"}}]}'
    volume = nibabel.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.eye(4))
    for which, content in {
        b'p': picture,
        b't': picture,
        b'd': Path(examples.get_path('ct')).read_bytes()[:20_000],
        b'n': volume.to_bytes(),
        b'm': b'0 = 0, background\n255,0,0 = 1, organ\n#00ff00 = ignore\n',
        b'c': coco,
        b'y': b'0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.9 0.2 0.9 0.9 0.2 0.9\n',
        b'Y': b'path: ..\nnames:\n  0: liver\n  1: tumour\n',
        b'v': mask,
        b'V': b'a\nb\n',
        b'N': b'{"labels": {"background": 0, "liver": 1}}',
        b'r': b'Pixel Value, Class\n0, background\n1, liver\n',
    }.items():
        (corpus / f'seed_{which.hex()}').write_bytes(which + content)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    demo = HERE.parent / 'demo' / 'Dataset_no_preprocessing' / 'test'
    nuclei = HERE.parent / 'demo' / 'nuclei' / 'test'
    files = next(demo.glob('*.jpg')).read_bytes(), next(nuclei.glob('*_mask.png')).read_bytes()
    lay_datasets(*files)
    folders = [Path(word) for word in sys.argv[1:] if not word.startswith('-')]
    for folder in folders[:1]:
        seeds(folder, *files)
    try:
        atheris.Setup(sys.argv, read)
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
