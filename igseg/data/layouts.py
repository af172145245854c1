"""How datasets lie in folders: `LAYOUTS` names the layouts that are recognised from the files.

`--help` and docs/input.md show the table. Each row has a function. It takes the folder of a dataset
and a split ('' for none), and returns the images and masks there, or None where the folder does not
have this layout. The first row that finds images counts.
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

VALIDATION = {'valid', 'val', 'validation'}  # names of one split, in the names of files

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
MOST_LIST_BYTES = 1 << 20  # of CLASSES_FILE
CLASSES_FILE = '_classes.csv'  # beside masks that Roboflow exported; columns: value, name

Truth = MaskFile | AnnotatedImage | YoloLabels


@dataclass(frozen=True)
class Pair:
    """An image and its ground truth."""

    images: tuple[Path, ...]  # one file; or several, where each holds one channel
    truth: Truth | None = None


@dataclass(frozen=True)
class Listing:
    """The images and masks of a dataset."""

    pairs: list[Pair]
    class_names: dict[int, str] = field(default_factory=dict)  # by number
    notes: tuple[str, ...] = ()
    missing: str | None = None  # a note for each image without a mask; None: no image lacks a mask


# --------------------------------------------------------------------------- files


def visible(folder: Path) -> Iterator[Path]:
    """The files and folders in a folder, sorted by name, without hidden ones (`.DS_Store`)."""
    return iter(sorted(path for path in folder.iterdir() if not path.name.startswith('.')))


def _is_image(path: Path) -> bool:
    return suffix_of(path) in IMAGE_SUFFIXES or is_dicom(path)


def images_in(folder: Path) -> list[Path]:
    """The images in a folder."""
    return [path for path in visible(folder) if _is_image(path) and path.is_file()]


def folder_named(parent: Path, names: Sequence[str]) -> Path | None:
    """The folder in `parent` that has the first of these names (lower case). The case of its
    letters does not matter. None where there is none."""
    if not parent.is_dir():
        return None
    folders = {path.name.lower(): path for path in visible(parent) if path.is_dir()}
    return next((folders[name] for name in names if name in folders), None)


@dataclass(frozen=True)
class MaskNaming:
    """How the name of a mask follows from the name of its image. Both are patterns without a file
    ending; * stands for the part that the two names share."""

    mask: str  # for example *_manual1
    image: str = '*'  # for example *_training

    def image_of(self, stem: str) -> str | None:
        """The name of the image that a mask belongs to. stem: the name of the mask; None is
        returned where it does not match the pattern of masks."""
        before, _, after = self.mask.partition('*')
        lower, end = stem.lower(), len(stem) - len(after)
        matches = lower.startswith(before.lower()) and lower.endswith(after.lower())
        return self.image.replace('*', stem[len(before) : end]) if (
            matches and len(before) < end) else None  # fmt: skip


PLAIN_NAMES: tuple[MaskNaming, ...] = ()

ENDINGS = tuple(MaskNaming(f'*{ending}') for ending in MASK_ENDINGS)

PREFIXES = tuple(MaskNaming(f'{prefix}*') for prefix in MASK_PREFIXES)

USUAL_NAMES = (*ENDINGS, *PREFIXES)


def _image_of(stem: str, namings: Sequence[MaskNaming]) -> str | None:
    """The name of the image that a mask belongs to, by the first naming that matches the name of
    the mask; None where none matches."""
    return next(filter(None, (naming.image_of(stem) for naming in namings)), None)


def paired(
    images: Path, masks: Path | None, namings: Sequence[MaskNaming] = USUAL_NAMES
) -> Listing | None:
    """The images of a folder, each with its mask. A mask has the name of its image, or a name that
    `namings` make from it. Images and masks may lie in the same folder. None where there is no
    image."""
    paths, mask_of, left_out = images_in(images), {}, 0
    same = masks is not None and masks == images
    if masks is not None:
        mask_of = _masks_by_name(masks, {stem_of(p) for p in paths}, namings, same)
    if same:
        used = set(mask_of.values())
        orphans = {p for p in paths if p not in used and _named_as_mask(p, namings, used)}
        left_out = len(orphans)
        paths = [path for path in paths if path not in used and path not in orphans]
    if not paths:
        return None
    listing = replace(_with_masks(paths, mask_of), class_names=_names_beside(masks))
    if left_out:
        note = f'{left_out} files in {images} are named like masks, but have no image: left out'
        return replace(listing, notes=(note, *listing.notes))
    return listing


def _named_as_mask(path: Path, namings: Sequence[MaskNaming], masks: set[Path]) -> bool:
    """Whether a file is named like a mask, so that it is no image. Since images may be called
    mask_1 too, a prefix counts only where some of the `masks` of other images have it."""
    if suffix_of(path) not in MASK_SUFFIXES:
        return False
    counted = tuple(
        n for n in namings if n not in PREFIXES or any(n.image_of(stem_of(mask)) for mask in masks)
    )
    return _image_of(stem_of(path), counted) is not None


def _names_beside(masks: Path | None) -> dict[int, str]:
    """The names of classes by their numbers, from the `_classes.csv` in the folder of the masks;
    empty where there is no such file."""
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
    """The mask files of a folder by the name of the image they belong to. stems: the names of the
    images. same: whether the images lie in this folder too."""
    masks: dict[str, Path] = {}
    for path in visible(folder):
        if suffix_of(path) not in MASK_SUFFIXES or not path.is_file():
            continue
        stem = stem_of(path)
        bare = _image_of(stem, namings)
        if bare is not None and (bare in stems or stem not in stems):
            masks[bare] = path
        elif not same:
            masks.setdefault(stem, path)
    return masks


def _with_masks(paths: Sequence[Path], mask_of: dict[str, Path]) -> Listing:
    """Images with their masks, as far as there are masks. The values of all masks are read
    together."""
    used = [mask_of[stem_of(path)] for path in paths if stem_of(path) in mask_of]
    masks = MaskSet(used)
    return Listing([
        Pair((path,), MaskFile(mask_of[stem_of(path)], masks) if stem_of(path) in mask_of else None)
        for path in paths
    ])  # fmt: skip


# --------------------------------------------------------------------------- the layouts


def _folder(root: Path, split: str) -> Path:
    return root / split if split else root


def _coco_listing(source: Path, folders: Sequence[Path]) -> Listing:
    content = read_coco(source, folders)
    return Listing([Pair((path,), truth) for path, truth in content.truths.items()],
                 notes=content.notes)  # fmt: skip


def roboflow(root: Path, split: str) -> Listing | None:
    """`SPLIT/_annotations.coco.json` beside the images"""
    folder = _folder(root, split)
    source = folder / COCO_FILE
    return _coco_listing(source, [folder]) if source.is_file() else None


def _is_coco(path: Path) -> bool:
    """Whether a JSON file looks like a COCO file. Only its beginning and its end are read, since it
    may be large."""
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
    """The COCO files in folders and in the `annotations/` of these folders."""
    places = [place for base in bases for place in (base / 'annotations', base) if place.is_dir()]
    files = [path for place in places for path in visible(place) if path.is_file()]
    json_files = [path for path in dict.fromkeys(files) if path.suffix.lower() == '.json']
    return [path for path in json_files if _is_coco(path)]


def _words(path: Path) -> set[str]:
    """The words in a file's name."""
    return set(re.split(r'[^a-z]+', path.stem.lower()))


