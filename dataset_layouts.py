"""How datasets lie in folders: `LAYOUTS` names those that are told apart by looking.

The table is printed by `--help` and in REFERENCE.md. Each row has a function that is given the
dataset's folder and a split ('' for none) and returns what it found there, or None where the folder
does not lie that way. The first row that finds images counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coco_annotations import (
    DAMAGED,
    YoloLabels,
    read_coco,
    read_json,
    read_names,
    yolo_classes,
)
from errors import InputError
from image_reading import IMAGE_SUFFIXES, is_dicom, stem_of, suffix_of
from mask_reading import MASK_SUFFIXES, MaskFile, MaskSet

COCO_FILE = '_annotations.coco.json'
SPLITS = ('test', 'valid', 'val')
OTHER_SPLITS = ('train', 'training', 'validation', 'testing', 'dev', 'trainval')
IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'inputs', 'input', 'originals', 'original')
MASK_FOLDERS = ('masks', 'mask', 'labels', 'label', 'gt', 'gts', 'annotations', 'annotation',
                'annots', 'annot', 'ground_truth', 'groundtruth', 'segmentations', 'segmentation',
                'targets', 'target', 'masks_png', 'seg')  # fmt: skip
MASK_ENDINGS = ('_segmentation', '_mask', '-mask', '.mask', '_masks', '_label', '-label', '_labels',
                '_gt', '-gt', '_seg', '_groundtruth')  # fmt: skip
BESIDE_ENDINGS = ('annot', '_annot', '_annotations', '_masks', '_mask', 'masks', 'mask', '_labels',
                  '_label', 'labels', '_gt', '_seg')  # fmt: skip
NNUNET_FOLDERS = {'test': 'Ts', 'train': 'Tr', '': 'Ts'}
MOST_CHANNELS = 64
Truth = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """An image and its truth. images: several files where each holds one channel."""

    images: tuple[Path, ...]
    truth: Truth | None = None


@dataclass(frozen=True)
class Found:
    """What a layout holds."""

    pairs: list[Pair]
    class_names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# --------------------------------------------------------------------------- files


def visible(folder: Path) -> Iterator[Path]:
    """The files and folders in a folder that are not hidden (`._x`, `.DS_Store`), by name."""
    return iter(sorted(path for path in folder.iterdir() if not path.name.startswith('.')))


def image_files(folder: Path) -> list[Path]:
    """The images in a folder."""
    return [path for path in visible(folder) if _is_image(path) and path.is_file()]


def _is_image(path: Path) -> bool:
    return suffix_of(path) in IMAGE_SUFFIXES or is_dicom(path)


def folder_named(parent: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that is there, whatever the case of its letters."""
    if not parent.is_dir():
        return None
    there = {path.name.lower(): path for path in visible(parent) if path.is_dir()}
    return next((there[name] for name in names if name in there), None)


def _without_ending(stem: str, endings: Sequence[str]) -> str | None:
    """A name without the ending of a mask; None where it has none."""
    lower = stem.lower()
    ending = next((e for e in endings if lower.endswith(e.lower()) and len(stem) > len(e)), None)
    return None if ending is None else stem[: -len(ending)]


def paired(images: Path, masks: Path | None, endings: Sequence[str] = MASK_ENDINGS) -> Found | None:
    """The images of a folder, each with the mask of its name, plain or with an ending; images and
    masks may lie in the same folder. None where there is no image."""
    paths, mask_of, left_out = image_files(images), {}, 0
    same = masks is not None and masks == images
    if masks is not None:
        mask_of = _masks_by_name(masks, {stem_of(p) for p in paths}, endings, same)
    if same:
        own = set(mask_of.values())
        orphans = {path for path in paths if path not in own and _ends_like_a_mask(path, endings)}
        left_out = len(orphans)
        paths = [path for path in paths if path not in own and path not in orphans]
    if not paths:
        return None
    found = _with_masks(paths, mask_of)
    if left_out:
        note = f'{left_out} files in {images} end like masks, but have no image: left out'
        return Found(found.pairs, notes=(note, *found.notes))
    return found


def _ends_like_a_mask(path: Path, endings: Sequence[str]) -> bool:
    """Whether a file's name ends like a mask's: then it is not explained as an image."""
    return _without_ending(stem_of(path), endings) is not None and suffix_of(path) in MASK_SUFFIXES


