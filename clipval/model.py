"""An open_clip model with its weights, its image transform and its tokenizer."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from clipval import checkpoint, library
from clipval.errors import BackendUnavailable, ClipvalError, InputError, UsageError, one_line
from clipval.library import CONTEXT, architecture, config, import_open_clip, open_clip_version
from clipval.towers import Tower
from clipval.transform import DEFAULT, PreprocessSpec
from clipval.transform import build as build_transform
from clipval.weights import RANDOM_SEED, Weights

if TYPE_CHECKING:
    import torch


class Model(NamedTuple):
    """A loaded model in eval mode, float32, on the CPU.

    Attributes:
        module: the open_clip CLIP module.
        transform: PIL image -> float32 tensor [3, size, size], open_clip's own evaluation transform.
        tokenize: captions -> int64 tensor [n, context].
        load_seconds: time to load, from the weights' file to ready.
        preprocess: what the transform does, stated or assumed.
    """

    module: Any
    transform: Callable[[Any], Any]
    tokenize: Callable[[List[str]], Any]
    load_seconds: float
    preprocess: PreprocessSpec = DEFAULT


def load(
    name: str,
    weights: Weights,
    contract: Dict[str, Tower],
    preprocess: Optional[PreprocessSpec] = None,
    resize_positions: bool = False,
) -> Model:
    """Build the architecture, load the weights and check the sizes against the contract.

    Args:
        preprocess: the transform; None means the weights' own, else open_clip's default.
        resize_positions: resize position embeddings of another image size or context, as open_clip does.

    Raises:
        InputError: the checkpoint cannot be read, holds no weights, is of another architecture,
            or the model's input or output sizes are not the contract's.
    """
    import_open_clip()
    import torch

    started = time.perf_counter()
    arch = architecture(name)
    torch.manual_seed(RANDOM_SEED)
    module = _create(arch)
    if weights.file is not None:
        _fill(module, weights.file, arch, resize_positions)
    module.eval()
    stated = preprocess or weights.preprocess or DEFAULT
    apply = build_transform(stated, _side(module.visual.image_size))
    model = Model(module, apply, tokenizer(arch), time.perf_counter() - started, stated)
    _check_sizes(model, arch, contract)
    return model


def inputs(name: str, preprocess: PreprocessSpec) -> Model:
    """A model's transform and tokenizer without its weights; `module` is None."""
    side = _side(config(name)["vision_cfg"]["image_size"])
    return Model(None, build_transform(preprocess, side), tokenizer(architecture(name)), 0.0, preprocess)


def _side(size: Any) -> Tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def _create(arch: str) -> Any:
    """The module with seeded weights; a hub's text tower weights are not fetched, since they would be replaced."""
    open_clip = import_open_clip()
    logging.disable(logging.WARNING)  # it warns of random weights, which are loaded later or intended
    try:
        return open_clip.create_model(arch, pretrained_hf=False)
    except Exception as error:  # transformers and the hub's client raise their own
        raise _lacking(arch, config(arch)["text_cfg"].get("hf_model_name"), "config.json", error) from error
    finally:
        logging.disable(logging.NOTSET)


def tokenizer(name: str) -> Callable[[List[str]], Any]:
    """The tokenizer of an architecture, loaded on first use: captions -> int64 tensor [n, context].

    Towers are exported and timed without captions, and a tokenizer may have to be fetched from a hub.

    Raises:
        BackendUnavailable, InputError: on the first use; a package is missing, or its files cannot be fetched.
    """
    return lambda captions: _loaded_tokenizer(architecture(name))(captions)


@lru_cache(maxsize=None)
def _loaded_tokenizer(arch: str) -> Any:
    open_clip = import_open_clip()
    try:
        found = open_clip.get_tokenizer(arch)
    except Exception as error:  # transformers and the hub's client raise their own
        text = config(arch)["text_cfg"]
        source = text.get("hf_tokenizer_name") or text.get("hf_model_name")
        raise _lacking(arch, source, "config.json and the tokenizer's", error) from error
    if hasattr(found, "context_length"):
        return found
    context = config(arch)["text_cfg"].get("context_length", CONTEXT)
    return partial(found, context_length=context)  # 2.20's knows no model, and gives 77 tokens otherwise


def _lacking(arch: str, source: Optional[str], files: str, error: Exception) -> ClipvalError:
    """What a text tower or tokenizer lacks: the package, or `files` of the hub's `source` that cannot be fetched.

    What open_clip does not know of a config is neither: an older one ends with a TypeError for a key of a newer one.
    """
    if source is None or isinstance(error, (TypeError, AttributeError, KeyError)):
        return InputError(
            f"model {arch}: open_clip {open_clip_version()} cannot build it ({one_line(error)}); is its config of "
            f"another version?"
        )
    if importlib.util.find_spec("transformers") is None:
        return BackendUnavailable(
            f"model {arch}: its text tower needs the package transformers, which is not installed: "
            f"pip install 'clipval[transformers]'"
        )
    if isinstance(error, ImportError):
        return BackendUnavailable(
            f"model {arch}: its text tower needs another package ({one_line(error)}): "
            f"pip install 'clipval[transformers]'"
        )
    cause = one_line(error).partition(". ")[0].partition(" Check your internet")[0].rstrip(".")
    return InputError(
        f"model {arch}: files of {source!r} ({files}) are neither in the hub's cache nor can they be fetched "
        f"({cause}). Connect to the hub once, or copy its cache folder (HF_HOME) from another machine"
    )


