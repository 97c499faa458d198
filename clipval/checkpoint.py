"""Read a checkpoint file of any format into tensors by name. No code in a pickle is ever run.

The format, or the reason why the file cannot be used, is found from its bytes, not from its name.
"""

from __future__ import annotations

import collections
import json
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

from clipval.errors import InputError, lfs_pointer, one_line

if TYPE_CHECKING:
    import torch

NPZ = "npz"
SHOWN = 3  # objects named in a refusal
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02"  # torch.save before 1.6: a pickled magic number
# First bytes of other formats, and what to do about them.
OTHER_FORMS = (
    (b"<", "a page of HTML or XML, probably of a failed download", "Download the file again"),
    (b"{", "JSON text", "Give the weights file next to it"),
    (b"GGUF", "a GGUF file of llama.cpp or clip.cpp", "Give the PyTorch or safetensors file that it was made from"),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow", "Give a PyTorch or safetensors file"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it and give the file of weights in it"),
    (b"7z\xbc\xaf", "a 7z archive", "Unpack it and give the file of weights in it"),
)
# Keys of a model's tensors in training checkpoints (open_clip: state_dict), and of their moving average.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
# Prefixes of wrappers: DistributedDataParallel, torch.compile, timm's and torch's moving averages.
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.")
SCALE = "logit_scale"
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size", "n_averaged")  # buffers, not weights


def read(file: Path) -> Dict[str, torch.Tensor]:
    """Tensors of a checkpoint by open_clip name, as stored (any float dtype, on the CPU).

    Raises:
        InputError: the file is something else or truncated; the message says which, and what to do.
    """
    kind = form(file)
    if kind == "safetensors":
        loaded: Any = _read_safetensors(file)
    elif kind == "torchscript":
        loaded = _read_torchscript(file)
    else:
        loaded = _read_torch(file, kind)
    state = _of_the_model(file, without_prefixes(_unwrapped(file, loaded)))
    _refuse_other_libraries(file, state)
    return {name: value for name, value in state.items() if name not in OPENAI_SIZES}


def form(file: Path) -> str:
    """`safetensors`, `torch`, `legacy` (torch.save before 1.6), `torchscript` or `npz`.

    Raises:
        InputError: it is none of these.
    """
    with open(file, "rb") as stream:
        head = stream.read(1024)
    size = file.stat().st_size
    if not head:
        raise _refused(file, "damaged or cut off, it is empty", "Copy or download it again")
    if lfs_pointer(file):
        raise InputError(f"checkpoint {file}: {lfs_pointer(file)}")
    if head.startswith(b"PK\x03\x04"):
        return _form_of_zip(file)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < max(size, 1 << 27):
        return "safetensors"
    if LEGACY.startswith(head[: len(LEGACY)]) or head.startswith(LEGACY):
        return "legacy"
    if head[257:262] == b"ustar":
        raise _refused(file, "a tar archive", "Unpack it and give the file of weights in it")
    for start, what, advice in OTHER_FORMS:
        if head.lstrip().startswith(start):
            raise _refused(file, what, advice)
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _pickle_refused(file, _globals(file.read_bytes()))
    raise _refused(
        file,
        f"neither a checkpoint of PyTorch nor safetensors, or damaged or cut off (begins with {head[:8]!r})",
        "Give a .pt, .bin or .safetensors file",
    )


def _form_of_zip(file: Path) -> str:
    try:
        names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile as error:
        raise _refused(file, f"damaged or cut off ({one_line(error)})", "Copy or download it again") from error
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        return "torchscript"
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return NPZ
    raise _refused(
        file, f"a zip archive of {names[0] if names else 'nothing'}", "Unpack it and give the file of weights"
    )


def _refused(file: Path, what: str, advice: str) -> InputError:
    return InputError(f"checkpoint {file}: {what}. {advice}")


def _pickle_refused(file: Path, held: List[str]) -> InputError:
    named = ", ".join(held[:SHOWN]) + (f" and {len(held) - SHOWN} more" if len(held) > SHOWN else "")
    return _refused(
        file,
        f"refused, it holds more than tensors ({named or 'pickled objects'}) and loading it could run code",
        "Where it was made, save the tensors alone: torch.save(model.state_dict(), FILE)",
    )


def _globals(pickled: bytes) -> List[str]:
    """Names that a pickle would import besides those of every torch checkpoint; found without running it."""
    found, strings = [], []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if isinstance(argument, str):
                strings.append(argument)
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
    except ValueError:  # truncated
        pass
    common = ("torch.", "collections.OrderedDict")
    return list(dict.fromkeys(name for name in found if not name.startswith(common)))