def _masks_by_name(
    folder: Path, stems: set[str], endings: Sequence[str], same: bool
) -> dict[str, Path]:
    """The mask files of a folder by the name of the image they belong to."""
    found: dict[str, Path] = {}
    for path in visible(folder):
        if suffix_of(path) not in MASK_SUFFIXES or not path.is_file():
            continue
        stem = stem_of(path)
        bare = _without_ending(stem, endings)
        if bare is not None and (bare in stems or stem not in stems):
            found[bare] = path
        elif not same:
            found.setdefault(stem, path)
    return found


def _with_masks(paths: Sequence[Path], mask_of: dict[str, Path]) -> Found:
    """Images with those masks that there are, whose values are read together."""
    used = [mask_of[stem_of(path)] for path in paths if stem_of(path) in mask_of]
    masks = MaskSet(used)
    return Found([
        Pair((path,), MaskFile(mask_of[stem_of(path)], masks) if stem_of(path) in mask_of else None)
        for path in paths
    ])  # fmt: skip


# --------------------------------------------------------------------------- the layouts


def _folder(root: Path, split: str) -> Path:
    return root / split if split else root


def roboflow(root: Path, split: str) -> Found | None:
    """`SPLIT/_annotations.coco.json` beside the images"""
    folder = _folder(root, split)
    source = folder / COCO_FILE
    return _of_coco(source, [folder]) if source.is_file() else None


def coco(root: Path, split: str) -> Found | None:
    """`annotations/*.json` (the one named after the split) or `*.json`, with `images/` or
    `images/SPLIT/`"""
    folder = _folder(root, split)
    bases = dict.fromkeys((folder, root))
    sources = [
        path
        for base in bases
        for place in (base / 'annotations', base)
        if place.is_dir()
        for path in visible(place)
        if path.suffix.lower() == '.json' and path.is_file()
    ]
    sources = [path for path in dict.fromkeys(sources) if _is_coco(path)]
    if not sources:
        return None
    source = _of_split(sources, split, folder != root)
    if source is None:
        return None
    folders = [folder / 'images', root / 'images' / split, root / split / 'images', folder,
               root / 'images', root, source.parent]  # fmt: skip
    return _of_coco(source, [place for place in folders if place.is_dir()])


def _is_coco(path: Path) -> bool:
    """Whether a JSON file looks like one of COCO, by its beginning and its end: it may be large."""
    try:
        with path.open('rb') as stream:
            head = stream.read(1 << 20)
            if len(head) == 1 << 20:
                stream.seek(-(1 << 20), 2)
                head += stream.read()
    except OSError:
        return False
    return b'"images"' in head and (b'"annotations"' in head or b'"categories"' in head)


def _of_split(sources: list[Path], split: str, own_folder: bool) -> Path | None:
    """The annotation file of a split: that of its own folder, or named after it, or the only one
    that is named after no split."""
    inside = [p for p in sources if split and split in (p.parent.name, p.parent.parent.name)]
    if own_folder and inside:
        return inside[0]
    words = {path: set(re.split(r'[^a-z]+', path.stem.lower())) for path in sources}
    same = {'valid': {'valid', 'val', 'validation'}, 'val': {'valid', 'val', 'validation'}}
    wanted = same.get(split, {split})
    named = [path for path in sources if split and words[path] & wanted]
    if named:
        return named[0]
    every = {*SPLITS, *OTHER_SPLITS}
    free = [path for path in sources if not words[path] & every]
    if split and not own_folder:
        return None
    if len(free) > 1:
        raise InputError(
            f'{len(free)} annotation files fit: {", ".join(map(str, free[:5]))} (leave one of them '
            'in the folder, or name the split)'
        )
    return free[0] if free else None


def _of_coco(source: Path, folders: Sequence[Path]) -> Found:
    content = read_coco(source, folders)
    return Found([Pair((path,), truth) for path, truth in content.truths.items()],
                 notes=content.notes)  # fmt: skip