def encoder(model: Model, tower: Tower) -> torch.nn.Module:
    """One tower as a module with one input and one output: the unit-length embedding.

    The module normalises the embedding, as the recipe's graphs do. Tokens are cast to int32 first: onnxruntime <= 1.19
    cannot run ArgMax on int64, and accelerators run it in fp16, where the ids 49405..49407 round to one value and every
    caption gets the same embedding.

    CoCa of open_clip 2.20 takes 77 tokens and drops the last, unless told otherwise; newer ones take the 76.
    """
    import torch

    takes = inspect.signature(model.module.encode_text).parameters
    whole = {"embed_cls": False} if "embed_cls" in takes else {}

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = model.module

        def forward(self, rows: Any) -> Any:
            if tower.name == "vision":
                return self.clip.encode_image(rows, normalize=True)
            return self.clip.encode_text(rows.to(torch.int32), normalize=True, **whole)

    return Encoder().eval()


def _fill(module: Any, file: Path, arch: str, resize_positions: bool) -> None:
    if checkpoint.form(file) == checkpoint.NPZ:
        _fill_from_npz(module, file, arch)
        return
    state = _in_open_clips_names(module, checkpoint.read(file))
    _check_positions(module, state, file, arch, resize_positions)
    wanted = module.state_dict()
    kept_elsewhere = {name.rpartition(".")[2] for name, _ in module.named_buffers() if name not in wanted}
    state = {  # TorchScript archives hold the attention mask too
        name: value for name, value in state.items() if name in wanted or name.rpartition(".")[2] not in kept_elsewhere
    }
    differ = [
        f"{name} is {list(state[name].shape)}, the architecture has {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    differ += [f"{name} is missing" for name in wanted if name not in state]
    differ += [f"{name} is not the architecture's" for name in state if name not in wanted]
    if differ:
        more = f"; {len(differ) - 1} more differ" if len(differ) > 1 else ""
        raise InputError(
            f"checkpoint {file}: not of architecture {arch} ({differ[0]}{more}). Give --model-name its architecture"
        )
    checkpoint.refuse_values(file, state, wanted)
    module.load_state_dict(state, strict=True)


def _in_open_clips_names(module: Any, state: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """What open_clip itself changes on loading: Apple's names, the text tower's prefix, scalars with an axis."""
    convert = getattr(library.part("convert"), "convert_state_dict", None)
    if convert is not None:  # open_clip before 2.24 has neither it nor Apple's models
        state = convert(module, state)
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = library.part("model").convert_to_custom_text_state_dict(state)
    wanted = module.state_dict()
    state.pop("text.transformer.embeddings.position_ids", None)  # a buffer of transformers before 4.31
    scalars = {name: state[name].reshape(wanted[name].shape) for name in _SCALARS if name in state and name in wanted}
    return {**state, **scalars}


_SCALARS = ("logit_scale", "logit_bias")
_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")


def _check_positions(module: Any, state: Dict[str, torch.Tensor], file: Path, arch: str, resize: bool) -> None:
    """Resize position embeddings of another image size or context if that was asked for, else raise."""
    wanted = module.state_dict()
    other = [
        name
        for name in _POSITIONS
        if name in state and name in wanted and state[name].shape[0] != wanted[name].shape[0]
    ]
    other = [name for name in other if state[name].ndim == 2 and state[name].shape[1] == wanted[name].shape[1]]
    if not other:
        return
    name = other[0]
    if not resize:
        raise InputError(
            f"checkpoint {file}: not of architecture {arch}: {name} has {state[name].shape[0]} positions, the "
            f"architecture {wanted[name].shape[0]}; give --model-name the one of their image size and context, or "
            f"--resize-positions to have open_clip interpolate them"
        )
    open_clip_model = library.part("model")
    open_clip_model.resize_pos_embed(state, module)
    if any(name in _POSITIONS[1:] for name in other):
        if not hasattr(open_clip_model, "resize_text_pos_embed"):
            raise InputError(f"open_clip {open_clip_version()} cannot resize {other[-1]}; pip install a newer one")
        open_clip_model.resize_text_pos_embed(state, module)


def _fill_from_npz(module: Any, file: Path, arch: str) -> None:
    """Weights of Google's big_vision, which open_clip reads into SigLIP's architectures."""
    read = getattr(library.part("convert"), "load_big_vision_weights", None)
    if read is None:
        raise InputError(f"checkpoint {file}: open_clip {open_clip_version()} reads no .npz; install 3.0 or newer")
    try:
        read(module, str(file))
    except Exception as error:  # KeyError, AttributeError, ... for missing names
        raise InputError(
            f"checkpoint {file}: not big_vision's weights of {arch} ({one_line(error)}). open_clip reads .npz into the "
            f"architectures of SigLIP alone"
        ) from error


def _check_sizes(model: Model, arch: str, contract: Dict[str, Tower]) -> None:
    import torch

    vision, text = contract["vision"], contract["text"]
    side = _side(model.module.visual.image_size)
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
    """Tokens as the contract requires them: int64 [n, context].

    Raises:
        UsageError: another shape, which means a tokenizer of another model.
    """
    if tokens.ndim != 2 or tokens.shape[1:] != tower.row_shape:
        raise UsageError(f"tokenizer gave {tokens.shape}, the {tower.name} tower takes (n, {tower.row_shape[0]})")
    return np.ascontiguousarray(tokens, dtype=np.dtype(tower.dtype))


def vocabulary(model: Model) -> int:
    """Size of the text tower's vocabulary: 49408 for CLIP's tokenizer, 32000 for SigLIP's."""
    import torch

    tables = [
        part.num_embeddings
        for name, part in model.module.named_modules()
        if isinstance(part, torch.nn.Embedding) and not name.startswith("visual.")
    ]
    return max(tables)  # transformers' towers also embed positions and token types, which are fewer


def tower_bytes(name: str) -> Dict[str, int]:
    """Bytes of each tower's fp32 weights, without allocating them; empty if the tower's config is on a hub."""
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
