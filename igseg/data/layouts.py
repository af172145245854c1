"""How datasets lie in folders: `LAYOUTS` names those that are told apart by looking.

The table is printed by `--help` and in docs/input.md. Each row has a function that is given the
dataset's folder and a split ('' for none) and returns what it found there, or None where the folder
does not lie that way. The first row that finds images counts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from igseg.data.annotations import (
    DAMAGED,
    AnnotatedImage,
    YoloLabels,
    read_coco,
    read_json,
    read_names,
    yolo_classes,
)
from igseg.data.masks import MASK_SUFFIXES, MaskFile, MaskSet
from igseg.data.medical import is_dicom
from igseg.data.pixels import IMAGE_SUFFIXES, stem_of, suffix_of
from igseg.errors import InputError

COCO_FILE = '_annotations.coco.json'
SPLITS = ('test', 'valid', 'val')

VALIDATION = {'valid', 'val', 'validation'}  # the same split, in names of files

OTHER_SPLITS = ('train', 'training', 'validation', 'testing', 'dev', 'trainval')
IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'inputs', 'input', 'originals', 'original')
MASK_FOLDERS = ('masks', 'mask', 'labels', 'label', 'gt', 'gts', 'annotations', 'annotation',
                'annots', 'annot', 'ground_truth', 'groundtruth', 'segmentations', 'segmentation',
                'targets', 'target', 'masks_png', 'seg')  # fmt: skip
MASK_ENDINGS = ('_segmentation', '_mask', '-mask', '.mask', '_masks', '_label', '-label', '_labels',
                '_gt', '-gt', '_seg', '_groundtruth')  # fmt: skip
MASK_PREFIXES = ('mask_', 'mask-')
BESIDE_ENDINGS = ('annot', '_annot', '_annotations', '_masks', '_mask', 'masks', 'mask', '_labels',
                  '_label', 'labels', '_gt', '_seg')  # fmt: skip
NNUNET_FOLDERS = {'test': 'Ts', 'train': 'Tr', '': 'Ts'}
MOST_CHANNELS = 64
MOST_LIST_BYTES = 1 << 20  # of a list of names
CLASSES_FILE = '_classes.csv'  # beside the masks of Roboflow's semantic export: value, name

Truth = MaskFile | AnnotatedImage | YoloLabels


@dataclass(frozen=True)
class Pair:
    """An image and its truth. images: several files where each holds one channel."""

    images: tuple[Path, ...]
    truth: Truth | None = None


@dataclass(frozen=True)
class Listing:
    """What a layout holds."""

    pairs: list[Pair]
    class_names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: str | None = None  # a note for the images without a mask; None: all have one


# --------------------------------------------------------------------------- files


def visible(folder: Path) -> Iterator[Path]:
    """The files and folders in a folder that are not hidden (`._x`, `.DS_Store`), by name."""
    return iter(sorted(path for path in folder.iterdir() if not path.name.startswith('.')))


def _is_image(path: Path) -> bool:
    return suffix_of(path) in IMAGE_SUFFIXES or is_dicom(path)


def images_in(folder: Path) -> list[Path]:
    """The images in a folder."""
    return [path for path in visible(folder) if _is_image(path) and path.is_file()]


def folder_named(parent: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that is there, whatever the case of its letters."""
    if not parent.is_dir():
        return None
    there = {path.name.lower(): path for path in visible(parent) if path.is_dir()}
    return next((there[name] for name in names if name in there), None)


@dataclass(frozen=True)
class MaskNaming:
    """How a mask's name is made of its image's, both without file type; * is what they share."""

    mask: str  # for example *_manual1
    image: str = '*'  # for example *_training

    def image_of(self, stem: str) -> str | None:
        """The name of the image that a mask of this name belongs to; None where it is no mask's."""
        before, _, after = self.mask.partition('*')
        lower, rest = stem.lower(), len(stem) - len(after)
        named = lower.startswith(before.lower()) and lower.endswith(after.lower())
        return self.image.replace('*', stem[len(before) : rest]) if (
            named and len(before) < rest) else None  # fmt: skip


PLAIN_NAMES: tuple[MaskNaming, ...] = ()

ENDINGS = tuple(MaskNaming(f'*{ending}') for ending in MASK_ENDINGS)

