"""DICOM and NIfTI files, windows, frames, and maps in the geometry of the image."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import PLAIN_FLAGS, noise_image, save_image, square_mask

import integrated_gradients
from igseg.data.masks import read_mask
from igseg.data.medical import Geometry
from igseg.data.pixels import Reading, load_image
from igseg.data.samples import list_samples, with_slices
from igseg.data.truth import TruthReading
from igseg.errors import InputError
from igseg.results.export import at_size, overlap


def run(folder: Path, *arguments: object) -> tuple[int, list[dict]]:
    """The command line with a tiny network; the statistics of what was explained."""
    status = integrated_gradients.main([
        *PLAIN_FLAGS, '--figures', 'none', '--output_dir', str(folder / 'out'),
        *map(str, arguments),
    ])  # fmt: skip
    files = sorted((folder / 'out').glob('*/*_statistics.json'))
    return status, [json.loads(path.read_text()) for path in files]


def test_without_the_libraries_one_sentence_says_so(tmp_path, monkeypatch):
    for name, module in (('a.dcm', 'pydicom'), ('a.nii.gz', 'nibabel')):
        (tmp_path / name).write_bytes(b'x')
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=r'pip install -r requirements-medical.txt'):
            load_image(tmp_path / name)


# ------------------------------------------------------------------ DICOM


@pytest.fixture
def dicom_files() -> Path:
    pydicom = pytest.importorskip('pydicom')
    return Path(pydicom.__file__).parent / 'data' / 'test_files'


def test_a_ct_is_in_hounsfield_units(dicom_files):
    path = dicom_files / 'CT_small.dcm'
    image = load_image(path, 1, Reading(window='-160:240'))
    import pydicom

    data = pydicom.dcmread(path)
    units = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
    expected = np.clip((units + 160) / 400, 0, 1) * 255
    assert image.pixels[..., 0] == pytest.approx(expected, abs=1e-3)
    assert image.value_range == (-160, 240) and len(np.unique(image.pixels)) > 256
    assert any('nearly one shade' in note for note in load_image(path).notes)  # no window inside
    with pytest.raises(InputError, match='names no window'):
        load_image(path, 1, Reading(window='dicom'))


def test_the_window_of_the_file_is_the_default(dicom_files):
    import pydicom

    path = dicom_files / 'MR_small.dcm'
    data = pydicom.dcmread(path)
    expected = pydicom.pixels.apply_voi_lut(data.pixel_array, data)
    least = -32768 if data.PixelRepresentation else 0  # the lowest 16-bit value after the lookup
    expected = (expected - least) / 65535 * 255
    assert load_image(path, 1).pixels[..., 0] == pytest.approx(expected, abs=0.2)


def changed(dicom_files, tmp_path, **values) -> Path:
    import pydicom

    data = pydicom.dcmread(dicom_files / 'MR_small.dcm')
    for name, value in values.items():
        setattr(data, name, value)
    data.save_as(tmp_path / 'changed.dcm')
    return tmp_path / 'changed.dcm'


def test_monochrome1_is_turned_round(dicom_files, tmp_path):
    path = changed(dicom_files, tmp_path, PhotometricInterpretation='MONOCHROME1')
    plain = load_image(dicom_files / 'MR_small.dcm', 1).pixels
    inverted = load_image(path, 1)
    assert inverted.pixels == pytest.approx(255 - plain, abs=1e-2)
    assert any('MONOCHROME1' in note for note in inverted.notes)


def test_frames_of_a_dicom_file(dicom_files):
    path = dicom_files / 'examples_ybr_color.dcm'
    first, third = load_image(path), load_image(path, 3, Reading(frame=3))
    assert any('30 frames' in note for note in first.notes) and not third.notes
    assert not np.array_equal(first.pixels, third.pixels)
    with pytest.raises(InputError, match='no frame 30'):
        load_image(path, 3, Reading(frame=30))


def test_a_dicom_file_without_an_image(dicom_files):
    with pytest.raises(InputError, match='without an image'):
        load_image(dicom_files / 'rtplan.dcm')


def test_a_dicom_file_on_the_command_line(dicom_files, tmp_path):
    path = dicom_files / 'CT_small.dcm'
    status, (statistics,) = run(
        tmp_path, '--image_path', path, '--window=-160:240', '--export', 'tiff'
    )
    assert status == 0 and statistics['value_range'] == [-160, 240]
    written = tifffile.imread(tmp_path / 'out' / 'CT_small' / 'CT_small_map.tif')
    assert written.shape == (128, 128) and written.dtype == np.float32
    assert written.sum() == pytest.approx(statistics['attribution_sum'], rel=1e-3)
    again = run(tmp_path, '--image_path', path, '--window=-160:241')[1][0]
    assert again['resume_key'] != statistics['resume_key']


# ------------------------------------------------------------------ NIfTI


def volume(path: Path, values: np.ndarray, **header) -> Path:
    nibabel = pytest.importorskip('nibabel')
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-10, 5, 7)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def test_slices_of_a_volume_as_they_are_stored(tmp_path):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) - 60
    path = volume(tmp_path / 'v.nii.gz', values)
    for part, expected in (('0:1', values[1]), ('1:2', values[:, 2]), ('2:5', values[:, :, 5])):
        image = load_image(path, 1, Reading(slice=part, window='-60:59'))
        assert image.pixels[..., 0] == pytest.approx((expected + 60) / 119 * 255, abs=1e-3)
    middle = load_image(path, 1)
    assert middle.geometry.index == 3 and any('the middle one' in note for note in middle.notes)
    with pytest.raises(InputError, match='no slice 6'):
        load_image(path, 1, Reading(slice='2:6'))


def test_every_slice_is_a_sample_with_its_mask(tmp_path):
    values = np.random.default_rng(0).normal(0, 300, (20, 24, 3)).astype(np.float32)
    labels = np.zeros((20, 24, 3), np.uint8)
    labels[2:6, 3:9, 1], labels[2:6, 3:9, 2] = 1, 255
    volume(tmp_path / 'imagesTs' / 'case_0000.nii.gz', values)
    volume(tmp_path / 'labelsTs' / 'case.nii.gz', labels)
    (sample,) = list_samples(tmp_path)
    slices = with_slices([sample])
    assert [part.slice for part in slices] == ['2:0', '2:1', '2:2']
    truths = [part.truth(TruthReading(numbers=2, one_class=True)) for part in slices]
    assert [sorted(np.unique(truth).tolist()) for truth in truths] == [[0], [0, 1], [-1, 0]]
    assert len(with_slices([sample], Reading(slice='0'))) == 20


def test_a_volume_on_the_command_line_and_its_map(tmp_path):
    nibabel = pytest.importorskip('nibabel')
    source = Path(nibabel.__file__).parent / 'tests' / 'data' / 'anatomical.nii'
    path = tmp_path / 'd' / 'anatomical.nii'
    path.parent.mkdir()
    path.write_bytes(source.read_bytes())
    status, results = run(tmp_path, '--mode', 'batch', '--data_dir', path.parent,
                          '--num_samples', 2, '--export', 'nifti')  # fmt: skip
    assert status == 0 and len(results) == 2
    written = nibabel.load(tmp_path / 'out' / 'anatomical_map.nii.gz')
    original = nibabel.load(path)
    assert np.array_equal(written.affine, original.affine) and written.shape == original.shape
    values = written.get_fdata()
    explained = [statistics['placement']['index'] for statistics in results]
    assert [k for k in range(25) if np.isfinite(values[:, :, k]).all()] == explained
    for statistics in results:
        total = values[:, :, statistics['placement']['index']].sum()
        assert total == pytest.approx(statistics['attribution_sum'], rel=1e-3)


def finite_slices(path: Path) -> list[int]:
    """The slices along the last axis that a volume of maps holds."""
    nibabel = pytest.importorskip('nibabel')
    values = nibabel.load(path).get_fdata()
    return [k for k in range(values.shape[2]) if np.isfinite(values[:, :, k]).all()]


def test_the_volumes_of_several_methods_are_separate_files(tmp_path):
    nibabel = pytest.importorskip('nibabel')
    values = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    path = volume(tmp_path / 'd' / 'v.nii.gz', values)
    status, results = run(tmp_path, '--mode', 'batch', '--data_dir', path.parent,
                          '--export', 'nifti', '--method', 'ig', 'gradient')  # fmt: skip
    assert status == 0 and len(results) == 6
    names = {method: tmp_path / 'out' / f'v_map_{method}.nii.gz' for method in ('ig', 'gradient')}
    assert set((tmp_path / 'out').glob('*.nii.gz')) == set(names.values())
    for statistics in results:
        written = nibabel.load(names[statistics['method']]).get_fdata()
        total = written[:, :, statistics['placement']['index']].sum()
        assert total == pytest.approx(statistics['attribution_sum'], rel=1e-3)
        assert finite_slices(names[statistics['method']]) == [0, 1, 2]


def test_volumes_whose_names_differ_by_their_ending_are_separate_files(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
    volume(tmp_path / 'd' / 'v.nii', values[:, :, :2])
    volume(tmp_path / 'd' / 'v.nii.gz', values)
    status, results = run(tmp_path, '--mode', 'batch', '--data_dir', tmp_path / 'd',
                          '--export', 'nifti')  # fmt: skip
    assert status == 0 and len(results) == 5
    written = (tmp_path / 'out').glob('v_*_map.nii.gz')
    assert sorted(finite_slices(path) for path in written) == [[0, 1], [0, 1, 2]]


def test_a_series_of_volumes(tmp_path):
    values = np.stack([np.full((4, 5, 6), 10 * k, np.uint8) for k in range(3)], axis=-1)
    path = volume(tmp_path / 'series.nii', values)
    assert any('3 frames' in note for note in load_image(path, 1).notes)
    assert load_image(path, 1, Reading(frame=2)).pixels.max() == 20


# ------------------------------------------------------------------ windows and frames


def test_twelve_bits_in_sixteen_keep_their_levels_and_get_a_note(tmp_path):
    values = np.linspace(0, 4095, 4096).astype(np.uint16).reshape(64, 64)
    path = save_image(tmp_path / 'a.png', values)
    image = load_image(path, 1)
    assert image.value_range == (0, 65535) and len(np.unique(image.pixels)) == 4096
    assert any('6.2% of the range' in note for note in image.notes)
    windowed = load_image(path, 1, Reading(window='0:4095'))
    assert windowed.pixels[..., 0] == pytest.approx(values / 4095 * 255, abs=1e-3)
    assert not windowed.notes
    automatic = load_image(path, 1, Reading(window='auto'))
    assert automatic.pixels.max() == 255 and automatic.value_range[1] == pytest.approx(4075, abs=2)


def test_colours_of_sixteen_bits_keep_them(tmp_path):
    import cv2

    values = np.random.default_rng(0).integers(0, 65536, (12, 14, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / 'a.png'), values[:, :, ::-1])
    tifffile.imwrite(tmp_path / 'a.tif', values)
    for name in ('a.png', 'a.tif'):
        assert load_image(tmp_path / name).pixels == pytest.approx(values / 257, abs=1e-3), name


def test_hounsfield_units_need_a_window_or_a_normalisation_that_undoes_it(tmp_path):
    values = np.linspace(-1000, 2000, 60, dtype=np.float32).reshape(6, 10)
    tifffile.imwrite(tmp_path / 'a.tif', values)
    with pytest.raises(InputError, match=r'-1000 to 2000.*--window'):
        load_image(tmp_path / 'a.tif', 1)
    assert load_image(tmp_path / 'a.tif', 1, Reading(any_scale=True)).pixels.max() == 255
    pixels = load_image(tmp_path / 'a.tif', 1, Reading(window='-1000:0')).pixels[..., 0]
    assert pixels == pytest.approx(np.clip((values + 1000) / 1000, 0, 1) * 255, abs=1e-3)


def test_pages_of_a_tiff_and_frames_of_an_animation(tmp_path):
    stack = np.random.default_rng(0).integers(0, 256, (5, 20, 30), dtype=np.uint8)
    tifffile.imwrite(tmp_path / 'a.tif', stack)
    assert any('5 frames or pages' in note for note in load_image(tmp_path / 'a.tif', 1).notes)
    page = load_image(tmp_path / 'a.tif', 1, Reading(frame=3))
    assert np.array_equal(page.pixels[..., 0], stack[3]) and not page.notes
    with pytest.raises(InputError, match='no frame 5'):
        load_image(tmp_path / 'a.tif', 1, Reading(frame=5))
    masks = (stack > 128).astype(np.uint8)
    tifffile.imwrite(tmp_path / 'm.tif', masks)
    third = TruthReading(numbers=2, one_class=True, pixels=Reading(frame=3))
    assert np.array_equal(read_mask(tmp_path / 'm.tif', third), masks[3])


# ------------------------------------------------------------------ exported maps


@pytest.mark.parametrize('sizes', [((5, 7), (50, 70)), ((6, 6), (4, 5)), ((3, 8), (7, 3))])
def test_a_map_at_another_size_keeps_its_sum(sizes):
    small, large = sizes
    values = np.random.default_rng(0).normal(size=small)
    resized = at_size(values, large)
    assert resized.shape == large and resized.sum() == pytest.approx(values.sum())
    assert overlap(3, 7).sum(axis=0) == pytest.approx(np.ones(3))
    assert at_size(values, small) == pytest.approx(values)


def test_the_map_of_a_cropped_image_lies_where_it_was(tmp_path):
    image = save_image(tmp_path / 'a.png', noise_image(60, 80))
    save_image(tmp_path / 'a_mask.png', square_mask(60, 80) * np.uint8(255))
    status, (statistics,) = run(tmp_path, '--image_path', image, '--crop', '10,20,30,25',
                                '--export', 'npy', '--target', 'pixel:12,21')  # fmt: skip
    assert status == 0
    written = np.load(tmp_path / 'out' / 'a' / 'a_map.npy')
    assert written.shape == (60, 80) and np.isfinite(written).sum() == 30 * 25
    assert np.isfinite(written[20:45, 10:40]).all()
    assert np.nansum(written) == pytest.approx(statistics['attribution_sum'], rel=1e-3)
    assert statistics['placement'] == {'size': [60, 80], 'origin': [10, 20]}
    status, _ = run(tmp_path, '--image_path', image, '--crop', '60,0,30,10')
    assert status == 2


def test_a_geometry_is_compared_by_value():
    assert Geometry(Path('a'), 0, 1, (2, 3, 4)) == Geometry(Path('a'), 0, 1, (2, 3, 4))