def _read_safetensors(file: Path) -> Any:
    from safetensors.torch import load_file

    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
    try:
        table = json.loads(header)
        wanted = 8 + length + max(entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _refused(file, "damaged or cut off, its header cannot be read", "Copy or download it again") from error
    if wanted > size:
        raise _refused(file, f"damaged or cut off, {size} of {wanted} bytes", "Copy or download it again")
    try:
        return load_file(str(file))
    except Exception as error:  # safetensors raises its own
        raise _refused(file, f"damaged or cut off ({one_line(error)})", "Copy or download it again") from error


def _read_torch(file: Path, kind: str) -> Any:
    import torch

    try:
        return torch.load(str(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        held = _globals(_pickled(file)) if kind == "torch" else []
        raise _pickle_refused(file, held or [one_line(error)]) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... on damaged archives
        raise _refused(file, f"damaged or cut off ({one_line(error)})", "Copy or download it again") from error


def _pickled(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


class _Module:
    """Stand-in for a module of a TorchScript archive: its attributes without its code."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Tensors(pickle.Unpickler):
    """Reads only the tensors of a TorchScript archive: nothing but the names listed here is ever called."""

    def __init__(self, archive: zipfile.ZipFile, pickled: Any, folder: str) -> None:
        super().__init__(pickled)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch.jit._pickle":
            return lambda value, *_: value
        if module == "torch" and name in _STORAGES:
            return getattr(torch, _STORAGES[name])
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        import torch

        _, dtype, key, _, _ = pid
        stored = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        return torch.frombuffer(stored, dtype=dtype) if stored else torch.empty(0, dtype=dtype)


_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}


def _tensor(storage: Any, offset: int, shape: Tuple[int, ...], strides: Tuple[int, ...], *_: Any) -> Any:
    return storage.as_strided(shape, strides, offset)


def _read_torchscript(file: Path) -> Dict[str, torch.Tensor]:
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        try:
            with archive.open(name) as pickled:
                root = _Tensors(archive, pickled, name[: -len("data.pkl")]).load()
        except Exception as error:  # a pickle may fail with any exception
            raise _refused(
                file,
                f"a TorchScript archive whose tensors cannot be read without running it ({one_line(error)})",
                "If you trust it: torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE), and give that",
            ) from error
    return dict(_walk(root, ""))


def _walk(module: Any, prefix: str) -> List[Tuple[str, Any]]:
    import torch

    found = []
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, torch.Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Module):
            found += _walk(value, f"{prefix}{name}.")
    return found


def _unwrapped(file: Path, loaded: Any) -> Dict[str, torch.Tensor]:
    """The model's own tensors in a training checkpoint; the moving average if it holds nothing else."""
    for name in (*WRAPPERS, *AVERAGES):
        inner = loaded.get(name) if isinstance(loaded, dict) else None
        if isinstance(inner, dict):
            return _unwrapped(file, inner)
    if not isinstance(loaded, dict) or not loaded or not all(map(_is_tensor, loaded.values())):
        keys = ", ".join(map(str, list(loaded)[:SHOWN])) if isinstance(loaded, dict) else ""
        held = f"keys {keys}" if keys else type(loaded).__name__
        raise _refused(file, f"holds no state_dict of tensors ({held})", "Save model.state_dict() and give that")
    return {str(name): value for name, value in loaded.items()}


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def without_prefixes(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The model's own tensor names, without prefixes that wrappers added to all of them."""
    state = {name.replace("._orig_mod.", "."): value for name, value in state.items()}
    own = [name for name in state if name not in OPENAI_SIZES]
    for prefix in PREFIXES:
        if own and all(name.startswith(prefix) for name in own):
            return without_prefixes(
                {name[len(prefix) :] if name.startswith(prefix) else name: value for name, value in state.items()}
            )
    return state


def _of_the_model(file: Path, state: Dict[str, Any]) -> Dict[str, Any]:
    """A CLIP that is one part of what was trained, as `clip.visual.proj` beside `criterion.weight`: without the others.

    Every form of a CLIP has a `logit_scale`; a prefix that nothing else has is not a model's.
    """
    prefixes = [name[: -len(SCALE)] for name in state if name.endswith(f".{SCALE}")]
    prefixes = [one for one in prefixes if sum(name.startswith(one) for name in state) > 2]
    if SCALE in state or not prefixes:
        return state
    if len(prefixes) > 1:
        raise _refused(
            file, f"holds several models ({', '.join(prefixes)})", "Save the state_dict of the one that is meant"
        )
    inner = {name[len(prefixes[0]) :]: value for name, value in state.items() if name.startswith(prefixes[0])}
    return without_prefixes(inner)


def refuse_values(file: Path, state: Dict[str, Any], wanted: Dict[str, Any]) -> None:
    """Raise where a weight is no number of the model's: whole numbers of a quantised model, NaN or infinity.

    Raises:
        InputError: one is; it names the weight.
    """
    for name, value in state.items():
        if not wanted[name].dtype.is_floating_point:
            continue
        if not value.dtype.is_floating_point:
            kind = str(value.dtype).rpartition(".")[2]
            advice = "Give the checkpoint that was quantised; quantised ONNX files are validated with --onnx-prefix"
            raise _refused(file, f"{name} holds {kind}, as quantised weights do, without its scale", advice)
        bad = int((~value.float().isfinite()).sum())
        if bad:
            raise _refused(
                file,
                f"{bad} of {value.numel()} numbers of {name} are NaN or infinite",
                "The training diverged, or a conversion to fp16 overflowed; give an earlier checkpoint or fp32 weights",
            )


def _refuse_other_libraries(file: Path, state: Dict[str, Any]) -> None:
    if any(name.startswith(("text_model.encoder.", "vision_model.encoder.")) for name in state):
        raise _refused(
            file,
            "a checkpoint of transformers' CLIPModel, whose names and layout are not open_clip's",
            "Take open_clip_model.safetensors or open_clip_pytorch_model.bin of the same repository, or convert it as "
            "docs/weights.md shows",
        )
    if "patch_embed.proj.weight" in state and not any(name.startswith(("visual.", "text")) for name in state):
        raise _refused(file, "timm's vision tower alone, without a text tower", "Give the weights of both towers")
