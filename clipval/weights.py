"""Which weights, where they are stored, and what is known about them: their transform and activation.

Weights are a tag that open_clip knows (downloaded), a local file or folder, or `random` (seeded weights: enough
for parity and throughput, not for recall).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple, Optional

from clipval import environment, library, transform
from clipval.errors import InputError
from clipval.library import architecture, open_clip_version
from clipval.store import sha256
from clipval.transform import PreprocessSpec

RANDOM = "random"
RANDOM_SEED = 0
# open_clip's order (its factory.py), for folders with more than one; `model.safetensors` may be transformers' own.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
SHARD = re.compile(r"-[0-9]{5}-of-([0-9]{5})\.")  # of transformers: model-00001-of-00002.safetensors
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


class Weights(NamedTuple):
    """Which weights, and what is known about them.

    Attributes:
        asked: as they were given.
        file: the file that holds them; None for seeded weights, and before a tag is downloaded.
        sha256: their identity.
        tag: their weight tag, by name, by hash or from `--pretrained-cfg`; "" if unknown.
        preprocess: the transform that their tag or folder states; None if neither does.
        quick_gelu: trained with QuickGELU (else with GELU); None if neither tag, folder nor spec states it.
    """

    asked: str
    file: Optional[Path]
    sha256: str
    tag: str = ""
    preprocess: Optional[PreprocessSpec] = None
    quick_gelu: Optional[bool] = None


def find_weights(name: str, pretrained: str, says: str = "", activation: str = "") -> Weights:
    """Find the weights, download them if needed, and hash them.

    Args:
        name: architecture, see `clipval.library.architecture`.
        pretrained: weight tag, path of a file or folder, `local-dir:FOLDER`, `hf-hub:ORG/NAME`, or `random`.
        says: tag whose weights these are, as TAG or MODEL/TAG.
        activation: `gelu` or `quick_gelu` from the spec; "" if it states none.

    Raises:
        InputError: there is no such tag or file, the download failed, or the weights were trained with another
            activation than the architecture's.
        UsageError: `says` is not a tag.
    """
    weights = identify(name, pretrained, says, activation)
    if weights.file is not None or weights.asked == RANDOM:
        return weights
    file = _download(architecture(name), weights.tag)
    return weights._replace(file=file, sha256=sha256(file))


def identify(name: str, pretrained: str, says: str = "", activation: str = "") -> Weights:
    """What is known about weights before anything is downloaded; see `find_weights`."""
    arch = architecture(name)
    owner, tag = library.find_tag(arch, says) if says else (arch, "")
    found = Weights(pretrained, None, "", tag)
    folder = _folder(pretrained)
    if pretrained == RANDOM:
        torch = environment.torch_build()
        identity = f"random seed {RANDOM_SEED} torch {torch and torch.version} open_clip {open_clip_version()}"
        found = found._replace(sha256=hashlib.sha256(identity.encode()).hexdigest())
    elif folder is not None or pretrained not in library.tags(arch):
        file = _file_of(arch, pretrained, folder)
        digest = sha256(file)
        found = found._replace(file=file, sha256=digest, tag=tag or library.tag_by_hash(arch, digest))
    else:
        found = found._replace(tag=tag or pretrained)
    if found.tag:
        stated = library.tag_config(owner, found.tag)
        found = found._replace(
            preprocess=transform.of_config(stated, f"open_clip's config of {owner} {found.tag}"),
            quick_gelu=library.tag_is_quick(owner, found.tag),
        )
    elif folder is not None and (folder / library.FOLDER_CONFIG).is_file():
        found = _said_by(folder, found)
    if found.quick_gelu is None and activation:
        found = found._replace(quick_gelu=activation == "quick_gelu")
    _check_activation(arch, found)
    return found


def _said_by(folder: Path, found: Weights) -> Weights:
    stated = library.read_folder(folder)
    quick = bool(stated["model_cfg"].get("quick_gelu", False))
    if not stated["preprocess_cfg"]:
        return found._replace(quick_gelu=quick)
    preprocess = transform.of_config(stated["preprocess_cfg"], f"{folder / library.FOLDER_CONFIG}")
    return found._replace(quick_gelu=quick, preprocess=preprocess)


def given_file(pretrained: str) -> Optional[Path]:
    """The given file of weights, or the one in the given folder; None for a tag.

    Raises:
        InputError: the folder does not exist, or does not hold exactly one file of weights.
    """
    if pretrained.startswith(library.HUB):
        return None
    folder = _folder(pretrained)
    file = Path(pretrained) if folder is None else _file_in(pretrained, folder)
    return file if file.is_file() else None


def _folder(pretrained: str) -> Optional[Path]:
    """The given folder of weights; for a repository's folder in the hub's cache, its snapshot."""
    if library.brings_weights(pretrained):
        return library.folder_of(pretrained)
    folder = Path(pretrained)
    if not folder.is_dir():
        return None
    snapshots = folder / "snapshots"
    if snapshots.is_dir():
        main = folder / "refs" / "main"
        named = sorted(snapshots.iterdir())
        if main.is_file():
            named = [snapshots / main.read_text(encoding="utf-8").strip()]
        if len(named) != 1:
            raise InputError(f"weights {folder}: holds {len(named)} snapshots; give the folder of one of them")
        return named[0]
    return folder


def _file_of(arch: str, pretrained: str, folder: Optional[Path]) -> Path:
    """The given file of weights, or the one in a folder."""
    if folder is not None:
        return _file_in(pretrained, folder)
    path = Path(pretrained)
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"weights {path}: a link to {path.resolve()}, which does not exist; copy a hub's snapshot with cp -rL"
        )
    if not path.is_file():
        known = f"; known tags: {', '.join(library.tags(arch))}" if library.tags(arch) else ""
        near = library.near(pretrained, library.tags(arch))
        known = f"; did you mean {near}?" if near else known
        raise InputError(
            f"weights {pretrained!r} for {arch}: neither a weight tag of this architecture nor a file. "
            f"Give --pretrained a tag (needs the network), a checkpoint file or folder, or 'random'{known}"
        )
    _refuse_shard(path)
    return path


def _refuse_shard(file: Path) -> None:
    shards = SHARD.search(file.name)
    if shards and int(shards[1]) > 1:
        raise InputError(
            f"weights {file}: one of {int(shards[1])} shards, which open_clip does not read; merge them into one file "
            f"as docs/weights.md shows"
        )


def _file_in(pretrained: str, folder: Path) -> Path:
    if pretrained.startswith(library.HUB) and not any((folder / name).is_file() for name in WEIGHT_FILES):
        fetch = library.part("pretrained").download_pretrained_from_hf
        return library.downloaded(f"weights {pretrained}", lambda: fetch(pretrained[len(library.HUB) :]))
    named = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    found = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_ENDINGS)
    lost = [file for file in found if not file.exists()]
    if lost:
        return _file_of("", str(lost[0]), None)
    if not named and found:
        _refuse_shard(found[0])
    if not named and len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise InputError(f"weights {folder}: expected one file of weights in this folder, found {listed}; give one")
    return (named or found)[0]


def _check_activation(arch: str, found: Weights) -> None:
    """The activation must be the one of training: a wrong one costs recall, and parity cannot detect it."""
    computes = library.is_quick(arch)
    if found.quick_gelu is None or found.quick_gelu == computes:
        return
    other = library.twin(arch)
    if found.tag and computes and not other:
        return  # roberta-ViT-B-32: the only architecture, though open_clip's tag does not state QuickGELU
    word = {True: "QuickGELU", False: "GELU"}
    advice = f"give --model-name {other}" if other else f'give a JSON config with "quick_gelu": {not computes}'.lower()
    raise InputError(
        f"weights {found.asked!r} for {arch}: trained with {word[found.quick_gelu]}"
        f"{f' (tag {found.tag})' if found.tag else ''}, the architecture computes {word[computes]}; {advice}"
    )


def _download(arch: str, tag: str) -> Path:
    fetch, stated = library.part("pretrained").download_pretrained, library.tag_config(arch, tag)
    return library.downloaded(f"weights {tag!r} for {arch}", lambda: fetch(stated))
