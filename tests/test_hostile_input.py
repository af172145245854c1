"""Files that were damaged or made to do harm: every reader gives a result or one sentence.

Each of the readers gets 50 mutated files, and 2,500 with `-m long`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import PLAIN_BATCH, ROOT, noise_image, save_image, square_mask, write_coco
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from igseg.data.annotations import run_lengths
from igseg.data.masks import read_mask
from igseg.data.medical import codestream_size
from igseg.data.pixels import read_image
from igseg.data.samples import list_samples, safe_names
from igseg.data.truth import read_label_map
from igseg.errors import InputError
from igseg.network.loading import create_model, load_model
from integrated_gradients import main

many_or_few = pytest.mark.parametrize('examples', [50, pytest.param(2500, marks=pytest.mark.long)])


def in_time(check: Callable) -> Callable:
    """No reader may take longer over one file than ten seconds of this process."""

    @wraps(check)
    def timed(*given, **named):
        started = time.process_time()
        check(*given, **named)
        assert time.process_time() - started < 10

    return timed


def fuzzed(examples: int) -> Callable:
    """So many examples, each in time."""
    common = settings(
        max_examples=examples,
        deadline=None,  # of the clock, which counts what other programs do
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorated(check: Callable) -> Callable:
        check.hypothesis.inner_test = in_time(check.hypothesis.inner_test)
        return common(check)

    return decorated


@pytest.fixture
def files_read(examples) -> Iterator[list[int]]:
    """One entry for each mutated file; there must be as many as CONTRIBUTING.md says."""
    found: list[int] = []
    yield found
    assert len(found) >= examples


ODD_BYTES = [
    b'\x00',
    b'\xff',
    b'\x7f\xff\xff\xff',
    b'\xff\xff\xff\xff',
    b'\x80\x00\x00\x00',
    b'-',
    b'9' * 30,
]
edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where
        st.sampled_from(['set', 'insert', 'delete', 'cut', 'repeat']),
        st.one_of(st.sampled_from(ODD_BYTES), st.binary(min_size=1, max_size=40)),
    ),
    min_size=1,
    max_size=6,
)


def mutated(content: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    """Some bytes of a file changed."""
    for where, kind, new in changes:
        at = int(where * len(content))
        length = len(new)
        content = {
            'set': content[:at] + new + content[at + length :],
            'insert': content[:at] + new + content[at:],
            'delete': content[:at] + content[at + length :],
            'cut': content[: max(1, at)],
            'repeat': content[:at] + content[at : at + 50 * length] + content[at:],
        }[kind] or b'\x00'
    return content


def picture(array: np.ndarray, form: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def pictures() -> list[bytes]:
    colour, mask = noise_image(24, 20), square_mask(40, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = io.BytesIO()
    Image.fromarray(colour).quantize(8).save(palette, 'PNG')
    return [
        picture(colour, 'PNG'), picture(colour, 'JPEG', exif=exif), picture(colour, 'BMP'),
        picture(colour, 'JPEG', progressive=True), picture(colour, 'GIF'), picture(colour, 'WEBP'),
        *(picture(colour, 'TIFF', compression=kind)
          for kind in (None, 'tiff_lzw', 'tiff_adobe_deflate', 'packbits', 'jpeg')),
        picture(colour[..., 0].astype(np.float32), 'TIFF'),
        picture(colour[..., 0].astype(np.uint16) * 257, 'PNG'),
        picture(colour[..., 0].astype(np.int32), 'TIFF'),
        picture(mask, 'PNG'), picture(mask * np.uint8(255), 'GIF'), palette.getvalue(),
    ]  # fmt: skip


PICTURES = pictures()
LABELS = (np.uint8, np.int16)


@pytest.fixture(scope='module', autouse=True)
def memory_stays_small():
    """Whatever the files say: the process of these tests never takes 2 GB more than it had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 2e9


@many_or_few
@pytest.mark.parametrize('read', [read_image, read_mask])
def test_mutated_pictures(tmp_path, read, files_read, examples):
    path = tmp_path / 'a.png'

    @fuzzed(examples)
    @given(seed=st.sampled_from(PICTURES), changes=edits)
    def check(seed, changes):
        path.write_bytes(mutated(seed, changes))
        files_read.append(1)
        try:
            array = read(path)
        except InputError as error:
            assert str(path) in str(error) and '\n' not in str(error)
        else:
            kinds = (np.uint8, np.float32) if read is read_image else LABELS
            assert array.dtype in kinds
            assert array.shape[2:] == ((3,) if read is read_image else ())

    check()


