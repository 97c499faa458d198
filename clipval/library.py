"""open_clip itself: its import, its architectures, and what it knows about its weight tags."""

from __future__ import annotations

import difflib
import gc
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import sys
import warnings
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from clipval import environment
from clipval.errors import BackendUnavailable, InputError, UsageError, disk_full, one_line
from clipval.towers import Tower, towers

HUB, FOLDER = "hf-hub:", "local-dir:"  # open_clip's prefixes of names that come with config and weights
FOLDER_CONFIG = "open_clip_config.json"
CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
TABLE = Path(__file__).parent / "specs" / "models.csv"  # architectures.read()
CONTEXT = 77  # tokens; open_clip's default if a config has no context length
QUICK = "-quickgelu"  # suffix of architectures that use QuickGELU instead of GELU
# QuickGELU tags in open_clip 3.3.0; earlier versions do not state it in the tag's config.
QUICK_TAGS = ("openai", "metaclip_400m", "metaclip_fullcc", "metaclip2_worldwide", "dfn2b", "dfn5b")


def import_open_clip() -> Any:
    """Import open_clip, even if torchvision's compiled operators cannot be loaded.

    PyPI's torchvision is a CUDA build. With a CPU build of torch its library does not load, and
    `import torchvision` ends with "operator torchvision::nms does not exist". open_clip needs only the
    Python transforms, so the missing operators are declared but not defined: using one still fails.

    Raises:
        BackendUnavailable: open_clip or torch is not installed or does not import.
    """
    try:
        with _first_import() if "open_clip" not in sys.modules else nullcontext():
            try:
                import torchvision  # noqa: F401
            except RuntimeError as error:
                if "torchvision::" not in str(error):
                    raise
                _declare_torchvision_operators()
            import open_clip
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"open_clip does not import: {one_line(error)}; pip install -r requirements.txt"
        ) from error
    return open_clip


@contextmanager
def _first_import() -> Iterator[None]:
    """Import with garbage collection off, and exclude what was imported from later collections.

    That is half a million objects that live as long as the process: scanning them takes 1.2 s of 3.8 s from start to
    exit. What open_clip 2.20 is warned of by a newer timm is not for the user of either.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _declare_torchvision_operators() -> None:
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT_ALIVE.append(library)


_KEPT_ALIVE: List[Any] = []  # a Library unregisters its operators when it is garbage-collected


def part(name: str) -> Any:
    """A module of open_clip, e.g. `pretrained`; None if this version has no such module."""
    import_open_clip()
    try:
        return importlib.import_module(f"open_clip.{name}")
    except ModuleNotFoundError:
        return None


def open_clip_version() -> Optional[str]:
    return environment.version("open_clip_torch")  # the module itself has none in 2.20.0


def brings_weights(name: str) -> bool:
    """The model's name stands for a folder or hub repository with config, transform and weights."""
    return name.startswith((HUB, FOLDER))


def architecture(name: str) -> str:
    """The open_clip name of an architecture.

    Args:
        name: of a built-in one, a config file in open_clip's JSON format, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.

    Raises:
        InputError: there is no such architecture, file, folder or repository.
    """
    open_clip = import_open_clip()
    if brings_weights(name):
        return _register(folder_of(name))
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"model config {name}: no such file; give a JSON file in open_clip's format")
        open_clip.add_model_config(path)
        if path.stem not in open_clip.list_models():
            raise InputError(
                f"model config {name}: not an open_clip model config; it needs embed_dim, vision_cfg, text_cfg"
            )
        return path.stem
    if name not in open_clip.list_models():
        if name in _table_names():
            advice = "a newer one has it: pip install --upgrade open_clip_torch"
        else:
            close = near(name, open_clip.list_models())
            advice = f"did you mean {close}?" if close else "see `clipval models`, or give a .json config file"
        raise InputError(f"model {name!r}: no such architecture in open_clip {open_clip_version()}; {advice}")
    return name


def _table_names() -> List[str]:
    with open(TABLE, encoding="utf-8") as stream:
        return [line.partition(",")[0] for line in stream]


def installed_names() -> List[str]:
    """Architectures of the installed open_clip, without importing it, which takes seconds; empty if there is none."""
    spec = importlib.util.find_spec("open_clip")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return [file.stem for folder in folders for file in (Path(folder) / "model_configs").glob("*.json")]