PREFIXES = tuple(MaskNaming(f'{prefix}*') for prefix in MASK_PREFIXES)

USUAL_NAMES = (*ENDINGS, *PREFIXES)


def _image_of(stem: str, namings: Sequence[MaskNaming]) -> str | None:
    """The name of a mask's image; None where it is plain."""
    return next(filter(None, (naming.image_of(stem) for naming in namings)), None)


def paired(
    images: Path, masks: Path | None, namings: Sequence[MaskNaming] = USUAL_NAMES
) -> Listing | None:
    """The images of a folder, each with the mask of its name, plain or as `namings` say; images and
    masks may lie in the same folder. None where there is no image."""
    paths, mask_of, left_out = images_in(images), {}, 0
    same = masks is not None and masks == images
    if masks is not None:
        mask_of = _masks_by_name(masks, {stem_of(p) for p in paths}, namings, same)
    if same:
        own = set(mask_of.values())
        orphans = {path for path in paths if path not in own and _named_as_mask(path, namings, own)}
        left_out = len(orphans)
        paths = [path for path in paths if path not in own and path not in orphans]
    if not paths:
        return None
    found = replace(_with_masks(paths, mask_of), class_names=_names_beside(masks))
    if left_out:
        note = f'{left_out} files in {images} are named like masks, but have no image: left out'
        return replace(found, notes=(note, *found.notes))
    return found


def _named_as_mask(path: Path, namings: Sequence[MaskNaming], masks: set[Path]) -> bool:
    """Whether a file is named like a mask: then it is not explained as an image. An image may well
    be called mask_1: that counts where masks of other images are named so."""
    if suffix_of(path) not in MASK_SUFFIXES:
        return False
    used = (n for n in namings if n not in PREFIXES or any(n.image_of(stem_of(m)) for m in masks))
    return _image_of(stem_of(path), tuple(used)) is not None