# ------------------------------------------------------------------ COCO

ODD_VALUES = [
    None, True, -1, 0, 1e308, float('nan'), float('inf'), 10**30, '', 'x', '\x00', '../../x.jpg',
    '/etc/passwd', 'a' * 5000, '\ud800', '~~~~', [], {}, [[]], [[1e9] * 6], [[-1e9, 5] * 3],
    [[1, 2, 3]], {'size': [10**6, 10**6], 'counts': [10**12]}, {'counts': {}},
    {'size': [40, 60], 'counts': '0' * 9}, {'size': [40, 60], 'counts': [2**62] * 4},
]  # fmt: skip


def coco() -> dict:
    mask = np.asfortranarray(square_mask())
    compressed = coco_mask.encode(mask)
    compressed['counts'] = compressed['counts'].decode()
    shapes = [[[15, 10, 30, 10, 30, 20, 15, 20]], compressed,
              {'size': [40, 60], 'counts': [600, 15, 1785]}]  # fmt: skip
    return {
        'images': [{'id': k, 'file_name': f'{k}.jpg', 'height': 40, 'width': 60} for k in range(3)],
        'annotations': [
            {'id': k, 'image_id': k, 'category_id': 1, 'segmentation': shape}
            for k, shape in enumerate(shapes)
        ],
    }


def places(content: object, here: tuple = ()) -> list[tuple]:
    """Where every value of nested lists and dictionaries stands."""
    inside = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [here] * bool(here) + [p for key, part in inside for p in places(part, (*here, key))]


def replaced(content: dict, at: tuple, value: object) -> dict:
    changed = json.loads(json.dumps(content))
    part = changed
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = value
    return changed


odd_coco = st.builds(
    lambda at, value: json.dumps(replaced(coco(), at, value)).encode(),
    st.sampled_from(places(coco())),
    st.one_of(st.sampled_from(ODD_VALUES), st.integers(), st.floats(), st.text(max_size=5)),
)
damaged_coco = st.builds(mutated, st.just(json.dumps(coco()).encode()), edits)


@many_or_few
def test_mutated_coco_files(tmp_path, files_read, examples):
    inside = tmp_path / 'data'
    inside.mkdir()

    @fuzzed(examples)
    @given(content=st.one_of(odd_coco, damaged_coco))
    @example(b'[' * 100_000)
    @example(b'{"images": [{"id": 1, "file_name": "a.jpg", "height": 1e999, "width": 4}]}')
    def check(content):
        (inside / '_annotations.coco.json').write_bytes(content)
        files_read.append(1)
        try:
            samples = list_samples(inside)
        except InputError as error:
            assert '\n' not in str(error)
            return
        assert len({sample.name for sample in samples}) == len(samples)
        for sample in samples:
            assert sample.image_path.resolve().is_relative_to(inside)
            try:
                truth = sample.truth()
            except InputError as error:
                assert '\n' not in str(error)
            else:
                known = truth is None or (truth.dtype in LABELS and truth.size < 1e8)
                assert known

    check()


@pytest.mark.parametrize('seed', range(20))
def test_run_lengths_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random((37, 53)) < rng.random()).astype(np.uint8)
    mask[:, 10 : 10 + seed] = seed % 2
    counts = run_lengths(coco_mask.encode(np.asfortranarray(mask))['counts'])
    found = np.repeat(np.arange(len(counts)) % 2, counts).reshape(mask.shape, order='F')
    assert (found == mask).all()


@pytest.mark.parametrize(
    'shape',
    [
        [[0, 0, 1e8, 1e8, 5, 5]],  # these ended the process
        [[0, 0, float('nan'), 5, 5, 5]],
        {'size': [100000, 100000], 'counts': '05'},
        {'size': [40, 60], 'counts': [5, 5]},  # this gave what happened to lie in memory
        {'size': [40, 60], 'counts': [2**62] * 4 + [2400]},  # 2400 in 64 bits
    ],
)
def test_annotations_that_broke_pycocotools(tmp_path, shape):
    image = {'id': 1, 'file_name': '1.jpg', 'height': 40, 'width': 60}
    write_coco(tmp_path, [{'id': 7, 'image_id': 1, 'segmentation': shape}], [image])
    with pytest.raises(InputError, match='annotation 7'):
        list_samples(tmp_path)[0].truth()