def near(given: str, known: List[str]) -> str:
    """Names like the given one, in another case or with other separators: `ViT-B/32`, `laion2b-s34b`; "" for none."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    same = [name for name in known if plain(name) == plain(given)]
    return " or ".join(same or difflib.get_close_matches(given, known, 2, 0.8))


@lru_cache(maxsize=None)
def _register(folder: Path) -> str:
    """Add a folder's architecture to open_clip's table, which only reads files; returns its name there."""
    config = read_folder(folder)["model_cfg"]
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        config = {**config, "text_cfg": {**config["text_cfg"], "hf_tokenizer_name": str(folder.absolute())}}
    text = json.dumps(config)
    name = f"local-dir-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{name}.json"
        file.write_text(text, encoding="utf-8")
        import_open_clip().add_model_config(file)
    return name


def folder_of(name: str) -> Path:
    """The folder of `local-dir:FOLDER`, or a hub repository's folder in the cache, downloaded if needed.

    Raises:
        InputError: there is no such folder, or it cannot be fetched.
    """
    if name.startswith(FOLDER):
        folder = Path(name[len(FOLDER) :]).expanduser()
        if not folder.is_dir():
            raise InputError(f"model {name}: no such folder")
        return folder
    fetch = part("pretrained").download_pretrained_from_hf
    return downloaded(f"model {name}: its {FOLDER_CONFIG}", lambda: fetch(name[len(HUB) :], FOLDER_CONFIG)).parent


def downloaded(what: str, download: Callable[[], Union[str, Path]]) -> Path:
    """The file that an open_clip download returns, from the hub's cache if it is there.

    Raises:
        InputError: the download failed; the message has the first cause.
    """
    logging.disable(logging.WARNING)  # the hub's client logs every retry
    try:
        return Path(download())
    except Exception as error:  # the hub's client, urllib and requests each raise their own
        first: BaseException = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__ or first
        if isinstance(first, OSError) and disk_full(first):
            raise InputError(f"{what}: disk full; free some space in the hub's cache (HF_HOME)") from error
        raise InputError(
            f"{what}: not in the hub's cache, and the download failed ({one_line(first)}). Connect to the hub, or "
            f"download it on another machine and give its path to --pretrained"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def read_folder(folder: Path) -> Dict[str, Dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` (empty if absent) of a folder's `open_clip_config.json`.

    Raises:
        InputError: it is missing or not in open_clip's format.
    """
    file = folder / FOLDER_CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        config, preprocess = found["model_cfg"], found.get("preprocess_cfg") or {}
        complete = all(key in config for key in CONFIG_KEYS) and isinstance(preprocess, dict)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; an open_clip folder has it next to its weights") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not in open_clip's format ({one_line(error)}); it needs model_cfg") from error
    if not complete:
        raise InputError(f"{file}: model_cfg needs {', '.join(CONFIG_KEYS)}")
    return {"model_cfg": config, "preprocess_cfg": preprocess}


def config(name: str) -> Dict[str, Any]:
    """open_clip's config of an architecture: `embed_dim`, `vision_cfg`, `text_cfg`."""
    found: Dict[str, Any] = import_open_clip().get_model_config(architecture(name))
    return found


def sizes(name: str) -> Dict[str, Tower]:
    """Both towers' contracts with the sizes of an architecture's own config."""
    found = config(name)
    image_size = found["vision_cfg"]["image_size"]
    side = image_size if isinstance(image_size, int) else image_size[0]
    return towers(side, found["text_cfg"].get("context_length", CONTEXT), found["embed_dim"])


def tags(arch: str) -> List[str]:
    """Weight tags of an architecture."""
    found: List[str] = import_open_clip().list_pretrained_tags_by_model(arch)
    return found


def tag_config(arch: str, tag: str) -> Dict[str, Any]:
    """open_clip's entry for a tag: where its weights are, and its transform if that is not the default."""
    return dict(part("pretrained").get_pretrained_cfg(arch, tag))


def find_tag(arch: str, named: str) -> Tuple[str, str]:
    """Architecture and tag of `TAG`, or of `MODEL/TAG` if the tag belongs to another architecture.

    Raises:
        UsageError: there is no such tag.
    """
    model, _, tag = named.rpartition("/")
    owner = model or arch
    if tag not in tags(owner):
        known = ", ".join(tags(owner)) or "none"
        raise UsageError(
            f"--pretrained-cfg {named}: no weight tag of {owner}; known: {known}, or MODEL/TAG for another model"
        )
    return owner, tag


def tag_is_quick(arch: str, tag: str) -> bool:
    """Whether a tag's weights were trained with QuickGELU."""
    found = tag_config(arch, tag)
    if "quick_gelu" in tag_config("ViT-B-32", "openai"):
        return bool(found.get("quick_gelu", False))
    return tag in QUICK_TAGS or "quickgelu" in found.get("url", "")


def tag_by_hash(arch: str, sha256: str) -> str:
    """The tag whose URL has this hash (OpenAI's in full, open_clip releases' first digits); "" if there is none."""
    for tag in tags(arch):
        url = tag_config(arch, tag).get("url", "")
        named = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$", url)
        if named and sha256.startswith(named[1] or named[2]):
            return tag
    return ""


def is_quick(name: str) -> bool:
    """Whether an architecture computes QuickGELU."""
    return bool(config(name).get("quick_gelu", False))


def twin(arch: str) -> str:
    """The architecture that differs only in its activation; "" if open_clip has none."""
    other = arch[: -len(QUICK)] if arch.endswith(QUICK) else arch + QUICK
    return other if other in import_open_clip().list_models() else ""
