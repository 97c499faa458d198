"""Checkpoints in the forms that people have: read for their tensors, or named as what they are."""

import argparse
import gzip
import json
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clipval import checkpoint, library, model, weights
from clipval.errors import InputError
from clipval.towers import towers

from .conftest import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.fixture
def state(seeded):
    return dict(seeded.module.state_dict())


def save(file, held, **more):
    import torch

    torch.save(held, file, **more)
    return file


def same(found, state):
    """Every tensor of the model is there with its values."""
    assert set(found) == set(state)
    assert all(np.array_equal(found[name].float().numpy(), state[name].numpy()) for name in state)


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 1.0}},
    "model": lambda state: {"model": state, "step": 7},
    "DistributedDataParallel": lambda state: {"state_dict": prefixed(state, "module.")},
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: {"state_dict": prefixed(state, "_orig_mod.module.")},
    "a compiled tower": lambda state: {
        name.replace("visual.", "visual._orig_mod."): one for name, one in state.items()
    },
    "an average alone": lambda state: {"state_dict_ema": state, "epoch": 3},
    "an average beside": lambda state: {"state_dict_ema": {}, "state_dict": state},
    "a part of what was trained": lambda state: {
        "state_dict": {
            **prefixed(state, "clip."),
            "criterion.logit_scale": state["logit_scale"],
            "head.weight": state["logit_scale"],
        }
    },
    "an adapter's base": lambda state: prefixed(state, "base_model.model."),
    "a counted average": lambda state: {**prefixed(state, "module."), "n_averaged": state["logit_scale"] * 0},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_training_checkpoints(wrap, state, tmp_path):
    same(checkpoint.read(save(tmp_path / "epoch.pt", wrap(state))), state)


def test_of_two_models_neither_is_taken(state, tmp_path):
    both = {**prefixed(state, "student."), **prefixed(state, "teacher.")}
    with pytest.raises(InputError, match=r"holds several models \(student\., teacher\.\)"):
        checkpoint.read(save(tmp_path / "both.pt", both))


def test_a_traced_model_of_open_clip_holds_its_attention_mask(seeded, state, tmp_path):
    import torch

    example = {"encode_text": torch.zeros(1, 77, dtype=torch.int64), "encode_image": torch.zeros(1, 3, 224, 224)}
    torch.jit.save(torch.jit.trace_module(seeded.module, example, check_trace=False), str(tmp_path / "traced.pt"))
    assert "attn_mask" in checkpoint.read(tmp_path / "traced.pt")
    found = model.load(CONFIG, weights.find_weights(CONFIG, str(tmp_path / "traced.pt")), towers())
    same(found.module.state_dict(), state)


NO_NUMBERS = {
    "int8": (lambda one: (100 * one).char(), "visual.conv1.weight holds int8, as quantised weights do"),
    "NaN": (lambda one: one.where(one != one.max(), one * float("nan")), "1 of .* of visual.conv1.weight are NaN"),
    "fp16 overflow": (lambda one: (one + 1e6).half(), "numbers of visual.conv1.weight are NaN or infinite"),
}


@pytest.mark.parametrize(("change", "words"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_weights_that_are_no_numbers_of_the_model_are_refused(change, words, state, tmp_path):
    state["visual.conv1.weight"] = change(state["visual.conv1.weight"])
    with pytest.raises(InputError, match=words):
        model.load(CONFIG, weights.find_weights(CONFIG, str(save(tmp_path / "w.pt", state))), towers())


def test_torch_save_before_1_6(state, tmp_path):
    file = save(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False)
    assert checkpoint.form(file) == "legacy"
    same(checkpoint.read(file), state)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "weights"])