def _source_of_split(sources: list[Path], split: str) -> Path | None:
    """The annotation file of a split; None where there is none. The first of these rules that finds
    a file counts: a file in the folder of the split, or in a folder inside it; a file that is named
    after the split; the only file that is named after no split. Raises InputError where several
    files are named after no split."""
    in_folder = [p for p in sources if split in (p.parent.name, p.parent.parent.name)]
    split_names = VALIDATION if split in ('valid', 'val') else {split}
    named = [path for path in sources if _words(path) & split_names]
    for fitting in (in_folder, named):
        if split and fitting:
            return fitting[0]
    general = [path for path in sources if not _words(path) & {*SPLITS, *OTHER_SPLITS}]
    if len(general) > 1:
        raise InputError(
            f'{len(general)} annotation files fit: {", ".join(map(str, general[:5]))} (leave one '
            'of them in the folder, or name the split)'
        )
    return general[0] if general else None


def coco(root: Path, split: str) -> Listing | None:
    """`annotations/*.json` (the file named after the split) or `*.json`, with `images/` or
    `images/SPLIT/`"""
    folder = _folder(root, split)
    source = _source_of_split(_coco_files(dict.fromkeys((folder, root))), split)
    if source is None:
        return None
    folders = [folder / 'images', root / 'images' / split, root / split / 'images', folder,
               root / 'images', root, source.parent]  # fmt: skip
    return _coco_listing(source, [place for place in folders if place.is_dir()])