# ------------------------------------------------------------------ scans, lists, label maps


@pytest.fixture(scope='module')
def scans() -> dict[str, list[bytes]]:
    """Small DICOM and NIfTI files, by their endings."""
    pydicom, nibabel = pytest.importorskip('pydicom'), pytest.importorskip('nibabel')
    folder = Path(pydicom.__file__).parent / 'data' / 'test_files'
    names = ('MR_small.dcm', 'CT_small.dcm', 'MR_small_RLE.dcm', 'MR_small_jp2klossless.dcm',
             'MR_small_jpeg_ls_lossless.dcm', 'SC_rgb_small_odd_jpeg.dcm', 'rtdose_1frame.dcm',
             'SC_rgb_small_odd.dcm', 'MR_small_bigendian.dcm', 'image_dfl.dcm')  # fmt: skip
    dicom = [(folder / name).read_bytes() for name in names]
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    images = [
        kind(values.astype(dtype), np.eye(4))
        for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image)
        for dtype in (np.uint8, np.int16, np.float32)
    ]
    plain = [image.to_bytes() for image in images]
    return {'a.dcm': dicom, 'a.nii': plain, 'a.nii.gz': [gzip.compress(one) for one in plain]}


@many_or_few
@pytest.mark.parametrize('name', ['a.dcm', 'a.nii', 'a.nii.gz'])
def test_mutated_scans(tmp_path, scans, name, files_read, examples):
    path = tmp_path / name

    @fuzzed(examples)
    @given(seed=st.sampled_from(scans[name]), changes=edits, inside=st.booleans())
    def check(seed, changes, inside):
        packed = inside and name.endswith('.gz')
        path.write_bytes(
            gzip.compress(mutated(gzip.decompress(seed), changes))
            if packed
            else mutated(seed, changes)
        )
        files_read.append(1)
        for read in (read_image, read_mask):
            try:
                array = read(path)
            except InputError as error:
                assert str(path) in str(error) and '\n' not in str(error)
            else:
                assert array.size < 1e8 and np.isfinite(array).all()

    check()


def test_volumes_and_frames_that_would_take_all_memory(tmp_path):
    pytest.importorskip('nibabel')
    header = bytearray(352)
    header[0:4] = (348).to_bytes(4, 'little')
    header[40:56] = b''.join(n.to_bytes(2, 'little') for n in (3, 20000, 20000, 20000, 1, 1, 1, 1))
    header[70:74] = (64).to_bytes(2, 'little') + (64).to_bytes(2, 'little')
    header[108:112] = np.float32(352).tobytes()
    header[344:348] = b'n+1\0'
    (tmp_path / 'a.nii').write_bytes(bytes(header))
    with pytest.raises(InputError, match=r'a\.nii has the shape'):
        read_image(tmp_path / 'a.nii')
    header[40:56] = b''.join(n.to_bytes(2, 'little') for n in (3, 500, 500, 500, 1, 1, 1, 1))
    (tmp_path / 'a.nii.gz').write_bytes(gzip.compress(bytes(header)))
    with pytest.raises(InputError, match='cut short'):
        read_image(tmp_path / 'a.nii.gz')


def test_a_compressed_frame_may_not_be_larger_than_its_file_says():
    siz = b'\xff\x4f\xff\x51\x00\x2f\x00\x00' + (60000).to_bytes(4, 'big') * 2 + bytes(8)
    assert codestream_size(b'..' + siz) == (60000, 60000)
    sof = b'\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x0b\x08\x10\x00\x20\x00'
    assert codestream_size(sof) == (0x1000, 0x2000)
    assert codestream_size(b'\x00' * 50) is None


LABEL_MAP = b'// remark\n0 = 0, background\n128 = 1, liver\n255,0,0 = 1\n#00ff00 = ignore\n'


@many_or_few
def test_mutated_label_maps(tmp_path, files_read, examples):
    path = tmp_path / 'map.txt'

    @fuzzed(examples)
    @given(content=st.one_of(st.builds(mutated, st.just(LABEL_MAP), edits), st.binary(max_size=99)))
    def check(content):
        path.write_bytes(content)
        files_read.append(1)
        try:
            found = read_label_map(path)
        except InputError as error:
            assert str(path) in str(error) and '\n' not in str(error)
        else:
            assert found.highest < 10_000

    check()