def test_safetensors_under_any_name(name, state, tmp_path):
    from safetensors.torch import save_file

    save_file({one: value.contiguous() for one, value in state.items()}, str(tmp_path / name))
    same(checkpoint.read(tmp_path / name), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_computed_in_fp32(dtype, state, tmp_path):
    import torch

    file = save(tmp_path / "half.pt", {name: value.to(getattr(torch, dtype)) for name, value in state.items()})
    loaded = model.load(CONFIG, weights.find_weights(CONFIG, str(file)), towers())
    assert {one.dtype for one in loaded.module.parameters()} == {torch.float32}
    wanted = state["text_projection"].to(getattr(torch, dtype)).float()
    assert torch.equal(loaded.module.text_projection, wanted)


@pytest.fixture(scope="module")
def archive(seeded, tmp_path_factory):
    """The model as a TorchScript archive with OpenAI's sizes as buffers."""
    import torch

    class Whole(torch.nn.Module):
        def __init__(self, clip):
            super().__init__()
            for name, part in clip.named_children():
                setattr(self, name, part)
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(clip, name))
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(1))

        def forward(self, rows):
            return self.ln_final(self.token_embedding(rows)) @ self.text_projection

    file = tmp_path_factory.mktemp("archive") / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(Whole(seeded.module), torch.zeros(1, 77, dtype=torch.int64)), str(file))
    return file


def test_a_torchscript_archives_tensors_are_read(archive, state, monkeypatch):
    import torch

    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("the archive was run"))
    assert checkpoint.form(archive) == "torchscript"
    same(checkpoint.read(archive), state)
    assert weights.find_weights(CONFIG, str(archive)).sha256


class Harm:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_malicious_torchscript_archive_does_not_run(archive, tmp_path):
    file, harmed = tmp_path / "evil.pt", tmp_path / "harmed"
    with zipfile.ZipFile(file, "w") as evil:
        evil.writestr("evil/data.pkl", pickle.dumps(Harm(harmed), protocol=2))
        evil.writestr("evil/constants.pkl", b"")
    with pytest.raises(InputError, match="holds no state_dict of tensors"):
        checkpoint.read(file)
    assert not harmed.exists()


def a_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 605219813\n", encoding="utf-8")


def a_tar(file):
    with tarfile.open(file, "w") as archive:
        archive.add(CONFIG, "model.json")


def a_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")


OTHER = {
    "git-lfs": (a_pointer, "a git-lfs pointer to a file of 605 MB, not the file itself. Run 'git lfs pull'"),
    "html": (lambda file: file.write_bytes(b"\n<!DOCTYPE html><html>"), "HTML .*Download the file again"),
    "index": (lambda file: file.write_bytes(b'{"weight_map": {}}'), "JSON text"),
    "gguf": (lambda file: file.write_bytes(b"GGUF\x03\0\0\0\0\0"), "a GGUF file"),
    "keras": (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    "gzip": (lambda file: file.write_bytes(gzip.compress(b"hello")), "a gzip archive"),
    "tar": (a_tar, "a tar archive"),
    "zip": (a_zip, "a zip archive of readme.txt"),
    "empty": (lambda file: file.write_bytes(b""), "damaged or cut off, it is empty"),
    "text": (lambda file: file.write_bytes(b"hello"), "neither a checkpoint of PyTorch nor safetensors"),
    "pickle": (
        lambda file: file.write_bytes(pickle.dumps(argparse.Namespace(lr=1), protocol=4)),
        "a pickle that torch.save did not write; it is not loaded",
    ),
    "arguments": (
        lambda file: save(file, {"state_dict": {}, "args": argparse.Namespace(lr=1)}),
        r"holds no state_dict of tensors \(keys state_dict, args\). Save model.state_dict\(\) and give that",
    ),
    "an object": (lambda file: save(file, argparse.Namespace(lr=1)), r"no state_dict .*\(argparse.Namespace\)"),
    "quantised": (
        lambda file: save(file, {"fc._packed_params._packed_params": (1, None)}),
        "weights that torch quantised, which open_clip does not take. .*--onnx-prefix",
    ),
    "no tensors": (lambda file: save(file, {"epoch": 3}), r"holds no state_dict of tensors \(keys epoch\)"),
    "a list": (lambda file: save(file, [1, 2]), r"holds no state_dict of tensors \(list\)"),
}


@pytest.mark.parametrize(("write", "words"), OTHER.values(), ids=OTHER)
def test_what_is_no_checkpoint_is_named(write, words, tmp_path):
    file = tmp_path / "weights.pt"
    write(file)
    with pytest.raises(InputError, match=words) as caught:
        checkpoint.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_cut_off_safetensors(share, state, tmp_path):
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, str(tmp_path / "whole"))
    whole = (tmp_path / "whole").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"damaged or cut off, (\d+ of \d+ bytes|its header)"):
        checkpoint.read(file)