def _two_folders(
    root: Path, split: str, image_names: Sequence[str], mask_names: Sequence[str]
) -> Iterator[tuple[Path, Path]]:
    """Pairs of folders where images and masks may lie: SPLIT/images/ and SPLIT/masks/, or
    images/SPLIT/ and masks/SPLIT/, by the names in `image_names` and `mask_names`."""
    images = folder_named(_folder(root, split), image_names)
    masks = folder_named(_folder(root, split), mask_names)
    if images is not None and masks is not None:
        yield images, masks
    here = _folder(root, split).resolve()
    if here.name.lower() in image_names and (masks_beside := folder_named(here.parent, mask_names)):
        yield _folder(root, split), masks_beside  # the user named the folder of the images
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
    """The names of images in the list that Pascal VOC keeps for a split; None where there is no
    such list."""
    list_name = {'valid': 'val'}.get(split, split)
    path = base / 'ImageSets' / 'Segmentation' / f'{list_name}.txt'
    try:
        if not list_name or path.stat().st_size > 1 << 26:
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
        listing = paired(images, masks, PLAIN_NAMES)
        names = _voc_list(base, split)
        if listing is None or (names is None and split and base == root):
            continue
        pairs = [
            pair
            for pair in listing.pairs
            if (pair.truth if names is None else stem_of(pair.images[0]) in names)
        ]
        if pairs:
            return _with_masks([pair.images[0] for pair in pairs], {
                stem_of(pair.images[0]): pair.truth.path
                for pair in pairs if isinstance(pair.truth, MaskFile)
            })  # fmt: skip
    return None


def _nnunet_names(path: Path) -> dict[int, str]:
    """The names of classes in nnU-Net's dataset.json, where they stand as {"background": 0, …} or
    {"0": "background", …}; empty where they cannot be read."""
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
    folder_split = re.fullmatch(r'images(\w+)', split)  # the split is a folder's name: imagesTr
    ending = folder_split.group(1) if folder_split else NNUNET_FOLDERS.get(split)
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
        listing = paired(images, masks)
        if listing is not None:
            return listing
    return None


def beside(root: Path, split: str) -> Listing | None:
    """`NAME.jpg` beside `NAME_mask.png` (`_segmentation`, `-mask`, `.mask`, `_label`, `_gt`,
    `_seg`) or `mask_NAME.png`; names of classes in `_classes.csv`"""
    folder = _folder(root, split)
    if not folder.is_dir():
        return None
    listing = paired(folder, folder)
    return listing if listing and any(pair.truth for pair in listing.pairs) else None


def images_alone(root: Path, split: str) -> Listing | None:
    """images alone, in `SPLIT/` or `images/`: no truth"""
    folder = _folder(root, split)
    if not folder.is_dir():
        return None
    images = folder_named(folder, IMAGE_FOLDERS)
    inner = folder_named(images, [split]) if images and split else None
    at_root = folder_named(root, IMAGE_FOLDERS)
    at_root = folder_named(at_root, [split]) if at_root and split else None
    for place in (folder, images, inner, at_root):
        listing = paired(place, place) if place is not None else None
        if listing is not None:
            return listing
    return None


@dataclass(frozen=True)
class Layout:
    """A row of the table of layouts."""

    name: str
    find: Callable[[Path, str], Listing | None]

    @property
    def form(self) -> str:
        """What the layout looks like, in words."""
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
    """The table of layouts as text, for --help."""
    return '; '.join(f'{layout.name}: {layout.form}' for layout in LAYOUTS).replace('`', '')


NAMED_BY_ENDING = (two_folders, beside, images_alone)  # layouts for which --mask_suffix, … count


# --------------------------------------------------------------------------- finding a dataset


