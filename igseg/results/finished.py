"""Which images are finished: the key by which results are recognised, and reading results.

An image is not computed again as long as everything that decides the content of its files is the
same: settings, the content of image, truth, baseline file and network, the versions of the
libraries, and the number `RESULTS`, which is raised whenever this toolkit computes other figures
than before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType

import cv2
import numpy as np

import igseg
from igseg.checks.verdict import Thresholds, verdict_of
from igseg.program import PROJECT
from igseg.results.files import (
    image_files,
    in_file_names,
    json_writer,
    read_statistics,
    write_files,
)
from igseg.statistics import COMPOUND, NUMBER, STATISTICS, TEXT, TRUTH, WHOLE, Statistics

# Settings that do not change what is computed, and the origin of the network, which has a digest.
NOT_DECISIVE = (
    'step_batch', 'device', 'thresholds', 'model_path', 'model_sha256', 'architecture',
    'encoder', 'classes', 'weights_key', 'model_options',
)  # fmt: skip


# Libraries whose versions decide the figures.
LIBRARIES = (
    'torch', 'segmentation-models-pytorch', 'timm', 'numpy', 'opencv-python-headless',
    'scikit-image', 'scipy',
)  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of everything that decides the figures: this toolkit, its results, Python, the
    libraries."""
    toolkit = {PROJECT: igseg.__version__, 'results': str(igseg.RESULTS)}
    python = {'python': '.'.join(map(str, sys.version_info[:3]))}
    installed = {'opencv': cv2.__version__}  # several packages install it
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            installed[library] = version(library)
    return toolkit | python | installed


def _deciding_versions() -> dict[str, str]:
    """The versions that must be the same for a finished image. Of this toolkit, only the number of
    its results counts: a new version that changes no figure computes nothing again."""
    return {name: value for name, value in versions().items() if name != PROJECT}


def resume_key(record: dict, image: np.ndarray, truth: np.ndarray | None) -> str:
    """A hash of everything that decides the content of an image's files.

    record: the settings that took effect, with the identity of the network. image: (H, W, C), uint8
    or float32. truth: (H, W), uint8, or int16 where pixels do not count.
    """
    decisive = {name: value for name, value in record.items() if name not in NOT_DECISIVE}
    if 'baseline_sha256' in decisive:  # the content of the file counts, not its path
        del decisive['baseline']
    if 'references_sha256' in decisive:
        decisive.pop('reference_dir', None)
    if 'label_map_sha256' in decisive:
        del decisive['label_map']
    digest = hashlib.sha256(json.dumps([decisive, _deciding_versions()], sort_keys=True).encode())
    for array in (image, truth):
        digest.update(repr(None if array is None else array.shape).encode())
        digest.update(b'' if array is None else array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class FolderNaming:
    """How the folders of an image are named: after the image; also after the target, or the method,
    where there are several of them."""

    name: str  # of the image
    several_targets: bool
    methods: tuple[str, ...]

    def folder(self, target: str, method: str) -> str:
        """The folder of an explanation."""
        parts = [self.name]
        parts += [in_file_names(target)] if self.several_targets else []
        parts += [in_file_names(method)] if len(self.methods) > 1 else []
        return '_'.join(parts)


# The types of statistics that are no plain figures; other code depends on them.
TYPES: dict[str, type | tuple[type, ...]] = {
    'targets': list, 'methods': list, 'settings': dict, 'verdict': list, 'notes': list,
    'versions': dict, 'trend': dict, 'evaluation': (dict, NoneType),
    'channel_shares': (list, NoneType),
}  # fmt: skip


def _is_whole(statistics: Statistics) -> bool:
    """Whether the content of a statistics file has all keys and the right types. A damaged file
    counts as missing."""
    kinds: dict[str, type | tuple[type, ...]] = {
        TEXT: str, WHOLE: int, NUMBER: (int, float), TRUTH: bool,
    }  # fmt: skip
    return STATISTICS.keys() <= statistics.keys() and all(
        isinstance(statistics[key], TYPES.get(key, object))
        if row.kind == COMPOUND
        else statistics[key] is None or isinstance(statistics[key], kinds[row.kind])
        for key, row in STATISTICS.items()
    ) and bool(statistics['targets'])  # fmt: skip


def _read_finished(folder: Path, key: str) -> Statistics | None:
    """The statistics in a folder, if they belong to this key and the maps exist too; else None."""
    try:
        statistics = read_statistics(folder)
        same = statistics['resume_key'] == key and statistics['folder'] == folder.name
    except (OSError, ValueError, KeyError, TypeError):
        return None
    finished = same and _is_whole(statistics) and image_files(folder)['arrays'].is_file()
    return statistics if finished else None


def finished_statistics(
    output_dir: Path, naming: FolderNaming, possible: Sequence[str], key: str
) -> list[Statistics] | None:
    """The statistics of an image that was finished with this key, for each target and method; None
    where the image must be computed.

    possible: the targets that may have been explained first; the first target that was not empty
    was.
    """
    for folder in dict.fromkeys(naming.folder(target, naming.methods[0]) for target in possible):
        first = _read_finished(output_dir / folder, key)
        if first is None or first['target'] != first['targets'][0]:
            continue
        folders = [naming.folder(t, m) for t in first['targets'] for m in naming.methods]
        every = [_read_finished(output_dir / folder, key) for folder in folders]
        complete = [statistics for statistics in every if statistics is not None]
        return complete if len(complete) == len(every) else None
    return None


def judged_again(statistics: Statistics, limits: Thresholds, output_dir: Path) -> Statistics:
    """The statistics of a finished image with its verdict under the thresholds `limits`. If they
    changed, the statistics file is written again. Raises OutputError."""
    changed: Statistics = {'verdict': verdict_of(statistics, limits)}
    changed['settings'] = {**statistics['settings'], 'thresholds': asdict(limits)}
    if any(statistics[key] != value for key, value in changed.items()):
        statistics = {**statistics, **changed}
        path = image_files(output_dir / statistics['folder'])['statistics']
        write_files({path: json_writer(statistics)})
    return statistics