def transformers_state(state):
    """The same weights under the names and in the layout of transformers' CLIPModel."""
    import torch

    made = {
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_projection.weight": state["text_projection"].T,
        "logit_scale": state["logit_scale"],
    }
    parts = (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"))
    parts += (("ln_final", "text_model.final_layer_norm"),)
    inner = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"))
    inner += (("attn.out_proj", "self_attn.out_proj"),)
    for name, value in state.items():
        found = re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*?)[._](weight|bias)$", name)
        if found:
            there = f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"
            if found[3] == "attn.in_proj":
                for letter, part in zip("qkv", torch.chunk(value, 3)):
                    made[f"{there}.self_attn.{letter}_proj.{found[4]}"] = part
            else:
                made[f"{there}.{dict(inner)[found[3]]}.{found[4]}"] = value
        for here, other in parts:
            if name.startswith(f"{here}."):
                made[name.replace(here, other)] = value
    return made


def documented(words):
    """The Python of docs/weights.md that has these words in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if words in block)


def test_transformers_weights_are_named_and_convert_as_documented(state, tmp_path):
    made = transformers_state(state)
    with pytest.raises(InputError, match="of transformers' CLIPModel.*open_clip_model.safetensors.*docs/weights.md"):
        checkpoint.read(save(tmp_path / "pytorch_model.bin", made))
    with pytest.raises(InputError, match="of transformers' SiglipModel.*of the same model$"):
        checkpoint.read(save(tmp_path / "siglip.bin", {**made, "logit_bias": state["logit_scale"]}))
    names = {}
    exec(documented("def convert"), names)
    same(names["convert"](made), state)


def test_timms_vision_tower_alone(tmp_path, state):
    file = save(tmp_path / "vit.pt", {"patch_embed.proj.weight": state["visual.conv1.weight"]})
    with pytest.raises(InputError, match="vision tower alone"):
        checkpoint.read(file)


def larger(tmp_path, **sizes):
    config = json.loads(Path(CONFIG).read_text(encoding="utf-8"))
    config["vision_cfg"]["image_size"] = sizes.get("image", 224)
    config["text_cfg"]["context_length"] = sizes.get("context", 77)
    name = tmp_path / "larger.json"
    name.write_text(json.dumps(config), encoding="utf-8")
    return str(name)


def test_positions_of_another_resolution_are_resized_only_when_asked(state, tmp_path):
    file, name = save(tmp_path / "w.pt", state), larger(tmp_path, image=256)
    found, sizes = weights.find_weights(name, str(file)), library.sizes(name)
    with pytest.raises(InputError, match="has 50 positions, the architecture 65; .*--resize-positions"):
        model.load(name, found, sizes)
    loaded = model.load(name, found, sizes, None, True)
    assert loaded.module.visual.positional_embedding.shape[0] == 65
    assert np.array_equal(
        loaded.module.visual.positional_embedding[0].detach().numpy(), state["visual.positional_embedding"][0].numpy()
    )


def test_positions_of_another_context(state, tmp_path):
    file, name = save(tmp_path / "w.pt", state), larger(tmp_path, context=64)
    found, sizes = weights.find_weights(name, str(file)), library.sizes(name)
    with pytest.raises(InputError, match="positional_embedding has 77 positions, the architecture 64"):
        model.load(name, found, sizes)


def test_what_differs_is_said(state, tmp_path):
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:, :, :16, :16].contiguous()
    del state["ln_final.bias"]
    with pytest.raises(InputError, match=r"visual.conv1.weight is \[128, 3, 16, 16\].*\[128, 3, 32, 32\]; 1 more"):
        model.load(CONFIG, weights.find_weights(CONFIG, str(save(tmp_path / "w.pt", state))), towers())


def test_npz_is_read_where_open_clip_takes_it(tmp_path):
    np.savez(tmp_path / "webli.npz", **{"params/img/embedding/kernel": np.zeros((2, 2), np.float32)})
    assert checkpoint.form(tmp_path / "webli.npz") == checkpoint.NPZ
    with pytest.raises(InputError, match=r"webli.npz: (not big_vision's weights|open_clip .* reads no .npz)"):
        model.load(CONFIG, weights.find_weights(CONFIG, str(tmp_path / "webli.npz")), towers())


@pytest.fixture
def snapshot(tmp_path, state):
    """A repository in the hub's cache: a snapshot of links to blobs."""
    blobs, shot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    shot.mkdir(parents=True)
    save(blobs / "123", state)
    (shot / "open_clip_pytorch_model.bin").symlink_to(blobs / "123")
    config = json.loads(Path(CONFIG).read_text(encoding="utf-8"))
    stated = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (blobs / "456").write_text(json.dumps(stated), encoding="utf-8")
    (shot / "open_clip_config.json").symlink_to(blobs / "456")
    return shot