def _without_type(name: str) -> str:
    """A name, or the end of a name, without its file ending."""
    kind = suffix_of(Path(f'x{name}'))
    return name[: -len(kind)] if kind in (*MASK_SUFFIXES, *IMAGE_SUFFIXES) else name


@dataclass(frozen=True)
class DataSource:
    """Where a dataset lies, as the user's flags name it."""

    data_dir: Path
    split: str | None = None  # None: the first of SPLITS that exists, else `data_dir` itself
    images_dir: Path | None = None  # instead of a layout
    masks_dir: Path | None = None
    mask_suffix: str | None = None  # what the name of a mask has after the name of its image
    mask_prefix: str | None = None  # what it has before the name of its image
    mask_name: str | None = None  # IMAGE=MASK; the * in both is the part that the names share

    @property
    def naming(self) -> MaskNaming | None:
        """How masks are named, by the flags; None where no flag says so. Raises InputError."""
        has_ends = self.mask_suffix is not None or self.mask_prefix is not None
        if self.mask_name is None:
            suffix = _without_type(self.mask_suffix or '')
            return MaskNaming(f'{self.mask_prefix or ""}*{suffix}') if has_ends else None
        image, _, mask = self.mask_name.partition('=')
        if has_ends:
            raise InputError('--mask_name goes without --mask_suffix and --mask_prefix')
        if image.count('*') != 1 or mask.count('*') != 1:
            raise InputError(
                f'mask_name "{self.mask_name}" is not of the form IMAGE=MASK, with one * in each '
                "for what the names share (for example '*_training=*_manual1')"
            )
        return MaskNaming(_without_type(mask), _without_type(image))

    @property
    def names_folders(self) -> bool:
        """Whether a flag names the folder of the images or of the masks."""
        return self.images_dir is not None or self.masks_dir is not None

    def checked_folder(self) -> Path:
        """The folder of the dataset. Raises InputError where there is none."""
        root = Path(self.data_dir)
        if not root.is_dir():
            raise InputError(f'data folder not found: {root} (give an existing --data_dir)')
        return root

    def names(self) -> dict[str, str]:
        """The flags on the names of masks, with their values."""
        flags = {name: getattr(self, name) for name in ('mask_suffix', 'mask_prefix', 'mask_name')}
        return {name: value for name, value in flags.items() if value is not None}

    def names_at(self, place: DataSource) -> DataSource:
        """Another source, with this source's flags on the names of masks."""
        return replace(place, mask_suffix=self.mask_suffix, mask_prefix=self.mask_prefix,
                       mask_name=self.mask_name)  # fmt: skip

    def flags(self) -> dict[str, str]:
        """The flags that say where masks lie, with their values. A run on a single image finds its
        mask with them."""
        folders = {'images_dir': self.images_dir or self.data_dir, 'masks_dir': self.masks_dir,
                   'data_dir': self.data_dir}  # fmt: skip
        if not self.names_folders:
            return self.names()
        texts = {name: str(value) for name, value in folders.items() if value is not None}
        return texts | self.names()


def _with_note_on_scan(listing: Listing) -> Listing:
    """A listing, with a note where only some of its masks are read to learn what values mean."""
    masks = next((p.truth.masks for p in listing.pairs if isinstance(p.truth, MaskFile)), None)
    if masks is None or len(masks.paths) == len(masks.scanned):
        return listing
    note = (
        f'what the values of the {len(masks.paths):,} masks mean is decided by '
        f'{len(masks.scanned):,} of them, evenly spaced (--label_map says it for certain)'
    )
    return replace(listing, notes=(*listing.notes, note))


def _namings(source: DataSource) -> tuple[MaskNaming, ...]:
    """How masks may be named, by the flags or else by default."""
    naming = source.naming
    return USUAL_NAMES if naming is None else (naming,)


def _namings_text(source: DataSource) -> str:
    """`_namings` in words, for a note."""
    naming = source.naming
    if naming is None:
        return f"the image's name, plain or with {', '.join((*MASK_ENDINGS, *MASK_PREFIXES))}"
    return f'{naming.mask} for {naming.image}, or the same name'