YOLO = b'0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.9 0.2 0.9 0.9 0.2 0.9\n'
NAMES = b'path: ..\ntrain: images/train\nnames:\n  0: liver\n  1: tumour\n'


@many_or_few
def test_mutated_yolo_files(tmp_path, files_read, examples):
    save_image(tmp_path / 'images' / 'a.png', noise_image())
    (tmp_path / 'labels').mkdir()

    @fuzzed(examples)
    @given(
        label=st.builds(mutated, st.just(YOLO), edits),
        names=st.builds(mutated, st.just(NAMES), edits),
    )
    @example(label=YOLO, names=b'names: !!python/object/apply:os.system ["touch ran"]')
    @example(label=YOLO, names=b'a: &a [x]\nnames: [*a]')
    @example(label=YOLO, names=b'[' * 20_000)
    @example(label=b'0 ' + b'0.1 ' * 100_000, names=NAMES)
    def check(label, names):
        (tmp_path / 'labels' / 'a.txt').write_bytes(label)
        (tmp_path / 'data.yaml').write_bytes(names)
        files_read.append(1)
        try:
            (sample,) = list_samples(tmp_path)
            truth = sample.truth()
        except InputError as error:
            assert '\n' not in str(error)
        else:
            assert truth is None or (truth.shape == (40, 60) and truth.dtype in LABELS)
        assert not (tmp_path / 'ran').exists()

    check()


@many_or_few
def test_mutated_voc_and_nnunet_folders(tmp_path, files_read, examples):
    lists = tmp_path / 'voc' / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True)
    palette = Image.fromarray(square_mask(), 'P')
    palette.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    stream = io.BytesIO()
    palette.save(stream, 'PNG')
    save_image(tmp_path / 'voc' / 'JPEGImages' / 'a.jpg', noise_image())
    save_image(tmp_path / 'nn' / 'imagesTs' / 'a_0000.png', noise_image())
    save_image(tmp_path / 'nn' / 'labelsTs' / 'a.png', square_mask())
    (tmp_path / 'voc' / 'SegmentationClass').mkdir()

    @fuzzed(examples)
    @given(changes=edits, which=st.integers(0, 2))
    @example(changes=[(0.0, 'set', b'../../../etc/passwd')], which=1)
    def check(changes, which):
        contents = [stream.getvalue(), b'a\nb\n', b'{"labels": {"background": 0, "liver": 1}}']
        contents[which] = mutated(contents[which], changes)
        (tmp_path / 'voc' / 'SegmentationClass' / 'a.png').write_bytes(contents[0])
        (lists / 'val.txt').write_bytes(contents[1])
        (tmp_path / 'nn' / 'dataset.json').write_bytes(contents[2])
        files_read.append(1)
        for folder in ('voc', 'nn'):
            try:
                samples = list_samples(tmp_path / folder)
                for sample in samples:
                    assert sample.image_path.resolve().is_relative_to(tmp_path)
                    truth = sample.truth()
                    assert truth is None or truth.dtype in LABELS
            except InputError as error:
                assert '\n' not in str(error)

    check()


# ------------------------------------------------------------------ checkpoints


HEAD = 'segmentation_head.0.weight'


def tiny_checkpoint(**settings_of) -> dict:
    torch.manual_seed(0)
    options = {'encoder_depth': 3, 'decoder_channels': (16, 8, 4)}
    model = create_model('unet', 'resnet18', 1, **options)
    state = {k: v[..., :1, :1].clone() if v.ndim == 4 else v for k, v in model.state_dict().items()}
    wanted = {'architecture': 'unet', 'encoder': 'resnet18', 'options': options, **settings_of}
    return {'state_dict': state, 'settings': wanted}


