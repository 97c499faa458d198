"""Read a checkpoint file of any format into tensors by name. No code in a pickle is ever run: see `clipval.pickled`.

The format, or the reason why the file cannot be used, is found from its bytes, not from its name.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

from clipval import pickled
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
QUANTISED = "Give the checkpoint that was quantised; quantised ONNX files are validated with --onnx-prefix"
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size", "n_averaged")  # buffers, not weights


def read(file: Path) -> Dict[str, torch.Tensor]:
    """Tensors of a checkpoint by open_clip name, as stored (any float dtype, on the CPU).

    Raises:
        InputError: the file is something else or truncated; the message says which, and what to do.
    """
    kind = form(file)
    loaded = _read_safetensors(file) if kind == "safetensors" else _read_pickle(file, kind)
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
        raise _refused(
            file,
            "a pickle that torch.save did not write; it is not loaded, since that could run code",
            "Where it was made, save the tensors: torch.save(model.state_dict(), FILE)",
        )
    raise _refused(
        file,
        f"neither a checkpoint of PyTorch nor safetensors, or damaged or cut off (begins with {head[:8]!r})",
        "Give a .pt, .bin or .safetensors file",
    )


def _form_of_zip(file: Path) -> str:
    try:
        names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile as error:
        raise _damaged(file, error) from error
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
        raise _damaged(file, error) from error


def _read_pickle(file: Path, kind: str) -> Any:
    try:
        return pickled.read_legacy(file) if kind == "legacy" else pickled.read(file)
    except Exception as error:  # a damaged pickle or archive fails with any exception
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    return _refused(file, f"damaged or cut off ({one_line(error)})", "Copy or download it again")


def _unwrapped(file: Path, loaded: Any) -> Dict[str, torch.Tensor]:
    """The model's own tensors in a training checkpoint; the moving average if it holds nothing else."""
    for name in (*WRAPPERS, *AVERAGES):
        inner = loaded.get(name) if isinstance(loaded, dict) else None
        if (isinstance(inner, dict) and inner) or (isinstance(inner, pickled.Inert) and inner.state):
            return _unwrapped(file, inner)
    if isinstance(loaded, pickled.Inert) and not isinstance(loaded, dict):
        found: Dict[Any, Any] = dict(pickled.of_module(loaded))
    else:
        found = loaded if isinstance(loaded, dict) else {}
    if any("_packed_params" in str(name) for name in found):
        raise _refused(file, "weights that torch quantised, which open_clip does not take", QUANTISED)
    state = {str(name): value for name, value in found.items() if _is_tensor(value)}  # counters may be beside them
    if not state:
        keys = ", ".join(map(str, list(found)[:SHOWN]))
        held = f"keys {keys}" if keys else getattr(loaded, "origin", "") or type(loaded).__name__
        raise _refused(file, f"holds no state_dict of tensors ({held})", "Save model.state_dict() and give that")
    try:
        return {name: one.tensor() if isinstance(one, pickled.Stored) else one for name, one in state.items()}
    except Exception as error:  # of any class
        raise _damaged(file, error) from error


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, (torch.Tensor, pickled.Stored))


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
            raise _refused(file, f"{name} holds {kind}, as quantised weights do, without its scale", QUANTISED)
        bad = int((~value.float().isfinite()).sum())
        if bad:
            raise _refused(
                file,
                f"{bad} of {value.numel()} numbers of {name} are NaN or infinite",
                "The training diverged, or a conversion to fp16 overflowed; give an earlier checkpoint or fp32 weights",
            )


def _refuse_other_libraries(file: Path, state: Dict[str, Any]) -> None:
    if any(name.startswith(("text_model.encoder.", "vision_model.encoder.")) for name in state):
        kind = "SiglipModel" if "logit_bias" in state else "CLIPModel"
        convert = ", or convert it as docs/weights.md shows" if kind == "CLIPModel" else ""
        raise _refused(
            file,
            f"a checkpoint of transformers' {kind}, whose names and layout are not open_clip's",
            f"Take open_clip_model.safetensors or open_clip_pytorch_model.bin of the same model{convert}",
        )
    if "patch_embed.proj.weight" in state and not any(name.startswith(("visual.", "text")) for name in state):
        raise _refused(file, "timm's vision tower alone, without a text tower", "Give the weights of both towers")