def _folder_of_flag(folder: Path, data_dir: Path, flag: str) -> Path:
    """The folder that a flag names: as it stands, else inside `data_dir`. Raises InputError."""
    for place in (folder, data_dir / folder):
        if place.is_dir():
            return place
    raise InputError(f'{flag} is not there: {folder} (nor {data_dir / folder})')


def _with_note_on_missing(listing: Listing, folder: Path, where: str) -> Listing:
    """A listing, with a note where masks are missing. folder: of the images. where: masks were
    looked for, in words."""
    without = sum(pair.truth is None for pair in listing.pairs)
    if not without:
        return listing
    problem = f'no mask was found for {without} of {len(listing.pairs)} images in {folder}'
    if without == len(listing.pairs):
        problem = f'no masks were found for the images in {folder}, so there is no truth'
    flags = '--masks_dir, --mask_prefix, --mask_suffix and --mask_name'
    note = f'{problem} (looked {where}; {flags} name others)'
    return replace(listing, missing=note)


def _by_flags(source: DataSource) -> Listing:
    """The images and masks in the folders that --images_dir and --masks_dir name. Raises
    InputError."""
    images = _folder_of_flag(source.images_dir or source.data_dir, source.data_dir, 'images_dir')
    masks = images
    if source.masks_dir is not None:
        masks = _folder_of_flag(source.masks_dir, source.data_dir, 'masks_dir')
    listing = paired(images, masks, _namings(source))
    if listing is None:
        raise InputError(f'no images in {images} (looked for {", ".join(IMAGE_SUFFIXES)})')
    return _with_note_on_missing(listing, images, f'in {masks}, {_namings_text(source)}')


def _with_naming(root: Path, split: str, source: DataSource, layout: Layout) -> Listing | None:
    """The images and masks that lie in one of NAMED_BY_ENDING, with masks named by the flags."""
    namings = _namings(source)
    if layout.find is two_folders:
        places = list(_two_folders(root, split, IMAGE_FOLDERS, MASK_FOLDERS))
        return next(filter(None, (paired(a, b, namings) for a, b in places)), None)
    folder = _folder(root, split)
    return paired(folder, folder, namings) if folder.is_dir() else None


def _split_is_there(root: Path, split: str) -> bool:
    """Whether a dataset has a split, in any layout."""
    images = folder_named(root, IMAGE_FOLDERS)
    places = [root / split, *([images / split] if images else [])]
    lists = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    files = [p for p in visible(root / 'annotations') if p.suffix == '.json'] if (
        root / 'annotations').is_dir() else []  # fmt: skip
    named = any(split in re.split(r'[^a-z]+', p.stem.lower()) for p in files)
    return any(place.is_dir() for place in places) or lists.is_file() or named


def _no_images_text(root: Path, source: DataSource) -> str:
    """The error for a dataset in which no layout finds images."""
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


def _places_text(folder: Path, source: DataSource) -> str:
    """Where masks of the images in a folder were looked for, in words."""
    return (
        f'beside them or in {", ".join(MASK_FOLDERS[:5])}, … next to {folder.name}/: '
        f'{_namings_text(source)}'
    )


def _by_looking(source: DataSource) -> Listing:
    """The images and masks in the first layout that finds images. Raises InputError."""
    root = source.checked_folder()
    splits = (*SPLITS, '') if source.split is None else (source.split,)
    for split in splits:
        if source.split is None and split and not _split_is_there(root, split):
            continue
        for layout in LAYOUTS:
            listing = layout.find(root, split)
            if source.naming is not None and layout.find in NAMED_BY_ENDING:
                listing = _with_naming(root, split, source, layout)
            if listing is not None and listing.pairs:
                folder = listing.pairs[0].images[0].parent
                return _with_note_on_missing(listing, folder, _places_text(folder, source))
        if source.split is None and split and (root / split).is_dir():
            break  # a folder with the name of a split but without images is an error
    raise InputError(_no_images_text(root, source))


def find(source: DataSource) -> Listing:
    """The images of a dataset and their ground truths. Raises InputError."""
    try:
        look = _by_flags if source.names_folders else _by_looking
        return _with_note_on_scan(look(source))
    except OSError as error:
        raise InputError(
            f'cannot read {error.filename or source.data_dir}: {error.strerror or error} '
            '(check the permissions and the drive)'
        ) from None