def yolo(root: Path, split: str) -> Found | None:
    """`images/` with `labels/*.txt` (outlines), or `images/SPLIT/` with `labels/SPLIT/`; names in
    `data.yaml`"""
    for images, labels in _two_folders(root, split, ('images',), ('labels',)):
        texts = {stem_of(path): path for path in visible(labels) if path.suffix.lower() == '.txt'}
        others = [p for p in visible(labels) if suffix_of(p) in MASK_SUFFIXES]
        if not texts or others:
            continue
        paths = image_files(images)
        config = next((folder / 'data.yaml' for folder in dict.fromkeys((_folder(root, split), root,
                       root.parent)) if (folder / 'data.yaml').is_file()), None)  # fmt: skip
        names = read_names(config) if config else {}
        used = yolo_classes([texts[stem_of(p)] for p in paths if stem_of(p) in texts])
        if paths:
            return Found([Pair((path,), YoloLabels(texts.get(stem_of(path)), path, names, used))
                          for path in paths])  # fmt: skip
    return None


def voc(root: Path, split: str) -> Found | None:
    """`JPEGImages/` with `SegmentationClass/`, of the names in `ImageSets/Segmentation/SPLIT.txt`
    where that is there"""
    for base in dict.fromkeys((_folder(root, split), root)):
        images = folder_named(base, ['jpegimages'])
        masks = folder_named(base, ['segmentationclass', 'segmentationclasspng'])
        if images is None or masks is None:
            continue
        found = paired(images, masks, ())
        names = _voc_list(base, split)
        if found is None or (names is None and split and base == root):
            continue
        pairs = [
            pair
            for pair in found.pairs
            if (pair.truth if names is None else stem_of(pair.images[0]) in names)
        ]
        if pairs:
            used = MaskSet([pair.truth.path for pair in pairs if pair.truth is not None])
            return Found([Pair(p.images, p.truth and MaskFile(p.truth.path, used)) for p in pairs])
    return None


def _voc_list(base: Path, split: str) -> set[str] | None:
    """The names of a split in VOC's list; None where there is none."""
    wanted = {'valid': 'val'}.get(split, split)
    path = base / 'ImageSets' / 'Segmentation' / f'{wanted}.txt'
    try:
        if not wanted or path.stat().st_size > 1 << 26:
            return None
        return set(path.read_text(encoding='utf-8-sig').split())
    except (OSError, UnicodeDecodeError):
        return None


def nnunet(root: Path, split: str) -> Found | None:
    """`imagesTs/CASE_0000.*` (a file for each channel) with `labelsTs/CASE.*`; `imagesTr` and
    `labelsTr` for the split train"""
    given = re.fullmatch(r'images(\w+)', split)
    ending = given.group(1) if given else NNUNET_FOLDERS.get(split)
    if ending is None:
        return None
    if not split and not (root / f'images{ending}').is_dir():
        ending = NNUNET_FOLDERS['train']
    images, labels = root / f'images{ending}', root / f'labels{ending}'
    if not images.is_dir():
        return None
    cases: dict[str, list[Path]] = {}
    for path in image_files(images):
        match = re.fullmatch(r'(.+)_(\d{4})', stem_of(path))
        cases.setdefault(match.group(1) if match else stem_of(path), []).append(path)
    mask_of = {stem_of(p): p for p in visible(labels) if suffix_of(p) in MASK_SUFFIXES} if (
        labels.is_dir()) else {}  # fmt: skip
    masks = MaskSet([mask_of[case] for case in cases if case in mask_of])
    pairs = [
        Pair(
            tuple(paths[:MOST_CHANNELS]),
            MaskFile(mask_of[case], masks) if case in mask_of else None,
        )
        for case, paths in cases.items()
    ]
    return Found(pairs, _nnunet_names(root / 'dataset.json')) if pairs else None


def _nnunet_names(path: Path) -> dict[int, str]:
    """The names of classes in nnU-Net's dataset.json, {"background": 0, …} or {"0": …}."""
    try:
        labels = read_json(path)['labels']
        return {
            int(key if str(key).isdecimal() else value): str(value if str(key).isdecimal() else key)
            for key, value in labels.items()
        }
    except DAMAGED:
        return {}


def camvid(root: Path, split: str) -> Found | None:
    """`SPLIT/` with `SPLITannot/` (`SPLIT_masks/`, `SPLIT_labels/`, …)"""
    folder = _folder(root, split)
    if not split or not folder.is_dir():
        return None
    masks = folder_named(root, [f'{split}{ending}'.lower() for ending in BESIDE_ENDINGS])
    return None if masks is None else paired(folder, masks)