def test_a_hubs_snapshot_and_its_cache_folder(snapshot):
    for folder in (snapshot, snapshot.parent.parent):
        found = weights.find_weights(CONFIG, str(folder))
        assert found.file == snapshot / "open_clip_pytorch_model.bin"
        assert found.preprocess.mean == (0.5, 0.5, 0.5)


def test_a_dangling_link_is_said(snapshot):
    (snapshot.parent.parent / "blobs" / "123").unlink()
    for given in (snapshot, snapshot / "open_clip_pytorch_model.bin"):
        with pytest.raises(
            InputError, match="a link to .*123, which does not exist; copy a hub's snapshot with cp -rL"
        ):
            weights.find_weights(CONFIG, str(given))


def test_a_folder_of_several_files_or_none(tmp_path, state):
    with pytest.raises(InputError, match="expected one file of weights in this folder, found none"):
        weights.find_weights(CONFIG, str(tmp_path))
    save(tmp_path / "epoch_1.pt", state)
    assert weights.find_weights(CONFIG, str(tmp_path)).file.name == "epoch_1.pt"
    save(tmp_path / "epoch_2.pt", state)
    with pytest.raises(InputError, match=r"found epoch_1.pt, epoch_2.pt"):
        weights.find_weights(CONFIG, str(tmp_path))


def test_shards_are_named_and_merge_as_documented(tmp_path, state, monkeypatch):
    from safetensors.torch import save_file

    names = sorted(state)
    for n, part in enumerate((names[:50], names[50:])):
        shard = tmp_path / "FOLDER" / f"model-0000{n + 1}-of-00002.safetensors"
        shard.parent.mkdir(exist_ok=True)
        save_file({name: state[name].contiguous() for name in part}, str(shard))
    for given in (shard.parent, shard):
        with pytest.raises(InputError, match="one of 2 shards, .* merge them into one file as docs/weights.md shows"):
            weights.find_weights(CONFIG, str(given))
    monkeypatch.chdir(tmp_path)
    exec(documented("shards"), {})
    same(checkpoint.read(tmp_path / "merged.safetensors"), state)


@pytest.mark.parametrize("text", ["", "{}", '{"model_cfg": {"embed_dim": 3}}', "[1]"])
def test_a_folders_config_that_is_none(text, tmp_path, state):
    save(tmp_path / "open_clip_pytorch_model.bin", state)
    (tmp_path / "open_clip_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"open_clip_config.json: "):
        weights.find_weights(CONFIG, str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_no_full_disk(monkeypatch):
    def fails(error):
        def download(*_, **__):
            raise FileNotFoundError("Failed to download file") from error

        monkeypatch.setattr(library.part("pretrained"), "download_pretrained", download)
        with pytest.raises(InputError) as caught:
            weights.find_weights("ViT-B-32", "laion2b_s34b_b79k")
        return str(caught.value)

    assert "the download failed (no route)" in fails(ConnectionError("no route"))
    assert "disk full; free some space in the hub's cache" in fails(OSError(28, "No space left on device"))