def _names_beside(masks: Path | None) -> dict[int, str]:
    """The names of classes by their numbers in masks, where `_classes.csv` beside them gives
    them."""
    try:
        path = masks / CLASSES_FILE if masks is not None else None
        if path is None or not path.is_file() or path.stat().st_size > MOST_LIST_BYTES:
            return {}
        rows = list(csv.reader(path.read_text(encoding='utf-8-sig').splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    rows = [[cell.strip() for cell in row[:2]] for row in rows if len(row) > 1]
    return {int(value): name for value, name in rows if re.fullmatch(r'\d{1,5}', value) and name}


def _masks_by_name(
    folder: Path, stems: set[str], namings: Sequence[MaskNaming], same: bool
) -> dict[str, Path]:
    """The mask files of a folder by the name of the image they belong to."""
    found: dict[str, Path] = {}
    for path in visible(folder):
        if suffix_of(path) not in MASK_SUFFIXES or not path.is_file():
            continue
        stem = stem_of(path)
        bare = _image_of(stem, namings)
        if bare is not None and (bare in stems or stem not in stems):
            found[bare] = path
        elif not same:
            found.setdefault(stem, path)
    return found


def _with_masks(paths: Sequence[Path], mask_of: dict[str, Path]) -> Listing:
    """Images with those masks that there are, whose values are read together."""
    used = [mask_of[stem_of(path)] for path in paths if stem_of(path) in mask_of]
    masks = MaskSet(used)
    return Listing([
        Pair((path,), MaskFile(mask_of[stem_of(path)], masks) if stem_of(path) in mask_of else None)
        for path in paths
    ])  # fmt: skip


# --------------------------------------------------------------------------- the layouts


def _folder(root: Path, split: str) -> Path:
    return root / split if split else root


def _of_coco(source: Path, folders: Sequence[Path]) -> Listing:
    content = read_coco(source, folders)
    return Listing([Pair((path,), truth) for path, truth in content.truths.items()],
                 notes=content.notes)  # fmt: skip


def roboflow(root: Path, split: str) -> Listing | None:
    """`SPLIT/_annotations.coco.json` beside the images"""
    folder = _folder(root, split)
    source = folder / COCO_FILE
    return _of_coco(source, [folder]) if source.is_file() else None


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


def _coco_files(bases: Iterable[Path]) -> list[Path]:
    """The annotation files of COCO in folders, or in `annotations/` there."""
    places = [place for base in bases for place in (base / 'annotations', base) if place.is_dir()]
    files = [path for place in places for path in visible(place) if path.is_file()]
    found = [path for path in dict.fromkeys(files) if path.suffix.lower() == '.json']
    return [path for path in found if _is_coco(path)]


def _words(path: Path) -> set[str]:
    """The words in a file's name."""
    return set(re.split(r'[^a-z]+', path.stem.lower()))


def _of_split(sources: list[Path], split: str) -> Path | None:
    """The annotation file of a split. The first of these cases counts: the file lies in the folder
    of the split, or in a folder in it; it is named after the split; it is the only one that is
    named after no split at all. Raises InputError where several are named after none."""
    in_folder = [p for p in sources if split in (p.parent.name, p.parent.parent.name)]
    wanted = VALIDATION if split in ('valid', 'val') else {split}
    named = [path for path in sources if _words(path) & wanted]
    for fitting in (in_folder, named):
        if split and fitting:
            return fitting[0]
    free = [path for path in sources if not _words(path) & {*SPLITS, *OTHER_SPLITS}]
    if len(free) > 1:
        raise InputError(
            f'{len(free)} annotation files fit: {", ".join(map(str, free[:5]))} (leave one of them '
            'in the folder, or name the split)'
        )
    return free[0] if free else None


def coco(root: Path, split: str) -> Listing | None:
    """`annotations/*.json` (the one named after the split) or `*.json`, with `images/` or
    `images/SPLIT/`"""
    folder = _folder(root, split)
    source = _of_split(_coco_files(dict.fromkeys((folder, root))), split)
    if source is None:
        return None
    folders = [folder / 'images', root / 'images' / split, root / split / 'images', folder,
               root / 'images', root, source.parent]  # fmt: skip
    return _of_coco(source, [place for place in folders if place.is_dir()])


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
        images, masks = folder_named(images, [split]), folder_named(masks, [split])
        if images is not None and masks is not None:
            yield images, masks


def yolo(root: Path, split: str) -> Listing | None:
    """`images/` with `labels/*.txt` (outlines), or `images/SPLIT/` with `labels/SPLIT/`; names in
    `data.yaml`"""
    for images, labels in _two_folders(root, split, ('images',), ('labels',)):
        texts = {stem_of(path): path for path in visible(labels) if path.suffix.lower() == '.txt'}
        others = [p for p in visible(labels) if suffix_of(p) in MASK_SUFFIXES]
        if not texts or others:
            continue
        paths = images_in(images)
        config = next((folder / 'data.yaml' for folder in dict.fromkeys((_folder(root, split), root,
                       root.parent)) if (folder / 'data.yaml').is_file()), None)  # fmt: skip
        names = read_names(config) if config else {}
        used = yolo_classes([texts[stem_of(p)] for p in paths if stem_of(p) in texts])
        if paths:
            return Listing([Pair((path,), YoloLabels(texts.get(stem_of(path)), path, names, used))
                          for path in paths])  # fmt: skip
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


def voc(root: Path, split: str) -> Listing | None:
    """`JPEGImages/` with `SegmentationClass/`, of the names in `ImageSets/Segmentation/SPLIT.txt`
    where that is there"""
    for base in dict.fromkeys((_folder(root, split), root)):
        images = folder_named(base, ['jpegimages'])
        masks = folder_named(base, ['segmentationclass', 'segmentationclasspng'])
        if images is None or masks is None:
            continue
        found = paired(images, masks, PLAIN_NAMES)
        names = _voc_list(base, split)
        if found is None or (names is None and split and base == root):
            continue
        pairs = [
            pair
            for pair in found.pairs
            if (pair.truth if names is None else stem_of(pair.images[0]) in names)
        ]
        if pairs:
            return _with_masks([pair.images[0] for pair in pairs], {
                stem_of(pair.images[0]): pair.truth.path
                for pair in pairs if isinstance(pair.truth, MaskFile)
            })  # fmt: skip
    return None


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


def nnunet(root: Path, split: str) -> Listing | None:
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
    for path in images_in(images):
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
    return Listing(pairs, _nnunet_names(root / 'dataset.json')) if pairs else None


def camvid(root: Path, split: str) -> Listing | None:
    """`SPLIT/` with `SPLITannot/` (`SPLIT_masks/`, `SPLIT_labels/`, …)"""
    folder = _folder(root, split)
    if not split or not folder.is_dir():
        return None
    masks = folder_named(root, [f'{split}{ending}'.lower() for ending in BESIDE_ENDINGS])
    return None if masks is None else paired(folder, masks)


def two_folders(root: Path, split: str) -> Listing | None:
    """`images/` with `masks/` (`imgs`, `image`, …; `labels`, `gt`, `annotations`, …), in `SPLIT/`
    or with `SPLIT/` in each"""
    for images, masks in _two_folders(root, split, IMAGE_FOLDERS, MASK_FOLDERS):
        found = paired(images, masks)
        if found is not None:
            return found
    return None


def beside(root: Path, split: str) -> Listing | None:
    """`NAME.jpg` beside `NAME_mask.png` (`_segmentation`, `-mask`, `.mask`, `_label`, `_gt`,
    `_seg`) or `mask_NAME.png`; names of classes in `_classes.csv`"""
    folder = _folder(root, split)
    if not folder.is_dir():
        return None
    found = paired(folder, folder)
    return found if found and any(pair.truth for pair in found.pairs) else None


def images_alone(root: Path, split: str) -> Listing | None:
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
    find: Callable[[Path, str], Listing | None]

    @property
    def form(self) -> str:
        """What it looks like."""
        return ' '.join((self.find.__doc__ or '').split())


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


NAMED_BY_ENDING = (two_folders, beside, images_alone)  # where --mask_suffix, … say which mask


# --------------------------------------------------------------------------- finding them


def _without_type(name: str) -> str:
    """A name, or the end of one, without its file type."""
    kind = suffix_of(Path(f'x{name}'))
    return name[: -len(kind)] if kind in (*MASK_SUFFIXES, *IMAGE_SUFFIXES) else name


@dataclass(frozen=True)
class DataSource:
    """Where a dataset lies, as users say it."""

    data_dir: Path
    split: str | None = None  # None: the first of SPLITS that is there, else the folder itself
    images_dir: Path | None = None  # instead of a layout
    masks_dir: Path | None = None
    mask_suffix: str | None = None  # by which a mask's name differs from its image's
    mask_prefix: str | None = None
    mask_name: str | None = None  # IMAGE=MASK, both with a *: what the two names share

    @property
    def naming(self) -> MaskNaming | None:
        """How masks are named, where that was said. Raises InputError."""
        ends = self.mask_suffix is not None or self.mask_prefix is not None
        if self.mask_name is None:
            suffix = _without_type(self.mask_suffix or '')
            return MaskNaming(f'{self.mask_prefix or ""}*{suffix}') if ends else None
        image, _, mask = self.mask_name.partition('=')
        if ends:
            raise InputError('--mask_name goes without --mask_suffix and --mask_prefix')
        if image.count('*') != 1 or mask.count('*') != 1:
            raise InputError(
                f'mask_name "{self.mask_name}" is not of the form IMAGE=MASK, with one * in each '
                "for what the names share (for example '*_training=*_manual1')"
            )
        return MaskNaming(_without_type(mask), _without_type(image))

    @property
    def names_folders(self) -> bool:
        """Whether it was said where images or masks lie."""
        return self.images_dir is not None or self.masks_dir is not None

    def names(self) -> dict[str, str]:
        """What was said of the names of masks, by flag."""
        said = {name: getattr(self, name) for name in ('mask_suffix', 'mask_prefix', 'mask_name')}
        return {name: value for name, value in said.items() if value is not None}

    def names_at(self, place: DataSource) -> DataSource:
        """Another place, with what was said here of the names of masks."""
        return replace(place, mask_suffix=self.mask_suffix, mask_prefix=self.mask_prefix,
                       mask_name=self.mask_name)  # fmt: skip

    def flags(self) -> dict[str, str]:
        """What was said of where the masks lie, by flag: with it one image alone finds its own."""
        folders = {'images_dir': self.images_dir or self.data_dir, 'masks_dir': self.masks_dir,
                   'data_dir': self.data_dir}  # fmt: skip
        if not self.names_folders:
            return self.names()
        given = {name: str(value) for name, value in folders.items() if value is not None}
        return given | self.names()


def _sampled_said(found: Listing) -> Listing:
    """With a note where there are more masks than are looked at to find out what values mean."""
    masks = next((p.truth.masks for p in found.pairs if isinstance(p.truth, MaskFile)), None)
    if masks is None or len(masks.paths) == len(masks.scanned):
        return found
    note = (
        f'what the values of the {len(masks.paths):,} masks mean is decided by '
        f'{len(masks.scanned):,} of them, evenly spaced (--label_map says it for certain)'
    )
    return replace(found, notes=(*found.notes, note))


def _namings(source: DataSource) -> tuple[MaskNaming, ...]:
    """How masks may be named."""
    own = source.naming
    return USUAL_NAMES if own is None else (own,)


def _looked_for(source: DataSource) -> str:
    own = source.naming
    if own is None:
        return f"the image's name, plain or with {', '.join((*MASK_ENDINGS, *MASK_PREFIXES))}"
    return f'{own.mask} for {own.image}, or the same name'


def _given_folder(folder: Path, data_dir: Path, flag: str) -> Path:
    """A folder that was named, also relative to the dataset's."""
    for place in (folder, data_dir / folder):
        if place.is_dir():
            return place
    raise InputError(f'{flag} is not there: {folder} (nor {data_dir / folder})')


def _said(found: Listing, folder: Path, where: str) -> Listing:
    """What was found, with a note where masks are missing."""
    without = sum(pair.truth is None for pair in found.pairs)
    if not without:
        return found
    what = f'no mask was found for {without} of {len(found.pairs)} images in {folder}'
    if without == len(found.pairs):
        what = f'no masks were found for the images in {folder}, so there is no truth'
    flags = '--masks_dir, --mask_prefix, --mask_suffix and --mask_name'
    note = f'{what} (looked {where}; {flags} name others)'
    return replace(found, missing=note)


def _by_flags(source: DataSource) -> Listing:
    """What --images_dir, --masks_dir and --mask_suffix name."""
    images = _given_folder(source.images_dir or source.data_dir, source.data_dir, 'images_dir')
    masks = images
    if source.masks_dir is not None:
        masks = _given_folder(source.masks_dir, source.data_dir, 'masks_dir')
    found = paired(images, masks, _namings(source))
    if found is None:
        raise InputError(f'no images in {images} (looked for {", ".join(IMAGE_SUFFIXES)})')
    return _said(found, images, f'in {masks}, {_looked_for(source)}')


def _with_naming(root: Path, split: str, source: DataSource, layout: Layout) -> Listing | None:
    """A layout of images and masks, where it was said how masks are named."""
    namings = _namings(source)
    if layout.find is two_folders:
        places = list(_two_folders(root, split, IMAGE_FOLDERS, MASK_FOLDERS))
        return next(filter(None, (paired(a, b, namings) for a, b in places)), None)
    folder = _folder(root, split)
    return paired(folder, folder, namings) if folder.is_dir() else None


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


def _where_masks(found: Listing, source: DataSource) -> str:
    folder = found.pairs[0].images[0].parent
    return (
        f'beside them or in {", ".join(MASK_FOLDERS[:5])}, … next to {folder.name}/: '
        f'{_looked_for(source)}'
    )


def _by_looking(source: DataSource) -> Listing:
    root = Path(source.data_dir)
    if not root.is_dir():
        raise InputError(f'data folder not found: {root} (give an existing --data_dir)')
    splits = (*SPLITS, '') if source.split is None else (source.split,)
    for split in splits:
        if source.split is None and split and not _split_is_there(root, split):
            continue
        for layout in LAYOUTS:
            found = layout.find(root, split)
            if source.naming is not None and layout.find in NAMED_BY_ENDING:
                found = _with_naming(root, split, source, layout)
            if found is not None and found.pairs:
                return _said(found, found.pairs[0].images[0].parent, _where_masks(found, source))
        if source.split is None and split and (root / split).is_dir():
            break  # a folder of that name without images is told, not passed over
    raise InputError(_nothing_found(root, source))


def find(source: DataSource) -> Listing:
    """The images of a dataset and what is known of their truth. Raises InputError."""
    try:
        look = _by_flags if source.names_folders else _by_looking
        return _sampled_said(look(source))
    except OSError as error:
        raise InputError(
            f'cannot read {error.filename or source.data_dir}: {error.strerror or error} '
            '(check the permissions and the drive)'
        ) from None