def two_folders(root: Path, split: str) -> Found | None:
    """`images/` with `masks/` (`imgs`, `image`, …; `labels`, `gt`, `annotations`, …), in `SPLIT/`
    or with `SPLIT/` in each"""
    for images, masks in _two_folders(root, split, IMAGE_FOLDERS, MASK_FOLDERS):
        found = paired(images, masks)
        if found is not None:
            return found
    return None


def _two_folders(
    root: Path, split: str, image_names: Sequence[str], mask_names: Sequence[str]
) -> Iterator[tuple[Path, Path]]:
    """Where images and masks may lie: in folders of the split, or of the type first."""
    images = folder_named(_folder(root, split), image_names)
    masks = folder_named(_folder(root, split), mask_names)
    if images is not None and masks is not None:
        yield images, masks
    here = _folder(root, split).resolve()
    if here.name.lower() in image_names and (own := folder_named(here.parent, mask_names)):
        yield _folder(root, split), own  # the folder of the images itself was named
    images, masks = folder_named(root, image_names), folder_named(root, mask_names)
    if split and images is not None and masks is not None:
        both = folder_named(images, [split]), folder_named(masks, [split])
        if both[0] is not None and both[1] is not None:
            yield both


def beside(root: Path, split: str) -> Found | None:
    """`NAME.jpg` beside `NAME_mask.png` (`_segmentation`, `-mask`, `.mask`, `_label`, `_gt`,
    `_seg`)"""
    folder = _folder(root, split)
    if not folder.is_dir():
        return None
    found = paired(folder, folder)
    return found if found and any(pair.truth for pair in found.pairs) else None


def images_alone(root: Path, split: str) -> Found | None:
    """images alone, in `SPLIT/` or `images/`: no truth"""
    folder = _folder(root, split)
    if not folder.is_dir():
        return None
    own = folder_named(folder, IMAGE_FOLDERS)
    inner = folder_named(own, [split]) if own and split else None
    typed = folder_named(root, IMAGE_FOLDERS)
    typed = folder_named(typed, [split]) if typed and split else None
    for place in (folder, own, inner, typed):
        found = paired(place, place) if place is not None else None
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Layout:
    """A row of the table of layouts."""

    name: str
    find: Callable[[Path, str], Found | None]

    @property
    def form(self) -> str:
        """What it looks like."""
        return ' '.join(self.find.__doc__.split())


LAYOUTS: tuple[Layout, ...] = (
    Layout('Roboflow COCO', roboflow),
    Layout('COCO of CVAT, Label Studio, …', coco),
    Layout('YOLO segmentation', yolo),
    Layout('Pascal VOC', voc),
    Layout('nnU-Net', nnunet),
    Layout('CamVid', camvid),
    Layout('two folders', two_folders),
    Layout('side by side', beside),
    Layout('images alone', images_alone),
)


def layouts_text() -> str:
    """The table, for --help."""
    return '; '.join(f'{layout.name}: {layout.form}' for layout in LAYOUTS).replace('`', '')


NAMED_BY_ENDING = (two_folders, beside, images_alone)  # where --mask_suffix says which mask


# --------------------------------------------------------------------------- finding them


@dataclass(frozen=True)
class DataSource:
    """Where a dataset lies, as users say it."""

    data_dir: Path
    split: str | None = None  # None: the first of SPLITS that is there, else the folder itself
    images_dir: Path | None = None  # instead of a layout
    masks_dir: Path | None = None
    mask_suffix: str | None = None  # by which a mask's name differs from its image's


def find(source: DataSource) -> Found:
    """The images of a dataset and what is known of their truth. Raises InputError."""
    try:
        if source.images_dir is not None or source.masks_dir is not None:
            return _by_flags(source)
        return _by_looking(source)
    except OSError as error:
        raise InputError(
            f'cannot read {error.filename or source.data_dir}: {error.strerror or error} '
            '(check the permissions and the drive)'
        ) from None


def _by_flags(source: DataSource) -> Found:
    """What --images_dir, --masks_dir and --mask_suffix name."""
    images = _given_folder(source.images_dir or source.data_dir, source.data_dir, 'images_dir')
    masks = images
    if source.masks_dir is not None:
        masks = _given_folder(source.masks_dir, source.data_dir, 'masks_dir')
    found = paired(images, masks, _endings(source))
    if found is None:
        raise InputError(f'no images in {images} (looked for {", ".join(IMAGE_SUFFIXES)})')
    return _said(found, images, f'in {masks}, {_looked_for(source)}')