def saved(content: object, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@pytest.fixture(scope='module')
def small_checkpoints() -> dict[str, bytes]:
    """Of each form, small: mutating megabytes of weights would hit nothing else."""
    state = {
        'encoder.conv1.weight': torch.zeros(2, 3, 3, 3),
        'segmentation_head.0.weight': torch.zeros(1, 16, 3, 3),
        'segmentation_head.0.bias': torch.zeros(1),
    }
    content = {'epoch': np.float64(3), 'state_dict': state, 'settings': {'encoder': 'resnet18'}}
    return {
        'zip.pth': saved(content),
        'old.pth': saved(content, _use_new_zipfile_serialization=False),
        'a.safetensors': safetensors.torch.save(state),
    }


def repacked(archive: bytes, changes: list) -> bytes:
    """A zip checkpoint whose pickle was changed, with sums that fit."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, 'w') as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(
                entry, mutated(content, changes) if entry.filename.endswith('.pkl') else content
            )
    return stream.getvalue()


@many_or_few
def test_mutated_checkpoints(tmp_path, small_checkpoints, files_read, examples):
    @fuzzed(examples)
    @given(name=st.sampled_from(sorted(small_checkpoints)), changes=edits, inside=st.booleans())
    def check(name, changes, inside):
        content = small_checkpoints[name]
        content = (
            repacked(content, changes)
            if inside and name == 'zip.pth'
            else mutated(content, changes)
        )
        path = tmp_path / name
        path.write_bytes(content)
        files_read.append(1)
        with pytest.raises(InputError) as error:  # no mutation makes a resnet of it
            load_model(path, 'cpu')
        assert str(path) in str(error.value) and '\n' not in str(error.value)

    check()


class Evil:
    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize('old', [True, False])
def test_no_checkpoint_runs_code(tmp_path, old):
    evil = Evil()
    Evil.mark = tmp_path / 'ran'
    for content in (
        evil,
        {'state_dict': evil},
        {'state_dict': {'a': torch.zeros(1)}, 'settings': evil},
    ):
        path = tmp_path / 'evil.pth'
        path.write_bytes(saved(content, _use_new_zipfile_serialization=not old))
        with pytest.raises(InputError, match='could run code'):
            load_model(path, 'cpu')
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(InputError, match='could run code'):
        load_model(path, 'cpu')
    assert not Evil.mark.exists()
    pickle.loads(pickle.dumps(evil))  # it would have run
    assert Evil.mark.exists()


def test_a_checkpoint_that_grows_when_unpacked_is_refused(tmp_path):
    path = tmp_path / 'bomb.pth'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data/0', bytes(50 << 20))
    with pytest.raises(InputError, match=r'would grow to 50 MiB'):
        load_model(path, 'cpu')


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        ({'encoder': 'hf-hub:evil/model'}, 'no name of an encoder'),
        ({'encoder': 'tu-hf-hub:evil/model'}, 'no name of an encoder'),
        ({'image_size': 10**9}, 'make no sense'),
        ({'image_size': 'large'}, 'make no sense'),
        ({'std': (0.0, 1.0, 1.0)}, 'make no sense'),
        ({'mean': torch.zeros(3)}, 'make no sense'),
        ({'options': {'decoder_channels': (10**9, 8, 4), 'encoder_depth': 3}}, 'cannot build unet'),
        (
            {'options': {'decoder_channels': (30000, 30000, 4), 'encoder_depth': 3}},
            r'does not fit unet with .* decoder_channels=\(30000, 30000, 4\)',
        ),
        ({'options': {'no_such_option': 1}}, 'does not fit unet with .* no_such_option=1'),
        ({'architecture': 'os.system'}, 'unknown architecture'),
    ],
)
def test_hostile_settings_in_a_checkpoint(tmp_path, changed, said):
    path = tmp_path / 'm.pth'
    torch.save(tiny_checkpoint(**changed), path)
    with pytest.raises(InputError, match=said):
        load_model(path, 'cpu')


@pytest.mark.parametrize(
    ('name', 'odd', 'said'),
    [
        (3, torch.zeros(1), 'holds no state dict'),
        (HEAD, torch.zeros(10**6, 1, 1, 1), 'no names of its tensors have encoder'),
        (HEAD, torch.zeros(1).expand(200, 10**5, 3, 3), 'no names of its tensors have encoder'),
        (HEAD, torch.zeros(1, 1, 1, 1, device='meta'), 'holds no state dict'),
        (HEAD, torch.zeros(1, 1).to_sparse(), 'holds no state dict'),
    ],
)
def test_odd_tensors_in_a_checkpoint(tmp_path, name, odd, said):
    torch.save({name: odd}, tmp_path / 'm.pth')
    with pytest.raises(InputError, match=said):
        load_model(tmp_path / 'm.pth', 'cpu')


# ------------------------------------------------------------------ pictures made to do harm


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / 'bomb.png'
    header = picture(np.zeros((1, 1), np.uint8), 'PNG')
    width = (10_000).to_bytes(4, 'big')
    import zlib

    chunk = b'IHDR' + width * 2 + header[24:29]
    path.write_bytes(
        header[:8] + header[8:12] + chunk + zlib.crc32(chunk).to_bytes(4, 'big') + header[33:]
    )
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match=r'more than 89,478,485 pixels'):
            read(path)


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('read', [read_image, read_mask])
def test_pixels_that_are_not_finite_are_named(tmp_path, value, read):
    pixels = np.ones((8, 8), np.float32)
    pixels[3, 4:6] = value
    Image.fromarray(pixels).save(tmp_path / 'a.tif')
    with pytest.raises(InputError, match=r'a\.tif has 2 pixels that are not finite'):
        read(tmp_path / 'a.tif')


# ------------------------------------------------------------------ names


def test_names_that_collide_or_escape(tmp_path):
    names = ['a/x.jpg', 'b/x.jpg', 'A/X.jpg', 'e\u0301.jpg', '\u00e9.jpg', 'summary.csv.jpg',
             'index_2.html.png', 'index.html.jpg', '漢' * 80 + '.jpg', 'CON.jpg', '-rf.jpg',
             '\u202egpj.exe.jpg', 'a\nb.jpg', '~.jpg', '...jpg', '\udcff.jpg']  # fmt: skip
    found = safe_names([tmp_path / name for name in names])
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        assert len(name.encode()) <= 120 and not set(name) & set('/\\\n\u202e~') and name.strip('.')
        folder = tmp_path / 'out' / name  # as the output folder would be, beside the batch's files
        folder.mkdir(parents=True)
        assert folder.parent == tmp_path / 'out' and name not in ('summary.csv', 'index.html')


def test_an_image_that_a_coco_file_lists_twice_is_one(tmp_path):
    images = [{'id': k, 'file_name': '1.jpg', 'height': 40, 'width': 60} for k in (1, 2)]
    squares = [[[0, 0, 9, 0, 9, 9, 0, 9]], [[20, 20, 29, 20, 29, 29, 20, 29]]]
    write_coco(tmp_path, [
        {'id': k, 'image_id': k, 'segmentation': squares[k - 1]} for k in (1, 2)
    ], images)  # fmt: skip
    (sample,) = list_samples(tmp_path)
    truth = sample.truth()
    assert truth[5, 5] and truth[25, 25] and not truth[15, 15]


def test_a_batch_of_odd_names(tmp_path, capsys):
    """Each gets a folder of its own, and nothing is written anywhere else."""
    data = tmp_path / 'data'
    names = ['summary.csv.png', 'index.html.png', 'a b.png', 'a_b.png', 'é.png', '漢' * 70 + '.png']
    for number, name in enumerate(names):
        save_image(data / name, noise_image(seed=number))
    raw = os.fsencode(data) + b'/\xff.png'  # a name that is no UTF-8
    shutil.copy(data / names[0], raw)
    before = set(tmp_path.rglob('*'))
    arguments = [*PLAIN_BATCH, '--data_dir', str(data), '--output_dir', str(tmp_path / 'out'),
                 '--figures', 'png', '--num_samples', 'all']  # fmt: skip
    assert main(arguments) == 0, capsys.readouterr().err
    assert len([path for path in (tmp_path / 'out').iterdir() if path.is_dir()]) == len(names) + 1
    new = set(tmp_path.rglob('*')) - before
    assert all(path.is_relative_to(tmp_path / 'out') for path in new)
    assert (tmp_path / 'out' / 'index.html').is_file()
    json.loads((tmp_path / 'out' / 'summary.json').read_text())


def test_the_notebook_shows_names_as_text():
    """Nothing from a file reaches the notebook as HTML or as code."""
    notebook = json.loads((ROOT / 'integrated_gradients_interactive.ipynb').read_text())
    code = '\n'.join(
        ''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code'
    )
    for word in ('HTML(', 'Markdown(', 'Javascript(', 'eval(', 'exec(', 'get_ipython', 'Latex('):
        assert word not in code
    assert all(not cell.get('outputs') for cell in notebook['cells'] if cell['cell_type'] == 'code')
