"""Load an open_clip model, its image transform and its tokenizer. The only module that imports open_clip.

Weights are a tag that open_clip knows (downloaded), a local file, or `random` (seeded weights: enough
for parity and throughput, not for recall).
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import logging
import pickle
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval import environment
from clipval.errors import BackendUnavailable, ClipvalError, InputError, UsageError, one_line
from clipval.store import sha256
from clipval.towers import Tower, towers

RANDOM = "random"
RANDOM_SEED = 0
CONTEXT = 77  # tokens; what open_clip takes where a config names no context length


class Weights(NamedTuple):
    """Which weights: what was asked for, the file that holds them (None: seeded), and their identity."""

    asked: str
    file: Optional[Path]
    sha256: str


class Model(NamedTuple):
    """A loaded model in eval mode, float32, on the CPU.

    Attributes:
        module: the open_clip CLIP module.
        transform: PIL image -> float32 tensor [3, size, size], open_clip's own evaluation transform.
        tokenize: captions -> int64 tensor [n, context].
        load_seconds: what loading took, from the weights' file to ready.
    """

    module: Any
    transform: Callable[[Any], Any]
    tokenize: Callable[[List[str]], Any]
    load_seconds: float


def import_open_clip() -> Any:
    """Import open_clip, also beside a torchvision whose compiled operators cannot load.

    The registry's torchvision is a CUDA build. Beside a CPU build of torch its library does not load, and
    `import torchvision` ends with "operator torchvision::nms does not exist". open_clip needs only the
    Python transforms, so the missing operators are declared, never defined: using one still fails.

    Raises:
        BackendUnavailable: open_clip or torch is not installed or does not import.
    """
    try:
        with _garbage_left() if "open_clip" not in sys.modules else nullcontext():
            try:
                import torchvision  # noqa: F401
            except RuntimeError as error:
                if "torchvision::" not in str(error):
                    raise
                _declare_torchvision_operators()
            import open_clip
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"open_clip does not import: {one_line(error)}. Install it: pip install -r requirements.txt"
        ) from error
    return open_clip


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Import without collecting garbage, and leave what was imported out of later collections.

    They are half a million objects that live as long as the process: of 3.8 s from start to exit, looking through them
    takes 1.2 s.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
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


_KEPT_ALIVE: List[Any] = []  # a Library withdraws its operators when it is collected


def architecture(name: str) -> str:
    """The open_clip name of a built-in architecture, or of a config file in open_clip's JSON format.

    Raises:
        InputError: there is neither such an architecture nor such a file.
    """
    open_clip = import_open_clip()
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
        raise InputError(
            f"model {name!r}: open_clip {_open_clip_version()} knows no such architecture; "
            f"see open_clip.list_models(), or give a .json config file"
        )
    return name


def _open_clip_version() -> Optional[str]:
    return environment.version("open_clip_torch")  # the module itself has none in 2.20.0


def find_weights(name: str, pretrained: str) -> Weights:
    """Find the weights, downloading a tag's where needed, and hash them.

    Args:
        name: architecture or config file as in `architecture`.
        pretrained: weight tag, path of a file, or `random`.

    Raises:
        InputError: there is no such tag or file, or the download failed.
    """
    open_clip = import_open_clip()
    arch = architecture(name)
    if pretrained == RANDOM:
        import torch

        identity = f"random seed {RANDOM_SEED} torch {torch.__version__} open_clip {_open_clip_version()}"
        return Weights(RANDOM, None, hashlib.sha256(identity.encode()).hexdigest())
    path = Path(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if pretrained in tags:
        path = _download(open_clip, arch, pretrained)
    if not path.is_file():
        known = f"; known tags: {', '.join(tags)}" if tags else ""
        raise InputError(
            f"weights {pretrained!r} for {arch}: neither a weight tag of this architecture nor a file. "
            f"Give --pretrained a tag (needs the network), a checkpoint file, or 'random'{known}"
        )
    return Weights(pretrained, path, sha256(path))


def load(name: str, weights: Weights, contract: Dict[str, Tower]) -> Model:
    """Build the architecture, fill in the weights and check its sizes against the contract.

    Raises:
        InputError: the checkpoint cannot be read, holds more than tensors, is of another architecture,
            or the model's input or output sizes are not the contract's.
    """
    open_clip = import_open_clip()
    import torch

    started = time.perf_counter()
    arch = architecture(name)
    by_tag = weights.file is not None and weights.asked in open_clip.list_pretrained_tags_by_model(arch)
    torch.manual_seed(RANDOM_SEED)
    module, transform = _create(open_clip, arch, weights.asked if by_tag else None)
    if weights.file is not None and not by_tag:
        _fill(module, weights.file, arch)
    module.eval()
    model = Model(module, transform, tokenizer(arch), time.perf_counter() - started)
    _check_sizes(model, arch, contract)
    return model


def _create(open_clip: Any, arch: str, tag: Optional[str]) -> Tuple[Any, Any]:
    """The module with a tag's weights, or with seeded ones, and its transform.

    With a tag, open_clip also applies the tag's own mean, std, interpolation and activation. Without one, the weights
    of a text tower from a hub are not fetched either: they would be replaced.
    """
    logging.disable(logging.WARNING)  # it warns of random weights, which are filled in later or were asked for
    try:
        module, _, transform = open_clip.create_model_and_transforms(
            arch, pretrained=tag, **({} if tag else {"pretrained_hf": False})
        )
    except Exception as error:  # transformers and the hub's client raise their own
        raise _lacking(open_clip, arch, error) from error
    finally:
        logging.disable(logging.NOTSET)
    return module, transform


def tokenizer(name: str) -> Callable[[List[str]], Any]:
    """The tokenizer of an architecture, loaded when it is first used: captions -> int64 tensor [n, context].

    Towers are exported and timed without captions, and a tokenizer may have to be fetched from a hub.

    Raises:
        BackendUnavailable, InputError: on the first use; a package is missing, or its files cannot be fetched.
    """
    return lambda captions: _loaded_tokenizer(name)(captions)


@lru_cache(maxsize=None)
def _loaded_tokenizer(name: str) -> Any:
    open_clip, arch = import_open_clip(), architecture(name)
    try:
        return open_clip.get_tokenizer(arch)
    except Exception as error:  # transformers and the hub's client raise their own
        raise _lacking(open_clip, arch, error) from error


def _lacking(open_clip: Any, arch: str, error: Exception) -> ClipvalError:
    """What a text tower or tokenizer from a hub lacks: the package, or files that cannot be fetched."""
    text = (open_clip.get_model_config(arch) or {}).get("text_cfg", {})
    source = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if source is None:
        return InputError(f"model {arch}: open_clip cannot build it ({one_line(error)})")
    if importlib.util.find_spec("transformers") is None:
        return BackendUnavailable(
            f"model {arch}: its text tower needs the package transformers, which is not installed: "
            f"pip install 'clipval[transformers]'"
        )
    return InputError(
        f"model {arch}: the files of {source!r} are neither in the hub's cache nor can they be fetched "
        f"({one_line(error)}). Connect to the hub once, or copy its cache folder (HF_HOME) from another machine"
    )


def encoder(model: Model, tower: Tower) -> Any:
    """One tower as a module of one input and one output: the unit-length embedding.

    The embedding is normalised inside, as in the recipe's graphs. Tokens are cast to int32 first: ArgMax on
    int64 is what onnxruntime <= 1.19 cannot run and what accelerators run in fp16, where the ids 49405..49407
    round to one value and every caption gets the same embedding.
    """
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = model.module

        def forward(self, rows: Any) -> Any:
            if tower.name == "vision":
                return self.clip.encode_image(rows, normalize=True)
            return self.clip.encode_text(rows.to(torch.int32), normalize=True)

    return Encoder().eval()


def _download(open_clip: Any, arch: str, tag: str) -> Path:
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    try:
        return Path(download_pretrained(get_pretrained_cfg(arch, tag)))
    except Exception as error:  # the hub client, urllib and requests each raise their own
        raise InputError(
            f"weights {tag!r} for {arch}: download failed ({one_line(error)}). Connect to the hub, or fetch the "
            f"checkpoint on another machine and give its path to --pretrained"
        ) from error


def _fill(module: Any, file: Path, arch: str) -> None:
    state = _read_state(file)
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"checkpoint {file}: not of architecture {arch} ({one_line(error)}). Give --model-name its architecture"
        ) from error


def _read_state(file: Path) -> Dict[str, Any]:
    import torch

    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(str(file))
        else:
            loaded = torch.load(str(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {file}: refused, it holds more than tensors and loading it could run code "
            f"({one_line(error)}). Save a plain state_dict and give that"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... on damaged archives
        raise InputError(f"checkpoint {file}: cannot be read, damaged or cut off ({one_line(error)})") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"checkpoint {file}: holds no state_dict of tensors")
    prefix = "module."
    return {key[len(prefix) :] if key.startswith(prefix) else key: value for key, value in state.items()}


def _check_sizes(model: Model, arch: str, contract: Dict[str, Tower]) -> None:
    import torch

    vision, text = contract["vision"], contract["text"]
    size: Any = model.module.visual.image_size
    side: Tuple[int, ...] = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    context = config(arch)["text_cfg"].get("context_length", CONTEXT)
    if side != vision.row_shape[1:]:
        raise InputError(f"model {arch}: takes images of {side}, the spec says {vision.row_shape[1:]}; set image_size")
    if (context,) != text.row_shape:
        raise InputError(f"model {arch}: takes {context} tokens, the spec says {text.row_shape[0]}; set context_length")
    with torch.no_grad():
        width = model.module.encode_text(torch.ones((1, context), dtype=torch.int64)).shape[1]
    if width != text.width:
        raise InputError(f"model {arch}: embeddings are {width} wide, the spec says {text.width}; set embed_dim")


def check_tokens(tokens: np.ndarray, tower: Tower) -> np.ndarray:
    """Tokens as the contract wants them: int64 [n, context].

    Raises:
        UsageError: another shape, which means that the tokenizer is not the model's.
    """
    if tokens.ndim != 2 or tokens.shape[1:] != tower.row_shape:
        raise UsageError(f"tokenizer gave {tokens.shape}, the {tower.name} tower takes (n, {tower.row_shape[0]})")
    return np.ascontiguousarray(tokens, dtype=np.dtype(tower.dtype))


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


def vocabulary(model: Model) -> int:
    """How many token ids the text tower has an embedding for: 49408 for CLIP's tokenizer, 32000 for SigLIP's."""
    import torch

    tables = [
        part.num_embeddings
        for name, part in model.module.named_modules()
        if isinstance(part, torch.nn.Embedding) and not name.startswith("visual.")
    ]
    return max(tables)  # towers of transformers also embed positions and token types, which are fewer


def tower_bytes(name: str) -> Dict[str, int]:
    """Bytes of each tower's fp32 weights, found without memory for them; empty where a hub holds the tower's config."""
    import torch

    open_clip = import_open_clip()
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            module = open_clip.create_model(architecture(name), device="meta", pretrained_hf=False)
    except Exception:  # transformers is missing, or the config is not in the hub's cache
        return {}
    finally:
        logging.disable(logging.NOTSET)
    whole, vision = (sum(one.numel() for one in part.parameters()) for part in (module, module.visual))
    return {"vision": 4 * vision, "text": 4 * (whole - vision)}


def transformed(model: Model, picture: np.ndarray) -> np.ndarray:
    """A picture through the model's transform: uint8 [side, side, 3], RGB -> float32 [3, side, side]."""
    from PIL import Image

    found: np.ndarray = model.transform(Image.fromarray(picture)).numpy()
    return found