def _given_folder(folder: Path, data_dir: Path, flag: str) -> Path:
    """A folder that was named, also relative to the dataset's."""
    for place in (folder, data_dir / folder):
        if place.is_dir():
            return place
    raise InputError(f'{flag} is not there: {folder} (nor {data_dir / folder})')


def _endings(source: DataSource) -> tuple[str, ...]:
    """The endings of masks' names; of one that was given with its file type, without that."""
    if source.mask_suffix is None:
        return MASK_ENDINGS
    ending = source.mask_suffix
    kind = suffix_of(Path(f'x{ending}'))
    return (ending[: -len(kind)] if kind in MASK_SUFFIXES else ending,)


def _looked_for(source: DataSource) -> str:
    return f"the image's name, plain or with {', '.join(_endings(source))}"


def _by_looking(source: DataSource) -> Found:
    root = Path(source.data_dir)
    if not root.is_dir():
        raise InputError(f'data folder not found: {root} (give an existing --data_dir)')
    splits = (*SPLITS, '') if source.split is None else (source.split,)
    for split in splits:
        if source.split is None and split and not _split_is_there(root, split):
            continue
        for layout in LAYOUTS:
            found = layout.find(root, split)
            if source.mask_suffix is not None and layout.find in NAMED_BY_ENDING:
                found = _with_suffix(root, split, source, layout)
            if found is not None and found.pairs:
                return _said(found, found.pairs[0].images[0].parent, _where_masks(found, source))
        if source.split is None and split and (root / split).is_dir():
            break  # a folder of that name without images is told, not passed over
    raise InputError(_nothing_found(root, source))


def _with_suffix(root: Path, split: str, source: DataSource, layout: Layout) -> Found | None:
    """A layout of images and masks, where the masks' ending was given."""
    endings = _endings(source)
    if layout.find is two_folders:
        places = list(_two_folders(root, split, IMAGE_FOLDERS, MASK_FOLDERS))
        return next(filter(None, (paired(a, b, endings) for a, b in places)), None)
    folder = _folder(root, split)
    return paired(folder, folder, endings) if folder.is_dir() else None


def _split_is_there(root: Path, split: str) -> bool:
    """Whether a dataset has a split, in any layout."""
    typed = folder_named(root, IMAGE_FOLDERS)
    places = [root / split, *([typed / split] if typed else [])]
    lists = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    files = [p for p in visible(root / 'annotations') if p.suffix == '.json'] if (
        root / 'annotations').is_dir() else []  # fmt: skip
    named = any(split in re.split(r'[^a-z]+', p.stem.lower()) for p in files)
    return any(place.is_dir() for place in places) or lists.is_file() or named


def _nothing_found(root: Path, source: DataSource) -> str:
    folders = ', '.join(path.name for path in visible(root) if path.is_dir()) or 'none'
    split = source.split
    if split is not None and not (root / split).is_dir():
        return f'no split "{split}" in {root} (folders there: {folders})'
    place = root / split if split else root
    if split is None:
        place = next((root / s for s in SPLITS if (root / s).is_dir()), root)
    return (
        f'no images in {place} (looked for {", ".join(IMAGE_SUFFIXES)}; folders in {root}: '
        f'{folders}; layouts that are read stand in --help, and --images_dir and --masks_dir name '
        'any other)'
    )


def _where_masks(found: Found, source: DataSource) -> str:
    folder = found.pairs[0].images[0].parent
    return (
        f'beside them or in {", ".join(MASK_FOLDERS[:5])}, … next to {folder.name}/: '
        f'{_looked_for(source)}'
    )


def _said(found: Found, folder: Path, where: str) -> Found:
    """What was found, with a note where masks are missing."""
    without = sum(pair.truth is None for pair in found.pairs)
    if not without:
        return found
    what = f'no mask was found for {without} of {len(found.pairs)} images in {folder}'
    if without == len(found.pairs):
        what = f'no masks were found for the images in {folder}, so there is no truth'
    note = f'{what} (looked {where}; --masks_dir and --mask_suffix name others)'
    return Found(found.pairs, found.class_names, (*found.notes, note))
